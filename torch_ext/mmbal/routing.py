"""Fake kernels and gradients of ``moe_topk`` and ``moe_dispatch``; the formulas are in include/mmbal/routing.h."""

import torch
from torch.library import register_autograd, register_fake

from mmbal._library import autocast_to_real, check_devices, give_constants, ops, refuse_double_backward


def real_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of routing weights and losses: float32, or float64 for float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@register_fake("mmbal::moe_topk")
def _(logits_NE, k, normalize=True, selection_bias_E=None):
    check_devices("moe_topk", logits=logits_NE, selection_bias=selection_bias_E)
    N, E = logits_NE.shape
    if not 1 <= k <= E:
        raise RuntimeError(f"moe_topk: k must be from 1 to the number of experts {E}, got {k}")
    return logits_NE.new_empty(N, k, dtype=real_dtype(logits_NE.dtype)), logits_NE.new_empty(N, k, dtype=torch.int64)


@register_fake("mmbal::moe_topk_backward")
def _(dweights_NK, logits_NE, weights_NK, indices_NK, normalize):
    check_devices("moe_topk_backward", dweights=dweights_NK, logits=logits_NE, weights=weights_NK, indices=indices_NK)
    return logits_NE.new_empty(logits_NE.shape)


@register_fake("mmbal::moe_dispatch")
def _(indices_NK, num_experts):
    R = indices_NK.shape[0] * indices_NK.shape[1]
    return indices_NK.new_empty(R), indices_NK.new_empty(num_experts + 1), indices_NK.new_empty(indices_NK.shape)


def _save(ctx, inputs, output):
    logits_NE, _, ctx.normalize, _ = inputs
    weights_NK, indices_NK = output
    ctx.save_for_backward(logits_NE, weights_NK, indices_NK)
    ctx.set_materialize_grads(False)


def _backward(ctx, dweights_NK, _):
    if dweights_NK is None:
        return None, None, None, None
    logits_NE, weights_NK, indices_NK = ctx.saved_tensors
    return ops.moe_topk_backward(dweights_NK, logits_NE, weights_NK, indices_NK, ctx.normalize), None, None, None


register_autograd("mmbal::moe_topk", _backward, setup_context=_save)
autocast_to_real("moe_topk")
refuse_double_backward("moe_topk_backward")
give_constants("moe_dispatch")
