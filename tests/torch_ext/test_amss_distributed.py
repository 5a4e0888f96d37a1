"""AMSS in two gloo processes: replicas (DDP) and shards (FSDP2) against one process with all rows.

Each case is a function of the rank, run in both processes; rank None is the one process.
"""

import os
import warnings
from contextlib import nullcontext
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torch.nn.parallel import DistributedDataParallel

from mmbal import AMSS, UnitSpec

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

NAMES, STEPS, ROWS, C = ("audio", "video"), 3, 8, 3
HIDDEN = {"audio": 7, "video": 1}  # rows of each rank: 4 and 3, 1 and 0


class Encoder(nn.Module):
    def __init__(self, hidden):
        super().__init__()
        self.first, self.second = nn.Linear(5, hidden), nn.Linear(hidden, 6)

    def forward(self, x):
        return self.second(self.first(x).tanh()).tanh()


class Model(nn.Module):
    """Features of each modality, and a linear head on their concatenation."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(3)
        self.encoders = nn.ModuleDict({name: Encoder(HIDDEN[name]) for name in NAMES})
        self.head = nn.Linear(12, C)

    def forward(self, x):
        z = {name: self.encoders[name](x[name]) for name in NAMES}
        out = self.head(torch.cat(list(z.values()), 1))
        logits = {name: z[name][:, :C] for name in NAMES}  # any will do: they only say how much to mask
        return out, {name: (logits[name], z[name]) for name in NAMES}


def batch(step):
    """Audio says more about the labels than video, and the first half of the rows more than the second."""
    generator = torch.Generator().manual_seed(step)
    x = {name: torch.randn(ROWS, 5, generator=generator) for name in NAMES}
    x["video"][ROWS // 2 :] *= 4
    return x, x["audio"].argmax(1) % C


def rows_of(rank):
    return slice(None) if rank is None else slice(rank * ROWS // 2, (rank + 1) * ROWS // 2)


def losses(model, amss, step, rank, micro_batches=1):
    """Of the micro-batches of this rank; their mean over ranks and micro-batches is that of the whole batch."""
    x, y = batch(step)
    x, y = {name: v[rows_of(rank)] for name, v in x.items()}, y[rows_of(rank)]
    for rows in torch.arange(len(y)).chunk(micro_batches):
        out, outputs = model({name: v[rows] for name, v in x.items()})
        amss.observe(outputs, y[rows])
        yield F.cross_entropy(out, y[rows]) / micro_batches


def full(tensor):
    tensor = tensor.detach()
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()


def seen(parameters, gradients, amss):
    return {"parameters": parameters, "gradients": gradients, "rho": amss.rho, "skipped": amss.skipped}


def train(rank, wrap=None, make=AMSS, micro_batches=1, optimizer="sgd", poison=False, hook=False, **options):
    """Steps of a wrapped model; the parameters after the last, and after each the masked gradients."""
    model = Model()
    run = wrap(model) if wrap else model
    amss = make(model, **options)
    optimizer = (
        torch.optim.Adam(model.parameters(), lr=0.05)
        if optimizer == "adam"
        else torch.optim.SGD(model.parameters(), lr=0.3)
    )
    attached = amss.attach(optimizer, step=hook) if hook or amss.where == "update" else None
    gradients = []
    for step in range(STEPS):
        pieces = losses(run, amss, step, rank, micro_batches)
        for piece in range(micro_batches):
            last = piece == micro_batches - 1
            with run.no_sync() if isinstance(run, DistributedDataParallel) and not last else nullcontext():
                next(pieces).backward()
        if poison and step == 1 and (rank != 0 or wrap is ddp):  # of shards: in one rank alone
            local = model.encoders["audio"].first.weight.grad
            (local.to_local() if hasattr(local, "to_local") else local)[-1, 0] = torch.inf
        if not hook:
            amss.step()
        gradients.append({name: full(p.grad) for name, p in model.named_parameters()})
        if not (poison and step == 1):
            optimizer.step()
        optimizer.zero_grad()
    if attached:
        attached.remove()
    return seen({name: full(p) for name, p in model.named_parameters()}, gradients, amss)


def of_encoders(model, **options):
    return AMSS(dict(model.encoders), seed=5, **options)


def with_head(model, **options):
    return AMSS.from_concat_head(dict(model.encoders), model.head, seed=5, **options)


def from_head(rank, wrap=None, **options):
    """observe(y=y): the logits come from the head."""
    model = Model()
    run, amss, rhos = wrap(model) if wrap else model, with_head(model, **options), []
    for step in range(STEPS):
        x, y = batch(step)
        out, _ = run({name: v[rows_of(rank)] for name, v in x.items()})
        F.cross_entropy(out, y[rows_of(rank)]).backward()
        amss.step(y=y[rows_of(rank)])
        rhos.append(amss.rho)
        model.zero_grad()
    return rhos


def ddp(model):
    return DistributedDataParallel(model)


def sharded(model):
    from torch.distributed.fsdp import fully_shard

    for encoder in model.encoders.values():
        fully_shard(encoder)
    return fully_shard(model)


def refusal(rank, unit):
    model = sharded(Model())
    weight = model.encoders["audio"].first.weight
    units = {weight: {"heads": UnitSpec.heads(7), "columns": UnitSpec.slices(1)}[unit]} if unit != "element" else unit
    amss = AMSS(dict(model.encoders), unit=units)
    for loss in losses(model, amss, 0, rank):
        loss.backward()
    try:
        amss.step()
    except NotImplementedError as error:
        return str(error)


def made_too_early(rank):
    model = Model()
    amss = of_encoders(model)
    run = sharded(model)
    for loss in losses(run, amss, 0, rank):
        loss.backward()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        amss.step()
        amss.step()
    return [str(warning.message) for warning in caught]


def cut_along(rank, dim):
    """DTensor gradients that distribute_tensor made."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Shard, distribute_tensor

    mesh = init_device_mesh("cpu", (2,))
    torch.manual_seed(0)
    weight, gradient = torch.randn(4, 6), torch.randn(4, 6)
    parameter = nn.Parameter(distribute_tensor(weight, mesh, [Shard(dim)]))
    parameter.grad = distribute_tensor(gradient, mesh, [Shard(dim)])
    amss = AMSS({"audio": [parameter], "video": []}, rho={"audio": 0.5, "video": 0.5})
    try:
        amss.step()
    except NotImplementedError as error:
        return str(error)
    return full(parameter.grad)


REPLICAS = {
    "amss": {},
    "plus": {"plus": True},
    "element": {"unit": "element", "plus": True},
    "ema": {"ema": 0.5},
    "accumulated": {"micro_batches": 2},
    "accumulated, hook": {"micro_batches": 2, "hook": True},
    "update": {"where": "update", "plus": True, "optimizer": "adam"},
    "own significance": {
        "significance": lambda outputs, y: torch.stack([z.std() for _, z in outputs.values()]),
        "tau": 1,
    },
}
SHARDS = {
    "amss": {},
    "plus": {"plus": True},
    "gn_wn": {"importance": "gn_wn"},
    "ema": {"ema": 0.5, "plus": True},
    "update": {"where": "update", "plus": True, "optimizer": "adam"},
    "accumulated": {"micro_batches": 2},
}


def process(rank, folder):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    alone = [dist.new_group([r]) for r in range(2)][rank]
    results = {
        "ddp": {name: train(rank, ddp, of_encoders, **options) for name, options in REPLICAS.items()},
        "own group": train(rank, ddp, of_encoders, process_group=alone),
        "ddp, poison": train(rank, ddp, of_encoders, poison=True),
        "ddp, head": from_head(rank, ddp),
        "fsdp": {name: train(rank, sharded, of_encoders, **options) for name, options in SHARDS.items()},
        "fsdp, poison": train(rank, sharded, of_encoders, poison=True),
        "fsdp, head": from_head(rank, sharded),
        "refused": {unit: refusal(rank, unit) for unit in ("heads", "columns", "element")},
        "too early": made_too_early(rank),
        "cut": [cut_along(rank, dim) for dim in (0, 1)],
    }
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What both ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def assert_same(a, b):
    """Bit for bit; containers of tensors."""
    torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)


def kept(result):
    """Which elements of the encoders' weights have a gradient after each step."""
    return [
        {name: g != 0 for name, g in gradients.items() if name.startswith("encoders") and name.endswith("weight")}
        for gradients in result["gradients"]
    ]


def assert_trained_alike(found, alone, masks=True):
    """Gradients are sums in another order: to rounding. What is kept of them: exactly."""
    assert found["rho"] == pytest.approx(alone["rho"], abs=1e-5) and found["skipped"] == alone["skipped"]
    torch.testing.assert_close(found["parameters"], alone["parameters"], rtol=1e-4, atol=1e-5)
    assert_same(kept(found), kept(alone))
    assert any(not mask.all() for step in kept(found) for mask in step.values()) == masks


# --- Replicas ---------------------------------------------------------------------------------------------------------


def test_the_batches_of_these_tests_say_different_things_to_the_ranks():
    first, second = (train(rank, None, of_encoders)["rho"] for rank in range(2))
    assert abs(first["audio"] - second["audio"]) > 0.02


@pytest.mark.parametrize("case", REPLICAS)
def test_replicas_with_different_batches_draw_the_same_masks_and_stay_the_same(two_processes, case):
    assert_same(*(rank["ddp"][case] for rank in two_processes))


@pytest.mark.parametrize("case", [name for name in REPLICAS if name != "own significance"])
def test_replicas_train_as_one_process_with_all_rows(two_processes, case):
    options = REPLICAS[case]
    alone = train(None, None, of_encoders, **options)
    assert_trained_alike(two_processes[0]["ddp"][case], alone, masks="where" not in options and not options.get("hook"))


def test_the_first_ratios_are_those_of_one_process_with_all_rows(two_processes):
    """Of the same parameters: the statistics are sums in float64."""
    alone = from_head(None)
    for rank in two_processes:
        assert rank["ddp, head"] == [pytest.approx(rho, abs=1e-7) for rho in alone]


def test_rates_of_ones_own_are_averaged_over_the_ranks(two_processes):
    first, second = (train(rank, None, of_encoders, **REPLICAS["own significance"])["rho"] for rank in range(2))
    assert first != second
    assert two_processes[0]["ddp"]["own significance"]["rho"] == two_processes[1]["ddp"]["own significance"]["rho"]


def test_a_process_group_limits_whose_statistics_count(two_processes):
    first, second = (rank["own group"] for rank in two_processes)
    assert first["rho"] != second["rho"]


def test_accumulated_gradients_without_sync_equal_those_of_the_whole_batch(two_processes):
    whole, pieces = (two_processes[0]["ddp"][case] for case in ("amss", "accumulated"))
    assert_trained_alike(pieces, whole)


@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_a_gradient_that_is_not_finite_leaves_all_ranks_without_masks(two_processes, kind):
    alone = train(None, None, of_encoders, poison=True)
    first, second = (rank[f"{kind}, poison"] for rank in two_processes)
    assert_same(first, second)
    assert first["skipped"] == alone["skipped"] == 1
    assert_trained_alike(first, alone)
    for step, gradients in enumerate(kept(first)):
        assert all(mask.any(1).all() for mask in gradients.values()) == (step == 1)


# --- Shards -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", SHARDS)
def test_shards_train_as_replicas_do(two_processes, case):
    """The rows of the first layers are 7 and 1, so the second rank has fewer, or none."""
    options = SHARDS[case]
    assert_same(*(rank["fsdp"][case] for rank in two_processes))
    found, alone = two_processes[0]["fsdp"][case], train(None, None, of_encoders, **options)
    assert_trained_alike(found, alone, masks="where" not in options)
    if case in REPLICAS and REPLICAS[case] == options:
        assert_same(kept(found), kept(two_processes[0]["ddp"][case]))


def test_a_sharded_head_gives_the_ratios_of_a_whole_one(two_processes):
    alone = from_head(None)
    for rank in two_processes:
        assert rank["fsdp, head"] == [pytest.approx(rho, abs=1e-7) for rho in alone]


@pytest.mark.parametrize("unit", ["heads", "columns", "element"])
def test_units_that_shards_cut_are_refused(two_processes, unit):
    for rank in two_processes:
        assert "is not served for a gradient whose dimension 0 is sharded" in rank["refused"][unit]


def test_rows_of_a_distributed_tensor_are_masked_as_those_of_a_whole_one_and_columns_refused(two_processes):
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(4, 6))
    parameter.grad = torch.randn(4, 6)
    AMSS({"audio": [parameter], "video": []}, rho={"audio": 0.5, "video": 0.5}).step()
    assert (parameter.grad == 0).all(1).sum() == 2
    for rank in two_processes:
        rows, columns = rank["cut"]
        assert_same(rows, parameter.grad)
        assert "must be cut once, in dimension 0, as fully_shard does" in columns


def test_amss_of_parameters_that_fully_shard_replaced_warns_once(two_processes):
    for rank in two_processes:
        assert [w for w in rank["too early"] if "AMSS" in w] == [
            "AMSS: no managed parameter has a gradient: were they replaced since?"
        ]
