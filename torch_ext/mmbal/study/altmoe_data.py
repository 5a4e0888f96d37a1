"""Six views of each of 2,000 handwritten digits, and a seventh made of one of them: what the study of Alt-MoE aligns.

Shapes: N digits of a split.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from .data import columns_by_modality, read_table

VIEWS = {
    "fou": "Fourier coefficients of the outline",
    "fac": "profile correlations",
    "kar": "Karhunen-Loeve coefficients",
    "pix": "pixels, 16 x 15",
    "zer": "Zernike moments",
    "mor": "morphological features",
}
SEVENTH = "spe"  # magnitudes of the two-dimensional spectrum of the pixels
TRAIN, VALIDATION = 1200, 300  # digits; the rest are for the test


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


def load_views(seed: int) -> Views:
    """All seven views; the splits are drawn by seed."""
    header, rows = read_table("mfeat")
    table = np.array([row[:-1] for row in rows], dtype=np.float64)
    groups = columns_by_modality(header[:-1], lambda column: column.partition("_")[0])
    inputs = {name: table[:, groups[name]] for name in VIEWS}
    spectrum = np.abs(np.fft.rfft2(inputs["pix"].reshape(-1, 16, 15)))
    inputs[SEVENTH] = np.log1p(spectrum).reshape(len(table), -1)
    order = np.random.default_rng([seed, 3]).permutation(len(table))
    parts = np.split(order, [TRAIN, TRAIN + VALIDATION])
    splits: list[dict[str, Tensor]] = [{}, {}, {}]
    for name, columns in inputs.items():
        seen = columns[parts[0]]
        deviation = seen.std(0)
        columns = (columns - seen.mean(0)) / np.where(deviation > 1e-9, deviation, 1)
        for split, part in zip(splits, parts, strict=True):
            split[name] = torch.from_numpy(columns[part]).float()
    return Views(*splits)
