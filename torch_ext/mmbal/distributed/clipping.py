"""The norm of gradients of which some are whole in each process and some are split."""

from __future__ import annotations

from collections.abc import Iterable

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.tensor import DTensor, Partial, Replicate


@torch.no_grad()
def clip_grad_norm_(parameters: Iterable[Tensor], max_norm: float) -> Tensor:
    """``torch.nn.utils.clip_grad_norm_`` (2-norm) where some gradients are DTensors, over any meshes, and others plain
    tensors that are the same in each process. Returns the norm before, the same in each process."""
    gradients = [p.grad for p in parameters if p.grad is not None]
    if not gradients:
        return torch.tensor(0.0)
    sums: dict = {}  # squares by the groups of processes that hold parts
    for gradient in gradients:
        groups, local = (), gradient
        if isinstance(gradient, DTensor):
            if any(isinstance(placement, Partial) for placement in gradient.placements):
                raise NotImplementedError("clip_grad_norm_: gradients that are partial sums are not served")
            cut = [i for i, placement in enumerate(gradient.placements) if not isinstance(placement, Replicate)]
            groups, local = tuple(gradient.device_mesh.get_group(i) for i in cut), gradient.to_local()
        square = local.double().square().sum()
        sums[groups] = sums[groups] + square if groups in sums else square
    for groups, square in sums.items():
        for group in groups:
            dist.all_reduce(square, group=group)
    device = next(iter(sums.values())).device
    norm = torch.stack([square.to(device) for square in sums.values()]).sum().sqrt()
    factor = (max_norm / (norm + 1e-6)).clamp(max=1)  # 1e-6 as torch has it
    for gradient in gradients:
        local = gradient.to_local() if isinstance(gradient, DTensor) else gradient
        local.mul_(factor.to(local.device, local.dtype))
    return norm
