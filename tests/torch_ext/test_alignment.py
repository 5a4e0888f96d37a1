"""align_loss against plain torch in float64, open_clip where it is installed, and one process against two."""

import math

import pytest
import torch
import torch.nn.functional as F

import mmbal  # noqa: F401  (loads the operators)
import oracles
from mmbal.alignment import align_loss
from peers import import_open_clip

op = torch.ops.mmbal.align_loss
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
KINDS = ["smooth_l1", "mse", "l2", "cosine"]
BOUND = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 2e-2, torch.float16: 4e-3}
INF, NAN = math.inf, math.nan


def real(dtype):
    return torch.float64 if dtype == torch.float64 else torch.float32


def distances(pred, target, kind, beta):
    if kind == "cosine":
        return 1 - F.cosine_similarity(pred, target, eps=1e-12)
    if kind == "smooth_l1":
        return F.smooth_l1_loss(pred, target, beta=beta, reduction="none").mean(1)
    squares = F.mse_loss(pred, target, reduction="none")
    return squares.mean(1) if kind == "mse" else squares.sum(1)


def plain(
    pred,
    target,
    source,
    candidates,
    group_ids=None,
    present=None,
    offset=0,
    tau=0.03,
    alpha=0.5,
    regression="smooth_l1",
    beta=1.0,
    symmetric=True,
):
    """The formulas of the header, with the whole matrix of similarities."""
    B, A = len(pred), len(source)
    present = torch.ones(A, dtype=torch.bool) if present is None else present
    own, diagonal = slice(offset, offset + B), torch.eye(A, dtype=torch.bool)
    weight = present[own].to(pred.dtype) * A / max(B * int(present.sum()), 1)
    of_regression = (distances(pred, target, regression, beta) * weight).sum()
    z = F.normalize(source, dim=1) @ F.normalize(candidates, dim=1).T / tau
    hidden = ~present[None] | ~present[:, None]
    if group_ids is not None:
        hidden = hidden | (group_ids[:, None] == group_ids[None])
    z = z.masked_fill(hidden & ~diagonal, -INF)
    labels = torch.arange(offset, offset + B)
    each = F.cross_entropy(z[own], labels, reduction="none")
    if symmetric:
        each = (each + F.cross_entropy(z.T[own], labels, reduction="none")) / 2
    contrastive = (each * weight).sum() if present.sum() > 1 else 0 * (source.sum() + candidates.sum())
    return alpha * of_regression + (1 - alpha) * contrastive, of_regression, contrastive


def example(B=7, D=5, C=6, A=None, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    A = A or B
    sizes = ((B, D), (B, D), (A, C), (A, C))
    return [torch.randn(*size, generator=generator, dtype=torch.float64).to(dtype) for size in sizes]


def leaves(tensors):
    return [t.detach().clone().requires_grad_() for t in tensors]


def gradients(function, tensors, upstream=(1.0, 0.0, 0.0), **options):
    tensors = leaves(tensors)
    outputs = function(*tensors, **options)[:3]
    return torch.autograd.grad(sum(o * u for o, u in zip(outputs, upstream, strict=True)), tensors)


def agree(tensors, upstream=(0.7, 1.3, -0.4), **options):
    dtype = tensors[0].dtype
    exact = [t.double() for t in tensors]
    for got, expected in zip(op(*tensors, **options)[:3], plain(*exact, **options), strict=True):
        assert got.dtype == real(dtype) and got.shape == ()
        assert got.item() == pytest.approx(expected.item(), rel=min(BOUND[dtype], 1e-4), abs=min(BOUND[dtype], 1e-4))
    got, expected = gradients(op, tensors, upstream, **options), gradients(plain, exact, upstream, **options)
    for one, other in zip(got, expected, strict=True):
        assert one.dtype == dtype
        assert (one.double() - other).abs().max() <= BOUND[dtype] * other.abs().max() + 1e-13


# --- the formula ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("regression", KINDS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("B", "D", "C"), [(2, 1, 1), (7, 5, 6), (61, 33, 17)])
def test_it_is_the_formula_and_so_are_its_gradients(B, D, C, dtype, regression, symmetric, poisoned_memory):
    agree(example(B, D, C, dtype=dtype), regression=regression, symmetric=symmetric, beta=0.6, alpha=0.3, tau=0.1)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize(("B", "C"), [(300, 9), (561, 40), (1030, 530)])
def test_more_rows_than_a_block_has(B, C, dtype):
    agree(example(B, 3, C, dtype=dtype), tau=0.05)


def test_values_that_can_be_worked_out_by_hand():
    pred, target = torch.tensor([[0.5, 3.0]]).double(), torch.zeros(1, 2).double()
    one = torch.ones(1, 3).double()
    for kind, expected in (("smooth_l1", (0.125 + 2.5) / 2), ("mse", 9.25 / 2), ("l2", 9.25)):
        assert op(pred, target, one, one, regression=kind)[1].item() == pytest.approx(expected, abs=1e-15)
    assert op(pred, -pred, one, one, regression="cosine")[1].item() == pytest.approx(2, abs=1e-15)
    for B in (2, 5, 300):  # uniform similarities: log B
        same = torch.ones(B, 4).double()
        x = torch.zeros(B, 1).double()
        assert op(x, x, same, same)[2].item() == pytest.approx(math.log(B), abs=1e-12)
    e = torch.eye(2).double()  # z = 1 / tau on the diagonal, 0 beside it
    expected = math.log1p(math.exp(-1 / 0.5))
    assert op(e, e, e, e, tau=0.5)[2].item() == pytest.approx(expected, abs=1e-15)


def test_regression_is_torchs_smooth_l1_and_contrastive_its_cross_entropy():
    pred, target, source, candidates = example(20, 30, 8)
    loss, regression, contrastive, _ = op(pred, target, source, candidates)
    z = F.normalize(source, dim=1) @ F.normalize(candidates, dim=1).T / 0.03
    labels = torch.arange(20)
    expected = (F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)) / 2
    assert regression.item() == pytest.approx(F.smooth_l1_loss(pred, target).item(), rel=1e-14)
    assert contrastive.item() == pytest.approx(expected.item(), rel=1e-13)
    assert loss.item() == pytest.approx((regression + contrastive).item() / 2, rel=1e-14)


def test_contrastive_is_the_loss_of_open_clip():
    open_clip = import_open_clip()
    pred, target, source, candidates = example(32, 3, 16)
    units = [F.normalize(t, dim=1) for t in (source, candidates)]
    expected = open_clip.ClipLoss()(*units, logit_scale=torch.tensor(1 / 0.07, dtype=torch.float64))
    assert op(pred, target, source, candidates, tau=0.07)[2].item() == pytest.approx(expected.item(), rel=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.25, 2.0])
def test_beta_is_that_of_torch(beta):
    agree(example(9, 11, 4), regression="smooth_l1", beta=beta)


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_part_without_weight_does_not_spoil_the_loss(alpha):
    pred, target, source, candidates = example(6, 4, 4)
    spoiled = [pred, target, source, candidates]
    spoiled[0 if alpha == 0 else 2] = torch.full_like(spoiled[0 if alpha == 0 else 2], NAN)
    loss, regression, contrastive, _ = op(*spoiled, alpha=alpha)
    assert loss.isfinite() and (regression.isnan() if alpha == 0 else contrastive.isnan())


@pytest.mark.parametrize("regression", KINDS)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("gathered", [False, True])
def test_gradcheck(regression, symmetric, gathered):
    tensors = leaves(example(4, 3, 5, A=7 if gathered else 4, seed=3))
    groups = torch.tensor([0, 1, 0, 2, 3, 1, 4])[: len(tensors[2])]
    present = torch.tensor([True, True, True, True, False, True, True])[: len(tensors[2])]

    def call(*t):
        return op(*t, groups, present, 2 if gathered else 0, 0.3, 0.4, regression, 0.8, symmetric)[:3]

    assert torch.autograd.gradcheck(call, tensors)


# --- masks and gathered candidates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32])
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize(("B", "A", "offset"), [(7, 7, 0), (5, 12, 0), (5, 12, 7), (40, 900, 270), (300, 700, 400)])
def test_groups_absent_rows_and_gathered_candidates(B, A, offset, symmetric, dtype):
    generator = torch.Generator().manual_seed(1)
    groups = torch.randint(0, A // 2 + 1, (A,), generator=generator)
    present = torch.rand(A, generator=generator) < 0.8
    for options in ({"group_ids": groups}, {"present": present}, {"group_ids": groups, "present": present}):
        agree(example(B, 3, 10, A, dtype), offset=offset, symmetric=symmetric, tau=0.1, **options)


def test_groups_all_equal_leave_nothing_to_contrast():
    tensors = example(9)
    groups = torch.full((9,), -3)
    assert op(*tensors, groups)[2].item() == 0
    got = gradients(op, tensors, (0.0, 0.0, 1.0), group_ids=groups)
    assert all((g == 0).all() for g in got)


def test_absent_rows_are_not_read_and_have_no_gradient():
    tensors = example(12)
    present = torch.arange(12) % 3 != 1
    expected = op(*tensors, None, present)
    kept = op(*(t[present] for t in tensors))
    for t in tensors:
        t[~present] = NAN
    for one, other, short in zip(op(*tensors, None, present)[:3], expected, kept, strict=False):
        assert one == other and one.item() == pytest.approx(short.item(), rel=1e-13)
    for g in gradients(op, tensors, (1.0, 1.0, 1.0), present=present):
        assert (g[~present] == 0).all() and g.isfinite().all() and (g[present] != 0).any()


@pytest.mark.parametrize("present", [None, torch.tensor([True]), torch.tensor([False])])
def test_one_row_has_no_contrastive_loss_and_no_gradient_of_it(present):
    tensors = example(1)
    _, regression, contrastive, normalizers = op(*tensors, None, present)
    assert contrastive == 0 and (normalizers == 0).all()
    assert (regression == 0) == (present is not None and not present.any())
    _, _, dsource, dcandidates = gradients(op, tensors, (1.0, 1.0, 1.0), present=present)
    assert (dsource == 0).all() and (dcandidates == 0).all()


@pytest.mark.parametrize("A", [0, 4])
def test_no_own_rows_give_zeros(A):
    tensors = leaves([torch.zeros(0, 3), torch.zeros(0, 3), torch.randn(A, 2), torch.randn(A, 2)])
    outputs = op(*tensors)
    assert [o.item() for o in outputs[:3]] == [0, 0, 0]
    for t, g in zip(tensors, torch.autograd.grad(sum(outputs[:3]), tensors), strict=True):
        assert g.shape == t.shape and (g == 0).all()


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("ranks", [2, 3])
def test_the_mean_over_ranks_with_gathered_candidates_is_the_joined_batch(ranks, symmetric):
    B = 6
    tensors = example(ranks * B, 4, 5, seed=2)
    generator = torch.Generator().manual_seed(2)
    options = {
        "group_ids": torch.randint(0, 8, (ranks * B,), generator=generator),
        "present": torch.rand(ranks * B, generator=generator) < 0.7,  # different numbers on each rank
        "symmetric": symmetric,
        "tau": 0.2,
    }
    joined = op(*tensors, **options)[:3]
    expected = gradients(op, tensors, (1.0, 0.5, 0.25), **options)
    shared = leaves(tensors)
    total = [0, 0, 0]
    for rank in range(ranks):
        own = slice(rank * B, rank * B + B)
        part = op(shared[0][own], shared[1][own], *shared[2:], offset=rank * B, **options)[:3]
        total = [t + p / ranks for t, p in zip(total, part, strict=True)]
    for one, other in zip(total, joined, strict=True):
        assert one.item() == pytest.approx(other.item(), rel=1e-12)
    got = torch.autograd.grad(total[0] + 0.5 * total[1] + 0.25 * total[2], shared)
    for one, other in zip(got, expected, strict=True):
        oracles.assert_near(one, other, 1e-12)


def test_ranks_with_different_numbers_of_rows_weigh_by_them():
    tensors = example(10, 4, 5)
    joined, total = op(*tensors)[0].item(), 0.0
    for own in (slice(0, 3), slice(3, 10)):
        part = op(tensors[0][own], tensors[1][own], *tensors[2:], offset=own.start)[0]
        total += (own.stop - own.start) / 10 * part.item()
    assert total == pytest.approx(joined, rel=1e-12)


# --- numbers at the edge ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("scale", [1e20, 1e-10])
def test_the_length_of_the_embeddings_does_not_matter(scale, dtype):
    tensors = example(20, 3, 8, dtype=dtype)
    scaled = [*tensors[:2], tensors[2] * scale, tensors[3] * scale]
    assert op(*scaled)[2].item() == pytest.approx(op(*tensors)[2].item(), rel=1e-5 if dtype == torch.float32 else 1e-12)
    got, expected = (gradients(op, t, (0.0, 0.0, 1.0)) for t in (scaled, tensors))
    for one, other in zip(got[2:], expected[2:], strict=True):
        oracles.assert_near(one.double() * scale, other.double(), 1e-4 if dtype == torch.float32 else 1e-10)


def test_vectors_too_short_for_a_direction_have_no_gradient():
    pred, target, source, candidates = example(6, 3, 4, dtype=torch.float32)
    source[1], candidates[2], source[4] = 0, 0, 1e-20
    pred[0] = 0
    outputs = op(pred, target, source, candidates, regression="cosine")
    assert all(o.isfinite() for o in outputs[:3])
    dpred, dtarget, dsource, dcandidates = gradients(
        op, (pred, target, source, candidates), (1.0, 1.0, 1.0), regression="cosine"
    )
    for g, zero in ((dpred, [0]), (dsource, [1, 4]), (dcandidates, [2])):
        assert (g[zero] == 0).all() and g.isfinite().all()
    assert dtarget.isfinite().all() and (dsource[0] != 0).any()


@pytest.mark.parametrize("magnitude", [1e20, 1e-20])
@pytest.mark.parametrize("regression", ["smooth_l1", "cosine"])
def test_regression_of_large_and_of_small_numbers(regression, magnitude):
    pred, target, source, candidates = example(5, 7, 3, dtype=torch.float32)
    tensors = [pred * magnitude, target * magnitude, source, candidates]
    exact = distances(tensors[0].double(), tensors[1].double(), regression, 1.0).mean().item()
    if regression == "cosine" and magnitude < 1:
        exact = 1.0  # below the least norm
    assert op(*tensors, regression=regression)[1].item() == pytest.approx(exact, rel=1e-5)
    assert all(g.isfinite().all() for g in gradients(op, tensors, regression=regression))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("tau", [1e-3, 1e-6, 1e-20, 1e6])
def test_small_and_large_temperatures(tau, dtype):
    tensors = example(40, 2, 6, dtype=dtype)
    exact = [t.double() for t in tensors]
    expected = plain(*exact, tau=tau)[2].item()
    assert op(*tensors, tau=tau)[2].item() == pytest.approx(expected, rel=1e-5 if dtype == torch.float32 else 1e-12)
    got = gradients(op, tensors, (0.0, 0.0, 1.0), tau=tau)
    assert all(g.isfinite().all() for g in got)
    if tau >= 1e-3:
        for one, other in zip(got, gradients(plain, exact, (0.0, 0.0, 1.0), tau=tau), strict=True):
            bound = 1e-3 if dtype == torch.float32 else 1e-10  # similarities are 1 / tau times as large as their error
            assert (one.double() - other).abs().max() <= bound * other.abs().max() + 1e-30


def test_a_nan_reaches_the_loss():
    for i in range(4):
        tensors = example(5)
        tensors[i][2, 1] = NAN
        assert op(*tensors)[0].isnan()


# --- what torch asks of an operator -----------------------------------------------------------------------------------


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 3), (2, 3)])
def test_only_the_gradients_that_are_needed_are_returned(needed):
    tensors = example(9)
    expected = gradients(op, tensors)
    some = [t.clone().requires_grad_(i in needed) for i, t in enumerate(tensors)]
    op(*some)[0].backward()
    for i, t in enumerate(some):
        assert (t.grad is not None) == (i in needed)
        assert t.grad is None or torch.equal(t.grad, expected[i])


def test_the_normalizers_have_no_gradient_and_double_backward_is_refused():
    tensors = leaves(example(5))
    loss, _, _, normalizers = op(*tensors)
    assert not normalizers.requires_grad and normalizers.shape == (2, 5)
    first = torch.autograd.grad(loss, tensors, create_graph=True)
    with pytest.raises(RuntimeError, match="align_loss_backward .*double backward"):
        sum(g.sum() for g in first).backward()


def test_the_python_name_returns_the_three_losses():
    tensors = example(6)
    for one, other in zip(align_loss(*tensors, tau=0.1), op(*tensors, tau=0.1), strict=False):
        assert torch.equal(one, other)
    assert len(align_loss(*tensors)) == 3


def test_any_layout_gives_the_same():
    tensors = example(11)
    wide = [torch.full((22, 2 * t.shape[1]), NAN, dtype=t.dtype) for t in tensors]
    strided = []
    for t, w in zip(tensors, wide, strict=True):
        w[::2, ::2] = t
        strided.append(w[::2, ::2])
    assert not strided[0].is_contiguous()
    assert all(torch.equal(a, b) for a, b in zip(op(*strided), op(*tensors), strict=True))
    for one, other in zip(gradients(op, strided), gradients(op, tensors), strict=True):
        assert torch.equal(one, other)
    expanded = [t[:1].expand(11, -1) for t in tensors]
    assert all(torch.equal(a, b) for a, b in zip(op(*expanded), op(*(t.clone() for t in expanded)), strict=True))


@pytest.mark.parametrize(("A", "offset"), [(1030, 0), (1700, 600)])
def test_bitwise_the_same_at_any_thread_count(at_each_thread_count, A, offset):
    tensors = example(1030, 9, 70, A, torch.float32)
    groups = torch.arange(A) // 3

    def run():
        outputs = op(*tensors, groups, offset=offset)
        return [*outputs, *gradients(op, tensors, (1.0, 2.0, 3.0), group_ids=groups, offset=offset)]

    at_each_thread_count(run)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_takes_all_in_float32(dtype):
    tensors = example(8, dtype=torch.float32)
    mixed = [tensors[0].to(dtype), tensors[1], tensors[2].to(dtype), tensors[3].to(dtype)]
    with torch.autocast("cpu", dtype=dtype):
        got = op(*mixed, alpha=0.2)
    expected = op(*(t.float() for t in mixed), alpha=0.2)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("B", [0, 1, 6])
def test_opcheck(B, dtype):
    tensors = leaves(example(B, A=B + 2, dtype=dtype)) if B else leaves([torch.zeros(0, 3).to(dtype)] * 4)
    groups = torch.zeros(len(tensors[2]), dtype=torch.int64)
    torch.library.opcheck(op.default, (*tensors,))
    torch.library.opcheck(op.default, (*tensors, groups, groups == 0, 0, 0.2, 0.4, "cosine", 0.5, False))


def test_opcheck_of_the_backward():
    tensors = example(4)
    loss, regression, contrastive, normalizers = op(*tensors)
    rest = (None, None, 0, 0.03, 0.5, "smooth_l1", 1.0, True, [True, False, True, True])
    arguments = (loss, regression, contrastive, *tensors, normalizers, *rest)
    torch.library.opcheck(torch.ops.mmbal.align_loss_backward.default, arguments)


def test_compile_gives_what_eager_gives():
    tensors = example(9, dtype=torch.float32)
    compiled = torch.compile(lambda *t: 2 * op(*t, tau=0.2)[0], fullgraph=True, backend="aot_eager")
    expected = 2 * op(*tensors, tau=0.2)[0]
    assert torch.equal(compiled(*tensors), expected)
    one, other = leaves(tensors), leaves(tensors)
    got = torch.autograd.grad(compiled(*one), one)
    wanted = torch.autograd.grad(2 * op(*other, tau=0.2)[0], other)
    assert all(torch.equal(a, b) for a, b in zip(got, wanted, strict=True))


X, Y = torch.randn(4, 3), torch.randn(4, 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pred": torch.zeros(4)}, r"pred must be \[B, D\].*got \[4\]"),
        ({"pred": X.int()}, "pred must be float32, bfloat16, float16 or float64, got int32"),
        ({"target": X[:3]}, r"target must be \[B, D\] = \[4, 3\], got \[3, 3\]"),
        ({"target": X.double()}, "target must be float32, got float64"),
        ({"source_embedding": Y.half()}, "source_embedding must be float32, got float16"),
        ({"source_embedding": Y[0]}, r"source_embedding must be \[A, C\].*got \[2\]"),
        ({"target_embedding": torch.zeros(4, 3)}, r"target_embedding must be \[A, C\] = \[4, 2\], got \[4, 3\]"),
        ({"target_embedding": Y.bfloat16()}, "target_embedding must be float32, got bfloat16"),
        ({"pred": X[:, :0], "target": X[:, :0]}, r"pred must have at least one column, got \[4, 0\]"),
        ({"source_embedding": Y[:, :0], "target_embedding": Y[:, :0]}, "source_embedding must have at least one col"),
        ({"source_embedding": Y[:3], "target_embedding": Y[:3]}, "source_embedding must have a row for each of the 4"),
        ({"offset": 1}, "offset must be from 0 to A - B = 0, got 1"),
        ({"offset": -1}, "offset must be from 0 to A - B = 0, got -1"),
        ({"group_ids": torch.zeros(5, dtype=torch.int64)}, r"group_ids must be \[A\] = \[4\], got \[5\]"),
        ({"group_ids": torch.zeros(4)}, "group_ids must be int64, got float32"),
        ({"present": torch.ones(3, dtype=torch.bool)}, r"present must be \[A\] = \[4\], got \[3\]"),
        ({"present": torch.ones(4)}, "present must be bool, got float32"),
        ({"tau": 0.0}, "tau must be from 1e-30 to 1e30, got 0"),
        ({"tau": -1.0}, "tau must be from 1e-30 to 1e30, got -1"),
        ({"tau": NAN}, "tau must be from 1e-30 to 1e30, got"),
        ({"alpha": 1.5}, "alpha must be from 0 to 1, got 1.5"),
        ({"alpha": NAN}, "alpha must be from 0 to 1, got"),
        ({"beta": -0.1}, "beta must be finite and not negative, got -0.1"),
        ({"beta": INF}, "beta must be finite and not negative, got inf"),
        ({"regression": "l1"}, "regression must be smooth_l1, mse, l2 or cosine, got l1"),
    ],
)
def test_bad_arguments_are_named_by_the_kernel_and_where_nothing_is_computed(change, message):
    arguments = {"pred": X, "target": X, "source_embedding": Y, "target_embedding": Y} | change
    for device in ("cpu", "meta"):
        moved = {name: t.to(device) if isinstance(t, torch.Tensor) else t for name, t in arguments.items()}
        with pytest.raises(RuntimeError, match="align_loss: " + message):
            op(**moved)


@pytest.mark.parametrize("name", ["target", "source_embedding", "target_embedding", "group_ids", "present"])
def test_an_argument_elsewhere_is_named(name):
    arguments = {"pred": X, "target": X, "source_embedding": Y, "target_embedding": Y}
    arguments |= {"group_ids": torch.zeros(4, dtype=torch.int64), "present": torch.ones(4, dtype=torch.bool)}
    with pytest.raises(RuntimeError, match=f"align_loss: {name} must be on"):
        op(**(arguments | {name: arguments[name].to("meta")}))
