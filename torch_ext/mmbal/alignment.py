"""The loss that aligns two modalities: fake kernels, gradient; the formulas are in include/mmbal/alignment.h.

Letters: B own rows, D width of what is regressed, A candidates of all processes, C width of the embeddings.
"""

import math

import torch
from torch import Tensor
from torch.library import register_autograd, register_fake

from mmbal._library import (
    AUTOCAST_KEYS,
    check,
    check_devices,
    check_dtype,
    check_shape,
    check_storage_dtype,
    implementations,
    ops,
    refuse_double_backward,
)
from mmbal.routing import real_dtype


def align_loss(
    pred: Tensor,
    target: Tensor,
    source_embedding: Tensor,
    target_embedding: Tensor,
    group_ids: Tensor | None = None,
    present: Tensor | None = None,
    offset: int = 0,
    tau: float = 0.03,
    alpha: float = 0.5,
    regression: str = "smooth_l1",
    beta: float = 1.0,
    symmetric: bool = True,
) -> tuple[Tensor, Tensor, Tensor]:
    """Regression of a target and symmetric InfoNCE, fused (M3-JEPA, arXiv 2409.05929).

    Args:
        pred, target: [B, D], the prediction and what it is to be.
        source_embedding, target_embedding: [A, C], what is contrasted, not yet normalised: the rows of all processes,
            of which offset .. offset + B are those of pred. On one process A = B.
        group_ids: int64 [A]; candidates with the id of a row are no negatives of it (several captions of an image).
        present: bool [A]; rows to leave out of both losses, which are not read.
        offset: of the own rows among the candidates.
        tau: temperature of the similarities.
        alpha: loss = alpha regression + (1 - alpha) contrastive.
        regression: "smooth_l1" (with ``beta``), "mse", "l2" (the squared sum over D) or "cosine".
        symmetric: both directions, halved; or own source rows over the target candidates alone.

    Returns:
        loss, regression, contrastive: scalars, float32 (float64 for float64). Means over the present rows; the mean
        over processes of equal B is that of the joined batch: gather with gradients that are summed
        (``torch.distributed.nn.functional.all_gather``) and let DDP average. One present candidate: contrastive 0.
    """
    return ops.align_loss(
        pred,
        target,
        source_embedding,
        target_embedding,
        group_ids,
        present,
        offset,
        tau,
        alpha,
        regression,
        beta,
        symmetric,
    )[:3]


@register_fake("mmbal::align_loss")
def _(
    pred_BD,
    target_BD,
    source_AC,
    target_AC,
    group_ids_A=None,
    present_A=None,
    offset=0,
    tau=0.03,
    alpha=0.5,
    regression="smooth_l1",
    beta=1.0,
    symmetric=True,
):
    check_devices(
        "align_loss",
        pred=pred_BD,
        target=target_BD,
        source_embedding=source_AC,
        target_embedding=target_AC,
        group_ids=group_ids_A,
        present=present_A,
    )
    _check_tensors(pred_BD, target_BD, source_AC, target_AC, group_ids_A, present_A)
    op, most = "align_loss", source_AC.shape[0] - pred_BD.shape[0]
    check(op, 0 <= offset <= most, "offset must be from 0 to A - B = ", most, ", got ", offset)
    check(op, 1e-30 <= tau <= 1e30, "tau must be from 1e-30 to 1e30, got ", tau)
    check(op, 0 <= alpha <= 1, "alpha must be from 0 to 1, got ", alpha)
    check(op, 0 <= beta < math.inf, "beta must be finite and not negative, got ", beta)
    known = regression in ("smooth_l1", "mse", "l2", "cosine")
    check(op, known, "regression must be smooth_l1, mse, l2 or cosine, got ", regression)
    real = real_dtype(pred_BD.dtype)
    scalars = [pred_BD.new_empty((), dtype=real) for _ in range(3)]
    return *scalars, pred_BD.new_empty(2, pred_BD.shape[0], dtype=real)


def _check_tensors(pred_BD, target_BD, source_AC, target_AC, group_ids_A, present_A):
    op = "align_loss"
    check_shape(op, "pred", pred_BD, "[B, D]", (None, None))
    check_storage_dtype(op, "pred", pred_BD)
    check_shape(op, "source_embedding", source_AC, "[A, C]", (None, None))
    (B, D), (A, C) = pred_BD.shape, source_AC.shape
    for name, t, letters, sizes in (
        ("target", target_BD, "[B, D]", (B, D)),
        ("source_embedding", source_AC, "[A, C]", (A, C)),
        ("target_embedding", target_AC, "[A, C]", (A, C)),
    ):
        check_shape(op, name, t, letters, sizes)
        check_dtype(op, name, t, pred_BD.dtype)
    check(op, D >= 1, "pred must have at least one column, got ", [B, D])
    check(op, C >= 1, "source_embedding must have at least one column, got ", [A, C])
    check(op, A >= B, "source_embedding must have a row for each of the ", B, " of pred, got ", [A, C])
    for name, t, dtype in (("group_ids", group_ids_A, torch.int64), ("present", present_A, torch.bool)):
        if t is not None:
            check_shape(op, name, t, "[A]", (A,))
            check_dtype(op, name, t, dtype)


@register_fake("mmbal::align_loss_backward")
def _(dloss, dregression, dcontrastive, pred_BD, target_BD, source_AC, target_AC, normalizers_2B, *rest):
    inputs, needed = (pred_BD, target_BD, source_AC, target_AC), rest[-1]
    return tuple(t.new_empty(t.shape if wanted else 0) for t, wanted in zip(inputs, needed, strict=True))


def _save(ctx, inputs, output):
    pred_BD, target_BD, source_AC, target_AC, group_ids_A, present_A, *ctx.options = inputs
    normalizers_2B = output[3]
    ctx.save_for_backward(pred_BD, target_BD, source_AC, target_AC, normalizers_2B, group_ids_A, present_A)
    ctx.mark_non_differentiable(normalizers_2B)
    ctx.set_materialize_grads(False)


def _backward(ctx, dloss, dregression, dcontrastive, _):
    needed, nothing = list(ctx.needs_input_grad[:4]), [None] * (len(ctx.needs_input_grad) - 4)
    upstream = (dloss, dregression, dcontrastive)
    if not any(needed) or all(t is None for t in upstream):
        return *([None] * 4), *nothing
    normalizers_2B = ctx.saved_tensors[4]
    upstream = [normalizers_2B.new_zeros(()) if t is None else t for t in upstream]
    gradients = ops.align_loss_backward(*upstream, *ctx.saved_tensors, *ctx.options, needed)
    return *(g if wanted else None for g, wanted in zip(gradients, needed, strict=True)), *nothing


def _autocast_on(device_type):
    def rule(pred_BD, target_BD, source_AC, target_AC, *rest, **options):
        """In float32, or in float64 where any of the four is."""
        tensors = (pred_BD, target_BD, source_AC, target_AC)
        real = torch.float64 if any(t.dtype == torch.float64 for t in tensors) else torch.float32
        with torch.autocast(device_type, enabled=False):
            return ops.align_loss(*(t.to(real) for t in tensors), *rest, **options)

    return rule


register_autograd("mmbal::align_loss", _backward, setup_context=_save)
for _device_type, _key in AUTOCAST_KEYS.items():
    implementations.impl("align_loss", _autocast_on(_device_type), _key)
refuse_double_backward("align_loss_backward")
