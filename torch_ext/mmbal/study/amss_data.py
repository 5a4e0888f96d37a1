"""The three data sets of the study of AMSS, all of them classifications: two tables, and clip art with its titles.

Shapes: N rows of a split, V words, C classes.
"""

from __future__ import annotations

import random
import re
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cache

import torch
from torch import Tensor

from mmbal.demo.data import normalize, read_table, tiles, title_key

from .data import SETTINGS, Data, Split, load_setting

FEWEST = 60  # pictures that a folder of the clip art needs to be a class
UNNAMED = "unsorted"  # no topic
WORD = 8.0  # the column of a word that a title has: with 1 titles would be learnt far more slowly than pictures
Row = dict[str, str]  # title, keywords (not used here: they often say the folder), folder


@dataclass(frozen=True)
class DataSet:
    """One of the three; a batch and a number of epochs that suit its size."""

    name: str
    title: str
    modalities: tuple[str, ...]
    epochs: int
    batch: int


DATA_SETS = (
    DataSet("cells", "cell segmentation", ("ch_1", "ch_2", "ch_3", "ch_4"), 30, 64),
    DataSet("chicago", "Chicago ridership in terciles", ("stations", "weather", "sport", "calendar"), 20, 128),
    DataSet("clipart", "clip art and titles", ("picture", "title"), 20, 64),
)


def load(data_set: DataSet, seed: int) -> Data:
    """Three splits. Seeds change the validation rows of cells and clip art; test rows are always the same."""
    if data_set.name == "clipart":
        return load_clipart(seed)
    data = load_setting(next(setting for setting in SETTINGS if setting.name == data_set.name), seed)
    return in_terciles(data) if data.task == "regression" else data


def in_terciles(data: Data) -> Data:
    """A regression as three classes: below, between and above the terciles of its training rows."""
    thresholds = torch.quantile(data.train.target.double(), torch.tensor([1 / 3, 2 / 3], dtype=torch.float64))

    def classes(split: Split) -> Split:
        return replace(split, target=torch.bucketize(split.target.double(), thresholds))

    return Data("classification", classes(data.train), classes(data.validation), classes(data.test))


@cache
def clipart_rows() -> tuple[list[Row], list[int], list[str]]:
    """(rows of the large folders, their numbers in the whole table, the folders by name)."""
    rows = read_table("clipart.tsv")
    counts = Counter(row["folder"] for row in rows)
    folders = sorted(name for name, count in counts.items() if count >= FEWEST and name != UNNAMED)
    chosen = [number for number, row in enumerate(rows) if row["folder"] in folders]
    return [rows[number] for number in chosen], chosen, folders


def _held_out(rows: Sequence[Row], numbers: Sequence[int], share: float, rng: random.Random) -> set[int]:
    """About this share of each folder's rows, titles that differ in case or digits only kept together.

    A title goes with the folder where it is most frequent. A title too frequent for what a folder has left to give
    stays, so a folder gives no more than its share.
    """
    groups = defaultdict(list)
    for number in numbers:
        groups[title_key(rows[number]["title"])].append(number)
    by_folder = defaultdict(list)
    for group in groups.values():
        by_folder[Counter(rows[number]["folder"] for number in group).most_common(1)[0][0]].append(group)
    chosen: set[int] = set()
    for folder in sorted(by_folder):
        own = by_folder[folder]
        rng.shuffle(own)
        left = int(share * sum(map(len, own)))
        for group in own:
            if len(group) <= left:
                chosen.update(group)
                left -= len(group)
    return chosen


def split_clipart(seed: int) -> dict[str, list[int]]:
    """Positions in `clipart_rows`: a quarter is tested, always the same one; a fifth of the rest validates, by seed."""
    rows, _, _ = clipart_rows()
    test = _held_out(rows, range(len(rows)), 1 / 4, random.Random("test"))
    rest = [number for number in range(len(rows)) if number not in test]
    validation = _held_out(rows, rest, 1 / 5, random.Random(seed))
    return {
        "train": [number for number in rest if number not in validation],
        "validation": sorted(validation),
        "test": sorted(test),
    }


def words_of(title: str) -> set[str]:
    """Lower-case words without digits."""
    return set(re.findall(r"[^\W\d_]+", title.lower()))


def names_its_folder(row: Row) -> bool:
    """Does the title hold a word of the folder's name, in singular or plural?"""
    topics = [word.rstrip("s") for word in row["folder"].split("_") if word != "and"]
    return any(word.rstrip("s") in topics for word in words_of(row["title"]))


def clipart_facts() -> dict[str, float]:
    """What a reader must know of the clip art: how many classes, and how often a test title gives the class away."""
    rows, _, folders = clipart_rows()
    splits = split_clipart(0)
    known = set().union(*(words_of(rows[number]["title"]) for number in splits["train"]))
    test = [rows[number] for number in splits["test"]]
    return {
        "classes": len(folders),
        "pictures": len(rows),
        "largest": max(Counter(row["folder"] for row in test).values()) / len(test),
        "named": sum(map(names_its_folder, test)) / len(test),
        "without_known_word": sum(not words_of(row["title"]) & known for row in test) / len(test),
    }


def title_columns(titles: Sequence[str], vocabulary: dict[str, int]) -> Tensor:
    """[N, V], 8 where the title has the word, else 0; words that are not in the vocabulary are lost."""
    columns = torch.zeros(len(titles), len(vocabulary))
    for row, title in enumerate(titles):
        columns[row, [vocabulary[word] for word in words_of(title) if word in vocabulary]] = WORD
    return columns


def load_clipart(seed: int) -> Data:
    """Pictures float32 [N, 3, 48, 48] in [-1, 1] and titles as bags of the training titles' words [N, V]."""
    rows, numbers, folders = clipart_rows()
    splits = split_clipart(seed)
    known = sorted(set().union(*(words_of(rows[number]["title"]) for number in splits["train"])))
    vocabulary = {word: column for column, word in enumerate(known)}
    pictures = tiles("clipart48.png", max(numbers) + 1)

    def split(part: str) -> Split:
        own = [rows[number] for number in splits[part]]
        inputs = {
            "picture": normalize(pictures[[numbers[number] for number in splits[part]]]),
            "title": title_columns([row["title"] for row in own], vocabulary),
        }
        target = torch.tensor([folders.index(row["folder"]) for row in own])
        return Split(inputs, torch.ones(len(own), 2, dtype=torch.bool), target)

    return Data("classification", split("train"), split("validation"), split("test"))
