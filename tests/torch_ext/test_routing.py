import pytest
import torch

import mmbal  # noqa: F401  (loads the operators)
import oracles

moe_topk, moe_dispatch = torch.ops.mmbal.moe_topk, torch.ops.mmbal.moe_dispatch
NAN, INF = float("nan"), float("inf")


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize(("E", "k"), [(1, 1), (4, 1), (4, 2), (4, 4), (7, 3), (33, 8), (300, 2)])
def test_topk_equals_the_softmax_of_the_chosen_logits(E, k, normalize):
    logits = oracles.separated_logits(50, E)
    weights, indices = moe_topk(logits, k, normalize)
    expected_weights, expected_indices = oracles.topk(logits, k, normalize)
    assert torch.equal(indices, expected_indices)
    oracles.assert_near(weights, expected_weights, 1e-14)


def test_topk_agrees_with_softmax_then_topk_then_division_as_mixtral_does_it():
    logits = torch.randn(64, 8)
    probabilities, indices = torch.softmax(logits, 1).topk(2)
    weights, ours = moe_topk(logits, 2)
    assert torch.equal(ours, indices)
    oracles.assert_near(weights, probabilities / probabilities.sum(1, keepdim=True), 1e-6)


@pytest.mark.parametrize(
    ("dtype", "weight_dtype"),
    [(torch.float64, torch.float64), (torch.float32, torch.float32), (torch.bfloat16, torch.float32)],
)
def test_topk_weights_are_float32_or_float64_for_float64_and_indices_int64(dtype, weight_dtype):
    logits = torch.randn(20, 5).to(dtype)
    weights, indices = moe_topk(logits, 2)
    assert (weights.dtype, indices.dtype) == (weight_dtype, torch.int64)
    expected, expected_indices = oracles.topk(logits.double(), 2)
    assert torch.equal(indices, expected_indices)  # bfloat16 rounds to ties: the lower index here too
    oracles.assert_near(weights, expected, 1e-6)


def test_topk_breaks_ties_to_the_lower_index():
    weights, indices = moe_topk(torch.zeros(3, 8), 3)
    assert indices.tolist() == [[0, 1, 2]] * 3
    torch.testing.assert_close(weights, torch.full((3, 3), 1 / 3))
    assert moe_topk(torch.tensor([[1.0, 3.0, 2.0, 3.0, 2.0]]), 4)[1].tolist() == [[1, 3, 2, 4]]
    assert moe_topk(torch.tensor([[0.0, -0.0, 0.0]]), 2)[1].tolist() == [[0, 1]]


def test_topk_with_k_equal_to_the_number_of_experts_is_a_dense_softmax():
    logits = torch.randn(10, 6, dtype=torch.float64)
    weights, indices = moe_topk(logits, 6)
    dense = torch.zeros_like(logits).scatter(1, indices, weights)
    oracles.assert_near(dense, torch.softmax(logits, 1), 1e-14)


def test_topk_with_one_choice_and_normalize_has_weight_one_and_no_gradient():
    logits = torch.randn(5, 4, requires_grad=True)
    weights, _ = moe_topk(logits, 1)
    assert (weights == 1).all()
    weights.sum().backward()
    assert (logits.grad == 0).all()


def test_topk_stays_finite_for_huge_logits():
    weights, indices = moe_topk(torch.tensor([[3e38, -3e38, 3e38], [1e4, 1e4 - 1, -1e4]]), 2)
    assert indices.tolist() == [[0, 2], [0, 1]]
    torch.testing.assert_close(weights, torch.tensor([[0.5, 0.5], [0.7310586, 0.2689414]]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("normalize", [True, False])
def test_topk_selection_bias_changes_the_choice_and_not_the_weights(normalize):
    logits = oracles.separated_logits(40, 6)
    bias = torch.tensor([0.0, 5.0, -5.0, 1.1, 0.0, -0.3], dtype=torch.float64)
    weights, indices = moe_topk(logits, 2, normalize, bias)
    expected, expected_indices = oracles.topk(logits, 2, normalize, bias)
    assert torch.equal(indices, expected_indices)
    assert not torch.equal(indices, moe_topk(logits, 2)[1])
    oracles.assert_near(weights, expected, 1e-14)


@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_topk_nan_rows_get_the_first_indices_and_nan_weights_and_leave_other_rows_alone(dtype, normalize):
    logits = oracles.separated_logits(6, 5, dtype)
    clean_weights, clean_indices = moe_topk(logits, 2, normalize)
    logits[1, 3], logits[3], logits[5] = NAN, NAN, -INF
    weights, indices = moe_topk(logits, 2, normalize)
    spoiled, others = [1, 3, 5], [0, 2, 4]
    assert indices[spoiled].tolist() == [[0, 1]] * 3
    assert weights[spoiled].isnan().all()
    assert torch.equal(weights[others], clean_weights[others])
    assert torch.equal(indices[others], clean_indices[others])


def test_topk_infinite_logits_never_give_an_index_out_of_range():
    logits = torch.tensor([[INF, INF, 0.0], [INF, -INF, 0.0], [-INF, INF, NAN]])
    indices = moe_topk(logits, 3)[1]
    assert (indices.sort(1).values == torch.arange(3)).all()


@pytest.mark.parametrize("normalize", [True, False])
def test_topk_minus_infinity_is_a_mask_with_weight_and_gradient_zero(normalize):
    logits = torch.tensor([[-INF, 2.0, -INF, 1.0], [0.5, -INF, -INF, -INF]], dtype=torch.float64, requires_grad=True)
    weights, indices = moe_topk(logits, 2, normalize)
    assert indices.tolist() == [[1, 3], [0, 1]]
    assert weights[1].tolist() == [1.0, 0.0]
    (weights * torch.tensor([3.0, 7.0])).sum().backward()
    assert (logits.grad[logits.isinf()] == 0).all()
    assert logits.grad.isfinite().all() and (logits.grad[0, [1, 3]] != 0).all()


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_topk_gradient_is_right(k, normalize, bias):
    logits = oracles.separated_logits(6, 5).requires_grad_()
    selection_bias = torch.arange(5, dtype=torch.float64) * 0.8 if bias else None
    assert torch.autograd.gradcheck(lambda x: moe_topk(x, k, normalize, selection_bias)[0], logits)


def test_topk_gradient_of_unselected_experts_is_exactly_zero_when_normalized():
    logits = oracles.separated_logits(30, 6).requires_grad_()
    weights, indices = moe_topk(logits, 2)
    (weights * torch.randn_like(weights)).sum().backward()
    unselected = torch.ones(30, 6, dtype=torch.bool).scatter(1, indices, False)
    assert (logits.grad[unselected] == 0).all()
    assert (logits.grad[~unselected] != 0).all()


def test_topk_gradient_keeps_the_dtype_of_the_logits():
    logits = torch.randn(5, 4).bfloat16().requires_grad_()
    (moe_topk(logits, 2)[0] * torch.tensor([1.0, 2.0])).sum().backward()
    exact = logits.detach().double().requires_grad_()
    (oracles.topk(exact, 2)[0] * torch.tensor([1.0, 2.0])).sum().backward()
    assert logits.grad.dtype == torch.bfloat16
    oracles.assert_near(logits.grad, exact.grad, 1e-2)


@pytest.mark.parametrize("normalize", [True, False])
def test_topk_twice_differentiated_is_right_or_refused(normalize):
    logits = oracles.separated_logits(3, 4).requires_grad_()
    (first,) = torch.autograd.grad(moe_topk(logits, 2, normalize)[0][:, 0].sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="(?i)double backward|twice"):
        first.sum().backward()


def test_topk_reads_any_layout():
    logits = oracles.separated_logits(12, 5)
    expected = moe_topk(logits, 2)
    wide = torch.full((24, 10), NAN, dtype=torch.float64)
    wide[::2, ::2] = logits
    for same in (logits.t().contiguous().t(), wide[::2, ::2]):
        assert not same.is_contiguous()
        assert all(torch.equal(a, b) for a, b in zip(moe_topk(same, 2), expected, strict=True))
    row = logits[:1].expand(6, 5)
    assert torch.equal(moe_topk(row, 2)[1], moe_topk(row.contiguous(), 2)[1])


def test_topk_of_no_tokens_is_empty():
    logits = torch.zeros(0, 4, requires_grad=True)
    weights, indices = moe_topk(logits, 2)
    assert weights.shape == indices.shape == (0, 2)
    weights.sum().backward()
    assert logits.grad.shape == (0, 4)


def test_topk_writes_every_output_element(poisoned_memory):
    logits = oracles.separated_logits(70, 5).requires_grad_()
    weights, indices = moe_topk(logits, 3, False)
    expected, expected_indices = oracles.topk(logits, 3, False)
    assert torch.equal(indices, expected_indices)
    oracles.assert_near(weights, expected, 1e-14)
    (grad,) = torch.autograd.grad(moe_topk(logits, 3)[0].square().sum(), logits)
    (expected_grad,) = torch.autograd.grad(oracles.topk(logits, 3)[0].square().sum(), logits)
    oracles.assert_near(grad, expected_grad, 1e-12)


def test_topk_and_dispatch_are_bitwise_the_same_at_any_thread_count(at_each_thread_count):
    logits = torch.randn(30_000, 8, requires_grad=True)

    def run():
        weights, indices = moe_topk(logits, 2)
        (grad,) = torch.autograd.grad(weights.square().sum(), logits)
        return weights, indices, grad, *moe_dispatch(indices, 8)

    at_each_thread_count(run)


def test_topk_stays_in_float32_under_autocast():
    logits = torch.randn(40, 6)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        weights, indices = moe_topk(logits, 2)
    assert weights.dtype == torch.float32
    assert torch.equal(weights, moe_topk(logits, 2)[0]) and torch.equal(indices, moe_topk(logits, 2)[1])


@pytest.mark.parametrize("N", [0, 1, 37])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_topk_and_dispatch_are_well_behaved_operators(N, dtype):
    logits = oracles.separated_logits(N, 5, dtype).requires_grad_()
    torch.library.opcheck(moe_topk.default, (logits, 2))
    bias = torch.zeros(5, dtype=torch.promote_types(dtype, torch.float32))
    torch.library.opcheck(moe_topk.default, (logits, 3, False, bias))
    torch.library.opcheck(moe_dispatch.default, (moe_topk(logits, 2)[1], 5))


def test_routing_compiles_in_one_graph_at_any_number_of_tokens():
    def route(logits):
        weights, indices = moe_topk(logits, 2)
        return weights, *moe_dispatch(indices, 5)

    compiled = torch.compile(route, fullgraph=True, backend="aot_eager", dynamic=True)
    for N in (3, 8, 21):
        logits = oracles.separated_logits(N, 5)
        assert all(torch.equal(a, b) for a, b in zip(compiled(logits), route(logits), strict=True))


@pytest.mark.parametrize(
    ("arguments", "name"),
    [
        ((torch.zeros(4), 2), "logits"),
        ((torch.zeros(2, 3, 4), 2), "logits"),
        ((torch.zeros(3, 4, dtype=torch.int64), 2), "logits"),
        ((torch.zeros(3, 4, dtype=torch.int32), 2), "logits"),
        ((torch.zeros(3, 4), 0), r"\bk\b"),
        ((torch.zeros(3, 4), -1), r"\bk\b"),
        ((torch.zeros(3, 4), 5), r"\bk\b"),
        ((torch.zeros(3, 0), 1), r"\bk\b|logits"),
        ((torch.zeros(3, 4), 2, True, torch.zeros(5)), "selection_bias"),
        ((torch.zeros(3, 4), 2, True, torch.zeros(4, 1)), "selection_bias"),
        ((torch.zeros(3, 4), 2, True, torch.zeros(4, dtype=torch.int64)), "selection_bias"),
    ],
)
def test_topk_names_the_wrong_argument(arguments, name):
    with pytest.raises(RuntimeError, match=f"moe_topk: .*({name})"):
        moe_topk(*arguments)


@pytest.mark.parametrize(("N", "K", "E"), [(1, 1, 1), (9, 2, 4), (200, 3, 5), (5, 1, 4096), (20_000, 2, 8)])
def test_dispatch_is_a_stable_sort_of_the_pairs_by_expert(N, K, E):
    indices = torch.rand(N, min(E, 64)).argsort(1)[:, :K]
    for ours, expected in zip(moe_dispatch(indices, E), oracles.dispatch(indices, E), strict=True):
        assert ours.dtype == torch.int64
        assert torch.equal(ours, expected)


def test_dispatch_with_all_pairs_on_one_expert_keeps_their_order():
    permutation, offsets, inverse = moe_dispatch(torch.full((50, 1), 2), 4)
    assert torch.equal(permutation, torch.arange(50))
    assert offsets.tolist() == [0, 0, 0, 50, 50]
    assert torch.equal(inverse[:, 0], torch.arange(50))


def test_dispatch_of_no_tokens_has_zero_offsets():
    permutation, offsets, inverse = moe_dispatch(torch.zeros(0, 2, dtype=torch.int64), 3)
    assert (permutation.shape, inverse.shape) == ((0,), (0, 2))
    assert offsets.tolist() == [0, 0, 0, 0]


def test_dispatch_reads_any_layout_and_writes_every_element(poisoned_memory):
    indices = torch.randint(0, 6, (3, 40)).t()
    assert not indices.is_contiguous()
    for ours, expected in zip(moe_dispatch(indices, 6), oracles.dispatch(indices.contiguous(), 6), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize(
    ("indices", "num_experts", "name"),
    [
        (torch.zeros(3, 2), 4, "indices"),
        (torch.zeros(3, 2, dtype=torch.int32), 4, "indices"),
        (torch.zeros(6, dtype=torch.int64), 4, "indices"),
        (torch.tensor([[0, 4]]), 4, "indices"),
        (torch.tensor([[0, 1], [-1, 2]]), 4, "indices"),
        (torch.tensor([[0, 2**62]]), 4, "indices"),
        (torch.zeros(3, 2, dtype=torch.int64), 0, "num_experts"),
        (torch.zeros(3, 2, dtype=torch.int64), -3, "num_experts"),
    ],
)
def test_dispatch_names_the_wrong_argument(indices, num_experts, name):
    with pytest.raises(RuntimeError, match=f"moe_dispatch: .*{name}"):
        moe_dispatch(indices, num_experts)


def test_autocast_takes_logits_of_any_half_type_in_float32():
    logits = torch.randn(9, 5)
    for dtype in (torch.float16, torch.bfloat16):
        half = logits.to(dtype)
        with torch.autocast("cpu", dtype=dtype):
            weights, indices = torch.ops.mmbal.moe_topk(half, 2)
            loss = torch.ops.mmbal.load_balance_loss(half, indices) + torch.ops.mmbal.router_z_loss(half)
        expected, expected_indices = torch.ops.mmbal.moe_topk(half.float(), 2)
        assert torch.equal(weights, expected) and torch.equal(indices, expected_indices)
        assert loss.dtype == torch.float32
        plain = torch.ops.mmbal.load_balance_loss(half.float(), indices)
        assert torch.equal(loss, plain + torch.ops.mmbal.router_z_loss(half.float()))
