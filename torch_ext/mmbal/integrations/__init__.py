"""mmbal inside other libraries: ``lightning``, ``transformers``, ``clip_moe`` and ``experts``, imported when used.

What transformers must know of beforehand (the model types of CLIP-MoE, the experts implementation "mmbal") is added to
it when it is imported.
"""

import importlib

from mmbal.integrations.when_imported import when_imported

__all__ = ["clip_moe", "experts", "lightning", "transformers"]


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def _registers(module: str):
    return lambda: importlib.import_module(f"{__name__}.{module}").register()


when_imported("transformers.models.auto.configuration_auto", _registers("auto_config"))
when_imported("transformers.integrations.moe", _registers("experts"))
