"""Rows of every rank on every rank, with a gradient, and what ranks agree on."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from mmbal.methods.rows import all_rows, ranks


def rank_of(group) -> int:
    return dist.get_rank(group) if ranks(group) > 1 else 0


def every(group, values: list[int]) -> Tensor:
    """int64 [ranks, len(values)]: the whole numbers that each rank passed."""
    mine = torch.tensor(values, dtype=torch.int64)
    if ranks(group) == 1:
        return mine.unsqueeze(0)
    mine = mine.cuda() if dist.get_backend(group) == "nccl" else mine  # which takes no others
    received = [torch.empty_like(mine) for _ in range(ranks(group))]
    dist.all_gather(received, mine, group=group)
    return torch.stack(received).cpu()


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
