"""attribution_linear against double backward through a real nn.Linear, and where double backward has no digits left."""

import pytest
import torch

import mmbal  # noqa: F401  (loads the operators)
import oracles

ops = torch.ops.mmbal
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
F64 = {"dtype": torch.float64}
BOUND = {torch.float64: 1e-12, torch.float32: 2e-5}


class Case:
    """A head over the concatenated embeddings of B samples, and what is asked of it."""

    def __init__(self, B=12, C=5, sizes=(4, 7, 3), dtype=torch.float64, seed=0):
        torch.manual_seed(seed)
        self.head = torch.nn.Linear(sum(sizes), C, **F64)
        self.e = [torch.randn(B, d, **F64).to(dtype) for d in sizes]
        with torch.no_grad():  # what is stored is exact in float64
            self.head.weight.copy_((2 * self.head.weight).to(dtype))
        self.target = torch.rand(B, len(sizes), **F64) + 0.1
        self.present = torch.rand(B, len(sizes)).argsort(1) < max(2, len(sizes) - 1)
        self.dreg = torch.randn(B, **F64).to(torch.float64 if dtype == torch.float64 else torch.float32)
        self.sizes, self.dtype = list(sizes), dtype
        self.logits = self.head(torch.cat([t.double() for t in self.e], 1)).detach().to(dtype)

    def weights(self):
        return [w.to(self.dtype) for w in self.head.weight.detach().split(self.sizes, 1)]

    def call(self, *options, **named):
        return ops.attribution_linear(self.e, self.weights(), self.logits, self.target, self.dreg, *options, **named)

    def double_backward(self, present=None, classes=None, score="odds", pool="l2", penalty="l1", scalar=None):
        """The same by autograd alone, of the logits that the operator was given."""
        e = [t.double().requires_grad_() for t in self.e]
        z = self.head(torch.cat(e, 1))
        z = z + (self.logits.double() - z).detach()
        chosen = z.argmax(1) if classes is None else classes
        top = z.gather(1, chosen[:, None])[:, 0]
        others = z.scatter(1, chosen[:, None], -torch.inf).logsumexp(1)
        if scalar is not None:
            s = scalar(z)
        elif score == "logit":
            s = top
        else:
            s = top.abs() if z.shape[1] == 1 else top - others
        g = torch.autograd.grad(s.sum(), e, create_graph=True)
        squares = torch.stack([(one * other).square().sum(1) for one, other in zip(g, e, strict=True)], 1)
        if pool == "rms":
            squares = squares / torch.tensor(self.sizes)
        mask = torch.ones_like(self.target) if present is None else present.double()
        a = squares.sqrt() * mask
        p, q = a / a.sum(1, keepdim=True), self.target * mask / (self.target * mask).sum(1, keepdim=True)
        x = p - q
        psi = {"l1": x.abs(), "squared": x**2, "huber": torch.where(x.abs() > 0.1, x.abs() - 0.05, 5 * x**2)}[penalty]
        reg = (psi * mask).sum(1)
        parameters = (self.head.weight, self.head.bias)
        d = torch.autograd.grad((reg * self.dreg.double()).sum(), parameters, allow_unused=True)
        dweight, dbias = (torch.zeros_like(of) if t is None else t for t, of in zip(d, parameters, strict=True))
        return reg, p, a, list(dweight.split(self.sizes, 1)), dbias


def assert_same(got, expected, bound, dtype=torch.float64):
    whole = max(t.abs().max().item() for t in expected[3])
    for one, other in zip(got[:3], expected[:3], strict=True):
        assert one.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        oracles.assert_near(one, other, min(bound, 2e-5))
    for one, other in zip([*got[3], got[4]], [*expected[3], expected[4]], strict=True):
        assert one.dtype == dtype and one.shape == other.shape
        assert (one.double() - other).abs().max() <= bound * whole


@pytest.mark.parametrize("penalty", ["l1", "squared", "huber"])
@pytest.mark.parametrize("pool", ["l2", "rms"])
@pytest.mark.parametrize("score", ["odds", "logit"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_it_is_double_backward_through_the_head(dtype, score, pool, penalty, poisoned_memory):
    for B, C, sizes in ((12, 5, (4, 7, 3)), (1, 2, (3, 2)), (5, 1, (6, 1)), (40, 30, (70, 33)), (3, 3, (1, 1, 1, 1))):
        case = Case(B, C, sizes, dtype)
        bound = BOUND.get(dtype, oracles.FORWARD_TOLERANCE[dtype])
        for present in (None, case.present):
            for classes in (None, torch.randint(C, (B,))):
                arguments = (present, classes, score, pool, penalty)
                assert_same(case.call(*arguments), case.double_backward(*arguments), bound, dtype)


@pytest.mark.parametrize("seed", range(3))
def test_probability_and_its_logarithm_are_one_regulariser_with_the_odds(seed):
    case = Case(seed=seed)
    got = case.call()
    for scalar in (lambda z: z.softmax(1).max(1).values, lambda z: z.log_softmax(1).max(1).values):
        expected = list(case.double_backward(scalar=scalar))
        assert (expected[2] - got[2]).abs().max() > 0.1  # magnitudes alone are different
        expected[2] = got[2]
        assert_same(got, expected, 1e-10)
    assert (got[0] - case.call(score="logit")[0]).abs().max() > 1e-3


@pytest.mark.parametrize("margin", [5, 20, 60, 120])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_margin_saturates(dtype, margin):
    case = Case(dtype=dtype)
    case.logits[torch.arange(12), torch.randint(5, (12,))] = case.logits.max() + margin
    got = case.call()
    assert all(t.isfinite().all() for t in (*got[:3], *got[3], got[4])) and got[4].any()
    assert_same(got, case.double_backward(), BOUND.get(dtype, oracles.FORWARD_TOLERANCE[dtype]), dtype)


def test_equal_logits_choose_the_first_class():
    case = Case(C=4)
    case.logits[:, 1] = case.logits[:, 3] = 9
    got, first, last = (case.call(classes=c) for c in (None, torch.full((12,), 1), torch.full((12,), 3)))
    assert all(torch.equal(one, other) for one, other in zip([*got[:3], *got[3]], [*first[:3], *first[3]], strict=True))
    assert not torch.equal(got[0], last[0])


def test_bias_has_no_gradient_with_one_class_or_two_or_of_a_logit():
    for case in (Case(C=1), Case(C=2)):
        assert not case.call()[4].any() and case.call()[3][0].any()
    assert not Case().call(score="logit")[4].any()
    assert Case().call()[4].any() and Case().call()[4].sum().abs() < 1e-14


def test_small_steps_down_the_gradient_lead_to_the_target():
    case = Case(C=3)
    case.dreg.fill_(1 / 12)
    options = {"penalty": "squared", "classes": case.logits.argmax(1)}
    before = last = case.call(**options)[0].mean().item()
    for _ in range(300):
        _, _, _, dweights, dbias = case.call(**options)
        with torch.no_grad():
            case.head.weight -= 0.1 * torch.cat(dweights, 1)
            case.head.bias -= 0.1 * dbias
            case.logits = case.head(torch.cat(case.e, 1))
        now = case.call(**options)[0].mean().item()
        assert now <= last + 1e-12
        last = now
    assert last < 0.5 * before


def test_shapes_of_any_rank_and_layout_and_no_rows_are_served():
    case = Case(sizes=(6, 4))
    expected = case.call()
    dweights = expected[3]
    case.e = [case.e[0].view(12, 2, 3), case.e[1].T.contiguous().T]
    case.logits = torch.stack([case.logits, case.logits], -1)[..., 0]
    got = case.call()
    assert torch.equal(got[0], expected[0]) and all(map(torch.equal, got[3], dweights))
    assert torch.equal(got[4], expected[4])
    weights = [w.T.contiguous().T for w in case.weights()]
    again = ops.attribution_linear(case.e, weights, case.logits, case.target, case.dreg)
    assert all(map(torch.equal, again[3], dweights))
    empty = ops.attribution_linear(
        [t[:0] for t in case.e], weights, case.logits[:0], case.target[0], case.dreg[:0], case.present[:0]
    )
    assert empty[0].shape == (0,) and empty[1].shape == (0, 2)
    assert not any(t.any() for t in (*empty[3], empty[4]))


@pytest.mark.parametrize("dtype", DTYPES)
def test_weights_side_by_side_give_gradients_side_by_side(dtype, poisoned_memory):
    case = Case(20, 6, (40, 7, 3), dtype)
    each = case.call(case.present)
    whole = torch.cat(case.weights(), 1)
    joined = ops.attribution_linear(case.e, [whole], case.logits, case.target, case.dreg, case.present)
    assert all(map(torch.equal, each[:3], joined[:3])) and torch.equal(each[4], joined[4])
    assert len(joined[3]) == 1 and torch.equal(torch.cat(each[3], 1), joined[3][0])


def test_a_class_that_is_far_behind_counts_as_nothing_in_float32():
    """Its probability would make products of subnormal numbers, which processors are slow at."""
    case = Case(40, 30, (70, 33), torch.float32)
    case.logits[:, 7] = -100
    assert_same(case.call(), case.double_backward(), 2e-5, torch.float32)
    assert not any(dweight[7].any() for dweight in case.call()[3]) and case.call()[4][7] == 0
    double = Case(40, 30, (70, 33))
    double.logits[:, 7] = -100
    assert double.call()[3][0][7].any()


def test_results_do_not_depend_on_threads(at_each_thread_count):
    case = Case(700, 40, (130, 65), torch.float32)

    def run():
        reg, shares, magnitudes, dweights, dbias = case.call(case.present)
        return [reg, shares, magnitudes, *dweights, dbias]

    at_each_thread_count(run)


def test_opcheck_and_compile():
    case = Case(dtype=torch.float32)
    arguments = (case.e, case.weights(), case.logits, case.target, case.dreg)
    torch.library.opcheck(ops.attribution_linear.default, arguments)
    classes = torch.zeros(12, dtype=torch.int64)
    torch.library.opcheck(ops.attribution_linear.default, (*arguments, case.present, classes, "logit", "rms"))
    compiled = torch.compile(lambda *a: ops.attribution_linear(*a), fullgraph=True, backend="aot_eager")
    got, expected = compiled(*arguments), case.call()
    flat = [[*r[:3], *r[3], r[4]] for r in (got, expected)]
    assert all(map(torch.equal, *flat))


def test_autocast_takes_activations_and_weights_in_float32():
    case = Case(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ops.attribution_linear(
            [t.bfloat16() for t in case.e], case.weights(), case.logits.bfloat16(), case.target, case.dreg
        )
        doubles = Case().call()
    case.e, case.logits = [t.bfloat16().float() for t in case.e], case.logits.bfloat16().float()
    assert all(map(torch.equal, got[:3], case.call()[:3])) and all(map(torch.equal, got[3], case.call()[3]))
    assert doubles[0].dtype == torch.float64


def test_a_backward_through_it_is_refused_and_not_silently_nothing():
    case = Case()
    weights = [w.requires_grad_() for w in case.weights()]
    reg = ops.attribution_linear(case.e, weights, case.logits, case.target, case.dreg)[0]
    with pytest.raises(RuntimeError, match="attribution_linear has no derivative"):
        reg.sum().backward()


E, W = [torch.randn(4, 3), torch.randn(4, 5)], [torch.randn(6, 3), torch.randn(6, 5)]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": [E[0], E[1].half()]}, r"embeddings\[1\] must be float32, got float16"),
        ({"embeddings": [E[0], E[1][:3]]}, r"embeddings\[1\] must be \[B, ...\] = \[4, ...\].*got \[3, 5\]"),
        ({"weights": [*W, W[0]]}, "weights must have one tensor for each of the embeddings, 2, or one for all, got 3"),
        ({"weights": W[:1]}, r"weights\[0\] must be \[C, sum of d\] = \[6, 8\], got \[6, 3\]"),
        ({"weights": [W[0], W[0]]}, r"weights\[1\] must be \[C, d\] = \[6, 5\], got \[6, 3\]"),
        ({"weights": [W[0], W[1].double()]}, r"weights\[1\] must be float32, got float64"),
        ({"logits": torch.zeros(3, 6)}, r"logits must be \[B, C\] = \[4, \*\], got \[3, 6\]"),
        ({"logits": torch.zeros(4, 6).double()}, "logits must be float32, got float64"),
        ({"logits": torch.zeros(4, 0)}, r"logits must have at least one class, got \[4, 0\]"),
        ({"target_shares": torch.ones(3)}, r"target_shares must be \[M\] = \[2\], got \[3\]"),
        ({"target_shares": -torch.ones(2)}, "target_shares must be finite and not negative"),
        ({"dreg": torch.ones(3)}, r"dreg must be \[B\] = \[4\], got \[3\]"),
        ({"dreg": torch.ones(4).double()}, "dreg must be float32, got float64"),
        ({"present": torch.ones(4, 2)}, "present must be bool, got float32"),
        ({"classes": torch.zeros(3).long()}, r"classes must be \[B\] = \[4\], got \[3\]"),
        ({"classes": torch.zeros(4).int()}, "classes must be int64, got int32"),
        ({"classes": torch.tensor([0, 5, 6, 0])}, "classes must be from 0 to C - 1 = 5"),
        ({"classes": torch.tensor([0, 5, -1, 0])}, "classes must be from 0 to C - 1 = 5"),
        ({"score": "prob"}, "score must be odds or logit, got prob"),
        ({"pool": "mean"}, "pool must be l2 or rms, got mean"),
        ({"penalty": "l2"}, "penalty must be l1, squared or huber, got l2"),
        ({"eps": 1.0}, "eps must be from 0 to below 1, got 1"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"embeddings": E, "weights": W, "logits": torch.zeros(4, 6), "target_shares": torch.ones(2)}
    with pytest.raises(RuntimeError, match="attribution_linear: " + message):
        ops.attribution_linear(**(arguments | {"dreg": torch.ones(4)} | change))


@pytest.mark.parametrize("name", ["embeddings", "weights", "logits", "target_shares", "dreg", "present", "classes"])
def test_an_argument_elsewhere_is_named(name):
    arguments = {"embeddings": E, "weights": W, "logits": torch.zeros(4, 6), "target_shares": torch.ones(2)}
    arguments |= {"dreg": torch.ones(4), "present": torch.ones(4, 2).bool(), "classes": torch.zeros(4).long()}
    moved = arguments[name]
    moved = [moved[0], moved[1].to("meta")] if isinstance(moved, list) else moved.to("meta")
    with pytest.raises(RuntimeError, match=rf"attribution_linear: {name}.* must be on|must be on .*{name}"):
        ops.attribution_linear(**(arguments | {name: moved}))
