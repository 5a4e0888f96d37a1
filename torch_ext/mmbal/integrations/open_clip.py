"""A CLIP-MoE in open_clip's model class: its description, its folder on disk, and its router losses in a training loop.

``mmbal.upcycle`` makes one of an ``open_clip.CLIP`` in place; ``open_clip.create_model`` knows dense models alone, so
that a CLIP-MoE is loaded with :func:`load_open_clip_moe`. Needs the package open_clip_torch.
"""

from __future__ import annotations

import json
from copy import deepcopy
from dataclasses import asdict
from pathlib import Path

import torch

try:
    import open_clip
except ModuleNotFoundError as error:
    if error.name != "open_clip":
        raise
    text = "mmbal.integrations.open_clip needs open_clip: pip install open_clip_torch"
    raise ModuleNotFoundError(text, name="open_clip") from None
from open_clip.transform import PreprocessCfg, merge_preprocess_dict
from open_clip.transformer import PatchDropout, TextTransformer, VisionTransformer
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import nn

from mmbal.checkpoints.architecture import TOWERS, CLIPArchitecture, Mixture, TextTower, VisionTower
from mmbal.checkpoints.configuration import FORMAT_VERSION, open_clip_entry
from mmbal.checkpoints.configuration import open_clip_model_config as model_config
from mmbal.dense import describe_mlp
from mmbal.files import atomic_folder
from mmbal.moe import MoEMLP, collect_router, router_losses

CONFIG, WEIGHTS = "open_clip_config.json", "open_clip_model.safetensors"  # the names that open_clip looks for
# The weights' dtype under each precision of open_clip. With amp it is autocast that computes in another one.
PRECISIONS = {
    **dict.fromkeys(("fp32", "amp", "amp_bf16", "amp_bfloat16"), torch.float32),
    **dict.fromkeys(("bf16", "pure_bf16"), torch.bfloat16),
    **dict.fromkeys(("fp16", "pure_fp16"), torch.float16),
}


def build_model(architecture: CLIPArchitecture, device="cpu", dtype=torch.float32) -> open_clip.CLIP:
    """An ``open_clip.CLIP`` with :class:`mmbal.MoEMLP` in the mixture layers; weights are random, on "meta" none."""
    return _build(model_config(architecture), architecture.mixtures, device).to(dtype)


def _build(model_cfg, mixtures, device, cast_dtype=None):
    cfg = deepcopy(model_cfg)
    kind = open_clip.CustomTextCLIP if cfg.pop("custom_text", False) else open_clip.CLIP
    with torch.device(device):
        model = kind(**cfg, cast_dtype=cast_dtype)
    for tower, mixture in mixtures.items():
        blocks = _blocks(model)[tower]
        if mixture.layers[-1] >= len(blocks):
            raise ValueError(f"mixtures: {tower} has {len(blocks)} layers, layer {mixture.layers[-1]} is asked for")
        for layer in mixture.layers:
            weight_FD = blocks[layer].mlp.c_fc.weight
            F, D = weight_FD.shape
            blocks[layer].mlp = MoEMLP(D, F, **mixture.options(), device=weight_FD.device, dtype=weight_FD.dtype)
    return model


def _text_of(model):
    """The module that has the text tower's parts."""
    return model.text if isinstance(model, open_clip.CustomTextCLIP) else model


def _blocks(model):
    return {"vision": model.visual.transformer.resblocks, "text": _text_of(model).transformer.resblocks}


def architecture_of(model: nn.Module) -> CLIPArchitecture:
    """Sizes and mixtures of an ``open_clip.CLIP``, or ``CustomTextCLIP`` with open_clip's own towers, dense or not.

    What was found is built once more on the meta device and compared, module by module and tensor by tensor: a model
    with anything that :class:`CLIPArchitecture` cannot say (LayerScale, a logit bias, attentional pooling, towers of
    timm or transformers, ...) is refused with a ValueError. Patch dropout is left out, it acts in training only.
    """
    if type(model) not in (open_clip.CLIP, open_clip.CustomTextCLIP):
        raise ValueError(f"architecture_of: model must be an open_clip.CLIP itself, got {type(model).__name__}")
    text = _text_of(model)
    for name, tower, wanted in (("visual", model.visual, VisionTransformer), ("text", text, TextTransformer)):
        if not isinstance(tower, (wanted, open_clip.CLIP)):
            raise ValueError(f"architecture_of: {name} must be a {wanted.__name__}, got {type(tower).__name__}")
    if text.text_projection is None or model.visual.proj is None:
        raise ValueError("architecture_of: both towers must have their projection")
    blocks = _blocks(model)
    mixtures = {tower: mixture for tower in TOWERS if (mixture := _mixture_of(blocks[tower], tower)) is not None}
    (height, width), (patch_height, patch_width) = model.visual.image_size, model.visual.patch_size
    if height != width or patch_height != patch_width:
        raise ValueError("architecture_of: images and patches must be square")
    vision = VisionTower(
        **_sizes(blocks, mixtures, "vision"),
        patch_size=patch_height,
        image_size=height,
        layer_norm_eps=model.visual.ln_post.eps,
    )
    context_length, _ = text.positional_embedding.shape
    vocab_size = text.token_embedding.num_embeddings
    eos = _pooling(text)[1] if _pooling(text)[0] == "eos" else vocab_size - 1
    text_tower = TextTower(
        **_sizes(blocks, mixtures, "text"),
        context_length=context_length,
        vocab_size=vocab_size,
        layer_norm_eps=text.ln_final.eps,
        eos_token_id=eos,
        bos_token_id=eos - 1,
    )
    architecture = CLIPArchitecture(model.visual.proj.shape[1], vision, text_tower, mixtures)
    _compare(model, _build(_config_of(model, architecture), mixtures, "meta"))
    return architecture


def _config_of(model, architecture):
    """model_cfg with what an architecture does not say."""
    config = model_config(architecture)
    if isinstance(model, open_clip.CustomTextCLIP):
        config["custom_text"] = True
    if isinstance(model.visual.patch_dropout, PatchDropout):
        config["vision_cfg"]["patch_dropout"] = model.visual.patch_dropout.prob
    return config


def _pooling(text):
    """(how the text is pooled, the token at which it is if that is "eos")."""
    if isinstance(text, open_clip.CLIP):
        return text.text_pool_type, text.text_eos_id
    return text.pool_type, text.eos_id


def _mixture_of(blocks, tower):
    layers = {i: block.mlp for i, block in enumerate(blocks) if isinstance(block.mlp, MoEMLP)}
    if not layers:
        return None
    first, *others = (Mixture.of(layers, layer) for layer in layers.values())
    if any(other != first for other in others):
        raise ValueError(f"architecture_of: the mixture layers of {tower} must agree in all options")
    return first


def _sizes(blocks, mixtures, tower):
    """What the two towers have alike."""
    first = blocks[tower][0]
    dense = [block.mlp for block in blocks[tower] if not isinstance(block.mlp, MoEMLP)]
    if dense:
        parts = describe_mlp(dense[0], f"architecture_of: an mlp of {tower}")
        mlp_width, activation = parts.fc1.out_features, parts.activation
    else:
        mlp_width, activation = first.mlp.hidden_dim, mixtures[tower].activation
    return {
        "width": first.ln_2.normalized_shape[0],
        "layers": len(blocks[tower]),
        "heads": first.attn.num_heads,
        "mlp_width": mlp_width,
        "activation": activation,
    }


def _compare(model, twin):
    """Raises a ValueError that names the first thing in which model and what its architecture gives differ."""
    for kind, ours, theirs in (
        ("tensor", _shapes(model.state_dict()), _shapes(twin.state_dict())),
        ("buffer", _shapes(dict(model.named_buffers())), _shapes(dict(twin.named_buffers()))),
        ("module", _modules(model), _modules(twin)),
        ("attribute", _attributes(model), _attributes(twin)),
    ):
        for name in ours.keys() | theirs.keys():
            if ours.get(name) != theirs.get(name):
                raise ValueError(
                    f"architecture_of: {kind} {name}: {theirs.get(name, 'none')} is what an open_clip CLIP of these "
                    f"sizes has, the model has {ours.get(name, 'none')}"
                )


def _shapes(tensors):
    return {name: list(tensor.shape) for name, tensor in tensors.items()}


def _modules(model):
    """Type and options of every module. LayerNormFp32 is LayerNorm in a model of lower precision."""

    def described(module):
        options = [module.extra_repr()]
        if isinstance(module, nn.MultiheadAttention):
            options += [module.num_heads, module.dropout, module.batch_first]
        return " ".join([type(module).__name__.removesuffix("Fp32"), *map(str, options)])

    return {name: described(module) for name, module in model.named_modules()}


def _attributes(model):
    text, visual = _text_of(model), model.visual
    pooling, eos = _pooling(text)
    found = {
        f"visual.{name}": getattr(visual, name)
        for name in ("image_size", "patch_size", "pool_type", "final_ln_after_pool", "output_tokens")
    }
    found |= {"context_length": text.context_length, "vocab_size": text.vocab_size, "text pool_type": pooling}
    found |= {"text eos_id": eos} if pooling == "eos" else {}
    found |= {f"text {name}": getattr(text, name, False) for name in ("output_tokens", "use_pad_mask")}
    return found


def save_open_clip_moe(model: nn.Module, folder) -> None:
    """Writes an upcycled ``open_clip.CLIP`` to ``folder``: open_clip_config.json and open_clip_model.safetensors.

    The configuration is open_clip's, with the mixtures under "mmbal"; names and dtypes of the tensors are the model's.
    The preprocessing is what ``open_clip.create_model`` left in ``model.visual.preprocess_cfg``; in a model without it,
    open_clip's default: mean and deviation of OpenAI's training images. The folder appears under its name only when it
    is complete; one that this function wrote before is replaced. :func:`architecture_of` says which models are refused.
    """
    architecture = architecture_of(model)
    if not architecture.mixtures:
        raise ValueError("save_open_clip_moe: model must have MoEMLP layers; open_clip saves a dense model by itself")

    def is_ours(there):
        return (there / CONFIG).is_file() and bool(_read_config(there, "save_open_clip_moe"))

    default = asdict(PreprocessCfg(size=model.visual.image_size))
    config = {
        "model_cfg": _config_of(model, architecture),
        "preprocess_cfg": merge_preprocess_dict(default, getattr(model.visual, "preprocess_cfg", {})),
        "mmbal": open_clip_entry(architecture),
    }
    with atomic_folder(folder, is_ours, "those of a CLIP-MoE") as partial:
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in model.state_dict().items()}
        save_file(tensors, partial / WEIGHTS, metadata={"format": "pt"})
        (partial / CONFIG).write_text(json.dumps(config, indent=2) + "\n")


def load_open_clip_moe(folder, device="cpu", precision: str = "fp32") -> open_clip.CLIP:
    """Reads what :func:`save_open_clip_moe` wrote; returns the model in evaluation mode.

    precision : as in ``open_clip.create_model``. The experts are converted as other matrices are; with "fp16" and
        "bf16" the routers stay in float32, as LayerNorms do.

    The preprocessing is in ``model.visual.preprocess_cfg``, for ``open_clip.image_transform_v2``; the tokenizer is
    ``open_clip.get_tokenizer("local-dir:FOLDER")``.
    """
    if precision not in PRECISIONS:
        raise ValueError(f"load_open_clip_moe: precision must be one of {', '.join(PRECISIONS)}, got {precision!r}")
    folder = Path(folder)
    model_cfg, preprocess_cfg, mixtures = _read_config(folder, "load_open_clip_moe")
    try:
        with safe_open(folder / WEIGHTS, framework="pt") as file:
            shapes = {name: list(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
            model = _empty_model(model_cfg, mixtures, precision, shapes)
            tensors = {  # copies: what get_tensor gives is the file in memory, which somebody may write to
                name: file.get_tensor(name).to(device, wanted.dtype, copy=True)
                for name, wanted in model.state_dict().items()
            }
    except (OSError, SafetensorError) as error:
        raise ValueError(f"load_open_clip_moe: {folder / WEIGHTS} cannot be read: {error}") from None
    model.load_state_dict(tensors, assign=True)
    text = _text_of(model)
    text.attn_mask = torch.full(text.attn_mask.shape, -torch.inf, device=device).triu_(1)  # is not in the file
    default = asdict(PreprocessCfg(size=model.visual.image_size))
    open_clip.set_model_preprocess_cfg(model, merge_preprocess_dict(default, preprocess_cfg))
    return model.eval()


def _read_config(folder, who):
    """model_cfg, preprocess_cfg and the mixtures."""
    path = folder / CONFIG
    try:
        config = json.loads(path.read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"{who}: {path} cannot be read: {error}") from None
    parts = [config.get(key) if isinstance(config, dict) else None for key in ("model_cfg", "mmbal")]
    if not all(isinstance(part, dict) for part in parts) or not isinstance(parts[1].get("mixtures"), dict):
        raise ValueError(
            f"{who}: {path} must have model_cfg, and mmbal with mixtures; "
            "a dense model is loaded with open_clip.create_model('local-dir:...')"
        )
    model_cfg, ours = parts
    if ours.get("format_version") != FORMAT_VERSION:
        version = ours.get("format_version")
        raise ValueError(f"{who}: {path}: format_version must be {FORMAT_VERSION}, got {version!r}")
    towers = {tower: model_cfg.get(f"{tower}_cfg") for tower in TOWERS}
    if not all(isinstance(cfg, dict) for cfg in towers.values()):
        raise ValueError(f"{who}: {path}: model_cfg must have vision_cfg and text_cfg")
    if foreign := [key for cfg in towers.values() for key in cfg if key.startswith(("timm_", "hf_model"))]:
        raise ValueError(f"{who}: {path}: towers must be open_clip's own, got {', '.join(foreign)}")
    if unknown := set(ours["mixtures"]) - set(TOWERS):
        raise ValueError(f"{who}: {path}: mixtures must be of text and vision, got {sorted(unknown)}")
    mixtures = {
        tower: Mixture.from_json(value, f"{who}: {path}: mixtures: {tower}")
        for tower, value in ours["mixtures"].items()
    }
    preprocess_cfg = config.get("preprocess_cfg")
    return model_cfg, preprocess_cfg if isinstance(preprocess_cfg, dict) else {}, mixtures


def _empty_model(model_cfg, mixtures, precision, shapes):
    """The model on the meta device, in the dtypes of the precision, once it fits the shapes of the file's tensors."""
    for tower in TOWERS:  # before anything is built: each layer has tensors
        layers = model_cfg[f"{tower}_cfg"].get("layers", 12)
        if not isinstance(layers, int) or not 1 <= layers <= len(shapes):
            raise ValueError(f"load_open_clip_moe: {tower}_cfg: layers must be an int and those of the file")
    try:
        model = _build(model_cfg, mixtures, "meta", open_clip.get_cast_dtype(precision))
    except (TypeError, ValueError, AssertionError, RuntimeError, ZeroDivisionError) as error:
        raise ValueError(f"load_open_clip_moe: the configuration describes no CLIP: {error}") from None
    expected = _shapes(model.state_dict())
    for name in expected.keys() | shapes.keys():
        if expected.get(name) != shapes.get(name):
            raise ValueError(
                f"load_open_clip_moe: {name} must be {expected.get(name, 'absent')} by the configuration, the file has "
                f"{shapes.get(name, 'none')}"
            )
    if precision.startswith("pure_"):
        return model.to(PRECISIONS[precision])
    if PRECISIONS[precision] != torch.float32:
        open_clip.convert_weights_to_lp(model, PRECISIONS[precision])
        for layer in model.modules():
            if isinstance(layer, MoEMLP):
                layer.experts.to(PRECISIONS[precision])
                layer.router.float()
    return model


class RouterLoss(nn.Module):
    """A loss of open_clip plus the router losses of ``model``, for open_clip's training loop and others like it:

        loss = RouterLoss(open_clip.create_loss(args), model)
        train_one_epoch(model, data, loss, ...)

    Each forward of ``model`` (what the loop calls, so the DistributedDataParallel or compiled one) that takes gradients
    is recorded, and the next call of the loss adds its router losses: to the dict under "router_loss", else to the sum.
    ``options`` are those of :func:`mmbal.router_losses`.
    """

    def __init__(self, loss: nn.Module, model: nn.Module, **options):
        super().__init__()
        with collect_router(model):  # raises where there is no mixture
            pass
        self.loss, self.options = loss, options
        self._context = self._routers = None
        model.register_forward_pre_hook(self._record)

    def _record(self, model, inputs):
        self._stop()
        if torch.is_grad_enabled():
            self._context = collect_router(model)
            self._routers = self._context.__enter__()

    def _stop(self):
        if self._context is not None:
            self._context.__exit__(None, None, None)
        self._context = self._routers = None

    def forward(self, *features, output_dict=False, **named_features):
        losses = self.loss(*features, output_dict=True, **named_features)
        if self._routers is not None:
            losses["router_loss"] = router_losses(self._routers, **self.options).total
        elif torch.is_grad_enabled():
            raise RuntimeError("RouterLoss: the model must run before each call of its loss")
        self._stop()
        return losses if output_dict else sum(losses.values())
