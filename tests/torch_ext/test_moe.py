"""MoEMLP as a module: values, layouts, state, conversion."""

import copy
import math
from contextlib import nullcontext

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmbal
import oracles
from mmbal import MoEMLP


class Mlp(nn.Module):
    """The dense MLP of an ordinary transformer block."""

    def __init__(self, D=6, F=10, bias=True):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(D, F, bias=bias), nn.Linear(F, D, bias=bias)

    def forward(self, x):
        return self.fc2(oracles.ACTIVATIONS["quick_gelu"](self.fc1(x)))


def make(dtype=torch.float64, **options):
    return MoEMLP(6, 10, 4, dtype=dtype, **options)


def reference(moe, x, top_k=2, activation="quick_gelu", normalize=True):
    flat = x.reshape(-1, x.shape[-1])
    parameters = [getattr(moe.experts, name, None) for name in ("w1", "b1", "w2", "b2")]
    weights, indices = oracles.topk(moe.router(flat), top_k, normalize)
    y = oracles.expert_mlp(flat, *parameters, weights, indices, activation=activation)
    return y.reshape(x.shape)


@pytest.mark.parametrize("activation", ["quick_gelu", "gelu", "relu2"])
@pytest.mark.parametrize("normalize", [True, False])
@pytest.mark.parametrize("top_k", [1, 2, 4])
def test_the_module_is_router_softmax_and_weighted_experts(top_k, normalize, activation):
    options = {"top_k": top_k, "normalize": normalize, "activation": activation}
    with pytest.warns(UserWarning, match="top_k=1") if top_k == 1 and normalize else nullcontext():
        moe = make(**options)
    x = torch.randn(30, 6, dtype=torch.float64)
    oracles.assert_near(moe(x), reference(moe, x, **options), 1e-12)


@pytest.mark.parametrize("shape", [(6,), (5, 6), (2, 3, 6), (2, 3, 4, 6), (2, 0, 6), (0, 6)])
def test_any_number_of_leading_sizes(shape):
    moe, x = make(), torch.randn(shape, dtype=torch.float64)
    y = moe(x)
    assert y.shape == shape
    oracles.assert_near(y, reference(moe, x), 1e-12)


def test_memory_layout_does_not_matter():
    moe, x = make(), torch.randn(4, 5, 6, dtype=torch.float64)
    expected = moe(x)
    sequence_first = x.transpose(0, 1).contiguous().transpose(0, 1)
    features_first = x.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for same in (sequence_first, features_first):
        assert not same.is_contiguous()
        oracles.assert_near(moe(same), expected, 1e-14)
    oracles.assert_near(moe(x.transpose(0, 1)), expected.transpose(0, 1), 1e-14)


def test_parameters_have_the_agreed_names_and_shapes():
    moe = MoEMLP(6, 10, 4)
    shapes = {name: tuple(p.shape) for name, p in moe.named_parameters()}
    experts = {"experts.w1": (4, 10, 6), "experts.b1": (4, 10), "experts.w2": (4, 6, 10), "experts.b2": (4, 6)}
    assert shapes == {"router.weight": (4, 6), **experts}
    assert isinstance(moe.router, nn.Linear)
    bare = MoEMLP(6, 10, 4, bias=False, router_bias=True)
    assert set(dict(bare.named_parameters())) == {"router.weight", "router.bias", "experts.w1", "experts.w2"}
    x = torch.randn(7, 6)
    oracles.assert_near(bare(x), reference(bare, x), 6e-6)


def test_a_new_router_is_spread_like_a_new_linear_layer():
    weight = MoEMLP(64, 8, 32).router.weight
    assert weight.abs().max() <= 1 / 8
    assert weight.std().item() == pytest.approx(1 / 8 / math.sqrt(3), rel=0.1)


def test_gradients_reach_the_input_the_router_and_every_expert():
    moe, x = make(), torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    twin, x_twin = copy.deepcopy(moe), x.detach().clone().requires_grad_()
    moe(x).square().sum().backward()
    reference(twin, x_twin).square().sum().backward()
    oracles.assert_near(x.grad, x_twin.grad, 1e-11, "x")
    for (name, p), q in zip(moe.named_parameters(), twin.parameters(), strict=True):
        oracles.assert_near(p.grad, q.grad, 1e-11, name)


def test_state_dict_and_deepcopy_give_the_same_module_again():
    moe, x = make(router_bias=True), torch.randn(9, 6, dtype=torch.float64)
    other = make(router_bias=True)
    assert not torch.equal(other(x), moe(x))
    other.load_state_dict(moe.state_dict())
    assert torch.equal(other(x), moe(x))
    clone = copy.deepcopy(moe)
    assert torch.equal(clone(x), moe(x))
    with torch.no_grad():
        clone.experts.w1.zero_()
    assert moe.experts.w1.any()


@pytest.mark.parametrize("bias", [True, False])
def test_to_dense_equals_forcing_the_router_to_that_expert(bias):
    moe, x = make(bias=bias, router_bias=True), torch.randn(9, 6, dtype=torch.float64)
    for expert in range(4):
        dense = moe.to_dense(expert)
        with torch.no_grad():
            moe.router.bias.copy_(torch.full((4,), -1e4)).index_fill_(0, torch.tensor(expert), 1e4)
        oracles.assert_near(dense(x), moe(x), 1e-12)
        assert isinstance(dense.fc1, nn.Linear) and isinstance(dense.fc2, nn.Linear)
        assert torch.equal(dense.fc1.weight, moe.experts.w1[expert])


def test_to_dense_owns_its_weights_and_refuses_an_expert_that_does_not_exist():
    moe = make()
    dense = moe.to_dense(1)
    with torch.no_grad():
        dense.fc1.weight.zero_()
    assert moe.experts.w1[1].any()
    for wrong in (4, -5):
        with pytest.raises((ValueError, IndexError), match="expert"):
            moe.to_dense(wrong)


@pytest.mark.parametrize("bias", [True, False])
def test_from_mlps_takes_expert_after_expert(bias):
    mlps = [Mlp(bias=bias).double() for _ in range(3)]
    moe, x = MoEMLP.from_mlps(mlps, top_k=2, activation="quick_gelu"), torch.randn(9, 6, dtype=torch.float64)
    assert moe.experts.w1.dtype == torch.float64
    for expert, mlp in enumerate(mlps):
        oracles.assert_near(moe.to_dense(expert)(x), mlp(x), 1e-12)


def test_from_mlps_of_copies_is_the_dense_mlp_whatever_the_router_says():
    mlp, x = Mlp(), torch.randn(50, 6)
    moe = MoEMLP.from_mlps([mlp] * 4, top_k=2, activation="quick_gelu")
    oracles.assert_near(moe(x), mlp(x), 2e-6)


def test_from_mlps_of_different_shapes_or_too_few_is_refused():
    with pytest.raises((ValueError, TypeError), match="(?i)shape|fc1|size"):
        MoEMLP.from_mlps([Mlp(6, 10), Mlp(6, 11)], activation="quick_gelu")
    with pytest.raises((ValueError, TypeError), match="(?i)mlp|bias"):
        MoEMLP.from_mlps([Mlp(), Mlp(bias=False)], activation="quick_gelu")
    with pytest.raises((ValueError, TypeError), match="top_k"):
        MoEMLP.from_mlps([Mlp(), Mlp()], top_k=3, activation="quick_gelu")
    with pytest.raises((ValueError, TypeError), match="mlp"):
        MoEMLP.from_mlps([], activation="quick_gelu")


@pytest.mark.parametrize(
    ("arguments", "options", "name"),
    [
        ((6, 10, 4), {"top_k": 5}, "top_k"),
        ((6, 10, 4), {"top_k": 0}, "top_k"),
        ((6, 10, 0), {}, "num_experts"),
        ((0, 10, 4), {}, "dim"),
        ((6, 0, 4), {}, "hidden_dim"),
        ((6, 10, 4), {"activation": "mish"}, "activation"),
        ((6, 10, 4), {"dropout": 1.0}, "dropout"),
        ((6, 10, 4), {"output_dropout": -0.1}, "output_dropout"),
    ],
)
def test_the_constructor_names_the_wrong_argument(arguments, options, name):
    with pytest.raises(ValueError, match=name):
        MoEMLP(*arguments, **options)


def test_a_wrong_input_is_named():
    moe = make(torch.float32)
    with pytest.raises((RuntimeError, ValueError, TypeError), match="float64"):
        moe(torch.randn(3, 6).double())
    for wrong in (torch.randn(3, 5), torch.tensor(1.0)):
        with pytest.raises((RuntimeError, ValueError, TypeError), match=r"\bx\b"):
            moe(wrong)
    for mask in (torch.ones(4, dtype=torch.bool), torch.ones(3)):
        with pytest.raises((RuntimeError, ValueError, TypeError), match="token_mask"):
            moe(torch.randn(3, 6), token_mask=mask)


def test_a_masked_token_is_routed_like_any_other():
    moe, x = make(), torch.randn(2, 5, 6, dtype=torch.float64)
    assert torch.equal(moe(x, token_mask=torch.rand(2, 5) < 0.5), moe(x))


@pytest.mark.parametrize("option", ["dropout", "output_dropout"])
def test_dropout_acts_in_training_only_and_follows_the_seed_of_torch(option):
    moe, x = make(**{option: 0.5}), torch.randn(20, 6, dtype=torch.float64)

    def run(seed):
        torch.manual_seed(seed)
        return moe(x)

    assert not torch.equal(run(1), reference(moe, x))
    assert torch.equal(run(1), run(1))
    assert not torch.equal(run(1), run(2))
    torch.manual_seed(1)
    assert not torch.equal(moe(x), moe(x))  # each call draws a new mask
    moe.eval()
    oracles.assert_near(run(1), reference(moe, x), 1e-12)


@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_recomputes_the_same_dropout(use_reentrant):
    plain, x = make(dropout=0.5), torch.randn(20, 6, dtype=torch.float64)
    checkpointed, gradients = copy.deepcopy(plain), []
    for moe in (plain, checkpointed):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(3)
        y = moe(leaf) if moe is plain else checkpoint(moe, leaf, use_reentrant=use_reentrant)
        torch.manual_seed(99)
        y.square().sum().backward()
        gradients.append([leaf.grad, *(p.grad for p in moe.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_autocast_gives_low_precision_outputs_near_the_float32_ones():
    moe, x = MoEMLP(32, 64, 4), torch.randn(3, 40, 32)
    with torch.autocast("cpu", dtype=torch.bfloat16), mmbal.collect_router(moe) as routers:
        y = moe(x)
    assert y.dtype == torch.bfloat16
    same_choice = (routers[0].indices == oracles.topk(moe.router(x.reshape(-1, 32)), 2)[1]).all(1)
    assert same_choice.float().mean() > 0.9
    oracles.assert_near(y.reshape(-1, 32)[same_choice], reference(moe, x).reshape(-1, 32)[same_choice], 3e-2)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in moe.parameters())


def test_a_bfloat16_module_keeps_its_dtype():
    moe = MoEMLP(32, 64, 4, dtype=torch.bfloat16)
    y = moe(torch.randn(10, 32).bfloat16())
    assert y.dtype == torch.bfloat16 and y.isfinite().all()


def test_the_module_can_be_made_on_the_meta_device():
    moe = MoEMLP(6, 10, 4, device="meta")
    assert all(p.is_meta for p in moe.parameters())
    assert moe(torch.empty(2, 3, 6, device="meta")).shape == (2, 3, 6)


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_module_compiles_in_one_graph_with_gradients(backend):
    oracles.assert_compiles_in_one_graph(make(torch.float32), torch.randn(3, 4, 6, requires_grad=True), backend)


def test_compiled_dropout_is_that_of_the_eager_module_forward_and_backward_in_one_graph():
    moe, x = make(dropout=0.5), torch.randn(20, 6, dtype=torch.float64)
    compiled, results = torch.compile(moe, backend="aot_eager", fullgraph=True), []
    for function in (moe, compiled):
        leaf = x.clone().requires_grad_()
        torch.manual_seed(1)
        y = function(leaf)
        torch.manual_seed(7)
        results.append((y, *torch.autograd.grad(y.square().sum(), [leaf, *moe.parameters()])))
        assert not torch.equal(function(leaf), function(leaf))
    for a, b in zip(*results, strict=True):
        oracles.assert_near(a, b, 1e-12)


def test_dropout_of_the_default_backend_follows_the_seed_and_is_the_same_in_the_backward():
    moe, x = make(dropout=0.5), torch.randn(20, 6, dtype=torch.float64)
    compiled, step = torch.compile(moe, fullgraph=True), 1e-5 * torch.randn_like(x)

    def run(x):
        torch.manual_seed(3)
        return compiled(x)

    leaf = x.clone().requires_grad_()
    slope = (torch.autograd.grad(run(leaf).sum(), leaf)[0] * step).sum()
    oracles.assert_near(slope, (run(x + step) - run(x - step)).sum() / 2, 1e-6)
    assert torch.equal(run(x), run(x)) and not torch.equal(run(x), compiled(x))


def test_the_module_trains_with_an_ordinary_optimizer():
    moe, x = MoEMLP(6, 24, 4), torch.randn(200, 6)
    target = torch.where(x[:, :1] > 0, x.flip(1), x.roll(2, 1))
    optimizer = torch.optim.AdamW(moe.parameters(), lr=1e-2)
    losses = []
    for _ in range(150):
        loss = (moe(x) - target).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.2 * losses[0]


def test_the_text_of_the_module_shows_its_sizes():
    text = repr(MoEMLP(6, 10, 4, top_k=3))
    for part in ("10", "4", "top_k=3"):
        assert part in text
