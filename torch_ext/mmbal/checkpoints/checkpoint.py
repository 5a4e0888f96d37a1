"""A CLIP as a set of tensors that are made when they are asked for."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor, nn

from .architecture import TOWERS, CLIPArchitecture
from .layouts import bindings, block_name, canonical_shapes, readers
from .untrusted import shown


class LazyTensor(NamedTuple):
    """A tensor that ``make`` reads or computes each time; one of a mapped file must not be written to."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    make: Callable[[], Tensor]


@dataclass
class Checkpoint:
    """The weights of a CLIP under canonical names (:mod:`mmbal.checkpoints.layouts`), whatever file they are in.

    tensors : by canonical name, in canonical order.
    architecture : sizes, activations and mixtures.
    format : layout of the file it was read from; "model" for one in memory.
    notes : what a user should know about how it was read.
    files : other files that belong to it (tokenizer, preprocessing), by name; they go along into a folder.
    preprocess : open_clip's preprocess_cfg, where a folder of open_clip has one; likewise.
    settings : transformers' configuration, where it was read from one; what it says of training stays.
    """

    tensors: dict[str, LazyTensor]
    architecture: CLIPArchitecture
    format: str
    path: Path | None = None
    notes: list[str] = field(default_factory=list)
    files: dict[str, Path] = field(default_factory=dict)
    preprocess: dict | None = None
    settings: dict | None = None

    def __getitem__(self, name: str) -> Tensor:
        return self.tensors[name].make()

    def changed(self, tensors: Mapping[str, LazyTensor], architecture: CLIPArchitecture) -> Checkpoint:
        """One with other tensors; they are put into canonical order, and those that have no place are left out."""
        ordered = {name: tensors[name] for name in canonical_shapes(architecture)}
        return replace(self, tensors=ordered, architecture=architecture)


def from_file_tensors(
    source, architecture: CLIPArchitecture, layout: str, where: str, partial: bool = False
) -> dict[str, LazyTensor]:
    """Canonical tensors over ``source`` (keys, ``shape``, ``dtype``, ``[]``), once every name and shape was checked.

    partial : tensors may be missing, as in a file of FFNs alone.
    """
    found = bindings(architecture, layout)
    names = {binding.name for binding in found}
    have = set(source)
    if unknown := sorted(have - names):
        raise ValueError(f"{where}: {_listed(unknown)} not of a CLIP in the layout {layout}")
    if (missing := sorted(names - have)) and not partial:
        raise ValueError(f"{where}: {_listed(missing, 'lacks ')}, which the layout {layout} has")
    found = [binding for binding in found if binding.name in have]
    for binding in found:
        if tuple(source.shape(binding.name)) != binding.shape:
            got = list(source.shape(binding.name))
            raise ValueError(f"{where}: {binding.name} must be {list(binding.shape)}, got {got}")
        if not source.dtype(binding.name).is_floating_point:
            raise ValueError(f"{where}: {binding.name} must be floating point, got {source.dtype(binding.name)}")
    makers, shapes = readers(found), canonical_shapes(architecture)
    dtypes: dict[str, set[torch.dtype]] = {}
    for binding in found:
        for part in binding.parts:
            dtypes.setdefault(part, set()).add(source.dtype(binding.name))
    for name, several in dtypes.items():
        if len(several) > 1:
            raise ValueError(f"{where}: the parts of {name} must have one dtype, got {sorted(map(str, several))}")
    return {
        name: LazyTensor(shapes[name], next(iter(dtypes[name])), lambda make=makers[name]: make(source.__getitem__))
        for name in shapes
        if name in makers
    }


def _listed(names, verb=""):
    """The first few of the names, for a message."""
    first = ", ".join(shown(name) for name in names[:3])
    more = f" and {len(names) - 3} more" if len(names) > 3 else ""
    return f"{verb}{first}{more}" + ("" if verb else " are" if len(names) > 1 else " is")


class ModelTensors(Mapping):
    """The state dict of a model as a source of tensors."""

    def __init__(self, model: nn.Module):
        self.tensors = model.state_dict()

    def __iter__(self):
        return iter(self.tensors)

    def __len__(self):
        return len(self.tensors)

    def __getitem__(self, name):
        return self.tensors[name].detach()

    def shape(self, name):
        return tuple(self.tensors[name].shape)

    def dtype(self, name):
        return self.tensors[name].dtype


class Counts(NamedTuple):
    """Numbers of parameters. active: what a token passes, top_k of the routed experts in a mixture layer."""

    total: int
    active: int
    router: int
    ffn: int  # experts and dense FFNs


def count_parameters(architecture: CLIPArchitecture, tower: str | None = None) -> Counts:
    """From the shapes alone; of both towers, or of one."""
    counts = {"total": 0, "active": 0.0, "router": 0, "ffn": 0}
    for name, shape in canonical_shapes(architecture).items():
        of = "vision" if name.startswith("visual.") else None if name == "logit_scale" else "text"
        if tower not in (None, of):
            continue
        size = math.prod(shape)
        expert = name.partition(".experts.")[2].partition(".")[0]
        counts["total"] += size
        counts["router"] += size if ".gate." in name else 0
        counts["ffn"] += size if expert or ".mlp." in name else 0
        mixture = architecture.mixtures.get(of)
        routed = bool(expert) and int(expert) < mixture.num_experts
        counts["active"] += size * mixture.top_k / mixture.num_experts if routed else size
    return Counts(counts["total"], round(counts["active"]), counts["router"], counts["ffn"])


def mixture_layers(architecture: CLIPArchitecture) -> list[tuple[str, int, str]]:
    """(tower, layer, canonical name of the block) of every mixture layer, text first."""
    return [
        (tower, layer, block_name(tower, layer))
        for tower in TOWERS
        if tower in architecture.mixtures
        for layer in architecture.mixtures[tower].layers
    ]
