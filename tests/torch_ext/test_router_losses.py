"""The losses of collected routers: pooling, masks, weights."""

import pytest
import torch

import oracles
from mmbal import router_losses
from mmbal.moe import RouterRecord

NORMALIZATIONS = ["mixtral", "megatron", "switch"]


def record(logits, K=2, mask=None, name="layer"):
    return RouterRecord(name, logits, oracles.topk(logits, K)[1], mask, logits.shape[1], logits.requires_grad)


def test_pooling_hides_a_collapse_that_the_mean_over_layers_shows():
    two, other = torch.tensor([[0.0, 0.0, -80.0, -80.0]]), torch.tensor([[-80.0, -80.0, 0.0, 0.0]])
    layers = [record(two.repeat(5, 1)), record(other.repeat(5, 1))]
    mean = router_losses(layers, load_balance=1.0, pool="per_layer_mean")
    pooled = router_losses(layers, load_balance=1.0, pool="pooled")
    assert mean.load_balance.item() == pytest.approx(4.0, rel=1e-6)
    assert pooled.load_balance.item() == pytest.approx(2.0, rel=1e-6)


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("normalize", NORMALIZATIONS)
def test_router_losses_of_layers_of_different_size_and_their_weighted_total(normalize, masked):
    sizes = (6, 30)
    masks = {N: torch.arange(N) % 3 != 1 if masked else None for N in sizes}
    layers = [record(oracles.separated_logits(N, 5, seed=N) + N / 10, mask=masks[N]) for N in sizes]
    together = RouterRecord(
        "all",
        torch.cat([layer.logits for layer in layers]),
        torch.cat([layer.indices for layer in layers]),
        torch.cat([layer.token_mask for layer in layers]) if masked else None,
        5,
        False,
    )
    for pool, parts in (("per_layer_mean", layers), ("pooled", [together])):
        losses = router_losses(layers, load_balance=0.01, z=0.001, pool=pool, normalize=normalize)
        values = [oracles.load_balance(p.logits, p.indices, p.token_mask, normalize) for p in parts]
        z_values = [oracles.z_loss(p.logits, p.token_mask) for p in parts]
        balance, z = torch.stack(values).mean(), torch.stack(z_values).mean()
        oracles.assert_near(losses.load_balance, balance, 1e-12, pool)
        oracles.assert_near(losses.z, z, 1e-12, pool)
        oracles.assert_near(losses.total, 0.01 * balance + 0.001 * z, 1e-12, pool)


@pytest.mark.parametrize("wrong", [{"pool": "mean"}, {"normalize": "mixtrl"}])
def test_router_losses_name_the_wrong_option(wrong):
    with pytest.raises((ValueError, RuntimeError), match=next(iter(wrong))):
        router_losses([record(torch.randn(4, 3))], **wrong)


@pytest.mark.parametrize("masked", [False, True])
def test_pooled_losses_agree_with_transformers(masked):
    mixtral = pytest.importorskip("transformers.models.mixtral.modeling_mixtral")
    layers = tuple(torch.randn(3 * 7, 6) for _ in range(2))
    attention_mask = (torch.rand(3, 7) < 0.6).long() if masked else None
    records = [record(x, mask=attention_mask.reshape(-1).bool() if masked else None) for x in layers]
    expected = mixtral.load_balancing_loss_func(layers, 6, 2, attention_mask)
    oracles.assert_near(router_losses(records, pool="pooled").load_balance, expected, 1e-6)


@pytest.mark.parametrize("pool", ["per_layer_mean", "pooled"])
def test_the_gradient_of_the_total_is_that_of_the_formula(pool):
    ours, exact = ([oracles.separated_logits(N, 5, seed=N).requires_grad_() for N in (6, 9)] for _ in range(2))
    router_losses([record(x) for x in ours], load_balance=0.01, z=0.001, pool=pool).total.backward()
    parts = exact if pool == "per_layer_mean" else [torch.cat(exact)]
    for x in parts:
        balance = oracles.load_balance(x, oracles.topk(x, 2)[1])
        ((0.01 * balance + 0.001 * oracles.z_loss(x)) / len(parts)).backward()
    for a, b in zip(ours, exact, strict=True):
        oracles.assert_near(a.grad, b.grad, 1e-12)


def test_a_layer_without_counted_tokens_adds_nothing():
    logits = torch.randn(6, 4, requires_grad=True)
    none = record(logits, mask=torch.zeros(6, dtype=torch.bool))
    losses = router_losses([none], load_balance=1.0, z=1.0)
    losses.total.backward()
    assert losses.total.item() == 0
    assert (logits.grad == 0).all()
