"""Fake kernels and gradients of BTW's weights and their application; the formulas are in include/mmbal/btw.h."""

import torch
from torch.library import register_autograd, register_fake

from mmbal._library import (
    autocast_to_float32,
    check_devices,
    implementations,
    ops,
    refuse_differentiated,
    refuse_double_backward,
)
from mmbal.divergence import gradient_or_nothing, wanted
from mmbal.routing import real_dtype


@register_fake("mmbal::btw_weights")
def _(kl_NM, mi_M, present_NM=None, floor=1e-5, ceiling=1e6, mode="diverge", temperature=1.0, mean_one=False):
    check_devices("btw_weights", kl=kl_NM, mi=mi_M, present=present_NM)
    return kl_NM.new_empty(kl_NM.shape, dtype=real_dtype(kl_NM.dtype))


@register_fake("mmbal::btw_weights_backward")
def _(dw_NM, kl_NM, mi_M, present_NM, floor, ceiling, mode, temperature, mean_one, needed):
    return tuple(gradient_or_nothing(*pair) for pair in zip(needed, (kl_NM, mi_M), strict=True))


@register_fake("mmbal::ema_rows_")
def _(table_SM, index_N, w_NM, alpha):
    check_devices("ema_rows_", table=table_SM, index=index_N, w=w_NM)


@register_fake("mmbal::scale_modalities")
def _(embeddings, w_NM):
    for m, h in enumerate(embeddings):
        check_devices("scale_modalities", w=w_NM, **{f"embeddings[{m}]": h})
    return [h.new_empty(h.shape) for h in embeddings]


@register_fake("mmbal::scale_modalities_dweights")
def _(dscaled, embeddings):
    first = embeddings[0]
    return first.new_empty((first.shape[0], len(embeddings)), dtype=real_dtype(first.dtype))


def _ema_rows_told(keys, table_SM, index_N, w_NM, alpha):
    """Tells autograd that the table has changed, which torch does for its own operators alone."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        ops.ema_rows_(table_SM, index_N, w_NM, alpha)
    torch.autograd.graph.increment_version(table_SM)


def _save_weights(ctx, inputs, output):
    kl_NM, mi_M, present_NM, *ctx.options = inputs
    ctx.save_for_backward(kl_NM, mi_M, present_NM)


def _weights_backward(ctx, dw_NM):
    needed = list(ctx.needs_input_grad[:2])
    gradients = ops.btw_weights_backward(dw_NM, *ctx.saved_tensors, *ctx.options, needed)
    return *wanted(gradients, needed), *([None] * (1 + len(ctx.options)))


def _save_scale(ctx, inputs, output):
    embeddings, w_NM = inputs
    ctx.modalities = len(embeddings)
    ctx.save_for_backward(*embeddings, w_NM)


def _scale_backward(ctx, dscaled):
    *embeddings, w_NM = ctx.saved_tensors
    needed, weights_needed = ctx.needs_input_grad
    dscaled = [torch.zeros_like(h) if g is None else g for g, h in zip(dscaled, embeddings, strict=True)]
    scaled = ops.scale_modalities(dscaled, w_NM) if any(needed) else [None] * ctx.modalities
    dw_NM = ops.scale_modalities_dweights(dscaled, embeddings).to(w_NM.dtype) if weights_needed else None
    return list(wanted(scaled, needed)), dw_NM


register_autograd("mmbal::btw_weights", _weights_backward, setup_context=_save_weights)
register_autograd("mmbal::scale_modalities", _scale_backward, setup_context=_save_scale)
autocast_to_float32("btw_weights")
refuse_double_backward("btw_weights_backward")
refuse_double_backward("scale_modalities_dweights")
implementations.impl("ema_rows_", _ema_rows_told, "ADInplaceOrView", with_keyset=True)


refuse_differentiated("ema_rows_")
