"""Files and folders under their names only once they are complete, whoever else writes there."""

import errno
import os
import threading

import pytest

from mmbal.files import atomic_folder, replace_file, replacing


def test_writers_of_one_path_do_not_meet_and_the_last_has_the_name(tmp_path):
    path = tmp_path / "report.txt"
    inside, go_on = threading.Event(), threading.Event()

    def slowly(temporary):
        temporary.write_text("slow")
        inside.set()
        assert go_on.wait(30)
        assert temporary.read_text() == "slow"

    thread = threading.Thread(target=replace_file, args=(path, slowly))
    thread.start()
    assert inside.wait(30)
    replace_file(path, lambda temporary: temporary.write_text("quick"))
    assert path.read_text() == "quick"
    go_on.set()
    thread.join()
    assert path.read_text() == "slow" and os.listdir(tmp_path) == ["report.txt"]


@pytest.mark.parametrize("there", [False, True])
def test_writers_of_one_folder_do_not_meet_and_the_last_has_the_name(tmp_path, there):
    def write(text):
        folder = atomic_folder(tmp_path / "x", lambda folder: (folder / "mark").exists(), "ours")
        partial = folder.__enter__()
        (partial / "mark").write_text(text)
        return folder

    if there:
        write("before").__exit__(None, None, None)
    first, second = write("first"), write("second")
    second.__exit__(None, None, None)
    assert (tmp_path / "x" / "mark").read_text() == "second"
    first.__exit__(None, None, None)
    assert (tmp_path / "x" / "mark").read_text() == "first" and os.listdir(tmp_path) == ["x"]


def test_a_failed_file_leaves_nothing_not_even_folders_made_for_it(tmp_path):
    def fail(temporary):
        temporary.write_text("half")
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        replace_file(tmp_path / "a" / "b" / "c", fail)
    with pytest.raises(OSError, match="gone"), atomic_folder(tmp_path / "a" / "b", lambda folder: True, "ours"):
        raise OSError("the disk is gone")
    assert os.listdir(tmp_path) == []


def test_files_and_folders_have_the_mode_that_others_have(tmp_path):
    old = os.umask(0o027)
    try:
        replace_file(tmp_path / "file", lambda temporary: temporary.touch(0o600))
        with atomic_folder(tmp_path / "folder", lambda folder: True, "ours"):
            pass
    finally:
        os.umask(old)
    assert (tmp_path / "file").stat().st_mode & 0o777 == 0o640
    assert (tmp_path / "folder").stat().st_mode & 0o777 == 0o750


def test_a_full_disk_is_an_error_that_names_the_file(tmp_path):
    with pytest.raises(OSError, match="No space left") as caught, replacing() as create, create(tmp_path / "x"):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert caught.value.filename == str(tmp_path / "x") and os.listdir(tmp_path) == []
