"""collect_router, freeze_except_router, and the losses of collected routers."""

import copy

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import mmbal
import oracles
from mmbal import MoEMLP, collect_router, freeze_except_router, router_losses


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.mlp = nn.LayerNorm(6), MoEMLP(6, 10, 4)

    def forward(self, x):
        return x + self.mlp(self.norm(x))


class Stack(nn.Module):
    def __init__(self, depth=3, checkpointing=None):
        super().__init__()
        self.blocks, self.checkpointing = nn.ModuleList(Block() for _ in range(depth)), checkpointing

    def forward(self, x):
        for block in self.blocks:
            x = block(x) if self.checkpointing is None else checkpoint(block, x, use_reentrant=self.checkpointing)
        return x


@pytest.fixture
def x():
    return torch.randn(5, 7, 6)


def test_one_record_a_layer_holds_what_the_router_decided(x):
    model = Stack()
    with collect_router(model) as routers:
        model(x)
    assert [r.name for r in routers] == [f"blocks.{i}.mlp" for i in range(3)]
    first = model.blocks[0]
    logits = first.mlp.router(first.norm(x)).reshape(35, 4)
    oracles.assert_near(routers[0].logits, logits, 1e-6)
    for record in routers:
        assert (record.num_experts, record.token_mask) == (4, None)
        assert torch.equal(record.indices, oracles.topk(record.logits, 2)[1])
        assert record.counts.dtype == torch.int64
        assert torch.equal(record.counts, torch.bincount(record.indices.flatten(), minlength=4))
        assert record.counts.sum() == 70


def test_collecting_does_not_change_the_output_and_nothing_is_kept_outside(x):
    model = Stack()
    with collect_router(model) as routers:
        inside = model(x)
    assert torch.equal(model(x), inside)
    assert len(routers) == 3


def test_two_forward_passes_count_every_token(x):
    model = Stack(1)
    with collect_router(model) as routers:
        model(x)
        model(x)
    assert sum(r.counts.sum() for r in routers) == 2 * 70


def test_layers_of_other_models_are_not_collected(x):
    model, other = Stack(2), Stack(1)
    with collect_router(model) as routers:
        other(x)
        assert len(routers) == 0
        model(x)
    assert len(routers) == 2


def test_the_model_itself_may_be_the_layer(x):
    moe = MoEMLP(6, 10, 4)
    with collect_router(moe) as routers:
        moe(x)
    assert len(routers) == 1


def test_nested_contexts_both_collect(x):
    model = Stack(2)
    with collect_router(model) as outer:
        with collect_router(model.blocks[0]) as inner:
            model(x)
        assert len(inner) == 1
        model(x)
    assert len(outer) == 4
    assert len(inner) == 1


def test_an_error_inside_ends_the_collection(x):
    model = Stack(2)
    with pytest.raises(ZeroDivisionError), collect_router(model) as routers:
        model(x)
        raise ZeroDivisionError
    model(x)
    assert len(routers) == 2
    with collect_router(model) as again:
        model(x)
    assert len(again) == 2


def test_an_error_in_the_middle_of_a_forward_pass_leaves_the_model_usable(x):
    model = Stack(2)
    with pytest.raises((RuntimeError, ValueError)), collect_router(model):
        model(torch.randn(3, 5))
    with collect_router(model) as routers:
        model(x)
    assert len(routers) == 2


@pytest.mark.parametrize("backward_inside", [True, False])
@pytest.mark.parametrize("use_reentrant", [False, True])
def test_checkpointing_counts_once(x, use_reentrant, backward_inside):
    model = Stack(3, checkpointing=use_reentrant)
    x.requires_grad_()
    with collect_router(model) as routers:
        y = model(x)
        if backward_inside:
            y.sum().backward()
    if not backward_inside:
        y.sum().backward()
    assert len(routers) == 3
    assert all(r.counts.sum() == 70 for r in routers)


@pytest.mark.parametrize("backward_inside", [True, False])
def test_checkpointing_gives_the_same_gradients_of_task_and_balance(x, backward_inside):
    plain = Stack(2)
    checkpointed = copy.deepcopy(plain)
    checkpointed.checkpointing = False
    for model in (plain, checkpointed):
        with collect_router(model) as routers:
            y = model(x)
            loss = y.square().mean() + router_losses(routers, load_balance=1.0, z=0.1).total
            if backward_inside:
                loss.backward()
        if not backward_inside:
            loss.backward()
    for (name, p), q in zip(plain.named_parameters(), checkpointed.parameters(), strict=True):
        oracles.assert_near(q.grad, p.grad, 1e-5, name)


class Twice(nn.Module):
    """One mixture that serves two layers."""

    def __init__(self, checkpointing):
        super().__init__()
        self.mlp, self.checkpointing = MoEMLP(6, 10, 4), checkpointing

    def forward(self, x):
        for _ in range(2):
            x = x + (checkpoint(self.mlp, x, use_reentrant=False) if self.checkpointing else self.mlp(x))
        return x


@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_layer_that_is_used_twice_counts_twice(x, checkpointing):
    model = Twice(checkpointing)
    with collect_router(model) as routers:
        model(x).sum().backward()
    assert sum(r.counts.sum() for r in routers) == 2 * 70


@pytest.mark.parametrize("checkpointing", [None, False])
def test_steps_of_gradient_accumulation_in_one_context_count_each(x, checkpointing):
    model = Stack(2, checkpointing)
    with collect_router(model) as routers:
        for _ in range(3):
            model(x).sum().backward()
    assert sum(r.counts.sum() for r in routers) == 3 * 2 * 70


def test_a_context_opened_for_the_backward_pass_alone_collects_no_recomputation(x):
    model = Stack(2, checkpointing=False)
    y = model(x)
    with collect_router(model) as routers:
        y.sum().backward()
    assert len(routers) == 0


def test_losses_that_cannot_train_after_reentrant_checkpointing_say_so(x):
    model = Stack(1, checkpointing=True)
    with collect_router(model) as routers:
        model(x.requires_grad_())
    with pytest.warns(UserWarning, match="(?i)gradient"):
        router_losses(routers)


def test_a_clip_with_gradient_checkpointing_counts_once_and_trains_its_routers(make_clip, clip_batch):
    model = mmbal.upcycle(make_clip(0), num_experts=4, expert_init="noise").train()
    gradients = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.zero_grad()
        with collect_router(model) as routers:
            loss = model(**clip_batch, return_loss=True).loss + router_losses(routers, load_balance=1.0).total
            loss.backward()
        assert len(routers) == 7
        gradients.append({n: p.grad.clone() for n, p in model.named_parameters() if n.endswith("router.weight")})
    for name, expected in gradients[0].items():
        oracles.assert_near(gradients[1][name], expected, 1e-4, name)


@pytest.mark.parametrize("compile_first", [True, False])
def test_collection_survives_torch_compile(x, compile_first):
    model = Stack(2)
    with collect_router(model) as expected:
        model(x)
    compiled = torch.compile(model, backend="aot_eager")
    if compile_first:
        compiled(x)
    for _ in range(2):
        with collect_router(model) as routers:
            compiled(x)
        assert len(routers) == 2
        for ours, eager in zip(routers, expected, strict=True):
            assert torch.equal(ours.indices, eager.indices)
            oracles.assert_near(ours.logits, eager.logits, 1e-6)
    router_losses(routers, load_balance=1.0).total.backward()
    assert all(block.mlp.router.weight.grad.any() for block in model.blocks)


def test_a_step_that_collects_compiles_in_one_graph(x):
    model = Stack(2)

    def step(x):
        with collect_router(model) as routers:
            y = model(x)
        return y.square().mean() + router_losses(routers, load_balance=1.0, z=0.1).total

    compiled = torch.compile(step, backend="aot_eager", fullgraph=True)
    ours = torch.autograd.grad(compiled(x), list(model.parameters()))
    eager = torch.autograd.grad(step(x), list(model.parameters()))
    for a, b in zip(ours, eager, strict=True):
        oracles.assert_near(a, b, 1e-5)


def test_the_token_mask_is_recorded_flat_and_respected_by_the_losses(x):
    moe, mask = MoEMLP(6, 10, 4), torch.rand(5, 7) < 0.5
    with collect_router(moe) as routers:
        moe(x, token_mask=mask)
    assert torch.equal(routers[0].token_mask, mask.flatten())
    losses = router_losses(routers, load_balance=1.0, z=1.0)
    logits = routers[0].logits.double()
    expected = oracles.load_balance(logits, routers[0].indices, mask.flatten())
    oracles.assert_near(losses.load_balance, expected, 1e-5)
    oracles.assert_near(losses.z, oracles.z_loss(logits, mask.flatten()), 1e-5)


def test_balance_loss_alone_moves_the_router_towards_balance():
    moe, x = MoEMLP(6, 10, 4, router_bias=True), torch.randn(400, 6)
    with torch.no_grad():
        moe.router.bias.copy_(torch.tensor([2.0, 1.5, 0.0, -1.0]))
    optimizer = torch.optim.Adam(moe.router.parameters(), lr=0.05)
    values = []
    for _ in range(80):
        with collect_router(moe) as routers:
            moe(x)
        losses = router_losses(routers, load_balance=0.01)
        optimizer.zero_grad()
        losses.total.backward()
        optimizer.step()
        values.append(losses.load_balance.item())
    assert values[0] > 2.5
    assert values[-1] < 2.1


def test_router_losses_work_under_no_grad(x):
    model = Stack(2)
    with torch.no_grad(), collect_router(model) as routers:
        model(x)
        losses = router_losses(routers, load_balance=0.01, z=0.001)
    assert not losses.total.requires_grad and losses.total > 0


class Decoy(nn.Module):
    """Has everything a choice by name would fall for."""

    def __init__(self, router_bias=False):
        super().__init__()
        self.router = nn.Linear(6, 6)
        self.gate = nn.Linear(6, 6)
        self.feed = MoEMLP(6, 10, 4, router_bias=router_bias)

    def forward(self, x):
        return self.feed(self.gate(self.router(x)))


@pytest.mark.parametrize("router_bias", [False, True])
def test_freezing_goes_by_type_and_not_by_name(router_bias):
    model = nn.Sequential(Decoy(router_bias), Decoy(router_bias))
    names = freeze_except_router(model)
    parts = ["weight", "bias"] if router_bias else ["weight"]
    assert sorted(names) == sorted(f"{i}.feed.router.{part}" for i in range(2) for part in parts)
    assert sorted(n for n, p in model.named_parameters() if p.requires_grad) == sorted(names)
    model(torch.randn(9, 6)).square().sum().backward()
    assert all((p.grad is not None) == (n in names) for n, p in model.named_parameters())


def test_freezing_makes_a_frozen_router_trainable_again_and_knows_subclasses():
    class Mine(MoEMLP):
        pass

    model = nn.ModuleDict({"odd name": Mine(6, 10, 4)})
    model.requires_grad_(False)
    assert freeze_except_router(model) == ["odd name.router.weight"]
    assert model["odd name"].router.weight.requires_grad


def test_freezing_a_model_without_a_mixture_is_refused():
    with pytest.raises(ValueError, match="MoEMLP"):
        mmbal.freeze_except_router(nn.Sequential(nn.Linear(3, 3)))
