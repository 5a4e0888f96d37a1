"""Callbacks for training loops of other libraries: ``lightning`` and ``transformers``, imported when they are used."""

import importlib

__all__ = ["lightning", "transformers"]


def __getattr__(name: str):
    if name in __all__:
        return importlib.import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
