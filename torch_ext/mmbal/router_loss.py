"""Fake kernels and gradients of ``load_balance_loss`` and ``router_z_loss``; see include/mmbal/router_loss.h."""

from torch.library import register_autograd, register_fake

from mmbal._library import autocast_to_real, check_devices, ops, refuse_double_backward
from mmbal.routing import real_dtype


@register_fake("mmbal::load_balance_loss")
def _(logits_NE, indices_NK, token_mask_N=None, normalize="mixtral"):
    check_devices("load_balance_loss", logits=logits_NE, indices=indices_NK, token_mask=token_mask_N)
    return logits_NE.new_empty((), dtype=real_dtype(logits_NE.dtype))


@register_fake("mmbal::load_balance_loss_backward")
def _(dloss, logits_NE, indices_NK, token_mask_N, normalize):
    check_devices(
        "load_balance_loss_backward", dloss=dloss, logits=logits_NE, indices=indices_NK, token_mask=token_mask_N
    )
    return logits_NE.new_empty(logits_NE.shape)


@register_fake("mmbal::router_z_loss")
def _(logits_NE, token_mask_N=None):
    check_devices("router_z_loss", logits=logits_NE, token_mask=token_mask_N)
    return logits_NE.new_empty((), dtype=real_dtype(logits_NE.dtype))


@register_fake("mmbal::router_z_loss_backward")
def _(dloss, logits_NE, token_mask_N):
    check_devices("router_z_loss_backward", dloss=dloss, logits=logits_NE, token_mask=token_mask_N)
    return logits_NE.new_empty(logits_NE.shape)


def _save_balance(ctx, inputs, output):
    logits_NE, indices_NK, token_mask_N, ctx.normalize = inputs
    ctx.save_for_backward(logits_NE, indices_NK, token_mask_N)


def _balance_backward(ctx, dloss):
    logits_NE, indices_NK, token_mask_N = ctx.saved_tensors
    return ops.load_balance_loss_backward(dloss, logits_NE, indices_NK, token_mask_N, ctx.normalize), None, None, None


def _save_z(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _z_backward(ctx, dloss):
    return ops.router_z_loss_backward(dloss, *ctx.saved_tensors), None


register_autograd("mmbal::load_balance_loss", _balance_backward, setup_context=_save_balance)
register_autograd("mmbal::router_z_loss", _z_backward, setup_context=_save_z)
autocast_to_real("load_balance_loss")
autocast_to_real("router_z_loss")
refuse_double_backward("load_balance_loss_backward")
refuse_double_backward("router_z_loss_backward")
