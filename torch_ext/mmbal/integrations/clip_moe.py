"""CLIP-MoE inside transformers: CLIP's own models whose chosen ``mlp`` blocks are :class:`mmbal.MoEMLP` layers.

After ``import mmbal`` they load with ``AutoModel.from_pretrained`` as transformers' own models do.
"""

import copy
import math
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn
from transformers import (
    AutoModel,
    AutoModelForZeroShotImageClassification,
    AutoProcessor,
    AutoTokenizer,
    CLIPModel,
    CLIPProcessor,
    CLIPTextModel,
    CLIPTextModelWithProjection,
    CLIPTokenizerFast,
    CLIPVisionModel,
    CLIPVisionModelWithProjection,
)
from transformers.models.clip.modeling_clip import CLIPMLP, CLIPOutput
from transformers.utils import can_return_tuple

from mmbal.checkpoints.architecture import TOWERS, Mixture
from mmbal.integrations.clip_moe_config import CLIPMoEConfig, CLIPMoETextConfig, CLIPMoEVisionConfig, with_mixture
from mmbal.moe import MoEMLP, collect_router, router_losses

__all__ = [
    "CLIPMoEConfig",
    "CLIPMoEModel",
    "CLIPMoEOutput",
    "CLIPMoETextConfig",
    "CLIPMoETextModel",
    "CLIPMoETextModelWithProjection",
    "CLIPMoEVisionConfig",
    "CLIPMoEVisionModel",
    "CLIPMoEVisionModelWithProjection",
    "as_clip_moe",
]


class _WithMixtures:
    """What the models below share: they are built as CLIP's, then the chosen blocks are replaced."""

    def __init__(self, config):
        if not config.mixtures:
            raise ValueError(
                f"{type(self).__name__}: the configuration must have a mixture; a dense model is loaded with CLIP's own"
                " class, and mmbal.upcycle gives it one"
            )
        mixtures = {tower: Mixture.from_json(value, tower) for tower, value in config.mixtures.items()}
        options = {tower: mixture.options() for tower, mixture in mixtures.items()}
        super().__init__(config)
        for tower, mixture in mixtures.items():
            blocks = _blocks(self, tower)
            for index in mixture.layers:
                blocks[index].mlp = _new_layer(blocks[index].mlp, options[tower])
            _change_tower_class(self, tower)
        self.init_weights()

    @classmethod
    def is_custom_code(cls) -> bool:
        """transformers gives up the initialisation of blocks whose weights lie in sub-modules (CLIP's MLP, attention,
        projections) for classes from elsewhere, unless they say that what was loaded is safe from it. Here it is."""
        return False

    def _init_weights(self, module):
        super()._init_weights(module)
        if isinstance(module, MoEMLP):
            _initialise(module, self.config)


@dataclass
class CLIPMoEOutput(CLIPOutput):
    """CLIPOutput, and with ``output_router_logits`` what the routers did.

    aux_loss : load-balance loss, the mean of the layers' (:func:`mmbal.router_losses`), without its coefficient.
    router_logits : of every mixture layer [tokens, experts], those of the text tower first.
    """

    aux_loss: Tensor | None = None
    router_logits: tuple[Tensor, ...] | None = None


class CLIPMoEModel(_WithMixtures, CLIPModel):
    """CLIPModel with mixtures of experts; see :class:`CLIPMoEConfig`.

    By default its loss is CLIP's alone, so that a script that adds ``mmbal.router_losses`` does not count them twice.
    With ``output_router_logits=True``, in the configuration or the call, the output has ``aux_loss`` and
    ``router_logits``, and while training ``router_aux_loss_coef`` times ``aux_loss`` is added to the loss that
    ``return_loss=True`` asks for. ``attention_mask`` says which text tokens are counted; all are routed.
    """

    config_class = CLIPMoEConfig

    @can_return_tuple
    def forward(
        self,
        input_ids=None,
        pixel_values=None,
        attention_mask=None,
        position_ids=None,
        return_loss=None,
        output_router_logits=None,
        **options,
    ) -> CLIPMoEOutput:
        inputs = {
            "input_ids": input_ids,
            "pixel_values": pixel_values,
            "attention_mask": attention_mask,
            "position_ids": position_ids,
            "return_loss": return_loss,
            **options,
            "return_dict": True,
        }
        if output_router_logits is None:
            output_router_logits = self.config.output_router_logits
        if not output_router_logits:
            return CLIPMoEOutput(**super().forward(**inputs))
        with collect_router(self) as routers:
            output = super().forward(**inputs)
        records = [_count_only(record, attention_mask) for record in routers]
        output = CLIPMoEOutput(
            **output,
            aux_loss=router_losses(records).load_balance,
            router_logits=tuple(record.logits for record in records),
        )
        if output.loss is not None and self.training:
            output.loss = output.loss + self.config.router_aux_loss_coef * output.aux_loss
        return output


class CLIPMoEVisionModel(_WithMixtures, CLIPVisionModel):
    """CLIPVisionModel with mixtures of experts, the tower that LLaVA and others take from a CLIP."""

    config_class = CLIPMoEVisionConfig


class CLIPMoETextModel(_WithMixtures, CLIPTextModel):
    config_class = CLIPMoETextConfig


class CLIPMoEVisionModelWithProjection(_WithMixtures, CLIPVisionModelWithProjection):
    config_class = CLIPMoEVisionConfig


class CLIPMoETextModelWithProjection(_WithMixtures, CLIPTextModelWithProjection):
    config_class = CLIPMoETextConfig


CLASSES = {
    CLIPModel: CLIPMoEModel,
    CLIPVisionModel: CLIPMoEVisionModel,
    CLIPTextModel: CLIPMoETextModel,
    CLIPVisionModelWithProjection: CLIPMoEVisionModelWithProjection,
    CLIPTextModelWithProjection: CLIPMoETextModelWithProjection,
}


def as_clip_moe(model: nn.Module) -> nn.Module:
    """A CLIP of transformers whose ``mlp`` blocks were replaced by :class:`mmbal.MoEMLP` layers becomes, in place, the
    class here that saves and loads them: a ``CLIPModel`` becomes a :class:`CLIPMoEModel`, a ``CLIPVisionModel`` a
    :class:`CLIPMoEVisionModel`, and so on. Its weights stay the same objects; its configuration is a new one, so that
    other models that share the old one are untouched. Returns ``model``.

    A model around a tower keeps the tower's old configuration until it is told: ``llava.config.vision_config =
    as_clip_moe(llava.model.vision_tower).config``.

    Raises
    ------
    ValueError
        For another class (also a class derived from CLIP's: its own methods would be lost), for a tower whose mixtures
        differ in their options, for an ``mlp`` that is something else, and where there is no mixture. Nothing is
        changed then.
    """
    target = type(model) if type(model) in CLASSES.values() else CLASSES.get(type(model))
    if target is None:
        names = ", ".join(cls.__name__ for cls in CLASSES)
        raise ValueError(f"as_clip_moe: model must be of class {names} of transformers, got {type(model).__name__}")
    whole = target is CLIPMoEModel
    towers = TOWERS if whole else (target.config_class.tower,)
    old = {tower: getattr(model.config, f"{tower}_config") if whole else model.config for tower in towers}
    mixtures = {tower: _read_mixture(_blocks(model, tower), old[tower], tower) for tower in towers}
    mixtures = {tower: mixture for tower, mixture in mixtures.items() if mixture is not None}
    if not mixtures:
        raise ValueError(f"as_clip_moe: model must have MoEMLP layers, {type(model).__name__} has none")

    if whole:
        config = copy.deepcopy(model.config)
        config.__class__ = CLIPMoEConfig
        for name, default in (("output_router_logits", False), ("router_aux_loss_coef", 0.01)):
            setattr(config, name, getattr(model.config, name, default))
        config.set_mixtures(mixtures)
        new = {tower: getattr(config, f"{tower}_config") for tower in towers}
    else:
        new = {tower: with_mixture(old[tower], tower, mixture) for tower, mixture in mixtures.items()}
        config = new[towers[0]]
    replaced = {id(model.config): config} | {id(old[tower]): new[tower] for tower in towers}
    for module in model.modules():
        known = getattr(module, "config", None)
        if id(known) in replaced:
            module.config = replaced[id(known)]
    _change_class(model, target)
    for tower in mixtures:
        _change_tower_class(model, tower)
        for layer in (block.mlp for block in _blocks(model, tower) if type(block.mlp) is MoEMLP):
            layer.config = new[tower]
            for module in layer.modules():
                module._is_hf_initialized = True  # transformers must not draw these weights again
    return model


def _blocks(model, tower: str) -> nn.ModuleList:
    """The encoder's layers. A model of one tower is the tower itself since transformers 5."""
    return getattr(model, f"{tower}_model", model).encoder.layers


def _change_tower_class(model, tower: str) -> None:
    """Inside a whole model; before transformers 5 the towers there are no models of their own."""
    part = getattr(model, f"{tower}_model", None)
    if type(part) in CLASSES:
        _change_class(part, CLASSES[type(part)])


def _change_class(model, target: type) -> None:
    model.__class__ = target
    try:
        from transformers.utils.output_capturing import _CAN_RECORD_REGISTRY
    except ImportError:  # transformers before 5.2 keeps no such list
        return
    _CAN_RECORD_REGISTRY[model] = model._can_record_outputs  # by class; only a constructor enters it otherwise


def _new_layer(mlp: CLIPMLP, options: dict) -> MoEMLP:
    like = mlp.fc1.weight
    layer = MoEMLP(mlp.fc1.in_features, mlp.fc1.out_features, **options, device=like.device, dtype=like.dtype)
    layer.config = mlp.config
    return layer.train(mlp.training)


@torch.no_grad()
def _initialise(layer: MoEMLP, config) -> None:
    """Experts as CLIP initialises an MLP, with biases of zero; the router as DMU does, uniform in +-1/sqrt(D)."""
    factor, depth = config.initializer_factor, layer.config.num_hidden_layers
    bound = 1 / math.sqrt(layer.dim)
    _fill(layer.experts.w1, lambda w: nn.init.normal_(w, std=(2 * layer.dim) ** -0.5 * factor))
    _fill(layer.experts.w2, lambda w: nn.init.normal_(w, std=layer.dim**-0.5 * (2 * depth) ** -0.5 * factor))
    _fill(layer.experts.b1, nn.init.zeros_)
    _fill(layer.experts.b2, nn.init.zeros_)
    _fill(layer.router.weight, lambda w: nn.init.uniform_(w, -bound, bound))
    _fill(layer.router.bias, nn.init.zeros_)


def _fill(parameter, fill) -> None:
    """Unless it was loaded: transformers marks what was."""
    if parameter is not None and not getattr(parameter, "_is_hf_initialized", False):
        fill(parameter)


def _count_only(record, attention_mask):
    """The record with the padding of the text marked as not counted."""
    if attention_mask is None or not record.name.startswith("text_model."):
        return record
    return record._replace(token_mask=attention_mask.reshape(-1).bool())


def _read_mixture(blocks, config, tower: str) -> Mixture | None:
    """The mixture that the blocks make together, None where all are dense."""
    found = {}
    for index, block in enumerate(blocks):
        where = f"as_clip_moe: mlp of layer {index} of {tower}"
        if type(block.mlp) is MoEMLP:
            _check_sizes(block.mlp, config, where)
            found[index] = Mixture.of((index,), block.mlp)
        elif type(block.mlp) is not CLIPMLP:
            raise ValueError(f"{where} must be a CLIPMLP or a MoEMLP, got {type(block.mlp).__name__}")
    if not found:
        return None
    first, described = next(iter(found.items()))
    for index, mixture in found.items():
        for name, value in mixture.options().items():
            if value != (expected := getattr(described, name)):
                raise ValueError(
                    f"as_clip_moe: mixtures of one tower must agree in their options, but layer {index} of {tower} has "
                    f"{name}={value!r} and layer {first} has {expected!r}"
                )
    return replace(described, layers=tuple(found))


def _check_sizes(layer: MoEMLP, config, where: str) -> None:
    sizes, wanted = (layer.dim, layer.hidden_dim), (config.hidden_size, config.intermediate_size)
    if sizes != wanted:
        raise ValueError(f"{where} must have (dim, hidden_dim) {wanted} as the configuration says, got {sizes}")
    if layer.experts.b1 is None:
        raise ValueError(f"{where} must have biases, as all experts of CLIP have")


def _register() -> None:
    """Models for AutoModel, CLIP's processor and tokenizer for AutoProcessor and pipelines, and the names of the
    weights in files of one tower, which are as CLIP's."""
    AutoModel.register(CLIPMoEConfig, CLIPMoEModel)
    AutoModelForZeroShotImageClassification.register(CLIPMoEConfig, CLIPMoEModel)
    AutoModel.register(CLIPMoEVisionConfig, CLIPMoEVisionModel)
    AutoModel.register(CLIPMoETextConfig, CLIPMoETextModel)
    AutoProcessor.register(CLIPMoEConfig, CLIPProcessor)
    AutoTokenizer.register(CLIPMoEConfig, fast_tokenizer_class=CLIPTokenizerFast)
    try:
        from transformers.conversion_mapping import (
            get_checkpoint_conversion_mapping,
            register_checkpoint_conversion_mapping,
        )
    except ImportError:  # before transformers 5 the names in the model are those in the file
        return
    for plain, mixed in CLASSES.items():
        if mapping := get_checkpoint_conversion_mapping(plain.__name__):
            register_checkpoint_conversion_mapping(mixed.__name__, mapping)


_register()
