"""Rows that go to the processes which own their experts, and come back. Shapes: N tokens, K choices, R = N K, D width,
E experts, W processes, M rows received."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor


class Route(NamedTuple):
    """How many rows this process sends to each and receives from each, and the local expert of each received row."""

    sent: list[int]
    received: list[int]
    experts: Tensor  # [M]


def exchange_counts(counts_E: Tensor, owned: list[int], group) -> Route:
    """counts_E int64: this process's rows for each expert; ``owned``: how many experts each process has, in order."""
    W, mine = len(owned), owned[dist.get_rank(group)]
    arrived = torch.empty(W * mine, dtype=torch.int64, device=counts_E.device)
    dist.all_to_all_single(arrived, counts_E, [mine] * W, owned, group=group)
    numbers = torch.cat([counts_E, arrived]).tolist()  # one wait for the device
    first, sent = 0, []
    for count in owned:
        sent.append(sum(numbers[first : first + count]))
        first += count
    received = [sum(numbers[first + w * mine : first + (w + 1) * mine]) for w in range(W)]
    local = torch.arange(mine, device=counts_E.device).repeat(W)
    return Route(sent, received, torch.repeat_interleave(local, arrived, output_size=sum(received)))


class _Send(torch.autograd.Function):
    @staticmethod
    def forward(ctx, rows, out, back, group):
        ctx.ways = back, out, group
        arrived = rows.new_empty(sum(back), *rows.shape[1:])
        dist.all_to_all_single(arrived, rows.contiguous(), back, out, group=group)
        return arrived

    @staticmethod
    def backward(ctx, gradient):
        return _Send.apply(gradient, *ctx.ways), None, None, None


def send(rows: Tensor, out: list[int], back: list[int], group) -> Tensor:
    """rows [sum(out), D], in the order of processes -> [sum(back), D]; gradients take the way back."""
    return _Send.apply(rows, out, back, group)


class TakeRows(torch.autograd.Function):
    """x [N, D] -> [R, D] in the order of ``permutation`` of the pairs n K + k. The gradient sums in the order of k,
    which a scatter-add on a GPU would not."""

    @staticmethod
    def forward(ctx, x_ND, permutation_R, inverse_NK):
        ctx.save_for_backward(inverse_NK)
        return x_ND.index_select(0, permutation_R // inverse_NK.shape[1])

    @staticmethod
    def backward(ctx, gradient_RD):
        (inverse_NK,) = ctx.saved_tensors
        rows = gradient_RD.index_select(0, inverse_NK.flatten())
        return rows.view(*inverse_NK.shape, gradient_RD.shape[1]).sum(1), None, None


class MeanGradient(torch.autograd.Function):
    """Tensors as they are. Their gradients, sums over the processes that share these tensors, become means over
    ``count`` processes; ``replicas`` is a group of processes that hold the same tensors, or None."""

    @staticmethod
    def forward(ctx, count, replicas, *tensors):
        ctx.count, ctx.replicas = count, replicas
        ctx.set_materialize_grads(False)
        return tuple(t.view_as(t) for t in tensors)

    @staticmethod
    def backward(ctx, *gradients):
        means = [None if g is None else g / ctx.count for g in gradients]
        if ctx.replicas is not None:
            for mean in means:
                if mean is not None:
                    dist.all_reduce(mean, group=ctx.replicas)
        return None, None, *means
