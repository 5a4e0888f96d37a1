"""Sampling without replacement: the laws, against enumeration, bisection and a plain oracle with the same words.

Letters: S rows, N weights, U units.
"""

import itertools
import math

import numpy as np
import pytest
import torch
from scipy import stats

import mmbal  # noqa: F401  (loads the operators)
from mmbal import _core

ops = torch.ops.mmbal
W = [1.0, 2.0, 3.0, 5.0, 8.0, 13.0]
SUBSETS = list(itertools.combinations(range(6), 3))
F64 = {"dtype": torch.float64}


def subset_probabilities():
    """Of drawing three of W one by one, each with probability proportional to what is left."""

    def of_order(order):
        p, left = 1.0, sum(W)
        for i in order:
            p, left = p * W[i] / left, left - W[i]
        return p

    return np.array([sum(map(of_order, itertools.permutations(subset))) for subset in SUBSETS])


def words(seed, step, units, id=0, purpose=0):
    """The random word of each unit, as include/mmbal/sampling.h counts them."""
    key = [seed & 0xFFFFFFFF, (seed >> 32) & 0xFFFFFFFF]
    blocks = {}
    for unit in units:
        block = unit // 4
        high = (block >> 32) | purpose << 12 | (step >> 32) << 16
        counter = [block & 0xFFFFFFFF, high, id, step & 0xFFFFFFFF]
        blocks[block] = blocks.get(block) or _core.philox4x32(counter, key)
    return np.array([blocks[unit // 4][unit % 4] for unit in units], dtype=np.float64)


def keys(w, seed, step, first=0, id=0):
    w = np.asarray(w, dtype=np.float64)
    e = -np.log1p(-(words(seed, step, range(first, first + len(w)), id) + 0.5) * 2.0**-32)
    with np.errstate(divide="ignore"):
        return np.where(w > 0, e / w, np.inf)


def smallest(keys, k):
    mask = np.zeros(len(keys), dtype=bool)
    mask[np.argsort(keys, kind="stable")[: min(k, np.isfinite(keys).sum())]] = True
    return mask


# --- weighted_sample --------------------------------------------------------------------------------------------------


def test_subsets_are_drawn_with_the_probabilities_of_successive_sampling():
    draws = 40000
    w = torch.tensor(W).repeat(draws, 1)
    mask = ops.weighted_sample(w, torch.full((draws,), 3), 11, 0)
    found = (mask.long() * 2 ** torch.arange(6)).sum(1)
    counts = np.array([(found == sum(2**i for i in subset)).sum().item() for subset in SUBSETS])
    expected = draws * subset_probabilities()
    assert counts.sum() == draws
    assert ((counts - expected) ** 2 / expected).sum() < 50.80  # chi-square, 19 degrees of freedom, alpha 1e-4


def test_steps_are_independent_draws():
    masks = [ops.weighted_sample(torch.tensor([W]), torch.tensor([3]), 5, step)[0] for step in range(4000)]
    counts = torch.stack(masks).sum(0).numpy()
    inclusion = [sum(p for s, p in zip(SUBSETS, subset_probabilities(), strict=True) if i in s) for i in range(6)]
    assert inclusion == pytest.approx([0.138116, 0.266473, 0.383836, 0.579785, 0.751533, 0.880258], abs=1e-6)
    for count, p in zip(counts, inclusion, strict=True):
        assert stats.binomtest(int(count), 4000, p).pvalue > 1e-4


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize(("S", "N"), [(1, 1), (3, 7), (5, 300), (2, 5000)])
def test_masks_are_those_of_a_sort_of_keys_made_from_the_same_words(dtype, S, N):
    w = torch.rand(S, N).to(dtype)
    w[torch.rand(S, N) < 0.2] = 0
    k = torch.randint(0, N + 1, (S,))
    mask = ops.weighted_sample(w, k, -7, 2**40 + 3)
    for s in range(S):
        expected = smallest(keys(w[s].double().numpy(), -7, 2**40 + 3, s * N), int(k[s]))
        assert mask[s].numpy().tolist() == expected.tolist()


def test_zero_weights_are_never_drawn_and_equal_keys_go_to_the_lower_place():
    w = torch.tensor([[0.0, 1.0, 0.0, 2.0]])
    assert ops.weighted_sample(w, torch.tensor([4]), 0, 0).tolist() == [[False, True, False, True]]
    tied = torch.full((1, 6), 5e-324, **F64)  # every key is infinite
    assert ops.weighted_sample(tied, torch.tensor([2]), 0, 0)[0].tolist() == [True, True, False, False, False, False]


def test_more_categories_than_multinomial_takes():
    N = 2**24 + 5
    mask = ops.weighted_sample(torch.ones(1, N), torch.tensor([1000]), 1, 1)
    assert mask.sum().item() == 1000
    assert mask[0, : N // 2].sum().item() == pytest.approx(500, abs=80)


# --- waterfill --------------------------------------------------------------------------------------------------------


def bisected(q, kappa):
    """c of sum(min(1, c q)) = kappa."""
    low, high = 0.0, 1e300
    for _ in range(4000):
        middle = math.sqrt(low * high) if low > 0 else min(high / 2, 1.0) if high > 1 else high / 2
        low, high = (middle, high) if np.minimum(1, middle * q).sum() < kappa else (low, middle)
        if high <= low * (1 + 1e-15):
            break
    return high


def test_waterfill_has_the_golden_value():
    p, c = ops.waterfill(torch.tensor([W], **F64), torch.tensor([3.0]), 0.0)
    assert (p * 19).tolist() == [pytest.approx([2, 4, 6, 10, 16, 19], rel=1e-14)]
    assert c.item() == pytest.approx(2 / 19 * 32)  # q is w / 32


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9, 1.0])
@pytest.mark.parametrize("law", ["uniform", "lognormal", "geometric", "wide"])
def test_waterfill_is_capped_and_proportional_and_sums_to_kappa(law, share, lam):
    N = 200
    generator = np.random.default_rng(3)
    w = {
        "uniform": np.ones(N),
        "lognormal": generator.lognormal(0, 2, N),
        "geometric": 0.5 ** np.arange(N),
        "wide": 10.0 ** generator.uniform(-30, 30, N),
    }[law]
    kappa = share * N
    (p,), c = (t.numpy() for t in ops.waterfill(torch.tensor(w)[None], torch.tensor([kappa], **F64), lam))
    q = (1 - lam) * w / w.sum() + lam / N
    assert p.sum() == pytest.approx(kappa, rel=1e-12)
    assert (p <= 1).all() and (p >= 0).all()
    if share < 1:
        assert c[0] == pytest.approx(bisected(q, kappa), rel=1e-9)
        assert p == pytest.approx(np.minimum(1, c[0] * q), rel=1e-12)


def test_waterfill_of_nothing_and_of_everything():
    p, c = ops.waterfill(torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([0.0, 1.0]), 0.0)
    assert p.tolist() == [[0, 0], [1, 0]]
    assert c.tolist() == [0, math.inf]
    assert ops.waterfill(torch.zeros(1, 4), torch.tensor([1.0]), 0.5)[0].tolist() == [[0.25] * 4]


# --- mask_units -------------------------------------------------------------------------------------------------------


def mask(energy, rho=0.5, sampler="bottomk", lam=0.5, unbiased=False, seed=3, step=0, groups=1, id=0):
    energy = torch.as_tensor(energy, **F64).flatten()
    segments = [groups, len(energy) // groups, 0, id]
    return ops.mask_units(energy, segments, torch.tensor([rho], **F64), seed, step, sampler, lam, unbiased)


def test_bottomk_of_energies_is_weighted_sample():
    energy = torch.rand(6, 40, **F64)
    scale, _ = mask(energy, 0.3, groups=6, seed=9, step=4)
    assert torch.equal(scale.reshape(6, 40) == 1, ops.weighted_sample(energy, torch.full((6,), 12), 9, 4))


@pytest.mark.parametrize(("rho", "kept"), [(0.1, 1), (0.5, 5), (0.9, 9)])
@pytest.mark.parametrize("scale_of", [1, 2, 32])
def test_a_ratio_rounded_to_float32_keeps_no_unit_more(rho, kept, scale_of):
    rounded = torch.tensor(rho).double().item()
    scale, _ = mask(torch.rand(10 * scale_of, **F64) + 0.1, rounded)
    assert scale.sum().item() == kept * scale_of


def test_the_number_kept_is_rounded_up_and_at_least_one():
    assert mask(torch.rand(7, **F64) + 1, 0.3)[0].sum() == 3
    assert mask(torch.rand(7, **F64) + 1, 0.01)[0].sum() == 1
    assert mask(torch.rand(7, **F64) + 1, 0.0)[0].sum() == 0
    assert mask([0, 0, 3.0, 0], 0.75)[0].tolist() == [0, 0, 1, 0]


@pytest.mark.parametrize("sampler", ["bottomk", "systematic", "independent", "uniform"])
@pytest.mark.parametrize("importance", ["lognormal", "equal"])
def test_multipliers_are_one_on_average(sampler, importance):
    N, draws = 12, 20000
    energy = np.random.default_rng(1).lognormal(0, 1, N) if importance == "lognormal" else np.ones(N)
    groups = 500
    means, squares = np.zeros(N), np.zeros(N)
    for step in range(draws // groups):
        scale, _ = mask(np.tile(energy, groups), 0.3, sampler, unbiased=True, step=step, groups=groups)
        s = scale.reshape(groups, N).numpy()
        means, squares = means + s.sum(0), squares + (s**2).sum(0)
    mean = means / draws
    error = np.sqrt((squares / draws - mean**2) / draws)
    assert (np.abs(mean - 1) < 4.5 * error + 1e-12).all()  # a chance of 1e-4 that one of 12 lies outside


@pytest.mark.parametrize("sampler", ["systematic", "independent"])
def test_multipliers_are_bounded_and_the_inverse_of_the_probabilities(sampler):
    energy = 10.0 ** np.random.default_rng(2).uniform(-20, 20, 400)
    scale, probability = mask(energy, 0.1, sampler, 0.5, True)
    kept = scale > 0
    assert torch.equal(scale[kept], 1 / probability[kept])
    assert scale.max() <= 1 / (0.5 * 0.1) * (1 + 1e-6)
    p, _ = ops.waterfill(torch.tensor(energy)[None], torch.tensor([40.0]), 0.5)
    assert (probability - p[0]).abs().max() < 1e-6


@pytest.mark.parametrize(("N", "rho"), [(12, 0.3), (64, 0.5), (64, 0.1), (500, 0.123)])
def test_systematic_draws_keep_the_ratio_rounded_down_or_up(N, rho):
    energy = np.random.default_rng(4).lognormal(0, 2, N)
    counts = set()
    for step in range(300):
        scale, probability = mask(energy, rho, "systematic", step=step)
        assert (probability * 2**32).sum().item() == round(rho * N * 2**32)
        counts.add(int(scale.sum()))
    whole = rho * N
    assert counts <= {math.floor(whole), math.ceil(whole)}
    assert len(counts) == 1 + (abs(whole - round(whole)) > 0.05)


def test_systematic_draws_take_every_pair_of_units():
    pairs = {
        tuple(mask(np.ones(6), 1 / 3, "systematic", step=step)[0].nonzero().flatten().tolist()) for step in range(400)
    }
    assert pairs == set(itertools.combinations(range(6), 2))


def test_independent_draws_are_the_words_below_the_probabilities():
    energy = np.random.default_rng(5).lognormal(0, 1, 50)
    scale, probability = mask(energy, 0.4, "independent", seed=8, step=2, id=6)
    assert (scale.numpy() == 1).tolist() == (words(8, 2, range(50), id=6) < probability.numpy() * 2**32).tolist()


def test_topk_keeps_the_largest_and_uniform_asks_for_no_energy():
    energy = torch.rand(40, **F64)
    scale, probability = mask(energy, 0.25, "topk")
    assert set(scale.nonzero().flatten().tolist()) == set(energy.topk(10).indices.tolist())
    assert torch.equal(scale, probability)
    one, p = mask(energy, 0.25, "uniform")
    other, _ = mask(1 - energy, 0.25, "uniform")
    assert torch.equal(one, other) and one.sum() == 10 and (p == 0.25).all()


def test_masks_depend_on_seed_step_id_and_on_nothing_else():
    energy = torch.rand(200, **F64)
    base = mask(energy, seed=1, step=1, id=1)[0]
    assert torch.equal(base, mask(7 * energy, seed=1, step=1, id=1)[0])
    torch.manual_seed(99)
    assert torch.equal(base, mask(energy, seed=1, step=1, id=1)[0])
    for other in ({"seed": 2}, {"step": 2}, {"id": 2}, {"step": 1 + 2**32}, {"seed": 1 + 2**32}):
        assert not torch.equal(base, mask(energy, **({"seed": 1, "step": 1, "id": 1} | other))[0])


@pytest.mark.parametrize("sampler", ["bottomk", "systematic", "independent", "uniform"])
def test_nothing_is_masked_at_ratio_one_without_energy_or_with_a_bad_one(sampler):
    for energy, rho in ((torch.rand(9), 1.0), (torch.zeros(9), 0.5), (torch.tensor([1.0, math.nan]), 0.5)):
        scale, probability = mask(energy, rho, sampler, unbiased=True)
        assert (scale == 1).all() and (probability == 1).all()
    scale, _ = mask(torch.tensor([1.0, math.inf, 1.0]), 0.5, sampler)
    assert (scale == 1).all()


def test_segments_take_the_ratio_of_their_modality_and_their_own_words():
    energy = torch.rand(110, **F64)
    rho = torch.tensor([0.1, 0.9], **F64)
    scale, _ = ops.mask_units(energy, [1, 50, 1, 7, 2, 30, 0, 3], rho, 5, 6)
    assert scale[:50].sum() == 45 and scale[50:80].sum() == 3 and scale[80:].sum() == 3
    assert torch.equal(scale[:50], mask(energy[:50], 0.9, seed=5, step=6, id=7)[0])
    assert torch.equal(scale[50:], mask(energy[50:], 0.1, seed=5, step=6, id=3, groups=2)[0])


@pytest.mark.parametrize("sampler", ["bottomk", "systematic", "independent", "topk", "uniform"])
def test_masks_are_bitwise_the_same_at_any_number_of_threads(sampler, at_each_thread_count, poisoned_memory):
    energy = torch.rand(20 * 700, **F64)
    at_each_thread_count(lambda: mask(energy, 0.3, sampler, groups=20))


# --- As torch sees them -----------------------------------------------------------------------------------------------


def test_operators_pass_opcheck():
    w, k = torch.rand(3, 8), torch.tensor([1, 2, 3])
    torch.library.opcheck(ops.weighted_sample, (w, k, 0, 0))
    torch.library.opcheck(ops.waterfill, (w, k.float(), 0.5))
    torch.library.opcheck(ops.mask_units, (torch.rand(8, **F64), [2, 4, 0, 0], torch.tensor([0.5], **F64), 0, 0))


def test_empty_and_strided_arguments_are_served():
    assert ops.weighted_sample(torch.rand(0, 5), torch.zeros(0, dtype=torch.int64), 0, 0).shape == (0, 5)
    assert ops.weighted_sample(torch.rand(2, 0), torch.zeros(2, dtype=torch.int64), 0, 0).shape == (2, 0)
    assert ops.waterfill(torch.rand(2, 0), torch.zeros(2), 0.5)[0].shape == (2, 0)
    assert mask(torch.zeros(0))[0].shape == (0,)
    w = torch.rand(9, 4)
    k = torch.tensor([3, 0] * 4)[::2]
    assert torch.equal(ops.weighted_sample(w.T, k, 1, 1), ops.weighted_sample(w.T.contiguous(), k.clone(), 1, 1))


ENERGY, RHO = torch.rand(8, **F64), torch.tensor([0.5], **F64)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.weighted_sample(torch.rand(3), torch.tensor([1]), 0, 0), r"w must be \[S, N\]"),
        (lambda: ops.weighted_sample(torch.rand(1, 3).half(), torch.tensor([1]), 0, 0), "w must be float32 or float64"),
        (lambda: ops.weighted_sample(torch.rand(1, 3), torch.tensor([1.0]), 0, 0), "k must be int64, got float32"),
        (lambda: ops.weighted_sample(torch.rand(1, 3), torch.tensor([1, 2]), 0, 0), r"k must be \[S\] = \[1\]"),
        (lambda: ops.weighted_sample(torch.rand(1, 3), torch.tensor([4]), 0, 0), "k must be from 0 to N = 3, got 4"),
        (lambda: ops.weighted_sample(torch.rand(1, 3), torch.tensor([1]), 0, -1), "step must be from 0 to 2^48"),
        (lambda: ops.weighted_sample(-torch.ones(1, 3), torch.tensor([1]), 0, 0), "w must be finite and not negative"),
        (lambda: ops.waterfill(torch.full((1, 3), math.nan), torch.tensor([1.0]), 0.5), "w must be finite"),
        (lambda: ops.waterfill(torch.rand(1, 3), torch.tensor([4.0]), 0.5), "kappa from 0 to the number of weights"),
        (
            lambda: ops.waterfill(torch.tensor([[1.0, 0.0]]), torch.tensor([2.0]), 0.0),
            "without the zeros where lam = 0",
        ),
        (lambda: ops.waterfill(torch.rand(1, 3), torch.tensor([1.0]), 1.5), "lam must be from 0 to 1, got 1.5"),
        (lambda: ops.mask_units(ENERGY, [1, 8, 0], RHO, 0, 0), "segments must have 4 numbers for each tensor"),
        (lambda: ops.mask_units(ENERGY, [1, 9, 0, 0], RHO, 0, 0), r"energy must be \[U\] = \[9\], got \[8\]"),
        (lambda: ops.mask_units(ENERGY.float(), [1, 8, 0, 0], RHO, 0, 0), "energy must be float64, got float32"),
        (lambda: ops.mask_units(ENERGY, [1, 8, 1, 0], RHO, 0, 0), "modality must be from 0 to M - 1 = 0, got 1"),
        (lambda: ops.mask_units(ENERGY, [1, 8, 0, -1], RHO, 0, 0), "id must be from 0 to 2^32 - 1, got -1"),
        (lambda: ops.mask_units(ENERGY, [1, -8, 0, 0], RHO, 0, 0), "groups and units of at least 0"),
        (
            lambda: ops.mask_units(ENERGY, [1, 8, 0, 0], 3 * RHO, 0, 0),
            "rho must be from 0 to 1, got 1.5 for modality 0",
        ),
        (lambda: mask(ENERGY, 0.0, unbiased=True), "rho must be greater than 0 where unbiased, got 0"),
        (lambda: mask(ENERGY, sampler="best"), "sampler must be bottomk, systematic, independent, topk or uniform"),
        (lambda: mask(ENERGY, sampler="topk", unbiased=True), "topk has no unbiased form"),
        (lambda: mask(ENERGY, lam=-0.1), "lam must be from 0 to 1, got -0.1"),
        (lambda: mask(ENERGY, step=2**48), "step must be from 0 to 2^48"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(RuntimeError, match=message.replace("2^", r"2\^")):
        call()
