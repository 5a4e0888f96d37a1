import pytest
import torch

import mmbal
import oracles
from clip_moe_models import build, layers_of


@pytest.fixture
def moe(make_clip):
    return build(make_clip(0))


def contrastive(output):
    labels = torch.arange(len(output.logits_per_image))
    cross_entropy = torch.nn.functional.cross_entropy
    return (cross_entropy(output.logits_per_image, labels) + cross_entropy(output.logits_per_text, labels)) / 2


def balance_of(moe, tokens, masks):
    """Mean over layers of the load-balance loss, from the inputs of the layers."""
    losses = []
    for name, layer in layers_of(moe).items():
        x = tokens[name].reshape(-1, layer.dim).double()
        bias = None if layer.router.bias is None else layer.router.bias.double()
        logits = torch.nn.functional.linear(x, layer.router.weight.double(), bias)
        mask = masks.get(name.split("_")[0])
        losses.append(oracles.load_balance(logits, oracles.topk(logits, layer.top_k)[1], mask))
    return torch.stack(losses).mean()


@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("masked", [True, False])
def test_the_balance_loss_is_added_once_asked_for_and_while_training(moe, clip_batch, training, masked):
    moe.config.router_aux_loss_coef = 0.5
    for layer in layers_of(moe).values():
        layer.dropout = 0.0
    moe.train(training)
    masks = {}
    if masked:
        clip_batch["attention_mask"] = torch.ones(6, 9, dtype=torch.long)
        clip_batch["attention_mask"][2:, 5:] = 0
        clip_batch["input_ids"][2:, 4] = 49
        masks["text"] = clip_batch["attention_mask"].reshape(-1).bool()
    tokens, hooks = {}, []
    for name, layer in layers_of(moe).items():
        hooks.append(layer.register_forward_pre_hook(lambda _, inputs, name=name: tokens.update({name: inputs[0]})))
    plain = moe(**clip_batch, return_loss=True)
    assert plain.aux_loss is None and plain.router_logits is None
    oracles.assert_near(plain.loss, contrastive(plain), 1e-6)
    output = moe(**clip_batch, return_loss=True, output_router_logits=True)
    expected = balance_of(moe, tokens, masks)
    oracles.assert_near(output.aux_loss, expected, 1e-5)
    oracles.assert_near(output.loss, contrastive(output) + (0.5 * expected if training else 0), 1e-5)
    assert [tuple(logits.shape) for logits in output.router_logits] == [(6 * 9, 5), (6 * 5, 3), (6 * 5, 3)]
    moe.config.output_router_logits = True
    assert torch.equal(moe(**clip_batch, return_loss=True).loss, output.loss)
    assert moe(**clip_batch, output_router_logits=False).aux_loss is None
    assert len(moe(**clip_batch, return_dict=False)) == 8


def test_the_balance_loss_trains_the_routers(moe, clip_batch):
    moe.train()
    mmbal.freeze_except_router(moe)
    moe(**clip_batch, output_router_logits=True).aux_loss.backward()
    assert all(layer.router.weight.grad.abs().max() > 0 for layer in layers_of(moe).values())


def test_a_script_that_collects_the_routers_itself_sees_them_once(moe, clip_batch):
    with mmbal.collect_router(moe) as routers:
        output = moe(**clip_batch, output_router_logits=True)
    assert len(routers) == 3
    assert torch.equal(mmbal.router_losses(routers).load_balance, output.aux_loss)


@pytest.mark.parametrize("output_router_logits", [False, True])
def test_gradient_checkpointing_changes_nothing(moe, clip_batch, output_router_logits):
    moe.train()
    options = {**clip_batch, "return_loss": True, "output_router_logits": output_router_logits}
    gradients = []
    for checkpointing in (False, True):
        if checkpointing:
            moe.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        moe.zero_grad()
        torch.manual_seed(3)
        loss = moe(**options).loss
        loss.backward()
        gradients.append([loss, *(p.grad for p in moe.parameters())])
    assert all(torch.equal(a, b) for a, b in zip(*gradients, strict=True))


def test_the_model_compiles_in_one_graph_with_gradients(moe, clip_batch):
    parameters = [p for layer in layers_of(moe).values() for p in (layer.router.weight, layer.experts.w1)]
    compiled = torch.compile(moe, backend="aot_eager", fullgraph=True)
    results = []
    for model in (moe, compiled):
        output = model(**clip_batch, return_loss=True, output_router_logits=True)
        loss = output.loss + output.aux_loss
        results.append([loss, *torch.autograd.grad(loss, parameters)])
    for ours, expected in zip(*results, strict=True):
        oracles.assert_near(ours, expected, 1e-5)
