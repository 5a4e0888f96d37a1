"""What a connector is put together from: the parts of a modality and of a direction, pooling, what it returns.

Shape letters: B batch, T tokens, D width of the connector, E experts of a gate, K experts a token; d_m is the width of
a modality's features, C that of the contrastive vectors.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import permutations
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mmbal.moe import RouterRecord
from mmbal.routing import real_dtype

BRANCHES = ("reg", "cl")
Sources = str | tuple[str, ...]
Direction = tuple[Sources, str]


class ConnectorOut(NamedTuple):
    """The prediction of a target from its sources."""

    reg: Tensor  # [B, d_t], in the space of the target's features
    cl: Tensor  # [B, C], for cosine similarity
    stats: tuple[RouterRecord, ...]  # what the gate decided for each branch, as mmbal.router_losses takes it
    valid: Tensor | None = None  # [B] bool: has a token; None: all have


class TargetOut(NamedTuple):
    """What a prediction is compared with."""

    reg: Tensor  # [B, d_t]
    cl: Tensor  # [B, C]
    valid: Tensor | None = None  # [B] bool
    classes: Tensor | None = None  # [B] int64, where the target is one class an item


def as_sources(src: Sources | Sequence[str]) -> tuple[str, ...]:
    return (src,) if isinstance(src, str) else tuple(src)


def label(direction: Direction) -> str:
    """image->text, or image+question->answer."""
    src, tgt = direction
    return f"{'+'.join(as_sources(src))}->{tgt}"


def check_names(names: Iterable[str]) -> None:
    taken = {*dir(nn.ModuleDict()), *dir(nn.ParameterDict())}  # torch keeps what they hold as attributes
    for name in names:
        if not isinstance(name, str) or not name or any(mark in name for mark in (".", "+", "->")):
            raise ValueError(f"MoEConnector: names of modalities must be without '.', '+' and '->', got {name!r}")
        if name in taken:
            raise ValueError(f"MoEConnector: names of modalities must not be those of torch's modules, got {name!r}")


def list_directions(directions: str | Sequence[Direction], modalities: Sequence[str]) -> list[Direction]:
    """All ordered pairs ("all"), or the given (source, target) pairs, checked; a source may be a tuple of names."""
    if isinstance(directions, str):
        if directions != "all":
            raise ValueError(f"MoEConnector: directions must be 'all' or pairs (source, target), got {directions!r}")
        if len(modalities) < 2:
            raise ValueError(f"MoEConnector: dims must have at least two modalities, got {list(modalities)}")
        return list(permutations(modalities, 2))
    listed = []
    for direction in directions:
        if isinstance(direction, str) or len(direction) != 2 or not isinstance(direction[1], str):
            raise ValueError(f"MoEConnector: directions must be 'all' or pairs (source, target), got {direction!r}")
        sources, tgt = as_sources(direction[0]), direction[1]
        if unknown := {*sources, tgt} - set(modalities):
            raise ValueError(f"MoEConnector: directions must use {list(modalities)}, got {sorted(unknown)}")
        if not sources or len(set(sources)) < len(sources):
            raise ValueError(f"MoEConnector: sources of a direction must be different names, got {sources!r}")
        if tgt in sources:
            raise ValueError(f"MoEConnector: the target of a direction must not be a source of it, got {direction!r}")
        listed.append((sources[0] if len(sources) == 1 else sources, tgt))
    same = {(frozenset(as_sources(src)), tgt) for src, tgt in listed}  # sources have no order
    if not listed or len(same) < len(listed):
        raise ValueError(f"MoEConnector: directions must be different pairs, at least one, got {listed!r}")
    return listed


@torch.no_grad()
def kaiming_(tensor: Tensor) -> Tensor:
    """Uniform in +-sqrt(6 / fan in), the last dimension (He et al. 2015, the gain of relu); the authors' code draws all
    weights so, embeddings included."""
    bound = (6 / tensor.shape[-1]) ** 0.5
    return tensor.uniform_(-bound, bound)


def linear(inputs: int, outputs: int, **to) -> nn.Linear:
    layer = nn.Linear(inputs, outputs, **to)
    kaiming_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer


def masked_mean(x_BTD: Tensor, mask_BT: Tensor | None) -> Tensor:
    """Mean over the tokens that the mask counts: [B, D], zero where it counts none. What it leaves out may be NaN.

    Half precision is summed and divided in float32: the sum of many tokens is beyond it."""
    real = real_dtype(x_BTD.dtype)
    if mask_BT is None:
        return (x_BTD.sum(1, dtype=real) / x_BTD.shape[1]).to(x_BTD.dtype)
    total = x_BTD.where(mask_BT.unsqueeze(2), 0).sum(1, dtype=real)
    return (total / mask_BT.sum(1, keepdim=True).clamp_min(1)).to(x_BTD.dtype)


def project(layer: nn.Linear, x: Tensor, shift: Tensor | None = None) -> Tensor:
    """``layer(x + shift)``, the shift folded into the bias. Integers are classes: rows of a one-hot x."""
    bias = layer.bias if shift is None else F.linear(shift.unsqueeze(0), layer.weight, layer.bias).squeeze(0)
    if x.is_floating_point():
        return F.linear(x, layer.weight, bias)
    return F.embedding(x, layer.weight.t()) + bias


class Modality(nn.Module):
    """What belongs to one modality: its way in as a source, its bias in the gate, its projection as a target."""

    def __init__(self, dim: int, width: int, cl_dim: int, gate_biases: int):
        super().__init__()
        self.dim = dim
        self.source: nn.Linear | None = None
        self.target: nn.Linear | None = None
        self.register_parameter("gate_bias", None)
        self._sizes = (width, cl_dim, gate_biases)

    def serve(self, source: bool, target: bool, **to) -> None:
        """Makes what these roles need and is not there yet, of this device and dtype."""
        width, cl_dim, gate_biases = self._sizes
        if source and self.source is None:
            self.source = linear(self.dim, width, **to)
            if gate_biases:
                self.gate_bias = nn.Parameter(torch.zeros(len(BRANCHES), gate_biases, **to))
        if target and self.target is None:
            self.target = linear(self.dim, cl_dim, **to)


class Head(nn.Module):
    """What belongs to one direction: an embedding of each source, the two output layers, and how often each expert was
    chosen (``usage`` [2, experts], not saved)."""

    def __init__(self, sources: dict[str, int], target: int, width: int, cl_dim: int, experts: int, embed: bool, **to):
        super().__init__()
        self.embedding = nn.ParameterDict(
            {name: nn.Parameter(kaiming_(torch.empty(dim, **to))) for name, dim in sources.items()} if embed else {}
        )
        self.reg = linear(width, target, **to)
        self.cl = linear(width, cl_dim, **to)
        usage = torch.zeros(len(BRANCHES), experts, dtype=torch.int64, device=to.get("device"))
        self.register_buffer("usage", usage, persistent=False)
