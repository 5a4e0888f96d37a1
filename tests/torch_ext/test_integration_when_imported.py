import importlib
import importlib.util
import subprocess
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


def test_the_finders_of_other_threads_are_not_moved_and_somebody_who_looks_hides_nothing(make_module):
    """Looking for the module, in one thread, must not let the import in another one pass unseen."""
    name, calls, before = make_module("late_six"), [], list(sys.meta_path)
    inside, go_on = threading.Event(), threading.Event()

    class Slow:
        def find_spec(self, fullname, path=None, target=None):
            if fullname == name and threading.current_thread() is looking:
                inside.set()
                go_on.wait(10)

    when_imported(name, lambda: calls.append(1))
    sys.meta_path.insert(1, Slow())
    looking = threading.Thread(target=importlib.util.find_spec, args=[name])
    looking.start()
    assert inside.wait(10)
    importlib.import_module(name)
    go_on.set()
    looking.join()
    assert calls == [1]
    assert [finder for finder in sys.meta_path if type(finder) is not Slow] == before


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


def test_transformers_is_not_imported_by_mmbal_and_knows_clip_moe_and_the_experts_afterwards():
    """In a new process, as a user has it, with two threads that import transformers at once."""
    script = """
import sys, threading, mmbal
before = [name for name in sys.modules if name.split(".")[0] == "transformers"]
assert not before, before
import transformers  # which threads must not do at once, with or without mmbal
def load():
    from transformers import AutoConfig
    assert type(AutoConfig.for_model("clip_moe")).__name__ == "CLIPMoEConfig"
    done.append(1)
done, threads = [], [threading.Thread(target=load) for _ in range(2)]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
assert len(done) == 2
try:
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
except ImportError:
    pass
else:
    assert "mmbal" in ALL_EXPERTS_FUNCTIONS
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert result.returncode == 0 and "additions" not in result.stderr, result.stderr
