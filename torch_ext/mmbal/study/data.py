"""Two tables of four modalities each, with and without missing modalities: the four settings of the study of BTW.

Shapes: N rows of a split, M modalities.
"""

from __future__ import annotations

import csv
import gzip
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

ASSETS = Path(__file__).parent / "assets"
MISSING = 0.3  # probability that a modality of a row is absent
TEAMS = ("Blackhawks", "Bulls", "Bears", "WhiteSox", "Cubs")
WEATHER = ("temp", "dew", "humidity", "pressure", "wind", "gust", "percip", "weather")
CHANNELS = ("ch_1", "ch_2", "ch_3", "ch_4")


@dataclass(frozen=True)
class Setting:
    """One of the four: a table, and whether modalities are missing."""

    name: str
    table: str
    missing: bool
    title: str


SETTINGS = (
    Setting("chicago", "chicago", False, "Chicago ridership"),
    Setting("chicago-missing", "chicago", True, "Chicago ridership, 30 % missing"),
    Setting("cells", "cells", False, "cell segmentation"),
    Setting("cells-missing", "cells", True, "cell segmentation, 30 % missing"),
)


def stack(inputs: Sequence[Tensor]) -> Tensor:
    """M inputs [B, columns] -> [M, B, widest], the narrower ones padded with zeros."""
    widest = max(values.shape[1] for values in inputs)
    return torch.stack([F.pad(values, (0, widest - values.shape[1])) for values in inputs])


@dataclass
class Split:
    """inputs float32 [N, columns] a modality, zero where absent; present bool [N, M]; target [N]."""

    inputs: dict[str, Tensor]
    present: Tensor
    target: Tensor

    @cached_property
    def stacked(self) -> Tensor:
        """The inputs as the fusion model of BTW takes them, [M, N, widest]."""
        return stack(list(self.inputs.values()))

    def __len__(self) -> int:
        return len(self.target)


@dataclass
class Data:
    """Three splits; a regression target is standardised: value = target * scale + offset."""

    task: str
    train: Split
    validation: Split
    test: Split
    offset: float = 0.0
    scale: float = 1.0

    @property
    def modalities(self) -> tuple[str, ...]:
        return tuple(self.train.inputs)

    @property
    def columns(self) -> list[int]:
        """Columns of each modality."""
        return [values.shape[1] for values in self.train.inputs.values()]

    @property
    def outputs(self) -> int:
        """Classes, or 1 of a regression."""
        return 1 if self.task == "regression" else int(self.train.target.max()) + 1


def read_table(name: str) -> tuple[list[str], list[list[str]]]:
    """Header and rows of a table of the package."""
    with gzip.open(ASSETS / f"{name}.csv.gz", "rt", encoding="utf-8", newline="") as file:
        header, *rows = csv.reader(file)
    return header, rows


def chicago_modality(column: str) -> str:
    """stations, weather or sport; the date is turned into the calendar elsewhere."""
    first, _, side = column.partition("_")
    if first in TEAMS and side in ("Home", "Away"):
        return "sport"
    return "weather" if first in WEATHER else "stations"


def cells_modality(column: str) -> str:
    """The microscope channel that the column's suffix names."""
    for channel in CHANNELS:
        if column.endswith(f"_{channel}"):
            return channel
    raise ValueError(f"column must end in one of {', '.join(CHANNELS)}, got {column!r}")


def columns_by_modality(names: list[str], modality_of) -> dict[str, list[int]]:
    """Positions of each modality's columns, modalities in the order of first use."""
    groups: dict[str, list[int]] = {}
    for position, name in enumerate(names):
        groups.setdefault(modality_of(name), []).append(position)
    return groups


def _one_hot(values: np.ndarray, count: int) -> np.ndarray:
    return np.eye(count)[values]


def load_chicago() -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
    """(inputs by modality, ridership in thousands, row numbers by split): before 2012, 2012, from 2013 on."""
    header, rows = read_table("chicago")
    names = header[1:-1]
    table = np.array([row[:-1] for row in rows], dtype=np.float64)
    dates = np.array([row[-1] for row in rows], dtype="datetime64[D]")
    groups = columns_by_modality(names, chicago_modality)
    inputs = {modality: table[:, 1:][:, places] for modality, places in groups.items()}
    weekday = (dates.astype(np.int64) + 3) % 7  # 1970-01-01 was a Thursday; Monday is 0
    month = dates.astype("datetime64[M]").astype(np.int64) % 12
    inputs["calendar"] = np.concatenate([_one_hot(weekday, 7), _one_hot(month, 12)], 1)
    year = dates.astype("datetime64[Y]").astype(np.int64) + 1970
    splits = {
        "train": np.flatnonzero(year < 2012),
        "validation": np.flatnonzero(year == 2012),
        "test": np.flatnonzero(year > 2012),
    }
    return inputs, table[:, 0], splits


def load_cells(seed: int) -> tuple[dict[str, np.ndarray], np.ndarray, dict[str, np.ndarray]]:
    """(inputs by channel, class 0 PS or 1 WS, row numbers by split); validation is a fifth of each training class."""
    header, rows = read_table("cells")
    table = np.array([row[2:] for row in rows], dtype=np.float64)
    groups = columns_by_modality(header[2:], cells_modality)
    inputs = {modality: table[:, places] for modality, places in sorted(groups.items())}
    classes = np.array([int(row[1] == "WS") for row in rows])
    training = np.array([row[0] == "Train" for row in rows])
    generator = np.random.default_rng([seed, 1])
    validation = []
    for label in (0, 1):
        members = generator.permutation(np.flatnonzero(training & (classes == label)))
        validation.append(members[: len(members) // 5])
    held_out = np.sort(np.concatenate(validation))
    splits = {
        "train": np.setdiff1d(np.flatnonzero(training), held_out),
        "validation": held_out,
        "test": np.flatnonzero(~training),
    }
    return inputs, classes, splits


def draw_present(rows: int, modalities: int, seed: int) -> np.ndarray:
    """bool [rows, modalities]: each absent with probability 0.3; a row that would lose all of them is drawn again."""
    generator = np.random.default_rng([seed, 2])
    present = generator.random((rows, modalities)) >= MISSING
    while (empty := ~present.any(1)).any():
        present[empty] = generator.random((int(empty.sum()), modalities)) >= MISSING
    return present


def load_setting(setting: Setting, seed: int) -> Data:
    """Inputs (and a regression target) are standardised with the training rows in which the modality is present."""
    regression = setting.table == "chicago"
    inputs, values, splits = load_chicago() if regression else load_cells(seed)
    shape = len(values), len(inputs)
    present = draw_present(*shape, seed) if setting.missing else np.ones(shape, dtype=bool)
    train = splits["train"]
    offset, scale = (float(values[train].mean()), float(values[train].std())) if regression else (0.0, 1.0)
    target = (values - offset) / scale if regression else values
    standardised = {}
    for position, (name, columns) in enumerate(inputs.items()):
        seen = columns[train][present[train, position]]
        deviation = seen.std(0)
        columns = (columns - seen.mean(0)) / np.where(deviation > 0, deviation, 1)
        standardised[name] = columns * present[:, position, None]

    def split(index: np.ndarray) -> Split:
        return Split(
            {name: torch.from_numpy(columns[index]).float() for name, columns in standardised.items()},
            torch.from_numpy(present[index]),
            torch.from_numpy(target[index]).float() if regression else torch.from_numpy(target[index]),
        )

    task = "regression" if regression else "classification"
    return Data(task, *(split(splits[part]) for part in ("train", "validation", "test")), offset, scale)
