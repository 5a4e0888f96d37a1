"""Gradients that several processes hold together: DTensors, as FSDP2 makes them."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from torch import Tensor


@dataclass(frozen=True)
class Shard:
    """Which slices of dimension 0 this process holds, and the group that holds all of them."""

    group: dist.ProcessGroup
    first: int
    count: int
    total: int


def local_part(tensor: Tensor) -> tuple[Tensor, Shard | None]:
    """This process's part of a tensor; None where it is the whole."""
    if not dist.is_available():
        return tensor, None
    from torch.distributed.tensor import DTensor, Replicate
    from torch.distributed.tensor import Shard as SlicesOf

    if not isinstance(tensor, DTensor):
        return tensor, None
    cuts = [(axis, placement) for axis, placement in enumerate(tensor.placements) if placement != Replicate()]
    if not cuts:
        return tensor.to_local(), None
    axis, placement = cuts[0]
    if len(cuts) > 1 or type(placement) is not SlicesOf or placement.dim != 0:
        raise NotImplementedError(
            f"AMSS: sharded gradients must be cut once, in dimension 0, as fully_shard does, got {tensor.placements}"
        )
    mesh, total = tensor.device_mesh, tensor.shape[0]
    share = -(-total // mesh.size(axis))  # as torch.chunk cuts
    first = min(mesh.get_local_rank(axis) * share, total)
    local = tensor.to_local()
    return local, Shard(mesh.get_group(axis), first, local.shape[0], total)


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, on every process that holds a part of it."""
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gather_energy(energy_U: Tensor, nonfinite: Tensor, parts: list[tuple[int, Shard | None]]) -> tuple[Tensor, Tensor]:
    """Energies of whole parameters from those of the parts that each process holds: (units here, shard) of each
    parameter in order. Every unit belongs to one process, so that the sum is exact."""
    group = next(shard.group for _, shard in parts if shard is not None)
    if any(shard is not None and shard.group != group for _, shard in parts):
        raise NotImplementedError(
            "AMSS: gradients sharded over different groups of processes in one step are not served"
        )
    whole = sum(units if shard is None else shard.total for units, shard in parts)
    sums = energy_U.new_zeros(whole + 1)
    sums[-1] = nonfinite
    replicated, here, there = [], 0, 0
    for units, shard in parts:
        mine = energy_U[here : here + units]
        if shard is None:
            replicated.append((there, mine))
        else:
            sums[there + shard.first : there + shard.first + units] = mine
        here, there = here + units, there + (units if shard is None else shard.total)
    dist.all_reduce(sums, group=group)
    for first, energies in replicated:
        sums[first : first + len(energies)] = energies
    return sums[:-1].contiguous(), sums[-1:] != 0


def local_units(values_U: Tensor, parts: list[tuple[int, Shard | None]]) -> Tensor:
    """Of numbers for the units of whole parameters those of this process."""
    pieces, there = [], 0
    for units, shard in parts:
        first = there if shard is None else there + shard.first
        pieces.append(values_U[first : first + units])
        there += units if shard is None else shard.total
    return torch.cat(pieces)
