"""Additions to another library that wait until it is imported, so that ``import mmbal`` does not import it."""

from __future__ import annotations

import importlib.abc
import importlib.util
import sys
import warnings
from collections.abc import Callable


def when_imported(name: str, add: Callable[[], None]) -> None:
    """Calls ``add()`` once, after the module ``name`` was executed; at once if it is there already.

    An exception in ``add`` becomes a warning: it must not keep others from importing their library.
    """
    module = sys.modules.get(name)
    if module is not None and not getattr(module.__spec__, "_initializing", False):
        _call(name, add)
    else:
        sys.meta_path.insert(0, _Watcher(name, add))


def _call(name: str, add: Callable[[], None]) -> None:
    try:
        add()
    except Exception as error:
        warnings.warn(f"mmbal: its additions to {name} failed: {error!r}", stacklevel=2)


class _Watcher(importlib.abc.MetaPathFinder):
    """Finds nothing itself: adds a call to the loader that the other finders give."""

    def __init__(self, name: str, add: Callable[[], None]):
        self.name, self.add = name, add
        self.searching = False

    def find_spec(self, fullname, path=None, target=None):
        if fullname != self.name or self.searching:
            return None
        self.searching = True
        try:
            spec = importlib.util.find_spec(fullname)
        finally:
            self.searching = False
        if spec is not None and spec.loader is not None:
            execute = spec.loader.exec_module

            def exec_module(module):
                execute(module)
                del spec.loader.exec_module
                if self in sys.meta_path:
                    sys.meta_path.remove(self)
                    _call(self.name, self.add)

            spec.loader.exec_module = exec_module
        return spec
