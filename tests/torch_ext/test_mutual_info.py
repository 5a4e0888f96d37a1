import math

import numpy as np
import pytest
import scipy.special
import torch
from sklearn.feature_selection import mutual_info_regression
from sklearn.feature_selection._mutual_info import _compute_mi_cc  # without scaling and jitter
from sklearn.metrics import mutual_info_score

import mmbal  # noqa: F401  (loads the operators)

ksg, discrete = torch.ops.mmbal.ksg_mutual_info, torch.ops.mmbal.discrete_mutual_info


def dependent(N, M=3, dtype=torch.float64):
    y = torch.randn(N, dtype=torch.float64)
    x = torch.stack([y + torch.randn(N, dtype=torch.float64) * 3.0**m / 10 for m in range(M)], 1)
    return x.to(dtype), y.to(dtype)


def plain(x, y, k):
    """Every pair compared, in numpy."""
    x, y = x.double().numpy(), y.double().numpy()
    dx, dy = np.abs(x[:, None] - x), np.abs(y[:, None] - y)
    distance = np.maximum(dx, dy)
    np.fill_diagonal(distance, np.inf)
    eps = np.sort(distance, 1)[:, k - 1 : k]
    others = ~np.eye(len(x), dtype=bool)
    nx, ny = (((d < eps) | ((eps == 0) & (d == 0))) & others for d in (dx, dy))
    means = (scipy.special.digamma(n.sum(1) + 1).mean() for n in (nx, ny))
    return max(0.0, scipy.special.digamma(len(x)) + scipy.special.digamma(k) - sum(means))


@pytest.mark.parametrize("N", [20, 200, 3000])
@pytest.mark.parametrize("k", [1, 3, 7])
def test_ksg_equals_scikit_learn(N, k):
    x, y = dependent(N)
    expected = mutual_info_regression(x.numpy(), y.numpy(), n_neighbors=k, random_state=0)
    assert np.abs(ksg(x, y, None, k).numpy() - expected).max() <= 1e-12


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_ksg_equals_the_count_over_all_pairs_ties_and_all(dtype):
    x, y = dependent(300, dtype=dtype)
    mi = ksg(x, y, None, 3, False)
    assert mi.dtype == torch.float64
    for m in range(3):
        assert mi[m].item() == pytest.approx(plain(x[:, m], y, 3), abs=1e-12)


def test_ksg_golden_values():
    i = torch.arange(50, dtype=torch.float64)
    x, y = torch.sin(i)[:, None], torch.sin(i) + 0.5 * torch.cos(3 * i)
    golden = {1: 0.8832522358763226, 3: 0.796241801865889, 5: 0.666342534466621}
    for k, expected in golden.items():
        assert ksg(x, y, None, k, False).item() == pytest.approx(expected, abs=1e-13)
    assert ksg(x, y).item() == pytest.approx(0.794568280942368, abs=1e-13)


def test_ksg_does_not_change_with_the_units():
    x, y = dependent(400)
    moved = ksg(1000 * x + 3, y / 7)
    assert (moved - ksg(x, y)).abs().max() <= 2e-3  # a few counts by rounding
    assert (ksg(1000 * x, y, None, 3, False) - ksg(x, y, None, 3, False)).abs().max() > 0.1


def test_ksg_of_independent_samples_is_small_and_grows_with_dependence():
    y = torch.randn(4000, dtype=torch.float64)
    independent = torch.randn(4000, 1, dtype=torch.float64)
    assert ksg(independent, y).item() < 0.05
    x, y = dependent(2000, 4)
    mi = ksg(x, y)
    assert (mi[:-1] > mi[1:]).all()
    correlation = torch.corrcoef(torch.stack([x[:, 1], y]))[0, 1]
    assert mi[1].item() == pytest.approx(-0.5 * math.log(1 - correlation**2), abs=0.1)  # of two normal variables


def test_ksg_leaves_out_what_is_missing_or_not_finite():
    x, y = dependent(300)
    present = torch.rand(300, 3) < 0.7
    x[5, 0], x[9, 1], y[20] = math.nan, math.inf, math.nan
    mi = ksg(x, y, present, 3, False)
    for m in range(3):
        kept = present[:, m] & x[:, m].isfinite() & y.isfinite()
        assert mi[m].item() == pytest.approx(plain(x[kept, m], y[kept], 3), abs=1e-12)


def test_ksg_of_a_modality_with_too_few_samples_is_nan_alone():
    x, y = dependent(30, 2)
    present = torch.ones(30, 2, dtype=torch.bool)
    present[3:, 1] = False
    assert ksg(x, y, present).isnan().tolist() == [False, True]


def test_ksg_of_a_constant_is_zero_and_of_a_copy_saturates():
    _, y = dependent(200)
    assert ksg(torch.ones(200, 1).double(), y).item() == pytest.approx(0, abs=1e-14)
    psi = scipy.special.digamma
    assert ksg(y[:, None], y).item() == pytest.approx(psi(200) - psi(3), abs=1e-12)
    with_jitter = np.mean([ksg(y[:, None], y, None, 3, True, 1e-10, seed).item() for seed in range(5)])
    assert with_jitter == pytest.approx(psi(200) - psi(3) - 1 / 3, abs=0.15)


def test_ksg_jitter_follows_its_seed_and_scikit_learns_range():
    x, y = dependent(200, 1)
    x, y = (x * 10).round() / 10, (y * 10).round() / 10
    jittered = [ksg(x, y, None, 3, True, 1e-10, seed).item() for seed in (0, 0, 1, 2, 3)]
    assert jittered[0] == jittered[1] != jittered[2]
    theirs = [mutual_info_regression(x.numpy(), y.numpy(), random_state=seed)[0] for seed in range(8)]
    assert min(theirs) - 0.05 < np.mean(jittered) < max(theirs) + 0.05


@pytest.mark.parametrize("steps", [1, 10, 100])
def test_ksg_of_ties_equals_scikit_learn_without_its_jitter(steps):
    x, y = dependent(500, 1)
    x, y = (x * steps).round() / steps, (y * steps).round() / steps
    independent = y[torch.randperm(500)]
    for other in (x[:, 0], independent, torch.ones_like(y)):
        expected = _compute_mi_cc(other.numpy(), y.numpy(), 3)
        assert ksg(other[:, None], y, None, 3, False).item() == pytest.approx(expected, abs=1e-12)


def test_ksg_of_constants_or_of_independent_signs_is_zero():
    ones, signs = torch.ones(400).double(), (torch.rand(2, 400) < 0.5).double()
    assert ksg(ones[:, None], ones).item() == pytest.approx(0, abs=1e-12)
    assert ksg(signs[0][:, None], signs[1]).item() < 0.02


def test_ksg_of_huge_numbers_is_that_of_small_ones():
    x, y = dependent(300, 2)
    assert (ksg(x * 1e200, y * 1e200) - ksg(x, y, None, 3, False)).abs().max() <= 1e-12


@pytest.mark.parametrize("clumped", ["x", "y", "both"])
def test_ksg_serves_samples_that_lie_in_clumps(clumped):
    x, y = dependent(1500, 1)
    if clumped in ("x", "both"):
        x = x.round()
    if clumped in ("y", "both"):
        y = y.round()
    assert ksg(x, y, None, 3, False).item() == pytest.approx(plain(x[:, 0], y, 3), abs=1e-12)


def test_mutual_info_does_not_depend_on_threads(at_each_thread_count):
    x, y = dependent(5000, 4)
    a, b = torch.randint(0, 9, (4, 5000)), torch.randint(0, 9, (5000,))
    at_each_thread_count(lambda: [ksg(x, y), ksg(x, y, None, 3, True, 1e-10, 1), discrete(a, b)])


@pytest.mark.parametrize(("N", "C"), [(1, 1), (50, 2), (1000, 7), (3000, 300)])
def test_discrete_equals_scikit_learn(N, C):
    b = torch.randint(0, C, (N,))
    a = torch.where(torch.rand(3, N) < 0.5, b, torch.randint(0, C, (3, N)))
    expected = [mutual_info_score(row.numpy(), b.numpy()) for row in a]
    for classes in (-1, C, C + 3):
        assert discrete(a, b, None, classes).tolist() == pytest.approx(expected, abs=1e-12)


def test_discrete_golden_value():
    a = torch.arange(4).repeat_interleave(15)
    b = torch.where(torch.arange(60) % 15 < 12, a, (a + 1) % 4)
    assert discrete(a[None], b).item() == pytest.approx(0.8858919375817027, abs=1e-14)


def test_discrete_leaves_out_what_is_missing_whatever_it_holds():
    b = torch.randint(0, 4, (200,))
    a = torch.where(torch.rand(2, 200) < 0.5, b, torch.randint(0, 4, (2, 200)))
    present = torch.rand(200, 2) < 0.7
    expected = [mutual_info_score(a[m, present[:, m]].numpy(), b[present[:, m]].numpy()) for m in range(2)]
    a[~present.T] = -100
    assert discrete(a, b, present).tolist() == pytest.approx(expected, abs=1e-12)
    present[:, 1] = False
    assert discrete(a, b, present).isnan().tolist() == [False, True]


def test_no_gradient_flows_through_counts():
    x, y = dependent(50)
    assert not ksg(x.requires_grad_(), y.requires_grad_()).requires_grad


@pytest.mark.usefixtures("poisoned_memory")
def test_every_element_is_written():
    x, y = dependent(100)
    assert ksg(x, y).isfinite().all()
    assert discrete(torch.randint(0, 3, (2, 10)), torch.randint(0, 3, (10,))).isfinite().all()


def test_opcheck():
    x, y = dependent(20)
    present = torch.ones(20, 3, dtype=torch.bool)
    torch.library.opcheck(torch.ops.mmbal.ksg_mutual_info.default, (x, y, present, 2, True, 1e-10, 7))
    arguments = (torch.randint(0, 3, (2, 10)), torch.randint(0, 3, (10,)), None, 3)
    torch.library.opcheck(torch.ops.mmbal.discrete_mutual_info.default, arguments)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda x, y: ksg(x[:, 0], y), r"ksg_mutual_info: x must be \[N, M\]"),
        (lambda x, y: ksg(x, y[:5]), r"y must be \[N\] = \[10\], got \[5\]"),
        (lambda x, y: ksg(x, y.float()), "y must be float64, got float32"),
        (lambda x, y: ksg(x[:, :0], y), "x must have at least one modality"),
        (lambda x, y: ksg(x, y, None, 0), "neighbors must be from 1 to 64, got 0"),
        (lambda x, y: ksg(x, y, None, 10), "x must have more samples than neighbors = 10, got 10"),
        (lambda x, y: ksg(x, y, None, 3, True, -1.0), "jitter must be finite and not negative, got -1"),
        (lambda x, y: ksg(x, y, torch.ones(10, 2).bool()), r"present must be \[N, M\] = \[10, 3\], got \[10, 2\]"),
        (lambda x, y: ksg(x, y, torch.ones(10, 3)), "present must be bool, got float32"),
        (lambda x, y: discrete(x.T.long(), y), "discrete_mutual_info: b must be int64, got float64"),
        (
            lambda x, y: discrete(torch.ones(1, 3).long(), torch.ones(3).long(), None, 1),
            "from 0 to num_classes - 1 = 0",
        ),
        (lambda x, y: discrete(-torch.ones(1, 3).long(), torch.ones(3).long()), "classes from 0 to"),
        (lambda x, y: discrete(torch.full((1, 3), 1 << 40), torch.ones(3).long()), "must be classes below 32768"),
        (
            lambda x, y: discrete(torch.ones(1, 3).long(), torch.ones(3).long(), None, 0),
            "num_classes must be from 1 to",
        ),
        (lambda x, y: discrete(torch.ones(0, 3).long(), torch.ones(3).long()), "a must have at least one modality"),
    ],
)
def test_bad_input_is_refused(call, message):
    with pytest.raises(RuntimeError, match=message):
        call(*dependent(10))
