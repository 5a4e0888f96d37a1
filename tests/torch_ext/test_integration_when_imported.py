import importlib
import importlib.util
import sys

import pytest

from mmbal.integrations.when_imported import when_imported


@pytest.fixture
def make_module(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    names = []

    def make(name, text="VALUE = 1"):
        (tmp_path / f"{name}.py").write_text(text)
        names.append(name)
        return name

    yield make
    for name in names:
        sys.modules.pop(name, None)


def test_the_addition_is_made_once_after_the_module_was_executed(make_module):
    name, calls = make_module("late_one"), []
    when_imported(name, lambda: calls.append(sys.modules[name].VALUE))
    assert importlib.util.find_spec(name) is not None and calls == []  # somebody looks, and does not import
    module = importlib.import_module(name)
    assert calls == [1]
    assert module.__spec__.loader.get_source(name) == "VALUE = 1"
    importlib.reload(module)
    assert calls == [1]


def test_the_addition_to_a_module_that_is_there_is_made_at_once(make_module):
    name, calls = make_module("late_two"), []
    importlib.import_module(name)
    when_imported(name, lambda: calls.append(1))
    assert calls == [1]


def test_an_addition_that_fails_warns_and_leaves_the_import_alone(make_module):
    name = make_module("late_three")
    when_imported(name, lambda: 1 / 0)
    with pytest.warns(UserWarning, match="late_three failed: ZeroDivisionError"):
        assert importlib.import_module(name).VALUE == 1


def test_an_import_that_fails_is_tried_again(make_module):
    name, calls = make_module("late_four", "raise ImportError('not yet')"), []
    when_imported(name, lambda: calls.append(1))
    with pytest.raises(ImportError, match="not yet"):
        importlib.import_module(name)
    assert calls == []
    make_module(name, "VALUE = 22222")
    importlib.invalidate_caches()
    assert importlib.import_module(name).VALUE == 22222 and calls == [1]


def test_a_module_that_does_not_exist_is_still_missing():
    when_imported("late_nowhere", lambda: None)
    try:
        with pytest.raises(ModuleNotFoundError):
            importlib.import_module("late_nowhere")
    finally:
        sys.meta_path.pop(0)
