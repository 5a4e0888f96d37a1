"""Expert parallelism: each process owns some of the experts of every mixture, and rows travel to them."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor

from mmbal._library import ops
from mmbal.distributed.exchange import MeanGradient, TakeRows, exchange_counts, send
from mmbal.moe import Experts, MoEMLP, _draw_seed


def shard_experts(model: nn.Module, mesh: DeviceMesh | None = None, param_dtype: torch.dtype | None = None):
    """Splits the experts of every :class:`mmbal.MoEMLP` in ``model`` over the processes, in place; returns ``model``.

        model = DistributedDataParallel(mmbal.distributed.shard_experts(model))

    Routers and all other weights stay whole in each process. In a forward each process sends its tokens' rows to the
    owners of their experts, and gets them back; the routing weights are applied at home. Processes may have different
    numbers of tokens, also none, and any number of them may choose one expert. Every process must run forward and
    backward of each layer as often as the others.

    Parameters
    ----------
    mesh : of all processes: one dimension, over which the experts are split, or two (replicas, experts), where each
        row of the mesh has all experts. None: one dimension. Experts are split as ``torch.chunk`` splits; E need not be
        divisible, and a process may be left without any.
    param_dtype : dtype that rows and experts are taken in, as ``MixedPrecisionPolicy.param_dtype``; None: as they come.
        Autocast needs none.

    Expert weights become DTensors, cut in dimension 0, with the values of the first process. So
    ``torch.distributed.checkpoint`` saves them, and ``get_model_state_dict`` with ``full_state_dict=True`` gives the
    state dict of the whole model, which ``set_model_state_dict`` takes back; give them the model itself, not its
    DistributedDataParallel.

    Afterwards: the optimizer, since the experts are other tensors. A shared expert belongs to the owner of the last
    experts, which gets a row of every token.

    Gradients: those of the experts are averaged over the processes here, in the backward. Call this on the module that
    DistributedDataParallel is given: it is told to leave the experts alone. For ``fully_shard`` say
    ``ignored_params=set(expert_parameters(model).values())`` in each call. ``torch.nn.utils.clip_grad_norm_`` cannot
    join the norms of split and whole gradients; :func:`mmbal.distributed.clip_grad_norm_` does.

    Dropout: the masks of a row are drawn by the owner of its expert, from its own default generator, mixed with its
    rank. Runs repeat; the masks are not those of one process.
    """
    layers = [(name, m) for name, m in model.named_modules() if isinstance(m, MoEMLP)]
    if not layers:
        raise ValueError(f"shard_experts: model must have MoEMLP layers, {type(model).__name__} has none")
    if any(isinstance(layer, ShardedMoEMLP) for _, layer in layers):
        raise ValueError("shard_experts: the experts of model are split already")
    if split := [name for name, layer in layers if isinstance(layer.experts.w1, DTensor)]:
        raise ValueError(f"shard_experts: call it before fully_shard or similar, which changed {split}")
    if strange := {type(layer).__name__ for _, layer in layers if type(layer) is not MoEMLP}:
        raise ValueError(f"shard_experts: layers must be MoEMLP itself, got {strange}")
    if not dist.is_available() or not dist.is_initialized():
        raise RuntimeError("shard_experts: call torch.distributed.init_process_group first")
    world = dist.get_world_size()
    if mesh is None:
        mesh = init_device_mesh(layers[0][1].experts.w1.device.type, (world,))
    if mesh.ndim not in (1, 2) or mesh.size() != world:
        raise ValueError(
            f"shard_experts: mesh must have one or two dimensions and all {world} processes, got {tuple(mesh.shape)}"
        )
    placements = [Replicate()] * (mesh.ndim - 1) + [Shard(0)]
    for _, layer in layers:
        for name, parameter in list(layer.experts.named_parameters()):
            split = distribute_tensor(parameter.detach(), mesh, placements)
            setattr(layer.experts, name, nn.Parameter(split, requires_grad=parameter.requires_grad))
        layer.__class__ = ShardedMoEMLP
        layer._packed = None
        layer.experts.param_dtype = param_dtype
    ignored = getattr(model, "_ddp_params_and_buffers_to_ignore", [])
    model._ddp_params_and_buffers_to_ignore = [*ignored, *expert_parameters(model)]
    return model


def expert_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Names and tensors of all parameters that :func:`shard_experts` has split."""
    return {
        f"{name}.experts.{key}" if name else f"experts.{key}": parameter
        for name, layer in model.named_modules()
        if isinstance(layer, ShardedMoEMLP)
        for key, parameter in layer.experts.named_parameters()
    }


class ShardedMoEMLP(MoEMLP):
    """A :class:`mmbal.MoEMLP` whose experts :func:`shard_experts` has split; it is not made otherwise."""

    def _mix(self, x_ND, weights_NK, indices_NK, *dropouts):
        return mix_sharded(self.experts, x_ND, weights_NK, indices_NK, self.activation, *dropouts)


@torch.compiler.disable
def mix_sharded(
    experts: Experts, x_ND: Tensor, weights_NK: Tensor, indices_NK: Tensor, activation: str, dropout, output_dropout
) -> Tensor:
    """:func:`mmbal.moe.mix_experts` where other processes own some of the experts."""
    w1 = experts.w1
    if not isinstance(w1, DTensor):
        raise RuntimeError(
            "shard_experts: split experts were replaced by whole ones; load weights with "
            "torch.distributed.checkpoint.state_dict.set_model_state_dict"
        )
    mesh = w1.device_mesh
    group = mesh.get_group(mesh.ndim - 1)
    owned = [min(max(w1.shape[0] - w * _share(w1), 0), _share(w1)) for w in range(dist.get_world_size(group))]
    dtype, returned = _dtypes(x_ND, experts.param_dtype)
    D = x_ND.shape[1]
    permutation_R, offsets_E1, inverse_NK = ops.moe_dispatch(indices_NK, w1.shape[0])
    route = exchange_counts(offsets_E1.diff(), owned, group)
    rows_RD = TakeRows.apply(x_ND.to(dtype), permutation_R, inverse_NK)
    rows_MD = send(rows_RD, route.sent, route.received, group)

    names = [name for name in ("w1", "b1", "w2", "b2") if getattr(experts, name) is not None]
    replicas = mesh.get_group(0) if mesh.ndim == 2 else None
    local = MeanGradient.apply(mesh.size(), replicas, *(getattr(experts, name).to_local() for name in names))
    local = dict(zip(names, local, strict=True))
    seed = _draw_seed() + dist.get_rank() if dropout > 0 or output_dropout > 0 else 0
    rows_MD = _apply(local, rows_MD, route.experts, activation, dropout, output_dropout, seed)

    rows_RD = send(rows_MD, route.received, route.sent, group)
    rows_NKD = rows_RD.index_select(0, inverse_NK.flatten()).view(*inverse_NK.shape, D)
    return (weights_NK.unsqueeze(2) * rows_NKD).sum(1).to(returned)


def _share(w1: Tensor) -> int:
    """Experts of each process, as torch.chunk cuts; the last may have fewer or none."""
    return -(-w1.shape[0] // w1.device_mesh.size(w1.device_mesh.ndim - 1))


def _dtypes(x: Tensor, param_dtype: torch.dtype | None) -> tuple[torch.dtype, torch.dtype]:
    """Of the rows that travel, and of the result."""
    device = x.device.type
    if x.dtype == torch.float64:
        return x.dtype, x.dtype
    if torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device):
        return (torch.get_autocast_dtype(device),) * 2
    return param_dtype or x.dtype, x.dtype


def _apply(local, rows_MD, experts_M, activation, dropout, output_dropout, seed):
    """Each row through its expert of this process."""
    count = local["w1"].shape[0]
    if count == 0:  # no expert here, so no rows; the sums are 0 and give gradients of no elements
        return rows_MD + sum(t.sum().to(rows_MD.dtype) for t in local.values())
    w1, b1, w2, b2 = (None if name not in local else local[name].to(rows_MD.dtype) for name in ("w1", "b1", "w2", "b2"))
    indices_M1 = experts_M.unsqueeze(1)
    ones = torch.ones(indices_M1.shape, dtype=torch.promote_types(rows_MD.dtype, torch.float32), device=rows_MD.device)
    routing = ops.moe_dispatch(indices_M1, count)
    options = {"dropout": dropout, "output_dropout": output_dropout, "seed": seed}
    return ops.expert_mlp(rows_MD, w1, b1, w2, b2, ones, *routing, activation=activation, **options)
