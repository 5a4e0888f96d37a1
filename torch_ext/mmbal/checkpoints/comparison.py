"""What differs between two checkpoints of one architecture."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import torch

from .checkpoint import Checkpoint
from .layouts import is_ffn


@dataclass
class Group:
    """A part of a CLIP: how many of its tensors differ, the largest difference and where, |a - b| / |a| over all."""

    name: str
    is_ffn: bool
    tensors: int = 0
    differing: int = 0
    largest: float = 0.0
    where: str = ""
    squares: float = 0.0
    squares_of_a: float = 0.0

    @property
    def distance(self) -> float:
        return math.sqrt(self.squares / self.squares_of_a) if self.squares_of_a else math.inf if self.squares else 0.0


@torch.no_grad()
def compare(a: Checkpoint, b: Checkpoint) -> list[Group]:
    """Part by part, tensor by tensor; values are compared, whatever dtypes they are stored in. NaN equals NaN."""
    if replace(a.architecture, mixtures={}) != replace(b.architecture, mixtures={}) or set(a.tensors) != set(b.tensors):
        odd = sorted(set(a.tensors) ^ set(b.tensors))
        what = f"{odd[0]} is in one only" if odd else "their sizes or activations differ"
        raise ValueError(f"compare: the two must have one architecture: {what}")
    groups: dict[str, Group] = {}
    for name in a.tensors:
        title = _title(name)
        group = groups.setdefault(title, Group(title, is_ffn(name)))
        group.tensors += 1
        first, second = a[name].double(), b[name].double()
        same = (first == second) | (first.isnan() & second.isnan())
        group.squares_of_a += first.nan_to_num().square().sum().item()
        if bool(same.all()):
            continue
        difference = torch.where(same, 0.0, first - second).abs().nan_to_num(nan=math.inf)
        group.differing += 1
        group.squares += difference.square().sum().item()
        if (largest := difference.max().item()) > group.largest:
            group.largest, group.where = largest, name
    return list(groups.values())


def _title(name):
    if name == "logit_scale":
        return "temperature"
    tower = "vision" if name.startswith("visual.") else "text"
    for part, title in ((".attn.", "attention"), (".ln_", "norms"), (".gate.", "routers"), (".experts.", "experts")):
        if part in name:
            return f"{tower} {title}"
    return f"{tower} FFNs" if is_ffn(name) else f"{tower} norms" if "ln_" in name else f"{tower} embeddings"
