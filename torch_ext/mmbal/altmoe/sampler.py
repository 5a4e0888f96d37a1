"""Batches of row numbers that a stopped run goes on with."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import numpy as np
from torch.utils.data import Sampler

from mmbal.altmoe.state import require


class ResumableBatchSampler(Sampler):
    """Batches of row numbers, shuffled anew in each epoch, from a position that can be saved.

        sampler = mmbal.ResumableBatchSampler(len(data), 128)
        loader = torch.utils.data.DataLoader(data, batch_sampler=sampler)

    ``batches`` is how many were used up. It is moved by :meth:`advance`, once a batch has been trained on, which
    :class:`mmbal.AlternatingTrainer` does; not by iterating, as a loader's workers run ahead. Iterating gives the rest
    of the epoch at that position. Permutations depend on (seed, epoch) alone.

    A loader draws a number from torch's default generator whenever iterating begins, which a run that goes on in the
    middle of an epoch does once more. A trainer that was loaded there puts the random numbers right at the first batch
    that is asked for here. Between epochs, a loader with persistent workers needs a ``generator`` of its own for that.

    Parameters
    ----------
    num_samples, batch_size : rows, and rows of a batch of each rank.
    shuffle : False: rows in their order.
    drop_last : leaves out what does not fill a batch on every rank. False: the last batch is smaller, on some ranks by
        one row more, without the last rows where there are fewer than ranks.
    rank, world_size : of this process. seed : of the permutations; a state that is loaded brings its own.
    """

    def __init__(self, num_samples, batch_size, shuffle=True, drop_last=True, rank=0, world_size=1, seed=0):
        for name, value in (("num_samples", num_samples), ("batch_size", batch_size), ("world_size", world_size)):
            if not isinstance(value, int) or value < 1:
                raise ValueError(f"ResumableBatchSampler: {name} must be an integer of at least 1, got {value!r}")
        if not 0 <= rank < world_size:
            raise ValueError(f"ResumableBatchSampler: rank must be from 0 to {world_size - 1}, got {rank}")
        if not isinstance(seed, int) or seed < 0:
            raise ValueError(f"ResumableBatchSampler: seed must be an integer of at least 0, got {seed!r}")
        self.num_samples, self.batch_size, self.shuffle, self.drop_last = num_samples, batch_size, shuffle, drop_last
        self.rank, self.world_size, self.seed, self.batches = rank, world_size, seed, 0
        whole, rest = divmod(num_samples, batch_size * world_size)
        self._length = whole if drop_last else whole + (rest >= world_size)
        if self._length == 0:
            raise ValueError(
                f"ResumableBatchSampler: num_samples must fill a batch of {batch_size} on {world_size} ranks, "
                f"got {num_samples}"
            )
        self._used_up: int | None = None  # the position of an iteration that went to its end
        self._at_next: Callable[[], None] | None = None

    def __len__(self) -> int:
        """Batches of an epoch."""
        return self._length

    @property
    def epoch(self) -> int:
        return self.batches // self._length

    def advance(self) -> None:
        """A batch is used up."""
        self.batches += 1

    def __iter__(self) -> Iterator[list[int]]:
        at_next, self._at_next = self._at_next, None
        if at_next is not None:
            at_next()
        start = self.batches
        if self._used_up == start:
            raise RuntimeError("ResumableBatchSampler: advance() must be called for each batch that was used")
        epoch, position = divmod(start, self._length)
        rows = np.arange(self.num_samples)
        if self.shuffle:
            rows = np.random.default_rng([self.seed, epoch]).permutation(self.num_samples)
        step = self.batch_size * self.world_size
        for turn in range(position, self._length):
            yield rows[turn * step : (turn + 1) * step][self.rank :: self.world_size].tolist()
        self._used_up = start

    def at_next_batch(self, call: Callable[[], None]) -> None:
        """Calls ``call()`` once, when the first batch of the next iteration is asked for: a loader has begun then."""
        self._at_next = call

    def state_dict(self) -> dict:
        names = ("num_samples", "batch_size", "shuffle", "drop_last", "world_size", "seed", "batches")
        return {name: getattr(self, name) for name in names}

    def check_state(self, state: Mapping) -> None:
        """What :meth:`load_state_dict` refuses; changes nothing."""
        mine = self.state_dict()
        require("ResumableBatchSampler", state, mine)
        for name, value in mine.items():
            if name not in ("batches", "seed") and state[name] != value:
                raise ValueError(f"ResumableBatchSampler: {name} must be {value} as here, got {state[name]}")
        for name in ("batches", "seed"):
            if not isinstance(state[name], int) or state[name] < 0:
                raise ValueError(f"ResumableBatchSampler: {name} must be an integer of at least 0, got {state[name]!r}")

    def load_state_dict(self, state: Mapping) -> None:
        """Position and seed of the state; the rest must be as here."""
        self.check_state(state)
        self.batches, self.seed, self._used_up, self._at_next = state["batches"], state["seed"], None, None
