"""Fake kernels and version counters of the operators on units of gradients and on their elements.

The contracts are in include/mmbal/units.h and include/mmbal/elements.h. ``specs`` has nine numbers for each tensor:
sizes of groups, units, outer and inner, their strides, and the offset of the first element (``mmbal.UnitSpec`` makes
them); an empty list stands for the slices of dimension 0 of contiguous tensors, and costs nothing to pass. None of
these operators has a gradient: they are for ``.grad``, not for the graph.
"""

import torch
from torch.library import register_fake

from mmbal._library import check_devices, give_constants, implementations, ops, refuse_differentiated

SPEC = 9  # numbers for each tensor


def count_units(tensors: list[torch.Tensor], specs: list[int]) -> int:
    """U of all tensors."""
    if not specs:
        return sum(t.shape[0] for t in tensors)
    return sum(groups * units for groups, units in zip(specs[::SPEC], specs[1::SPEC], strict=True))


def _check_lists(op, grads, **others):
    for t, grad in enumerate(grads):
        check_devices(op, **{f"grads[{t}]": grad}, **{name: of for name, of in others.items() if of is not None})


@register_fake("mmbal::unit_energy_foreach")
def _(grads, specs, weights=None, importance="gn"):
    _check_lists("unit_energy_foreach", grads)
    energy_U = grads[0].new_empty(count_units(grads, specs), dtype=torch.float64)
    return energy_U, grads[0].new_empty(1, dtype=torch.bool)


@register_fake("mmbal::scale_units_foreach_")
def _(grads, specs, scale_U, skip_1=None, bases=None):
    _check_lists("scale_units_foreach_", grads, scale=scale_U, skip=skip_1)


@register_fake("mmbal::mask_elements_foreach_")
def _(
    grads,
    modality,
    ids,
    rho_M,
    seed,
    step,
    sampler="bottomk",
    lam=0.5,
    unbiased=False,
    importance="gn",
    weights=None,
    skip_1=None,
    gradients=None,
    bases=None,
):
    _check_lists("mask_elements_foreach_", grads, rho=rho_M, skip=skip_1)


def in_place(op, grads, *rest) -> None:
    """Calls an operator that changes grads and tells autograd so, which torch does for its own operators alone. Called
    directly it spares the way through the dispatcher and back, which every tensor pays for."""
    with torch._C._AutoDispatchBelowADInplaceOrView():
        op(grads, *rest)
    torch.autograd.graph.increment_version(grads)


for _op in (ops.scale_units_foreach_, ops.mask_elements_foreach_):

    def _rule(keys, grads, *rest, _op=_op):
        in_place(_op, grads, *rest)

    _name = _op._qualified_op_name.removeprefix("mmbal::")
    implementations.impl(_name, _rule, "ADInplaceOrView", with_keyset=True)
    refuse_differentiated(_name)


give_constants("unit_energy_foreach")
