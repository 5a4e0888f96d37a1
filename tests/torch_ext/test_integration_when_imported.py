import importlib
import importlib.util
import sys
import threading
import time
import zipfile
import zipimport

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
    with pytest.raises(ModuleNotFoundError):
        importlib.import_module("late_nowhere")
    assert importlib.util.find_spec("late_nowhere") is None


def test_a_loader_that_serves_other_modules_too_is_left_alone(tmp_path, monkeypatch):
    archive = tmp_path / "late.zip"
    with zipfile.ZipFile(archive, "w") as file:
        file.writestr("late_zipped.py", "VALUE = 1")
        file.writestr("late_neighbour.py", "VALUE = 2")
    monkeypatch.syspath_prepend(str(archive))
    calls = []
    when_imported("late_zipped", lambda: calls.append(sys.modules["late_zipped"].VALUE))
    assert importlib.util.find_spec("late_zipped") is not None
    assert importlib.import_module("late_neighbour").VALUE == 2 and calls == []
    module = importlib.import_module("late_zipped")
    assert calls == [1]
    assert type(module.__loader__) is type(module.__spec__.loader) is zipimport.zipimporter
    for name in ("late_zipped", "late_neighbour"):
        del sys.modules[name]


def test_two_additions_to_one_module_are_made_in_their_order_even_if_the_first_fails(make_module):
    name, calls = make_module("late_five"), []
    when_imported(name, lambda: 1 / 0)
    when_imported(name, lambda: calls.append(2))
    with pytest.warns(UserWarning, match="ZeroDivisionError"):
        importlib.import_module(name)
    assert calls == [2]


def test_the_list_of_finders_stays_as_it_is_while_modules_are_imported(make_module):
    """Another thread may be walking through it."""
    name = make_module("late_six")
    when_imported(name, lambda: None)
    before = list(sys.meta_path)
    importlib.import_module(name)
    assert sys.meta_path == before


def test_a_module_that_another_thread_is_importing_is_waited_for(make_module):
    text = "import threading\nBEGUN, END = threading.Event(), threading.Event()\nEND.wait(10)\nVALUE = 3"
    name, calls = make_module("late_seven", text), []
    importing = threading.Thread(target=importlib.import_module, args=[name])
    importing.start()
    while not hasattr(sys.modules.get(name), "END"):
        time.sleep(0.001)
    asking = threading.Thread(target=when_imported, args=[name, lambda: calls.append(sys.modules[name].VALUE)])
    asking.start()
    assert calls == []
    sys.modules[name].END.set()
    importing.join()
    asking.join()
    assert calls == [3]


def test_threads_that_import_the_module_at_once_find_the_addition_made_once(make_module):
    name, calls, seen = make_module("late_eight", "import time\ntime.sleep(0.2)"), [], []
    when_imported(name, lambda: calls.append(1))

    def use():
        importlib.import_module(name)
        seen.append(len(calls))

    threads = [threading.Thread(target=use) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert seen == [1, 1, 1]
