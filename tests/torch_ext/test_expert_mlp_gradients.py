"""Gradients of expert_mlp, and the operator under opcheck and torch.compile."""

from dataclasses import replace

import pytest
import torch

import mmbal  # noqa: F401  (loads the operators)
import oracles

expert_mlp, moe_topk, moe_dispatch = (getattr(torch.ops.mmbal, n) for n in ("expert_mlp", "moe_topk", "moe_dispatch"))
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]


def gradients(case, function, grad_y):
    leaves = [t for t in case.differentiable().values() if t.requires_grad]
    return torch.autograd.grad(function(case), leaves, grad_y)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("activation", oracles.ACTIVATIONS)
def test_gradients_equal_those_of_a_loop_over_experts(activation, dtype):
    case = oracles.mlp_case(N=60, D=12, F=30, dtype=dtype).requiring_grad()
    exact = case.in_double().requiring_grad()
    grad_y = torch.randn(60, 12).to(dtype)
    ours = gradients(case, lambda c: expert_mlp(*c.arguments(), activation=activation), grad_y)
    expected = gradients(exact, lambda c: c.reference(activation=activation), grad_y.double())
    for name, a, b, leaf in zip(case.differentiable(), ours, expected, case.differentiable().values(), strict=True):
        assert a.dtype == leaf.dtype
        oracles.assert_near(a, b, 3 * oracles.FORWARD_TOLERANCE[dtype], name)


@pytest.mark.parametrize(
    ("N", "D", "F", "E", "K"), [(1, 1, 1, 1, 1), (130, 17, 65, 3, 1), (97, 64, 130, 4, 2), (20, 8, 9, 40, 3)]
)
@pytest.mark.parametrize("bias", [False, True])
def test_gradients_at_sizes_with_tails(N, D, F, E, K, bias):
    case = oracles.mlp_case(N, D, F, E, K, torch.float32, bias).requiring_grad()
    exact = case.in_double().requiring_grad()
    grad_y = torch.randn(N, D)
    ours = gradients(case, lambda c: expert_mlp(*c.arguments()), grad_y)
    expected = gradients(exact, lambda c: c.reference(), grad_y.double())
    for name, a, b in zip(case.differentiable(), ours, expected, strict=True):
        oracles.assert_near(a, b, 6e-6, name)


@pytest.mark.parametrize("activation", oracles.ACTIVATIONS)
def test_gradients_equal_finite_differences(activation):
    case = oracles.mlp_case(N=5, D=3, F=4).requiring_grad()
    leaves = list(case.differentiable().values())

    def run(x, w1, b1, w2, b2, weights):
        return expert_mlp(x, w1, b1, w2, b2, weights, *case.arguments()[6:], activation=activation)

    assert torch.autograd.gradcheck(run, leaves)


needs_kept_gradients = pytest.mark.skipif(torch.__version__ < (2, 13), reason="not tried there")


def large_case():
    """Gradients of the weights are 4 MiB each: large enough to be kept."""
    return oracles.mlp_case(N=6, D=128, F=2048, E=4, dtype=torch.float32).requiring_grad()


@needs_kept_gradients
def test_the_storage_of_a_kept_gradient_refuses_to_be_resized():
    case = large_case()
    expert_mlp(*case.arguments()).backward(torch.randn(6, 128))
    with pytest.raises(RuntimeError, match="not resizable"):
        case.differentiable()["w1"].grad.untyped_storage().resize_(0)


@needs_kept_gradients
def test_memory_of_a_freed_gradient_is_that_of_a_later_one():
    case, grad_y = large_case(), torch.randn(6, 128)
    addresses = []
    for _ in range(3):
        found = gradients(case, lambda c: expert_mlp(*c.arguments()), grad_y)
        addresses.append({g.data_ptr() for g in found if g.numel() >= 2**20})
        del found
    assert len(addresses[0]) == 2
    assert addresses[0] == addresses[1] == addresses[2]


def test_gradients_that_are_alive_never_share_memory():
    case, grad_y = large_case(), torch.randn(6, 128)
    first = gradients(case, lambda c: expert_mlp(*c.arguments()), grad_y)
    copies = [g.clone() for g in first]
    second = gradients(case, lambda c: expert_mlp(*c.arguments()), 2 * grad_y)
    for one, copy, two in zip(first, copies, second, strict=True):
        assert torch.equal(one, copy)
        oracles.assert_near(two, 2 * one.double(), 1e-6, "twice the gradient")


def test_a_kept_gradient_may_be_changed_viewed_saved_and_accumulated(tmp_path):
    case, grad_y = large_case(), torch.randn(6, 128)
    w1 = case.differentiable()["w1"]
    expert_mlp(*case.arguments()).backward(grad_y)
    once = w1.grad.clone()
    expert_mlp(*case.arguments()).backward(grad_y)
    oracles.assert_near(w1.grad, 2 * once.double(), 1e-6, "accumulated")
    w1.grad.mul_(0.5)
    oracles.assert_near(w1.grad[1].t(), once[1].t().double(), 1e-6, "view")
    torch.save(w1.grad, tmp_path / "grad.pt")
    assert torch.equal(torch.load(tmp_path / "grad.pt"), w1.grad)


@pytest.mark.parametrize("normalize", [True, False])
def test_gradients_through_the_router_equal_finite_differences(normalize):
    case = oracles.mlp_case(N=6, D=3, F=4)
    router = torch.randn(4, 3, dtype=torch.float64)
    x = torch.randn(12, 3, dtype=torch.float64)
    ranked = (x @ router.T).sort(1, descending=True).values
    x = x[ranked[:, 1] - ranked[:, 2] > 1e-2]  # no choice is close to a tie
    assert len(x) >= 6

    def run(x, router):
        weights, indices = moe_topk(x @ router.T, 2, normalize)
        return expert_mlp(x, case.w1, case.b1, case.w2, case.b2, weights, *moe_dispatch(indices, 4))

    assert torch.autograd.gradcheck(run, (x.requires_grad_(), router.requires_grad_()))


def test_identical_experts_give_the_router_no_gradient():
    case = oracles.mlp_case(N=50)
    same = {name: getattr(case, name)[:1].expand_as(getattr(case, name)) for name in ("w1", "b1", "w2", "b2")}
    logits = oracles.separated_logits(50, 4).requires_grad_()
    weights, indices = moe_topk(logits, 2)
    expert_mlp(*replace(case, **same, weights=weights, indices=indices).arguments()).square().sum().backward()
    assert logits.grad.abs().max() < 1e-13


@pytest.mark.parametrize("dtype", DTYPES)
def test_an_expert_without_rows_has_exactly_zero_gradients(dtype):
    case = oracles.mlp_case(N=30, dtype=dtype)
    case.indices = torch.tensor([[2, 0]]).repeat(30, 1)
    case = case.requiring_grad()
    expert_mlp(*case.arguments()).sum().backward()
    for name in ("w1", "b1", "w2", "b2"):
        grad = getattr(case, name).grad
        assert (grad[[1, 3]] == 0).all(), name
        assert (grad[[0, 2]] != 0).any(), name


def test_a_nan_token_leaves_the_gradients_of_experts_that_did_not_see_it_alone():
    case = oracles.mlp_case(N=10)
    case.indices = torch.tensor([[0, 1]] * 5 + [[2, 3]] * 5)
    case.x[0] = float("nan")
    case = case.requiring_grad()
    expert_mlp(*case.arguments()).sum().backward()
    assert case.w1.grad[:2].isnan().any() and case.w1.grad[2:].isfinite().all()
    assert case.w2.grad[2:].isfinite().all()
    assert case.x.grad[5:].isfinite().all() and case.weights.grad[1:].isfinite().all()


def test_no_tokens_give_zero_gradients_of_the_right_shapes():
    case = oracles.mlp_case(N=0).requiring_grad()
    expert_mlp(*case.arguments()).sum().backward()
    for name, leaf in case.differentiable().items():
        assert leaf.grad.shape == leaf.shape, name
        assert (leaf.grad == 0).all(), name


@pytest.mark.parametrize(
    "frozen",
    [
        ("w1", "b1", "w2", "b2"),
        ("x",),
        ("weights",),
        ("x", "w1", "b1", "w2", "b2"),
        ("x", "weights"),
        ("w1", "b1"),
        ("w2",),
        ("b1", "b2"),
    ],
)
def test_frozen_inputs_get_no_gradient_and_the_others_the_same_one(frozen):
    full = oracles.mlp_case(N=30).requiring_grad()
    part = full.requiring_grad(*frozen)
    grad_y = torch.randn(30, 5, dtype=torch.float64)
    expert_mlp(*full.arguments()).backward(grad_y)
    expert_mlp(*part.arguments()).backward(grad_y)
    for name, leaf in part.differentiable().items():
        if name in frozen:
            assert leaf.grad is None, name
        else:
            oracles.assert_near(leaf.grad, getattr(full, name).grad, 1e-13, name)


def test_nothing_that_requires_a_gradient_records_no_graph():
    assert not expert_mlp(*oracles.mlp_case().arguments()).requires_grad


def test_gradients_accumulate_over_two_calls():
    case = oracles.mlp_case(N=30).requiring_grad()
    for _ in range(2):
        expert_mlp(*case.arguments()).sum().backward()
    once = case.requiring_grad()
    expert_mlp(*once.arguments()).sum().backward()
    assert torch.equal(case.w1.grad, 2 * once.w1.grad)


@pytest.mark.parametrize("layout", ["transposed", "expanded", "strided"])
def test_the_incoming_gradient_may_have_any_layout(layout):
    case = oracles.mlp_case(N=30).requiring_grad()
    dense = torch.randn(30, 5, dtype=torch.float64)
    if layout == "expanded":
        dense = dense[:1].expand(30, 5).contiguous()
    same = {
        "transposed": dense.t().contiguous().t(),
        "expanded": dense[:1].expand(30, 5),
        "strided": torch.stack([dense, dense + 1], 2)[..., 0],
    }[layout]
    assert not same.is_contiguous()
    ours = gradients(case, lambda c: expert_mlp(*c.arguments()), same)
    expected = gradients(case, lambda c: expert_mlp(*c.arguments()), dense)
    assert all(torch.equal(a, b) for a, b in zip(ours, expected, strict=True))


def test_gradients_of_inputs_in_other_layouts():
    case = oracles.mlp_case(N=30)
    turned = {n: t.transpose(-1, -2).contiguous().transpose(-1, -2) for n, t in case.differentiable().items()}
    ours, expected = replace(case, **turned).requiring_grad(), case.requiring_grad()
    assert not ours.w1.is_contiguous() and not ours.x.is_contiguous()
    expert_mlp(*ours.arguments()).sum().backward()
    expert_mlp(*expected.arguments()).sum().backward()
    for name, leaf in ours.differentiable().items():
        assert torch.equal(leaf.grad, getattr(expected, name).grad), name


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_gradient_element_is_written(poisoned_memory, dtype):
    case = oracles.mlp_case(N=61, D=9, F=21, dtype=dtype)
    case.indices = torch.tensor([[0, 2]]).repeat(61, 1)
    case = case.requiring_grad()
    exact = case.in_double().requiring_grad()
    expert_mlp(*case.arguments()).sum().backward()
    exact.reference().sum().backward()
    for name, leaf in case.differentiable().items():
        oracles.assert_near(leaf.grad, getattr(exact, name).grad, 3 * oracles.FORWARD_TOLERANCE[dtype], name)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("frozen", [(), ("w1", "b1", "w2", "b2")])
def test_threads_do_not_change_a_bit_of_any_gradient(at_each_thread_count, dtype, frozen):
    case = oracles.mlp_case(N=500, D=48, F=96, dtype=dtype).requiring_grad(*frozen)
    grad_y = torch.randn(500, 48).to(dtype)
    at_each_thread_count(lambda: gradients(case, lambda c: expert_mlp(*c.arguments(), dropout=0.1, seed=3), grad_y))


def test_double_backward_is_refused_by_name():
    case = oracles.mlp_case().requiring_grad()
    (first,) = torch.autograd.grad(expert_mlp(*case.arguments()).sum(), case.x, create_graph=True)
    with pytest.raises(RuntimeError, match="(?i)expert_mlp.*(double backward|twice)"):
        first.sum().backward()


@pytest.mark.parametrize("N", [0, 1, 37])
@pytest.mark.parametrize("dtype", DTYPES)
def test_the_operator_is_well_behaved(N, dtype):
    case = oracles.mlp_case(N, dtype=dtype).requiring_grad()
    torch.library.opcheck(expert_mlp.default, case.arguments())


@pytest.mark.parametrize("frozen", [("x", "weights"), ("w1", "b1", "w2", "b2")])
def test_the_operator_is_well_behaved_with_dropout_without_biases_and_frozen(frozen):
    case = oracles.mlp_case(11, bias="b1" not in frozen, dtype=torch.float32).requiring_grad(*frozen)
    torch.library.opcheck(expert_mlp.default, case.arguments(), {"dropout": 0.3, "output_dropout": 0.2, "seed": 5})


def test_every_operator_of_the_library_has_a_kernel_for_meta_tensors():
    names = {name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mmbal::")}
    assert {f"mmbal::{n}" for n in ("moe_topk", "moe_dispatch", "expert_mlp")} <= names
    for name in names:
        assert torch._C._dispatch_has_computed_kernel_for_dispatch_key(name, "Meta"), name


def test_compiles_in_one_graph_with_gradients_at_any_number_of_tokens():
    def run(x, logits, w1, b1, w2, b2):
        weights, indices = moe_topk(logits, 2)
        return expert_mlp(x, w1, b1, w2, b2, weights, *moe_dispatch(indices, 4), activation="gelu")

    compiled = torch.compile(run, fullgraph=True, backend="aot_eager", dynamic=True)
    for N in (3, 10):
        case = oracles.mlp_case(N)
        tensors = case.x, oracles.separated_logits(N, 4), case.w1, case.b1, case.w2, case.b2
        ours = [t.clone().requires_grad_() for t in tensors]
        eager = [t.clone().requires_grad_() for t in tensors]
        a, b = compiled(*ours), run(*eager)
        assert torch.equal(a, b)
        a.sum().backward()
        b.sum().backward()
        assert all(torch.equal(p.grad, q.grad) for p, q in zip(ours, eager, strict=True))
