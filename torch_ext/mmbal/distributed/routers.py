"""Routers as units of ``fully_shard`` of their own, so that they keep float32 in a model that computes in bfloat16."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from mmbal.distributed.experts import ShardedMoEMLP
from mmbal.moe import MoEMLP, router_logits


class _Router(nn.Linear):
    def forward(self, x_ND: Tensor) -> Tensor:
        return router_logits(x_ND, self.weight, self.bias)


class _CallsRouter:
    def _route(self, x_ND: Tensor) -> Tensor:
        return self.router(x_ND)  # whose hooks gather its weights


class _MoEMLP(_CallsRouter, MoEMLP):
    pass


class _ShardedMoEMLP(_CallsRouter, ShardedMoEMLP):
    pass


def fully_shard_routers(model: nn.Module, **options) -> nn.Module:
    """``fully_shard`` of the router of each :class:`mmbal.MoEMLP` by itself, computing and reducing in float32 whatever
    policy the blocks around it get. Call it before ``fully_shard`` of the blocks; ``options`` (mesh, offload_policy,
    ...) are those of ``fully_shard``. Without it a router is rounded to the ``param_dtype`` of its block.
    """
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard

    layers = [m for m in model.modules() if isinstance(m, MoEMLP)]
    if not layers:
        raise ValueError(f"fully_shard_routers: model must have MoEMLP layers, {type(model).__name__} has none")
    classes = {MoEMLP: _MoEMLP, ShardedMoEMLP: _ShardedMoEMLP}
    if strange := {type(layer).__name__ for layer in layers if type(layer) not in classes}:
        raise ValueError(f"fully_shard_routers: call it once, before fully_shard of the layers, got {strange}")
    policy = MixedPrecisionPolicy(param_dtype=torch.float32, reduce_dtype=torch.float32)
    for layer in layers:
        dtype = layer.router.weight.dtype
        layer.__class__ = classes[type(layer)]
        layer.router.__class__ = _Router
        own = MixedPrecisionPolicy() if dtype == torch.float64 else policy
        fully_shard(layer.router, **{"mp_policy": own} | options)
    return model
