"""Additions to another library that wait until it is imported, so that ``import mmbal`` does not import it."""

from __future__ import annotations

import importlib
import importlib.abc
import sys
import warnings
from collections.abc import Callable
from contextlib import suppress


def when_imported(name: str, add: Callable[[], None]) -> None:
    """Calls ``add()`` once, after the module ``name`` was executed; at once if it is there already.

    A module that another thread is importing is waited for. An exception in ``add`` becomes a warning: it must not keep
    others from importing their library.
    """
    _FINDER.waiting.setdefault(name, []).append(add)
    if _FINDER not in sys.meta_path:
        sys.meta_path.insert(0, _FINDER)
    if sys.modules.get(name) is not None:
        with suppress(ImportError):  # of another thread's import: it stays to be waited for
            importlib.import_module(name)
            _FINDER.done(name)


class _Finder(importlib.abc.MetaPathFinder):
    """Finds nothing itself: has the loader that a later finder gives say when it is done. There is one, and it stays in
    ``sys.meta_path``: taken out while another thread walks through that list, it would make that thread leave out the
    finder behind it."""

    def __init__(self):
        self.waiting: dict[str, list[Callable[[], None]]] = {}

    def find_spec(self, fullname, path=None, target=None):
        if fullname not in self.waiting:
            return None
        finders = list(sys.meta_path)
        for finder in finders[finders.index(self) + 1 :] if self in finders else finders:
            spec = finder.find_spec(fullname, path, target) if hasattr(finder, "find_spec") else None
            if spec is not None:
                if spec.loader is not None:
                    spec.loader = _Loader(spec.loader)
                return spec
        return None

    def done(self, name: str) -> None:
        for add in self.waiting.pop(name, []):
            try:
                add()
            except Exception as error:
                warnings.warn(f"mmbal: its additions to {name} failed: {error!r}", stacklevel=2)


class _Loader(importlib.abc.Loader):
    """Does what ``loader`` does. It stands in for it until the module is executed: a loader may serve other modules
    too, as that of a zip file does, so that nothing is to be changed in it."""

    def __init__(self, loader):
        self._loader = loader

    def __getattr__(self, name):
        if name == "_loader":  # of a copy, before it has one
            raise AttributeError(name)
        return getattr(self._loader, name)

    def create_module(self, spec):
        return self._loader.create_module(spec)

    def exec_module(self, module):
        module.__loader__ = module.__spec__.loader = self._loader
        self._loader.exec_module(module)
        _FINDER.done(module.__name__)


_FINDER = _Finder()
