"""Configurations of CLIP-MoE for transformers: those of CLIP, and which layers are mixtures."""

from __future__ import annotations

import copy
import importlib
from typing import ClassVar

from transformers import CLIPConfig, CLIPTextConfig, CLIPVisionConfig

from mmbal.checkpoints.architecture import TOWERS, Mixture


class _NeedsModels:
    """With a configuration in hand ``AutoModel`` can be asked for its model: so the models are registered by then."""

    def __new__(cls, *args, **kwargs):
        importlib.import_module("mmbal.integrations.clip_moe")
        return super().__new__(cls)


class _TowerConfig(_NeedsModels):
    """``mixture``: JSON of the :class:`Mixture` of this tower.

    Derived classes must name ``__init__`` themselves: transformers gives a class without one that of a dataclass.
    """

    def __init__(self, mixture=None, **options):
        options.pop("model_type", None)
        super().__init__(**options)
        self.mixture = None if mixture is None else _check(mixture, self, "mixture").to_json()

    @property
    def mixtures(self) -> dict:
        return {} if self.mixture is None else {self.tower: self.mixture}

    @classmethod
    def get_config_dict(cls, *arguments, **options):
        """Reads the tower's part of the config.json of a whole CLIP-MoE too, as CLIP's own classes do."""
        values, unused = super().get_config_dict(*arguments, **options)
        if values.get("model_type") == CLIPMoEConfig.model_type:
            mixture = (values.get("mixtures") or {}).get(cls.tower)
            values = values[f"{cls.tower}_config"] | {"model_type": cls.model_type, "mixture": mixture}
        return values, unused


class CLIPMoEVisionConfig(_TowerConfig, CLIPVisionConfig):
    model_type = "clip_moe_vision_model"
    tower = "vision"
    __init__ = _TowerConfig.__init__


class CLIPMoETextConfig(_TowerConfig, CLIPTextConfig):
    model_type = "clip_moe_text_model"
    tower = "text"
    __init__ = _TowerConfig.__init__


TOWER_CONFIGS = {"text": CLIPMoETextConfig, "vision": CLIPMoEVisionConfig}


class CLIPMoEConfig(_NeedsModels, CLIPConfig):
    """CLIPConfig of a CLIP with mixtures of experts (DMU, arXiv 2409.19291).

    Parameters
    ----------
    mixtures : which layers of "vision" and "text" are mixtures, and how: {"vision": {"layers": [0, 1],
        "num_experts": 4, "top_k": 2, ...}}, the fields of :class:`mmbal.checkpoints.architecture.Mixture`. A tower
        that is not named stays dense.
    output_router_logits : whether the model returns its router logits and the load-balance loss.
    router_aux_loss_coef : what the load-balance loss is multiplied by where it is added to the loss. 0.01 is DMU's.
    text_config, vision_config, ... : as for CLIPConfig.

    Raises
    ------
    ValueError
        Where mixtures name another tower, a layer that is not there, or options that do not go together.
    """

    model_type = "clip_moe"
    keys_to_ignore_at_inference: ClassVar[list[str]] = ["router_logits", "aux_loss"]

    def __init__(self, mixtures=None, output_router_logits=False, router_aux_loss_coef=0.01, **options):
        options.pop("model_type", None)
        super().__init__(**options)
        self.set_mixtures(mixtures or {})
        self.output_router_logits, self.router_aux_loss_coef = output_router_logits, router_aux_loss_coef

    def set_mixtures(self, mixtures: dict) -> None:
        """``mixtures`` as JSON or :class:`Mixture`; a tower's own configuration may bring its mixture along."""
        if not isinstance(mixtures, dict) or set(mixtures) - set(TOWERS):
            raise ValueError(f"CLIPMoEConfig: mixtures must name towers among {', '.join(TOWERS)}, got {mixtures!r}")
        checked = {}
        for tower in TOWERS:
            config = getattr(self, f"{tower}_config")
            own = getattr(config, "mixture", None)
            if mixtures.get(tower) is not None:
                checked[tower] = _check(mixtures[tower], config, f"mixtures[{tower!r}]")
            elif own is not None:
                checked[tower] = _check(own, config, f"mixture of {tower}_config")
        self.mixtures = {tower: mixture.to_json() for tower, mixture in checked.items()}
        for tower, mixture in checked.items():
            setattr(self, f"{tower}_config", with_mixture(getattr(self, f"{tower}_config"), tower, mixture))

    def to_dict(self):
        values = super().to_dict()
        for tower, plain in (("text", CLIPTextConfig), ("vision", CLIPVisionConfig)):
            values[f"{tower}_config"].pop("mixture", None)  # said once, in mixtures
            values[f"{tower}_config"]["model_type"] = plain.model_type
        return values


def with_mixture(config, tower: str, mixture: Mixture):
    """A copy of a tower's configuration that has the mixture; what was set on it stays, attention included."""
    config = copy.deepcopy(config)
    config.__class__ = TOWER_CONFIGS[tower]
    config.mixture = mixture.to_json()
    return config


def _check(mixture, config, where: str) -> Mixture:
    value = mixture.to_json() if isinstance(mixture, Mixture) else mixture
    mixture = Mixture.from_json(value, f"CLIPMoEConfig: {where}")
    if mixture.layers[-1] >= config.num_hidden_layers:
        raise ValueError(
            f"CLIPMoEConfig: {where}: layers must be below num_hidden_layers = {config.num_hidden_layers}, got "
            f"{list(mixture.layers)}"
        )
    return mixture
