"""``expert_mlp`` from its forward and backward; the formulas are in include/mmbal/expert_mlp.h.

``expert_mlp`` itself is composite: it keeps the pre-activation only when a gradient may be asked for.
"""

import torch
from torch.library import register_autograd, register_fake

from mmbal import _core
from mmbal._library import AUTOCAST_KEYS, check_devices, give_constants, implementations, ops, refuse_double_backward


def _expert_mlp(
    x_ND,
    w1_EFD,
    b1_EF,
    w2_EDF,
    b2_ED,
    weights_NK,
    permutation_R,
    offsets_E1,
    inverse_NK,
    activation="quick_gelu",
    dropout=0.0,
    output_dropout=0.0,
    seed=0,
    offset=0,
):
    trained = torch.is_grad_enabled() and any(
        t is not None and t.requires_grad for t in (x_ND, w1_EFD, b1_EF, w2_EDF, b2_ED, weights_NK)
    )
    y_ND, _ = ops.expert_mlp_forward(
        x_ND,
        w1_EFD,
        b1_EF,
        w2_EDF,
        b2_ED,
        weights_NK,
        permutation_R,
        offsets_E1,
        inverse_NK,
        activation,
        dropout,
        output_dropout,
        seed,
        offset,
        trained,
    )
    return y_ND


def _autocast(device_type):
    """Activations and expert weights in autocast's dtype; routing weights stay as they are (float32)."""

    def rule(x_ND, w1_EFD, b1_EF, w2_EDF, b2_ED, *rest, **options):
        dtype = torch.get_autocast_dtype(device_type)

        def cast(t):
            return t if t is None or t.dtype == torch.float64 else t.to(dtype)

        with torch.autocast(device_type, enabled=False):
            return ops.expert_mlp(cast(x_ND), cast(w1_EFD), cast(b1_EF), cast(w2_EDF), cast(b2_ED), *rest, **options)

    return rule


implementations.impl("expert_mlp", _expert_mlp, "CompositeImplicitAutograd")
for _device_type, _key in AUTOCAST_KEYS.items():
    implementations.impl("expert_mlp", _autocast(_device_type), _key)


@register_fake("mmbal::expert_mlp_forward")
def _(x_ND, w1_EFD, b1_EF, w2_EDF, b2_ED, weights_NK, permutation_R, offsets_E1, inverse_NK, *options, packed=None):
    check_devices(
        "expert_mlp",
        x=x_ND,
        w1=w1_EFD,
        b1=b1_EF,
        w2=w2_EDF,
        b2=b2_ED,
        weights=weights_NK,
        permutation=permutation_R,
        offsets=offsets_E1,
        inverse=inverse_NK,
    )
    if packed is not None and packed.dtype != torch.uint8:
        raise RuntimeError(f"expert_mlp: packed must be uint8, got {packed.dtype}")
    keep_preactivation = options[5]
    R = weights_NK.shape[0] * weights_NK.shape[1] if keep_preactivation else 0
    return x_ND.new_empty(x_ND.shape), x_ND.new_empty(R, w1_EFD.shape[1])


@register_fake("mmbal::expert_mlp_pack")
def _(w1_EFD, w2_EDF):
    check_devices("expert_mlp_pack", w1=w1_EFD, w2=w2_EDF)
    E, F, D = (int(size) for size in w1_EFD.shape)
    if w1_EFD.device.type == "cuda":  # mmbal/cuda/expert_mlp.h
        pack = 16 // w1_EFD.element_size()
        elements = E * (F * -(-D // pack) + D * -(-F // pack)) * pack
        return w1_EFD.new_empty(elements * w1_EFD.element_size(), dtype=torch.uint8)
    name = str(w1_EFD.dtype).removeprefix("torch.")
    return w1_EFD.new_empty(_core.expert_mlp_packed_bytes(name, D, F, E), dtype=torch.uint8)


@register_fake("mmbal::expert_mlp_backward")
def _(dy_ND, x_ND, w1_EFD, w2_EDF, b2_ED, weights_NK, *rest):
    check_devices("expert_mlp_backward", dy=dy_ND, x=x_ND, w1=w1_EFD, w2=w2_EDF, b2=b2_ED, weights=weights_NK)
    E, F, D = w1_EFD.shape
    of_x = (x_ND.shape, (E, F, D), (E, F), (E, D, F), (E, D))
    needed = rest[-1]
    gradients = [x_ND.new_empty(shape if wanted else 0) for shape, wanted in zip(of_x, needed, strict=False)]
    return *gradients, weights_NK.new_empty(weights_NK.shape if needed[5] else 0)


def _save(ctx, inputs, output):
    x_ND, w1_EFD, _, w2_EDF, b2_ED, weights_NK, permutation_R, offsets_E1, inverse_NK, *options = inputs
    *ctx.options, keep, _ = options
    preactivation_RF = output[1]
    if not keep:
        raise RuntimeError("expert_mlp_forward: keep_preactivation must be True where a gradient is asked for")
    ctx.save_for_backward(
        x_ND, w1_EFD, w2_EDF, b2_ED, weights_NK, permutation_R, offsets_E1, inverse_NK, preactivation_RF
    )
    ctx.mark_non_differentiable(preactivation_RF)
    ctx.set_materialize_grads(False)


def _backward(ctx, dy_ND, _):
    x, w1, b1, w2, b2, weights = range(6)
    needed = [ctx.needs_input_grad[i] for i in (x, w1, b1, w2, b2, weights)]
    nothing = [None] * len(ctx.needs_input_grad)
    if dy_ND is None or not any(needed):
        return tuple(nothing)
    gradients = ops.expert_mlp_backward(dy_ND, *ctx.saved_tensors, *ctx.options, needed)
    return tuple(g if wanted else None for g, wanted in zip(gradients, needed, strict=True)) + tuple(nothing[6:])


register_autograd("mmbal::expert_mlp_forward", _backward, setup_context=_save)
refuse_double_backward("expert_mlp_backward")


give_constants("expert_mlp_pack")
