"""Image-caption pairs as people have them: a table that names image files, or tensors that are prepared already.

Shapes: n pairs, S side of the model's images, T tokens.
"""

from __future__ import annotations

import csv
import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from safetensors import SafetensorError, safe_open
from torch import Tensor

IMAGE_COLUMNS, CAPTION_COLUMNS = ("image", "filepath"), ("caption", "title")  # open_clip's tables have the second ones
LONGEST_TO_SHORTEST = 200  # an image of 1 x 60,000 would be resized to gigabytes


class BrokenImageError(ValueError):
    """An image that cannot be read."""


def _digest(path: Path, *settings: str) -> str:
    digest = hashlib.sha256(json.dumps(settings).encode())
    with open(path, "rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()[:16]


def _read_image(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            width, height = image.size
            if max(width, height) > LONGEST_TO_SHORTEST * min(width, height):
                raise BrokenImageError(f"its sides are {width} x {height}")
            return image.convert("RGB")
    except MemoryError:
        raise
    except Exception as error:  # decoders raise what they like on what is no image
        raise BrokenImageError(str(error) or type(error).__name__) from None


@dataclass(frozen=True)
class ListedPairs:
    """Files and captions; lines: where each stands in the table."""

    images: Sequence[Path]
    captions: Sequence[str]
    lines: Sequence[int]
    mark: str  # changes with any byte of the table and with the columns that are read

    def __len__(self) -> int:
        return len(self.images)

    def name(self, row: int) -> str:
        return f"row {row} (line {self.lines[row]}, {self.images[row]})"

    def image(self, row: int) -> Image.Image:
        return _read_image(self.images[row])

    def texts(self, rows: range) -> list[str]:
        return [self.captions[row] for row in rows]


def _column(path: Path, header: list[str], asked: str | None, usual: tuple[str, str], what: str) -> int:
    found = [name for name in ((asked,) if asked else usual) if name in header]
    columns = ", ".join(header)
    if not found:
        raise ValueError(f"{path} must have a column {asked or ' or '.join(usual)} of {what}, got {columns}")
    if len(found) > 1 or header.count(found[0]) > 1:
        raise ValueError(f"{path} must have one column of {what}, got {columns}: name it")
    return header.index(found[0])


def _read_table(path: Path, image_column: str | None, caption_column: str | None, quotes: bool) -> ListedPairs:
    dialect: dict[str, Any] = {"delimiter": "\t" if path.suffix.lower() == ".tsv" else ",", "strict": True}
    if not quotes:
        dialect["quoting"] = csv.QUOTE_NONE
    images, captions, lines = [], [], []
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.reader(file, **dialect)
        try:
            header = next(reader, None)
            if not header:
                raise ValueError(f"{path} must have a header with the names of its columns, it is empty")
            image = _column(path, header, image_column, IMAGE_COLUMNS, "images")
            caption = _column(path, header, caption_column, CAPTION_COLUMNS, "captions")
            for row in reader:
                if not row:
                    continue
                if len(row) != len(header):
                    raise ValueError(
                        f"{path}: line {reader.line_num} must have {len(header)} columns as the header, got {len(row)}"
                    )
                if not row[image]:
                    raise ValueError(f"{path}: line {reader.line_num} must name an image")
                images.append(path.parent / row[image])
                captions.append(row[caption])
                lines.append(reader.line_num)
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} must be UTF-8: {error}") from None
        except csv.Error as error:
            hint = "; quotes that quote nothing need the option that says so" if quotes else ""
            raise ValueError(f"{path}: line {reader.line_num} cannot be read: {error}{hint}") from None
    if not images:
        raise ValueError(f"{path} must have pairs, it has none")
    settings = (header[image], header[caption], "quoted" if quotes else "as they are")
    return ListedPairs(images, captions, lines, _digest(path, *settings))


@dataclass(frozen=True)
class PreparedPairs:
    """pixels float [n, 3, S, S], normalised as the model wants them, or raw images uint8 [n, H, W, 3] or [n, 3, H, W];
    ids integers [n, T]. A slice of either is an array or a tensor; safetensors are mapped into memory."""

    pixels: Any
    ids: Any
    shape: tuple[int, ...]
    raw: bool
    mark: str

    def __len__(self) -> int:
        return self.shape[0]

    def name(self, row: int) -> str:
        return f"row {row}"

    def image(self, row: int) -> Tensor | Image.Image:
        image = torch.as_tensor(self.pixels[row : row + 1])[0]
        if not self.raw:
            return image.float()
        return Image.fromarray((image if image.shape[-1] == 3 else image.permute(1, 2, 0)).numpy().copy())

    def texts(self, rows: range) -> Tensor:
        return torch.as_tensor(self.ids[rows.start : rows.stop]).long()


def _open_arrays(path: Path) -> dict[str, tuple[Any, tuple[int, ...], str]]:
    """name -> what gives rows, shape, dtype."""
    try:
        if path.suffix.lower() == ".npz":
            with np.load(path, allow_pickle=False) as file:
                names = [name for name in ("pixel_values", "images", "input_ids") if name in file.files]
                arrays = {name: file[name] for name in names}
            return {name: (array, array.shape, str(array.dtype)) for name, array in arrays.items()}
        opened = safe_open(path, "pt")
        slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118  (it is no dict)
        dtypes = {"F16": "float16", "BF16": "bfloat16", "F32": "float32", "F64": "float64", "U8": "uint8"}
        dtypes |= {"I64": "int64", "I32": "int32", "I16": "int16"}
        return {name: (s, tuple(s.get_shape()), dtypes.get(s.get_dtype(), s.get_dtype())) for name, s in slices.items()}
    except FileNotFoundError:
        raise
    except (OSError, SafetensorError, ValueError, KeyError, EOFError) as error:
        raise ValueError(f"{path} cannot be read: {error}") from None
    except Exception as error:  # zipfile and zlib have errors of their own
        raise ValueError(f"{path} cannot be read: {type(error).__name__}: {error}") from None


def _read_arrays(path: Path) -> PreparedPairs:
    arrays = _open_arrays(path)
    if "input_ids" not in arrays or ("pixel_values" in arrays) == ("images" in arrays):
        given = ", ".join(sorted(arrays)) or "none of them"
        raise ValueError(f"{path} must have input_ids and either pixel_values or images, got {given}")
    raw = "images" in arrays
    pixels, shape, dtype = arrays["images" if raw else "pixel_values"]
    ids, ids_shape, ids_dtype = arrays["input_ids"]
    if raw:
        if dtype != "uint8" or len(shape) != 4 or (shape[1] == 3) == (shape[3] == 3) or 0 in shape[1:]:
            raise ValueError(f"{path}: images must be uint8 [n, H, W, 3] or [n, 3, H, W], got {dtype} {list(shape)}")
    elif not dtype.startswith(("float", "bfloat")) or len(shape) != 4 or shape[1] != 3:
        raise ValueError(f"{path}: pixel_values must be floating-point [n, 3, S, S], got {dtype} {list(shape)}")
    if not ids_dtype.startswith("int") or len(ids_shape) != 2 or ids_shape[0] != shape[0] or not ids_shape[1]:
        raise ValueError(f"{path}: input_ids must be integers [{shape[0]}, T], got {ids_dtype} {list(ids_shape)}")
    if not shape[0]:
        raise ValueError(f"{path} must have pairs, it has none")
    return PreparedPairs(pixels, ids, shape, raw, _digest(path))


def read_pairs(
    path: str | os.PathLike,
    image_column: str | None = None,
    caption_column: str | None = None,
    quotes: bool = True,
) -> ListedPairs | PreparedPairs:
    """A table, .tsv or .csv in UTF-8 with a header, or tensors, .npz or .safetensors.

    A table names an image file (relative to the table's folder) and a caption in each line, in columns ``image`` or
    ``filepath`` and ``caption`` or ``title``, unless others are named. quotes False: quotation marks are part of the
    text. Tensors: ``input_ids`` [n, T], and ``pixel_values`` [n, 3, S, S] that are normalised, or ``images`` uint8.
    """
    path = Path(path)
    kind = path.suffix.lower()
    if kind in (".tsv", ".csv"):
        return _read_table(path, image_column, caption_column, quotes)
    if kind not in (".npz", ".safetensors"):
        raise ValueError(f"pairs must be a .tsv, .csv, .npz or .safetensors file, got {path}")
    if image_column or caption_column:
        raise ValueError(f"columns are of tables, {path} has none")
    return _read_arrays(path)
