"""What upcycling decides and computes tensor by tensor, without a model: layers, routers, experts, and what sources
share with their base. :func:`mmbal.upcycle` and the upcycling of files both use it.

Equal weights, options and seed give equal bits, whatever the names and the order of modules or files are, as long as
both draw from one generator in this order: the routers of all chosen layers (:func:`draw_routers`), then layer after
layer its experts (:func:`make_experts`); the layers as :func:`choose_layers` lists them.

An *expert* is a list [w1 [F, D], b1 [F], w2 [D, F], b2 [D]], oriented like ``nn.Linear``; b1 and b2 may be None.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Generator, Tensor

from mmbal.routing import real_dtype

TOWERS = ("text", "vision")  # these first and in this order, then others as the model has them
Expert = list[Tensor | None]


def parse_layers(text: str) -> str | dict:
    """``layers`` as it is written on a command line.

    A choice for all towers, or TOWER=CHOICE,TOWER=CHOICE; a choice is all, last:M, every:M, alternate, or indices with
    + between them: "vision=all,text=1+3".
    """
    if "=" not in text:
        return text
    parts = [part.partition("=") for part in text.split(",")]
    towers = [tower.strip() for tower, _, _ in parts]
    if not all(equals and tower for (_, equals, _), tower in zip(parts, towers, strict=True)):
        raise ValueError(f"upcycle: layers must be TOWER=CHOICE,TOWER=CHOICE, got {text!r}")
    if len(set(towers)) < len(towers):
        raise ValueError(f"upcycle: layers must name each tower once, got {text!r}")
    return {tower: choice for tower, (_, _, choice) in zip(towers, parts, strict=True)}


def choose_layers(layers, counts: Mapping[str, int]) -> list[tuple[str, int]]:
    """The chosen (tower, index of layer) in the order in which random numbers are drawn.

    Parameters
    ----------
    layers : "all", "last:M", "every:M" (the M-th, 2M-th, ...), "alternate" (every:2), indices (a list, or "1+3";
        negative ones count from the end), or a dict that says one of these for each tower; a tower that the dict does
        not name has none. Also the text that :func:`parse_layers` reads.
    counts : how many layers each tower has.
    """
    if isinstance(layers, str):
        layers = parse_layers(layers)
    if not isinstance(layers, Mapping):
        layers = dict.fromkeys(counts, layers)
    if unknown := set(layers) - set(counts):
        raise ValueError(f"upcycle: layers must name towers among {sorted(counts)}, got {sorted(unknown)}")
    towers = [t for t in TOWERS if t in layers] + [t for t in counts if t in layers and t not in TOWERS]
    chosen = [(tower, i) for tower in towers for i in _choose_in_tower(layers[tower], counts[tower], tower)]
    if not chosen:
        raise ValueError(f"upcycle: layers must choose at least one layer, got {layers!r}")
    return chosen


def _choose_in_tower(choice, count, tower) -> Sequence[int]:
    indices = choice
    if isinstance(choice, str):
        text = choice.strip()
        if text == "all":
            return range(count)
        kind, _, number = ("every:2" if text == "alternate" else text).partition(":")
        if kind in ("last", "every") and re.fullmatch("[0-9]{1,9}", number) and 1 <= (M := int(number)) <= count:
            return range(count - M, count) if kind == "last" else range(M - 1, count, M)
        indices = [int(i) for i in text.split("+")] if re.fullmatch(r"-?[0-9]{1,9}(\+-?[0-9]{1,9})*", text) else None
    if isinstance(indices, Sequence) and all(type(i) is int and -count <= i < count for i in indices):
        return sorted({i % count for i in indices})
    raise ValueError(
        f"upcycle: layers of {tower} must be all, last:M, every:M, alternate or indices, for {count} layers, "
        f"got {choice!r}"
    )


@dataclass(frozen=True)
class ExpertPlan:
    """How the experts of every layer are made; :func:`plan_experts` makes it of checked options."""

    expert_init: str
    num_experts: int  # E, routed
    include_base: bool
    amount: float  # standard deviation of noise, or share of hidden units drawn again
    shared_expert: bool


def plan_experts(
    num_sources: int,
    num_experts: int | None = None,
    top_k: int = 2,
    expert_init: str | None = None,
    shared: str = "base",
    include_base: bool = True,
    noise_std: float = 0.02,
    drop_ratio: float = 0.5,
    dropout: float | None = None,
    shared_expert: bool = False,
    shared_weight: float = 0.5,
) -> ExpertPlan:
    """Checks the options of :func:`mmbal.upcycle` that can be checked without weights; raises a ValueError that names
    the wrong one."""
    expert_init = expert_init or ("sources" if num_sources else "copy")
    if expert_init not in ("sources", "copy", "noise", "drop"):
        raise ValueError(f"upcycle: expert_init must be sources, copy, noise or drop, got {expert_init!r}")
    if (expert_init == "sources") != bool(num_sources):
        raise ValueError(f"upcycle: expert_init={expert_init!r} does not go with {num_sources} experts given")
    if not include_base and not num_sources:
        raise ValueError("upcycle: include_base=False needs experts")
    E = num_sources + bool(include_base) if num_sources else 4 if num_experts is None else num_experts
    if num_experts is not None and num_experts != E:
        raise ValueError(f"upcycle: num_experts must be {E} for {num_sources} experts given, got {num_experts}")
    if E < 1:
        raise ValueError(f"upcycle: num_experts must be at least 1, got {E}")
    if not 1 <= top_k <= E:
        raise ValueError(f"upcycle: top_k must be from 1 to num_experts = {E}, got {top_k}")
    if shared not in ("base", "mean", "strict"):
        raise ValueError(f"upcycle: shared must be base, mean or strict, got {shared!r}")
    if not 0 <= noise_std < math.inf:
        raise ValueError(f"upcycle: noise_std must not be negative, and finite, got {noise_std}")
    if not 0 <= drop_ratio <= 1:
        raise ValueError(f"upcycle: drop_ratio must be in [0, 1], got {drop_ratio}")
    for name, value in (("dropout", dropout or 0.0), ("shared_weight", shared_weight)):
        if not 0 <= value < 1:
            raise ValueError(f"upcycle: {name} must be in [0, 1), got {value}")
    amount = {"noise": noise_std, "drop": drop_ratio}.get(expert_init, 0.0)
    return ExpertPlan(expert_init, E, bool(include_base), amount, bool(shared_expert))


def draw_routers(
    layers: Sequence[tuple[str, int]], num_experts: int, router_init, generator: Generator
) -> Sequence[Tensor]:
    """Router weights [E, D] of all layers, given as (name for a message, D), in the order of :func:`choose_layers`.

    ``router_init``: "uniform" (+-1/sqrt(D)), "normal:STD", "zeros", a tensor [E, D] for every layer, or a sequence of
    tensors, one for each. Drawn tensors are float32 on the CPU.
    """
    E = num_experts
    if isinstance(router_init, Tensor):
        router_init = [router_init] * len(layers)
    if isinstance(router_init, str):
        kind, _, std = router_init.partition(":")
        if router_init == "uniform":
            return [(torch.rand(E, D, generator=generator) * 2 - 1) / D**0.5 for _, D in layers]
        if router_init == "zeros":
            return [torch.zeros(E, D) for _, D in layers]
        if kind == "normal" and re.fullmatch(r"\d*\.?\d+(e-?\d+)?", std):
            return [torch.randn(E, D, generator=generator) * float(std) for _, D in layers]
    elif (
        isinstance(router_init, Sequence)
        and len(router_init) == len(layers)
        and all(isinstance(t, Tensor) for t in router_init)
    ):
        for (name, D), router in zip(layers, router_init, strict=True):
            if router.shape != (E, D):
                raise ValueError(f"upcycle: router_init for {name} must be [{E}, {D}], got {list(router.shape)}")
        return router_init
    raise ValueError(
        "upcycle: router_init must be uniform, zeros, normal:STD, a tensor [E, D] or one such tensor for each of the "
        f"{len(layers)} layers, got {router_init if isinstance(router_init, str) else type(router_init).__name__!r}"
    )


@torch.no_grad()
def make_experts(plan: ExpertPlan, base: Expert, sources: Iterable[Expert], generator: Generator) -> Iterator[Expert]:
    """The experts of one layer, one at a time, in the order in which they are stored; the shared one is the last.

    ``sources`` may be read while it goes: nothing but ``base`` is held from one expert to the next. New tensors have
    dtype and device of ``base``; tensors of ``base`` and ``sources`` are handed on as they are. Begun again with the
    generator in the same state, it gives the same experts.
    """
    if plan.expert_init == "sources":
        if plan.include_base:
            yield base
        yield from sources
    else:
        change = {"copy": _copy, "noise": _add_noise, "drop": _drop_units}[plan.expert_init]
        yield base
        for _ in range(plan.num_experts - 1):
            yield change(base, plan.amount, generator)
    if plan.shared_expert:
        yield base


def _copy(expert, amount, generator):
    return expert


def _add_noise(expert, std, generator):
    return [None if t is None else t + std * torch.randn(t.shape, generator=generator).to(t) for t in expert]


def _drop_units(expert, ratio, generator):
    """Drop-Upcycling (arXiv 2502.19261): a share of the hidden units is drawn again from N(mean, deviation) of what it
    replaces. One set of units for the whole expert: rows of w1 and b1, columns of w2. b2 belongs to no unit."""
    w1_FD, b1_F, w2_DF, b2_D = expert
    F = w1_FD.shape[0]
    units = torch.randperm(F, generator=generator)[: round(ratio * F)].to(w1_FD.device)

    def redrawn(tensor, dim):
        if tensor is None or len(units) == 0:
            return tensor
        dropped = tensor.index_select(dim, units)
        noise = torch.randn(dropped.shape, generator=generator).to(tensor)
        mean, deviation = _moments(dropped)
        return tensor.index_copy(dim, units, mean + deviation * noise)

    return [redrawn(w1_FD, 0), redrawn(b1_F, 0), redrawn(w2_DF, 1), b2_D]


def _moments(tensor):
    """Mean and standard deviation, row by row: over a whole tensor the last bits depend on the number of threads."""
    rows = tensor.reshape(len(tensor), -1).to(real_dtype(tensor.dtype))
    mean = rows.mean(1).mean()
    return mean, (rows - mean).square_().mean(1).mean().sqrt()


def warn_of_same_experts(layers: Iterable[Sequence[Expert]], names: Sequence[str], stacklevel: int = 2) -> None:
    """Warns where two experts are the same in all layers, as when one checkpoint is given twice.

    ``layers`` has the experts of each layer, in the order of ``names``. It is read no further than until all have
    differed, which they mostly do in the first layer.
    """
    same = list(combinations(range(len(names)), 2))
    for experts in layers:
        same = [(i, j) for i, j in same if _equal_experts(experts[i], experts[j])]
        if not same:
            return
    if same:
        pairs = ", ".join(f"{names[i]} and {names[j]}" for i, j in same)
        warnings.warn(
            f"upcycle: {pairs} have the same MLPs in all chosen layers; the task gives a router no reason to choose"
            " between equal experts",
            stacklevel=stacklevel + 1,
        )


def _equal_experts(first, second):
    w1, b1, w2, b2 = range(4)
    return all(first[i] is None or _equal(first[i], second[i]) for i in (b2, b1, w2, w1))  # the small ones first


def _equal(own: Tensor, other: Tensor) -> bool:
    """Tensors without values are taken to differ from all others."""
    if own.is_meta or other.is_meta:
        return False
    return torch.equal(own, other.to(own.device))


class SharedDifferences:
    """How one source differs from its base in what they should share; it is shown the tensors one after the other."""

    def __init__(self, name: str):
        self.name = name
        self.first: str | None = None  # key of the first tensor that differs
        self.count = 0
        self.largest = 0.0  # |difference|; NaN where one has NaN, infinite where shapes differ
        self.where: str | None = None  # key of the largest

    @torch.no_grad()
    def compare(self, key: str, own: Tensor, other: Tensor) -> None:
        if own.is_meta or other.is_meta:
            return
        if own.shape != other.shape:
            difference = math.inf
        elif _equal(own, other):
            return
        else:
            dtype = torch.promote_types(torch.promote_types(own.dtype, other.dtype), torch.float32)
            difference = (own.to(dtype) - other.to(own.device, dtype)).abs().max().item()
        self.first = self.first or key
        self.count += 1
        if self.where is None or difference > self.largest or math.isnan(difference):
            self.largest, self.where = difference, key

    def __bool__(self):
        return self.count > 0

    def __str__(self):
        others = f" and {self.count - 1} more" if self.count > 1 else ""
        size = "in shape" if self.largest == math.inf else f"by up to {self.largest:.2g}"
        return f"{self.name} in {self.first}{others} ({size}" + (f", {self.where})" if others else ")")


def check_shared(sources: Sequence[SharedDifferences], shared: str, stacklevel: int = 2) -> None:
    """Refuses ("strict") or warns of ("base") sources that differ from the base in what the result takes from it."""
    differing = [source for source in sources if source]
    if not differing or shared == "mean":
        return
    found = "; ".join(map(str, differing))
    if shared == "strict":
        raise ValueError(f"upcycle: shared='strict', but sources differ from the base outside their MLPs: {found}")
    warnings.warn(
        f"upcycle: sources differ from the base outside their MLPs, where the base's weights are taken: {found}. "
        "Their MLPs were trained with other weights around them; see shared='mean' and 'strict'",
        stacklevel=stacklevel + 1,
    )
