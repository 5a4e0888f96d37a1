import math

import pytest
import scipy.stats
import torch
from torch.distributions import Normal, kl_divergence

import mmbal  # noqa: F401  (loads the operators)
import oracles

ops = torch.ops.mmbal
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
BOUND = {torch.float64: 1e-12}  # of errors, in 1 + KL; 1e-6 for sums in float32


def gaussians(N=50, M=3, dtype=torch.float64):
    return [t.to(dtype) for t in (torch.randn(N, M), torch.randn(N, M), torch.randn(N), torch.randn(N))]


def plain_gaussian(mu, log_sigma, fused_mu, fused_log_sigma):
    sigma, fused_sigma = log_sigma.double().exp(), fused_log_sigma.double().exp()[:, None]
    return kl_divergence(Normal(mu.double(), sigma), Normal(fused_mu.double()[:, None].expand_as(sigma), fused_sigma))


def plain_residual(mu, fused_mu, target, sigma_min):
    residuals, fused = target.double()[:, None] - mu.double(), (target.double() - fused_mu.double())[:, None]
    sigma, fused_sigma = residuals.abs().clamp_min(sigma_min), fused.abs().clamp_min(sigma_min)
    return (fused_sigma / sigma).log() + (sigma**2 + (fused - residuals) ** 2) / (2 * fused_sigma**2) - 0.5


def plain_categorical(logits, fused_logits, reverse=False):
    p = torch.log_softmax(logits.double(), -1)
    q = torch.log_softmax(fused_logits.double(), -1).expand_as(p)
    first, second = (q, p) if reverse else (p, q)
    return torch.nn.functional.kl_div(second, first, reduction="none", log_target=True).sum(-1).T


def assert_kl(actual, expected, dtype):
    assert actual.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert actual.shape == expected.shape
    error = (actual.double() - expected).abs() / (1 + expected)
    assert error.max() <= BOUND.get(dtype, 1e-6), error.max()
    assert (actual >= 0).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("N", "M"), [(1, 1), (50, 3), (7, 4), (3000, 2), (20, 30)])
def test_gaussian_kl_equals_torch_distributions(N, M, dtype):
    inputs = gaussians(N, M, dtype)
    assert_kl(ops.gaussian_kl(*inputs), plain_gaussian(*inputs), dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_residual_kl_takes_residuals_as_sigmas_and_bounds_them(dtype):
    mu, _, fused, target = gaussians(dtype=dtype)
    mu[3] = target[3]
    fused[4] = target[4]
    assert_kl(ops.residual_kl(mu, fused, target, 0.25), plain_residual(mu, fused, target, 0.25), dtype)


def test_residual_kl_is_a_function_of_the_signed_ratio_of_residuals():
    mu, _, fused, target = gaussians()
    r = (target[:, None] - mu) / (target - fused)[:, None]
    expected = r**2 - r - r.abs().log()
    assert ((ops.residual_kl(mu, fused, target, 1e-12) - expected).abs() <= 1e-9 * (1 + expected)).all()


@pytest.mark.parametrize("reverse", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("M", "N", "C"), [(1, 1, 1), (3, 40, 2), (2, 30, 10), (4, 9, 100), (2, 5, 3000)])
def test_categorical_kl_equals_torch(M, N, C, dtype, reverse):
    logits, fused = (5 * torch.randn(M, N, C)).to(dtype), (5 * torch.randn(N, C)).to(dtype)
    assert_kl(ops.categorical_kl(logits, fused, reverse), plain_categorical(logits, fused, reverse), dtype)


def test_categorical_kl_equals_scipy():
    logits, fused = torch.randn(3, 20, 6, dtype=torch.float64), torch.randn(20, 6, dtype=torch.float64)
    p, q = logits.softmax(-1).numpy(), fused.softmax(-1).numpy()
    expected = torch.tensor([[scipy.stats.entropy(p[m, n], q[n]) for m in range(3)] for n in range(20)])
    assert (ops.categorical_kl(logits, fused) - expected).abs().max() <= 1e-12


@pytest.mark.parametrize("scale", [20, 200])
def test_categorical_kl_stays_finite_and_near_for_large_logits(scale):
    logits, fused = scale * torch.randn(2, 500, 8), scale * torch.randn(500, 8)
    assert_kl(ops.categorical_kl(logits, fused), plain_categorical(logits, fused), torch.float32)


def test_golden_values():
    one = [torch.tensor(v, dtype=torch.float64) for v in ([[0.5]], [[math.log(0.8)]], [-0.25], [math.log(1.25)])]
    assert ops.gaussian_kl(*one).item() == pytest.approx(0.33108710262841956, abs=1e-15)
    tenth = math.log(0.1)
    fixed = [torch.tensor(v, dtype=torch.float64) for v in ([[0.3]], [[tenth]], [0.1], [tenth])]
    assert ops.gaussian_kl(*fixed).item() == pytest.approx(2.0, abs=1e-13)
    mu = torch.tensor([[0.5, 1.5, 1.35]], dtype=torch.float64)
    fused, target = torch.tensor([0.9], dtype=torch.float64), torch.tensor([1.2], dtype=torch.float64)
    kl = ops.residual_kl(mu, fused, target, 1e-3)
    expected = torch.tensor([[2.2638132507239095, 2.0, 1.4431471805599454]], dtype=torch.float64)
    assert (kl - expected).abs().max() <= 1e-14
    p, q = (torch.tensor(v, dtype=torch.float64).log() for v in ([[[0.7, 0.2, 0.1]]], [[0.5, 0.25, 0.25]]))
    assert ops.categorical_kl(p, q).item() == pytest.approx(0.09927278218459168, abs=1e-15)
    assert ops.categorical_kl(p, q, True).item() == pytest.approx(0.11662245248648459, abs=1e-15)


def test_a_hugely_wrong_modality_is_infinitely_far_and_not_missing():
    mu, fused, target = torch.tensor([[1e37, 0.5]]), torch.tensor([0.0]), torch.tensor([1e-4])
    kl = ops.residual_kl(mu, fused, target, 1e-3)
    assert kl[0, 0] == math.inf and kl[0, 1].isfinite()


def test_almost_equal_gaussians_keep_their_digits_in_float32():
    delta = torch.tensor([[1e-1, 1e-2, 1e-3, 1e-4]])
    kl = ops.gaussian_kl(torch.zeros(1, 4), delta, torch.zeros(1), torch.zeros(1))
    x = 2 * delta.double()
    assert (kl - 0.5 * (torch.expm1(x) - x)).abs().max() <= 1e-9


def test_gradients_are_right():
    mu, log_sigma, fused, fused_log_sigma = (t[:6].requires_grad_() for t in gaussians())
    assert torch.autograd.gradcheck(ops.gaussian_kl, (mu, log_sigma, fused, fused_log_sigma))
    target = torch.randn(6, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda *t: ops.residual_kl(*t, 1e-4), (mu, fused, target))
    assert torch.autograd.gradcheck(lambda *t: ops.residual_kl(*t, 0.7), (mu, fused, target))
    logits = torch.randn(3, 5, 4, dtype=torch.float64, requires_grad=True)
    fused_logits = torch.randn(5, 4, dtype=torch.float64, requires_grad=True)
    for reverse in (False, True):
        assert torch.autograd.gradcheck(lambda z, q, r=reverse: ops.categorical_kl(z, q, r), (logits, fused_logits))


def test_gradients_are_those_of_the_spec():
    mu, log_sigma, fused, fused_log_sigma = (t.requires_grad_() for t in gaussians())
    c = torch.randn(50, 3, dtype=torch.float64)
    got = torch.autograd.grad(
        ops.gaussian_kl(mu, log_sigma, fused, fused_log_sigma), (mu, log_sigma, fused, fused_log_sigma), c
    )
    d, s2, q2 = mu - fused[:, None], (2 * log_sigma).exp(), (2 * fused_log_sigma).exp()[:, None]
    expected = (c * d / q2, c * (s2 / q2 - 1), -(c * d / q2).sum(1), (c * (1 - (s2 + d**2) / q2)).sum(1))
    for one, other in zip(got, expected, strict=True):
        oracles.assert_near(one, other.detach(), 1e-12)
    target = torch.randn(50, dtype=torch.float64)
    got = torch.autograd.grad(ops.residual_kl(mu, fused, target, 1e-9), (mu, fused), c)
    e_u, e_q = target[:, None] - mu, (target - fused)[:, None]
    r = e_u / e_q
    expected = (-c * (2 * r - 1 - 1 / r) / e_q, (c * (2 * r**2 - r - 1) / e_q).sum(1))
    for one, other in zip(got, expected, strict=True):
        oracles.assert_near(one, other.detach(), 1e-9)


@pytest.mark.parametrize("needed", [(0,), (1,), (2,), (3,), (0, 2)])
def test_only_the_gradients_that_are_needed_are_returned(needed):
    inputs = gaussians()
    every = [t.clone().requires_grad_() for t in inputs]
    expected = torch.autograd.grad(ops.gaussian_kl(*every).sum(), every)
    some = [t.clone().requires_grad_(i in needed) for i, t in enumerate(inputs)]
    got = torch.autograd.grad(ops.gaussian_kl(*some).sum(), [some[i] for i in needed])
    assert all(torch.equal(g, expected[i]) for g, i in zip(got, needed, strict=True))


def test_a_nan_stays_in_its_entry_and_out_of_gradients_where_none_came():
    inputs = [t.requires_grad_() for t in gaussians()]
    with torch.no_grad():
        inputs[0][7, 1] = math.nan
    kl = ops.gaussian_kl(*inputs)
    assert kl.isnan().nonzero().tolist() == [[7, 1]]
    weight = torch.ones_like(kl)
    weight[7, 1] = 0
    for gradient in torch.autograd.grad(kl, inputs, weight):
        assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_inputs_have_gradients_of_their_own_dtype(dtype):
    inputs = [t.requires_grad_() for t in gaussians(dtype=dtype)]
    exact = [t.detach().double().requires_grad_() for t in inputs]
    got = torch.autograd.grad(ops.gaussian_kl(*inputs).sum(), inputs)
    for one, other in zip(got, torch.autograd.grad(ops.gaussian_kl(*exact).sum(), exact), strict=True):
        assert one.dtype == dtype
        oracles.assert_near(one, other, oracles.FORWARD_TOLERANCE[dtype])


def test_autocast_takes_them_in_float32():
    mu, log_sigma, fused, fused_log_sigma = gaussians(dtype=torch.bfloat16)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        mixed = ops.gaussian_kl(mu, log_sigma.float(), fused, fused_log_sigma)
        doubles = ops.gaussian_kl(*gaussians())
    assert torch.equal(mixed, ops.gaussian_kl(mu, log_sigma, fused, fused_log_sigma))
    assert doubles.dtype == torch.float64


def test_any_layout_and_no_rows_are_served():
    mu, log_sigma, fused, fused_log_sigma = gaussians()
    strided = ops.gaussian_kl(mu.T.contiguous().T, log_sigma, fused.repeat(2)[::1][:50], fused_log_sigma)
    assert torch.equal(strided, ops.gaussian_kl(mu, log_sigma, fused, fused_log_sigma))
    assert ops.gaussian_kl(mu[:0], log_sigma[:0], fused[:0], fused_log_sigma[:0]).shape == (0, 3)
    assert ops.categorical_kl(torch.randn(2, 0, 4), torch.randn(0, 4)).shape == (0, 2)
    logits, fused_logits = torch.randn(4, 6, 3), torch.randn(6, 4)
    turned = ops.categorical_kl(logits.permute(2, 1, 0), fused_logits)
    assert torch.equal(turned, ops.categorical_kl(logits.permute(2, 1, 0).contiguous(), fused_logits))


@pytest.mark.usefixtures("poisoned_memory")
def test_every_element_of_the_outputs_is_written():
    inputs = [t.requires_grad_() for t in gaussians(700, 3)]
    logits, fused = torch.randn(2, 300, 7, requires_grad=True), torch.randn(300, 7, requires_grad=True)
    kl, other = ops.gaussian_kl(*inputs), ops.categorical_kl(logits, fused)
    gradients = torch.autograd.grad(kl.sum() + other.sum(), [*inputs, logits, fused])
    assert all(t.isfinite().all() for t in (kl, other, *gradients))


def test_results_do_not_depend_on_threads(at_each_thread_count):
    mu, log_sigma, fused, fused_log_sigma = (t.float().requires_grad_() for t in gaussians(30000, 3))
    logits, fused_logits = torch.randn(3, 20000, 5, requires_grad=True), torch.randn(20000, 5, requires_grad=True)

    def run():
        kl = ops.gaussian_kl(mu, log_sigma, fused, fused_log_sigma)
        residual = ops.residual_kl(mu, fused, fused_log_sigma, 1e-3)
        categorical = ops.categorical_kl(logits, fused_logits)
        inputs = (mu, log_sigma, fused, logits, fused_logits)
        return [kl, residual, categorical, *torch.autograd.grad(kl.sum() + categorical.sum(), inputs)]

    at_each_thread_count(run)


def test_opcheck():
    inputs = [t.requires_grad_() for t in gaussians(4, 3)]
    torch.library.opcheck(ops.gaussian_kl.default, tuple(inputs))
    mu, _, fused, target = inputs
    torch.library.opcheck(ops.residual_kl.default, (mu, fused, target.detach(), 1e-3))
    logits, fused_logits = torch.randn(2, 4, 3, requires_grad=True), torch.randn(4, 3, requires_grad=True)
    for reverse in (False, True):
        torch.library.opcheck(ops.categorical_kl.default, (logits, fused_logits, reverse))
    dkl, plain = torch.randn(4, 3, dtype=torch.float64), [t.detach() for t in inputs]
    some = [True, False, True, False]
    torch.library.opcheck(ops.gaussian_kl_backward.default, (dkl, *plain, some))
    torch.library.opcheck(ops.residual_kl_backward.default, (dkl, plain[0], plain[2], plain[3], 1e-3, [True, False]))
    arguments = (torch.randn(4, 2), logits.detach(), fused_logits.detach(), False, [False, True])
    torch.library.opcheck(ops.categorical_kl_backward.default, arguments)


def test_compile_gives_what_eager_gives():
    inputs = gaussians(dtype=torch.float32)
    compiled = torch.compile(lambda *t: ops.gaussian_kl(*t) * 2, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*inputs), ops.gaussian_kl(*inputs) * 2)


def test_double_backward_is_refused():
    inputs = [t.requires_grad_() for t in gaussians(4, 3)]
    (gradient,) = torch.autograd.grad(ops.gaussian_kl(*inputs).sum(), inputs[:1], create_graph=True)
    with pytest.raises(RuntimeError, match="gaussian_kl_backward has no derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"mu": torch.zeros(4)}, r"gaussian_kl: mu must be \[N, M\]"),
        ({"mu": torch.zeros(4, 0)}, "mu must have from 1 to 256 modalities, got 0"),
        ({"mu": torch.zeros(4, 3, dtype=torch.int64)}, "mu must be float32, bfloat16, float16 or float64, got int64"),
        ({"log_sigma": torch.zeros(4, 2)}, r"log_sigma must be \[N, M\] = \[4, 3\], got \[4, 2\]"),
        ({"log_sigma": torch.zeros(4, 3).double()}, "log_sigma must be float32, got float64"),
        ({"fused_mu": torch.zeros(5)}, r"fused_mu must be \[N\] = \[4\], got \[5\]"),
        ({"fused_log_sigma": torch.zeros(4, 1)}, r"fused_log_sigma must be \[N\] = \[4\], got \[4, 1\]"),
    ],
)
def test_gaussian_kl_refuses_bad_input(change, message):
    inputs = {"mu": torch.zeros(4, 3), "log_sigma": torch.zeros(4, 3)}
    inputs |= {"fused_mu": torch.zeros(4), "fused_log_sigma": torch.zeros(4)} | change
    with pytest.raises(RuntimeError, match=message):
        ops.gaussian_kl(*inputs.values())


def test_the_others_refuse_bad_input():
    mu, row = torch.zeros(4, 3), torch.zeros(4)
    for sigma_min in (0.0, -1.0, math.nan, math.inf, 1e-40):
        with pytest.raises(RuntimeError, match="sigma_min must be finite and at least 1e-30"):
            ops.residual_kl(mu, row, row, sigma_min)
    with pytest.raises(RuntimeError, match=r"target must be \[N\] = \[4\], got \[3\]"):
        ops.residual_kl(mu, row, row[:3], 1e-3)
    with pytest.raises(RuntimeError, match=r"fused_logits must be \[N, C\] = \[4, 5\], got \[4, 4\]"):
        ops.categorical_kl(torch.zeros(2, 4, 5), torch.zeros(4, 4))
    with pytest.raises(RuntimeError, match="logits must have at least one class"):
        ops.categorical_kl(torch.zeros(2, 4, 0), torch.zeros(4, 0))
    with pytest.raises(RuntimeError, match="fused_mu must be on meta as mu is|must be on meta"):
        ops.residual_kl(mu.to("meta"), row, row, 1e-3)
