"""Files and folders that have their name only once they are complete.

They are made beside their place under a hidden name of their own, ``.NAME.*.partial``, so that writers of one path do
not meet: the last one to finish has the name. Whatever interrupts a writer, what was there stays as it was and nothing
else is left (after SIGKILL, the hidden file or folder), nor a folder above that was made for it.
"""

from __future__ import annotations

import errno
import os
import secrets
import shutil
import stat
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import BinaryIO


def replace_file(path: Path, write) -> None:
    """Call write(temporary path), then move the file into place: a reader never sees half a file."""
    with _naming() as place, place(Path(path)) as temporary:
        write(temporary)


@contextmanager
def replacing() -> Iterator[Callable]:
    """Yields create(path), a context manager of a new file that is written under another name beside ``path``.

    When the block has succeeded the files get their names, in the order in which they were created, and replace what
    was there. When it has not, none does, and all are removed. A file has reached the disk when it gets its name.
    """
    with _naming() as place:

        @contextmanager
        def create(path) -> Iterator[BinaryIO]:
            with place(Path(path)) as partial:
                try:
                    with open(partial, "wb") as file:
                        yield file
                        file.flush()
                        os.fsync(file.fileno())
                except OSError as error:  # a full disk does not say of which file it speaks
                    if error.filename is not None or error.errno is None:
                        raise
                    raise OSError(error.errno, error.strerror, str(path)) from error

        yield create


@contextmanager
def _naming() -> Iterator[Callable]:
    """Yields place(path), a context manager of an empty file that takes the name ``path`` when all has succeeded."""
    finished: dict[Path, Path] = {}
    started: list[Path] = []

    with _folders_above() as make_folders:

        @contextmanager
        def place(path: Path) -> Iterator[Path]:
            with suppress(FileNotFoundError):
                if not stat.S_ISREG(path.stat().st_mode):
                    raise ValueError(f"{path} must be a regular file or not exist, to be written")
            make_folders(path)
            partial = _hidden(path)
            started.append(partial)
            with open(partial, "xb") as file:
                mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
            yield partial
            partial.chmod(mode)  # safetensors' own function makes private files
            finished[partial] = path

        try:
            yield place
            for partial, path in finished.items():
                os.replace(partial, path)
            for folder in {path.parent for path in finished.values()}:
                _sync_folder(folder)
        finally:
            for partial in started:
                partial.unlink(missing_ok=True)


@contextmanager
def _folders_above() -> Iterator[Callable[[Path], None]]:
    """Yields a function that makes the folders above a path; those that are empty at the end are removed."""
    made: list[Path] = []

    def make(path: Path) -> None:
        made.extend(folder for folder in [*path.parents][::-1] if not folder.exists())
        path.parent.mkdir(parents=True, exist_ok=True)

    try:
        yield make
    finally:
        for folder in made[::-1]:
            with suppress(OSError):  # it is not empty: all went well
                folder.rmdir()


def _hidden(path: Path) -> Path:
    return path.with_name(f".{path.name[:200]}.{secrets.token_hex(6)}.partial")


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def check_replaceable(folder: Path, is_ours: Callable[[Path], bool], what: str) -> None:
    """Raises a ValueError unless ``folder`` does not exist, is an empty folder, or is one of which ``is_ours`` says
    so; other folders are refused as holding other files than ``what``."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise ValueError(f"{folder} must be a folder or not exist")
    if folder.is_dir() and any(folder.iterdir()) and not is_ours(folder):
        raise ValueError(f"{folder} holds other files than {what}: it is not replaced")


@contextmanager
def atomic_folder(folder, is_ours: Callable[[Path], bool], what: str) -> Iterator[Path]:
    """Yields a new folder that takes the name ``folder`` only once the block has succeeded.

    What was there is replaced if :func:`check_replaceable` allows it.
    """
    target = Path(folder).absolute()
    check_replaceable(target, is_ours, what)
    partial = _hidden(target)
    with _folders_above() as make_folders:
        make_folders(target)
        partial.mkdir()
        try:
            yield partial
            while not _take_name(partial, target):
                check_replaceable(target, is_ours, what)  # another writer's, who was done meanwhile
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def _take_name(partial: Path, target: Path) -> bool:
    """Moves ``partial`` to ``target``, in place of what is there; False where others were faster twice."""
    retired = _hidden(target)
    try:
        os.replace(target, retired)
    except FileNotFoundError:
        retired = None
    try:
        os.replace(partial, target)
    except BaseException as error:
        taken = isinstance(error, OSError) and error.errno in (errno.ENOTEMPTY, errno.EEXIST)
        if retired and not taken:
            os.replace(retired, target)
            raise
        if not taken:
            raise
    else:
        taken = False
    if retired:
        shutil.rmtree(retired, ignore_errors=True)
    return not taken
