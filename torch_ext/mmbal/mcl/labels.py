"""Labels of all stages, accumulated, as a file.

Shapes: m pairs with features, S stages.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

import numpy as np
import torch

from mmbal.mcl.accumulation import accumulate_labels, merge_small_clusters
from mmbal.mcl.clustering import cluster_stage, stage_seed
from mmbal.mcl.features import Features, read_tensors, write_tensors

TENSORS = ("labels", "index", "stage_labels", "accumulated", "cluster_ids", "cluster_sizes")


@dataclass(frozen=True)
class Stage:
    """How the labels of a stage came about."""

    clusters: int  # of images and of texts: clusters^2 labels
    seed: int
    algorithm: str
    model: str  # fingerprint of the weights that the features come from
    image_inertia: float
    text_inertia: float


@dataclass(frozen=True)
class ClusterLabels:
    """Joint labels of the stages so far.

    index : int64 [m], ascending, the row of each pair in the data set of ``rows`` pairs.
    stage_labels : int64 [S, m], text cluster * clusters + image cluster of each stage.
    min_size : clusters below it are put together with their siblings, see :func:`merge_small_clusters`; 0: as they are.
    """

    rows: int
    pairs: str
    index: np.ndarray
    stage_labels: np.ndarray
    stages: tuple[Stage, ...]
    min_size: int = 0

    @property
    def radices(self) -> list[int]:
        return [stage.clusters**2 for stage in self.stages]

    def accumulated(self, stages: int | None = None) -> np.ndarray:
        """int64 [m]: mixed-radix ids over the first ``stages``; None: over all."""
        return accumulate_labels(self.stage_labels[:stages], self.radices[:stages])

    def final(self) -> np.ndarray:
        """int64 [m]: the ids that batches are drawn by."""
        if self.min_size:
            return merge_small_clusters(self.stage_labels, self.radices, self.min_size)
        return self.accumulated()

    @property
    def labels(self) -> np.ndarray:
        """int64 [rows]: the final id of each pair of the data set; -1 where it has no features."""
        labels = np.full(self.rows, -1, dtype=np.int64)
        labels[self.index] = self.final()
        return labels

    def save(self, path: str | os.PathLike) -> None:
        """What other programs may want is written too: accumulated ids, and ids and sizes of the final clusters."""
        ids, sizes = np.unique(self.final(), return_counts=True)
        arrays = (self.labels, self.index, self.stage_labels, self.accumulated(), ids, sizes)
        description = {
            "rows": self.rows,
            "pairs": self.pairs,
            "min_size": self.min_size,
            "stages": [asdict(stage) for stage in self.stages],
            "non_empty": [len(np.unique(self.accumulated(s + 1))) for s in range(len(self.stages))],
        }
        tensors = {name: torch.from_numpy(np.array(a)) for name, a in zip(TENSORS, arrays, strict=True)}
        write_tensors(Path(path), "labels", tensors, description)

    @classmethod
    def load(cls, path: str | os.PathLike) -> ClusterLabels:
        tensors, description = read_tensors(Path(path), "labels", TENSORS)
        try:
            for name, value in tensors.items():
                if value.dtype != torch.int64:
                    raise ValueError(f"{name} must be int64, got {value.dtype}")
            stages = tuple(Stage(**stage) for stage in description["stages"])
            for stage in stages:
                for f in fields(stage):
                    wanted = {"int": int, "str": str, "float": float}[f.type]
                    if type(getattr(stage, f.name)) is not wanted:
                        raise ValueError(f"{f.name} of a stage must be {f.type}, got {getattr(stage, f.name)!r}")
            rows, min_size = description["rows"], description["min_size"]
            if type(rows) is not int or type(min_size) is not int or min_size < 0:
                raise ValueError("rows and min_size must be integers of at least 0")
            if not isinstance(description["pairs"], str):
                raise ValueError("pairs must be a string")
            index, stage_labels = tensors["index"].numpy(), tensors["stage_labels"].numpy()
            if index.ndim != 1 or not len(index) or (np.diff(index) <= 0).any() or index[0] < 0 or index[-1] >= rows:
                raise ValueError(f"index must be ascending rows below {rows}")
            if stage_labels.shape != (len(stages), len(index)):
                raise ValueError(f"stage_labels must be {[len(stages), len(index)]}, got {list(stage_labels.shape)}")
            if tensors["labels"].shape != (rows,):
                raise ValueError(f"labels must be [{rows}], got {list(tensors['labels'].shape)}")
            found = cls(rows, description["pairs"], index, stage_labels, stages, min_size)
            if not np.array_equal(tensors["labels"].numpy(), found.labels):
                raise ValueError("labels are not those of its stages")
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        return found


def load_labels(path: str | os.PathLike) -> np.ndarray:
    """int64 [pairs of the data set]: what :class:`ClusterBatchSampler` takes; -1 for pairs that were left out."""
    return ClusterLabels.load(path).labels


def cluster_stages(
    features: Sequence[Features],
    clusters: int = 3,
    seed: int = 0,
    previous: ClusterLabels | None = None,
    min_size: int = 0,
    **options,
) -> ClusterLabels:
    """Clusters of each model's features, accumulated (arXiv 2402.11816): a stage of MCL contrasts pairs only that all
    models before it put into one cluster.

    features : of each earlier model in order, the base first; all of the same pairs. None may be a shard.
    clusters, seed, options : see :func:`cluster_stage`; the random state is ``stage_seed(seed, stage)``.
    previous : labels of the stages before; those of ``features`` are appended.
    min_size : see :class:`ClusterLabels`. The global batch is a good value.
    """
    if not features:
        raise ValueError("cluster_stages: features of at least one model must be given")
    if min_size < 0:
        raise ValueError(f"cluster_stages: min_size must be at least 0, got {min_size}")
    last = len(features) + (len(previous.stages) if previous else 0)
    if seed < 0 or stage_seed(seed, last) >= 2**32:
        most = (2**32 - 1 - stage_seed(0, last)) // stage_seed(1, 0)
        raise ValueError(f"cluster_stages: seed must be from 0 to {most}, got {seed}")
    pairs, rows = features[0].source.pairs, features[0].source.rows
    index = features[0].index.numpy()
    if previous is not None:
        pairs, rows, index = previous.pairs, previous.rows, previous.index
    for given, feature in enumerate(features):
        name = f"features {given}"
        if feature.shard != (0, 1):
            raise ValueError(
                f"cluster_stages: {name} must be of all pairs, got shard {'/'.join(map(str, feature.shard))}"
            )
        if (feature.source.pairs, feature.source.rows) != (pairs, rows):
            raise ValueError(f"cluster_stages: {name} must be of the same pairs as the stages before, got others")
        if not np.array_equal(feature.index.numpy(), index):
            raise ValueError(f"cluster_stages: {name} must leave out the same pairs as the stages before, got others")
    stages = list(previous.stages) if previous else []
    labels = list(previous.stage_labels) if previous else []
    for feature in features:
        stage = len(stages) + 1
        if feature.source.model in [before.model for before in stages]:
            warnings.warn(
                f"cluster_stages: features of stage {stage} come from the same weights as those of an earlier one",
                stacklevel=2,
            )
        random_state = stage_seed(seed, stage)
        found = cluster_stage(feature.images, feature.texts, clusters, random_state, **options)
        stages.append(
            Stage(int(clusters), seed, found.algorithm, feature.source.model, found.image_inertia, found.text_inertia)
        )
        labels.append(found.labels)
    found = ClusterLabels(rows, pairs, index, np.stack(labels), tuple(stages))
    found.accumulated()  # refuses more combinations than an integer holds
    return replace(found, min_size=min_size)
