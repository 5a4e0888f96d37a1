"""One label for the clusters of all stages."""

import math

import numpy as np


def _check_labels(stage_labels, radices):
    labels, radices = [np.asarray(stage, dtype=np.int64) for stage in stage_labels], list(radices)
    if not labels or len(labels) != len(radices):
        raise ValueError(f"labels and radices must be given for each stage, got {len(labels)} and {len(radices)}")
    if (combinations := math.prod(int(radix) for radix in radices)) > np.iinfo(np.int64).max:
        raise ValueError(f"radices must have a product below 2^63, got {combinations}")
    for s, (stage, radix) in enumerate(zip(labels, radices, strict=True)):
        if stage.ndim != 1 or len(stage) != len(labels[0]):
            raise ValueError(f"labels of stage {s} must be [n] = [{len(labels[0])}], got {list(stage.shape)}")
        if len(stage) and not 0 <= stage.min() <= stage.max() < radix:
            raise ValueError(f"labels of stage {s} must be from 0 to {radix - 1}, got {stage.min()} to {stage.max()}")
    return labels


def accumulate_labels(stage_labels, radices) -> np.ndarray:
    """One id for the clusters of all stages: id <- id * radix + label, stage by stage (mixed radix).

    stage_labels : S arrays [n] of integers; radices : S numbers of clusters, 9 each for 3 clusters of images and 3 of
    texts. Returns [n] int64 in [0, prod(radices)), which must fit in 63 bits.
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
