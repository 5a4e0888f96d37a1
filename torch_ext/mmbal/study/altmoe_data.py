"""What the study of Alt-MoE aligns: six views of 2,000 handwritten digits, and a seventh made of one of them; emoji and
their captions in four languages.

Shapes: N items of a split.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from .altmoe_towers import emoji_features
from .data import columns_by_modality, read_table


@dataclass(frozen=True)
class DataSet:
    """views: names and what they are. train, validation: items of these splits; the rest are for the test."""

    name: str
    title: str
    views: dict[str, str]
    train: int
    validation: int
    seventh: str | None = None  # a view more, for growth

    @property
    def directions(self) -> int:
        return len(self.views) * (len(self.views) - 1)


MFEAT = DataSet(
    "mfeat",
    "six views of handwritten digits",
    {
        "fou": "Fourier coefficients of the outline",
        "fac": "profile correlations",
        "kar": "Karhunen-Loeve coefficients",
        "pix": "pixels, 16 x 15",
        "zer": "Zernike moments",
        "mor": "morphological features",
    },
    train=1200,
    validation=300,
    seventh="spe",
)
EMOJI = DataSet(
    "emoji",
    "emoji and captions in four languages",
    {
        "image": "picture (EfficientNet-Lite0)",
        "en": "English name (all-MiniLM-L6-v2, as all captions)",
        "fr": "French name",
        "de": "German name",
        "es": "Spanish name",
    },
    train=1100,
    validation=300,
)
DATA_SETS = (MFEAT, EMOJI)


@dataclass
class Views:
    """float32 [N, columns] a view, standardised by the training digits; row i of all views is one picture."""

    train: dict[str, Tensor]
    validation: dict[str, Tensor]
    test: dict[str, Tensor]

    @property
    def dims(self) -> dict[str, int]:
        return {name: x.shape[1] for name, x in self.train.items()}

    def of(self, names) -> Views:
        """With some of the views alone."""
        return Views(*({n: split[n] for n in names} for split in (self.train, self.validation, self.test)))


def read_digits() -> dict[str, np.ndarray]:
    """All seven views of all digits; the seventh is the logarithm of the magnitudes of the spectrum of the pixels."""
    header, rows = read_table("mfeat")
    table = np.array([row[:-1] for row in rows], dtype=np.float64)
    groups = columns_by_modality(header[:-1], lambda column: column.partition("_")[0])
    inputs = {name: table[:, groups[name]] for name in MFEAT.views}
    spectrum = np.abs(np.fft.rfft2(inputs["pix"].reshape(-1, 16, 15)))
    return inputs | {MFEAT.seventh: np.log1p(spectrum).reshape(len(table), -1)}


def load(data_set: DataSet, seed: int, folder: Path) -> Views:
    """All views; the splits are drawn by seed. folder: where features of towers are kept."""
    if data_set is EMOJI:
        inputs = {name: x.double().numpy() for name, x in emoji_features(folder).items()}
    else:
        inputs = read_digits()
    order = np.random.default_rng([seed, 3]).permutation(len(next(iter(inputs.values()))))
    parts = np.split(order, [data_set.train, data_set.train + data_set.validation])
    splits: list[dict[str, Tensor]] = [{}, {}, {}]
    for name, columns in inputs.items():
        seen = columns[parts[0]]
        deviation = seen.std(0)
        columns = (columns - seen.mean(0)) / np.where(deviation > 1e-9, deviation, 1)
        for split, part in zip(splits, parts, strict=True):
            split[name] = torch.from_numpy(columns[part]).float()
    return Views(*splits)
