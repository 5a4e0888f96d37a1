"""CLIP checkpoints written tensor by tensor, in any layout that can hold them."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from functools import reduce
from pathlib import Path

import torch

from mmbal.files import atomic_folder, check_replaceable, replacing

from . import configuration
from .architecture import CLIPArchitecture
from .checkpoint import Checkpoint
from .layouts import LAYOUTS, bindings, is_ffn
from .reading import COMPANIONS
from .recognition import HEAD_WIDTH, KEPT_POSITIONS
from .tensor_writing import Entry, write_safetensors, write_sharded_safetensors, write_torch
from .untrusted import read_json

PUBLISHED_POSITIONS = 248  # of CLIP-MoE's text tower: 4 * 77 - 3 * 20
_FOLDER = "those of a CLIP"
_OF_FOLDER = ("config.json", "open_clip_config.json", "open_clip_model.safetensors", "model.safetensors.index.json")


def write_checkpoint(
    checkpoint: Checkpoint,
    path,
    format: str,
    dtype: torch.dtype | None = None,
    max_shard_bytes: int | None = None,
    overwrite: bool = False,
    progress=None,
) -> list[str]:
    """Writes ``checkpoint``; the file or folder has its name only once it is complete.

    Parameters
    ----------
    path : a folder for transformers and open_clip; a file for openai and clipmoe, safetensors if its name ends so,
        else what ``torch.save`` makes of a state dict. A CLIP-MoE file gets a JSON file beside it (its name + ".json"),
        which holds what the published layout does not: top_k, heads, activation.
    format : openai, clipmoe, transformers or open_clip.
    dtype : of all weights; None keeps each tensor's own.
    max_shard_bytes : transformers only: more than one file above this.
    progress : called with the number of bytes after each tensor.

    Returns notes on what the file holds differently, or what other readers will make of it.
    """
    path = Path(path)
    notes = check_format(checkpoint.architecture, format)
    check_target(path, format, overwrite)
    if max_shard_bytes is not None and format != "transformers":
        raise ValueError(f"max_shard_bytes is served for format transformers only, got it for {format}")
    if format == "clipmoe":
        checkpoint = _with_two_tables(checkpoint)
    elif format in ("transformers", "open_clip"):
        notes += _lost_positions(checkpoint)
    made = entries(checkpoint, format, dtype)
    if format in ("openai", "clipmoe"):
        side = _side_of(path)
        write = write_safetensors if path.suffix == ".safetensors" else write_torch
        with replacing() as create:
            write(path, made, progress=progress, create=create)
            if format == "clipmoe":
                with create(side) as file:
                    file.write(_json(configuration.to_side_file(checkpoint.architecture)).encode())
            if _is_side_file(side):
                side.unlink()  # at no time does it stand beside another file than the one that it describes
        return notes
    with atomic_folder(path, _is_clip_folder, _FOLDER) as partial:
        metadata = {"format": "pt"}
        if format == "transformers":
            config = configuration.to_transformers(checkpoint.architecture, checkpoint.settings)
            config |= {"dtype": str(reduce(torch.promote_types, {e.dtype for e in made})).removeprefix("torch.")}
            (partial / "config.json").write_text(_json(config))
            if max_shard_bytes is None:
                write_safetensors(partial / "model.safetensors", made, metadata, progress)
            else:
                write_sharded_safetensors(partial, made, max_shard_bytes, metadata, progress)
        else:
            config = configuration.to_open_clip(checkpoint.architecture, checkpoint.preprocess)
            (partial / "open_clip_config.json").write_text(_json(config))
            write_safetensors(partial / "open_clip_model.safetensors", made, metadata, progress)
        for name, file in checkpoint.files.items():
            shutil.copyfile(file, partial / name)
    return notes


def check_target(path: Path, format: str, overwrite: bool) -> None:
    """Raises a ValueError where ``path`` is not free for ``format``, or where others' files would be replaced."""
    if format not in LAYOUTS:
        raise ValueError(f"format must be one of {', '.join(LAYOUTS)}, got {format!r}")
    if path.exists() and not overwrite:
        raise ValueError(f"{path} exists already: say overwrite to replace it")
    if format in ("transformers", "open_clip"):
        check_replaceable(path, _is_clip_folder, _FOLDER)
        return
    if path.is_dir():
        raise ValueError(f"{path} must be a file for format {format}, it is a folder")
    side = _side_of(path)
    if _is_side_file(side):
        if not overwrite:
            raise ValueError(f"{side} exists already: say overwrite to replace it")
    elif format == "clipmoe" and (side.exists() or side.is_symlink()):
        raise ValueError(f"{side} must be the JSON file of a CLIP-MoE or not exist, it is not replaced")


def _side_of(path: Path) -> Path:
    return path.with_name(path.name + ".json")


def _is_side_file(side: Path) -> bool:
    try:
        return {"format_version", "mixtures"} <= set(read_json(side))
    except ValueError:
        return False


def write_ffns(checkpoint: Checkpoint, path, dtype: torch.dtype | None = None) -> None:
    """FFNs alone under OpenAI's names, a file of torch or safetensors; :func:`mmbal.upcycle_checkpoint` takes it."""
    path = Path(path)
    made = [
        Entry(
            name,
            lazy.shape,
            dtype or lazy.dtype,
            lambda name=name, lazy=lazy: [_rounded(lazy.make(), dtype or lazy.dtype, name)],
        )
        for name, lazy in checkpoint.tensors.items()
        if is_ffn(name)
    ]
    (write_safetensors if path.suffix == ".safetensors" else write_torch)(path, made)


def entries(checkpoint: Checkpoint, format: str, dtype: torch.dtype | None = None) -> list[Entry]:
    """The tensors of a file in ``format``, made when they are written."""

    def entry(binding):
        kind = dtype or reduce(torch.promote_types, (checkpoint.tensors[part].dtype for part in binding.parts))

        def make():
            return (_rounded(piece, kind, binding.name) for piece in binding.pieces(checkpoint.__getitem__))

        return Entry(binding.name, binding.shape, kind, make)

    return [entry(binding) for binding in bindings(checkpoint.architecture, format)]


def _rounded(tensor, dtype, name):
    """In ``dtype``; raises a ValueError where that makes finite values infinite."""
    result = tensor.to(dtype)
    if torch.finfo(dtype).max < torch.finfo(tensor.dtype).max and bool((result.isinf() & tensor.isfinite()).any()):
        largest = tensor[tensor.isfinite()].abs().max().item()
        limit = torch.finfo(dtype).max
        raise ValueError(f"{name} has values up to {largest:.4g}, but {dtype} holds at most {limit:.4g}")
    return result


def check_format(architecture: CLIPArchitecture, format: str) -> list[str]:
    """Raises a ValueError where ``format`` cannot hold the model; returns what its other readers get wrong."""
    bindings(architecture, format)
    towers = {tower: architecture.tower(tower) for tower in ("vision", "text") if architecture.tower(tower)}
    if format == "transformers":
        return []
    if len(towers) < 2:
        raise ValueError(f"format {format} must have both towers, this is the {next(iter(towers))} tower alone")
    if format == "open_clip":
        configuration.open_clip_model_config(architecture)
        return []
    vision, text = architecture.vision, architecture.text
    if text.eos_token_id not in (configuration.LARGEST, text.vocab_size - 1):
        raise ValueError(
            f"format {format} pools the text at the largest token id, {text.vocab_size - 1}; this model pools at "
            f"{text.eos_token_id}"
        )
    if any(tower.layer_norm_eps != configuration.LAYER_NORM_EPS for tower in towers.values()):
        raise ValueError(f"format {format} has layer norms with eps 1e-5, got {vision.layer_norm_eps}")
    for name, tower in towers.items():
        if tower.activation != "quick_gelu":
            raise ValueError(f"format {format} means quick_gelu; the activation of {name} is {tower.activation}")
    published = {
        "heads of 64 channels": all(tower.heads == tower.width // HEAD_WIDTH for tower in towers.values()),
        "FFNs of four widths": all(tower.mlp_width == 4 * tower.width for tower in towers.values()),
    }
    if format == "clipmoe":
        published["248 positions (say text positions 248 to stretch them)"] = text.context_length == PUBLISHED_POSITIONS
        published["normalised weights"] = all(mixture.normalize for mixture in architecture.mixtures.values())
    return [
        f"the published code expects {what}; it will not read this file rightly"
        for what, ok in published.items()
        if not ok
    ]


def _with_two_tables(checkpoint):
    """The published class has two tables of positions, of which a model with one has the same twice."""
    text = checkpoint.architecture.text
    if text.kept_positions is not None or text.context_length != PUBLISHED_POSITIONS:
        return checkpoint
    text = replace(text, kept_positions=KEPT_POSITIONS)
    tensors = checkpoint.tensors | {"positional_embedding_res": checkpoint.tensors["positional_embedding"]}
    return checkpoint.changed(tensors, replace(checkpoint.architecture, text=text))


def _lost_positions(checkpoint):
    text = checkpoint.architecture.text
    if text is None or text.kept_positions is None:
        return []
    kept, stretched = checkpoint["positional_embedding"], checkpoint["positional_embedding_res"]
    if torch.equal(kept, stretched):
        return []
    return [
        "rows that the model does not use of its two tables of positions differ from those it does; they are left out"
    ]


def _json(value) -> str:
    return json.dumps(value, indent=2) + "\n"


def _is_clip_folder(folder: Path) -> bool:
    """Whether a folder holds what is written here and nothing else."""
    names = [file.name for file in folder.iterdir()]
    known = all(
        name in _OF_FOLDER or COMPANIONS.fullmatch(name) or (name.startswith("model") and name.endswith(".safetensors"))
        for name in names
    )
    return known and ("config.json" in names or "open_clip_config.json" in names)
