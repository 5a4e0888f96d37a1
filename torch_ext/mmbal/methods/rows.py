"""What the methods share: tensors by the names of modalities, and rows that several processes hold together."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
import torch.distributed as dist
from torch import Tensor


def choose(what: str, name: str, value, among: Sequence) -> None:
    if value not in among:
        raise ValueError(f"{what}: {name} must be one of {', '.join(map(str, among))}, got {value!r}")


def at_hand(tensor: Tensor) -> bool:
    """Whether its numbers can be looked at without a wait for a device."""
    return tensor.device.type == "cpu"


def in_order(what: str, name: str, given: Mapping[str, Tensor] | Sequence[Tensor], modalities: list[str]) -> list:
    """The tensors of all modalities in order: by name from a mapping, as they come from a sequence."""
    if isinstance(given, Mapping):
        if set(given) != set(modalities):
            raise ValueError(f"{what}: {name} must have the keys {modalities}, got {list(given)}")
        return [given[modality] for modality in modalities]
    if isinstance(given, Tensor) or len(given) != len(modalities):
        got = "one tensor" if isinstance(given, Tensor) else f"{len(given)}"
        raise ValueError(f"{what}: {name} must be a mapping or one tensor for each of {modalities}, got {got}")
    return list(given)


def same_container(like, modalities: list[str], tensors: list[Tensor]) -> dict[str, Tensor] | list[Tensor]:
    return dict(zip(modalities, tensors, strict=True)) if isinstance(like, Mapping) else list(tensors)


def ranks(group) -> int:
    found = dist.get_world_size(group) if dist.is_available() and dist.is_initialized() else 1
    if found < 1:
        raise RuntimeError("this process is not in the process_group")
    return found


def rank_of(group) -> int:
    return dist.get_rank(group) if ranks(group) > 1 else 0


def moved(tensor: Tensor, device: torch.device) -> Tensor:
    """The tensor on a device; to a GPU without waiting for what it does."""
    if tensor.device == device:
        return tensor
    return tensor.to(device, non_blocking=device.type == "cuda")


def _as_exchanged(group, tensor: Tensor) -> Tensor:
    """Where the group's backend takes it: NCCL takes nothing from the CPU."""
    return tensor.cuda() if dist.get_backend(group) == "nccl" else tensor


def every(group, values: list[int]) -> Tensor:
    """int64 [ranks, len(values)]: the whole numbers that each rank passed."""
    mine = torch.tensor(values, dtype=torch.int64)
    if ranks(group) == 1:
        return mine.unsqueeze(0)
    mine = _as_exchanged(group, mine)
    received = [torch.empty_like(mine) for _ in range(ranks(group))]
    dist.all_gather(received, mine, group=group)
    return torch.stack(received).cpu()


def all_rows(tensor: Tensor, counts: list[int], group) -> Tensor:
    """The rows of all ranks, in the order of ranks; shorter ones are padded on the way."""
    sent = tensor.new_zeros(max(counts), *tensor.shape[1:])
    sent[: tensor.shape[0]] = tensor
    sent = sent.to(torch.uint8) if tensor.dtype == torch.bool else sent
    received = [torch.empty_like(sent) for _ in counts]
    dist.all_gather(received, sent, group=group)
    return torch.cat([rows[:count] for rows, count in zip(received, counts, strict=True)]).to(tensor.dtype)


class _GatherRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx, tensor, counts, rank, group):
        ctx.counts, ctx.rank, ctx.group = counts, rank, group
        return all_rows(tensor, counts, group)

    @staticmethod
    def backward(ctx, gradient):
        gradient = gradient.clone(memory_format=torch.contiguous_format)  # the sum is taken in place
        dist.all_reduce(gradient, group=ctx.group)
        return gradient.split(ctx.counts)[ctx.rank], None, None, None


def gather_with_gradient(tensor: Tensor, counts: list[int], group) -> Tensor:
    """Rows [sum(counts), ...] of all ranks in their order; rank r has counts[r]. The backward sums the gradients that
    every rank has for a row. Every rank must take part in both."""
    if len(counts) == 1:
        return tensor
    return _GatherRows.apply(tensor, counts, rank_of(group), group)


def gather_rows(group, index: Tensor | None, *tensors: Tensor | None) -> list[Tensor | None]:
    """index [N] and tensors [N, ...] (or None, on all ranks alike) with the rows of all ranks, in ascending order of
    index, each once; as they are where there is one process."""
    if ranks(group) == 1:
        return [index, *tensors]
    counts = every(group, [next(t.shape[0] for t in tensors if t is not None)])[:, 0].tolist()
    index, *tensors = [None if t is None else all_rows(t, counts, group) for t in (index, *tensors)]
    if index is None:
        return [index, *tensors]
    ordered, order = index.sort(stable=True)
    first = torch.ones_like(ordered, dtype=torch.bool)
    first[1:] = ordered[1:] != ordered[:-1]
    rows = order[first]
    return [index[rows], *(None if t is None else t[rows] for t in tensors)]


def mean_over_ranks(group, value: float) -> float:
    if ranks(group) == 1:
        return value
    total = _as_exchanged(group, torch.tensor(value, dtype=torch.float64))
    dist.all_reduce(total, group=group)
    return float(total) / ranks(group)


def sum_over_ranks(group, tensors: list[Tensor]) -> list[Tensor]:
    """Float64 tensors summed over the ranks in one exchange; as they are where there is one process."""
    if ranks(group) == 1:
        return tensors
    sums = _as_exchanged(group, torch.cat([t.reshape(-1) for t in tensors]))
    dist.all_reduce(sums, group=group)
    parts = moved(sums, tensors[0].device).split([t.numel() for t in tensors])
    return [part.reshape(t.shape) for part, t in zip(parts, tensors, strict=True)]
