"""The regulariser of attributions: values and gradients against other routes, finite differences, captum and what the
definition implies. Models, taps and training loops: test_methods_attribution_models.py.

Letters: B samples, M modalities, C classes.
"""

import math
import warnings
from itertools import pairwise

import pytest
import torch
import torch.nn.functional as F
from captum.attr import InputXGradient, IntegratedGradients
from torch import nn

import mmbal
from mmbal import AttributionRegularizer

F64 = {"dtype": torch.float64}
NAMES = ["audio", "video", "text"]
WIDTHS = {"audio": 6, "video": 5, "text": 4}
MODES = ["double", "forward", "difference"]


class Fused(nn.Module):
    """A hidden layer on all, with a product so that it is no sum of modalities."""

    def __init__(self, act=None, C=4):
        super().__init__()
        self.hidden, self.gate = nn.Linear(15, 12), nn.Linear(6, 12)
        self.act, self.out = nn.Tanh() if act is None else act, nn.Linear(12, C)

    def forward(self, audio, video, text):
        h = self.act(self.hidden(torch.cat([audio, video, text], -1)))
        return self.out(h * self.gate(audio).sigmoid())


def make_embeddings(B=7, seed=3, dtype=torch.float64):
    generator = torch.Generator().manual_seed(seed)
    return {name: torch.randn(B, D, generator=generator, **F64).to(dtype) for name, D in WIDTHS.items()}


def gradient(regularizer, *inputs, **options):
    """Of the value for all parameters of the head, as one vector; 0 where there is none."""
    parameters = list(regularizer.head_parameters())
    for p in parameters:
        p.grad = None
    value, _ = regularizer(*inputs, **options)
    regularizer.backward(value)
    return torch.cat([(torch.zeros_like(p) if p.grad is None else p.grad).flatten() for p in parameters])


def plain_score(z, c, score="odds"):
    s = z.gather(1, c[:, None]).squeeze(1)
    if score == "logit":
        return s
    others = torch.ones_like(z, dtype=torch.bool).scatter(1, c[:, None], False)
    return s - torch.stack([row[keep].logsumexp(0) for row, keep in zip(z, others, strict=True)])


def plain(head, embeddings, q=None, score="odds", target=None, pool="l2", penalty=torch.abs):
    """The definition, read slowly: (R [B], p [B, M])."""
    e = [x.detach().clone().requires_grad_() for x in embeddings.values()]
    z = head(*e)
    c = z.argmax(1) if target is None else target
    g = torch.autograd.grad(plain_score(z, c, score).sum(), e, create_graph=True)
    alpha = [(a * b.detach()).flatten(1) for a, b in zip(g, e, strict=True)]
    a = torch.stack([x.norm(dim=1) / (math.sqrt(x.shape[1]) if pool == "rms" else 1) for x in alpha], 1)
    p = a / a.sum(1, keepdim=True)
    q = torch.ones_like(p) if q is None else torch.as_tensor(q, **F64).expand_as(p)
    return penalty(p - q / q.sum(1, keepdim=True)).sum(1), p


def relative(a, b):
    return float((a - b).abs().max() / b.abs().max())


# --- Values and gradients ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("score", ["odds", "logit"])
@pytest.mark.parametrize("pool", ["l2", "rms"])
@pytest.mark.parametrize("q", [None, [0.5, 0.3, 0.2]])
def test_value_and_gradient_are_those_of_the_definition(score, pool, q):
    head, e = Fused().double(), make_embeddings()
    reg_B, p = plain(head, e, q, score, pool=pool)
    expected = torch.autograd.grad(reg_B.mean(), list(head.parameters()), allow_unused=True)
    expected = torch.cat([torch.zeros(p.numel(), **F64) if g is None else g.flatten()
                          for g, p in zip(expected, head.parameters(), strict=True)])  # fmt: skip
    regularizer = AttributionRegularizer(NAMES, head, score=score, pool=pool, shares=q)
    value, info = regularizer(e)
    assert value.item() == pytest.approx(reg_B.mean().item(), rel=1e-12)
    assert torch.allclose(info.shares, p, rtol=1e-12) and info.counted.all() and info.skipped == 0
    assert relative(gradient(regularizer, e), expected) < 1e-12


@pytest.mark.parametrize("penalty", ["squared", "huber"])
def test_smooth_penalties(penalty):
    head, e = Fused().double(), make_embeddings()
    function = {"squared": torch.square, "huber": lambda x: F.huber_loss(x, 0 * x, delta=0.1, reduction="none") * 10}
    reg_B, _ = plain(head, e, penalty=function[penalty])
    expected = torch.autograd.grad(reg_B.mean(), head.hidden.weight)[0]
    regularizer = AttributionRegularizer(NAMES, head, penalty=penalty, parameters=[head.hidden.weight])
    assert regularizer(e)[0].item() == pytest.approx(reg_B.mean().item(), rel=1e-12)
    assert relative(gradient(regularizer, e), expected.flatten()) < 1e-11


@pytest.mark.parametrize("act", [nn.Tanh(), nn.GELU(), nn.GELU("tanh")])
@pytest.mark.parametrize("options", [{}, {"score": "logit"}, {"level": "batch"}, {"attribution": "ig", "ig_steps": 3}])
def test_routes_agree(act, options):
    head, e = Fused(act).double(), make_embeddings()
    double, forward, difference = (
        gradient(AttributionRegularizer(NAMES, head, mode=mode, **options), e) for mode in MODES
    )
    assert relative(forward, double) < 1e-12
    assert relative(difference, double) < 1e-4


@pytest.mark.parametrize("mode", MODES)
def test_routes_agree_in_float32(mode):
    head, e = Fused(), make_embeddings()
    exact = gradient(AttributionRegularizer(NAMES, head.double()), e)
    single = gradient(AttributionRegularizer(NAMES, head.float(), mode=mode), make_embeddings(dtype=torch.float32))
    assert relative(single.double(), exact) < (1e-3 if mode == "difference" else 2e-5)


@pytest.mark.parametrize("score", ["odds", "logit"])
@pytest.mark.parametrize("C", [1, 2, 5])
@pytest.mark.parametrize("kind", ["concat", "sum"])
def test_the_closed_form_of_a_linear_head_is_the_double_route(score, C, kind):
    e = make_embeddings()
    if kind == "concat":
        head = nn.Linear(15, C, **F64)
    else:
        head = nn.ModuleDict({name: nn.Linear(D, C, **F64) for name, D in WIDTHS.items()})
    present = torch.rand(7, 3, generator=torch.Generator().manual_seed(2)) > 0.3
    for options in ({}, {"penalty": "huber", "pool": "rms", "shares": [1, 2, 3]}):
        closed, double = (
            AttributionRegularizer(NAMES, head, mode=mode, score=score, **options) for mode in ("closed", "double")
        )
        for given in ({}, {"present": present}, {"target": torch.arange(7) % C}):
            a, b = closed(e, **given), double(e, **given)
            assert a[0].item() == pytest.approx(b[0].item(), rel=1e-12)
            for x, y in zip(a[1][1:], b[1][1:], strict=True):
                assert torch.allclose(x.double(), y.double(), rtol=1e-12)
            assert relative(gradient(closed, e, **given), gradient(double, e, **given)) < 1e-12


def test_auto_is_closed_where_the_head_is_linear_and_reuses_the_logits(monkeypatch):
    head, e = nn.Linear(15, 4, **F64), make_embeddings()
    regularizer = AttributionRegularizer(NAMES, head)
    z = head(torch.cat(list(e.values()), 1))
    expected = gradient(AttributionRegularizer(NAMES, head, mode="double"), e)
    for _ in range(2):  # the first calls look whether they are the head's
        assert relative(gradient(regularizer, e, z), expected) < 1e-12
    monkeypatch.setattr(nn.Linear, "forward", None)
    assert relative(gradient(regularizer, e, z), expected) < 1e-12


def test_the_bias_of_the_last_layer_has_no_gradient_with_score_logit():
    head, e = nn.Linear(15, 4, **F64), make_embeddings()
    for mode in ("closed", "double", "forward"):
        head.bias.grad = None
        regularizer = AttributionRegularizer(NAMES, head, score="logit", mode=mode)
        regularizer.backward(regularizer(e)[0])
        assert head.bias.grad is None


@pytest.mark.parametrize("mode", ["double", "closed"])
def test_finite_differences_over_every_parameter_of_the_head(mode):
    head, e = (nn.Linear(15, 4, **F64) if mode == "closed" else Fused().double()), make_embeddings(5)
    regularizer, h = AttributionRegularizer(NAMES, head, mode=mode), 1e-6
    found, expected = gradient(regularizer, e), []
    with torch.no_grad():
        for p in head.parameters():
            for i in range(p.numel()):
                kept = p.view(-1)[i].item()
                ends = []
                for sign in (1, -1):
                    p.view(-1)[i] = kept + sign * h
                    ends.append(regularizer(e)[0].item())
                p.view(-1)[i] = kept
                expected.append((ends[0] - ends[1]) / (2 * h))
    assert (found - torch.tensor(expected, **F64)).abs().max() < 1e-8 * max(1, found.abs().max())


# --- captum -----------------------------------------------------------------------------------------------------------


def captum_shares(attributions):
    a = torch.stack([x.flatten(1).norm(dim=1) for x in attributions], 1).detach()
    return a / a.sum(1, keepdim=True)


@pytest.mark.parametrize("score", ["odds", "logit"])
@pytest.mark.parametrize("act", [nn.Tanh(), nn.ReLU()])
def test_shares_are_those_of_captum_input_x_gradient(score, act):
    head, e = Fused(act).double(), make_embeddings()
    c = head(*e.values()).argmax(1)
    method = InputXGradient(lambda *x: plain_score(head(*x), c, score))
    attributions = method.attribute(tuple(x.clone().requires_grad_() for x in e.values()))
    info = mmbal.attribution_shares(e, head=head, score=score)
    assert torch.allclose(info.shares, captum_shares(attributions), rtol=1e-12)
    assert torch.allclose(info.magnitudes, torch.stack([x.norm(dim=1) for x in attributions], 1), rtol=1e-12)


@pytest.mark.parametrize("based", [False, True])
def test_shares_are_those_of_captum_integrated_gradients(based):
    head, e = Fused().double(), make_embeddings()
    baseline = {name: x.mean(0, keepdim=True) for name, x in e.items()} if based else None
    c = head(*e.values()).argmax(1)
    method = IntegratedGradients(lambda *x: plain_score(head(*x[:3]), x[3]))
    attributions = method.attribute(
        tuple(e.values()),
        tuple(baseline.values()) if based else None,
        additional_forward_args=c,
        n_steps=9,
        method="riemann_middle",
    )
    info = mmbal.attribution_shares(e, head=head, attribution="ig", ig_steps=9, baseline=baseline)
    assert torch.allclose(info.shares, captum_shares(attributions), rtol=1e-10)


def test_integrated_gradients_of_a_linear_head_are_gradients_times_inputs():
    head, e = nn.Linear(15, 4, **F64), make_embeddings()
    for_values = [mmbal.attribution_shares(e, head=head, score="logit", attribution=a) for a in ("gradxinput", "ig")]
    assert torch.allclose(for_values[0].shares, for_values[1].shares, rtol=1e-12)


# --- What the definition implies --------------------------------------------------------------------------------------


def test_probability_log_probability_and_log_odds_have_one_regulariser():
    head, e = Fused().double(), make_embeddings()
    odds = AttributionRegularizer(NAMES, head)
    value, found = odds(e)[0].item(), gradient(odds, e)
    for transform in (lambda z: z.softmax(1), lambda z: z.log_softmax(1)):
        other = AttributionRegularizer(
            NAMES, lambda *x, f=transform: f(head(*x)), parameters=head.parameters(), score="logit"
        )
        assert other(e)[0].item() == pytest.approx(value, rel=1e-10)
        assert relative(gradient(other, e), found) < 1e-9


def test_permuted_modalities_have_permuted_shares():
    head, e = Fused().double(), make_embeddings()
    shares = mmbal.attribution_shares(e, head=head).shares
    order = ["text", "audio", "video"]
    other = mmbal.attribution_shares({n: e[n] for n in order}, head=lambda t, a, v: head(a, v, t))
    assert torch.allclose(other.shares, shares[:, [2, 0, 1]], rtol=1e-12)


def test_a_modality_that_comes_twice_splits_its_share():
    e = make_embeddings()
    twice = {"first": e["audio"], "second": e["audio"], "video": e["video"]}
    w, v = torch.randn(4, 6, **F64), torch.randn(4, 5, **F64)
    once = mmbal.attribution_shares([e["audio"], e["video"]], head=lambda a, b: a @ w.T + b @ v.T).magnitudes
    info = mmbal.attribution_shares(twice, head=lambda a, b, c: (a + b) / 2 @ w.T + c @ v.T)
    assert torch.allclose(info.shares[:, 0], info.shares[:, 1]) and torch.allclose(
        info.magnitudes[:, :2].sum(1), once[:, 0]
    )


def test_two_modalities_range_and_asked_shares_that_are_there():
    e = {name: make_embeddings()[name] for name in NAMES[:2]}
    regularizer = AttributionRegularizer(NAMES[:2], nn.Linear(11, 3, **F64), shares={"video": 3, "audio": 1})
    value, info = regularizer(e)
    assert value.item() == pytest.approx((2 * (info.shares[:, 0] - 0.25).abs()).mean().item(), rel=1e-12)
    assert 0 <= value.item() <= 2 * (1 - 0.25)
    again, _ = regularizer(e, shares=info.shares)
    assert again.item() == pytest.approx(0, abs=1e-15)


@pytest.mark.parametrize("mode", ["auto", "double"])
def test_the_scale_of_embeddings_and_scores_does_not_matter(mode):
    head, e = nn.Linear(15, 4, bias=False, **F64), make_embeddings()
    regularizer = AttributionRegularizer(NAMES, head, mode=mode, score="logit")
    value = regularizer(e)[0].item()
    for kappa in (1e-6, 1e6):
        assert regularizer({n: kappa * x for n, x in e.items()})[0].item() == pytest.approx(value, rel=1e-12)


def test_small_steps_bring_the_shares_to_those_asked_for():
    torch.manual_seed(0)
    head, e = nn.Linear(15, 4, **F64), make_embeddings(64)
    with torch.no_grad():
        head.weight[:, :6] *= 5
    regularizer = AttributionRegularizer(NAMES, head, penalty="squared", level="batch")
    values = []
    for _ in range(200):
        value, _ = regularizer(e, target=torch.arange(64) % 4)
        values.append(value.item())
        head.zero_grad()
        regularizer.backward(value)
        with torch.no_grad():
            for p in head.parameters():
                p -= 0.05 * p.grad
    assert all(b < a for a, b in pairwise(values)) and values[-1] < values[0] / 3


# --- Numbers ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["closed", "double", "forward"])
@pytest.mark.parametrize("margin", [5, 20, 60, 120])
def test_sure_decisions_have_the_shares_and_gradients_of_float64(mode, margin):
    torch.manual_seed(4)
    head, e = nn.Linear(15, 4), make_embeddings(9)
    with torch.no_grad():
        z = head.double()(torch.cat(list(e.values()), 1))
        top = z.topk(2).values
        e = {n: x * (margin / (top[:, :1] - top[:, 1:])) for n, x in e.items()}
    exact = AttributionRegularizer(NAMES, head, mode=mode)
    value, info = exact(e)
    found = gradient(exact, e)
    single = AttributionRegularizer(NAMES, head.float(), mode=mode)
    e = {n: x.float() for n, x in e.items()}
    assert single(e)[0].item() == pytest.approx(value.item(), rel=1e-4)
    assert torch.allclose(single(e)[1].shares.double(), info.shares, rtol=1e-4)
    assert gradient(single, e).isfinite().all() and relative(gradient(single, e).double(), found) < 1e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("scale", [1.0, 1e-3])
def test_half_precision_embeddings_have_the_shares_of_float32(dtype, scale):
    head, e = Fused(), {n: (scale * x).to(dtype) for n, x in make_embeddings(dtype=torch.float32).items()}
    with torch.no_grad():
        head.hidden.bias.zero_()
    half, single = (AttributionRegularizer(NAMES, head) for _ in range(2))
    value, info = half(e)
    expected, other = single({n: x.float() for n, x in e.items()})
    assert value.item() == pytest.approx(expected.item(), rel=1e-6) and torch.allclose(info.shares, other.shares)
    whole = mmbal.attribution_shares(e, head=head.to(dtype)).shares  # the head too
    assert torch.allclose(whole.float(), other.shares, atol=0.05)


# --- Kinks ------------------------------------------------------------------------------------------------------------


class Functional(nn.Module):
    def __init__(self, function):
        super().__init__()
        self.layer, self.function, self.out = nn.Linear(15, 12), function, nn.LazyLinear(4)

    def forward(self, *e):
        return self.out(self.function(self.layer(torch.cat(e, -1))))


@pytest.mark.parametrize(
    "function",
    [F.relu, F.leaky_relu, F.hardtanh, F.hardswish, torch.abs, lambda h: h.clamp_min(0), lambda h: F.max_pool1d(h, 2)],
)
def test_difference_refuses_heads_with_kinks_however_they_are_written(function):
    regularizer = AttributionRegularizer(NAMES, Functional(function), mode="difference")
    with pytest.raises(ValueError, match="mode must not be 'difference' where the head has kinks, got"):
        regularizer(make_embeddings(dtype=torch.float32))


def test_difference_refuses_modules_with_kinks_and_takes_kinks_of_what_is_no_embedding():
    e = make_embeddings(dtype=torch.float32)
    with pytest.raises(ValueError, match="got ReLU: differences across a kink"):
        AttributionRegularizer(NAMES, Fused(nn.ReLU()), mode="difference")(e)
    layer = nn.Linear(15, 4)
    positive = AttributionRegularizer(
        NAMES, lambda *x: F.linear(torch.cat(x, 1).tanh(), layer.weight.abs()), mode="difference",
        parameters=layer.parameters(),
    )  # fmt: skip
    assert gradient(positive, e).abs().max() > 0


def test_a_relu_head_has_the_double_route():
    head, e = Fused(nn.ReLU()).double(), make_embeddings()
    expected = torch.autograd.grad(plain(head, e)[0].mean(), head.hidden.weight)[0].flatten()
    for mode in ("auto", "forward"):
        regularizer = AttributionRegularizer(NAMES, head, mode=mode, parameters=[head.hidden.weight])
        assert relative(gradient(regularizer, e), expected) < 1e-12


# --- Missing modalities, padding, shapes ------------------------------------------------------------------------------


@pytest.mark.parametrize("head", [nn.Linear(15, 4, **F64), Fused().double()])
def test_missing_modalities_are_left_out_of_shares_and_of_what_is_asked(head):
    e, q = make_embeddings(4), torch.tensor([0.2, 0.3, 0.5])
    present = torch.tensor([[1, 1, 1], [1, 0, 1], [0, 1, 0], [0, 0, 0]]).bool()
    value, info = AttributionRegularizer(NAMES, head, shares=q)(e, present=present)
    full = mmbal.attribution_shares(e, head=head).magnitudes
    p = full[1] * present[1] / (full[1] * present[1]).sum()
    assert (
        torch.allclose(info.shares[1], p) and info.skipped == 2 and info.counted.tolist() == [True, True, False, False]
    )
    assert info.shares[2].tolist() == [0, 1, 0] and info.shares[3].tolist() == [0, 0, 0]
    whole = (full[0] / full[0].sum() - q).abs().sum()
    some = (p - torch.tensor([2 / 7, 0, 5 / 7])).abs().sum()
    assert value.item() == pytest.approx((whole + some).item() / 4, rel=1e-6)
    assert info.mean() == pytest.approx(dict(zip(NAMES, info.shares[:2].mean(0).tolist(), strict=True)))


@pytest.mark.parametrize("head", [nn.Linear(15, 4, **F64), Fused().double()])
def test_zero_embeddings_are_missing_and_gradients_stay_finite(head):
    e = make_embeddings()
    e["video"][2] = 0
    e["audio"][3] = 0
    e["video"][3] = 0
    regularizer = AttributionRegularizer(NAMES, head)
    value, info = regularizer(e)
    present = torch.ones(7, 3, dtype=torch.bool)
    present[2, 1] = present[3, 0] = present[3, 1] = False
    other, _ = regularizer(e, present=present)
    assert value.item() == other.item() and info.skipped == 1 and gradient(regularizer, e).isfinite().all()
    nothing, info = regularizer({n: torch.zeros_like(x) for n, x in e.items()})
    assert nothing.item() == 0 and info.skipped == 7 and math.isnan(info.mean()["audio"])


def test_samples_of_which_nothing_is_asked_are_skipped():
    regularizer = AttributionRegularizer(NAMES, nn.Linear(15, 4, **F64), shares=[1, 0, 0])
    present = torch.tensor([[True, True, True], [False, True, True]])
    value, info = regularizer(make_embeddings(2), present=present)
    assert info.counted.tolist() == [True, False]
    assert value.item() == pytest.approx((1 - info.shares[0, 0].item()), rel=1e-12)


@pytest.mark.parametrize("level", ["sample", "batch"])
@pytest.mark.parametrize("head", [nn.Linear(15, 4), Fused()])
def test_no_rows(level, head):
    regularizer = AttributionRegularizer(NAMES, head, level=level)
    value, info = regularizer(make_embeddings(0, dtype=torch.float32))
    assert value.item() == 0 and info.shares.shape == (0, 3) and info.skipped == 0


def test_the_level_of_the_batch():
    head, e = Fused().double(), make_embeddings()
    present = torch.ones(7, 3, dtype=torch.bool)
    present[0, 2] = present[1, 0] = present[1, 1] = False
    value, info = AttributionRegularizer(NAMES, head, level="batch", shares=[1, 1, 2])(e, present=present)
    a = mmbal.attribution_shares(e, head=head).magnitudes
    rows = present & (present.sum(1) > 1)[:, None]
    means = torch.stack([a[rows[:, m], m].mean() for m in range(3)])
    assert value.item() == pytest.approx((means / means.sum() - torch.tensor([0.25, 0.25, 0.5])).abs().sum().item())
    assert info.skipped == 1


@pytest.mark.parametrize("pool", ["l2", "rms"])
def test_token_grids_with_padding_are_those_without_it(pool):
    torch.manual_seed(2)
    layer, out = nn.Linear(6, 8, **F64), nn.Linear(8, 3, **F64)

    def head(tokens, vector, mask=None):
        hidden = layer(tokens).tanh()
        if mask is not None:
            hidden = hidden * mask[:, :, None]
        return out(hidden.sum(1) * vector)

    tokens, vector = torch.randn(2, 4, 6, **F64), torch.randn(2, 8, **F64)
    mask = torch.tensor([[True, True, False, False], [True, True, True, False]])
    tokens[~mask] = 7
    options = {"parameters": [*layer.parameters(), *out.parameters()], "pool": pool}
    padded = AttributionRegularizer(["t", "v"], lambda t, v: head(t, v, mask), **options)
    value, info = padded([tokens, vector], masks={"t": mask})
    found = gradient(padded, [tokens, vector], masks={"t": mask})
    each = AttributionRegularizer(["t", "v"], head, **options)
    rows = [([tokens[b : b + 1, :n], vector[b : b + 1]]) for b, n in enumerate((2, 3))]
    assert value.item() == pytest.approx(sum(each(r)[0].item() for r in rows) / 2, rel=1e-12)
    assert torch.allclose(info.shares, torch.cat([each(r)[1].shares for r in rows]), rtol=1e-12)
    assert relative(found, sum(gradient(each, r) for r in rows) / 2) < 1e-12


def test_logits_of_many_positions_and_of_one_output():
    e = [torch.randn(5, 3, 6, **F64), torch.randn(5, 3, 6, **F64)]
    heads = nn.ModuleList([nn.Linear(6, 4, **F64), nn.Linear(6, 4, **F64)])
    info = mmbal.attribution_shares(e, head=lambda a, b: heads[0](a).tanh() + heads[1](b))
    leaves = [x.clone().requires_grad_() for x in e]
    z = heads[0](leaves[0]).tanh() + heads[1](leaves[1])
    s = plain_score(z.flatten(0, 1), z.flatten(0, 1).argmax(1)).view(5, 3).mean(1)
    g = torch.autograd.grad(s.sum(), leaves)
    a = torch.stack([(x * y).flatten(1).norm(dim=1) for x, y in zip(g, e, strict=True)], 1)
    assert torch.allclose(info.magnitudes, a, rtol=1e-12)
    flat = make_embeddings()
    line = Fused(C=1).double()
    one = mmbal.attribution_shares(flat, head=lambda *x: line(*x).squeeze(1))
    assert torch.equal(one.shares, mmbal.attribution_shares(flat, head=line).shares)
    assert torch.allclose(one.shares, mmbal.attribution_shares(flat, head=lambda *x: 3 - 2 * line(*x)).shares)


def test_labels_instead_of_decisions_and_the_first_of_equal_logits():
    head, e = Fused().double(), make_embeddings()
    labels = torch.tensor([0, 1, 2, 3, -100, 1, 2])
    info = mmbal.attribution_shares(e, head=head, target=labels)
    c = torch.where(labels < 0, head(*e.values()).argmax(1), labels)
    assert torch.allclose(info.shares, plain(head, e, target=c)[1], rtol=1e-12)
    equal = nn.Linear(15, 4, **F64)
    with torch.no_grad():
        equal.bias.fill_(1)
        equal.weight[2:] = equal.weight[:2]
    closed, double = (AttributionRegularizer(NAMES, equal, mode=mode)(e)[1] for mode in ("closed", "double"))
    assert torch.allclose(closed.shares, double.shares, rtol=1e-12)


def test_a_modality_that_the_head_ignores_has_no_share():
    layer = nn.Linear(6, 4, **F64)
    regularizer = AttributionRegularizer(NAMES, lambda a, v, t: layer(a.tanh()), parameters=layer.parameters())
    value, info = regularizer(make_embeddings())
    assert torch.equal(info.shares[:, 0], torch.ones(7, **F64)) and value.item() == pytest.approx(4 / 3)
    assert gradient(regularizer, make_embeddings()).isfinite().all()


def test_a_baseline_takes_out_a_common_offset():
    head, e = nn.Linear(15, 4, **F64), make_embeddings()
    moved = {**e, "video": e["video"] + 50}
    with torch.no_grad():
        shift = head.weight[:, 6:11].sum(1) * 50
    other = nn.Linear(15, 4, **F64)
    with torch.no_grad():
        other.weight.copy_(head.weight)
        other.bias.copy_(head.bias - shift)
    baseline = {"audio": torch.zeros(6), "video": torch.full((5,), 50.0), "text": torch.zeros(4)}
    plain_shares = mmbal.attribution_shares(e, head=head).shares
    assert mmbal.attribution_shares(moved, head=other).shares[:, 1].min() > plain_shares[:, 1].max()
    assert torch.allclose(mmbal.attribution_shares(moved, head=other, baseline=baseline).shares, plain_shares)


def test_sizes_that_differ_much_are_told_once():
    regularizer = AttributionRegularizer(["a", "b"], nn.Linear(11, 2))
    e = [torch.randn(3, 9), torch.randn(3, 2)]
    with pytest.warns(UserWarning, match=r"embeddings of \[9, 2\] elements a sample"):
        regularizer(e)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        regularizer(e)
        AttributionRegularizer(["a", "b"], nn.Linear(11, 2), pool="rms")(e)
