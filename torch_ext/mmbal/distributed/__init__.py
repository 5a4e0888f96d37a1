"""Training a mixture of experts in several processes, on torch.distributed: DistributedDataParallel, ``fully_shard``
and experts that are split over the processes. ``examples/train_clip_moe.py`` has all three.

The convention throughout is that of DistributedDataParallel and ``fully_shard``: the loss of a step is the mean of the
losses that the processes have, and its gradient the mean of their gradients. With :func:`clip_loss` and
:func:`router_losses` that mean is the loss of one process that has all the rows.
"""

from mmbal.distributed.clipping import clip_grad_norm_
from mmbal.distributed.contrastive import clip_loss
from mmbal.distributed.experts import expert_parameters, shard_experts
from mmbal.distributed.router_losses import router_losses
from mmbal.distributed.routers import fully_shard_routers

__all__ = [
    "clip_grad_norm_",
    "clip_loss",
    "expert_parameters",
    "fully_shard_routers",
    "router_losses",
    "shard_experts",
]
