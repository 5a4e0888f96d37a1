"""ClusterBatchSampler on several ranks, in a run that goes on, and inside Lightning and accelerate."""

import itertools
import json
import os
import warnings
from collections import Counter
from datetime import timedelta

import numpy as np
import pytest
import torch
import torch.distributed as dist
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import DataLoader, TensorDataset

from mmbal.mcl import ClusterBatchSampler

B, SIZES = 3, (31, 14, 7, 2)


def labels():
    return np.random.default_rng(0).permutation(np.repeat([5, 0, 2, 9], SIZES))


def sampler(*arguments, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of clusters that fill no batch
        return ClusterBatchSampler(*(arguments or (labels(), B)), **options)


def epochs_of(sampler, count=3):
    epochs = []
    for epoch in range(count):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    return epochs


# --- ranks


def process(rank, folder):
    torch.set_num_threads(1)
    os.environ["GLOO_SOCKET_IFNAME"] = "lo"
    before = sampler()
    store = dist.FileStore(os.path.join(folder, "store"), 2)
    dist.init_process_group("gloo", store=store, rank=rank, world_size=2, timeout=timedelta(seconds=60))
    mine = sampler()
    data = TensorDataset(torch.arange(len(labels())))
    loader = DataLoader(data, batch_sampler=mine)
    epochs = []
    for epoch in range(3):
        mine.set_epoch(epoch)
        steps = []
        for (rows,) in loader:
            both = [torch.empty_like(rows) for _ in range(2)]
            dist.all_gather(both, rows)
            steps.append([part.tolist() for part in both])
        epochs.append(steps)
    try:
        next(iter(before))
        early = "drew"
    except RuntimeError as error:
        early = str(error)
    asked = list(sampler(rank=0, world_size=1))
    torch.save({"epochs": epochs, "rank": mine.rank, "early": early, "asked": asked}, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def two_processes(tmp_path_factory):
    if not dist.is_available():
        pytest.skip("torch without distributed")
    folder = tmp_path_factory.mktemp("ranks")
    torch.multiprocessing.spawn(process, (str(folder),), nprocs=2)
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(2)]


def test_rank_and_world_size_come_from_the_process_group(two_processes):
    assert [found["rank"] for found in two_processes] == [0, 1]
    assert two_processes[0]["epochs"] == two_processes[1]["epochs"]  # both gathered the same


def test_every_gathered_batch_is_of_one_cluster_and_no_index_comes_twice(two_processes):
    own = labels()
    for epoch in two_processes[0]["epochs"]:
        assert all(len(part) == B for step in epoch for part in step)
        assert all(len({own[i] for part in step for i in part}) == 1 for step in epoch)
        assert set(Counter(i for step in epoch for part in step for i in part).values()) == {1}


def test_two_ranks_see_together_what_one_process_with_the_global_batch_sees(two_processes):
    alone = epochs_of(sampler(labels(), 2 * B))
    together = [[sorted(itertools.chain(*step)) for step in epoch] for epoch in two_processes[0]["epochs"]]
    assert together == [[sorted(batch) for batch in epoch] for epoch in alone]


def test_a_sampler_made_before_the_process_group_says_so(two_processes):
    assert "world_size was 1 when the sampler was made and is 2 now" in two_processes[0]["early"]
    assert "rank was 0 when the sampler was made and is 1 now" in two_processes[1]["early"]


def test_a_rank_that_is_given_counts(two_processes):
    assert two_processes[1]["asked"] == list(sampler(rank=0, world_size=1))


@settings(max_examples=50, deadline=None)
@given(
    st.lists(st.integers(-1, 4), min_size=1, max_size=60),
    st.integers(1, 4),
    st.integers(1, 4),
    st.sampled_from(["shuffled", "round_robin"]),
    st.integers(0, 3),
)
def test_any_clusters_on_any_number_of_ranks(own, batch, world_size, order, epoch):
    ranks = [sampler(own, batch, rank=rank, world_size=world_size, order=order) for rank in range(world_size)]
    for rank in ranks:
        rank.set_epoch(epoch)
    steps = list(zip(*ranks, strict=True))
    drawn = [i for step in steps for part in step for i in part]
    assert len(drawn) == len(set(drawn))
    assert all(len({own[i] for part in step for i in part}) == 1 for step in steps)
    expected = Counter({c: n // (batch * world_size) for c, n in Counter(own).items() if c >= 0})
    assert Counter(own[step[0][0]] for step in steps) == +expected
    alone = sampler(own, batch * world_size, order=order)
    alone.set_epoch(epoch)
    assert [sorted(itertools.chain(*step)) for step in steps] == [sorted(b) for b in alone]


# --- going on


@pytest.mark.parametrize("order", ["shuffled", "round_robin"])
@pytest.mark.parametrize("used", [0, 1, 7, 15, 16, 17, 40])
def test_a_run_that_goes_on_draws_what_the_whole_run_would(order, used):
    whole = list(itertools.chain(*epochs_of(sampler(order=order, seed=4), 4)))
    first = sampler(order=order, seed=4)
    assert len(first) == 16
    drawn = []
    while len(drawn) < used:
        for batch in first:
            drawn.append(batch)
            first.advance()
            if len(drawn) == used:
                break
    state = json.loads(json.dumps(first.state_dict()))
    again = sampler(order=order)
    again.load_state_dict(state)
    assert (again.epoch, again.position) == divmod(used, 16)
    for epoch in range(again.epoch, 4):
        again.set_epoch(epoch)
        for batch in again:
            drawn.append(batch)
            again.advance()
    assert drawn == whole


def test_workers_that_read_ahead_do_not_move_the_position():
    mine = sampler()
    loader = DataLoader(TensorDataset(torch.arange(len(labels()))), batch_sampler=mine, num_workers=1)
    batches = iter(loader)
    first = next(batches)[0].tolist()
    mine.advance()
    again = sampler()
    again.load_state_dict(mine.state_dict())
    del batches
    assert [first, *again] == list(sampler())


def test_a_run_may_go_on_with_another_number_of_ranks():
    two = [sampler(labels(), B, rank=rank, world_size=2) for rank in range(2)]
    for _ in range(3):
        for rank in two:
            rank.advance()
    assert two[0].state_dict() == two[1].state_dict()
    one = sampler(labels(), 2 * B)
    one.load_state_dict(two[1].state_dict())
    assert [sorted(batch) for batch in one] == [sorted(a + b) for a, b in zip(*two, strict=True)]
    assert len(list(one)) == len(one) - 3


def test_without_advance_every_iteration_is_the_whole_epoch():
    mine = sampler()
    assert list(mine) == list(mine) and len(list(mine)) == len(mine)


def test_another_epoch_begins_at_its_first_batch_and_the_present_one_goes_on():
    mine = sampler()
    mine.set_epoch(2)
    mine.advance()
    mine.set_epoch(2)
    assert len(list(mine)) == len(mine) - 1
    mine.set_epoch(3)
    assert len(list(mine)) == len(mine)


@pytest.mark.parametrize(
    ("change", "named"),
    [
        ({"labels": "0" * 16}, "labels must be"),
        ({"order": "round_robin"}, "order must be shuffled as here"),
        ({"global_batch": 6}, "global_batch must be 3 as here, got 6"),
        ({"epoch": -1}, "epoch must be an integer of at least 0"),
        ({"position": 2.5}, "position must be an integer"),
        ({"position": 16}, "position must be below 16"),
        ({"seed": None}, "seed must be an integer"),
    ],
)
def test_a_state_that_does_not_fit_changes_nothing(change, named):
    mine = sampler(seed=2)
    mine.advance()
    before = mine.state_dict()
    with pytest.raises(ValueError, match=f"ClusterBatchSampler: {named}"):
        mine.load_state_dict(sampler().state_dict() | change)
    for wrong in (None, {}):
        with pytest.raises(ValueError, match="the state must"):
            mine.load_state_dict(wrong)
    assert mine.state_dict() == before
    assert sampler(np.roll(labels(), 1), B).state_dict()["labels"] != before["labels"]


@pytest.mark.parametrize(
    ("own", "named"),
    [
        (np.zeros((4, 2), dtype=np.int64), r"labels must be integers \[n\]"),
        (np.array([0.0, np.nan]), "labels must be integers"),
        (["a", "b"], "labels must be integers"),
        ([], "labels must be integers"),
    ],
)
def test_labels_that_are_none_are_refused(own, named):
    with pytest.raises(ValueError, match=named):
        ClusterBatchSampler(own, 1)


# --- other people's loops


def test_accelerate_cuts_each_global_batch_into_the_ranks_parts():
    prepare = pytest.importorskip("accelerate.data_loader").prepare_data_loader
    data = TensorDataset(torch.arange(len(labels())))
    ranks = []
    for rank in range(2):
        mine = sampler(labels(), 2 * B, rank=0, world_size=1)
        loader = prepare(
            DataLoader(data, batch_sampler=mine),
            num_processes=2,
            process_index=rank,
            split_batches=True,
            dispatch_batches=False,
        )
        epochs = []
        for epoch in range(2):
            loader.set_epoch(epoch)
            epochs.append([rows.tolist() for (rows,) in loader])
        ranks.append(epochs)
    together = [[a + b for a, b in zip(*both, strict=True)] for both in zip(*ranks, strict=True)]
    assert together == epochs_of(sampler(labels(), 2 * B), 2)
    assert together[0] != together[1]


def test_lightning_draws_each_epochs_batches():
    pl = pytest.importorskip("lightning.pytorch")

    class Seen(pl.LightningModule):
        def __init__(self):
            super().__init__()
            self.weight, self.batches = torch.nn.Parameter(torch.zeros(())), []

        def training_step(self, batch, _):
            self.batches.append((self.current_epoch, batch[0].tolist()))
            return self.weight * 0.0

        def configure_optimizers(self):
            return torch.optim.SGD(self.parameters(), lr=0.1)

        def train_dataloader(self):
            return DataLoader(TensorDataset(torch.arange(len(labels()))), batch_sampler=sampler())

    model = Seen()
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    trainer = pl.Trainer(
        max_epochs=3, accelerator="cpu", use_distributed_sampler=False, enable_model_summary=False, **quiet
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer.fit(model)
    expected = [(epoch, batch) for epoch, batches in enumerate(epochs_of(sampler())) for batch in batches]
    assert model.batches == expected
