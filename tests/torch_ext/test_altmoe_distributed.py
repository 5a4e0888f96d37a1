"""Alt-MoE in two gloo processes against one process with all rows.

Each case is a function of the rank, run in both processes; rank None is the one process.
"""

import os
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist

from mmbal import (
    AlignLoss,
    AlternatingTrainer,
    ConnectorOut,
    DirectionSchedule,
    MoEConnector,
    ResumableBatchSampler,
    TargetOut,
    alternate,
)

pytestmark = pytest.mark.skipif(not dist.is_available(), reason="torch without distributed")

ROWS, STEPS, DIMS = 12, 6, {"a": 5, "b": 7, "c": 3}
CUTS = {"equal": 6, "unequal": 8, "none on the second": 12}


def rows_of(rank, cut):
    return slice(None) if rank is None else (slice(0, cut), slice(cut, ROWS))[rank]


def drawn(*shape, seed):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss_case(rank, cut, grouped=False, masked=False, **options):
    """Loss and gradients of the rows of this rank, as an average over the ranks makes them."""
    rows = rows_of(rank, cut)
    tensors = [drawn(ROWS, n, seed=i)[rows].clone().requires_grad_() for i, n in enumerate((5, 4, 5, 4))]
    ids = torch.arange(ROWS) // 3 if grouped else None
    valid = drawn(ROWS, seed=9) > -0.5 if masked else None
    if masked and rank == 1:  # one rank says nothing of its rows: all count
        valid = None
    elif masked:
        valid = (valid | (torch.arange(ROWS) >= cut))[rows]
    out, target = ConnectorOut(*tensors[:2], (), valid), TargetOut(*tensors[2:])
    found = AlignLoss(negatives="gathered", **options)(out, target, None if ids is None else ids[rows])
    gradients = torch.autograd.grad(found.loss, tensors)
    return {"loss": [t.detach() for t in found], "gradients": [g.clone() for g in gradients]}


LOSSES = {
    f"{cut}, {name}": {"cut": CUTS[cut], **options}
    for cut in CUTS
    for name, options in {
        "plain": {},
        "one way, mse": {"symmetric": False, "regression": "mse"},
        "groups": {"grouped": True},
        "masks": {"masked": True},
    }.items()
}


def train(rank, negatives="gathered", state="shared", cut=6, accumulate=1, empty=False, options=()):
    torch.manual_seed(0)
    connector = MoEConnector(DIMS, hidden=8, num_experts=4, top_k=2, dropout=0.0, **dict(options))
    schedule = DirectionSchedule.weighted(
        connector.directions, [1, 2, 1, 2, 1, 2], seed=3 if rank is None else 3 + rank
    )
    optimizer = torch.optim.SGD(connector.parameters(), lr=0.3, momentum=0.9)
    trainer = AlternatingTrainer(
        connector, optimizer, schedule, loss=AlignLoss(tau=0.3, negatives=negatives), state=state, accumulate=accumulate
    )
    infos = []
    for step in range(STEPS):
        batch = {name: drawn(ROWS, dim, seed=10 * step + i).float() for i, (name, dim) in enumerate(DIMS.items())}
        there = torch.ones(ROWS, dtype=torch.bool)
        if empty and step == 2:
            there[6:] = False  # nothing left on the second rank
        rows = rows_of(rank, cut)
        given = {name: (x[rows], there[rows]) for name, x in batch.items()}
        info = trainer.step(given)
        infos.append((info.direction, None if info.loss is None else info.loss.item(), info.stepped))
    return {"parameters": {n: p.detach() for n, p in connector.named_parameters()}, "infos": infos}


TRAININGS = {
    "gathered": {},
    "local": {"negatives": "local"},
    "by direction": {"state": "per_direction"},
    "unequal": {"cut": 8},
    "windows": {"accumulate": 2},
    "v6": {"options": (("preset", "v6"),)},
}


def refusal(rank, **what):
    """Ranks that do not agree."""
    schedule = DirectionSchedule.weighted(list("abcdefgh"), [1] * 8, seed=rank, broadcast=what.get("broadcast", True))
    if what.get("ahead") and rank == 1:
        schedule.count = 1
    try:
        return [schedule.next() for _ in range(8)]
    except RuntimeError as error:
        return str(error)


def checkpoint(rank, folder):
    """Random numbers of each rank go on, with one file for both."""

    def make():
        torch.manual_seed(5)
        connector = MoEConnector(DIMS, hidden=8, num_experts=4, top_k=2, dropout=0.3)
        sampler = ResumableBatchSampler(24, 4, rank=rank, world_size=2)
        optimizer = torch.optim.AdamW(connector.parameters(), lr=0.01)
        schedule = DirectionSchedule.weighted(connector.directions, [1] * 6)
        torch.manual_seed(rank)
        loss = AlignLoss(negatives="gathered")
        return AlternatingTrainer(connector, optimizer, schedule, loss=loss, sampler=sampler), sampler

    data = {name: drawn(24, dim, seed=i).float() for i, (name, dim) in enumerate(DIMS.items())}

    def run(trainer, sampler, epochs):
        for _ in range(epochs):
            for rows in sampler:
                trainer.step({name: x[rows] for name, x in data.items()})

    whole, cut = make(), make()
    torch.manual_seed(rank)
    run(*cut, 2)
    cut[0].save(os.path.join(folder, "checkpoint.pt"))
    dist.barrier()
    torch.manual_seed(rank)
    run(*whole, 4)
    again = make()
    again[0].load(os.path.join(folder, "checkpoint.pt"))
    run(*again, 2)
    return [{n: p.detach() for n, p in t.connector.named_parameters()} for t, _ in (whole, again)]


class TwoHeads(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.trunk = torch.nn.Linear(3, 4)
        self.heads = torch.nn.ModuleDict({name: torch.nn.Linear(4, 1) for name in "ab"})

    def forward(self, x, name):
        return self.heads[name](self.trunk(x))


def data_parallel(rank):
    """alternate over a model in DistributedDataParallel, or without where rank is None."""
    torch.manual_seed(0)
    model = TwoHeads().double()
    wrapped = model
    if rank is not None:
        wrapped = torch.nn.parallel.DistributedDataParallel(model, find_unused_parameters=True)
    tasks = {name: lambda x, name=name: wrapped(x, name).square().mean() for name in "ab"}
    step = alternate(tasks, torch.optim.AdamW(model.parameters(), lr=0.1, weight_decay=0.5))
    still = []
    for i in range(STEPS):
        before = {name: [p.detach().clone() for p in head.parameters()] for name, head in model.heads.items()}
        task = step(drawn(ROWS, 3, seed=i)[rows_of(rank, 6)]).direction
        idle = "b" if task == "a" else "a"
        still.append(all(map(torch.equal, model.heads[idle].parameters(), before[idle])))
    return {"still": still, "parameters": {n: p.detach() for n, p in model.named_parameters()}}


def process(rank, folder):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    results = {
        "losses": {name: loss_case(rank, **options) for name, options in LOSSES.items()},
        "trained": {name: train(rank, **options) for name, options in TRAININGS.items()},
        "empty": train(rank, empty=True),
        "broadcast": refusal(rank),
        "apart": refusal(rank, broadcast=False),
        "ahead": refusal(rank, ahead=True),
        "checkpoint": checkpoint(rank, folder),
        "data parallel": data_parallel(rank),
    }
    torch.save(results, os.path.join(folder, f"{rank}.pt"))
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    """What both ranks found."""
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


@pytest.mark.parametrize("case", LOSSES)
def test_the_mean_of_gathered_losses_and_gradients_is_that_of_the_joined_batch(two_processes, case):
    alone, parts = loss_case(None, **LOSSES[case]), [rank["losses"][case] for rank in two_processes]
    for i, expected in enumerate(alone["loss"]):
        mean = (parts[0]["loss"][i] + parts[1]["loss"][i]) / 2
        torch.testing.assert_close(mean, expected, rtol=1e-12, atol=1e-14)
    for i, expected in enumerate(alone["gradients"]):
        joined = torch.cat([part["gradients"][i] for part in parts]) / 2
        torch.testing.assert_close(joined, expected, rtol=1e-10, atol=1e-14)


@pytest.mark.parametrize("case", TRAININGS)
def test_replicas_stay_bit_for_bit_the_same_and_draw_the_first_ranks_directions(two_processes, case):
    first, second = (rank["trained"][case] for rank in two_processes)
    torch.testing.assert_close(first["parameters"], second["parameters"], rtol=0, atol=0)
    assert [info[0] for info in first["infos"]] == [info[0] for info in second["infos"]]


@pytest.mark.parametrize("case", TRAININGS)
def test_replicas_with_gathered_negatives_train_as_one_process_with_the_joined_batch(two_processes, case):
    found, alone = two_processes[0]["trained"][case], train(None, **TRAININGS[case])
    assert [info[0] for info in found["infos"]] == [info[0] for info in alone["infos"]]
    near = all(
        torch.allclose(p, alone["parameters"][name], rtol=1e-3, atol=1e-5) for name, p in found["parameters"].items()
    )
    assert near == (case != "local")


def test_a_batch_without_rows_on_one_rank_skips_on_both(two_processes):
    for rank in two_processes:
        assert [info[1] is None for info in rank["empty"]["infos"]] == [i == 2 for i in range(STEPS)]
    first, second = (rank["empty"]["parameters"] for rank in two_processes)
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def test_ranks_that_draw_apart_or_are_at_different_steps_are_told_so(two_processes):
    first, second = two_processes
    assert first["broadcast"] == second["broadcast"] and len(set(first["broadcast"])) > 1
    for rank in two_processes:
        assert "ranks drew different directions" in rank["apart"]
        assert "ranks must be at the same step, got [0, 1]" in rank["ahead"]


def test_a_checkpoint_of_two_processes_goes_on_with_the_random_numbers_of_each(two_processes):
    for whole, again in (rank["checkpoint"] for rank in two_processes):
        torch.testing.assert_close(again, whole, rtol=0, atol=0)


def test_a_model_in_data_parallel_that_finds_unused_parameters_alternates(two_processes):
    first, second = (rank["data parallel"] for rank in two_processes)
    assert first["still"] == second["still"] == [True] * STEPS
    torch.testing.assert_close(first["parameters"], second["parameters"], rtol=0, atol=0)
    torch.testing.assert_close(first["parameters"], data_parallel(None)["parameters"], rtol=1e-9, atol=1e-12)
