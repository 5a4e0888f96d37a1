"""Routers as units of ``fully_shard`` of their own, so that they keep float32 in a model that computes in bfloat16."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.tensor import DTensor

from mmbal.moe import MoEMLP


def fully_shard_routers(model: nn.Module, **options) -> nn.Module:
    """``fully_shard`` of the router of each :class:`mmbal.MoEMLP` by itself, computing and reducing in float32 whatever
    policy the blocks around it get. Call it before ``fully_shard`` of the blocks; ``options`` (mesh, offload_policy,
    ...) are those of ``fully_shard``. Without it a router is rounded to the ``param_dtype`` of its block.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    layers = [m for m in model.modules() if isinstance(m, MoEMLP)]
    if not layers:
        raise ValueError(f"fully_shard_routers: model must have MoEMLP layers, {type(model).__name__} has none")
    if any(isinstance(layer.router.weight, DTensor) for layer in layers):
        raise ValueError("fully_shard_routers: call it once, before fully_shard of what the routers are in")
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    for layer in layers:
        own = MixedPrecisionPolicy() if layer.router.weight.dtype == torch.float64 else policy
        fully_shard(layer.router, **{"mp_policy": own} | options)
    return model
