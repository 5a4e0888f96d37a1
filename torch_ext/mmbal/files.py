"""Files and folders that have their name only once they are complete."""

from __future__ import annotations

import os
import shutil
import tempfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path


def replace_file(path: Path, write) -> None:
    """Call write(temporary path), then move the file into place: a reader never sees half a file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    write(temporary)
    temporary.chmod(0o644)  # safetensors makes private files
    os.replace(temporary, path)


@contextmanager
def atomic_folder(folder, is_ours: Callable[[Path], bool], what: str):
    """Yields a new folder that takes the name ``folder`` only once the block has succeeded.

    What was there is replaced if it is an empty folder or ``is_ours`` says so; anything else is refused, as not
    ``what`` it should be.
    """
    target = Path(folder).absolute()
    if target.is_symlink() or (target.exists() and not target.is_dir()):
        raise ValueError(f"{target} must be a folder or not exist")
    if target.is_dir() and any(target.iterdir()) and not is_ours(target):
        raise ValueError(f"{target} holds other files than {what}: it is not replaced")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield partial
        os.chmod(partial, 0o755)  # mkdtemp's folders are private
        if target.exists():
            retired = Path(tempfile.mkdtemp(prefix=f".{target.name}.old.", dir=target.parent))
            os.replace(target, retired / target.name)
            try:
                os.replace(partial, target)
            except BaseException:
                os.replace(retired / target.name, target)
                retired.rmdir()
                raise
            shutil.rmtree(retired)
        else:
            os.replace(partial, target)
    finally:
        shutil.rmtree(partial, ignore_errors=True)
