"""Fake kernels and both derivatives of attribution_reg; the formulas are in include/mmbal/attribution.h.

Letters: B samples, M modalities, C classes.
"""

import torch
from torch.library import register_autograd, register_fake

from mmbal._library import autocast_to_float32, check_devices, ops, refuse_double_backward, refuse_gradient
from mmbal.routing import real_dtype


def _check(op, lists, **others):
    tensors = {f"{name}[{m}]": t for name, several in lists.items() for m, t in enumerate(several)}
    check_devices(op, **tensors, **others)


def _outputs(embeddings):
    first = embeddings[0]
    B, M, real = first.shape[0], len(embeddings), real_dtype(first.dtype)
    return tuple(first.new_empty(sizes, dtype=real) for sizes in ((B,), (B, M), (B, M)))


def _like(embeddings):
    return [e.new_empty(e.shape) for e in embeddings]


@register_fake("mmbal::attribution_reg")
def _(grads, embeddings, target_shares, present_BM=None, pool="l2", penalty="l1", eps=1e-12):
    _check(
        "attribution_reg", {"embeddings": embeddings, "grads": grads}, target_shares=target_shares, present=present_BM
    )
    return _outputs(embeddings)


@register_fake("mmbal::attribution_reg_backward")
def _(
    dreg_B,
    dshares_BM,
    dmagnitudes_BM,
    grads,
    embeddings,
    target_shares,
    present_BM,
    magnitudes_BM,
    pool,
    penalty,
    eps,
    need_grads=True,
    need_embeddings=True,
):
    return _like(embeddings) if need_grads else [], _like(embeddings) if need_embeddings else []


@register_fake("mmbal::attribution_reg_backward_backward")
def _(ddgrads, ddembeddings, dreg_B, dshares_BM, dmagnitudes_BM, grads, embeddings, *rest):
    return *_outputs(embeddings), _like(embeddings), _like(embeddings)


@register_fake("mmbal::attribution_linear")
def _(embeddings, weights, logits_BC, target_shares, dreg_B, present_BM=None, classes_B=None, *options, **named):
    lists = {"embeddings": embeddings, "weights": weights}
    rest = {"logits": logits_BC, "target_shares": target_shares, "dreg": dreg_B}
    _check("attribution_linear", lists, **rest, present=present_BM, classes=classes_B)
    return *_outputs(embeddings), _like(weights), logits_BC.new_empty(logits_BC.shape[1])


def _save(ctx, inputs, output):
    grads, embeddings, target_shares, present_BM, *ctx.options = inputs
    ctx.modalities = len(grads)
    ctx.save_for_backward(*grads, *embeddings, target_shares, present_BM, output[2])


def _saved(ctx):
    M, tensors = ctx.modalities, ctx.saved_tensors
    return list(tensors[:M]), list(tensors[M : 2 * M]), *tensors[2 * M :]


def _backward(ctx, dreg_B, dshares_BM, dmagnitudes_BM):
    grads, embeddings, target_shares, present_BM, magnitudes_BM = _saved(ctx)
    upstream = [
        torch.zeros_like(magnitudes_BM[:, 0] if like_reg else magnitudes_BM) if t is None else t
        for t, like_reg in ((dreg_B, True), (dshares_BM, False), (dmagnitudes_BM, False))
    ]
    needed = [any(each) for each in ctx.needs_input_grad[:2]]
    dgrads, dembeddings = ops.attribution_reg_backward(
        *upstream, grads, embeddings, target_shares, present_BM, magnitudes_BM, *ctx.options, *needed
    )
    none = [None] * ctx.modalities
    # Defaults are not among the inputs.
    return dgrads or none, dembeddings or none, *([None] * (len(ctx.needs_input_grad) - 2))


def _save_backward(ctx, inputs, output):
    *upstream, grads, embeddings, target_shares, present_BM, magnitudes_BM = inputs[:8]
    ctx.options = inputs[8:11]
    ctx.modalities = len(grads)
    ctx.save_for_backward(*upstream, *grads, *embeddings, target_shares, present_BM, magnitudes_BM)


def _backward_backward(ctx, ddgrads, ddembeddings):
    M, tensors = ctx.modalities, ctx.saved_tensors
    upstream, grads, embeddings = tensors[:3], list(tensors[3 : 3 + M]), list(tensors[3 + M : 3 + 2 * M])
    target_shares, present_BM, magnitudes_BM = tensors[3 + 2 * M :]
    ddgrads, ddembeddings = (
        [torch.zeros_like(e) if t is None else t for t, e in zip(given or [None] * M, embeddings, strict=True)]
        for given in (ddgrads, ddembeddings)
    )
    *to_upstream, to_grads, to_embeddings = ops.attribution_reg_backward_backward(
        ddgrads, ddembeddings, *upstream, grads, embeddings, target_shares, present_BM, magnitudes_BM, *ctx.options
    )
    # The magnitudes are a function of grads and embeddings, whose derivatives hold what goes through them.
    return *to_upstream, to_grads, to_embeddings, *([None] * (len(ctx.needs_input_grad) - 5))


register_autograd("mmbal::attribution_reg", _backward, setup_context=_save)
register_autograd("mmbal::attribution_reg_backward", _backward_backward, setup_context=_save_backward)
refuse_double_backward("attribution_reg_backward_backward")
refuse_gradient("attribution_linear")  # what it returns are the head's gradients
for _op in ("attribution_reg", "attribution_linear"):
    autocast_to_float32(_op)
