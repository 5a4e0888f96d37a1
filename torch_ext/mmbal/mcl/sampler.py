"""Batches that each come from one cluster."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator, Mapping

import numpy as np
import torch.distributed as dist
from torch.utils.data import Sampler

from mmbal.altmoe.state import require


def _default_rank() -> tuple[int, int]:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def _members(labels: np.ndarray) -> list[np.ndarray]:
    """The samples of each cluster in ascending order, cluster after cluster; those with a negative label in none."""
    order = np.argsort(labels, kind="stable")
    order = order[np.searchsorted(labels[order], 0) :]
    cuts = np.flatnonzero(np.diff(labels[order])) + 1
    return np.split(order, cuts) if len(order) else []


class ClusterBatchSampler(Sampler):
    """Batches of indices, each from one cluster only: MCL (arXiv 2402.11816, eq. 1) constrains the sampler and not the
    loss.

        sampler = mmbal.mcl.ClusterBatchSampler(mmbal.mcl.load_labels("labels.safetensors"), 100)
        loader = torch.utils.data.DataLoader(data, batch_sampler=sampler)
        for epoch in range(sampler.epoch, epochs):
            sampler.set_epoch(epoch)
            for batch in loader:
                train(batch)
                sampler.advance()  # only for runs that are stopped and go on

    Every rank sees the same cluster at the same step, and a slice of it that no other rank sees: the permutation
    depends on (seed, epoch, cluster) alone. So the batch that features are gathered over is of one cluster, and what
    all ranks see of a step is what one process would with ``batch_size * world_size``. What does not fill a batch on
    every rank is left out of this epoch; :func:`merge_small_clusters` saves clusters that never would.

    The sampler shards by itself, and nothing may shard it again:

    - Lightning: ``Trainer(use_distributed_sampler=False)`` (with True Lightning raises an error where it would shard),
      and make the loader in ``train_dataloader``, where the process group is there. Lightning calls ``set_epoch``.
    - accelerate: either do not pass the loader to ``prepare``, or make the sampler for one process, with the global
      batch, ``ClusterBatchSampler(labels, batch_size * W, rank=0, world_size=1)``, and pass
      ``DataLoaderConfiguration(split_batches=True, dispatch_batches=False)`` to the ``Accelerator``, which then cuts
      each batch into W parts. Without split_batches it would deal whole batches of different clusters to the ranks.
      Call ``set_epoch`` of the prepared loader.

    A run that goes on: ``state_dict`` holds the epoch and how many of its batches were used up, which :meth:`advance`
    counts, not iterating, as a loader's workers run ahead. Iterating gives the rest of the epoch at that position. The
    number of ranks may have changed, as long as ``batch_size * world_size`` is the same. Without ``advance``
    every iteration is a whole epoch.

    Parameters
    ----------
    labels : [n] integers, the cluster of each sample; samples with a negative label are left out.
    batch_size : samples for each rank and step.
    rank, world_size : of this process; as torch.distributed says where it is initialised, else 0 and 1.
    seed : of the permutations and of the order; a state that is loaded brings its own.
    order : "round_robin" over the clusters (as published: late in an epoch only large clusters are left), or
        "shuffled" in proportion to their sizes.
    """

    def __init__(self, labels, batch_size, rank=None, world_size=None, seed=0, order="shuffled"):
        self._asked = (rank, world_size)
        found_rank, found_size = _default_rank()
        rank, world_size = found_rank if rank is None else rank, found_size if world_size is None else world_size
        if batch_size < 1:
            raise ValueError(f"ClusterBatchSampler: batch_size must be at least 1, got {batch_size}")
        if world_size < 1:
            raise ValueError(f"ClusterBatchSampler: world_size must be at least 1, got {world_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"ClusterBatchSampler: rank must be from 0 to {world_size - 1}, got {rank}")
        if order not in ("round_robin", "shuffled"):
            raise ValueError(f"ClusterBatchSampler: order must be round_robin or shuffled, got {order!r}")
        if not isinstance(seed, (int, np.integer)) or seed < 0:
            raise ValueError(f"ClusterBatchSampler: seed must be an integer of at least 0, got {seed!r}")
        labels = np.asarray(labels)
        if labels.ndim != 1 or not np.issubdtype(labels.dtype, np.integer):
            raise ValueError(
                f"ClusterBatchSampler: labels must be integers [n], got {labels.dtype} {list(labels.shape)}"
            )
        labels = labels.astype(np.int64)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed, self.order, self.epoch, self.position = int(seed), order, 0, 0
        self.labels = hashlib.sha256(labels.tobytes()).hexdigest()[:16]  # which these are
        self.clusters = _members(labels)
        self.batches = [len(members) // (batch_size * world_size) for members in self.clusters]
        lost = sum(len(m) for m, count in zip(self.clusters, self.batches, strict=True) if count == 0)
        if lost:
            warnings.warn(
                f"ClusterBatchSampler: {lost} samples are in clusters smaller than {batch_size * world_size} and never"
                " used; see merge_small_clusters",
                stacklevel=2,
            )

    @property
    def sampler(self) -> ClusterBatchSampler:
        """Lightning and accelerate look for ``set_epoch`` at ``batch_sampler.sampler``."""
        return self

    def set_epoch(self, epoch: int) -> None:
        """The epoch to iterate over; from its first batch, unless it is the present one."""
        if epoch != self.epoch:
            self.epoch, self.position = epoch, 0

    def advance(self) -> None:
        """A batch is used up; after the last one the next epoch begins."""
        self.position += 1
        if self.position >= len(self):
            self.epoch, self.position = self.epoch + 1, 0

    def __len__(self) -> int:
        """Batches of an epoch."""
        return sum(self.batches)

    def _check_ranks(self) -> None:
        rank, world_size = _default_rank()
        for name, asked, mine, now in zip(
            ("rank", "world_size"), self._asked, (self.rank, self.world_size), (rank, world_size), strict=True
        ):
            if asked is None and mine != now:
                raise RuntimeError(
                    f"ClusterBatchSampler: {name} was {mine} when the sampler was made and is {now} now: make it after "
                    "torch.distributed is initialised, or pass rank and world_size"
                )

    def __iter__(self) -> Iterator[list[int]]:
        self._check_ranks()
        turns = [(turn, c) for c, count in enumerate(self.batches) for turn in range(count)]
        if self.order == "round_robin":
            turns.sort()
        else:
            np.random.default_rng([self.seed, self.epoch, 0]).shuffle(turns)
        shuffled = [
            np.random.default_rng([self.seed, self.epoch, 1, c]).permutation(members)
            for c, members in enumerate(self.clusters)
        ]
        step = self.batch_size * self.world_size
        for turn, c in turns[self.position :]:
            yield shuffled[c][turn * step : (turn + 1) * step][self.rank :: self.world_size].tolist()

    def state_dict(self) -> dict:
        """Plain numbers and strings; the same on every rank."""
        names = ("labels", "order", "seed", "epoch", "position")
        return {name: getattr(self, name) for name in names} | {"global_batch": self.batch_size * self.world_size}

    def load_state_dict(self, state: Mapping) -> None:
        """Epoch, position and seed of the state; labels, order and global batch must be as here."""
        mine = self.state_dict()
        require("ClusterBatchSampler", state, mine)
        for name in ("labels", "order", "global_batch"):
            if state[name] != mine[name]:
                raise ValueError(f"ClusterBatchSampler: {name} must be {mine[name]} as here, got {state[name]}")
        for name in ("seed", "epoch", "position"):
            if not isinstance(state[name], int) or state[name] < 0:
                raise ValueError(f"ClusterBatchSampler: {name} must be an integer of at least 0, got {state[name]!r}")
        if state["position"] and state["position"] >= len(self):
            raise ValueError(f"ClusterBatchSampler: position must be below {len(self)}, got {state['position']}")
        self.seed, self.epoch, self.position = state["seed"], state["epoch"], state["position"]
