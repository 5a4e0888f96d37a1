"""Masks of single elements: the same laws as for units, without a buffer for each element."""

import math

import numpy as np
import pytest
import torch

import mmbal  # noqa: F401  (loads the operators)
from test_sampling import words

ops = torch.ops.mmbal
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
F64 = {"dtype": torch.float64}


def masked(
    grads, rho=0.3, sampler="bottomk", unbiased=False, lam=0.5, importance="gn", seed=3, step=5, ids=None, **more
):
    out = [g.clone() for g in grads]
    ids = list(range(len(grads))) if ids is None else ids
    ops.mask_elements_foreach_(
        out, [0] * len(out), ids, torch.tensor([rho], **F64), seed, step, sampler, lam, unbiased, importance, **more
    )
    return out


def gradient(shape=(300, 70), dtype=torch.float32, zeros=0.1):
    g = torch.randn(shape) * torch.exp(torch.randn(shape))
    g[torch.rand(shape) < zeros] = 0
    return g.to(dtype)


def kept_of(g, out):
    return (out != 0).flatten().numpy() | (g == 0).flatten().numpy()


def importance_of(g, importance="gn", w=None):
    g = g.double().flatten().numpy()
    if importance == "sqrt_gn":
        return np.abs(g)
    return g**2 if importance == "gn" else g**2 / (w.double().flatten().numpy() ** 2 + 2.0**-126)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("sampler", ["bottomk", "topk", "uniform"])
@pytest.mark.parametrize("rho", [0.001, 0.3, 0.8])
def test_as_many_elements_are_kept_as_asked_for_and_they_are_those_of_the_smallest_keys(dtype, sampler, rho):
    g = gradient(dtype=dtype, zeros=0)
    g[g == 0] = 1
    n = g.numel()
    k = math.ceil(rho * n - 1e-7 * n)
    (out,) = masked([g], rho, sampler)
    kept = (out != 0).flatten().numpy()
    assert kept.sum() == k
    assert torch.equal(out[out != 0], g[out != 0])
    e = -np.log1p(-(words(3, 5, range(n)) + 0.5) * 2.0**-32)
    key = {"bottomk": e / importance_of(g), "topk": 1 / importance_of(g), "uniform": e}[sampler]
    last = np.sort(key)[k - 1]
    clear = np.abs(key / last - 1) > 1e-5  # exponentials are float32, keys are compared by their upper bits
    assert (kept == (key <= last))[clear].all()


def test_ties_go_to_the_lower_element():
    (out,) = masked([torch.ones(1000)], 0.25, "topk")
    assert torch.equal(out, (torch.arange(1000) < 250).float())
    (out,) = masked([torch.ones(200_000)], 0.5, "topk")
    assert torch.equal(out, (torch.arange(200_000) < 100_000).float())


@pytest.mark.parametrize("importance", ["gn", "sqrt_gn", "gn_wn"])
@pytest.mark.parametrize("unbiased", [False, True])
def test_independent_masks_are_those_of_the_same_elements_as_units(importance, unbiased):
    g, w = gradient(), torch.randn(300, 70)
    weights = [w] if importance == "gn_wn" else None
    energy = torch.from_numpy(importance_of(g, importance, w).copy())
    segments = [1, g.numel(), 0, 9]
    scale, _ = ops.mask_units(energy, segments, torch.tensor([0.3], **F64), 3, 5, "independent", 0.5, unbiased)
    (out,) = masked([g], 0.3, "independent", unbiased, importance=importance, ids=[9], weights=weights)
    assert torch.allclose(out, g * scale.reshape(g.shape).float(), rtol=1e-6, atol=0)
    assert ((out != 0) == ((scale.reshape(g.shape) > 0) & (g != 0))).all()


@pytest.mark.parametrize(("sampler", "lam"), [("independent", 0.5), ("independent", 0.0), ("uniform", 0.5)])
def test_masked_gradients_are_the_gradient_on_average(sampler, lam):
    g = (0.5 + torch.rand(40, **F64)) * torch.randn(40).sign()  # none so rare that 4000 draws do not show it
    draws = 4000
    copies = [g] * draws
    out = torch.stack(masked(copies, 0.3, sampler, True, lam))
    error = out.std(0) / draws**0.5
    assert (
        (out.mean(0) - g).abs() <= 4.8 * error + 1e-9 * g.abs()
    ).all()  # a chance of 1e-4 that one of 40 lies outside


def test_independent_masks_keep_the_ratio_on_average_and_multipliers_are_bounded():
    g = gradient((200, 500), zeros=0)
    (out,) = masked([g], 0.1, "independent", True)
    assert (out != 0).double().mean().item() == pytest.approx(0.1, abs=4 * (0.09 / 1e5) ** 0.5)
    assert (out / g).max() <= 1 / (0.5 * 0.1) * (1 + 1e-6)


def test_fewer_elements_with_energy_than_asked_for_are_all_kept():
    g = torch.zeros(1000)
    g[::50] = torch.randn(20)
    for sampler in ("bottomk", "topk"):
        assert torch.equal(masked([g], 0.5, sampler)[0], g)
    assert torch.equal(masked([g], 0.5, "independent", lam=0.0)[0], g)


@pytest.mark.parametrize("value", [math.nan, -math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("sampler", ["bottomk", "independent", "topk", "uniform"])
def test_one_value_that_is_not_finite_leaves_every_tensor(value, sampler):
    grads = [gradient((50, 50)) for _ in range(3)]
    grads[2][7, 7] = value
    for before, after in zip(grads, masked(grads, 0.3, sampler), strict=True):
        assert torch.equal(before.view(torch.int32), after.view(torch.int32))


def test_ratio_one_zero_gradients_and_skip_leave_everything():
    g = gradient()
    assert torch.equal(masked([g], 1.0, "independent", True)[0], g)
    assert torch.equal(masked([torch.zeros(9)], 0.3)[0], torch.zeros(9))
    assert torch.equal(masked([g], 0.3, skip=torch.tensor([True]))[0], g)
    assert (masked([g], 0.0)[0] == 0).all()


def test_tiny_and_huge_gradients_are_drawn_like_others():
    g = gradient((2000,), zeros=0)
    base = masked([g])[0] != 0
    for factor in (2.0**-100, 2.0**100):  # squares beyond float32
        assert torch.equal(masked([g * factor])[0] != 0, base)


def test_masks_can_be_drawn_from_other_gradients_and_go_back_to_a_base():
    g, base, moved = gradient(zeros=0), torch.randn(300, 70), torch.randn(300, 70)
    kept = masked([g])[0] != 0
    (out,) = masked([moved], gradients=[g], bases=[base])
    assert torch.equal(out, torch.where(kept, moved, base))
    s = masked([g], 0.3, "independent", True)[0] / g
    (out,) = masked([moved], 0.3, "independent", True, gradients=[g], bases=[base])
    assert torch.allclose(out, base + s * (moved - base), rtol=1e-5, atol=1e-5)


def test_masks_do_not_depend_on_the_layout_of_dimensions_but_on_the_place_in_memory():
    g = gradient((6, 5, 4, 4), zeros=0)
    (flat,) = masked([g.flatten()])
    assert torch.equal(masked([g])[0].flatten(), flat)
    last = g.contiguous(memory_format=torch.channels_last)
    (out,) = masked([last])
    assert out.stride() == last.stride() and (out != 0).sum() == (flat != 0).sum()


def test_masks_depend_on_seed_step_and_id():
    g = gradient(zeros=0)
    base = masked([g], ids=[1])[0]
    assert torch.equal(base, masked([g], ids=[1])[0])
    for other in ({"seed": 4}, {"step": 6}, {"ids": [2]}, {"step": 5 + 2**32}, {"seed": 3 + 2**32}):
        assert not torch.equal(base, masked([g], **({"ids": [1]} | other))[0])


@pytest.mark.parametrize("sampler", ["bottomk", "independent", "topk", "uniform"])
def test_results_are_bitwise_the_same_at_any_number_of_threads(sampler, at_each_thread_count, poisoned_memory):
    grads = [gradient((400, 500)), gradient((333,), torch.bfloat16), gradient((70_001,), torch.float64)]
    at_each_thread_count(lambda: masked(grads, 0.3, sampler, sampler in ("independent", "uniform")))


def test_operator_passes_opcheck_and_bumps_versions():
    g = gradient((4, 5), zeros=0)
    rho = torch.tensor([0.5], **F64)
    torch.library.opcheck(ops.mask_elements_foreach_, ([g, g.clone()], [0, 0], [0, 1], rho, 0, 0))
    before = g._version
    ops.mask_elements_foreach_([g], [0], [0], rho, 0, 0)
    assert g._version == before + 1
    ops.mask_elements_foreach_([], [], [], rho, 0, 0)
    ops.mask_elements_foreach_([torch.zeros(0, 3)], [0], [0], rho, 0, 0)


G = torch.randn(4, 3)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: masked([G], sampler="systematic"), "sampler systematic is for units"),
        (lambda: masked([G], unbiased=True), "bottomk is not unbiased for elements"),
        (lambda: masked([G], sampler="topk", unbiased=True), "topk has no unbiased form"),
        (lambda: masked([G], sampler="best"), "sampler must be bottomk"),
        (lambda: masked([G], importance="fisher"), "importance must be gn, sqrt_gn or gn_wn"),
        (lambda: masked([G], importance="gn_wn"), "weights must be given if, and only if"),
        (lambda: masked([G], 1.5), "rho must be from 0 to 1, got 1.5"),
        (lambda: masked([G], lam=2.0), "lam must be from 0 to 1, got 2"),
        (lambda: masked([G], step=-1), "step must be from 0 to 2"),
        (lambda: masked([G], ids=[1, 2]), "modality and ids must have one entry for each of the grads, 1, got 1 and 2"),
        (lambda: masked([G], ids=[-1]), "id must be from 0 to 2"),
        (lambda: masked([G], gradients=[G.double()]), r"gradients\[0\] must be float32 as its gradient, got float64"),
        (lambda: masked([G], gradients=[G], bases=[G[:2]]), r"bases\[0\] must have sizes and strides of its gradient"),
        (lambda: masked([G], bases=[G]), "bases need gradients"),
        (lambda: masked([G.int()]), "grads must be float32, bfloat16, float16 or float64, got int32"),
        (
            lambda: ops.mask_elements_foreach_([torch.randn(4, 6)[:, ::2]], [0], [0], torch.ones(1, **F64), 0, 0),
            r"grads\[0\] must fill its memory without gaps",
        ),
        (
            lambda: ops.mask_elements_foreach_([G.clone()], [1], [0], torch.ones(1, **F64), 0, 0),
            "modality must be from 0 to M - 1 = 0, got 1",
        ),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
