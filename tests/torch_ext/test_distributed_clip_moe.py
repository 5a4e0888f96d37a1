"""A CLIP-MoE in two gloo processes, as replicas (DDP), shards (FSDP2) and with split experts, against one process with
all rows. Four processes and more of split experts: test_distributed_experts.py."""

import warnings

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from scipy.special import logsumexp
from torch import nn

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

if dist.is_available():
    from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.distributed.tensor.debug import CommDebugMode
    from torch.nn.parallel import DistributedDataParallel

    import mmbal
    import ranks
    from mmbal.distributed import clip_loss, fully_shard_routers, router_losses, shard_experts
    from ranks import (
        ROWS,
        assert_same_training,
        ddp,
        drawn,
        full,
        make,
        shards,
        shards_and_routers,
        split_experts,
        start,
        train_alone,
        train_part,
    )


def half(rank, cut=6):
    return slice(None) if rank is None else (slice(0, cut), slice(cut, ROWS))[rank]


# --- The loss ---------------------------------------------------------------------------------------------------------


def loss_case(rank, cut, **options):
    images, texts = (F.normalize(drawn(ROWS, 5, seed=i), dim=1)[half(rank, cut)].clone() for i in range(2))
    scale = torch.tensor(3.0, dtype=torch.float64)
    tensors = [t.requires_grad_() for t in (images, texts, scale)]
    loss = clip_loss(*tensors, **options)
    return {"loss": loss.detach(), "gradients": torch.autograd.grad(loss, tensors)}


LOSSES = {
    f"{name}, {smoothing}": {"cut": cut, "label_smoothing": smoothing}
    for name, cut in {"equal": 6, "unequal": 8, "none on the second": 12}.items()
    for smoothing in (0.0, 0.1)
}


def router_case(rank, cut, masked=False, **options):
    """Losses and gradients of three layers' logits."""
    rows = half(rank, cut)
    logits = [drawn(ROWS, 4, seed=i)[rows].clone().requires_grad_() for i in range(3)]
    mask = (drawn(ROWS, seed=9) > -0.5)[rows] if masked else None
    records = [mmbal.RouterRecord(str(i), x, x.topk(2).indices, mask, 4) for i, x in enumerate(logits)]
    found = router_losses(records, load_balance=0.5, z=0.25, **options)
    return {"losses": [t.detach() for t in found], "gradients": torch.autograd.grad(found.total, logits)}


ROUTERS = {
    "mixtral": {"cut": 6},
    "megatron": {"cut": 6, "normalize": "megatron"},
    "switch": {"cut": 6, "normalize": "switch"},
    "unequal": {"cut": 9},
    "none on the second": {"cut": 12},
    "masked": {"cut": 7, "masked": True},
}


# --- Models -----------------------------------------------------------------------------------------------------------


def ddp_static(model):
    return DistributedDataParallel(model, static_graph=True)


def ddp_unused(model):
    return DistributedDataParallel(model, find_unused_parameters=True)


def shards_of_mixtures(model):
    for block in model.all_blocks():
        fully_shard(block.mlp)
    return fully_shard(model)


def shards_then_frozen(model):
    mmbal.freeze_except_router(shards(model))
    return model


def split_experts_then_frozen(model):
    mmbal.freeze_except_router(shard_experts(model))
    return ddp(model)


EQUAL, UNEQUAL, NONE = (6, 6), (8, 4), (12, 0)
TRAININGS = {
    "ddp": (ddp, {"adam": True}),
    "ddp, other numbers of rows": (ddp, {"cut": UNEQUAL}),
    "ddp, no rows on the second": (ddp, {"cut": NONE}),
    "ddp, frozen": (ddp, {"frozen": True}),
    "ddp, checkpointed": (ddp, {"checkpointed": True}),
    "ddp, two batches a step": (ddp, {"batches": 2}),
    "ddp, static graph": (ddp_static, {"cut": UNEQUAL}),
    "ddp, static graph, frozen": (ddp_static, {"frozen": True}),
    "ddp, looking for unused": (ddp_unused, {}),
    "ddp, idle experts": (ddp, {"num_experts": 40}),
    "ddp, shared expert": (ddp, {"shared_expert": True}),
    "fully_shard": (shards, {"adam": True}),
    "fully_shard, other numbers of rows": (shards, {"cut": UNEQUAL}),
    "fully_shard, no rows on the second": (shards, {"cut": NONE}),
    "fully_shard, frozen": (shards, {"frozen": True}),
    "fully_shard, then frozen": (shards_then_frozen, {"alone": {"frozen": True}}),
    "fully_shard, checkpointed": (shards_and_routers, {"checkpointed": True}),
    "fully_shard, two batches a step": (shards_and_routers, {"batches": 2}),
    "fully_shard, five experts": (shards, {"num_experts": 5}),
    "fully_shard, shared expert": (shards, {"shared_expert": True}),
    "fully_shard, mixtures": (shards_of_mixtures, {}),
    "fully_shard, routers": (shards_and_routers, {}),
    "fully_shard, routers, frozen": (shards_and_routers, {"frozen": True}),
    "split experts": (split_experts, {"adam": True}),
    "split experts, other numbers of rows": (split_experts, {"cut": UNEQUAL, "num_experts": 5}),
    "split experts, no rows on the second": (split_experts, {"cut": NONE}),
    "split experts, frozen": (split_experts, {"frozen": True}),
    "split experts, then frozen": (split_experts_then_frozen, {"alone": {"frozen": True}}),
}
TRAININGS = {name: {"wrap": wrap, "cut": EQUAL} | options for name, (wrap, options) in TRAININGS.items()}


STATES = {"ddp": ddp, "fully_shard": shards, "fully_shard, routers": shards_and_routers}


def whole_state(wrap):
    model = make(seed=7)
    wrap(model)
    return get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))


def in_bfloat16(rank, routers):
    """Logits of one layer and their inputs under a policy of bfloat16, and the router's weights and gradients."""
    torch.manual_seed(1)
    layer, seen = ranks.Block({"router_bias": False}), []
    before = layer.mlp.router.weight.detach().clone()
    layer.mlp.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0].detach().clone()))
    if routers:
        fully_shard_routers(layer)
    fully_shard(layer, mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))
    with mmbal.collect_router(layer) as records:
        y = layer(drawn(5, 8, seed=rank).float())
    y.float().sum().backward()
    weight = layer.mlp.router.weight
    return {
        "x": seen[0],
        "logits": records[0].logits.detach(),
        "weight": before,
        "y": y.detach(),
        "gradient": full(weight.grad),
        "kept": torch.equal(full(weight), before),
    }


def compiled(rank):
    torch.manual_seed(1)
    layer = shard_experts(mmbal.MoEMLP(6, 10, 4).double())
    x = drawn(rank + 1, 6, seed=rank)
    return torch.equal(torch.compile(layer, backend="eager")(x), layer(x))


def frozen_after(split):
    """What freeze_except_router says, and how many exchanges it takes, where experts are all the same."""
    model = make()
    for block in model.all_blocks():
        for parameter in block.mlp.experts.parameters():
            nn.init.ones_(parameter)
    split(model)
    with CommDebugMode() as exchanges, warnings.catch_warnings():
        warnings.simplefilter("error")
        trained = mmbal.freeze_except_router(model)
    return {
        "trained": trained,
        "exchanges": exchanges.get_total_counts(),
        "asked": [name for name, p in model.named_parameters() if p.requires_grad],
    }


def loss_dtypes(rank):
    """{dtype of the rows: loss} with no row on the second rank."""
    found = {}
    for dtype in (torch.bfloat16, torch.float32, torch.float64):
        images, texts = (F.normalize(drawn(ROWS, 5, seed=i), dim=1)[half(rank, 12)].to(dtype) for i in range(2))
        found[str(dtype)] = clip_loss(images, texts, torch.tensor([3.0]))
    return found


def refusals(rank):
    found = {}
    for name, case in {
        "widths of ranks": lambda: clip_loss(torch.zeros(2, 3 + rank), torch.zeros(2, 3 + rank), 1.0),
        "not alike": lambda: clip_loss(torch.zeros(2, 3), torch.zeros(3, 3), 1.0),
        "no mixture": lambda: fully_shard_routers(torch.nn.Linear(2, 2)),
        "routers twice": lambda: fully_shard_routers(fully_shard_routers(make())),
        "normalize": lambda: router_case(rank, 6, normalize="other"),
        "no records": lambda: router_losses([]),
    }.items():
        with pytest.raises(ValueError) as caught:
            case()
        found[name] = str(caught.value)
    return found


def process(rank, folder):
    return {
        "losses": {name: loss_case(rank, **options) for name, options in LOSSES.items()},
        "local": loss_case(rank, 8, gather=False),
        "routers": {name: router_case(rank, **options) for name, options in ROUTERS.items()},
        "trained": {name: train_part(rank, **options) for name, options in TRAININGS.items()},
        "states": {name: whole_state(wrap) for name, wrap in STATES.items()},
        "bfloat16": {routers: in_bfloat16(rank, routers) for routers in (False, True)},
        "compiled": compiled(rank),
        "frozen": [frozen_after(split) for split in (shards, shards_and_routers, shard_experts)],
        "dtypes": loss_dtypes(rank),
        "refused": refusals(rank),
    }


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    return start(process, 2, tmp_path_factory.mktemp("ranks"))


@pytest.mark.parametrize("case", LOSSES)
def test_the_mean_of_losses_and_gradients_is_that_of_the_joined_batch(two_processes, case):
    alone, parts = loss_case(None, **LOSSES[case]), [rank["losses"][case] for rank in two_processes]
    torch.testing.assert_close((parts[0]["loss"] + parts[1]["loss"]) / 2, alone["loss"], rtol=1e-13, atol=0)
    (*rows, scale), (*rows_2, scale_2) = (part["gradients"] for part in parts)
    joined = [torch.cat(pair) / 2 for pair in zip(rows, rows_2, strict=True)] + [(scale + scale_2) / 2]
    for found, expected in zip(joined, alone["gradients"], strict=True):
        torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-14)


def test_the_loss_has_float32_or_more_with_and_without_rows(two_processes):
    """The same dtype on every rank, or the mean of the processes' losses could not be taken."""
    images, texts = (F.normalize(drawn(ROWS, 5, seed=i), dim=1) for i in range(2))
    for name, near in {"bfloat16": 2e-2, "float32": 1e-6, "float64": 1e-13}.items():
        first, second = (rank["dtypes"][f"torch.{name}"] for rank in two_processes)
        assert first.dtype == second.dtype == (torch.float64 if name == "float64" else torch.float32)
        assert float(first + second) / 2 == pytest.approx(float(clip_loss(images, texts, 3.0)), rel=near)


@pytest.mark.parametrize("smoothing", [0.0, 0.1])
def test_the_loss_is_the_mean_of_both_cross_entropies(smoothing):
    images, texts = (F.normalize(drawn(ROWS, 5, seed=i), dim=1).numpy() for i in range(2))
    logits = 3.0 * images @ texts.T
    target = (1 - smoothing) * np.eye(ROWS) + smoothing / ROWS
    sides = [(target * (logsumexp(x, axis=1, keepdims=True) - x)).sum(1).mean() for x in (logits, logits.T)]
    found = loss_case(None, 6, label_smoothing=smoothing)["loss"]
    assert float(found) == pytest.approx(sum(sides) / 2, rel=1e-13)


def test_without_gathering_each_process_has_its_own_negatives(two_processes):
    for i, rank in enumerate(two_processes):
        images, texts = (F.normalize(drawn(ROWS, 5, seed=s), dim=1)[half(i, 8)] for s in range(2))
        torch.testing.assert_close(rank["local"]["loss"], clip_loss(images, texts, 3.0), rtol=1e-13, atol=0)


def test_no_pairs_at_all_have_no_loss():
    images = torch.zeros(0, 4, requires_grad=True)
    loss = clip_loss(images, images, 2.0)
    loss.backward()
    assert loss == 0 and images.grad.shape == (0, 4)


@pytest.mark.parametrize("case", ROUTERS)
def test_router_losses_of_all_tokens_are_those_of_one_process(two_processes, case):
    alone, parts = router_case(None, **ROUTERS[case]), [rank["routers"][case] for rank in two_processes]
    for found, other, expected in zip(parts[0]["losses"], parts[1]["losses"], alone["losses"], strict=True):
        torch.testing.assert_close((found + other) / 2, expected, rtol=1e-12, atol=1e-14)
    for found, other, expected in zip(parts[0]["gradients"], parts[1]["gradients"], alone["gradients"], strict=True):
        torch.testing.assert_close(torch.cat([found, other]) / 2, expected, rtol=1e-11, atol=1e-14)


@pytest.mark.parametrize("case", TRAININGS)
def test_a_clip_moe_trains_as_in_one_process(two_processes, case):
    alone = train_alone(**TRAININGS[case])
    for rank in two_processes:
        assert_same_training(rank["trained"][case], alone)


def test_routers_of_a_split_model_are_left_alone_without_asking_the_other_processes(two_processes):
    routers = [
        f"{tower}.blocks.{i}.mlp.router.{p}"
        for tower in ("images", "texts")
        for i in (0, 1)
        for p in ("weight", "bias")
    ]
    for rank in two_processes:
        for found in rank["frozen"]:
            assert found == {"trained": routers, "exchanges": 0, "asked": routers}


def test_experts_without_rows_have_gradients_of_zeros(two_processes):
    for rank in two_processes:
        gradient = rank["trained"]["ddp, idle experts"]["gradients"]["images.blocks.0.mlp.experts.w1"]
        assert (gradient == 0).flatten(1).all(1).any()


@pytest.mark.parametrize("case", STATES)
def test_a_model_of_one_process_loads_the_whole_state(two_processes, case):
    model = make(seed=9)
    model.load_state_dict(two_processes[0]["states"][case])
    torch.testing.assert_close(dict(model.state_dict()), dict(make(seed=7).state_dict()), rtol=0, atol=0)


def test_routers_of_their_own_keep_float32_where_blocks_compute_in_bfloat16(two_processes):
    """Without, the router's weights are rounded before the product, which is taken in float32 all the same."""
    for rank in two_processes:
        for routers, found in rank["bfloat16"].items():
            assert found["x"].dtype == found["y"].dtype == torch.bfloat16
            assert found["logits"].dtype == found["gradient"].dtype == torch.float32 and found["kept"]
            weight = found["weight"] if routers else found["weight"].bfloat16().float()
            torch.testing.assert_close(found["logits"], F.linear(found["x"].float(), weight), rtol=1e-5, atol=1e-6)
            assert not torch.equal(found["weight"], found["weight"].bfloat16().float())


def test_a_compiled_layer_with_split_experts_is_the_layer(two_processes):
    assert all(rank["compiled"] for rank in two_processes)


@pytest.mark.parametrize(
    ("case", "words"),
    {
        "widths of ranks": "clip_loss: images must be as wide in every process, got [3, 4]",
        "not alike": "clip_loss: images and texts must be [B, P] alike, got [2, 3] and [3, 3]",
        "no mixture": "fully_shard_routers: model must have MoEMLP layers, Linear has none",
        "routers twice": "fully_shard_routers: call it once, before fully_shard of what the routers are in",
        "normalize": "router_losses: normalize must be mixtral, megatron or switch, got 'other'",
        "no records": "router_losses: routers must have at least one record",
    }.items(),
)
def test_what_cannot_be_served_is_refused(two_processes, case, words):
    for rank in two_processes:
        assert words in rank["refused"][case]
