"""Multistage contrastive learning (MCL, arXiv 2402.11816): batches whose pairs fell into one cluster in every earlier
stage. What told the clusters apart cannot lower the loss any more, so the model has to use something else."""

import warnings

import numpy as np
from torch import nn
from torch.utils.data import Sampler

from mmbal.dense import find_linears
from mmbal.moe import MoEMLP


def _check_labels(stage_labels, radices):
    labels = [np.asarray(stage, dtype=np.int64) for stage in stage_labels]
    if not labels or len(labels) != len(radices):
        raise ValueError(f"labels and radices must be given for each stage, got {len(labels)} and {len(radices)}")
    for s, (stage, radix) in enumerate(zip(labels, radices, strict=True)):
        if stage.ndim != 1 or len(stage) != len(labels[0]):
            raise ValueError(f"labels of stage {s} must be [n] = [{len(labels[0])}], got {list(stage.shape)}")
        if len(stage) and not 0 <= stage.min() <= stage.max() < radix:
            raise ValueError(f"labels of stage {s} must be from 0 to {radix - 1}, got {stage.min()} to {stage.max()}")
    return labels


def accumulate_labels(stage_labels, radices) -> np.ndarray:
    """One id for the clusters of all stages: id <- id * radix + label, stage by stage (mixed radix).

    stage_labels : S arrays [n] of integers; radices : S numbers of clusters. Returns [n] int64 in [0, prod(radices)).
    """
    ids = 0
    for stage, radix in zip(_check_labels(stage_labels, radices), radices, strict=True):
        ids = ids * radix + stage
    return ids


def merge_small_clusters(stage_labels, radices, min_size) -> np.ndarray:
    """Accumulated clusters in which none is smaller than ``min_size``, unless all samples together are.

    Small clusters that share all but the last stage are put together under that parent; where that is still too
    small, under the parent's parent. What is left at the root joins the largest cluster. Returns [n] int64 ids 0, 1,
    2, ... without gaps.
    """
    labels = _check_labels(stage_labels, radices)
    final = np.full(len(labels[0]), -1, dtype=np.int64)
    open_samples = np.arange(len(labels[0]))
    next_id = 0
    for depth in range(len(labels), -1, -1):
        prefix = np.zeros(len(open_samples), dtype=np.int64)
        if depth:
            prefix = accumulate_labels(labels[:depth], radices[:depth])[open_samples]
        still_open = []
        for cluster in np.unique(prefix):
            members = open_samples[prefix == cluster]
            if len(members) >= min_size:
                final[members] = next_id
                next_id += 1
            else:
                still_open.append(members)
        open_samples = np.sort(np.concatenate(still_open)) if still_open else open_samples[:0]
    if len(open_samples):
        final[open_samples] = np.bincount(final[final >= 0]).argmax() if next_id else 0
    return final


class ClusterBatchSampler(Sampler):
    """Batches of indices, each from one cluster only: MCL (arXiv 2402.11816, eq. 1) constrains the sampler and not the
    loss.

    Every rank sees the same cluster at the same step, and a slice of it that no other rank sees: the permutation
    depends on (seed, epoch, cluster) alone. What does not fill a batch on every rank is left out of this epoch.

    Parameters
    ----------
    labels : [n] integers, the cluster of each sample.
    batch_size : samples for each rank and step.
    rank, world_size : of this process.
    seed : of the permutations and of the order.
    order : "round_robin" over the clusters, or "shuffled" in proportion to their sizes.
    """

    def __init__(self, labels, batch_size, rank=0, world_size=1, seed=0, order="shuffled"):
        if batch_size < 1:
            raise ValueError(f"ClusterBatchSampler: batch_size must be at least 1, got {batch_size}")
        if world_size < 1:
            raise ValueError(f"ClusterBatchSampler: world_size must be at least 1, got {world_size}")
        if not 0 <= rank < world_size:
            raise ValueError(f"ClusterBatchSampler: rank must be from 0 to {world_size - 1}, got {rank}")
        if order not in ("round_robin", "shuffled"):
            raise ValueError(f"ClusterBatchSampler: order must be round_robin or shuffled, got {order!r}")
        labels = np.asarray(labels)
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        self.seed, self.order, self.epoch = seed, order, 0
        self.clusters = [np.flatnonzero(labels == cluster) for cluster in np.unique(labels)]
        self.batches = [len(members) // (batch_size * world_size) for members in self.clusters]
        lost = sum(len(m) for m, count in zip(self.clusters, self.batches, strict=True) if count == 0)
        if lost:
            warnings.warn(
                f"ClusterBatchSampler: {lost} samples are in clusters smaller than {batch_size * world_size} and never"
                " used; see merge_small_clusters",
                stacklevel=2,
            )

    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch

    def __len__(self):
        return sum(self.batches)

    def __iter__(self):
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
        for turn, c in turns:
            yield shuffled[c][turn * step : (turn + 1) * step][self.rank :: self.world_size].tolist()


def ffn_parameters(model: nn.Module) -> list[str]:
    """Names of the parameters that MCL trains: the two Linears of every sub-module called ``mlp``."""
    names = []
    for name, module in model.named_modules():
        if name.rpartition(".")[2] == "mlp" and not isinstance(module, MoEMLP):
            names += [f"{name}.{linear}.{p}" for linear, m in find_linears(module) for p, _ in m.named_parameters()]
    if not names:
        raise ValueError(f"ffn_parameters: model must have mlp blocks, {type(model).__name__} has none")
    return names
