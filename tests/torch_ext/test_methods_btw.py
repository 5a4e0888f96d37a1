"""BTW as a user trains with it: what the table, the means and the weights are, and what may go wrong.

Letters: N samples, M modalities, K targets, C classes or labels, S rows of the table.
"""

import copy
import inspect
import io
import math
import os
import pickle
from dataclasses import dataclass, replace
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from scipy.special import expit, softmax
from scipy.stats import entropy
from sklearn.feature_selection import mutual_info_regression
from sklearn.metrics import mutual_info_score
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DistributedSampler

import oracles
from mmbal import BTW

NAMES = ["text", "video", "audio"]
M = len(NAMES)
ROW = 1e-6 * M  # error of a row of float32 weights


# --- Formulas in numpy, float64 ---------------------------------------------------------------------------------------


def normal_kl(mu, sigma, fused_mu, fused_sigma):
    return np.log(fused_sigma / sigma) + (sigma**2 + (mu - fused_mu) ** 2) / (2 * fused_sigma**2) - 0.5


def weights_of(kl_NM, mi_M, mode="diverge", factors="kl+mi", mean_one=True, temperature=1.0, present=None):
    """The softmax form."""
    kl = np.ones_like(kl_NM) if factors == "mi" else kl_NM
    v = np.ones(kl.shape[1]) if factors == "kl" else np.maximum(mi_M, 1e-5)
    present = np.ones(kl.shape, dtype=bool) if present is None else present
    level = np.log(np.clip(kl, 1e-5, 1e6)) if mode == "diverge" else -np.minimum(kl, 1e6) / temperature
    counts = present.sum(1, keepdims=True)
    w = np.zeros_like(kl)
    some = counts[:, 0] > 0
    w[some] = softmax(np.where(present, level + np.log(v), -np.inf)[some], axis=1)
    return w * counts if mean_one else w


@dataclass
class Rows:
    """Predictions by modality and of the fused model, [N], [N, K] or [N, C]; `target` for regression."""

    task: str
    unimodal: dict[str, torch.Tensor]
    fused: torch.Tensor
    target: torch.Tensor | None = None

    @property
    def each(self):
        return [self.unimodal[name].double().numpy() for name in NAMES]

    def __len__(self):
        return len(self.fused)

    def __getitem__(self, index):
        target = None if self.target is None else self.target[index]
        return replace(
            self, unimodal={k: v[index] for k, v in self.unimodal.items()}, fused=self.fused[index], target=target
        )

    def arguments(self, target=True):
        given = {"unimodal": self.unimodal, "fused": self.fused}
        return given | ({"target": self.target} if target and self.target is not None else {})

    def sigmas(self):
        """Root mean squares of the residuals, the fused one last."""
        target, predictions = self.target.double().numpy(), [*self.each, self.fused.double().numpy()]
        return np.array([np.sqrt(np.mean((target - p) ** 2)) for p in predictions])

    def kl(self, sigmas=None):
        """[N, M]; of a regression with these M + 1 sigmas, without them with the residuals."""
        columns = []
        for m, u in enumerate(self.each):
            q = self.fused.double().numpy()
            if self.task == "classification":
                kl = entropy(softmax(u, axis=1), softmax(q, axis=1), axis=1)
            elif self.task == "multilabel":
                kl = entropy(np.stack([expit(u), expit(-u)]), np.stack([expit(q), expit(-q)])).sum(1)
            else:
                y = self.target.double().numpy()
                own, whole = (sigmas[m], sigmas[M]) if sigmas is not None else (np.abs(y - u), np.abs(y - q))
                kl = normal_kl(u, np.maximum(own, 1e-3), q, np.maximum(whole, 1e-3)).reshape(len(q), -1).sum(1)
            columns.append(kl)
        return np.stack(columns, 1)

    def mi(self, present=None):
        """[M], each over the rows where it is present."""
        found = []
        for m, u in enumerate(self.each):
            rows = slice(None) if present is None else present[:, m]
            u, q = u[rows], self.fused.double().numpy()[rows]
            if self.task == "classification":
                found.append(mutual_info_score(u.argmax(1), q.argmax(1)))
            elif self.task == "multilabel":
                found.append(np.mean([mutual_info_score(u[:, c] > 0, q[:, c] > 0) for c in range(u.shape[1])]))
            else:
                u, q = u.reshape(len(u), -1), q.reshape(len(q), -1)
                pairs = [(u[:, k : k + 1], q[:, k]) for k in range(q.shape[1])]
                found.append(np.mean([mutual_info_regression(x, y, random_state=0)[0] for x, y in pairs]))
        return np.array(found)


def make_rows(task, N=60, width=None, dtype=torch.float32, seed=0):
    """Modalities of falling quality."""
    generator = torch.Generator().manual_seed(seed)
    shape = (N, width or 4) if task != "regression" else (N, width) if width else (N,)
    truth = torch.randn(shape, generator=generator, dtype=torch.float64)

    def prediction(noise):
        return (truth + noise * torch.randn(shape, generator=generator, dtype=torch.float64)).to(dtype)

    unimodal = {name: prediction(noise) for name, noise in zip(NAMES, (0.5, 1.0, 2.0), strict=True)}
    return Rows(task, unimodal, prediction(0.3), truth.to(dtype) if task == "regression" else None)


def assert_weights(actual, expected, tolerance=ROW):
    assert actual.dtype == torch.float32 and not actual.requires_grad
    assert tuple(actual.shape) == expected.shape
    assert np.abs(actual.double().numpy() - expected).max() <= tolerance


def assert_same(a, b):
    """Bit for bit; a tensor or containers of them."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def state(btw):
    return copy.deepcopy(btw.state_dict())


@pytest.fixture
def regression():
    return make_rows("regression")


@pytest.fixture
def everyone():
    return torch.arange(60)


def updated(rows, index=None, present=None, **options):
    btw = BTW(NAMES, rows.task, len(rows), **options)
    index = torch.arange(len(rows)) if index is None else index
    assert btw.update(index, **rows.arguments(btw.sigma_source == "residual"), present=present)
    return btw


# --- The table --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mean_one", [True, False])
@pytest.mark.parametrize("factors", ["kl+mi", "kl", "mi"])
@pytest.mark.parametrize("mode", ["diverge", "agree"])
@pytest.mark.parametrize("task", ["regression", "classification", "multilabel"])
def test_an_update_moves_the_table_from_ones_by_alpha_towards_the_formula(task, mode, factors, mean_one):
    rows = make_rows(task)
    options = {"mode": mode, "factors": factors, "mean_one": mean_one, "temperature": 0.7}
    btw = updated(rows, alpha=0.3, **options)
    fresh = weights_of(rows.kl(), rows.mi(), **options)
    assert_weights(btw.table, 0.3 * fresh + 0.7)
    before = btw.table.double().numpy()
    btw.update(torch.arange(60), **rows.arguments())
    assert_weights(btw.table, 0.3 * fresh + 0.7 * before)
    assert_weights(btw.weights(torch.tensor([7, 3, 7])), btw.table.double().numpy()[[7, 3, 7]], 0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("task", ["regression", "classification"])
def test_predictions_may_have_any_floating_dtype(task, dtype):
    """KL alone of a regression: predictions of few bits tie, and the estimators treat ties differently."""
    rows, options = make_rows(task, dtype=dtype), {}
    if task == "regression":
        rows.target, options = make_rows(task).target, {"factors": "kl"}
    btw = updated(rows, **options)
    assert_weights(btw.table, 0.5 * weights_of(rows.kl(), rows.mi(), **options) + 0.5)


def test_autocast_changes_nothing(regression, everyone):
    with torch.autocast("cpu", torch.bfloat16):
        inside = updated(regression)
    assert_same(state(inside), state(updated(regression)))


def test_predictions_of_inference_mode_and_with_gradients_are_taken(regression):
    with torch.inference_mode():
        made = make_rows("regression")
    needing = make_rows("regression")
    for tensor in (*needing.unimodal.values(), needing.fused):
        tensor.requires_grad_()
    assert_same(state(updated(made)), state(updated(regression)))
    assert_same(state(updated(needing)), state(updated(regression)))


@pytest.mark.parametrize("source", ["residual", "fitted", 0.4])
@pytest.mark.parametrize("mode", ["diverge", "agree"])
def test_several_targets_sum_their_divergences_and_average_their_information(source, mode):
    rows = make_rows("regression", width=3)
    btw = BTW(NAMES, num_samples=60, sigma=source, mode=mode)
    sigmas = {"residual": None, "fitted": rows.sigmas()}.get(source, np.full(M + 1, 0.4))
    if source == "fitted":
        oracles.assert_near(btw.fit_sigma(torch.arange(60), **rows.arguments()), torch.from_numpy(sigmas), 1e-6)
    btw.update(torch.arange(60), **rows.arguments(source == "residual"))
    oracles.assert_near(btw.mutual_info, torch.from_numpy(rows.mi()), 1e-6)
    assert_weights(btw.table, 0.5 * weights_of(rows.kl(sigmas), rows.mi(), mode=mode) + 0.5)


def test_a_column_of_one_target_is_as_no_column(regression):
    column = Rows(
        "regression",
        {name: p[:, None] for name, p in regression.unimodal.items()},
        regression.fused[:, None],
        regression.target,
    )
    assert_same(state(updated(column)), state(updated(regression)))


def test_sigma_fitted_uses_the_residuals_of_fit_sigma_and_takes_no_target(regression, everyone):
    btw = BTW(NAMES, num_samples=60, sigma="fitted")
    btw.fit_sigma(everyone, **regression.arguments())
    btw.update(everyone, **regression.arguments(target=False))
    assert_weights(btw.table, 0.5 * weights_of(regression.kl(regression.sigmas()), regression.mi()) + 0.5)


def test_sigma_as_a_number_is_that_everywhere_and_needs_no_table(regression):
    btw = BTW(NAMES, sigma=0.1)
    assert btw.update(None, regression.unimodal, regression.fused)
    kl = np.stack([50 * (u - regression.fused.double().numpy()) ** 2 for u in regression.each], 1)
    w = btw.weights(unimodal=regression.unimodal, fused=regression.fused)
    assert_weights(w, weights_of(kl, regression.mi()), 3 * ROW)


@pytest.mark.parametrize("width", [None, 2])
def test_sigma_head_takes_logarithms_for_every_prediction(width, everyone):
    rows = make_rows("regression", width=width)
    log_sigma = {name: torch.randn_like(p) / 2 for name, p in rows.unimodal.items()}
    fused_log_sigma = torch.randn_like(rows.fused) / 2
    heads = {"log_sigma": log_sigma, "fused_log_sigma": fused_log_sigma}
    btw = BTW(NAMES, num_samples=60, sigma="head")
    btw.update(everyone, rows.unimodal, rows.fused, **heads)
    q, fused_sigma = rows.fused.double().numpy(), fused_log_sigma.double().exp().numpy()
    sigmas = [log_sigma[name].double().exp().numpy() for name in NAMES]
    kl = [normal_kl(u, s, q, fused_sigma).reshape(60, -1).sum(1) for u, s in zip(rows.each, sigmas, strict=True)]
    fresh = weights_of(np.stack(kl, 1), rows.mi())
    assert_weights(btw.table, 0.5 * fresh + 0.5)
    assert_weights(btw.weights(unimodal=rows.unimodal, fused=rows.fused, **heads), fresh)


def test_rows_that_are_not_named_stay_one(regression):
    btw = BTW(NAMES, num_samples=100)
    index = torch.randperm(100)[:60]
    btw.update(index, **regression.arguments())
    others = torch.ones(100, dtype=torch.bool)
    others[index] = False
    assert (btw.table[others] == 1).all()
    assert_weights(btw.table[index], 0.5 * weights_of(regression.kl(), regression.mi()) + 0.5)


def test_equal_modalities_keep_the_weight_one_with_mean_one_and_a_share_without(regression, everyone):
    same = replace(regression, unimodal=dict.fromkeys(NAMES, regression.unimodal["text"]))
    assert_weights(updated(same, alpha=1.0).table, np.ones((60, M)), 1e-6)
    assert_weights(updated(same, alpha=1.0, mean_one=False).table, np.full((60, M), 1 / M), 1e-6)


def test_the_direction_is_as_documented(regression):
    """Audio predicts worst, so it diverges most."""
    means = {mode: updated(regression, mode=mode, factors="kl", sigma=1.0).weights() for mode in ("diverge", "agree")}
    assert means["diverge"].argmax() == 2 and means["agree"].argmin() == 2


@pytest.mark.parametrize("mean_one", [True, False])
def test_the_mean_weights_follow_the_mean_of_the_fresh_ones(regression, everyone, mean_one):
    btw = BTW(NAMES, num_samples=60, alpha=0.3, mean_one=mean_one)
    assert_weights(btw.weights(), np.ones(M), 1e-7)
    btw.update(everyone, **regression.arguments())
    fresh = weights_of(regression.kl(), regression.mi(), mean_one=mean_one)
    assert_weights(btw.weights(), 0.3 * fresh.mean(0) + 0.7)


def test_the_caller_may_change_what_weights_returns(regression, everyone):
    btw = updated(regression)
    before = state(btw)
    btw.weights().zero_()
    btw.weights(everyone).zero_()
    assert_same(state(btw), before)


# --- Schedule ---------------------------------------------------------------------------------------------------------


def test_every_third_update_works_from_the_first_on(regression, everyone):
    btw = BTW(NAMES, num_samples=60, every=3)
    worked, due = [], []
    for _ in range(7):
        before = state(btw)
        due.append(btw.due)
        worked.append(btw.update(everyone, **regression.arguments()))
        assert torch.equal(btw.table, before["table"]) == (not worked[-1])
    assert due == worked == [True, False, False, True, False, False, True]


def test_an_update_that_is_not_due_still_refuses_bad_arguments(regression, everyone):
    btw = BTW(NAMES, num_samples=60, every=2)
    btw.update(everyone, **regression.arguments())
    with pytest.raises(ValueError, match="index must be from 0 to"):
        btw.update(everyone + 1, **regression.arguments())
    assert not btw.due


def test_a_new_best_metric_raises_alpha_and_any_other_lowers_it():
    btw = BTW(NAMES, num_samples=2)
    alphas = [btw.step(metric) for metric in (3.0, 2.0, 2.0, 2.5, torch.tensor(1.0), 1.5)]
    assert alphas == pytest.approx([0.55, 0.6, 0.55, 0.5, 0.55, 0.5], abs=1e-12)


def test_with_metric_mode_max_more_is_better():
    btw = BTW(NAMES, num_samples=2, metric_mode="max", alpha_step=0.1)
    assert [btw.step(m) for m in (0.3, 0.4, 0.35)] == pytest.approx([0.6, 0.7, 0.6], abs=1e-12)


def test_alpha_stays_within_zero_and_one(regression, everyone):
    rising, falling = (BTW(NAMES, num_samples=60, alpha_step=0.4) for _ in range(2))
    assert [rising.step(m) for m in (3, 2, 1)] == pytest.approx([0.9, 1, 1])
    assert [falling.step(m) for m in (1, 2, 3, 4, 5)] == pytest.approx([0.9, 0.5, 0.1, 0, 0])
    falling.update(everyone, **regression.arguments())
    assert (falling.table == 1).all()
    rising.update(everyone, **regression.arguments())
    assert_weights(rising.table, weights_of(regression.kl(), regression.mi()))


def test_the_new_alpha_is_that_of_the_next_update(regression, everyone):
    btw = updated(regression)
    before = btw.table.double().numpy()
    btw.step(1.0)
    btw.update(everyone, **regression.arguments())
    fresh = weights_of(regression.kl(), regression.mi())
    assert_weights(btw.table, 0.55 * fresh + 0.45 * before)


# --- Rows without a target --------------------------------------------------------------------------------------------


def test_fit_sigma_gives_root_mean_square_residuals(regression, everyone):
    btw = BTW(NAMES, num_samples=60)
    sigma = btw.fit_sigma(everyone, **regression.arguments())
    oracles.assert_near(sigma, torch.from_numpy(regression.sigmas()), 1e-6)


def test_fit_sigma_leaves_out_absent_modalities_and_nan_and_keeps_sigma_min(regression, everyone):
    present = torch.rand(60, M) < 0.6
    present[0] = True
    btw = BTW(NAMES, num_samples=60, sigma_min=0.01)
    perfect = replace(regression, unimodal=regression.unimodal | {"audio": regression.target.clone()})
    perfect.unimodal["audio"][0] = math.nan
    sigma = btw.fit_sigma(everyone, **perfect.arguments(), present=present)
    for m, name in enumerate(NAMES[:2]):
        residual = (regression.target - regression.unimodal[name])[present[:, m]].double()
        assert sigma[m].item() == pytest.approx(residual.square().mean().sqrt().item(), rel=1e-6)
    assert sigma[2] == 0.01


def test_fit_sigma_needs_a_prediction_of_every_modality(regression, everyone):
    btw = BTW(NAMES, num_samples=60)
    present = torch.ones(60, M, dtype=torch.bool)
    present[:, 1] = False
    with pytest.raises(ValueError, match=r"fit_sigma needs a finite prediction of every modality.*'video'"):
        btw.fit_sigma(everyone, **regression.arguments(), present=present)
    assert btw.sigma.isnan().all()


@pytest.mark.parametrize("mode", ["diverge", "agree"])
@pytest.mark.parametrize("width", [None, 2])
def test_held_out_weights_use_constant_sigmas_and_the_information_of_the_training_rows(width, mode):
    train, held_out = (make_rows("regression", width=width, seed=seed) for seed in (0, 1))
    btw = updated(train, mode=mode)
    btw.fit_sigma(torch.arange(60), **train.arguments())
    w = btw.weights(**held_out.arguments(target=False))
    assert_weights(w, weights_of(held_out.kl(train.sigmas()), train.mi(), mode=mode))


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_held_out_weights_of_labels_use_the_information_of_the_training_rows(task):
    train, held_out = make_rows(task), make_rows(task, N=25, seed=1)
    w = updated(train).weights(**held_out.arguments())
    assert_weights(w, weights_of(held_out.kl(), train.mi()))


@pytest.mark.parametrize("task", ["regression", "classification", "multilabel"])
def test_a_held_out_row_has_the_same_weights_whatever_rows_come_with_it(task):
    train, held_out = make_rows(task), make_rows(task, N=25, seed=1)
    btw = updated(train)
    if task == "regression":
        btw.fit_sigma(torch.arange(60), **train.arguments())
    before = state(btw)
    together = btw.weights(**held_out.arguments(target=False))
    for n in (0, 13, 24):
        assert_same(btw.weights(**held_out[n : n + 1].arguments(target=False)), together[n : n + 1])
    assert_same(state(btw), before)


@pytest.mark.parametrize("source", ["residual", "fitted"])
def test_held_out_weights_before_fit_sigma_are_an_error_that_says_so(regression, source):
    btw = BTW(NAMES, num_samples=60, sigma=source)
    with pytest.raises(RuntimeError, match="BTW: call fit_sigma first"):
        btw.weights(**regression.arguments(target=False))


def test_nothing_that_gives_weights_takes_a_target():
    for method in (BTW.weights, BTW.apply):
        parameters = inspect.signature(method).parameters
        assert not {"target", "targets", "y", "label", "labels"} & set(parameters)
        assert all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in parameters.values())


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_labels_are_refused(task):
    rows = make_rows(task)
    with pytest.raises(ValueError, match="target is for task='regression'"):
        BTW(NAMES, task, 60).update(torch.arange(60), **rows.arguments(), target=torch.zeros(60))
    with pytest.raises(ValueError, match="fit_sigma is for task='regression'"):
        BTW(NAMES, task, 60).fit_sigma(torch.arange(60), **rows.arguments(), target=torch.zeros(60))


def test_targets_that_sigma_does_not_use_are_refused(regression, everyone):
    with pytest.raises(ValueError, match="target is for task='regression' with sigma='residual'"):
        BTW(NAMES, num_samples=60, sigma=0.1).update(everyone, **regression.arguments())


# --- Missing modalities -----------------------------------------------------------------------------------------------


@pytest.fixture
def present():
    present = torch.rand(60, M) < 0.7
    present[5], present[6] = False, True
    return present


@pytest.mark.parametrize("mean_one", [True, False])
@pytest.mark.parametrize("task", ["regression", "classification", "multilabel"])
def test_absent_modalities_have_weight_zero_and_are_left_out_of_the_information(task, mean_one, present):
    rows = make_rows(task)
    btw = updated(rows, present=present, mean_one=mean_one)
    mi = rows.mi(present.numpy())
    oracles.assert_near(btw.mutual_info, torch.from_numpy(mi), 1e-6)
    fresh = weights_of(rows.kl(), mi, present=present.numpy(), mean_one=mean_one)
    assert (fresh[~present.numpy()] == 0).all() and (fresh[5] == 0).all()
    assert_weights(btw.table, 0.5 * fresh + 0.5)
    mean = fresh.sum(0) / present.numpy().sum(0)
    assert_weights(btw.weights(), 0.5 * mean + 0.5)
    assert (btw.weights(torch.arange(60), present=present)[~present] == 0).all()


@pytest.mark.parametrize("garbage", [math.nan, 1e30, -math.inf])
@pytest.mark.parametrize("task", ["regression", "classification", "multilabel"])
def test_predictions_of_absent_modalities_are_not_read(task, garbage, present):
    rows = make_rows(task)
    wild = replace(rows, unimodal={name: p.clone() for name, p in rows.unimodal.items()})
    for m, name in enumerate(NAMES):
        wild.unimodal[name][~present[:, m]] = garbage
    expected, actual = updated(rows, present=present), updated(wild, present=present)
    assert_same(state(actual), state(expected))
    if task == "regression":
        index = torch.arange(60)
        assert_same(
            actual.fit_sigma(index, **wild.arguments(), present=present),
            expected.fit_sigma(index, **rows.arguments(), present=present),
        )
    held_out = [b.weights(**r.arguments(False), present=present) for b, r in ((expected, rows), (actual, wild))]
    assert_same(*held_out)


PREDICTIONS_ARE_NUMBERS = ["regression", "fixed sigma", "information alone"]


@pytest.mark.parametrize(
    ("task", "bad"),
    [(task, bad) for task in PREDICTIONS_ARE_NUMBERS for bad in (math.nan, math.inf, -math.inf)]
    + [(task, bad) for task in ("classification", "multilabel") for bad in (math.nan, math.inf)],
)
def test_a_prediction_that_is_not_finite_is_as_an_absent_modality(task, bad, present):
    options = {"fixed sigma": {"sigma": 0.5}, "information alone": {"factors": "mi"}}.get(task, {})
    rows = make_rows("regression" if options else task)
    broken = replace(rows, unimodal={name: p.clone() for name, p in rows.unimodal.items()})
    for m, name in enumerate(NAMES):
        broken.unimodal[name].reshape(60, -1)[~present[:, m], 0] = bad
    expected, actual = updated(rows, present=present, **options), updated(broken, **options)
    assert_same(state(actual), state(expected))


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_a_logit_of_minus_infinity_is_a_probability_of_zero(task):
    rows = make_rows(task)
    near = replace(rows, unimodal={name: p.clone() for name, p in rows.unimodal.items()})
    for predictions, lowest in ((rows, -math.inf), (near, -1e4)):
        predictions.unimodal["video"][:, 0] = lowest
    assert (updated(rows).table - updated(near).table).abs().max() < 1e-5


def test_a_modality_that_gives_every_class_a_probability_of_zero_is_absent():
    rows = make_rows("classification")
    rows.unimodal["video"][7] = -math.inf
    present = torch.ones(60, M, dtype=torch.bool)
    present[7, NAMES.index("video")] = False
    assert_same(state(updated(rows)), state(updated(make_rows("classification"), present=present)))


def test_a_sigma_that_is_not_finite_leaves_the_row_or_the_modality_out(regression, everyone):
    btw = BTW(NAMES, num_samples=60, sigma="head", alpha=1.0)
    log_sigma = {name: torch.zeros(60) for name in NAMES}
    fused_log_sigma = torch.zeros(60)
    fused_log_sigma[3], log_sigma["video"][4] = math.nan, math.inf
    btw.update(everyone, regression.unimodal, regression.fused, log_sigma=log_sigma, fused_log_sigma=fused_log_sigma)
    assert (btw.table[3] == 1).all()
    assert btw.table[4, NAMES.index("video")] == 0 and btw.table[4].sum().item() == pytest.approx(2, abs=1e-5)


def test_constant_predictions_have_no_mutual_information(everyone):
    btw = BTW(NAMES, num_samples=60, sigma=1.0)
    btw.update(everyone, {name: torch.ones(60) for name in NAMES}, torch.ones(60))
    assert (btw.mutual_info < 0.2).all()


@pytest.mark.parametrize("task", ["regression", "classification", "multilabel"])
def test_a_row_whose_fused_prediction_is_nan_counts_nowhere_and_stays(task):
    rows = make_rows(task)
    rows.fused[9] = math.nan
    kept = torch.arange(60) != 9
    btw = updated(rows, alpha=1.0)
    assert (btw.table[9] == 1).all()
    others = rows[kept]
    assert_weights(btw.table[kept], weights_of(others.kl(), others.mi()))
    assert_weights(btw.weights(), weights_of(others.kl(), others.mi()).mean(0))


@pytest.mark.parametrize("mean_one", [True, False])
def test_rows_of_which_nothing_is_known_share_the_mean_by_what_they_have(regression, present, mean_one):
    btw = updated(regression, mean_one=mean_one)
    mean, there = btw.weights().double().numpy(), present.numpy()
    shares = np.where(there, mean, 0)
    counts = there.sum(1, keepdims=True) if mean_one else 1.0
    expected = np.divide(shares * counts, shares.sum(1, keepdims=True), out=np.zeros((60, M)), where=there)
    w = btw.weights(present=present)
    assert_weights(w, expected)
    assert (w[5] == 0).all() and (w[~present] == 0).all()
    h = {name: torch.randn(60, 2) for name in NAMES}
    scaled = btw.apply(h, present=present)
    for m, name in enumerate(NAMES):
        oracles.assert_near(scaled[name], h[name] * w[:, m : m + 1], 1e-6)


def test_too_few_samples_keep_the_information_that_was(regression):
    few = regression[torch.arange(3)]  # neighbors = 3 need a fourth
    btw = BTW(NAMES, num_samples=60)
    btw.update(torch.arange(3), **few.arguments())
    oracles.assert_near(btw.mutual_info, torch.full((M,), 1 / M, dtype=torch.float64), 0)
    assert_weights(btw.table[:3], 0.5 * weights_of(few.kl(), np.full(M, 1 / M)) + 0.5)

    present = torch.ones(60, M, dtype=torch.bool)
    present[3:, 2] = False
    btw.update(torch.arange(60), **regression.arguments(), present=present)
    assert btw.mutual_info[2] == 1 / M
    oracles.assert_near(btw.mutual_info[:2], torch.from_numpy(regression.mi()[:2]), 1e-6)


@pytest.mark.parametrize("task", ["regression", "classification", "multilabel"])
def test_a_modality_that_nobody_has_keeps_its_information_and_its_mean(task):
    rows, present = make_rows(task), torch.ones(60, M, dtype=torch.bool)
    btw = updated(rows)
    mutual_info, mean = btw.mutual_info[1].item(), btw.mean[1].item()
    present[:, 1] = False
    btw.update(torch.arange(60), **rows.arguments(), present=present)
    assert (btw.mutual_info[1].item(), btw.mean[1].item()) == (mutual_info, mean)


@pytest.mark.parametrize("task", ["regression", "classification", "multilabel"])
def test_an_update_of_no_rows_changes_nothing(task):
    btw, rows = updated(make_rows(task)), make_rows(task, N=1)[torch.arange(0)]
    before = state(btw)
    btw.update(torch.arange(0), **rows.arguments())
    assert_same(state(btw) | {"updates": before["updates"]}, before)


def test_a_training_row_without_a_target_counts_nowhere(regression):
    """NaN as target; the others are as if it were not there."""
    regression.target[9] = math.nan
    kept = torch.arange(60) != 9
    btw = updated(regression, alpha=1.0)
    others = regression[kept]
    assert (btw.table[9] == 1).all()
    assert_weights(btw.table[kept], weights_of(others.kl(), others.mi()))
    assert_weights(btw.weights(), weights_of(others.kl(), others.mi()).mean(0))
    oracles.assert_near(
        btw.fit_sigma(torch.arange(60), **regression.arguments()), torch.from_numpy(others.sigmas()), 1e-6
    )


def test_one_modality_has_weight_one_where_it_is_present(regression, everyone):
    btw, present = BTW(["text"], num_samples=60, alpha=1.0), torch.rand(60, 1) < 0.5
    btw.update(everyone, [regression.unimodal["text"]], regression.fused, regression.target, present=present)
    assert_weights(btw.table, present.double().numpy(), 1e-6)


def test_a_perfect_prediction_leaves_finite_weights(regression, everyone):
    perfect = replace(regression, unimodal=regression.unimodal | {"audio": regression.target}, fused=regression.target)
    assert_weights(updated(perfect).table, 0.5 * weights_of(perfect.kl(), perfect.mi()) + 0.5)


# --- Names ------------------------------------------------------------------------------------------------------------


def test_predictions_by_name_may_come_in_any_order(regression, everyone):
    swapped = replace(regression, unimodal={name: regression.unimodal[name] for name in ("audio", "text", "video")})
    in_order = replace(regression, unimodal=[regression.unimodal[name] for name in NAMES])
    expected = updated(regression)
    assert_same(state(updated(swapped)), state(expected))
    assert_same(state(updated(in_order)), state(expected))
    for other in (swapped, in_order):
        assert_same(
            expected.fit_sigma(everyone, **other.arguments()), expected.fit_sigma(everyone, **regression.arguments())
        )
    assert_same(*[expected.weights(**r.arguments(False)) for r in (swapped, regression)])


def test_embeddings_by_name_may_come_in_any_order(regression, everyone):
    btw, h = updated(regression), {name: torch.randn(60, 4) for name in NAMES}
    expected = btw.apply([h[name] for name in NAMES], index=everyone)
    swapped = btw.apply({name: h[name] for name in ("audio", "text", "video")}, index=everyone)
    for name, value in zip(NAMES, expected, strict=True):
        assert_same(swapped[name], value)


@pytest.mark.parametrize("argument", ["unimodal", "embeddings"])
@pytest.mark.parametrize(
    ("given", "message"),
    [
        (lambda t: {"text": t, "video": t, "sound": t}, "must have the keys .*'audio'.*got.*'sound'"),
        (lambda t: {"text": t, "video": t}, "must have the keys"),
        (lambda t: dict.fromkeys([*NAMES, "more"], t), "must have the keys"),
        (lambda t: [t, t], "must be a mapping or one tensor for each of .*got 2"),
        (lambda t: torch.stack([t, t, t]), "must be a mapping or one tensor for each of .*got one tensor"),
    ],
    ids=["another name", "one lacking", "one too many", "short list", "one tensor"],
)
def test_wrong_names_are_an_error(regression, everyone, argument, given, message):
    btw, tensor = BTW(NAMES, num_samples=60), regression.fused
    with pytest.raises(ValueError, match=f"BTW: {argument} {message}"):
        if argument == "unimodal":
            btw.update(everyone, given(tensor), regression.fused, regression.target)
        else:
            btw.apply(given(tensor), index=everyone)


# --- Application ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("container", [dict, list, tuple])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
def test_apply_multiplies_each_row_of_each_modality_by_its_weight(regression, dtype, container):
    btw, index = updated(regression), torch.randperm(60)[:8]
    h = [torch.randn(8, 5), torch.randn(8, 7, 3), torch.randn(3, 8).T]
    h = [values.to(dtype) for values in h]
    given = dict(zip(NAMES, h, strict=True)) if container is dict else container(h)
    kept = copy.deepcopy(given)
    scaled = btw.apply(given, index)
    assert_same(given, kept)
    if container is dict:
        assert isinstance(scaled, dict) and set(scaled) == set(NAMES)
        scaled = [scaled[name] for name in NAMES]
    assert isinstance(scaled, list)
    for m, (before, after) in enumerate(zip(h, scaled, strict=True)):
        w = btw.table[index, m].double().reshape(8, *[1] * (before.dim() - 1))
        assert after.dtype == dtype
        oracles.assert_near(after, before.double() * w, oracles.FORWARD_TOLERANCE[dtype])


def test_apply_takes_given_weights_or_the_means(regression):
    btw, h = updated(regression), {name: torch.randn(9, 4) for name in NAMES}
    given = torch.rand(9, M)
    for arguments, w in (({"weights": given}, given), ({}, btw.weights().expand(9, M))):
        scaled = btw.apply(h, **arguments)
        for m, name in enumerate(NAMES):
            oracles.assert_near(scaled[name], h[name] * w[:, m : m + 1], 1e-6)


def test_apply_with_present_silences_absent_modalities(regression):
    btw, h, index = updated(regression), [torch.randn(9, 4) for _ in NAMES], torch.arange(9)
    present = torch.rand(9, M) < 0.5
    for arguments in ({"index": index}, {"weights": torch.ones(9, M)}):
        scaled, whole = btw.apply(h, **arguments, present=present), btw.apply(h, **arguments)
        for m in range(M):
            assert_same(scaled[m], whole[m] * present[:, m : m + 1])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_reach_the_embeddings_times_the_weights_and_never_the_table(regression, dtype):
    btw, index = updated(regression), torch.arange(20, 29)
    h = [torch.randn(9, 4, dtype=dtype, requires_grad=True), torch.randn(9, 2, 3, dtype=dtype, requires_grad=True)]
    h.append(torch.randn(9, 5, dtype=dtype))
    upstream = [torch.randn_like(values) for values in h]
    torch.autograd.backward(btw.apply(h, index)[:2], upstream[:2])
    for m in range(2):
        w = btw.table[index, m].reshape(9, *[1] * (h[m].dim() - 1))
        oracles.assert_near(h[m].grad, w.double() * upstream[m].double(), oracles.FORWARD_TOLERANCE[dtype])
    assert not btw.table.requires_grad and btw.table.grad is None and h[2].grad is None
    assert not list(btw.parameters())


@pytest.mark.parametrize("by", ["rows", "means", "rows that lack some"])
def test_an_update_after_the_forward_pass_does_not_change_its_gradients(regression, everyone, present, by):
    btw, h = updated(regression), [torch.randn(60, 4, requires_grad=True) for _ in NAMES]
    arguments = {"rows": {"index": everyone}, "means": {}, "rows that lack some": {"present": present}}[by]
    w = btw.weights(**arguments).expand(60, M)
    loss = sum(s.sum() for s in btw.apply(h, **arguments))
    btw.update(everyone, **make_rows("regression", seed=1).arguments())
    assert not torch.equal(btw.weights(**arguments).expand(60, M), w)
    loss.backward()
    for m in range(M):
        assert_same(h[m].grad, w[:, m : m + 1].expand(60, 4))


# --- As a module ------------------------------------------------------------------------------------------------------


class Model(nn.Module):
    """An ordinary late fusion of three modalities, [B, M, 6] in, [B] out."""

    def __init__(self, num_samples=60):
        super().__init__()
        self.encoders = nn.ModuleDict({name: nn.Linear(6, 4) for name in NAMES})
        self.head = nn.Linear(4 * M, 1)
        self.btw = BTW(NAMES, num_samples=num_samples)

    def forward(self, x, index=None):
        h = {name: self.encoders[name](x[:, m]).tanh() for m, name in enumerate(NAMES)}
        h = self.btw.apply(h, index)
        return self.head(torch.cat(list(h.values()), 1)).squeeze(1)


def continue_training(btw, epochs):
    """Updates with predictions that each epoch changes; what was seen and the final state."""
    seen = []
    for epoch in epochs:
        rows = make_rows("regression", seed=epoch)
        btw.update(torch.arange(60), **rows.arguments())
        btw.fit_sigma(torch.arange(60), **rows.arguments())
        btw.step([2.0, 1.0, 1.5, 0.5, 0.7, 0.4][epoch])
        seen.append(btw.apply([torch.ones(60, 2)] * M, torch.arange(60)))
        seen.append(btw.weights(**make_rows("regression", seed=50).arguments(False)))
    return seen, state(btw)


def through_a_file(btw):
    file = io.BytesIO()
    torch.save(btw.state_dict(), file)
    file.seek(0)
    fresh = BTW(NAMES, num_samples=60, every=2)
    fresh.load_state_dict(torch.load(file, weights_only=True))
    return fresh


@pytest.mark.parametrize(
    "resume",
    [through_a_file, copy.deepcopy, lambda btw: pickle.loads(pickle.dumps(btw))],
    ids=["state_dict", "deepcopy", "pickle"],
)
def test_training_goes_on_from_a_copy_bit_for_bit(resume):
    btw = BTW(NAMES, num_samples=60, every=2)
    continue_training(btw, range(3))
    resumed, before = resume(btw), state(btw)
    continued = continue_training(resumed, range(3, 6))
    assert_same(state(btw), before)
    assert_same(continued, continue_training(btw, range(3, 6)))
    assert not torch.equal(btw.table, before["table"])


def test_a_state_of_another_number_of_rows_is_refused():
    with pytest.raises(RuntimeError, match="size mismatch for table"):
        BTW(NAMES, num_samples=60).load_state_dict(BTW(NAMES, num_samples=61).state_dict())


@pytest.mark.parametrize("cast", ["bfloat16", "half", "double"])
def test_casting_the_model_leaves_the_averages_as_they_are(regression, cast):
    model = Model()
    model.btw = updated(regression)
    before = state(model.btw)
    getattr(model, cast)()
    assert_same(state(model.btw), before)
    dtype = {"bfloat16": torch.bfloat16, "half": torch.float16, "double": torch.float64}[cast]
    assert model.head.weight.dtype == dtype
    assert model(torch.randn(5, M, 6, dtype=dtype), torch.arange(5)).dtype == dtype
    model.to(torch.bfloat16)
    assert_same(state(model.btw), before)


def test_a_function_can_be_applied_to_the_whole_model():
    """model.apply(initialise), as initialisation schemes do."""
    model, visited = Model(), []
    assert model.apply(lambda module: visited.append(type(module))) is model
    assert visited.count(nn.Linear) == M + 1 and Model in visited


def test_a_model_made_without_memory_takes_a_state(regression):
    """The way large models are loaded: on the meta device first, then memory, then the state."""
    trained = Model()
    trained.btw = updated(regression)
    with torch.device("meta"):
        model = Model()
    model.to_empty(device="cpu")
    model.load_state_dict(trained.state_dict())
    assert_same(model.state_dict(), trained.state_dict())


def test_a_model_made_without_memory_takes_over_the_tensors_of_a_state(regression):
    trained = Model()
    trained.btw = updated(regression)
    with torch.device("meta"):
        model = Model()
    model.load_state_dict(trained.state_dict(), assign=True)
    assert_same(model.state_dict(), trained.state_dict())


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_a_compiled_training_step_is_the_eager_one(regression, backend):
    torch.compiler.reset()
    eager = Model()
    eager.btw = updated(regression)
    model = copy.deepcopy(eager)
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    for index in (torch.arange(8), torch.arange(20, 28), *([None] if backend == "aot_eager" else [])):
        x = torch.randn(8, M, 6)
        for run in (eager, compiled):
            run(x, index).square().mean().backward()
        for a, b in zip(model.parameters(), eager.parameters(), strict=True):
            oracles.assert_near(a.grad, b.grad, 1e-5)
    model.btw.update(torch.arange(60), **make_rows("regression", seed=1).arguments())
    eager.btw.load_state_dict(model.btw.state_dict())
    x = torch.randn(8, M, 6)
    oracles.assert_near(compiled(x, torch.arange(8)), eager(x, torch.arange(8)), 1e-5)


# --- Several processes ------------------------------------------------------------------------------------------------

S = 21
METRICS = [(2.0, 1.0), (1.0, 1.8), (3.0, 0.9)]  # of both ranks; the means 1.5, 1.4 and 1.95


def shards():
    """Rows of rank 0 and 1 of S: uneven, padded with rows of the other rank and with one of its own."""
    order = torch.randperm(S, generator=torch.Generator().manual_seed(3))
    first, second = order[:13], order[13:]
    return torch.cat([first, second[:2]]), torch.cat([second, first[:1], second[-1:]])


def cases():
    """{name: (options of BTW, rows of an epoch, present)}"""
    present = torch.rand(S, M, generator=torch.Generator().manual_seed(4)) < 0.8
    present[:6] = True
    return {
        "regression": ({}, lambda epoch: make_rows("regression", S, seed=epoch), present),
        "two targets": ({"mode": "agree"}, lambda epoch: make_rows("regression", S, width=2, seed=epoch), None),
        "classification": ({}, lambda epoch: make_rows("classification", S, seed=epoch), present),
        "multilabel": ({"every": 2}, lambda epoch: make_rows("multilabel", S, seed=epoch), None),
    }


def train_case(options, make, present, own, rank, group=None):
    """Three epochs with the rows `own`; what they leave."""
    btw = BTW(NAMES, make(0).task, S, process_group=group, **options)
    alphas = []
    for epoch, metrics in enumerate(METRICS):
        rows = make(epoch)[own]
        there = None if present is None else present[own]
        btw.update(own, **rows.arguments(), present=there)
        if rows.task == "regression":
            btw.fit_sigma(own, **rows.arguments(), present=there)
        alphas.append(btw.step(sum(metrics) / 2 if rank is None else metrics[rank]))
    return {"state": state(btw), "alphas": alphas}


def without_table(own):
    btw, rows = BTW(NAMES, "classification"), make_rows("classification", S)[own]
    btw.update(None, **rows.arguments())
    return state(btw)


def train_wrapped(wrap, own):
    """Two steps of a model that has BTW inside, an update before each."""
    torch.manual_seed(1)
    model = Model(S)
    run, x = wrap(model), torch.randn(S, M, 6)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for epoch in range(2):
        rows = make_rows("regression", S, seed=epoch)
        every_row = torch.cat([own, own[:1]]) if wrap is DistributedDataParallel else own
        model.btw.update(every_row, **rows[every_row].arguments())
        loss = (run(x[own], own) - rows.target[own]).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return copy.deepcopy(model.state_dict())


def sampled(rank):
    """Rows as DistributedSampler deals them: as many to each rank, one of them twice."""
    return torch.tensor(list(DistributedSampler(range(S), num_replicas=2, rank=rank, shuffle=True, seed=5)))


def process(rank, folder):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    results = {name: train_case(*case, shards()[rank], rank) for name, case in cases().items()}
    results["sampler"] = train_case(*cases()["regression"], sampled(rank), rank)
    results["no table"] = without_table(torch.arange(S).chunk(2)[rank])
    results["wrapped"] = train_wrapped(DistributedDataParallel, torch.arange(20).chunk(2)[rank])
    alone = [dist.new_group([r]) for r in range(2)][rank]
    results["own group"] = train_case(*cases()["regression"], shards()[rank].unique(), None, group=alone)
    try:  # the last: a rank that fails leaves the other waiting
        soon = dist.new_group(timeout=timedelta(seconds=3))
        options, make, present = cases()["regression"]
        own = torch.arange(S) if rank == 0 else torch.arange(0)
        results["no rows"] = train_case(options, make, present, own, rank, group=soon)
    except RuntimeError as error:
        results["no rows"] = str(error)
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What both ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_the_shards_of_these_tests_are_uneven_cover_all_rows_and_repeat_some():
    first, second = shards()
    assert len(first) != len(second) and len(second.unique()) < len(second)
    assert set(first.tolist()) | set(second.tolist()) == set(range(S))
    assert set(first.tolist()) & set(second.tolist())
    dealt = torch.cat([sampled(0), sampled(1)])
    assert len(dealt) == S + 1 and len(dealt.unique()) == S


@pytest.mark.parametrize("case", cases())
def test_two_processes_leave_what_one_with_all_rows_leaves(two_processes, case):
    alone = train_case(*cases()[case], torch.arange(S), None)
    assert not torch.equal(alone["state"]["table"], torch.ones(S, M))
    assert alone["alphas"] == pytest.approx([0.55, 0.6, 0.55])
    for rank in two_processes:
        assert_same(rank[case], alone)


def test_rows_that_distributed_sampler_pads_count_once(two_processes):
    alone = train_case(*cases()["regression"], torch.arange(S), None)
    for rank in two_processes:
        assert_same(rank["sampler"], alone)


def test_without_a_table_the_rows_of_all_ranks_count(two_processes):
    for rank in two_processes:
        assert_same(rank["no table"], without_table(torch.arange(S)))


def test_a_process_group_limits_who_shares(two_processes):
    for number, rank in enumerate(two_processes):
        alone = train_case(*cases()["regression"], shards()[number].unique(), None)
        assert_same(rank["own group"], alone)


def test_a_rank_may_have_no_rows(two_processes):
    alone = train_case(*cases()["regression"], torch.arange(S), None)
    errors = [rank["no rows"] for rank in two_processes if isinstance(rank["no rows"], str)]
    assert not errors
    for rank in two_processes:
        assert_same(rank["no rows"], alone)


def test_a_wrapped_model_with_btw_inside_trains_as_in_one_process(two_processes):
    alone = train_wrapped(lambda model: model, torch.arange(20))
    first, second = (rank["wrapped"] for rank in two_processes)
    assert_same(first, second)
    torch.manual_seed(1)
    start = Model(S).state_dict()
    for name, value in alone.items():
        torch.testing.assert_close(first[name], value, rtol=1e-5, atol=1e-6, equal_nan=True)
    for name in ("btw.table", "encoders.audio.weight", "head.weight"):
        assert not torch.equal(alone[name], start[name])


# --- Mistakes ---------------------------------------------------------------------------------------------------------

CONSTRUCTOR = [
    ("modalities", "text"),
    ("modalities", []),
    ("modalities", ["text", "text"]),
    ("task", "ranking"),
    ("num_samples", 0),
    ("num_samples", None),  # with sigma="residual"
    ("sigma", "residuals"),
    ("sigma", 0.0),
    ("sigma", math.nan),
    ("sigma", math.inf),
    ("sigma_min", 0.0),
    ("alpha", 1.1),
    ("alpha", -0.1),
    ("alpha", math.nan),
    ("alpha_step", -0.05),
    ("alpha_step", math.nan),
    ("every", 0),
    ("mode", "repel"),
    ("temperature", 0.0),
    ("factors", "mi+kl"),
    ("neighbors", 0),
    ("neighbors", 65),
    ("floor", 0.0),
    ("ceiling", math.inf),
    ("ceiling", 1e-6),
    ("metric_mode", "least"),
]


@pytest.mark.parametrize(("name", "value"), CONSTRUCTOR)
def test_a_wrong_argument_of_the_constructor_is_named(name, value):
    with pytest.raises(ValueError, match=rf"BTW: .*\b{name}\b"):
        BTW(**{"modalities": NAMES, "num_samples": 60} | {name: value})


def test_every_argument_of_the_constructor_is_among_the_wrong_ones():
    tested = {name for name, _ in CONSTRUCTOR} | {"mean_one", "process_group"}
    assert tested == set(inspect.signature(BTW).parameters)


def broken_update(**changes):
    return {"index": torch.arange(60), **make_rows("regression", seed=1).arguments(), **changes}


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"index": None}, "index must be given"),
        ({"index": torch.arange(59)}, r"index must be int64 \[N\] = \[60\]"),
        ({"index": torch.arange(60).int()}, "index must be int64"),
        ({"index": torch.arange(60).float()}, "index must be int64"),
        ({"index": torch.arange(60)[:, None]}, "index must be int64"),
        ({"index": torch.arange(1, 61)}, "index must be from 0 to"),
        ({"index": torch.arange(-1, 59)}, "index must be from 0 to"),
        ({"index": torch.tensor([*range(59), 0])}, "index must not name a row twice"),
        ({"index": torch.tensor([*range(60)]).zero_()}, "index must not name a row twice"),
        ({"unimodal": dict.fromkeys(NAMES, torch.zeros(59))}, r"unimodal\['text'\] must be"),
        ({"unimodal": [torch.zeros(60), torch.zeros(60), torch.zeros(60, 1)]}, r"unimodal\['audio'\] must be"),
        ({"fused": torch.zeros(60, 2, 2)}, "fused must be"),
        ({"fused": torch.tensor(1.0)}, "fused must be"),
        ({"target": None}, "target must be given"),
        ({"target": torch.zeros(59)}, "target must be like fused"),
        ({"target": torch.zeros(60, 2)}, "target must be like fused"),
        ({"target": torch.tensor(1.0)}, "target must be like fused"),
        ({"present": torch.ones(60, M)}, r"present must be bool \[N, M\]"),
        ({"present": torch.ones(M, 60, dtype=torch.bool)}, r"present must be bool \[N, M\]"),
        ({"present": torch.ones(60, dtype=torch.bool)}, r"present must be bool \[N, M\]"),
        ({"fused_log_sigma": torch.zeros(60)}, "log_sigma and fused_log_sigma must be given if, and only if"),
    ],
)
def test_a_wrong_argument_of_update_is_named_and_nothing_changes(regression, changes, named):
    btw = updated(regression)
    before = state(btw)
    with pytest.raises((ValueError, RuntimeError), match=named):
        btw.update(**broken_update(**changes))
    assert_same(state(btw), before)


@pytest.mark.parametrize("task", ["classification", "multilabel"])
def test_logits_need_a_dimension_of_classes(task, everyone):
    with pytest.raises(ValueError, match=r"fused must be \[N, C\], got \[60\]"):
        BTW(NAMES, task, 60).update(everyone, dict.fromkeys(NAMES, torch.zeros(60)), torch.zeros(60))


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"log_sigma": None}, "log_sigma and fused_log_sigma must be given"),
        ({"fused_log_sigma": None}, "log_sigma and fused_log_sigma must be given"),
        (
            {"log_sigma": dict.fromkeys(["text", "video", "sound"], torch.zeros(60))},
            r"BTW: log_sigma must have the keys",
        ),
        ({"log_sigma": dict.fromkeys(NAMES, torch.zeros(59))}, r"BTW: log_sigma\['text'\] must be"),
        ({"fused_log_sigma": torch.zeros(59)}, "BTW: fused_log_sigma must be"),
    ],
)
def test_wrong_logarithms_of_sigma_are_named(regression, everyone, changes, named):
    btw = BTW(NAMES, num_samples=60, sigma="head")
    heads = {"log_sigma": dict.fromkeys(NAMES, torch.zeros(60)), "fused_log_sigma": torch.zeros(60)} | changes
    with pytest.raises(ValueError, match=named):
        btw.update(everyone, **regression.arguments(False), **heads)


def test_logarithms_of_sigma_may_have_another_dtype_than_the_predictions(regression, everyone):
    """As heads that give their variance in float64, or predictions in bfloat16, do."""
    tables = []
    for dtype in (torch.float32, torch.float64):
        btw = BTW(NAMES, num_samples=60, sigma="head")
        heads = dict.fromkeys(NAMES, torch.zeros(60, dtype=dtype))
        btw.update(
            everyone, **regression.arguments(False), log_sigma=heads, fused_log_sigma=torch.ones(60, dtype=dtype)
        )
        tables.append(btw.table)
    oracles.assert_near(tables[1], tables[0], 1e-6)


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"index": torch.tensor([60])}, IndexError, "index out of range"),
        ({"fused": torch.zeros(4)}, ValueError, "unimodal and fused must be given together"),
        ({"unimodal": [torch.zeros(4)] * M}, ValueError, "unimodal and fused must be given together"),
        (
            {"index": torch.arange(4), "unimodal": [torch.zeros(4)] * M, "fused": torch.zeros(4)},
            ValueError,
            "index is for rows of the table",
        ),
        ({"present": torch.ones(4, 2, dtype=torch.bool)}, ValueError, "present must be bool"),
        ({"index": torch.arange(4), "present": torch.ones(4, M)}, ValueError, "present must be bool"),
    ],
)
def test_a_wrong_argument_of_weights_is_named(arguments, error, named):
    with pytest.raises(error, match=named):
        BTW(NAMES, num_samples=60).weights(**arguments)


@pytest.mark.parametrize(
    ("arguments", "error", "named"),
    [
        ({"index": torch.tensor([0, 1, 2, 60])}, IndexError, "index out of range"),
        ({"index": torch.arange(3)}, ValueError, r"weights must be \[N, M\] = \[4, 3\], got \[3, 3\]"),
        ({"weights": torch.ones(4, 2)}, ValueError, r"weights must be \[N, M\]"),
        ({"weights": torch.ones(M)}, ValueError, r"weights must be \[N, M\]"),
        ({"weights": torch.ones(4, M), "index": torch.arange(4)}, ValueError, "index and weights exclude each other"),
        ({"present": torch.ones(4, M)}, ValueError, "present must be bool"),
        ({"embeddings": [torch.ones(4, 2), torch.ones(5, 2), torch.ones(4, 2)]}, RuntimeError, r"embeddings\[1\] must"),
        ({"embeddings": [torch.ones(4, 2).long()] * M}, RuntimeError, r"embeddings\[0\] must be float32"),
    ],
)
def test_a_wrong_argument_of_apply_is_named(arguments, error, named):
    with pytest.raises(error, match=named):
        BTW(NAMES, num_samples=60).apply(**{"embeddings": [torch.ones(4, 2)] * M} | arguments)


def test_rows_of_a_table_that_is_not_there_are_an_error(regression):
    btw = BTW(NAMES, sigma="fitted")
    with pytest.raises(ValueError, match="index needs a table: give num_samples"):
        btw.weights(torch.arange(3))
    with pytest.raises(ValueError, match="index must be given if, and only if, num_samples was"):
        btw.update(torch.arange(60), **regression.arguments(False))


def test_a_metric_that_is_nan_is_an_error_and_changes_nothing():
    btw = BTW(NAMES, num_samples=2)
    btw.step(1.0)
    before = state(btw)
    with pytest.raises(ValueError, match="metric must be a number, got NaN"):
        btw.step(math.nan)
    assert_same(state(btw), before)
