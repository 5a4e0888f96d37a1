"""Experts split over four gloo processes against one process with all experts and all rows."""

import warnings

import pytest
import torch
import torch.distributed as dist
from torch import nn

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

if dist.is_available():
    from torch.distributed.checkpoint.state_dict import (
        StateDictOptions,
        get_model_state_dict,
        set_model_state_dict,
    )
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import MixedPrecisionPolicy, fully_shard
    from torch.nn.parallel import DistributedDataParallel
    from torch.utils.checkpoint import checkpoint

    import ranks
    from mmbal import MoEMLP, pack
    from mmbal.distributed import clip_grad_norm_, expert_parameters, fully_shard_routers, shard_experts
    from ranks import (
        assert_same_training,
        ddp,
        drawn,
        full,
        make,
        shards,
        shards_and_routers,
        split_experts,
        split_experts_and_shards,
        start,
        train,
        train_alone,
        train_part,
    )

W = 4


# --- One layer --------------------------------------------------------------------------------------------------------


def layer_case(
    rank, counts=(3, 3, 3, 3), dtype="float64", only=None, frozen=False, x_grad=True, again=False, **options
):
    """Output and gradients of one layer for this rank's rows; rank None: of all rows, with the experts whole."""
    torch.manual_seed(1)
    options = {"num_experts": 4, "router_bias": True} | options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of top_k=1
        layer = MoEMLP(6, 10, **options).to(getattr(torch, dtype))
    nn.init.normal_(layer.router.weight)
    if only is not None:
        nn.init.zeros_(layer.router.weight)
        with torch.no_grad():
            layer.router.bias.copy_(torch.tensor([float(-abs(j - only)) for j in range(layer.num_experts)]))
    if frozen:
        layer.experts.requires_grad_(False)
    first = 0 if rank is None else sum(counts[:rank])
    rows = slice(first, None if rank is None else first + counts[rank])
    x = drawn(sum(counts), 6, seed=3)[rows].to(layer.router.weight.dtype).clone().requires_grad_(x_grad)
    dy = drawn(sum(counts), 6, seed=4)[rows].to(x.dtype)
    if rank is not None:
        shard_experts(layer)
    y = checkpoint(layer, x, use_reentrant=False) if again and rank is not None else layer(x)
    y.backward(dy)
    return {
        "y": y.detach(),
        "dx": x.grad,
        "router": [p.grad for p in layer.router.parameters()],
        "experts": {name: full(p.grad) for name, p in layer.experts.named_parameters()},
    }


LAYERS = {
    "as many rows everywhere": {},
    "other numbers of rows": {"counts": (3, 5, 1, 7)},
    "no rows on one": {"counts": (4, 0, 3, 2)},
    "no rows but on one": {"counts": (0, 0, 6, 0)},
    "no rows at all": {"counts": (0, 0, 0, 0)},
    "all rows to one": {"only": 2, "top_k": 1, "normalize": False},
    "all rows to two of few rows": {"only": 3, "counts": (1, 0, 0, 9)},
    "more experts than processes": {"num_experts": 9, "top_k": 3},
    "a process with fewer experts": {"num_experts": 7},
    "processes without experts": {"num_experts": 5},
    "fewer experts than processes": {"num_experts": 2},
    "every expert": {"top_k": 4},
    "no biases": {"bias": False, "router_bias": False},
    "shared expert": {"shared_expert": True, "shared_weight": 0.3},
    "shared expert, processes without": {"shared_expert": True, "num_experts": 2, "counts": (4, 0, 3, 2)},
    "frozen experts": {"frozen": True},
    "frozen experts, nothing below": {"frozen": True, "x_grad": False},
    "nothing below": {"x_grad": False},
    "checkpointed": {"again": True},
    "checkpointed, no rows on one": {"again": True, "counts": (4, 0, 3, 2)},
    "bfloat16": {"dtype": "bfloat16"},
    "float32": {"dtype": "float32"},
}


def with_dropout(rank, **options):
    """y, and sum(dw2 w2) + sum(db2 b2) against sum(dy y), of which y is linear, over all processes."""
    torch.manual_seed(2)
    layer = shard_experts(MoEMLP(6, 10, 4, **options).double())
    x, dy = drawn(5, 6, seed=rank), drawn(5, 6, seed=rank + 10)
    found = []
    for _ in range(2):
        torch.manual_seed(rank)
        layer.zero_grad()
        y = layer(x)
        y.backward(dy)
        pairs = [(p.to_local(), p.grad.to_local()) for p in (layer.experts.w2, layer.experts.b2)]
        sums = torch.stack([sum((p * g).sum() for p, g in pairs) * W, (dy * y).sum()]).detach()
        dist.all_reduce(sums)
        found.append((y.detach(), sums))
    other = layer(x).detach()
    return {"first": found[0], "again": found[1], "other": other, "evaluated": layer.eval()(x).detach()}


def same_rows(rank):
    """Which hidden units are dropped where each process has the same rows and the same seed."""
    torch.manual_seed(2)
    layer = shard_experts(MoEMLP(6, 10, 4, top_k=4, dropout=0.5).double())
    torch.manual_seed(0)
    return layer(drawn(5, 6, seed=0)).detach()


# --- Models -----------------------------------------------------------------------------------------------------------


def two_by_two(model):
    return ddp(shard_experts(model, init_device_mesh("cpu", (2, 2))))


EQUAL, UNEQUAL = (3, 3, 3, 3), (5, 1, 4, 2)
TRAININGS = {
    "whole, replicas": {"wrap": ddp, "cut": UNEQUAL},
    "whole, fully_shard": {"wrap": shards, "cut": UNEQUAL},
    "whole, fully_shard, routers, frozen": {"wrap": shards_and_routers, "cut": EQUAL, "frozen": True, "adam": True},
    "replicas": {"wrap": split_experts, "cut": EQUAL, "adam": True},
    "replicas, other numbers of rows": {"wrap": split_experts, "cut": UNEQUAL},
    "replicas, no rows on one": {"wrap": split_experts, "cut": (6, 0, 4, 2), "num_experts": 5},
    "replicas, frozen": {"wrap": split_experts, "cut": EQUAL, "frozen": True, "adam": True},
    "replicas, checkpointed": {"wrap": split_experts, "cut": (6, 0, 4, 2), "checkpointed": True},
    "replicas, two batches a step": {"wrap": split_experts, "cut": UNEQUAL, "batches": 2},
    "replicas, shared expert": {"wrap": split_experts, "cut": UNEQUAL, "shared_expert": True},
    "two by two": {"wrap": two_by_two, "cut": UNEQUAL},
    "two by two, frozen": {"wrap": two_by_two, "cut": EQUAL, "frozen": True},
    "two by two, two batches a step": {"wrap": two_by_two, "cut": EQUAL, "batches": 2},
    "fully_shard": {"wrap": split_experts_and_shards, "cut": UNEQUAL, "num_experts": 3},
    "fully_shard, frozen": {"wrap": split_experts_and_shards, "cut": EQUAL, "frozen": True},
    "fully_shard, checkpointed": {"wrap": split_experts_and_shards, "cut": UNEQUAL, "checkpointed": True},
    "fully_shard, two batches a step": {"wrap": split_experts_and_shards, "cut": EQUAL, "batches": 2},
}


def bfloat16_shards(model):
    return shards(fully_shard_routers(model), mp_policy=MixedPrecisionPolicy(torch.bfloat16, torch.float32))


def bfloat16_split_experts(model):
    policy = MixedPrecisionPolicy(torch.bfloat16, torch.float32)
    return split_experts_and_shards(fully_shard_routers(model), mp_policy=policy)


def states(rank):
    """The whole state dict of a model with split experts, and that of another one that was given it."""
    model = split_experts(make(seed=7, num_experts=5)).module
    state = get_model_state_dict(model, options=StateDictOptions(full_state_dict=True, cpu_offload=True))
    other = split_experts(make(seed=8, num_experts=5)).module
    given = dict(state)  # which it fills with parts
    set_model_state_dict(
        other, given, options=StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=True)
    )
    return {"whole": state, "again": {name: full(p) for name, p in other.named_parameters()}}


def first_process_decides(rank):
    model = shard_experts(make(seed=rank))
    return {name: full(p) for name, p in expert_parameters(model).items()}


def norms(rank):
    """Norm and clipped gradients."""
    model = two_by_two(make())
    ranks.loss_of(model, model.module, *ranks.batch(0, slice(3 * rank, 3 * rank + 3))).backward()
    norm = clip_grad_norm_(model.parameters(), 0.5)
    return {"norm": norm, "gradients": {n: full(p.grad) for n, p in model.module.named_parameters()}}


def message(function, *arguments, **options):
    try:
        function(*arguments, **options)
    except (ValueError, RuntimeError, NotImplementedError) as error:
        return str(error)


class Outer(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, *x):
        return self.model(*x)


def replaced():
    layer = shard_experts(MoEMLP(8, 12, 4))
    layer.load_state_dict(MoEMLP(8, 12, 4).state_dict(), assign=True)
    layer(torch.zeros(2, 8))


def refusals():
    sharded = shard_experts(make())
    blocks = make()
    fully_shard(blocks.images.blocks[0].mlp)
    return {
        "twice": message(shard_experts, sharded),
        "no mixture": message(shard_experts, nn.Linear(2, 2)),
        "after fully_shard": message(shard_experts, blocks),
        "mesh": message(shard_experts, make(), init_device_mesh("cpu", (2, 1, 2))),
        "dense": message(sharded.images.blocks[0].mlp.to_dense, 0),
        "dense after fully_shard": message(blocks.images.blocks[0].mlp.to_dense, 0),
        "packed": message(pack, sharded.eval()),
        "replaced": message(replaced),
        "width": message(sharded.images.blocks[0].mlp, torch.zeros(3, 5)),
    }


def mixed(rank):
    """Rows and experts in bfloat16 by autocast or param_dtype, weights in float32."""
    found = {}
    for name in ("autocast", "param_dtype"):
        torch.manual_seed(1)
        layer = shard_experts(MoEMLP(6, 10, 4), param_dtype=torch.bfloat16 if name == "param_dtype" else None)
        x = drawn(5, 6, seed=rank).float().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16, enabled=name == "autocast"):
            y = layer(x)
        y.float().sum().backward()
        found[name] = {"y": y.detach(), "dx": x.grad, "w1": full(layer.experts.w1.grad)}
    return found


def process(rank, folder):
    return {
        "layers": {name: layer_case(rank, **options) for name, options in LAYERS.items()},
        "dropout": with_dropout(rank, dropout=0.4, output_dropout=0.2),
        "same rows": same_rows(rank),
        "trained": {name: train_part(rank, **options) for name, options in TRAININGS.items()},
        "bfloat16": [
            train_part(rank, wrap, UNEQUAL, dtype=torch.float32) for wrap in (bfloat16_shards, bfloat16_split_experts)
        ],
        "states": states(rank),
        "first": first_process_decides(rank),
        "norms": norms(rank),
        "refused": refusals(),
        "outer": message(lambda: DistributedDataParallel(Outer(shard_experts(make())))(*ranks.batch(0, slice(3)))),
        "mixed": mixed(rank),
    }


@pytest.fixture(scope="module")
def four_processes(tmp_path_factory):
    return start(process, W, tmp_path_factory.mktemp("ranks"))


# --- One layer --------------------------------------------------------------------------------------------------------


def tolerance(options):
    return {"bfloat16": 2e-2, "float32": 1e-5}.get(options.get("dtype"), 1e-12)


@pytest.mark.parametrize("case", LAYERS)
def test_a_layer_with_split_experts_is_the_layer_of_one_process(four_processes, case):
    """Outputs and gradients of the rows at home; gradients of the experts are means over the processes."""
    options = LAYERS[case]
    alone, parts = layer_case(None, **options), [rank["layers"][case] for rank in four_processes]
    near = tolerance(options)

    def assert_close(found, expected):
        size = 1 if expected.numel() == 0 else max(float(expected.abs().max()), 1e-3)
        torch.testing.assert_close(found, expected, rtol=0, atol=near * size)

    assert_close(torch.cat([part["y"] for part in parts]), alone["y"])
    if alone["dx"] is None:
        assert all(part["dx"] is None for part in parts)
    else:
        assert_close(torch.cat([part["dx"] for part in parts]), alone["dx"])
    for i, expected in enumerate(alone["router"]):
        assert_close(sum(part["router"][i] for part in parts), expected)
    for name, expected in alone["experts"].items():
        for part in parts:
            found = part["experts"][name]
            assert (found is None) == (expected is None)
            if expected is not None:
                assert_close(found * W, expected)


def test_dropout_masks_repeat_and_their_backward_is_that_of_the_forward(four_processes):
    for rank in four_processes:
        (y, sums), (y_again, _) = rank["dropout"]["first"], rank["dropout"]["again"]
        assert torch.equal(y, y_again)
        assert not torch.allclose(y, rank["dropout"]["other"]) and not torch.allclose(y, rank["dropout"]["evaluated"])
        torch.testing.assert_close(sums[0], sums[1], rtol=1e-12, atol=0)


def test_owners_drop_different_units_of_the_same_rows(four_processes):
    """Each row meets every owner; with the masks of one owner for all, its rows would repeat."""
    first, *others = (rank["same rows"] for rank in four_processes)
    assert not any(torch.allclose(first, other) for other in others)


@pytest.mark.parametrize("how", ["autocast", "param_dtype"])
def test_rows_and_experts_are_taken_in_bfloat16_and_gradients_in_float32(four_processes, how):
    torch.manual_seed(1)
    layer = MoEMLP(6, 10, 4)
    x = torch.cat([drawn(5, 6, seed=rank).float() for rank in range(W)]).requires_grad_()
    y = layer(x)
    y.sum().backward()
    parts = [rank["mixed"][how] for rank in four_processes]
    assert parts[0]["y"].dtype == (torch.bfloat16 if how == "autocast" else torch.float32)
    found = torch.cat([part["y"] for part in parts]).float()
    assert not torch.allclose(found, y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found, y.detach(), rtol=0, atol=2e-2 * float(y.detach().abs().max()))
    torch.testing.assert_close(torch.cat([p["dx"] for p in parts]), x.grad, rtol=0, atol=3e-2)
    assert parts[0]["w1"].dtype == torch.float32
    torch.testing.assert_close(parts[0]["w1"] * W, layer.experts.w1.grad, rtol=0, atol=0.2)


# --- Models -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", TRAININGS)
def test_a_model_trains_as_one_process(four_processes, case):
    alone = train_alone(**TRAININGS[case])
    for rank in four_processes:
        assert_same_training(rank["trained"][case], alone)


def test_blocks_that_compute_in_bfloat16_train_nearly_as_one_process_in_float32(four_processes):
    """Their weights stay float32."""
    alone, before = train(slice(None), dtype=torch.float32), make().state_dict()
    for rank in four_processes:
        for found in rank["bfloat16"]:
            torch.testing.assert_close(found["losses"], alone["losses"], rtol=5e-2, atol=0)
            moved, error = 0.0, 0.0
            for name, weight in found["weights"].items():
                assert weight.dtype == torch.float32
                moved += float((alone["weights"][name] - before[name]).square().sum())
                error += float((weight - alone["weights"][name]).square().sum())
            assert 1e-10 < error / moved < 0.04  # a fifth of the way, in the norm


def test_a_model_of_one_process_loads_the_whole_state_and_back(four_processes):
    model = make(seed=7, num_experts=5)
    expected = {name: p.detach() for name, p in model.named_parameters()}
    model = make(seed=9, num_experts=5)
    model.load_state_dict(four_processes[0]["states"]["whole"])
    torch.testing.assert_close(dict(model.state_dict()), expected, rtol=0, atol=0)
    for rank in four_processes:
        torch.testing.assert_close(rank["states"]["again"], expected, rtol=0, atol=0)


def test_experts_are_those_of_the_first_process(four_processes):
    expected = {name: p.detach() for name, p in make(seed=0).named_parameters() if ".experts." in name}
    for rank in four_processes:
        torch.testing.assert_close(rank["first"], expected, rtol=0, atol=0)


def test_the_norm_counts_split_gradients_once_and_clips_all(four_processes):
    model = make()
    ranks.loss_of(model, model, *ranks.batch(0, slice(None))).backward()
    norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 0.5)
    assert norm > 0.5
    expected = {name: p.grad for name, p in model.named_parameters()}
    for rank in four_processes:
        torch.testing.assert_close(rank["norms"]["norm"], norm, rtol=1e-12, atol=0)
        torch.testing.assert_close(rank["norms"]["gradients"], expected, rtol=1e-10, atol=1e-13)


@pytest.mark.parametrize(
    ("case", "words"),
    {
        "twice": "are split already",
        "no mixture": "model must have MoEMLP layers, Linear has none",
        "after fully_shard": "call it before fully_shard",
        "mesh": "must have one or two dimensions and all 4 processes, got (2, 1, 2)",
        "replaced": "load weights with torch.distributed.checkpoint.state_dict.set_model_state_dict",
        "dense": "load the full state dict into a whole model first",
        "dense after fully_shard": "experts are split over processes",
        "packed": "pack: experts are split over processes",
        "width": "x must be [..., 8], got [3, 5]",
    }.items(),
)
def test_what_cannot_be_served_is_refused(four_processes, case, words):
    for rank in four_processes:
        assert words in rank["refused"][case]


def test_data_parallel_of_a_module_around_the_split_one_does_not_average_its_experts(four_processes):
    """DistributedDataParallel refuses DTensors that it was not told to leave alone."""
    assert all("DTensor" in rank["outer"] for rank in four_processes)


def test_split_experts_need_processes():
    with pytest.raises(RuntimeError, match="init_process_group first"):
        shard_experts(make())
