"""What makes mmbal at home in other libraries: ``lightning``, ``open_clip``, ``transformers``, imported when used."""

import importlib

__all__ = ["lightning", "open_clip", "transformers"]


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
