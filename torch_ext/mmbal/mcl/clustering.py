"""The clusters of one stage: two k-means, of images and of texts, and one label for both.

Shapes: n pairs, P width of the features.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from torch import Tensor

FEW_ROWS = 100_000  # up to here k-means over all rows at once takes seconds
LENGTH_TOLERANCE = 0.01  # of unit vectors kept in float16 or bfloat16

# n_init of the k-means over all rows: what the demo uses; max_iter and tol: scikit-learn's own.
KMEANS = {"n_init": 3, "max_iter": 300, "tol": 1e-4}
# The published clustering of a million pairs (arXiv 2409.19291), which is one of all rows in effect; "auto" is 1.
MINI_BATCH = {"batch_size": 1_000_000, "n_init": "auto", "max_iter": 500, "tol": 1e-5}


class StageClusters(NamedTuple):
    """labels = texts * clusters + images."""

    labels: np.ndarray  # int64 [n], 0 to clusters^2 - 1
    images: np.ndarray  # int64 [n], 0 to clusters - 1
    texts: np.ndarray  # int64 [n]
    clusters: int
    image_inertia: float  # sums of squared distances to the centres
    text_inertia: float
    algorithm: str  # "kmeans" or "minibatch"


def stage_seed(seed: int, stage: int) -> int:
    """The random state of the k-means of a stage, counted from 1; the same whether earlier stages run along or not."""
    return seed * 100 + stage


def _array(name: str, features) -> np.ndarray:
    if isinstance(features, Tensor):
        features = features.detach().cpu()
        features = (features if features.element_size() > 2 else features.float()).numpy()
    features = np.asarray(features)
    if features.ndim != 2 or features.dtype.kind != "f" or 0 in features.shape:
        raise ValueError(
            f"cluster_features: {name} must be floating-point [n, P], got {features.dtype} {list(features.shape)}"
        )
    features = features.astype(np.float32) if features.dtype == np.float16 else features
    finite = np.isfinite(features).all(1)
    if not finite.all():
        raise ValueError(f"cluster_features: {name} must be finite, row {np.argmin(finite)} is not")
    length = np.sqrt(np.einsum("ij,ij->i", features, features))
    if (wrong := np.abs(length - 1) > LENGTH_TOLERANCE).any():
        row = int(np.argmax(wrong))
        raise ValueError(
            f"cluster_features: {name} must have rows of length 1, got {length[row]:.4g} in row {row}: normalise them"
        )
    return features


def _kmeans(features: np.ndarray, clusters: int, seed: int, algorithm: str, options: dict) -> tuple[np.ndarray, float]:
    from sklearn.cluster import KMeans, MiniBatchKMeans
    from threadpoolctl import threadpool_limits

    make = KMeans if algorithm == "kmeans" else MiniBatchKMeans
    found = make(clusters, random_state=seed, **options)
    with threadpool_limits(1):  # sums of threads come in any order: the labels would not depend on the seed alone
        labels = found.fit_predict(features)
    return labels.astype(np.int64), float(found.inertia_)


def cluster_stage(
    images,
    texts,
    clusters: int = 3,
    seed: int = 0,
    algorithm: str = "auto",
    n_init: int | None = None,
    max_iter: int | None = None,
    tol: float | None = None,
    batch_size: int | None = None,
) -> StageClusters:
    """Plain k-means of image features and of text features, each alone, and the joint label of a pair, as published
    for CLIP-MoE (arXiv 2409.19291, 5.3: 3 clusters each, so 9 labels). Depends on features and seed alone, not on the
    number of threads.

    Parameters
    ----------
    images, texts : [n, P] unit vectors, arrays or tensors of float16, bfloat16 (tensors), float32 or float64. n must
        be at least ``clusters``.
    clusters : k of each k-means.
    seed : random state of both.
    algorithm : "kmeans" (scikit-learn's KMeans), "minibatch" (MiniBatchKMeans), or "auto", which is kmeans up to
        100,000 pairs.
    n_init, max_iter, tol : of the k-means; None: 3, 300, 1e-4 of kmeans, and the published "auto" (1), 500, 1e-5 of
        minibatch.
    batch_size : of minibatch; None: the published 1,000,000.
    """
    if not isinstance(clusters, (int, np.integer)) or clusters < 1:
        raise ValueError(f"cluster_features: clusters must be an integer of at least 1, got {clusters!r}")
    if algorithm not in ("auto", "kmeans", "minibatch"):
        raise ValueError(f"cluster_features: algorithm must be auto, kmeans or minibatch, got {algorithm!r}")
    for name, value in (("n_init", n_init), ("max_iter", max_iter), ("batch_size", batch_size)):
        if value is not None and value < 1:
            raise ValueError(f"cluster_features: {name} must be at least 1, got {value}")
    if tol is not None and not tol >= 0:
        raise ValueError(f"cluster_features: tol must be at least 0, got {tol}")
    if not 0 <= seed < 2**32:
        raise ValueError(f"cluster_features: seed must be from 0 to 2^32 - 1, got {seed}")
    n = len(texts)
    if len(images) != n:
        raise ValueError(f"cluster_features: images and texts must have as many rows, got {len(images)} and {n}")
    if n < clusters:
        raise ValueError(f"cluster_features: clusters must be at most the {n} pairs, got {clusters}")
    if algorithm == "auto":
        algorithm = "kmeans" if n <= FEW_ROWS else "minibatch"
    if algorithm == "kmeans" and batch_size is not None:
        raise ValueError("cluster_features: batch_size is of algorithm minibatch, not of kmeans")
    given = {"n_init": n_init, "max_iter": max_iter, "tol": tol, "batch_size": batch_size}
    options = (KMEANS if algorithm == "kmeans" else MINI_BATCH) | {k: v for k, v in given.items() if v is not None}
    # One after the other: a million rows in float32 are gigabytes.
    of_texts, text_inertia = _kmeans(_array("texts", texts), clusters, seed, algorithm, options)
    of_images, image_inertia = _kmeans(_array("images", images), clusters, seed, algorithm, options)
    return StageClusters(
        of_texts * clusters + of_images, of_images, of_texts, int(clusters), image_inertia, text_inertia, algorithm
    )


def cluster_features(images, texts, clusters: int = 3, seed: int = 0, **options) -> np.ndarray:
    """The joint labels [n] of :func:`cluster_stage`, text cluster * clusters + image cluster."""
    return cluster_stage(images, texts, clusters, seed, **options).labels
