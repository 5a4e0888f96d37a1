"""Fake kernels and gradients of the divergences; the formulas are in include/mmbal/divergence.h."""

from torch.library import register_fake

from mmbal._library import autocast_to_float32, check_devices, ops, refuse_double_backward, register_gradient
from mmbal.routing import real_dtype


@register_fake("mmbal::gaussian_kl")
def _(mu_NM, log_sigma_NM, fused_mu_N, fused_log_sigma_N):
    check_devices(
        "gaussian_kl", mu=mu_NM, log_sigma=log_sigma_NM, fused_mu=fused_mu_N, fused_log_sigma=fused_log_sigma_N
    )
    return mu_NM.new_empty(mu_NM.shape, dtype=real_dtype(mu_NM.dtype))


@register_fake("mmbal::residual_kl")
def _(mu_NM, fused_mu_N, target_N, sigma_min):
    check_devices("residual_kl", mu=mu_NM, fused_mu=fused_mu_N, target=target_N)
    return mu_NM.new_empty(mu_NM.shape, dtype=real_dtype(mu_NM.dtype))


@register_fake("mmbal::categorical_kl")
def _(logits_MNC, fused_logits_NC, reverse=False):
    check_devices("categorical_kl", logits=logits_MNC, fused_logits=fused_logits_NC)
    M, N, _ = logits_MNC.shape
    return logits_MNC.new_empty((N, M), dtype=real_dtype(logits_MNC.dtype))


def gradient_or_nothing(needed, like):
    """A gradient that is not needed comes back with shape [0]."""
    return like.new_empty(like.shape if needed else 0)


@register_fake("mmbal::gaussian_kl_backward")
def _(dkl_NM, mu_NM, log_sigma_NM, fused_mu_N, fused_log_sigma_N, needed):
    inputs = (mu_NM, log_sigma_NM, fused_mu_N, fused_log_sigma_N)
    return tuple(gradient_or_nothing(*pair) for pair in zip(needed, inputs, strict=True))


@register_fake("mmbal::residual_kl_backward")
def _(dkl_NM, mu_NM, fused_mu_N, target_N, sigma_min, needed):
    return tuple(gradient_or_nothing(*pair) for pair in zip(needed, (mu_NM, fused_mu_N), strict=True))


@register_fake("mmbal::categorical_kl_backward")
def _(dkl_NM, logits_MNC, fused_logits_NC, reverse, needed):
    return tuple(gradient_or_nothing(*pair) for pair in zip(needed, (logits_MNC, fused_logits_NC), strict=True))


def wanted(gradients, needed):
    return tuple(gradient if need else None for gradient, need in zip(gradients, needed, strict=True))


def _save_gaussian(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _gaussian_backward(ctx, dkl_NM):
    needed = list(ctx.needs_input_grad)
    return wanted(ops.gaussian_kl_backward(dkl_NM, *ctx.saved_tensors, needed), needed)


def _save_residual(ctx, inputs, output):
    *tensors, ctx.sigma_min = inputs
    ctx.save_for_backward(*tensors)


def _residual_backward(ctx, dkl_NM):
    mu, fused, target, _ = ctx.needs_input_grad
    needed = [mu or target, fused or target]
    dmu_NM, dfused_N = ops.residual_kl_backward(dkl_NM, *ctx.saved_tensors, ctx.sigma_min, needed)
    real = dkl_NM.dtype
    dtarget_N = (-dfused_N.to(real) - dmu_NM.sum(1, dtype=real)).to(dfused_N.dtype) if target else None
    return dmu_NM if mu else None, dfused_N if fused else None, dtarget_N, None


def _save_categorical(ctx, inputs, output):
    *tensors, ctx.reverse = inputs
    ctx.save_for_backward(*tensors)


def _categorical_backward(ctx, dkl_NM):
    needed = list(ctx.needs_input_grad[:2])
    return *wanted(ops.categorical_kl_backward(dkl_NM, *ctx.saved_tensors, ctx.reverse, needed), needed), None


register_gradient("gaussian_kl", _gaussian_backward, _save_gaussian)
register_gradient("residual_kl", _residual_backward, _save_residual)
register_gradient("categorical_kl", _categorical_backward, _save_categorical)
for _op in ("gaussian_kl", "residual_kl", "categorical_kl"):
    autocast_to_float32(_op)
    refuse_double_backward(f"{_op}_backward")
