"""The model types of CLIP-MoE in transformers' ``AutoConfig``, before anything of CLIP is imported.

Configurations are imported when they are asked for, models (:mod:`mmbal.integrations.clip_moe`) when the first
configuration is made: whoever asks ``AutoModel`` has one.
"""

from __future__ import annotations

import importlib

_CONFIGS = {
    "clip_moe": "CLIPMoEConfig",
    "clip_moe_vision_model": "CLIPMoEVisionConfig",
    "clip_moe_text_model": "CLIPMoETextConfig",
}


class _Configs(dict):
    """What is registered besides transformers' own: model type -> class. A value that is a name stands for one of
    ours."""

    def __getitem__(self, model_type):
        value = super().__getitem__(model_type)
        if isinstance(value, str):
            value = getattr(importlib.import_module("mmbal.integrations.clip_moe_config"), value)
            self[model_type] = value
        return value

    def __iter__(self):  # with it, dict(self) takes the values from __getitem__
        return super().__iter__()

    def get(self, model_type, default=None):
        try:
            return self[model_type]
        except KeyError:
            return default

    def values(self):
        return [self[model_type] for model_type in self]

    def items(self):
        return [(model_type, self[model_type]) for model_type in self]


def register() -> None:
    """``AutoConfig.register`` wants the class itself. To import it here would fail wherever transformers' own modules
    are half imported, as they are when this is called, so its dictionary gets one that can wait."""
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    CONFIG_MAPPING._extra_content = _Configs({**CONFIG_MAPPING._extra_content, **_CONFIGS})
