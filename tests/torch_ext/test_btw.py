import math

import pytest
import torch

import mmbal  # noqa: F401  (loads the operators)
import oracles

ops = torch.ops.mmbal
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
OPTIONS = {"floor": 1e-5, "ceiling": 1e6, "mode": "diverge", "temperature": 1.0, "mean_one": False}


def problem(N=40, M=3, dtype=torch.float64):
    """Divergences away from the bounds, one modality below the floor of mutual information."""
    kl = (torch.rand(N, M, dtype=torch.float64) * 5 + 0.01).to(dtype)
    mi = torch.rand(M, dtype=torch.float64) + 0.1
    return kl, mi


def plain(kl, mi, present=None, **changes):
    """The softmax form of the spec, in float64 and differentiable."""
    o = OPTIONS | changes
    kl, v = kl.double(), mi.double().clamp_min(o["floor"])
    counted = ~kl.isnan() if present is None else present & ~kl.isnan()
    kept = kl.where(counted, 1)
    level = v.log() + (
        kept.clamp(o["floor"], o["ceiling"]).log()
        if o["mode"] == "diverge"
        else -kept.clamp_max(o["ceiling"]) / o["temperature"]
    )
    w = torch.softmax(level.where(counted, -math.inf), 1).where(counted, 0)
    return w * counted.sum(1, keepdim=True) if o["mean_one"] else w


def weights(kl, mi, present=None, **changes):
    return ops.btw_weights(kl, mi, present, *(OPTIONS | changes).values())


@pytest.mark.parametrize("mean_one", [False, True])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("mode", ["diverge", "agree"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("M", [1, 2, 3, 4, 5, 8, 20])
def test_weights_are_a_softmax_of_logarithms(M, dtype, mode, masked, mean_one):
    kl, mi = problem(100, M, dtype)
    present = torch.rand(100, M) < 0.7 if masked else None
    w = weights(kl, mi, present, mode=mode, temperature=0.8, mean_one=mean_one)
    assert w.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    expected = plain(kl, mi, present, mode=mode, temperature=0.8, mean_one=mean_one)
    assert (w - expected).abs().max() <= (1e-13 if dtype == torch.float64 else 1e-6) * M


def test_chain_has_the_golden_values():
    f64 = {"dtype": torch.float64}
    target, fused = torch.tensor([1.2, -1.0], **f64), torch.tensor([0.9, -0.4], **f64)
    mu = torch.tensor([[0.5, 1.5, -0.3], [0.1, -0.9, -1.05]], **f64)
    kl = ops.residual_kl(mu, fused, target, 1e-9)
    both = ops.btw_weights(kl, torch.tensor([0.42, 0.08, 0.0], **f64))
    golden = [[0.8558181814, 0.1440162848, 0.0001655338], [0.7453419379, 0.2546084769, 0.0000495852]]
    assert (both - torch.tensor(golden, **f64)).abs().max() <= 1e-10
    kl_only = [[0.0999283016, 0.0882831669, 0.8117885315], [0.1789701370, 0.3209646288, 0.5000652342]]
    assert (ops.btw_weights(kl, torch.ones(3, **f64)) - torch.tensor(kl_only, **f64)).abs().max() <= 1e-10
    table = torch.ones(2, 3, **f64)
    ops.ema_rows_(table, torch.arange(2), both, 0.5)
    averaged = [[0.9279090907, 0.5720081424, 0.5000827669], [0.8726709689, 0.6273042385, 0.5000247926]]
    assert (table - torch.tensor(averaged, **f64)).abs().max() <= 1e-10


def test_modalities_that_all_agree_get_their_mutual_information():
    w = ops.btw_weights(torch.zeros(2, 3), torch.tensor([0.6, 0.1, 1e-5]))
    assert (w - torch.tensor([0.857131, 0.142855, 0.000014])).abs().max() <= 1e-6


@pytest.mark.parametrize("mode", ["diverge", "agree"])
def test_extremes_give_no_nan(mode):
    kl = torch.tensor([[math.inf, 1, 2], [math.inf, math.inf, 0], [1e30, 0, 0], [math.nan, 1, 1], [math.nan] * 3])
    w = weights(kl, torch.tensor([1.0, 1.0, 0.0]), mode=mode, mean_one=True)
    assert w.isfinite().all()
    assert w.sum(1).tolist() == pytest.approx([3, 3, 3, 2, 0], rel=1e-6)
    assert w[3, 0] == 0


def test_options_at_their_bounds_give_no_nan():
    kl = torch.tensor([[0.0, 0.0, 0.0], [math.inf, 0.0, 1.0], [-math.inf, 1e30, 2.0]])
    for mode in ("diverge", "agree"):
        for mi in (torch.zeros(3), torch.tensor([1e30, 1.0, 0.0])):
            for changes in ({"floor": 1e-12}, {"ceiling": 1e12}, {"temperature": 1e-12}, {"temperature": 1e12}):
                w = weights(kl, mi, mode=mode, **changes)
                assert (w.sum(1) - 1).abs().max() < 1e-5


def test_a_weight_of_zero_silences_what_is_missing_and_nan():
    h = torch.full((2, 3), math.nan)
    assert (ops.scale_modalities([h], torch.zeros(2, 1))[0] == 0).all()


def test_divergence_raises_a_weight_in_one_mode_and_lowers_it_in_the_other():
    kl = torch.tensor([[0.1, 1.0, 10.0]])
    assert (weights(kl, torch.ones(3)).diff() > 0).all()
    assert (weights(kl, torch.ones(3), mode="agree").diff() < 0).all()


def test_a_row_without_modalities_has_weight_and_gradient_zero():
    kl, mi = problem(4)
    kl.requires_grad_()
    present = torch.ones(4, 3, dtype=torch.bool)
    present[2] = False
    w = weights(kl, mi, present)
    (dkl,) = torch.autograd.grad(w.square().sum(), kl)
    assert (w[2] == 0).all() and (dkl[2] == 0).all() and (dkl[0] != 0).all()


@pytest.mark.parametrize("mean_one", [False, True])
@pytest.mark.parametrize("mode", ["diverge", "agree"])
@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_right(mode, mean_one, masked):
    kl, mi = problem(7, 4)
    present = torch.rand(7, 4) < 0.7 if masked else None
    options = {"mode": mode, "mean_one": mean_one, "temperature": 1.3}
    inputs = (kl.requires_grad_(), mi.requires_grad_())
    assert torch.autograd.gradcheck(lambda a, b: weights(a, b, present, **options), inputs)
    upstream = torch.randn(7, 4, dtype=torch.float64)
    got = torch.autograd.grad(weights(kl, mi, present, **options), inputs, upstream)
    expected = torch.autograd.grad(plain(kl, mi, present, **options), inputs, upstream)
    for one, other in zip(got, expected, strict=True):
        oracles.assert_near(one, other, 1e-12)


def test_no_gradient_passes_the_bounds():
    kl = torch.tensor([[1e-7, 1.0, 1e7], [0.5, 2.0, 3.0]], dtype=torch.float64, requires_grad=True)
    mi = torch.tensor([1e-7, 1.0, 1.0], dtype=torch.float64, requires_grad=True)
    dkl, dmi = torch.autograd.grad(weights(kl, mi, floor=1e-3, ceiling=1e3)[:, 1].sum(), (kl, mi))
    assert (dkl[0] == 0).tolist() == [True, False, True] and (dkl[1] != 0).all()
    assert (dmi == 0).tolist() == [True, False, False]


def test_gradients_have_the_dtypes_of_the_inputs():
    kl, mi = problem(dtype=torch.bfloat16)
    kl, mi = kl.requires_grad_(), mi.float().requires_grad_()
    dkl, dmi = torch.autograd.grad(weights(kl, mi).square().sum(), (kl, mi))
    assert (dkl.dtype, dmi.dtype) == (torch.bfloat16, torch.float32)


def test_ema_moves_the_named_rows_alone_and_tells_autograd():
    for dtype in (torch.float32, torch.float64):
        table, w = torch.rand(6, 3, dtype=dtype), torch.rand(2, 3, dtype=dtype)
        expected, index = table.clone(), torch.tensor([4, 1])
        expected[index] = 0.3 * w + 0.7 * expected[index]
        version = table._version
        assert ops.ema_rows_(table, index, w, 0.3) is None
        assert (table - expected).abs().max() <= 1e-6
        assert torch.equal(table[[0, 2, 3, 5]], expected[[0, 2, 3, 5]])
        assert table._version > version


def test_ema_refuses_bad_input_and_leaves_the_table():
    table, w = torch.rand(5, 3), torch.rand(2, 3)
    before = table.clone()
    index = torch.tensor([1, 2])
    for arguments, message in {
        (torch.tensor([1, 1]), w, 0.5): "index must not name a row twice",
        (torch.tensor([1, 5]), w, 0.5): "index must be from 0 to the last row of the table 4",
        (torch.tensor([-1, 2]), w, 0.5): "index must be from 0",
        (index.int(), w, 0.5): "index must be int64, got int32",
        (index, w[:1], 0.5): r"w must be \[N, M\] = \[2, 3\], got \[1, 3\]",
        (index, w.double(), 0.5): "w must be float32, got float64",
        (index, w, 1.5): "alpha must be from 0 to 1, got 1.5",
        (index, w, math.nan): "alpha must be from 0 to 1",
    }.items():
        with pytest.raises(RuntimeError, match=message):
            ops.ema_rows_(table, *arguments)
    assert torch.equal(table, before)
    with pytest.raises(RuntimeError, match="table must be float32 or float64, got bfloat16"):
        ops.ema_rows_(table.bfloat16(), index, w.bfloat16(), 0.5)
    with pytest.raises(RuntimeError, match="table must be contiguous"):
        ops.ema_rows_(torch.rand(3, 5).T, index, w, 0.5)


def embeddings(dtype=torch.float64):
    shapes = [(6, 4), (6, 5, 3), (6,), (6, 2, 2, 2)]
    return [torch.randn(shape, dtype=torch.float64).to(dtype).requires_grad_() for shape in shapes]


@pytest.mark.parametrize("dtype", DTYPES)
def test_scale_modalities_multiplies_each_row_by_its_weight(dtype):
    hs, w = embeddings(dtype), torch.rand(6, 4)
    scaled = ops.scale_modalities(hs, w)
    for m, (h, got) in enumerate(zip(hs, scaled, strict=True)):
        exact = h.double() * w[:, m].double().reshape(-1, *[1] * (h.dim() - 1))
        assert got.dtype == dtype and got.shape == h.shape
        oracles.assert_near(got, exact, torch.finfo(dtype).eps)


def test_scale_modalities_gradients_are_right():
    hs, w = embeddings(), torch.rand(6, 4, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda w, *hs: ops.scale_modalities(list(hs), w), (w, *hs))


def test_scale_modalities_needs_no_gradient_of_every_output_or_input():
    hs, w = embeddings(), torch.rand(6, 4, dtype=torch.float64, requires_grad=True)
    hs[3] = hs[3].detach()
    scaled = ops.scale_modalities(hs, w)
    dw, dh = torch.autograd.grad(scaled[1].sum() + scaled[3].sum(), (w, hs[1]))
    assert torch.equal(dh, w[:, 1, None, None].detach().expand(6, 5, 3))
    oracles.assert_near(dw[:, 1], hs[1].sum((1, 2)), 1e-13)
    assert (dw[:, [0, 2]] == 0).all()
    frozen = ops.scale_modalities(embeddings(), w.detach())
    assert all(t.requires_grad for t in frozen)


def test_scale_modalities_takes_mixed_dtypes_and_layouts():
    hs = [torch.randn(6, 4).T.contiguous().T, torch.randn(6, 3).bfloat16(), torch.randn(12, 3)[::2].half()]
    w = torch.rand(6, 3, dtype=torch.float64)
    scaled = ops.scale_modalities(hs, w)
    assert [t.dtype for t in scaled] == [torch.float32, torch.bfloat16, torch.float16]
    oracles.assert_near(scaled[0], hs[0] * w[:, :1], 1e-6)
    assert [t.shape for t in ops.scale_modalities([torch.zeros(0, 4)], torch.zeros(0, 1))] == [(0, 4)]


@pytest.mark.parametrize(
    ("hs", "w", "message"),
    [
        ([torch.zeros(4, 2)], torch.zeros(4, 2), r"w must be \[N, M\] = \[\*, 1\], got \[4, 2\]"),
        ([torch.zeros(3, 2)], torch.zeros(4, 1), r"embeddings\[0\] must be \[N, ...\] = \[4, ...\], got \[3, 2\]"),
        ([torch.zeros(4).double(), torch.zeros(4)], torch.zeros(4, 2), "must be all of float64, or none"),
        ([torch.zeros(4).long()], torch.zeros(4, 1), r"embeddings\[0\] must be float32"),
        ([], torch.zeros(4, 0), "w must have from 1 to 256 modalities, got 0"),
    ],
)
def test_scale_modalities_refuses_bad_input(hs, w, message):
    with pytest.raises(RuntimeError, match=message):
        ops.scale_modalities(hs, w)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kl": torch.zeros(4)}, r"kl must be \[N, M\]"),
        ({"mi": torch.zeros(2)}, r"mi must be \[M\] = \[3\], got \[2\]"),
        ({"mi": torch.tensor([1, math.nan, 1])}, "mi must be finite for every modality, got nan for 1"),
        ({"mi": torch.zeros(3).long()}, "mi must be float32, bfloat16, float16 or float64, got int64"),
        ({"present": torch.ones(4, 2).bool()}, r"present must be \[N, M\] = \[4, 3\], got \[4, 2\]"),
        ({"floor": 0.0}, "floor must be at least 1e-12, got 0"),
        ({"ceiling": 1e-9}, "ceiling must be from floor"),
        ({"ceiling": math.inf}, "ceiling must be from floor"),
        ({"temperature": 0.0}, "temperature must be from 1e-12 to"),
        ({"mode": "sum"}, "mode must be diverge or agree, got sum"),
    ],
)
def test_weights_refuse_bad_input(change, message):
    arguments = {"kl": torch.ones(4, 3), "mi": torch.ones(3), "present": None, **OPTIONS} | change
    with pytest.raises(RuntimeError, match=message):
        ops.btw_weights(*arguments.values())


def test_results_do_not_depend_on_threads(at_each_thread_count):
    kl, mi = problem(50000, dtype=torch.float32)
    kl, mi, index = kl.requires_grad_(), mi.requires_grad_(), torch.randperm(60000)[:50000]
    hs = [torch.randn(50000, d, requires_grad=True) for d in (7, 3, 1)]

    def run():
        results = []
        for mode in ("diverge", "agree"):
            w = weights(kl, mi, mode=mode)
            table = torch.ones(60000, 3)
            ops.ema_rows_(table, index, w.detach(), 0.5)
            loss = sum(t.square().sum() for t in ops.scale_modalities(hs, w))
            results += [w.detach(), table, *torch.autograd.grad(loss, (kl, mi, *hs))]
        return results

    at_each_thread_count(run)


@pytest.mark.usefixtures("poisoned_memory")
def test_every_element_of_the_outputs_is_written():
    kl, mi = problem(3000, dtype=torch.float32)
    kl, mi = kl.requires_grad_(), mi.requires_grad_()
    hs = [torch.randn(3000, d, requires_grad=True) for d in (7, 3, 1)]
    w = weights(kl, mi)
    scaled = ops.scale_modalities(hs, w)
    gradients = torch.autograd.grad(sum(t.sum() for t in scaled), (kl, mi, *hs))
    assert all(t.isfinite().all() for t in (w, *scaled, *gradients))


def test_opcheck():
    kl, mi = problem(5)
    present = torch.rand(5, 3) < 0.8
    kl, mi = kl.requires_grad_(), mi.requires_grad_()
    torch.library.opcheck(ops.btw_weights.default, (kl, mi, present, *OPTIONS.values()))
    backward = (torch.randn(5, 3).double(), kl.detach(), mi.detach(), None, *OPTIONS.values(), [True, False])
    torch.library.opcheck(ops.btw_weights_backward.default, backward)
    torch.library.opcheck(ops.ema_rows_.default, (torch.rand(5, 3), torch.tensor([3, 0]), torch.rand(2, 3), 0.5))
    w = torch.rand(6, 4, dtype=torch.float64, requires_grad=True)
    torch.library.opcheck(ops.scale_modalities.default, (embeddings(), w))
    plain_hs = [h.detach() for h in embeddings()]
    torch.library.opcheck(ops.scale_modalities_dweights.default, (plain_hs, plain_hs))


def test_compile_gives_what_eager_gives():
    kl, mi = problem(dtype=torch.float32)
    hs = [torch.randn(40, d) for d in (4, 5, 6)]

    def step(kl, mi, *hs):
        return [t + 1 for t in ops.scale_modalities(list(hs), ops.btw_weights(kl, mi))]

    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(kl, mi, *hs), step(kl, mi, *hs), strict=True))


def test_autocast_takes_divergences_in_float32():
    kl, mi = problem(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        w = weights(kl, mi)
    assert w.dtype == torch.float32


def test_double_backward_is_refused():
    kl, mi = problem(4)
    (dkl,) = torch.autograd.grad(weights(kl.requires_grad_(), mi).square().sum(), kl, create_graph=True)
    with pytest.raises(RuntimeError, match="btw_weights_backward has no derivative"):
        dkl.sum().backward()
