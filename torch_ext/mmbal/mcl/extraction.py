"""Features of all pairs under a CLIP, part by part: a run that is stopped goes on with the part it was at.

Shapes: n pairs, B batch, P width of the embedding.
"""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm

from mmbal.altmoe.store import fingerprint_of
from mmbal.files import replace_file
from mmbal.mcl.features import DTYPES, Features, Source, check_shard, read_tensors, shard_rows, write_tensors
from mmbal.mcl.pairs import BrokenImageError, ListedPairs, PreparedPairs, read_pairs
from mmbal.mcl.processing import (
    IMAGE_FILES,
    TEXT_FILES,
    ImageProcessing,
    TextProcessing,
    clip_images,
    folder_images,
    folder_texts,
)

PART = 512  # pairs: what is lost at most when a run is stopped
AUTOCAST = {"none": None, "float16": torch.float16, "bfloat16": torch.bfloat16}


def _load(path: str | os.PathLike):
    """The CLIP of a checkpoint in any format, dense or with mixtures."""
    from mmbal.checkpoints import load_clip

    return load_clip(path, dtype=torch.float32)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]


class _Inputs:
    """What a model takes, by row of the pairs."""

    def __init__(self, pairs: ListedPairs | PreparedPairs, config, images: ImageProcessing, texts: TextProcessing):
        self.pairs, self._images, self._texts = pairs, images, texts
        self.side, text = config.vision_config.image_size, config.text_config
        self._vocabulary, self._context, self._end = text.vocab_size, text.max_position_embeddings, text.eos_token_id

    @property
    def processing(self) -> str:
        return _digest(f"{self._images and self._images.mark}\0{self._texts and self._texts.mark}")

    def check(self) -> None:
        """Whether the first pair fits the model, before any work; its image may be broken."""
        if self._images:
            from PIL import Image

            self._fitted(self._images(Image.new("RGB", (50, 40))), "the image processor must give")
        else:
            self._fitted(self.pairs.image(0), "pixel_values must be")
        self.ids(range(1))

    def _fitted(self, pixels: Tensor, what: str) -> Tensor:
        if (wanted := [3, self.side, self.side]) != list(pixels.shape):
            raise ValueError(f"{what} {wanted} as the model takes, got {list(pixels.shape)}")
        return pixels

    def image(self, row: int) -> Tensor:
        image = self.pairs.image(row)
        return self._fitted(self._images(image), "the image processor must give") if self._images else image

    def image_or_error(self, row: int) -> Tensor | BrokenImageError:
        try:
            return self.image(row)
        except BrokenImageError as error:
            return error

    def ids(self, rows: range) -> Tensor:
        ids = self.pairs.texts(rows)
        ids = self._texts(ids) if self._texts else ids
        if not 1 <= ids.shape[1] <= self._context:
            raise ValueError(f"input_ids must be [n, 1 to {self._context}] as the model takes, got {list(ids.shape)}")
        outside = ((ids < 0) | (ids >= self._vocabulary)).any(1)
        if outside.any():
            name = self.pairs.name(rows[int(outside.int().argmax())])
            raise ValueError(f"input_ids must be from 0 to {self._vocabulary - 1} as the model takes, not so {name}")
        if self._end != 2:  # transformers pools at the largest id then, else at this one, and at 0 where there is none
            endless = ~(ids == self._end).any(1)
            if endless.any():
                name = self.pairs.name(rows[int(endless.int().argmax())])
                raise ValueError(f"input_ids must have the model's end token {self._end}, not so {name}")
        return ids


class _Parts:
    """Finished parts of an extraction in a folder beside its output."""

    NAMES = ("image_features", "text_features", "index", "skipped")

    def __init__(self, out: Path, source: Source, rows: range, size: int):
        self.folder = out.with_name(f"{out.name}.parts")
        self.source = source
        self.pieces = [range(first, min(first + size, rows.stop)) for first in range(rows.start, rows.stop, size)]

    def _path(self, piece: range) -> Path:
        return self.folder / f"{piece.start}-{piece.stop}.safetensors"

    def read(self, piece: range) -> tuple[dict[str, Tensor], list[str]] | None:
        """Tensors, and what is wrong with the skipped rows; None where the part is not there."""
        path = self._path(piece)
        if not path.exists():
            return None
        try:
            tensors, description = read_tensors(path, "part of features", self.NAMES)
            other, reasons = Source.of(description), description["reasons"]
        except (KeyError, TypeError, ValueError):
            raise ValueError(f"{path} cannot be read: remove it") from None
        if different := self.source.differs_in(other):
            raise ValueError(
                f"{self.folder} has parts of other features, which differ in {', '.join(different)}: remove it, or "
                "write to another file"
            )
        every = torch.cat([tensors["index"], tensors["skipped"]]).sort().values
        if not torch.equal(every, torch.arange(piece.start, piece.stop)):
            raise ValueError(f"{path} is damaged: remove it")
        return tensors, reasons

    def write(self, piece: range, tensors: dict[str, Tensor], reasons: list[str]) -> None:
        write_tensors(self._path(piece), "part of features", tensors, asdict(self.source) | {"reasons": reasons})

    def remove(self) -> None:
        shutil.rmtree(self.folder, ignore_errors=True)


@torch.no_grad()
def _embed(model, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Unit vectors, float32 [B, P] each."""
    images = model.visual_projection(model.vision_model(pixel_values=pixels).pooler_output)
    texts = model.text_projection(model.text_model(input_ids=ids).pooler_output)  # causal: padding changes nothing
    return F.normalize(images.float(), dim=-1), F.normalize(texts.float(), dim=-1)


def _prepared(inputs: _Inputs, rows: range, batch: int, pool: ThreadPoolExecutor) -> Iterator[tuple]:
    """(rows, images or errors) of each batch; the images of the next one are read meanwhile."""

    def begin(part: range) -> list[Future]:
        return [pool.submit(inputs.image_or_error, row) for row in part]

    batches = [rows[first : first + batch] for first in range(0, len(rows), batch)]
    waiting = begin(batches[0])
    try:
        for turn, part in enumerate(batches):
            ready, waiting = waiting, begin(batches[turn + 1]) if turn + 1 < len(batches) else []
            yield part, [future.result() for future in ready]
    finally:
        for future in waiting:
            future.cancel()


@dataclass(frozen=True)
class _Extractor:
    """Features of a part of the pairs."""

    model: Any
    inputs: _Inputs
    batch: int
    dtype: torch.dtype
    device: torch.device
    autocast: torch.dtype | None
    skip_broken: bool

    def part(self, piece: range, pool: ThreadPoolExecutor, progress) -> tuple[dict[str, Tensor], list[str]]:
        """Tensors by the names of _Parts, and why rows were skipped."""
        nothing = torch.empty(0, self.model.config.projection_dim, dtype=self.dtype)
        images, texts, index, skipped, reasons = [nothing], [nothing], [], [], []
        for rows, read in _prepared(self.inputs, piece, self.batch, pool):
            whole = [i for i, image in enumerate(read) if isinstance(image, Tensor)]
            for row, image in zip(rows, read, strict=True):
                if isinstance(image, BrokenImageError):
                    reason = f"{self.inputs.pairs.name(row)}: the image cannot be read: {image}"
                    if not self.skip_broken:
                        raise ValueError(f"extract_features: {reason}")
                    skipped.append(row)
                    reasons.append(reason)
            if whole:
                kept = [rows[i] for i in whole]
                found = self._features(torch.stack([read[i] for i in whole]), self.inputs.ids(rows)[whole])
                images.append(self._unit(found[0], kept, "image"))
                texts.append(self._unit(found[1], kept, "text"))
                index += kept
            progress(len(rows))
        tensors = (torch.cat(images), torch.cat(texts), torch.tensor(index).long(), torch.tensor(skipped).long())
        return dict(zip(_Parts.NAMES, tensors, strict=True)), reasons

    def _features(self, pixels: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
        with torch.autocast(self.device.type, self.autocast) if self.autocast else nullcontext():
            return _embed(self.model, pixels.to(self.device, self.model.dtype), ids.to(self.device))

    def _unit(self, features: Tensor, rows: list[int], side: str) -> Tensor:
        features = features.cpu()
        wrong = ~(features.isfinite().all(1) & (features.norm(dim=1) > 0.5))
        if wrong.any():
            name = self.inputs.pairs.name(rows[int(wrong.int().argmax())])
            raise ValueError(f"extract_features: {side} features must be finite and not zero, not so {name}")
        return features.to(self.dtype)


def _device(name: str | torch.device) -> torch.device:
    try:
        device = torch.device(name)
    except RuntimeError:
        raise ValueError(f"extract_features: device must be a device such as cpu or cuda, got {name!r}") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"extract_features: device must be one that is here, got {device}: torch finds no GPU")
    return device


def _processing(model, folder, pairs, image_processor, tokenizer):
    """What is done to images and to texts; None: nothing, they are prepared."""
    folder = None if folder is None else Path(folder)
    config, images, texts = model.config, None, None
    if isinstance(pairs, ListedPairs) or pairs.raw:
        here = folder is not None and any((folder / name).is_file() for name in IMAGE_FILES)
        asked = image_processor or (folder if here else None)
        images = folder_images(asked) if asked else clip_images(config.vision_config.image_size)
    if isinstance(pairs, ListedPairs):
        here = folder is not None and any((folder / name).is_file() for name in TEXT_FILES)
        asked = tokenizer or (folder if here else None)
        if asked is None:
            raise ValueError("extract_features: a tokenizer must be given, as the model's folder has none")
        texts = folder_texts(asked, config.text_config.max_position_embeddings)
    return images, texts


def extract_features(
    model,
    pairs: str | os.PathLike,
    out: str | os.PathLike,
    *,
    batch: int = 64,
    dtype: str = "float16",
    shard: tuple[int, int] = (0, 1),
    skip_broken: bool = False,
    image_column: str | None = None,
    caption_column: str | None = None,
    quotes: bool = True,
    image_processor: str | os.PathLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    device: str | torch.device = "cpu",
    autocast: str = "none",
    workers: int = 4,
    part: int = PART,
    progress: bool = True,
    say: Callable[[str], None] | None = None,
) -> Features:
    """Runs a CLIP in evaluation mode over all pairs and writes unit vectors of images and texts (the first step of a
    stage of MCL, arXiv 2402.11816; as for CLIP-MoE, arXiv 2409.19291: L2-normalised, kept in float16).

    A run that was stopped goes on at the last finished part of ``part`` pairs, in the folder OUT.parts, once model,
    pairs, processing and dtypes were found to be the same; a file that is finished is read. The result does not depend
    on where it was stopped. OUT appears when it is complete.

    Parameters
    ----------
    model : a checkpoint's path, or a transformers ``CLIPModel``, which is put into evaluation mode on ``device``.
    pairs : file, see :func:`mmbal.mcl.pairs.read_pairs`; image_column, caption_column, quotes: how to read a table.
    out : a .safetensors file, see :class:`Features`.
    batch : pairs at once. dtype : "float16" or "float32", of what is kept.
    shard : (i, n): the i-th of n parts of the pairs, from 0, for n processes; :func:`merge_features` joins them.
    skip_broken : leave out pairs whose image cannot be read, and list them in ``OUT.skipped.txt`` and ``skipped``;
        otherwise such an image is an error, with its row and line.
    image_processor, tokenizer : transformers folders; None: the model's own folder, and for images without one
        CLIP's usual (shorter side to the model's size, bicubic; centre; OpenAI's mean and deviation).
    device, autocast : where and in which dtype ("none", "float16" as published, "bfloat16") to compute.
    workers : threads that read images.
    say : is told what was found already and what was left out.
    """
    for name, value in (("batch", batch), ("workers", workers), ("part", part)):
        if not isinstance(value, int) or value < 1:
            raise ValueError(f"extract_features: {name} must be an integer of at least 1, got {value!r}")
    for name, value, among in (("dtype", dtype, DTYPES), ("autocast", autocast, AUTOCAST)):
        if value not in among:
            raise ValueError(f"extract_features: {name} must be one of {', '.join(among)}, got {value!r}")
    check_shard(shard)
    out, device, say = Path(out), _device(device), say or (lambda text: None)
    table = read_pairs(pairs, image_column, caption_column, quotes)
    folder = None
    if isinstance(model, (str, os.PathLike)):
        folder, model = model, _load(model)
    inputs = _Inputs(table, model.config, *_processing(model, folder, table, image_processor, tokenizer))
    inputs.check()
    rows = shard_rows(len(table), shard)
    if not rows:
        raise ValueError(f"extract_features: shard must be of at most the {len(table)} pairs, got {shard[1]} parts")
    source = Source(fingerprint_of(model), table.mark, inputs.processing, dtype, autocast, len(table))
    if out.exists():
        return _finished(out, source, shard, skip_broken, say)

    training = model.training
    model = model.eval().to(device)
    extractor = _Extractor(model, inputs, batch, DTYPES[dtype], device, AUTOCAST[autocast], skip_broken)
    parts, gathered, reasons = _Parts(out, source, rows, part), [], []
    try:
        with (
            tqdm(total=len(rows), desc="features", unit="pair", disable=not progress) as bar,
            ThreadPoolExecutor(workers) as pool,
        ):
            for piece in parts.pieces:
                found = parts.read(piece)
                if found is None or (found[1] and not skip_broken):  # images may have been repaired
                    found = extractor.part(piece, pool, bar.update)
                    parts.write(piece, *found)
                else:
                    bar.update(len(piece))
                gathered.append(found[0])
                reasons += found[1]
    finally:
        model.train(training)
    features = Features(*(torch.cat([p[name] for p in gathered]) for name in _Parts.NAMES), source, shard)
    if not len(features):
        raise ValueError("extract_features: pairs must have an image that can be read, none can")
    if reasons:
        listed = out.with_name(f"{out.name}.skipped.txt")
        replace_file(listed, lambda file: file.write_text("".join(f"{line}\n" for line in reasons), "utf-8"))
        say(f"{len(reasons)} pairs are left out, listed in {listed}")
    features.save(out)
    parts.remove()
    return features


def _finished(out: Path, source: Source, shard: tuple[int, int], skip_broken: bool, say) -> Features:
    """The features in a file that is there, if they are those that are asked for."""
    features = Features.load(out)
    if different := source.differs_in(features.source):
        raise ValueError(
            f"{out} has other features, which differ in {', '.join(different)}: remove it, or write to another file"
        )
    if shard != features.shard:
        raise ValueError(f"{out} is of shard {'/'.join(map(str, features.shard))}: remove it, or write to another file")
    if len(features.skipped) and not skip_broken:
        raise ValueError(
            f"{out} leaves out {len(features.skipped)} pairs whose images could not be read: allow that, or remove it"
        )
    say(f"{out} is finished already")
    shutil.rmtree(out.with_name(f"{out.name}.parts"), ignore_errors=True)
    return features
