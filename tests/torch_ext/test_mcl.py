import warnings
from collections import Counter

import numpy as np
import pytest
import torch
from torch import nn

from mmbal.mcl import ClusterBatchSampler, accumulate_labels, ffn_parameters, merge_small_clusters


def test_labels_accumulate_in_mixed_radix():
    first, second = np.divmod(np.arange(81), 9)
    both = np.asarray(accumulate_labels([first, second], [9, 9]))
    assert both.tolist() == list(range(81))
    assert len(np.unique(np.asarray(accumulate_labels([first], [9])))) == 9
    third = np.tile(np.arange(9), 9)
    assert (
        np.asarray(accumulate_labels([first, second, third], [9, 9, 9])).tolist()
        == ((first * 9 + second) * 9 + third).tolist()
    )


def test_labels_with_different_radices():
    assert np.asarray(accumulate_labels([[1, 0, 2], [3, 1, 0]], [3, 4])).tolist() == [7, 1, 8]


def test_accumulated_labels_are_equal_only_where_all_stages_are():
    generator = np.random.default_rng(0)
    stages = [generator.integers(0, 3, 500) for _ in range(4)]
    ids = np.asarray(accumulate_labels(stages, [3] * 4))
    groups = {}
    for i, key in enumerate(zip(*stages, strict=True)):
        groups.setdefault(key, set()).add(ids[i])
    assert all(len(g) == 1 for g in groups.values())
    assert len(np.unique(ids)) == len(groups)


@pytest.mark.parametrize(
    ("labels", "radices", "named"),
    [
        ([[0, 1], [0, 1, 2]], [3, 3], "label|length|stage"),
        ([[0, 1]], [3, 3], "radi"),
        ([[0, 3]], [3], "label|radi"),
        ([[0, -1]], [3], "label|radi"),
        ([], [], "label"),
    ],
)
def test_labels_that_do_not_fit_are_refused(labels, radices, named):
    with pytest.raises(ValueError, match=f"(?i){named}"):
        accumulate_labels(labels, radices)


SIZES = (50, 23, 8, 17)


def clusters():
    labels = np.repeat([4, 0, 9, 2], SIZES)
    return np.random.default_rng(0).permutation(labels)


def batches(rank=0, world_size=1, epoch=0, batch_size=4, **options):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about clusters that fill no batch: has a test of its own
        sampler = ClusterBatchSampler(clusters(), batch_size, rank=rank, world_size=world_size, **options)
    sampler.set_epoch(epoch)
    found = [[int(i) for i in batch] for batch in sampler]
    assert len(sampler) == len(found)
    return found


@pytest.mark.parametrize("order", ["round_robin", "shuffled"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_every_batch_of_every_rank_comes_from_the_same_cluster_at_the_same_step(world_size, order):
    labels = clusters()
    ranks = [batches(r, world_size, order=order) for r in range(world_size)]
    assert len({len(b) for b in ranks}) == 1
    for step in zip(*ranks, strict=True):
        assert all(len(batch) == 4 for batch in step)
        assert len({labels[i] for batch in step for i in batch}) == 1


@pytest.mark.parametrize("order", ["round_robin", "shuffled"])
@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_ranks_are_disjoint_and_together_use_all_but_the_remainders(world_size, order):
    used = Counter(i for r in range(world_size) for batch in batches(r, world_size, order=order) for i in batch)
    assert set(used.values()) == {1}
    per_cluster = Counter(clusters()[list(used)])
    whole = 4 * world_size
    expected = {4: 50 // whole * whole, 0: 23 // whole * whole, 9: 8 // whole * whole, 2: 17 // whole * whole}
    assert per_cluster == {label: count for label, count in expected.items() if count}


def test_samples_that_are_never_used_are_announced():
    with pytest.warns(UserWarning, match="8 samples"):
        ClusterBatchSampler(clusters(), 12)


def test_the_length_is_known_before_the_first_epoch():
    assert len(ClusterBatchSampler(clusters(), 4)) == 12 + 5 + 2 + 4
    assert len(ClusterBatchSampler(clusters(), 4, rank=1, world_size=2)) == 6 + 2 + 1 + 2
    assert len(ClusterBatchSampler(torch.from_numpy(clusters()), 4)) == 23


@pytest.mark.parametrize("order", ["round_robin", "shuffled"])
def test_seed_and_epoch_alone_decide_the_batches(order):
    first = batches(seed=1, epoch=2, order=order)
    torch.manual_seed(1)
    np.random.seed(1)
    assert batches(seed=1, epoch=2, order=order) == first
    assert batches(seed=2, epoch=2, order=order) != first
    assert batches(seed=1, epoch=3, order=order) != first


def test_the_remainder_changes_from_epoch_to_epoch():
    used = {i for epoch in range(30) for batch in batches(epoch=epoch, batch_size=16) for i in batch}
    labels = clusters()
    assert {i for i in range(len(labels)) if labels[i] in (4, 0, 2)} == used


def test_round_robin_takes_turns_and_skips_what_is_exhausted():
    labels = clusters()
    turn = [int(labels[batch[0]]) for batch in batches(order="round_robin")]
    assert turn[:8] == [0, 2, 4, 9, 0, 2, 4, 9]
    assert turn[8:] == [0, 2, 4, 0, 2, 4, 0, 4, *[4] * 7]


def test_shuffled_mixes_the_clusters_in_proportion_to_their_size():
    labels = clusters()
    orders = [[int(labels[b[0]]) for b in batches(order="shuffled", epoch=e)] for e in range(200)]
    assert all(sorted(o) == sorted(orders[0]) for o in orders)
    last = Counter(o[-1] for o in orders)
    assert last[4] / 200 == pytest.approx(12 / 23, abs=0.15)
    assert last[9] > 0


def test_the_sampler_feeds_a_data_loader():
    data = torch.utils.data.TensorDataset(torch.from_numpy(clusters()))
    loader = torch.utils.data.DataLoader(data, batch_sampler=ClusterBatchSampler(clusters(), 4))
    assert len(loader) == 23
    assert all(len(x.unique()) == 1 and len(x) == 4 for (x,) in loader)


@pytest.mark.parametrize(
    ("options", "named"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"batch_size": 4, "rank": 2, "world_size": 2}, "rank"),
        ({"batch_size": 4, "rank": -1}, "rank"),
        ({"batch_size": 4, "world_size": 0}, "world_size"),
        ({"batch_size": 4, "order": "sorted"}, "order"),
    ],
)
def test_a_wrong_option_of_the_sampler_is_named(options, named):
    with pytest.raises(ValueError, match=named):
        ClusterBatchSampler(clusters(), **options)


def test_ffn_parameters_are_the_weights_of_the_mlps_of_both_towers(make_clip):
    model = make_clip(0)
    assert sorted(ffn_parameters(model)) == sorted(n for n, _ in model.named_parameters() if ".mlp." in n)


def test_ffn_parameters_are_found_by_block_and_not_by_a_name_that_holds_mlp():
    mlp = nn.Sequential(nn.Linear(3, 4), nn.GELU(), nn.Linear(4, 3))
    model = nn.ModuleDict({"mlp_norm": nn.LayerNorm(3), "block": nn.ModuleDict({"mlp": mlp})})
    expected = ["block.mlp.0.bias", "block.mlp.0.weight", "block.mlp.2.bias", "block.mlp.2.weight"]
    assert sorted(ffn_parameters(model)) == expected
    with pytest.raises(ValueError, match="mlp"):
        ffn_parameters(nn.ModuleDict({"mlp_norm": nn.LayerNorm(3)}))


def partition(ids):
    return {frozenset(np.flatnonzero(ids == i).tolist()) for i in np.unique(ids)}


def test_small_clusters_join_their_siblings_under_the_same_parent():
    first = np.array([0] * 20 + [1] * 20)
    second = np.array([0] * 12 + [1] * 5 + [2] * 3 + [0] * 10 + [1] * 10)
    merged = np.asarray(merge_small_clusters([first, second], [2, 3], 8))
    assert partition(merged) == {
        frozenset(range(12)),
        frozenset(range(12, 20)),  # 5 + 3 of parent 0
        frozenset(range(20, 30)),
        frozenset(range(30, 40)),
    }
    assert sorted(np.unique(merged)) == [0, 1, 2, 3]


def test_clusters_that_are_large_enough_stay_as_they_are():
    generator = np.random.default_rng(0)
    stages = [generator.integers(0, 3, 900) for _ in range(2)]
    accumulated = np.asarray(accumulate_labels(stages, [3, 3]))
    assert partition(np.asarray(merge_small_clusters(stages, [3, 3], 20))) == partition(accumulated)


@pytest.mark.parametrize("min_size", [1, 7, 30, 100, 400, 10_000])
def test_no_merged_cluster_is_too_small_and_none_of_the_samples_is_lost(min_size):
    generator = np.random.default_rng(1)
    stages = [np.minimum(generator.geometric(0.5, 500) - 1, 3) for _ in range(3)]
    merged = np.asarray(merge_small_clusters(stages, [4, 4, 4], min_size))
    sizes = np.bincount(merged)
    assert sizes.sum() == 500
    assert sizes.min() >= min(min_size, 500)
    exact = np.asarray(accumulate_labels(stages, [4, 4, 4]))
    assert all(len(np.unique(merged[exact == i])) == 1 for i in np.unique(exact))  # a cluster is never split


def test_merging_is_the_same_whatever_the_order_of_the_samples():
    generator = np.random.default_rng(2)
    stages = [np.minimum(generator.geometric(0.5, 300) - 1, 3) for _ in range(3)]
    order = generator.permutation(300)
    there = np.asarray(merge_small_clusters(stages, [4, 4, 4], 25))
    moved = np.asarray(merge_small_clusters([s[order] for s in stages], [4, 4, 4], 25))
    assert np.array_equal(moved, there[order])
