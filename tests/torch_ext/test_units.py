"""Energies of units of gradients and their multiplication, for lists of tensors, against plain torch in float64."""

import math

import pytest
import torch

import mmbal
from mmbal import UnitSpec

ops = torch.ops.mmbal
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
F64 = {"dtype": torch.float64}


def by_index(tensor, spec):
    """[units of all groups, elements] views of a tensor, cut as the words of UnitSpec say."""
    if spec.kind == "columns":
        return tensor[:, spec.first : spec.first + spec.count].reshape(-1, 1)
    if spec.kind == "elements":
        return tensor.reshape(1, -1)
    moved = tensor.movedim(spec.dim, 0)
    count = moved.shape[0] if spec.kind == "slices" else spec.count
    return moved.reshape(count, -1)


CUTS = {
    "filters": ((16, 3, 3, 3), UnitSpec.slices()),
    "rows": ((7, 5), UnitSpec.slices()),
    "transposed filters": ((4, 6, 3, 3), UnitSpec.slices(1)),
    "heads as rows": ((12, 10), UnitSpec.heads(4)),
    "heads as columns": ((10, 12), UnitSpec.heads(4, dim=1)),
    "columns of a head": ((5, 24), UnitSpec.columns(8, 12)),
    "the last dimension": ((3, 4, 5), UnitSpec.slices(2)),
    "the middle dimension": ((3, 4, 5), UnitSpec.slices(1)),
    "few large units": ((2, 150_000), UnitSpec.slices()),
    "many small units": ((40_000, 3), UnitSpec.slices()),
    "long columns": ((3000, 40), UnitSpec.slices(1)),
    "one whole": ((70_001, 3), UnitSpec.heads(1)),
}


def specs_of(tensors, cuts):
    return [n for t, cut in zip(tensors, cuts, strict=True) for n in cut.numbers(t.shape, t.stride())]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", CUTS)
def test_energies_are_sums_of_squares(cut, dtype, poisoned_memory):
    shape, spec = CUTS[cut]
    g = torch.randn(shape).to(dtype)
    energy, nonfinite = ops.unit_energy_foreach([g], specs_of([g], [spec]))
    assert energy.dtype == torch.float64 and not nonfinite.item()
    assert torch.allclose(energy, by_index(g.double(), spec).square().sum(1), rtol=1e-13, atol=0)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("cut", CUTS)
def test_units_are_scaled_and_rounded_once(cut, dtype):
    shape, spec = CUTS[cut]
    g = torch.randn(shape).to(dtype)
    units = math.prod(spec.units(shape))
    scale = torch.tensor([0.0, 1.0, 1.7, 0.3], **F64)[torch.randint(0, 4, (units,))]
    real = torch.float64 if dtype == torch.float64 else torch.float32
    whole = torch.ones_like(g, dtype=real)  # what lies outside of the units stays
    if spec.kind == "columns":
        whole[:, spec.first : spec.first + spec.count] = scale.to(real).reshape(shape[0], spec.count)
    else:
        moved = scale.to(real).repeat_interleave(shape[spec.dim] // units)
        whole = whole * moved.view([-1 if d == spec.dim else 1 for d in range(len(shape))])
    expected = (g.to(real) * whole).to(dtype)
    ops.scale_units_foreach_([g], specs_of([g], [spec]), scale)
    assert torch.equal(g, expected)


def test_lists_of_any_dtypes_and_shapes_are_one_call():
    names = list(CUTS)
    grads = [torch.randn(CUTS[name][0]).to(DTYPES[i % 4]) for i, name in enumerate(names)]
    cuts = [CUTS[name][1] for name in names]
    specs = specs_of(grads, cuts)
    energy, _ = ops.unit_energy_foreach(grads, specs)
    one_by_one = [ops.unit_energy_foreach([g], specs_of([g], [c]))[0] for g, c in zip(grads, cuts, strict=True)]
    assert torch.equal(energy, torch.cat(one_by_one))
    scale = torch.rand(len(energy), **F64)
    copies = [g.clone() for g in grads]
    ops.scale_units_foreach_(grads, specs, scale)
    for g, cut, part in zip(copies, cuts, scale.split([len(e) for e in one_by_one]), strict=True):
        ops.scale_units_foreach_([g], specs_of([g], [cut]), part)
    assert all(torch.equal(a, b) for a, b in zip(grads, copies, strict=True))


def test_without_specs_units_are_the_slices_of_dimension_0():
    grads = [torch.randn(6, 3, 2), torch.randn(4), torch.randn(5, 7).bfloat16(), torch.zeros(0, 3)]
    cuts = [UnitSpec.slices()] * 4
    energy, _ = ops.unit_energy_foreach(grads, [])
    assert torch.equal(energy, ops.unit_energy_foreach(grads, specs_of(grads, cuts))[0])
    copies = [g.clone() for g in grads]
    scale = torch.rand(15, **F64)
    ops.scale_units_foreach_(grads, [], scale)
    ops.scale_units_foreach_(copies, specs_of(copies, cuts), scale)
    assert all(torch.equal(a, b) for a, b in zip(grads, copies, strict=True))


@pytest.mark.parametrize("layout", ["channels_last", "transposed", "sliced"])
def test_units_of_gradients_in_any_layout_are_the_same(layout):
    base = torch.randn(8, 6, 5, 5)
    g = {
        "channels_last": base.contiguous(memory_format=torch.channels_last),
        "transposed": base.transpose(0, 1).contiguous().transpose(0, 1),
        "sliced": torch.randn(8, 6, 5, 10)[..., :5].copy_(base),
    }[layout]
    assert not g.is_contiguous()
    spec = UnitSpec.slices()
    specs = specs_of([g], [spec])
    energy, _ = ops.unit_energy_foreach([g], specs)
    assert torch.allclose(energy, base.double().square().sum((1, 2, 3)), rtol=1e-14)
    scale = torch.tensor([0.0, 1, 2, 0, 1, 0.5, 0, 3], **F64)
    ops.scale_units_foreach_([g], specs, scale)
    assert torch.equal(g, base * scale.float().view(-1, 1, 1, 1))


def test_squares_of_float32_neither_over_nor_underflow():
    g = torch.tensor([[1e-30, 1e-45], [1e30, 3e38]])
    energy, nonfinite = ops.unit_energy_foreach([g], [])
    assert torch.allclose(energy, g.double().square().sum(1), rtol=1e-14, atol=0)
    assert (energy > 0).all() and not nonfinite.item()


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("dtype", DTYPES)
def test_one_value_that_is_not_finite_shows(value, dtype):
    grads = [torch.randn(5, 700).to(dtype) for _ in range(3)]
    assert not ops.unit_energy_foreach(grads, [])[1].item()
    grads[1][3, 699] = value
    assert ops.unit_energy_foreach(grads, [])[1].item()


def test_importances_are_roots_and_ratios_of_energies():
    g, w = torch.randn(6, 9), torch.randn(6, 9)
    w[2] = 0
    energy, _ = ops.unit_energy_foreach([g], [])
    assert torch.equal(ops.unit_energy_foreach([g], [], None, "sqrt_gn")[0], energy.sqrt())
    ratio, nonfinite = ops.unit_energy_foreach([g], [], [w], "gn_wn")
    assert torch.allclose(ratio, energy / (w.double().square().sum(1) + 2.0**-126), rtol=1e-14)
    assert ratio.isfinite().all() and not nonfinite.item()


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_one_leaves_every_bit_and_scale_zero_leaves_nothing(dtype):
    g = torch.tensor([[1.5, math.nan, -0.0], [math.nan, math.inf, 1.0]]).to(dtype)
    before = g.clone()
    ops.scale_units_foreach_([g], [], torch.tensor([1.0, 0.0], **F64))
    as_bits = torch.int64 if dtype == torch.float64 else torch.int32 if dtype == torch.float32 else torch.int16
    assert torch.equal(g[0].view(as_bits), before[0].view(as_bits))
    assert torch.equal(g[1], torch.zeros(3, dtype=dtype))


def test_bases_are_what_a_scale_of_zero_goes_back_to():
    base, moved = torch.randn(4, 5), torch.randn(4, 5)
    x = moved.clone()
    scale = torch.tensor([0.0, 1.0, 2.0, 0.5], **F64)
    ops.scale_units_foreach_([x], [], scale, None, [base])
    assert torch.equal(x[0], base[0]) and torch.equal(x[1], moved[1])
    assert torch.equal(x, torch.where(scale[:, None] == 1, moved, base + scale.float()[:, None] * (moved - base)))


def test_skip_leaves_everything():
    g = torch.randn(3, 4)
    before = g.clone()
    ops.scale_units_foreach_([g], [], torch.zeros(3, **F64), torch.tensor([True]))
    assert torch.equal(g, before)
    ops.scale_units_foreach_([g], [], torch.zeros(3, **F64), torch.tensor([False]))
    assert (g == 0).all()


def test_scaling_bumps_the_version_so_that_autograd_notices():
    x = torch.randn(3, 4, requires_grad=True)
    y = x * 2
    z = (y**2).sum()
    ops.scale_units_foreach_([y.detach()], [], torch.zeros(3, **F64))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.backward()


def test_results_are_bitwise_the_same_at_any_number_of_threads(at_each_thread_count):
    names = list(CUTS)
    grads = [torch.randn(CUTS[name][0]).to(DTYPES[i % 4]) for i, name in enumerate(names)]
    specs = specs_of(grads, [CUTS[name][1] for name in names])

    def run():
        energy, _ = ops.unit_energy_foreach(grads, specs)
        scaled = [g.clone() for g in grads]
        ops.scale_units_foreach_(scaled, specs, energy / energy.max())
        return energy, *scaled

    at_each_thread_count(run)


def test_operators_pass_opcheck_and_compile():
    grads, specs = [torch.randn(4, 3), torch.randn(2, 6)], [1, 4, 1, 3, 0, 3, 0, 1, 0, 1, 3, 2, 2, 0, 2, 6, 1, 0]
    scale = torch.rand(7, **F64)
    torch.library.opcheck(ops.unit_energy_foreach, (grads, specs))
    torch.library.opcheck(ops.unit_energy_foreach, (grads, [], grads, "gn_wn"))
    torch.library.opcheck(ops.scale_units_foreach_, (grads, specs, scale))

    @torch.compile(backend="aot_eager", fullgraph=True)
    def masked(a, b):
        energy, nonfinite = ops.unit_energy_foreach([a, b], [])
        mask, _ = ops.mask_units(energy, [1, 4, 0, 0, 1, 2, 0, 1], torch.tensor([0.5], **F64), 0, 0)
        out = [a.clone(), b.clone()]
        ops.scale_units_foreach_(out, [], mask, nonfinite)
        return out

    with torch.no_grad():
        got = masked(*grads)
    assert (got[0].abs().sum(1) > 0).sum() == 2 and (got[1].abs().sum(1) > 0).sum() == 1


def test_empty_tensors_are_served():
    grads = [torch.zeros(0, 3), torch.randn(2, 3), torch.zeros(4, 0)]
    energy, nonfinite = ops.unit_energy_foreach(grads, [])
    assert energy.shape == (6,) and (energy[2:] == 0).all() and not nonfinite.item()
    ops.scale_units_foreach_(grads, [], torch.zeros(6, **F64))
    assert (grads[1] == 0).all()


# --- UnitSpec ---------------------------------------------------------------------------------------------------------


def test_a_layout_that_four_axes_cannot_describe_is_said_to_be_none():
    holes = torch.randn(4, 6, 6, 6)[:, ::2, ::2, ::2]
    assert UnitSpec.slices().numbers(holes.shape, holes.stride()) is None
    assert UnitSpec.elements().numbers(holes.shape, holes.stride()) is None


@pytest.mark.parametrize(
    ("spec", "shape", "message"),
    [
        (UnitSpec.slices(2), (3, 4), r"dim must be one of the 2 of \[3, 4\], got 2"),
        (UnitSpec.heads(5), (12, 4), r"dimension 0 of \[12, 4\] must be a multiple of 5 heads"),
        (UnitSpec.columns(3, 4), (5, 6), "columns 3 to 7 need a matrix with as many"),
        (UnitSpec.columns(0, 2), (5, 6, 7), "need a matrix"),
    ],
)
def test_cuts_that_do_not_fit_a_shape_are_named(spec, shape, message):
    with pytest.raises(ValueError, match=message):
        spec.check(shape)


G = torch.randn(4, 3)
SCALE = torch.ones(4, **F64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.unit_energy_foreach([], []), "requires a non-empty list of Tensors"),
        (lambda: ops.unit_energy_foreach([G], [1, 4, 1]), "specs must have 9 numbers for each tensor, got 3"),
        (lambda: ops.unit_energy_foreach([G], [1] * 18), "specs must describe each of the grads, 1, got 2"),
        (lambda: ops.unit_energy_foreach([G], [1, -4, 1, 3, 0, 3, 0, 1, 0]), "specs must not be negative, got -4"),
        (lambda: ops.unit_energy_foreach([G], [1, 5, 1, 3, 0, 3, 0, 1, 0]), r"specs\[0\] must stay within its tensor"),
        (lambda: ops.unit_energy_foreach([G], [1, 4, 1, 3, 0, 3, 0, 1, 1]), r"specs\[0\] must stay within its tensor"),
        (lambda: ops.unit_energy_foreach([G], [1, 5, 1, 1, 0, 2**62, 0, 0, 0]), r"specs\[0\] must stay within"),
        (lambda: ops.unit_energy_foreach([G], [1, 2, 1, 1, 0, 1, 0, 0, 2**63 - 1]), r"specs\[0\] must stay within"),
        (lambda: ops.unit_energy_foreach([G], [2**32, 2**32, 0, 1, 0, 0, 0, 0, 0]), r"less than 2\^63 units"),
        (lambda: ops.unit_energy_foreach([G], [1, 1, 2**32, 2**32] + [0] * 5), "specs must not name an element twice"),
        (lambda: ops.unit_energy_foreach([G], [1, 2**50, 1, 1] + [0] * 5), "specs must not name an element twice"),
        (
            lambda: ops.scale_units_foreach_([G], [1, 1, 2**32, 2**32] + [0] * 5, SCALE[:1]),
            "specs must not name an element twice",
        ),
        (lambda: ops.unit_energy_foreach([G.int()], []), "grads must be float32, bfloat16, float16 or float64"),
        (lambda: ops.unit_energy_foreach([G.T], []), r"grads\[0\] must be contiguous where specs are empty"),
        (lambda: ops.unit_energy_foreach([G.sum()], []), r"grads\[0\] must have a dimension where specs are empty"),
        (
            lambda: ops.unit_energy_foreach([G], [], None, "fisher"),
            "importance must be gn, sqrt_gn or gn_wn, got fisher",
        ),
        (lambda: ops.unit_energy_foreach([G], [], None, "gn_wn"), "weights must be given if, and only if"),
        (lambda: ops.unit_energy_foreach([G], [], [G]), "weights must be given if, and only if"),
        (lambda: ops.unit_energy_foreach([G], [], [G.T], "gn_wn"), r"weights\[0\] must have sizes and strides"),
        (lambda: ops.unit_energy_foreach([G], [], [G.double()], "gn_wn"), r"weights\[0\] must be float32"),
        (lambda: ops.scale_units_foreach_([G], [], SCALE[:3]), r"scale must be \[U\] = \[4\], got \[3\]"),
        (lambda: ops.scale_units_foreach_([G], [], SCALE.float()), "scale must be float64, got float32"),
        (lambda: ops.scale_units_foreach_([G], [], SCALE, torch.tensor([1])), "skip must be bool, got int64"),
        (lambda: ops.scale_units_foreach_([G], [], SCALE, None, [G, G]), "bases must have one tensor for each"),
        (
            lambda: ops.scale_units_foreach_([G], [1, 4, 1, 3, 0, 1, 0, 1, 0], SCALE),
            "specs must not name an element twice",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    before = G.clone()
    with pytest.raises(RuntimeError, match=message):
        call()
    assert torch.equal(G, before)


def test_the_package_offers_the_cuts():
    assert mmbal.UnitSpec is UnitSpec
