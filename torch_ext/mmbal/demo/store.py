"""Finished stages on disk: an interrupted run goes on where it stopped."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from mmbal.files import replace_file

Tensors = dict[str, torch.Tensor]


def fingerprint(settings: dict, *files: Path) -> str:
    """Changes with any setting and any byte of the files."""
    digest = hashlib.sha256(json.dumps(settings, sort_keys=True, default=str).encode())
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:16]


class Store:
    """A folder with NAME.safetensors and NAME.json a stage; the JSON is written last and makes a stage valid.

    Each recipe, seed and set of inputs has a folder of its own (see `fingerprint`): no run touches another's stages.
    """

    def __init__(self, folder: Path):
        self.folder = folder

    def stage(self, name: str, compute: Callable[[], tuple[Tensors, dict]]) -> tuple[Tensors, dict]:
        """Load the stage if it is there, else compute and save it: (tensors, information)."""
        weights, note = self.folder / f"{name}.safetensors", self.folder / f"{name}.json"
        if note.exists() and weights.exists():
            return load_file(weights), json.loads(note.read_text(encoding="utf-8"))
        note.unlink(missing_ok=True)  # from here on the weights belong to no finished stage
        tensors, information = compute()
        replace_file(weights, lambda file: save_file({k: v.contiguous() for k, v in tensors.items()}, file))
        text = json.dumps(information, indent=2) + "\n"
        replace_file(note, lambda file: file.write_text(text, encoding="utf-8"))
        return tensors, information
