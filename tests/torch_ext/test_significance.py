"""Statistics of modalities and the update ratios that AMSS makes of them, against numpy and scipy in float64."""

import math

import numpy as np
import pytest
import torch
from scipy.special import log_softmax, softmax
from scipy.stats import entropy

import mmbal  # noqa: F401  (loads the operators)

ops = torch.ops.mmbal
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def batch(M=3, B=20, C=5, dims=(7, 1, 40), dtype=torch.float64):
    logits = [(2 * torch.randn(B, C)).to(dtype) for _ in range(M)]
    features = [(3 * torch.randn(B, dims[m])).to(dtype) for m in range(M)]
    return logits, features, torch.randint(0, C, (B,))


def plain_stats(logits, features, y, ignore_index=-100):
    kept = (y != ignore_index).numpy()
    labels = y.numpy()[kept]
    ce, ent = [], []
    for o, z in zip(logits, features, strict=True):
        ce.append(-log_softmax(o.double().numpy()[kept], 1)[np.arange(len(labels)), labels].sum())
        ent.append(entropy(softmax(z.double().numpy()[kept], 1), axis=1).sum())
    return ce, ent, np.bincount(labels, minlength=logits[0].shape[1]), kept.sum()


def plain_ratio(ce, ent, histogram, rows, dims, tau, offset=0.5, lo=0.1, hi=0.9, mode="rate", bias=0.0):
    r = []
    for c, h, D in zip(ce, ent, dims, strict=True):
        information = max(entropy(histogram / rows) - c / rows + offset, 0)
        share = 1.0 if D == 1 else max(h / rows / math.log(D), 0.05)
        scale = {"rate": 1 / share, "mi": 1, "rate_unnormalised": 1 / share / (math.log(D) if D > 1 else 1)}[mode]
        r.append(information * scale)
    return r, np.clip(1 - softmax(np.array(r) / tau) + bias, lo, hi)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ignored", [False, True])
def test_stats_are_cross_entropies_and_entropies_of_softmax(dtype, ignored):
    logits, features, y = batch(dtype=dtype)
    if ignored:
        y[::3] = -100
    ce, ent, histogram, rows = ops.modal_stats(logits, features, y)
    expected = plain_stats(logits, features, y)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-6
    for got, want in zip((ce, ent, histogram, rows), expected, strict=True):
        assert got.dtype == torch.float64
        assert np.abs(got.numpy() - want).max() <= tolerance * (1 + np.abs(want).max())


def test_uniform_logits_cost_ln_c_right_ones_nothing_and_constant_features_have_full_entropy():
    y = torch.arange(8) % 4
    right = 100.0 * torch.nn.functional.one_hot(y, 4)
    ce, ent, _, rows = ops.modal_stats([torch.zeros(8, 4), right], [torch.ones(8, 9), torch.zeros(8, 9)], y)
    assert (ce / rows).tolist() == pytest.approx([math.log(4), 0], abs=1e-6)
    assert (ent / rows).tolist() == pytest.approx([math.log(9)] * 2, rel=1e-6)


def test_logits_far_from_zero_neither_over_nor_underflow():
    o = torch.tensor([[1e4, 0.0, -1e4]])
    ce, ent, _, _ = ops.modal_stats([o, o], [o, 1e4 + torch.zeros(1, 3)], torch.tensor([1]))
    assert ce.tolist() == [1e4, 1e4]
    assert ent.tolist() == pytest.approx([0, math.log(3)], abs=1e-6)


def test_stats_add_over_batches():
    logits, features, y = batch()
    whole = ops.modal_stats(logits, features, y)
    halves = [
        ops.modal_stats([o[part] for o in logits], [z[part] for z in features], y[part])
        for part in (slice(0, 9), slice(9, None))
    ]
    for together, first, second in zip(whole, *halves, strict=True):
        assert torch.allclose(together, first + second, rtol=1e-14, atol=0)


@pytest.mark.parametrize("mode", ["rate", "rate_unnormalised", "mi"])
@pytest.mark.parametrize("bias", [0.0, 0.2])
def test_ratio_is_one_minus_the_softmax_of_the_rates(mode, bias):
    logits, features, y = batch()
    sums = ops.modal_stats(logits, features, y)
    rate, rho = ops.update_ratio(*sums, [7, 1, 40], 0.7, 2.5, 0.15, 0.8, mode, bias)
    r, expected = plain_ratio(*plain_stats(logits, features, y), [7, 1, 40], 0.7, 2.5, 0.15, 0.8, mode, bias)
    assert rate.tolist() == pytest.approx(r, rel=1e-12)
    assert rho.tolist() == pytest.approx(expected.tolist(), rel=1e-12)


def sums_of(ce, labels=31, entropies=None, rows=100.0):
    """As modal_stats would give them for uniform labels; ce in nats a row."""
    f64 = torch.float64
    entropies = [1.0] * len(ce) if entropies is None else entropies
    return (
        rows * torch.tensor(ce, dtype=f64),
        rows * torch.tensor(entropies, dtype=f64),
        torch.full((labels,), rows / labels, dtype=f64),
        torch.tensor([rows], dtype=f64),
    )


@pytest.mark.parametrize(
    ("ce", "expected"), [((3.4, 3.4), 0.50), ((2.0, 3.2), 0.27), ((1.0, 2.5), 0.22), ((0.2, 2.0), 0.18)]
)
def test_golden_values_of_the_audio_video_formula(ce, expected):
    _, rho = ops.update_ratio(*sums_of(ce, 31, [6.0, 6.0]), [512, 512], 0.2, 0.5, mode="rate_unnormalised")
    assert rho.tolist() == pytest.approx([expected, 1 - expected], abs=0.006)


@pytest.mark.parametrize(("ce", "expected"), [((0.6, 0.69), 0.46), ((0.3, 0.65), 0.33), ((0.1, 0.6), 0.27)])
def test_golden_values_of_the_image_text_formula(ce, expected):
    _, rho = ops.update_ratio(*sums_of(ce, 2), [256, 256], 0.5, 0.0, mode="mi")
    assert rho.tolist() == pytest.approx([expected, 1 - expected], abs=0.006)


def test_the_weaker_a_modality_the_more_of_it_is_updated_in_any_order():
    _, rho = ops.update_ratio(*sums_of([0.5, 1.5, 2.5]), [9, 9, 9], 5.0)
    assert rho[0] < rho[1] < rho[2]
    assert rho.sum().item() == pytest.approx(2)  # M - 1 where none is at a bound
    _, turned = ops.update_ratio(*sums_of([2.5, 0.5, 1.5]), [9, 9, 9], 5.0)
    assert turned.tolist() == pytest.approx(rho[[2, 0, 1]].tolist())


def test_one_modality_is_updated_whole():
    assert ops.update_ratio(*sums_of([1.0]), [9], 1.0)[1].tolist() == [1]


def test_what_says_less_than_nothing_counts_as_nothing_and_officially_stops_the_rebalancing():
    sums = sums_of([1.0, 9.0], 4)
    rate, rho = ops.update_ratio(*sums, [9, 9], 1.0, offset=0.0)
    assert rate[1] == 0 and rho[0] < 0.5 < rho[1]
    assert ops.update_ratio(*sums, [9, 9], 1.0, offset=0.0, guard="official")[1].tolist() == [0.5, 0.5]


@pytest.mark.parametrize("ce", [math.nan, math.inf])
def test_what_is_not_finite_falls_back_to_equal_ratios(ce):
    rate, rho = ops.update_ratio(*sums_of([1.0, ce, 1.0]), [9, 9, 9], 1.0)
    if math.isnan(ce):
        assert rho.tolist() == pytest.approx([2 / 3] * 3)
    else:
        assert rate[1] == 0  # infinitely wrong says nothing


def test_without_rows_the_ratios_are_equal():
    logits, features, _ = batch(B=0)
    sums = ops.modal_stats(logits, features, torch.zeros(0, dtype=torch.int64))
    assert sums[3].item() == 0
    assert ops.update_ratio(*sums, [7, 1, 40], 1.0)[1].tolist() == pytest.approx([2 / 3] * 3)


def test_ratios_of_given_rates_are_those_of_the_same_rates():
    logits, features, y = batch()
    rate, rho = ops.update_ratio(*ops.modal_stats(logits, features, y), [7, 1, 40], 0.7, 2.0)
    assert torch.equal(ops.ratio_of_rates(rate, 0.7), rho)
    extreme = ops.ratio_of_rates(torch.tensor([1e300, 0.0], dtype=torch.float64), 1e-3)
    assert extreme.tolist() == [0.1, 0.9]


def test_results_are_bitwise_the_same_at_any_number_of_threads(at_each_thread_count):
    logits, features, y = batch(B=3000, dims=(700, 3, 40), dtype=torch.float32)
    at_each_thread_count(lambda: ops.modal_stats(logits, features, y))


def test_every_other_sample_of_a_larger_batch_counts_like_a_copy(poisoned_memory):
    logits, features, y = batch(B=40)
    thin = [[t[::2] for t in logits], [t[::2] for t in features], y[::2]]
    copy = [[t[::2].clone() for t in logits], [t[::2].clone() for t in features], y[::2].clone()]
    for a, b in zip(ops.modal_stats(*thin), ops.modal_stats(*copy), strict=True):
        assert torch.equal(a, b) and a.isfinite().all()


def test_operators_pass_opcheck():
    logits, features, y = batch()
    torch.library.opcheck(ops.modal_stats, (logits, features, y))
    sums = ops.modal_stats(logits, features, y)
    torch.library.opcheck(ops.update_ratio, (*sums, [7, 1, 40], 0.7))
    torch.library.opcheck(ops.ratio_of_rates, (sums[0], 0.7))


LOGITS, FEATURES, Y = batch(2)
SUMS = ops.modal_stats(LOGITS, FEATURES, Y)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: ops.modal_stats([], [], Y), "logits must have from 1 to 256 modalities, got 0"),
        (lambda: ops.modal_stats(LOGITS, FEATURES[:1], Y), "features must have one tensor for each of the logits, 2"),
        (lambda: ops.modal_stats(LOGITS, FEATURES, Y.float()), "targets must be int64, got float32"),
        (lambda: ops.modal_stats(LOGITS, FEATURES, Y[:5]), r"logits\[0\] must be \[B, C\] = \[5, \*\], got \[20, 5\]"),
        (
            lambda: ops.modal_stats([LOGITS[0], LOGITS[1][:, :3]], FEATURES, Y),
            r"logits\[1\] must be \[B, C\]",
        ),
        (lambda: ops.modal_stats(LOGITS, [FEATURES[0], FEATURES[1][:4]], Y), r"features\[1\] must be \[B, D\] = \[20"),
        (lambda: ops.modal_stats([t.int() for t in LOGITS], FEATURES, Y), r"logits\[0\] must be float32, bfloat16"),
        (
            lambda: ops.modal_stats(LOGITS, FEATURES, Y + 3),
            "targets must be from 0 to C - 1 = 4 or ignore_index",
        ),
        (lambda: ops.update_ratio(*SUMS, [7], 1.0), r"ce_sum must be \[M\] = \[1\], got \[2\]"),
        (lambda: ops.update_ratio(*SUMS, [7, 0], 1.0), "dims must be at least 1 each, got 0"),
        (lambda: ops.update_ratio(SUMS[0].float(), *SUMS[1:], [7, 1], 1.0), "ce_sum must be float64, got float32"),
        (lambda: ops.update_ratio(*SUMS, [7, 1], 0.0), "tau must be finite and greater than 0, got 0"),
        (lambda: ops.update_ratio(*SUMS, [7, 1], 1.0, math.nan), "offset must be finite, got nan"),
        (lambda: ops.update_ratio(*SUMS, [7, 1], 1.0, lo=0.5, hi=0.4), "0 <= lo <= hi <= 1, got 0.5 and 0.4"),
        (lambda: ops.update_ratio(*SUMS, [7, 1], 1.0, mode="bits"), "mode must be rate, rate_unnormalised or mi"),
        (lambda: ops.update_ratio(*SUMS, [7, 1], 1.0, guard="no"), "guard must be clamp or official, got no"),
        (lambda: ops.update_ratio(*SUMS, [7, 1], 1.0, least_entropy=0.0), "least_entropy must be finite and greater"),
        (lambda: ops.update_ratio(*SUMS, [7, 1], 1.0, bias=math.inf), "bias must be finite, got inf"),
        (lambda: ops.ratio_of_rates(SUMS[0].float(), 1.0), "rate must be float64, got float32"),
    ],
)
def test_bad_arguments_are_named(call, message):
    with pytest.raises(RuntimeError, match=message):
        call()
