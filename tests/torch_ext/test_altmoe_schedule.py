"""DirectionSchedule and ResumableBatchSampler: what they give, and that they go on where they were."""

import json
from itertools import chain, islice

import numpy as np
import pytest
import torch

from mmbal import DirectionSchedule, ResumableBatchSampler

PAIRS = [("a", "b"), ("b", "a"), ("a", "c")]


def take(schedule, n):
    return list(islice(schedule, n))


@pytest.mark.parametrize("steps", [1, 3])
def test_a_cycle_gives_each_direction_its_steps_in_order(steps):
    expected = [PAIRS[i // steps % 3] for i in range(20)]
    assert take(DirectionSchedule.cycle(PAIRS, steps), 20) == expected


def test_weighted_draws_have_their_probabilities_and_last_their_steps():
    schedule = DirectionSchedule.weighted(PAIRS, {PAIRS[0]: 1, PAIRS[1]: 3, PAIRS[2]: 0}, steps=2)
    drawn = take(schedule, 4000)
    assert drawn[::2] == drawn[1::2]
    assert drawn.count(PAIRS[2]) == 0 and drawn.count(PAIRS[1]) / 4000 == pytest.approx(0.75, abs=0.03)
    assert schedule.probabilities == {PAIRS[0]: 0.25, PAIRS[1]: 0.75, PAIRS[2]: 0}
    assert take(DirectionSchedule.weighted(PAIRS, [1, 1, 1], seed=1), 30) != take(
        DirectionSchedule.weighted(PAIRS, [1, 1, 1], seed=2), 30
    )


def test_adaptive_probabilities_follow_what_is_missing_of_the_recalls():
    recalls = dict(zip(PAIRS, (0.9, 0.5, 0.6), strict=True))
    schedule = DirectionSchedule.adaptive(PAIRS)
    assert list(schedule.probabilities.values()) == pytest.approx([1 / 3] * 3)
    schedule.update(recalls)
    assert list(schedule.probabilities.values()) == pytest.approx([0.1, 0.5, 0.4])
    half = DirectionSchedule.adaptive(PAIRS, recalls, base=[1, 1, 2], step=0.5)
    assert list(half.probabilities.values()) == pytest.approx([0.175, 0.375, 0.45])
    done = DirectionSchedule.adaptive(PAIRS, dict.fromkeys(PAIRS, 1.0))
    assert list(done.probabilities.values()) == pytest.approx([1 / 3] * 3)


@pytest.mark.parametrize("recalls", [(0.0, 1.0, 1.0), (0.98, 0.5, 0.9), (1.0, 1.0, 0.2)])
def test_adaptive_probabilities_stay_within_their_bounds_and_sum_to_one(recalls):
    schedule = DirectionSchedule.adaptive(PAIRS, dict(zip(PAIRS, recalls, strict=True)), lo=0.2, hi=0.5)
    p = list(schedule.probabilities.values())
    assert sum(p) == pytest.approx(1, abs=1e-12) and min(p) >= 0.2 - 1e-9 and max(p) <= 0.5 + 1e-9
    order = sorted(range(3), key=lambda i: recalls[i])
    assert p[order[0]] >= p[order[1]] >= p[order[2]]


def test_adaptive_bounds_hold_from_the_start_and_the_base_may_be_an_array():
    p = DirectionSchedule.adaptive(PAIRS, base=np.array([8.0, 1.0, 1.0]), lo=0.2, hi=0.5).probabilities
    assert list(p.values()) == pytest.approx([0.5, 0.25, 0.25])


def test_update_takes_what_an_evaluation_gives():
    ones = dict(zip(PAIRS, (0.9, 0.5, 0.6), strict=True))
    found = {direction: {1: one, 5: 1 - one} for direction, one in ones.items()}
    for k, expected in ((None, [0.1, 0.5, 0.4]), (5, [0.45, 0.25, 0.3])):
        schedule = DirectionSchedule.adaptive(PAIRS)
        schedule.update(found, k)
        assert list(schedule.probabilities.values()) == pytest.approx(expected)


@pytest.mark.parametrize("kind", ["cycle", "weighted", "adaptive"])
@pytest.mark.parametrize("given", [0, 1, 7, 8])
def test_a_state_of_plain_numbers_goes_on_with_the_same_directions(kind, given):
    def make():
        if kind == "cycle":
            return DirectionSchedule.cycle(PAIRS, steps=3)
        return getattr(DirectionSchedule, kind)(PAIRS, *([[1, 2, 3]] if kind == "weighted" else []), steps=3, seed=5)

    schedule, other = make(), make()
    if kind == "adaptive":
        schedule.update(dict(zip(PAIRS, (0.1, 0.2, 0.9), strict=True)))
    take(schedule, given)
    other.load_state_dict(json.loads(json.dumps(schedule.state_dict())))
    assert take(other, 30) == take(schedule, 30)


def test_wrong_arguments_of_schedules_are_named():
    for make, message in {
        lambda: DirectionSchedule.cycle([]): "directions must be different, at least one",
        lambda: DirectionSchedule.cycle("ab"): "directions must be different, at least one",
        lambda: DirectionSchedule.cycle(["a", "a"]): "directions must be different, at least one",
        lambda: DirectionSchedule.cycle(PAIRS, steps=0): "steps must be an integer of at least 1, got 0",
        lambda: DirectionSchedule.weighted(
            PAIRS, [1, 2]
        ): r"probabilities must be 3 numbers of at least 0, got \[1, 2\]",
        lambda: DirectionSchedule.weighted(PAIRS, [1, 2, -1]): "probabilities must be 3 numbers of at least 0",
        lambda: DirectionSchedule.weighted(PAIRS, [0, 0, 0]): "probabilities must be 3 numbers of at least 0",
        lambda: DirectionSchedule.adaptive(PAIRS, lo=0.4): r"lo <= 1 / 3 <= hi must hold",
        lambda: DirectionSchedule.adaptive(PAIRS, step=0): r"step must be in \(0, 1\], got 0",
        lambda: DirectionSchedule.adaptive(PAIRS, dict.fromkeys(PAIRS, 2)): "recalls must be from 0 to 1",
        lambda: DirectionSchedule.cycle(PAIRS).update({}): "update is for adaptive schedules, this one is a cycle",
        lambda: DirectionSchedule("random", PAIRS, None, 1, 0, True): "kind must be one of cycle, weighted, adaptive",
        lambda: DirectionSchedule.cycle(PAIRS).load_state_dict(
            DirectionSchedule.cycle(PAIRS, steps=2).state_dict()
        ): "steps must be 1 as in this schedule, got 2",
        lambda: DirectionSchedule.adaptive(PAIRS).load_state_dict(
            DirectionSchedule.adaptive(PAIRS, lo=0.1).state_dict()
        ): "lo must be 0.0 as in this schedule, got 0.1",
        lambda: DirectionSchedule.adaptive(PAIRS).load_state_dict(
            DirectionSchedule.adaptive(PAIRS).state_dict() | {"probabilities": [0.5, 0.5]}
        ): r"probabilities must be 3 numbers of at least 0, got \[0.5, 0.5\]",
        lambda: DirectionSchedule.adaptive(PAIRS).load_state_dict(
            DirectionSchedule.adaptive(PAIRS).state_dict() | {"probabilities": [0.5, 0.5, 0.5]}
        ): "probabilities of a state must be 3 whose sum is 1",
        lambda: DirectionSchedule.cycle(PAIRS).load_state_dict(
            DirectionSchedule.cycle(PAIRS).state_dict() | {"drawn": 3}
        ): "drawn of a state must be a number in range, got 3",
        lambda: DirectionSchedule.cycle(PAIRS).load_state_dict([]): "the state must be a dict, got list",
        lambda: DirectionSchedule.weighted(PAIRS, [1, 1, 1], seed=-1): "seed must be an integer of at least 0, got -1",
        lambda: DirectionSchedule.adaptive(PAIRS).update({PAIRS[0]: 1.0}): "recalls must have every direction",
        lambda: DirectionSchedule.adaptive(PAIRS).update({d: {1: float("nan")} for d in PAIRS}): "from 0 to 1",
    }.items():
        with pytest.raises(ValueError, match=message):
            make()


# --- The sampler ------------------------------------------------------------------------------------------------------


def epoch_of(sampler):
    batches = []
    for batch in sampler:
        batches.append(batch)
        sampler.advance()
    return batches


def test_every_epoch_has_all_rows_once_in_another_order():
    sampler = ResumableBatchSampler(20, 5)
    epochs = [epoch_of(sampler) for _ in range(3)]
    assert all(sorted(chain(*batches)) == list(range(20)) for batches in epochs)
    assert epochs[0] != epochs[1] != epochs[2] and sampler.epoch == 3
    assert epoch_of(ResumableBatchSampler(20, 5, shuffle=False))[1] == [5, 6, 7, 8, 9]


def test_what_does_not_fill_a_batch_is_left_out_or_a_smaller_batch():
    assert [len(b) for b in epoch_of(ResumableBatchSampler(23, 5))] == [5] * 4
    assert [len(b) for b in epoch_of(ResumableBatchSampler(23, 5, drop_last=False))] == [5] * 4 + [3]
    ranks = [epoch_of(ResumableBatchSampler(23, 5, drop_last=False, rank=r, world_size=2)) for r in range(2)]
    assert [[len(b) for b in batches] for batches in ranks] == [[5, 5, 2], [5, 5, 1]]
    fewer = [epoch_of(ResumableBatchSampler(21, 5, drop_last=False, rank=r, world_size=2)) for r in range(2)]
    assert [[len(b) for b in batches] for batches in fewer] == [[5, 5], [5, 5]]


def test_ranks_share_a_permutation_without_overlap():
    ranks = [epoch_of(ResumableBatchSampler(24, 4, rank=r, world_size=3)) for r in range(3)]
    assert all(len(batches) == 2 for batches in ranks)
    assert sorted(chain(*chain(*ranks))) == list(range(24))


@pytest.mark.parametrize("workers", [0, 2])
def test_a_loader_that_runs_ahead_goes_on_from_what_was_used(workers):
    def loader_of(sampler):
        return torch.utils.data.DataLoader(range(20), batch_sampler=sampler, num_workers=workers)

    whole = ResumableBatchSampler(20, 2, seed=3)
    expected = [batch for _ in range(3) for batch in epoch_of(whole)]
    sampler, used = ResumableBatchSampler(20, 2, seed=3), []
    for batch in loader_of(sampler):
        used.append(batch.tolist())
        sampler.advance()
        if len(used) == 4:
            break
    other = ResumableBatchSampler(20, 2)
    other.load_state_dict(json.loads(json.dumps(sampler.state_dict())))
    for _ in range(3):
        for batch in loader_of(other):
            used.append(batch.tolist())
            other.advance()
    assert used == expected


def test_a_sampler_that_nobody_advances_says_so():
    sampler = ResumableBatchSampler(20, 5)
    list(sampler)
    with pytest.raises(RuntimeError, match=r"advance\(\) must be called for each batch"):
        list(sampler)


def test_wrong_arguments_of_samplers_are_named():
    for arguments, message in {
        (0, 5): "num_samples must be an integer of at least 1, got 0",
        (20, 0): "batch_size must be an integer of at least 1, got 0",
        (4, 5): "num_samples must fill a batch of 5 on 1 ranks, got 4",
    }.items():
        with pytest.raises(ValueError, match=message):
            ResumableBatchSampler(*arguments)
    with pytest.raises(ValueError, match="rank must be from 0 to 1, got 2"):
        ResumableBatchSampler(20, 5, rank=2, world_size=2)
    with pytest.raises(ValueError, match="seed must be an integer of at least 0, got -1"):
        ResumableBatchSampler(20, 5, seed=-1)
    with pytest.raises(ValueError, match="batch_size must be 5 as here, got 4"):
        ResumableBatchSampler(20, 5).load_state_dict(ResumableBatchSampler(20, 4).state_dict())
