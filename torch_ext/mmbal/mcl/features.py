"""Features of all pairs under one model, as a file.

Shapes: n pairs that have features, P width of the embedding.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from mmbal.files import replace_file

FORMAT_VERSION = 1
DTYPES = {"float16": torch.float16, "float32": torch.float32}


def write_tensors(path: Path, kind: str, tensors: dict[str, Tensor], description: dict) -> None:
    """A safetensors file with a description in its header; it has its name only when it is complete."""
    text = json.dumps({"kind": kind, "format_version": FORMAT_VERSION} | description)
    tensors = {name: value.contiguous() for name, value in tensors.items()}
    replace_file(path, lambda file: save_file(tensors, file, metadata={"mmbal": text}))


def read_tensors(path: Path, kind: str, names: Sequence[str]) -> tuple[dict[str, Tensor], dict]:
    """What :func:`write_tensors` wrote. ValueError: it cannot be read, or is another kind of file."""
    try:
        with safe_open(path, "pt") as file:
            description = json.loads((file.metadata() or {}).get("mmbal", "null"))
            if not isinstance(description, dict) or description.get("kind") != kind:
                raise ValueError(f"it is no file of {kind}")
            if description.get("format_version") != FORMAT_VERSION:
                raise ValueError(f"format_version must be {FORMAT_VERSION}, got {description.get('format_version')!r}")
            if lacking := sorted(set(names) - set(file.keys())):
                raise ValueError(f"it must have {', '.join(lacking)}")
            return {name: file.get_tensor(name) for name in names}, description
    except (OSError, SafetensorError, ValueError, RecursionError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None


@dataclass(frozen=True)
class Source:
    """Where features come from. Files can be put together, and parts of a file go on, only where these agree."""

    model: str  # fingerprint of the weights
    pairs: str  # fingerprint of the table or tensors of pairs
    processing: str  # fingerprint of what is done to images and texts
    dtype: str  # in which features are kept
    autocast: str  # in which they were computed; "none": as the weights are
    rows: int  # pairs in all, broken ones too

    @classmethod
    def of(cls, description: dict) -> Source:
        return cls(**{f.name: description[f.name] for f in fields(cls)})

    def differs_in(self, other: Source) -> list[str]:
        return [f.name for f in fields(self) if getattr(self, f.name) != getattr(other, f.name)]


@dataclass(frozen=True)
class Features:
    """images, texts [n, P] of length 1; index int64 [n], ascending: the row of each pair; skipped int64: the rows of
    broken images, which were left out. shard (i, count): these are of part i of count."""

    images: Tensor
    texts: Tensor
    index: Tensor
    skipped: Tensor
    source: Source
    shard: tuple[int, int] = (0, 1)

    def __len__(self) -> int:
        return len(self.index)

    @property
    def rows(self) -> range:
        """Of the pairs, those that this file is about."""
        return shard_rows(self.source.rows, self.shard)

    def save(self, path: str | os.PathLike) -> None:
        tensors = {"image_features": self.images, "text_features": self.texts}
        tensors |= {"index": self.index, "skipped": self.skipped}
        write_tensors(Path(path), "features", tensors, asdict(self.source) | {"shard": list(self.shard)})

    @classmethod
    def load(cls, path: str | os.PathLike) -> Features:
        names = ("image_features", "text_features", "index", "skipped")
        tensors, description = read_tensors(Path(path), "features", names)
        try:
            shard = tuple(description["shard"])
            found = cls(*tensors.values(), Source.of(description), shard)
            found._check()
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"{path} cannot be read: {error}") from None
        return found

    def _check(self) -> None:
        source, n = self.source, len(self.index)
        if not all(isinstance(getattr(source, f.name), int if f.name == "rows" else str) for f in fields(source)):
            raise ValueError("its source is described wrongly")
        check_shard(self.shard)
        wanted = DTYPES.get(source.dtype)
        for name, value in (("image_features", self.images), ("text_features", self.texts)):
            if value.dtype != wanted or value.dim() != 2 or value.shape != (n, self.images.shape[1]):
                raise ValueError(f"{name} must be {source.dtype} [{n}, P], got {value.dtype} {list(value.shape)}")
        for name, value in (("index", self.index), ("skipped", self.skipped)):
            if value.dtype != torch.int64 or value.dim() != 1 or (value.diff() <= 0).any():
                raise ValueError(f"{name} must be int64 and ascending")
        every = torch.cat([self.index, self.skipped]).sort().values
        if len(every) != len(self.rows) or not torch.equal(every, torch.arange(self.rows.start, self.rows.stop)):
            raise ValueError(f"index and skipped must be the rows {self.rows.start} to {self.rows.stop - 1}")


def check_shard(shard: tuple[int, int]) -> None:
    if len(shard) != 2 or not all(type(i) is int for i in shard) or not 0 <= shard[0] < shard[1]:
        raise ValueError(f"shard must be i/n with i from 0 to n - 1, got {'/'.join(map(str, shard))}")


def shard_rows(rows: int, shard: tuple[int, int]) -> range:
    """The consecutive rows of part i of n."""
    i, n = shard
    return range(rows * i // n, rows * (i + 1) // n)


def merge_features(parts: Sequence[Features]) -> Features:
    """All shards of one extraction as one, whatever their order."""
    if not parts:
        raise ValueError("merge_features: at least one part is needed")
    first = parts[0]
    for part in parts[1:]:
        if other := first.source.differs_in(part.source):
            raise ValueError(f"merge_features: parts must be of one source, they differ in {', '.join(other)}")
    count = first.shard[1]
    shards = sorted(part.shard for part in parts)
    if shards != [(i, count) for i in range(count)]:
        given = ", ".join(f"{i}/{n}" for i, n in shards)
        raise ValueError(f"merge_features: parts must be all of 0/{count} to {count - 1}/{count}, got {given}")
    parts = sorted(parts, key=lambda part: part.shard)
    names = ("images", "texts", "index", "skipped")
    return Features(*(torch.cat([getattr(part, name) for part in parts]) for name in names), first.source)
