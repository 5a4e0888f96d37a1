"""MoEMLP with an expert that every token takes."""

import copy
import io
from contextlib import nullcontext

import pytest
import torch
from torch import nn

import mmbal
import oracles
from mmbal import MoEMLP


def make(dtype=torch.float64, shared_weight=0.25, **options):
    return MoEMLP(6, 10, 4, dtype=dtype, shared_expert=True, shared_weight=shared_weight, **options)


def part(experts, rows):
    return [None if t is None else t[rows] for t in (experts.w1, experts.b1, experts.w2, experts.b2)]


def shared_output(moe, x, activation="quick_gelu"):
    w1, b1, w2, b2 = part(moe.experts, moe.num_experts)
    hidden = oracles.ACTIVATIONS[activation](x @ w1.T + (0 if b1 is None else b1))
    return hidden @ w2.T + (0 if b2 is None else b2)


def reference(moe, x, top_k=2, normalize=True, activation="quick_gelu"):
    """The routed experts as without the shared one, and that one beside them."""
    flat = x.reshape(-1, x.shape[-1])
    weights, indices = oracles.topk(moe.router(flat), top_k, normalize)
    routed = oracles.expert_mlp(flat, *part(moe.experts, slice(0, 4)), weights, indices, activation=activation)
    s = moe.shared_weight
    return ((1 - s) * routed + s * shared_output(moe, flat, activation)).reshape(x.shape)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("activation", ["quick_gelu", "relu2"])
@pytest.mark.parametrize(("top_k", "normalize"), [(1, True), (1, False), (2, True), (4, False), (4, True)])
def test_every_token_takes_the_shared_expert_besides_its_own(top_k, normalize, activation, bias):
    with pytest.warns(UserWarning, match="top_k=1") if top_k == 1 and normalize else nullcontext():
        moe = make(top_k=top_k, normalize=normalize, activation=activation, bias=bias)
    x = torch.randn(3, 11, 6, dtype=torch.float64)
    oracles.assert_near(moe(x), reference(moe, x, top_k, normalize, activation), 1e-12)


@pytest.mark.parametrize("shape", [(6,), (0, 6), (2, 0, 6), (2, 3, 6)])
def test_any_number_of_tokens(shape):
    moe, x = make(), torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y = moe(x)
    assert y.shape == shape
    oracles.assert_near(y, reference(moe, x), 1e-12)
    y.sum().backward()
    assert all(p.grad is not None for p in [x, *moe.parameters()])


def test_a_shared_weight_of_zero_leaves_the_routed_experts_alone():
    moe, plain = make(shared_weight=0.0), MoEMLP(6, 10, 4, dtype=torch.float64)
    plain.load_state_dict({k: t if "router" in k else t[:4] for k, t in moe.state_dict().items()})
    x = torch.randn(30, 6, dtype=torch.float64)
    oracles.assert_near(moe(x), plain(x), 1e-14)


def test_the_shared_expert_is_stored_last_and_has_no_router_row():
    shapes = {name: tuple(p.shape) for name, p in make(router_bias=True).named_parameters()}
    assert shapes == {
        "router.weight": (4, 6),
        "router.bias": (4,),
        "experts.w1": (5, 10, 6),
        "experts.b1": (5, 10),
        "experts.w2": (5, 6, 10),
        "experts.b2": (5, 6),
    }


def test_gradients_equal_finite_differences():
    moe = make(bias=True)
    x = torch.randn(7, 6, dtype=torch.float64)
    with torch.no_grad():  # a router whose choices are far from each other, so that none flips
        moe.router.weight.copy_(torch.eye(6, dtype=torch.float64)[:4])
        x[:, :4] = oracles.separated_logits(7, 4)
    names, values = zip(*moe.named_parameters(), strict=True)

    def run(x, *parameters):
        return torch.func.functional_call(moe, dict(zip(names, parameters, strict=True)), (x,))

    inputs = [t.detach().clone().requires_grad_() for t in (x, *values)]
    assert torch.autograd.gradcheck(run, inputs)


def test_gradients_equal_those_of_the_plain_formula():
    moe, x = make(), torch.randn(40, 6, dtype=torch.float64, requires_grad=True)
    twin, x_twin = copy.deepcopy(moe), x.detach().clone().requires_grad_()
    moe(x).square().sum().backward()
    reference(twin, x_twin).square().sum().backward()
    oracles.assert_near(x.grad, x_twin.grad, 1e-11, "x")
    for (name, p), q in zip(moe.named_parameters(), twin.parameters(), strict=True):
        oracles.assert_near(p.grad, q.grad, 1e-11, name)


class Mlp(nn.Module):
    def __init__(self):
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 10), nn.Linear(10, 6)

    def forward(self, x):
        return self.fc2(oracles.ACTIVATIONS["quick_gelu"](self.fc1(x)))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shared_weight", [0.1, 0.5, 0.9])
def test_copies_of_one_mlp_compute_what_it_computes(dtype, shared_weight):
    mlp, x = Mlp().to(dtype), torch.randn(50, 6).to(dtype)
    options = {"activation": "quick_gelu", "shared_expert": True, "shared_weight": shared_weight}
    moe = MoEMLP.from_mlps([mlp] * 5, top_k=2, **options)
    assert moe.num_experts == 4 and moe.experts.w1.shape[0] == 5
    oracles.assert_near(moe(x), mlp(x), oracles.FORWARD_TOLERANCE[dtype])


def test_the_last_of_several_mlps_is_the_shared_one():
    mlps, x = [Mlp() for _ in range(4)], torch.randn(9, 6)
    moe = MoEMLP.from_mlps(mlps, activation="quick_gelu", shared_expert=True)
    assert moe.num_experts == 3
    for expert, mlp in enumerate(mlps):
        oracles.assert_near(moe.to_dense(expert)(x), mlp(x), 2e-6)
    for wrong in (4, -1):
        with pytest.raises(ValueError, match="expert must be from 0 to 3"):
            moe.to_dense(wrong)
    with pytest.raises(ValueError, match="mlps must have at least two modules"):
        MoEMLP.from_mlps(mlps[:1], activation="quick_gelu", shared_expert=True)


@pytest.mark.parametrize("shared_weight", [1.0, -0.1, float("nan")])
def test_a_wrong_shared_weight_is_named(shared_weight):
    with pytest.raises(ValueError, match=r"MoEMLP: shared_weight must be in \[0, 1\)"):
        make(shared_weight=shared_weight)


def test_the_text_of_the_module_tells_of_the_shared_expert():
    assert "shared_expert=True, shared_weight=0.25" in repr(make()) and "num_experts=4" in repr(make())
    assert "shared" not in repr(MoEMLP(6, 10, 4))


def test_records_and_losses_know_the_routed_experts_alone():
    moe, x, mask = make(torch.float32), torch.randn(5, 7, 6), torch.rand(5, 7) < 0.5
    with mmbal.collect_router(moe) as routers:
        moe(x, token_mask=mask)
    (record,) = routers
    assert record.num_experts == 4 and record.logits.shape == (35, 4) and record.indices.shape == (35, 2)
    assert record.counts.shape == (4,) and record.counts.sum() == 2 * mask.sum()
    losses = mmbal.router_losses(routers)
    expected = oracles.load_balance(record.logits.double(), record.indices, mask.flatten())
    oracles.assert_near(losses.load_balance, expected, 1e-5)


def test_the_router_trains_alone_and_equal_routed_experts_are_warned_of():
    moe = make(torch.float32)
    with torch.no_grad():  # all routed experts the same, the shared one another
        for stacked in moe.experts.parameters():
            stacked[:4] = stacked[:1].clone()
    with pytest.warns(UserWarning, match="experts are all the same"):
        assert mmbal.freeze_except_router(moe) == ["router.weight"]
    with torch.no_grad():
        moe.experts.w1[1] += 1
    mmbal.freeze_except_router(moe)
    moe(torch.randn(20, 6)).square().sum().backward()
    assert moe.router.weight.grad.any() and moe.experts.w1.grad is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packed_weights_give_the_same_bits(dtype):
    moe, x = make(dtype).eval(), torch.randn(9, 6).to(dtype)
    with torch.no_grad():
        plain = moe(x)
        assert mmbal.pack(moe) > 0
        assert torch.equal(moe(x), plain) and moe._packed is not None


def test_outputs_are_the_same_at_each_thread_count(at_each_thread_count):
    moe, x = MoEMLP(64, 96, 4, shared_expert=True), torch.randn(300, 64)

    def run():
        y = moe(x)
        return [y, *torch.autograd.grad(y.square().sum(), list(moe.parameters()))]

    at_each_thread_count(run)


@pytest.fixture
def fresh_compiler():
    """torch.compile counts how often it compiled one function, across tests, and gives up after a few times."""
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_the_module_compiles_in_one_graph_with_gradients(backend):
    oracles.assert_compiles_in_one_graph(make(torch.float32), torch.randn(3, 4, 6, requires_grad=True), backend)


def test_autocast_gives_low_precision_outputs_near_the_float32_ones():
    moe, x = MoEMLP(32, 64, 2, shared_expert=True), torch.randn(40, 32)  # both routed experts for every token
    with torch.autocast("cpu", dtype=torch.bfloat16):
        y = moe(x)
    assert y.dtype == torch.bfloat16
    oracles.assert_near(y, moe(x), 3e-2)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in moe.parameters())


def test_dropout_of_the_hidden_units_leaves_the_mean():
    moe, x = make(dropout=0.5), torch.randn(5, 6, dtype=torch.float64)
    many = moe(x.repeat(4000, 1)).view(4000, 5, 6)
    expected = reference(moe, x)
    assert (many.std(0) > 0).all()
    assert ((many.mean(0) - expected).abs() < 5 * many.std(0) / 4000**0.5).all()
    moe.eval()
    oracles.assert_near(moe(x), expected, 1e-12)


def test_a_nan_token_spoils_itself_alone():
    moe, x = make(), torch.randn(6, 6, dtype=torch.float64)
    expected = moe(x)
    x[2, 0] = float("nan")
    y = moe(x)
    assert y[2].isnan().all()
    assert torch.equal(y[[0, 1, 3, 4, 5]], expected[[0, 1, 3, 4, 5]])


def test_state_copies_and_pickles_give_the_same_module_again():
    moe, x = make(), torch.randn(9, 6, dtype=torch.float64)
    other = make()
    other.load_state_dict(moe.state_dict())
    buffer = io.BytesIO()
    torch.save(moe, buffer)
    buffer.seek(0)
    for same in (other, copy.deepcopy(moe), torch.load(buffer, weights_only=False)):
        assert torch.equal(same(x), moe(x))


def test_the_meta_device_and_a_full_router_freeze():
    moe = MoEMLP(6, 10, 4, shared_expert=True, device="meta")
    assert moe(torch.empty(2, 3, 6, device="meta")).shape == (2, 3, 6)
    assert mmbal.freeze_except_router(moe) == ["router.weight"]
