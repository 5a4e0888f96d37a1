import math

import pytest
import torch

import mmbal  # noqa: F401  (loads the operators)
import oracles

load_balance_loss, router_z_loss = torch.ops.mmbal.load_balance_loss, torch.ops.mmbal.router_z_loss
NORMALIZATIONS = ["mixtral", "megatron", "switch"]


def routed(N=20, E=5, K=2, dtype=torch.float64, seed=0):
    logits = oracles.separated_logits(N, E, dtype, seed)
    return logits, oracles.topk(logits, K)[1]


def some_mask(N):
    return torch.arange(N) % 3 != 1


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
@pytest.mark.parametrize(("N", "E", "K"), [(1, 1, 1), (20, 5, 2), (300, 4, 3), (7, 130, 8), (5000, 8, 2)])
def test_losses_equal_their_formulas(N, E, K, normalize, masked):
    logits, indices = routed(N, E, K)
    mask = some_mask(N) if masked else None
    ours = load_balance_loss(logits, indices, mask, normalize)
    assert ours.shape == ()
    oracles.assert_near(ours, oracles.load_balance(logits, indices, mask, normalize), 1e-12)
    oracles.assert_near(router_z_loss(logits, mask), oracles.z_loss(logits, mask), 1e-12)


@pytest.mark.parametrize("masked", [False, True])
def test_load_balance_agrees_with_transformers(masked):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    logits = torch.randn(3 * 7, 6)
    attention_mask = (torch.rand(3, 7) < 0.6).long() if masked else None
    token_mask = attention_mask.reshape(-1).bool() if masked else None
    expected = mixtral.load_balancing_loss_func((logits,), 6, 2, attention_mask)
    oracles.assert_near(load_balance_loss(logits, logits.topk(2).indices, token_mask), expected, 1e-6)


@pytest.mark.parametrize(("normalize", "value"), [("mixtral", 2.0), ("megatron", 1.0), ("switch", 1.0)])
def test_a_perfect_balance_has_the_value_the_convention_says(normalize, value):
    indices = torch.stack([torch.arange(8) % 4, (torch.arange(8) + 1) % 4], 1)
    assert load_balance_loss(torch.zeros(8, 4), indices, None, normalize).item() == pytest.approx(value, rel=1e-6)


def test_all_mass_on_one_expert_is_four_of_four():
    logits = torch.tensor([[50.0, 0.0, -1.0, -2.0]]).repeat(10, 1)
    indices = torch.ops.mmbal.moe_topk(logits, 2)[1]
    assert load_balance_loss(logits, indices).item() == pytest.approx(4.0, rel=1e-6)


def test_switch_counts_the_first_choice_only():
    logits, indices = routed(30, 5, 3)
    first = load_balance_loss(logits, indices[:, :1], None, "mixtral")
    assert load_balance_loss(logits, indices, None, "switch").item() == pytest.approx(first.item(), rel=1e-14)
    assert load_balance_loss(logits, indices, None, "mixtral").item() != pytest.approx(first.item(), rel=1e-2)


@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_load_balance_gradient_is_the_formula_of_the_spec(normalize):
    logits, indices = routed(12, 4, 2)
    logits.requires_grad_()
    mask = some_mask(12)
    (grad,) = torch.autograd.grad(load_balance_loss(logits, indices, mask, normalize), logits)
    counted = indices[:, :1] if normalize == "switch" else indices
    p, M, c = torch.softmax(logits.detach(), 1), mask.sum(), 0.5 if normalize == "megatron" else 1.0
    F = torch.nn.functional.one_hot(counted[mask], 4).sum((0, 1)) / M
    oracles.assert_near(grad, c * 4 / M * mask[:, None] * p * (F - (p * F).sum(1, keepdim=True)), 1e-12)
    assert (grad[~mask] == 0).all()


@pytest.mark.parametrize("masked", [False, True])
def test_gradients_are_right(masked):
    logits, indices = routed(7, 4, 2)
    logits.requires_grad_()
    mask = some_mask(7) if masked else None
    for normalize in NORMALIZATIONS:
        assert torch.autograd.gradcheck(lambda x, n=normalize: load_balance_loss(x, indices, mask, n), logits)
    assert torch.autograd.gradcheck(lambda x: router_z_loss(x, mask), logits)


def test_z_loss_of_equal_logits_is_the_squared_log_of_the_expert_count():
    assert router_z_loss(torch.zeros(9, 4)).item() == pytest.approx(math.log(4) ** 2, rel=1e-6)
    assert router_z_loss(torch.full((9, 4), -math.log(4))).item() == pytest.approx(0.0, abs=1e-12)


def test_losses_stay_finite_for_huge_logits():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-1e4, -1e4, -1e4]], requires_grad=True)
    indices = torch.tensor([[0, 2], [0, 1]])
    loss = router_z_loss(logits) + load_balance_loss(logits, indices)
    (grad,) = torch.autograd.grad(loss, logits)
    assert loss.item() == pytest.approx(1e8, rel=1e-3)
    assert grad.isfinite().all()


def test_a_minus_infinity_logit_has_probability_and_gradient_zero():
    logits, indices = routed(6, 4, 2)
    logits[:, 3] = -math.inf
    logits.requires_grad_()
    indices = oracles.topk(logits.detach(), 2)[1]
    loss = router_z_loss(logits) + load_balance_loss(logits, indices)
    (grad,) = torch.autograd.grad(loss, logits)
    expected = oracles.z_loss(logits[:, :3]) + oracles.load_balance(logits, indices)
    oracles.assert_near(loss, expected, 1e-12)
    assert grad.isfinite().all() and (grad[:, 3] == 0).all()


def test_masked_tokens_are_as_if_they_were_not_there_even_when_nan():
    logits, indices = routed(20, 5, 2)
    mask = some_mask(20)
    logits[~mask] = math.nan
    logits.requires_grad_()
    balance, z = load_balance_loss(logits, indices, mask), router_z_loss(logits, mask)
    oracles.assert_near(balance, load_balance_loss(logits[mask], indices[mask]), 1e-14)
    oracles.assert_near(z, router_z_loss(logits[mask]), 1e-14)
    (grad,) = torch.autograd.grad(balance + z, logits)
    assert (grad[~mask] == 0).all() and grad[mask].isfinite().all()


def test_a_counted_nan_token_shows_in_the_losses():
    logits, indices = routed(20, 5, 2)
    logits[3, 1] = math.nan
    assert load_balance_loss(logits, indices).isnan() and router_z_loss(logits).isnan()


@pytest.mark.parametrize("all_masked", [False, True])
def test_no_counted_token_gives_zero_loss_and_zero_gradient(all_masked):
    N = 4 if all_masked else 0
    logits = torch.randn(N, 3, requires_grad=True)
    mask = torch.zeros(N, dtype=torch.bool) if all_masked else None
    indices = torch.zeros(N, 2, dtype=torch.int64)
    loss = load_balance_loss(logits, indices, mask) + router_z_loss(logits, mask)
    assert loss.item() == 0
    loss.backward()
    assert logits.grad.shape == (N, 3) and (logits.grad == 0).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_losses_are_computed_in_float32_whatever_the_logits_are(dtype):
    logits, indices = routed(4000, 8, 2, dtype)
    logits.requires_grad_()
    exact = logits.detach().double().requires_grad_()
    ours = load_balance_loss(logits, indices), router_z_loss(logits)
    expected = oracles.load_balance(exact, indices), oracles.z_loss(exact)
    for a, b in zip(ours, expected, strict=True):
        assert a.dtype == torch.float32
        oracles.assert_near(a, b, 2e-6)
        (grad,), (expected_grad,) = torch.autograd.grad(a, logits), torch.autograd.grad(b, exact)
        assert grad.dtype == dtype
        oracles.assert_near(grad, expected_grad, 3 * oracles.FORWARD_TOLERANCE[dtype])


def test_losses_stay_in_float32_under_autocast():
    logits, indices = routed(dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = load_balance_loss(logits, indices), router_z_loss(logits)
    assert torch.equal(ours[0], load_balance_loss(logits, indices))
    assert torch.equal(ours[1], router_z_loss(logits))


def test_losses_read_any_layout():
    logits, indices = routed(30, 5, 2)
    mask = some_mask(60)[::2]
    columns, index_columns = logits.t().contiguous().t(), indices.t().contiguous().t()
    assert torch.equal(
        load_balance_loss(columns, index_columns, mask), load_balance_loss(logits, indices, mask.clone())
    )
    assert torch.equal(router_z_loss(columns, mask), router_z_loss(logits, mask.clone()))
    row = logits[:1].expand(30, 5).requires_grad_()
    oracles.assert_near(router_z_loss(row), oracles.z_loss(logits[:1]), 1e-12)


def test_losses_write_every_element(poisoned_memory):
    logits, indices = routed(50, 5, 2)
    logits.requires_grad_()
    ours = load_balance_loss(logits, indices) + router_z_loss(logits, some_mask(50))
    expected = oracles.load_balance(logits, indices) + oracles.z_loss(logits, some_mask(50))
    oracles.assert_near(ours, expected, 1e-12)
    (grad,), (expected_grad,) = torch.autograd.grad(ours, logits), torch.autograd.grad(expected, logits)
    oracles.assert_near(grad, expected_grad, 1e-12)


def test_threads_do_not_change_a_bit(at_each_thread_count):
    logits, indices = routed(30_000, 8, 2, torch.float32)
    logits.requires_grad_()

    def run():
        losses = load_balance_loss(logits, indices), router_z_loss(logits)
        return *losses, *(torch.autograd.grad(loss, logits)[0] for loss in losses)

    at_each_thread_count(run)


def test_double_backward_is_right_or_refused():
    logits, indices = routed()
    logits.requires_grad_()
    for loss in (load_balance_loss(logits, indices), router_z_loss(logits)):
        (first,) = torch.autograd.grad(loss, logits, create_graph=True)
        with pytest.raises(RuntimeError, match="(?i)double backward|twice"):
            first.square().sum().backward()


@pytest.mark.parametrize("N", [0, 1, 33])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_operators_are_well_behaved(N, dtype):
    logits, indices = routed(N, 4, 2, dtype)
    logits.requires_grad_()
    torch.library.opcheck(load_balance_loss.default, (logits, indices))
    torch.library.opcheck(load_balance_loss.default, (logits, indices, some_mask(N), "switch"))
    torch.library.opcheck(router_z_loss.default, (logits, some_mask(N)))


def test_losses_compile_in_one_graph_with_gradients():
    def loss(logits, indices, mask):
        return load_balance_loss(logits, indices, mask) + router_z_loss(logits, mask)

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager", dynamic=True)
    for N in (4, 9):
        logits, indices = routed(N)
        a, b = logits.clone().requires_grad_(), logits.clone().requires_grad_()
        ours, eager = compiled(a, indices, some_mask(N)), loss(b, indices, some_mask(N))
        assert torch.equal(ours, eager)
        assert torch.equal(torch.autograd.grad(ours, a)[0], torch.autograd.grad(eager, b)[0])


LOGITS, INDICES = torch.zeros(3, 4), torch.zeros(3, 2, dtype=torch.int64)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((torch.zeros(4), INDICES), "logits"),
        ((LOGITS.int(), INDICES), "logits"),
        ((LOGITS.long(), INDICES), "logits"),
        ((LOGITS, INDICES[:2]), "indices"),
        ((LOGITS, INDICES[:, 0]), "indices"),
        ((LOGITS, INDICES.int()), "indices"),
        ((LOGITS, torch.full((3, 2), 4)), "indices"),
        ((LOGITS, torch.full((3, 2), -1)), "indices"),
        ((LOGITS, INDICES, torch.ones(2, dtype=torch.bool)), "token_mask"),
        ((LOGITS, INDICES, torch.ones(3, 1, dtype=torch.bool)), "token_mask"),
        ((LOGITS, INDICES, torch.ones(3)), "token_mask"),
        ((LOGITS, INDICES, None, "mixtrl"), "normalize"),
    ],
)
def test_load_balance_names_the_wrong_argument(arguments, name):
    with pytest.raises(RuntimeError, match=f"load_balance_loss: .*{name}"):
        load_balance_loss(*arguments)


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((torch.zeros(4),), "logits"),
        ((LOGITS.int(),), "logits"),
        ((LOGITS, torch.ones(4, dtype=torch.bool)), "token_mask"),
        ((LOGITS, torch.ones(3, dtype=torch.uint8)), "token_mask"),
    ],
)
def test_z_loss_names_the_wrong_argument(arguments, name):
    with pytest.raises(RuntimeError, match=f"router_z_loss: .*{name}"):
        router_z_loss(*arguments)
