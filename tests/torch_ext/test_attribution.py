"""Attributions and their regulariser against plain torch in float64; a linear head's against double backward."""

import math

import pytest
import torch

import mmbal  # noqa: F401  (loads the operators)
import oracles

ops = torch.ops.mmbal
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
POOLS, PENALTIES = ["l2", "rms"], ["l1", "squared", "huber"]
F64 = {"dtype": torch.float64}
SHAPES = [(3,), (4, 5), (1,)]  # of one sample of each modality
BOUND = {torch.float64: 1e-13}  # of sums; 1e-6 in float32


def real(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def example(B=20, shapes=SHAPES, dtype=torch.float64, seed=0):
    """Gradients, embeddings, targets [B, M] and a mask of at least two modalities a sample."""
    generator = torch.Generator().manual_seed(seed)
    g, e = ([torch.randn(B, *shape, generator=generator, **F64).to(dtype) for shape in shapes] for _ in range(2))
    target = torch.rand(B, len(shapes), generator=generator, **F64) + 0.1
    present = torch.rand(B, len(shapes), generator=generator).argsort(1) < max(2, len(shapes) - 1)
    return g, e, target, present


def magnitudes_of(g, e, pool="l2"):
    squares = [(one.double() * other.double()).flatten(1).square() for one, other in zip(g, e, strict=True)]
    return torch.stack([(s.sum(1) if pool == "l2" else s.mean(1)).sqrt() for s in squares], 1)


def penalty_of(x, penalty):
    if penalty == "squared":
        return x**2
    return x.abs() if penalty == "l1" else torch.where(x.abs() > 0.1, x.abs() - 0.05, 5 * x**2)


def plain(g, e, target, present=None, pool="l2", penalty="l1"):
    """The formulas, with any autograd torch has; no sample may be without attributions."""
    mask = torch.ones(len(g[0]), len(g), **F64) if present is None else present.double()
    a = magnitudes_of(g, e, pool) * mask
    p = a / a.sum(1, keepdim=True)
    q = target.double() * mask / (target.double() * mask).sum(1, keepdim=True)
    return (penalty_of(p - q, penalty) * mask).sum(1), p, a


def upstream(outputs):
    generator = torch.Generator().manual_seed(7)
    return [torch.randn(t.shape, generator=generator, **F64).to(t.dtype) for t in outputs]


def leaves(*lists):
    return [[t.detach().clone().requires_grad_() for t in tensors] for tensors in lists]


# --- the regulariser --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shapes", [[(1,), (1,)], SHAPES, [(700,), (33, 3), (2, 3, 4), (8,), (1,)]])
def test_it_is_the_formula_and_so_are_its_gradients(shapes, dtype, pool, penalty, poisoned_memory):
    g, e, target, present = example(shapes=shapes, dtype=dtype)
    for mask in (None, present):
        for asked in (target, target[0], target[0].float()):
            (got_g, got_e), exact = leaves(g, e), leaves([t.double() for t in g], [t.double() for t in e])
            got = ops.attribution_reg(got_g, got_e, asked, mask, pool, penalty)
            expected = plain(*exact, asked, mask, pool, penalty)
            for one, other in zip(got, expected, strict=True):
                assert one.dtype == real(dtype)
                oracles.assert_near(one, other, BOUND.get(dtype, 1e-6))
            d = torch.autograd.grad(got, [*got_g, *got_e], upstream(got))
            wanted = torch.autograd.grad(expected, [*exact[0], *exact[1]], [t.double() for t in upstream(got)])
            for one, other in zip(d, wanted, strict=True):
                assert one.dtype == dtype
                bound = {torch.float64: 1e-11, torch.float32: 1e-5}
                oracles.assert_near(one, other, bound.get(dtype, oracles.FORWARD_TOLERANCE[dtype]))


def test_values_that_can_be_worked_out_by_hand():
    g = [torch.tensor([[1.0, 2.0]], **F64), torch.tensor([[-1.0]], **F64), torch.tensor([[0.5]], **F64)]
    e = [torch.tensor([[3.0, 2.0]], **F64), torch.tensor([[3.0]], **F64), torch.tensor([[4.0]], **F64)]
    ones = torch.ones(3, **F64)  # alpha: (3, 4), -3, 2; magnitudes 5, 3, 2
    reg, shares, magnitudes = ops.attribution_reg(g, e, ones)
    assert magnitudes.tolist() == [[5, 3, 2]]
    assert shares.tolist() == [[0.5, 0.3, 0.2]]
    assert reg.item() == pytest.approx(1 / 3, abs=1e-15)
    assert ops.attribution_reg(g, e, ones, None, "l2", "squared")[0].item() == pytest.approx(0.38 - 1 / 3, abs=1e-15)
    huber = (1 / 6 - 0.05) + 5 / 30**2 + (2 / 15 - 0.05)
    assert ops.attribution_reg(g, e, ones, None, "l2", "huber")[0].item() == pytest.approx(huber, abs=1e-15)
    assert ops.attribution_reg(g, e, ones, None, "rms")[2][0, 0].item() == pytest.approx(5 / math.sqrt(2), abs=1e-15)
    reg, shares, _ = ops.attribution_reg(g, e, torch.tensor([1.0, 3.0, 9.0]), torch.tensor([[True, True, False]]))
    assert shares.tolist() == [[0.625, 0.375, 0]] and reg.item() == 0.75


def away_from_jumps():
    """An example no finite difference of which passes a kink or comes near to a magnitude of 0."""
    g, e, target, present = example(B=3, shapes=[(3,), (2, 2), (1,)], seed=3)
    assert magnitudes_of(g, e).min() > 0.02
    for mask in (torch.ones_like(target), present):
        _, p, _ = plain(g, e, target, mask)
        off = (p - target * mask / (target * mask).sum(1, keepdim=True)).abs()
        assert ((off > 1e-3) | (mask == 0)).all() and ((off - 0.1).abs() > 1e-3).all()
    return g, e, target, present


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("pool", POOLS)
@pytest.mark.parametrize("masked", [False, True])
def test_gradcheck_and_gradgradcheck(masked, pool, penalty):
    g, e, target, present = away_from_jumps()
    inputs = [t.requires_grad_() for t in (*g, *e)]

    def call(*tensors):
        return ops.attribution_reg(tensors[:3], tensors[3:], target, present if masked else None, pool, penalty)

    assert torch.autograd.gradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(call, inputs)
    assert torch.autograd.gradgradcheck(lambda *t: call(*t)[0], inputs)


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("dtype", DTYPES)
def test_second_derivatives_are_those_of_plain_torch(dtype, penalty):
    g, e, target, present = example(dtype=dtype)
    results = []
    for function, convert in ((ops.attribution_reg, lambda t: t), (plain, torch.Tensor.double)):
        (g_of, e_of) = leaves([convert(t) for t in g], [convert(t) for t in e])
        out = function(g_of, e_of, target, present, "rms", penalty)
        up = [convert(t).requires_grad_() for t in upstream(ops.attribution_reg(g, e, target))]
        first = torch.autograd.grad(
            out, [*g_of, *e_of], [t.to(o.dtype) for t, o in zip(up, out, strict=True)], create_graph=True
        )
        along = [convert(t) for t in upstream([*g, *e])]
        results.append(torch.autograd.grad(first, [*g_of, *e_of, *up], along))
    bound = {torch.float64: 1e-10, torch.float32: 2e-5, torch.float16: 4e-3}
    for one, other in zip(*results, strict=True):
        oracles.assert_near(one, other, bound.get(dtype, 2e-2))


@pytest.mark.parametrize("needed", [(0,), (4,), (0, 5), (2, 3)])
def test_only_the_gradients_that_are_needed_are_returned(needed):
    g, e, target, present = example()
    every = [t.clone().requires_grad_() for t in (*g, *e)]
    expected = torch.autograd.grad(ops.attribution_reg(every[:3], every[3:], target, present)[0].sum(), every)
    some = [t.clone().requires_grad_(i in needed) for i, t in enumerate((*g, *e))]
    reg = ops.attribution_reg(some[:3], some[3:], target, present)[0]
    got = torch.autograd.grad(reg.sum(), [some[i] for i in needed])
    assert all(torch.equal(one, expected[i]) for one, i in zip(got, needed, strict=True))


def test_each_output_alone_has_its_gradient():
    for which in range(3):
        (g, e), exact = leaves(*example()[:2]), leaves(*example()[:2])
        _, _, target, _ = example()
        weights = upstream(plain(*exact, target))[which]
        got = torch.autograd.grad((ops.attribution_reg(g, e, target)[which] * weights).sum(), [*g, *e])
        expected = torch.autograd.grad((plain(*exact, target)[which] * weights).sum(), [*exact[0], *exact[1]])
        for one, other in zip(got, expected, strict=True):
            oracles.assert_near(one, other, 1e-11)


def test_the_third_order_is_refused():
    g, e = leaves(*example(B=3)[:2])
    target = torch.ones(3)
    first = torch.autograd.grad(ops.attribution_reg(g, e, target, penalty="squared")[0].sum(), g, create_graph=True)
    second = torch.autograd.grad(sum(t.square().sum() for t in first), g, create_graph=True)
    with pytest.raises(RuntimeError, match="attribution_reg_backward_backward has no derivative"):
        sum(t.sum() for t in second).backward()


# --- what must hold whatever the numbers are (section 7 of the specification) -----------------------------------------


@pytest.mark.parametrize("penalty", PENALTIES)
@pytest.mark.parametrize("pool", POOLS)
def test_scaling_a_sample_changes_nothing_and_gradients_are_across_it(pool, penalty):
    g, e, target, present = example()
    reg, shares, _ = ops.attribution_reg(g, e, target, present, pool, penalty)
    scale = torch.rand(20, **F64) * 1e3 + 1e-3
    for grow_g, grow_e in ((scale, 1 / scale), (scale, torch.ones(20)), (torch.ones(20), scale)):
        grown = [[t * by.view(-1, *[1] * (t.dim() - 1)) for t in tensors] for tensors, by in ((g, grow_g), (e, grow_e))]
        other_reg, other_shares, _ = ops.attribution_reg(*grown, target, present, pool, penalty)
        assert (reg - other_reg).abs().max() <= 1e-14 and (shares - other_shares).abs().max() <= 1e-14
    for tensors in leaves(g, e):
        moved = (tensors, e) if tensors[0].equal(g[0]) else (g, tensors)
        v = torch.autograd.grad(ops.attribution_reg(*moved, target, present, pool, penalty)[0].sum(), tensors)
        along = sum((one * t).flatten(1).sum(1) for one, t in zip(v, tensors, strict=True))
        assert along.abs().max() <= 1e-13


def test_the_order_of_modalities_is_that_of_the_shares():
    g, e, target, present = example()
    reg, shares, magnitudes = ops.attribution_reg(g, e, target, present)
    order = [2, 0, 1]
    turned = ops.attribution_reg([g[i] for i in order], [e[i] for i in order], target[:, order], present[:, order])
    assert (turned[0] - reg).abs().max() <= 1e-15 and (turned[1] - shares[:, order]).abs().max() <= 1e-15
    assert torch.equal(turned[2], magnitudes[:, order])


def test_a_modality_given_twice_splits_its_share():
    g, e, target, _ = example()
    _, shares, magnitudes = ops.attribution_reg(g, e, target)
    _, twice, _ = ops.attribution_reg([*g, g[0]], [*e, e[0]], torch.ones(4))
    assert torch.equal(twice[:, 0], twice[:, 3])
    expected = magnitudes / (magnitudes.sum(1, keepdim=True) + magnitudes[:, :1])
    assert (twice[:, :3] - expected).abs().max() <= 1e-15
    assert (twice[:, 0] < shares[:, 0]).all()


def test_the_regulariser_has_its_range_and_is_zero_at_the_target():
    for M in (2, 3, 6):
        g, e, target, _ = example(B=500, shapes=[(2,)] * M)
        reg, shares, _ = ops.attribution_reg(g, e, torch.ones(M))
        assert (reg >= 0).all() and (reg <= 2 * (M - 1) / M + 1e-15).all()
        asked = target / target.sum(1, keepdim=True)
        reg = ops.attribution_reg(g, e, target)[0]
        assert (reg <= 2 * (1 - asked.min(1).values) + 1e-15).all()
        for penalty in PENALTIES:
            at = ops.attribution_reg(g, e, shares, None, "l2", penalty)[0]
            assert (at.abs() <= 1e-14).all()
    g, e, target, _ = example(B=500, shapes=[(2,), (3,)])
    reg, shares, _ = ops.attribution_reg(g, e, target)
    assert (reg - 2 * (shares[:, 0] - target[:, 0] / target.sum(1)).abs()).abs().max() <= 1e-15


def test_samples_of_nothing_and_of_one_modality_do_not_move():
    g, e, target, _ = example(B=4)
    present = torch.tensor([[True] * 3, [True] * 3, [False, True, False], [False] * 3])
    g[0][1], g[1][1], e[2][1] = 0, 0, 0
    e[0][0] = 0  # one modality at 0
    g, e = leaves(g, e)
    out = ops.attribution_reg(g, e, target, present)
    q = target[1] / target[1].sum()
    assert out[0][1:].tolist() == [0, 0, 0] and out[0][0] > 0
    assert (out[1][1] - q).abs().max() <= 1e-15 and out[1][2:].tolist() == [[0, 1, 0], [0, 0, 0]]
    assert out[1][0, 0] == 0 and out[2][0, 0] == 0 and out[2][2, 1] > 0 and (out[2][3] == 0).all()
    first = torch.autograd.grad(out, [*g, *e], upstream(out), create_graph=True)
    second = torch.autograd.grad(first, [*g, *e], upstream(first))
    for gradient in (*first, *second):
        assert gradient.isfinite().all() and (gradient[1:] == 0).all()
    assert (first[0][0] == 0).all() and (first[1][0] != 0).all()


def test_eps_stops_gradients_of_small_shares():
    (g, e), target = leaves(*example()[:2]), torch.ones(3)
    free = torch.autograd.grad(ops.attribution_reg(g, e, target)[0].sum(), g)
    _, shares, _ = out = ops.attribution_reg(g, e, target, eps=0.2)
    assert (shares <= 0.2).any()
    for m, (one, other) in enumerate(zip(torch.autograd.grad(out[0].sum(), g), free, strict=True)):
        small = shares[:, m] <= 0.2
        assert (one[small] == 0).all() and torch.equal(one[~small], other[~small])


@pytest.mark.parametrize(("g_scale", "e_scale"), [(1e-25, 1e25), (1e25, 1e-25), (1e18, 1e18), (1e-18, 1e-18)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_tiny_and_huge_values_have_their_shares_and_gradients(dtype, g_scale, e_scale):
    g, e, target, _ = example()
    g, e = leaves([(t * g_scale).to(dtype) for t in g], [(t * e_scale).to(dtype) for t in e])
    exact = leaves([t.double() for t in g], [t.double() for t in e])
    got, expected = ops.attribution_reg(g, e, target), plain(*exact, target)
    assert (got[0] - expected[0]).abs().max() <= 1e-6 and (got[1] - expected[1]).abs().max() <= 1e-6
    pair = torch.autograd.grad(got[0].sum(), g), torch.autograd.grad(expected[0].sum(), exact[0])
    for one, other in zip(*pair, strict=True):
        oracles.assert_near(one, other, 1e-5 if dtype == torch.float32 else 1e-2)


# --- how torch calls it -----------------------------------------------------------------------------------------------


def test_autocast_takes_them_in_float32():
    g, e, target, present = example(dtype=torch.bfloat16)
    mixed = [g[0].float(), g[1], g[2]]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = ops.attribution_reg(mixed, e, target.float(), present)
        doubles = ops.attribution_reg(*example()[:2], target)
    expected = ops.attribution_reg([t.float() for t in g], [t.float() for t in e], target.float(), present)
    assert all(torch.equal(one, other) for one, other in zip(got, expected, strict=True))
    assert doubles[0].dtype == torch.float64


def test_any_layout_and_no_rows_are_served():
    g, e, target, present = example()
    expected = ops.attribution_reg(g, e, target, present)
    turned = [
        [t.movedim(0, -1).contiguous().movedim(-1, 0) for t in g],
        [torch.stack([t, t], -1)[..., 0] for t in e],
        target.T.contiguous().T,
        present.T.contiguous().T,
    ]
    assert not any(t.is_contiguous() for t in (turned[0][0], *turned[1], *turned[2:]))
    assert all(torch.equal(one, other) for one, other in zip(ops.attribution_reg(*turned), expected, strict=True))
    g, e = leaves(*([t[:0] for t in tensors] for tensors in (g, e)))
    for asked in (target[:0], target[0]):
        out = ops.attribution_reg(g, e, asked, present[:0])
        assert [tuple(t.shape) for t in out] == [(0,), (0, 3), (0, 3)]
        first = torch.autograd.grad(out[0].sum(), g, create_graph=True)
        assert all(t.shape == s.shape for t, s in zip(torch.autograd.grad(first[0].sum(), g), g, strict=True))


def test_results_do_not_depend_on_threads(at_each_thread_count):
    g, e, target, present = example(B=3000, shapes=[(70,), (3, 5), (1,)], dtype=torch.float32)

    def run():
        g_of, e_of = leaves(g, e)
        out = ops.attribution_reg(g_of, e_of, target, present)
        first = torch.autograd.grad(out, [*g_of, *e_of], upstream(out), create_graph=True)
        return [*out, *first, *torch.autograd.grad(first, [*g_of, *e_of], upstream(first))]

    at_each_thread_count(run)


def test_opcheck():
    g, e, target, present = example(B=3)
    out = ops.attribution_reg(g, e, target, present)
    up = upstream(out)
    torch.library.opcheck(ops.attribution_reg.default, (*leaves(g, e), target, present))
    torch.library.opcheck(ops.attribution_reg.default, (g, e, target[0], None, "rms", "huber", 0.01))
    arguments = (*leaves(up)[0], *leaves(g, e), target, present, out[2], "l2", "squared", 1e-12)
    torch.library.opcheck(ops.attribution_reg_backward.default, arguments)
    torch.library.opcheck(ops.attribution_reg_backward.default, (*arguments, True, False))


def test_compile_gives_what_eager_gives():
    g, e, target, present = example(dtype=torch.float32)
    compiled = torch.compile(
        lambda g, e: ops.attribution_reg(g, e, target, present, "rms")[0] * 2, fullgraph=True, backend="aot_eager"
    )
    expected = ops.attribution_reg(g, e, target, present, "rms")[0] * 2
    assert torch.equal(compiled(g, e), expected)
    g, e = leaves(g, e)
    got = torch.autograd.grad(compiled(g, e).sum(), [*g, *e])
    wanted = torch.autograd.grad(ops.attribution_reg(g, e, target, present, "rms")[0].sum() * 2, [*g, *e])
    assert all(torch.equal(one, other) for one, other in zip(got, wanted, strict=True))


X, Y = torch.randn(4, 3), torch.randn(4, 2, 5)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"embeddings": [], "grads": []}, "embeddings must have from 1 to 256 modalities, got 0|non-empty list"),
        ({"embeddings": [X] * 257, "grads": [X] * 257}, "embeddings must have from 1 to 256 modalities, got 257"),
        ({"grads": [X]}, "grads must have one tensor for each of the embeddings, 2, got 1"),
        ({"grads": [X, X]}, r"grads\[1\] must be as its embedding = \[4, 2, 5\], got \[4, 3\]"),
        ({"grads": [X, Y.double()]}, r"grads\[1\] must be float32, got float64"),
        ({"embeddings": [X.int(), Y]}, r"embeddings\[0\] must be float32, bfloat16, float16 or float64, got int32"),
        ({"embeddings": [X, Y.half()]}, r"embeddings\[1\] must be float32, got float16"),
        ({"embeddings": [X, Y[:3]]}, r"embeddings\[1\] must be \[B, ...\] = \[4, ...\].*got \[3, 2, 5\]"),
        ({"embeddings": [X, Y[:, :0]]}, r"embeddings\[1\].* at least one number a sample, got \[4, 0, 5\]"),
        ({"embeddings": [X.sum(), Y]}, r"embeddings\[0\] must be \[B, ...\], got \[\]"),
        ({"target_shares": torch.ones(3)}, r"target_shares must be \[M\] = \[2\], got \[3\]"),
        ({"target_shares": torch.ones(3, 2)}, r"target_shares must be \[B, M\] = \[4, 2\], got \[3, 2\]"),
        ({"target_shares": torch.ones(2).long()}, "target_shares must be float32.* or float64, got int64"),
        ({"target_shares": torch.tensor([1.0, -1.0])}, "target_shares must be finite and not negative"),
        ({"target_shares": torch.tensor([1.0, math.nan])}, "target_shares must be finite and not negative"),
        ({"target_shares": torch.zeros(2)}, "target_shares must be .* with a sum above 0 over the present modalities"),
        ({"present": torch.ones(4, 3).bool()}, r"present must be \[.*\] = \[4, 2\], got \[4, 3\]"),
        ({"present": torch.ones(4, 2)}, "present must be bool, got float32"),
        ({"pool": "mean"}, "pool must be l2 or rms, got mean"),
        ({"penalty": "l2"}, "penalty must be l1, squared or huber, got l2"),
        ({"eps": 1.0}, "eps must be from 0 to below 1, got 1"),
        ({"eps": -0.5}, "eps must be from 0 to below 1, got -0.5"),
        ({"eps": math.nan}, "eps must be from 0 to below 1, got"),
    ],
)
def test_bad_arguments_are_named(change, message):
    arguments = {"grads": [X, Y], "embeddings": [X, Y], "target_shares": torch.ones(2)} | change
    with pytest.raises(RuntimeError, match="(attribution_reg: )?" + message):
        ops.attribution_reg(**arguments)


@pytest.mark.parametrize("name", ["grads", "embeddings", "target_shares", "present"])
def test_an_argument_elsewhere_is_named(name):
    arguments = {"grads": [X, Y], "embeddings": [X, Y], "target_shares": torch.ones(2)}
    arguments["present"] = torch.ones(4, 2).bool()
    moved = arguments[name]
    moved = [moved[0], moved[1].to("meta")] if isinstance(moved, list) else moved.to("meta")
    with pytest.raises(RuntimeError, match=rf"attribution_reg: {name}.* must be on|must be on .*{name}"):
        ops.attribution_reg(**(arguments | {name: moved}))
