"""Finished stages on disk: an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path

from mmbal.files import replace_file


def fingerprint(settings: dict, *files: Path) -> str:
    """Changes with any setting and any byte of the files."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class Store:
    """A folder with the files and folders that stages wrote and NAME.json of each; that is written last and makes a
    stage valid.

    Each recipe, seed and set of inputs has a folder of its own (see `fingerprint`): no run touches another's stages.
    """

    def __init__(self, folder: Path):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)

    def stage(self, name: str, outputs: Sequence[str], make: Callable[[], dict]) -> dict:
        """What make() said once it had written `outputs` here, in this run or in an earlier one."""
        note, written = self.folder / f"{name}.json", [self.folder / output for output in outputs]
        if note.exists() and all(path.exists() for path in written):
            return json.loads(note.read_text(encoding="utf-8"))
        note.unlink(missing_ok=True)  # from here on the outputs belong to no finished stage
        for path in written:
            if path.is_dir():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)
        information = make()
        text = json.dumps(information, indent=2) + "\n"
        replace_file(note, lambda file: file.write_text(text, encoding="utf-8"))
        return information
