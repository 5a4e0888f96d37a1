"""From images and captions to what a CLIP takes.

Shapes: S side of the model's images, B captions, T tokens.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from mmbal.checkpoints.configuration import OPENAI_MEAN, OPENAI_STD

IMAGE_FILES = ("preprocessor_config.json", "processor_config.json")
TEXT_FILES = ("tokenizer.json", "tokenizer_config.json", "vocab.json")


class ImageProcessing:
    """image -> float32 [3, S, S]. ``mark``: all that the result depends on besides the image."""

    def __init__(self, call: Callable[[Image.Image], Tensor], mark: str):
        self._call, self.mark = call, mark

    def __call__(self, image: Image.Image) -> Tensor:
        return self._call(image)


def clip_images(side: int) -> ImageProcessing:
    """CLIP's usual: the shorter side becomes S (bicubic), the centre is cut out, channels are normalised."""

    def process(image: Image.Image) -> Tensor:
        size = tuple(side * edge // min(image.size) for edge in image.size)
        image = image.resize(size, Image.Resampling.BICUBIC)
        left, top = (round((edge - side) / 2) for edge in size)
        pixels = np.asarray(image.crop((left, top, left + side, top + side)), dtype=np.float32)
        pixels = (pixels / 255 - np.asarray(OPENAI_MEAN, np.float32)) / np.asarray(OPENAI_STD, np.float32)
        return torch.from_numpy(np.ascontiguousarray(pixels.transpose(2, 0, 1)))

    return ImageProcessing(process, f"CLIP's usual, {side}")


def _local(path: str | os.PathLike, files: tuple[str, ...], what: str) -> Path:
    path = Path(path)
    if not any((path / name).is_file() for name in files):
        raise ValueError(f"{what} must be a folder with {' or '.join(files)}, got {path}")
    return path


def folder_images(folder: str | os.PathLike) -> ImageProcessing:
    """As the preprocessor files of a transformers folder say."""
    from transformers import AutoImageProcessor

    folder = _local(folder, IMAGE_FILES, "image processor")
    try:
        processor = AutoImageProcessor.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers has no error of its own for files that are wrong
        raise ValueError(f"the image processor in {folder} cannot be loaded: {error}") from None

    def process(image: Image.Image) -> Tensor:
        return processor(images=[image], return_tensors="pt")["pixel_values"][0].float()

    return ImageProcessing(process, type(processor).__name__ + json.dumps(processor.to_dict(), default=str))


class TextProcessing:
    """B captions -> int64 [B, T], T the longest that the model takes: what a caption gives depends on no other."""

    def __init__(self, call: Callable[[list[str]], Tensor], mark: str):
        self._call, self.mark = call, mark

    def __call__(self, captions: list[str]) -> Tensor:
        return self._call(captions)


def folder_texts(folder: str | os.PathLike, context_length: int) -> TextProcessing:
    """By the tokenizer of a transformers folder; longer captions are cut, their end token is kept."""
    from transformers import AutoTokenizer

    folder = _local(folder, TEXT_FILES, "tokenizer")
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
    except Exception as error:
        raise ValueError(f"the tokenizer in {folder} cannot be loaded: {error}") from None
    if tokenizer.pad_token_id is None:
        raise ValueError(f"the tokenizer in {folder} must have a token for padding")

    def process(captions: list[str]) -> Tensor:
        found = tokenizer(
            captions, padding="max_length", truncation=True, max_length=context_length, return_tensors="pt"
        )
        return found["input_ids"]

    files = [folder / name for name in (*TEXT_FILES, "merges.txt", "special_tokens_map.json")]
    texts = [file.read_text("utf-8") for file in files if file.is_file()]
    return TextProcessing(process, json.dumps([type(tokenizer).__name__, context_length, texts]))
