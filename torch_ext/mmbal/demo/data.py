"""Image-caption pairs of the demo: emoji and clip art, 48 x 48 pixels, in three splits that share no title.

Shapes: n pairs, B batch, T caption tokens.
"""

from __future__ import annotations

import csv
import random
import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

ASSETS = Path(__file__).parent / "assets"
TILE = 48
TEST_PAIRS, VALIDATION_PAIRS = 600, 300
MAX_TOKENS = 20
PAD, BOS, UNKNOWN, EOS = 0, 1, 2, 3  # transformers reads eos_token_id 2 as "pool at the largest id", so EOS is not 2


def _sentence(title: str, keywords: Sequence[str]) -> str:
    return f"{title}, {' '.join(keywords)}" if keywords else title


@dataclass(frozen=True)
class Caption:
    """What is written about one picture: a title, its keywords, and its title in other languages."""

    title: str
    keywords: tuple[str, ...] = ()
    translations: tuple[str, ...] = ()

    def fixed(self) -> str:
        """The caption used for every evaluation."""
        return _sentence(self.title, self.keywords)

    def sampled(self, rng: random.Random) -> str:
        """A training caption: the title (or a translation of it) with a random part of the keywords, shuffled."""
        title = rng.choice(self.translations) if self.translations and rng.random() < 0.1 else self.title
        keywords = rng.sample(self.keywords, rng.randint(0, len(self.keywords)))
        if keywords and rng.random() < 0.15:
            return " ".join(keywords)
        if rng.random() < 0.3:  # a word less: the model must not hang on one rare word
            words = title.split()
            if len(words) > 1:
                del words[rng.randrange(len(words))]
                title = " ".join(words)
        return _sentence(title, keywords)


@dataclass
class Pairs:
    """images uint8 [n, 3, 48, 48] and one caption each."""

    images: torch.Tensor
    captions: list[Caption]

    def __len__(self) -> int:
        return len(self.captions)

    def subset(self, index: list[int]) -> Pairs:
        return Pairs(self.images[index], [self.captions[i] for i in index])


@dataclass
class Splits:
    train: Pairs
    validation: Pairs
    test: Pairs


def tiles(name: str, count: int) -> torch.Tensor:
    """Cut a sheet, row by row, into uint8 [count, 3, 48, 48]."""
    sheet = np.asarray(Image.open(ASSETS / name).convert("RGB"))
    rows, columns = sheet.shape[0] // TILE, sheet.shape[1] // TILE
    cut = sheet.reshape(rows, TILE, columns, TILE, 3).transpose(0, 2, 4, 1, 3).reshape(-1, 3, TILE, TILE)
    return torch.from_numpy(cut[:count].copy())


def read_table(name: str) -> list[dict[str, str]]:
    """Rows of a table of this folder."""
    with open(ASSETS / name, encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE))


def _keywords(text: str, title: str) -> tuple[str, ...]:
    words = [word.strip().replace("_", " ") for word in text.split("|")]
    return tuple(dict.fromkeys(word for word in words if word and word.lower() != title.lower()))


def load_pairs() -> Pairs:
    """All 4,807 pairs."""
    emoji, clipart = read_table("emoji.tsv"), read_table("clipart.tsv")
    captions = [
        Caption(
            row["name_en"],
            _keywords(row["keywords_en"], row["name_en"]),
            tuple(row[key] for key in ("name_fr", "name_de", "name_es") if row[key]),
        )
        for row in emoji
    ]
    captions += [Caption(row["title"], _keywords(row["keywords"], row["title"])) for row in clipart]
    images = torch.cat([tiles("emoji48.png", len(emoji)), tiles("clipart48.png", len(clipart))])
    return Pairs(images, captions)


def title_key(title: str) -> str:
    """Titles that differ in case, digits or punctuation only are one title ("glace 7 bw", "Glace 8 BW")."""
    return " ".join(re.findall(r"[^\W\d_]+", title.lower())) or title.lower()


def split_pairs(pairs: Pairs, seed: int = 0) -> Splits:
    """600 test and 300 validation pairs whose titles occur once in all the data; every other pair trains.

    A title that repeats would be found in two splits, or twice in one with no way to tell the copies apart.
    """
    keys = [title_key(caption.title) for caption in pairs.captions]
    counts = Counter(keys)
    single = [i for i, key in enumerate(keys) if counts[key] == 1]
    random.Random(seed).shuffle(single)
    test = sorted(single[:TEST_PAIRS])
    validation = sorted(single[TEST_PAIRS : TEST_PAIRS + VALIDATION_PAIRS])
    held_out = {*test, *validation}
    train = [i for i in range(len(pairs)) if i not in held_out]
    return Splits(pairs.subset(train), pairs.subset(validation), pairs.subset(test))


def load_splits(seed: int = 0) -> Splits:
    return split_pairs(load_pairs(), seed)


def train_tokenizer(pairs: Pairs, vocabulary: int = 4096) -> Tokenizer:
    """Byte-pair encoding over the training captions: unseen words still fall into known pieces.

    The start of a word is marked in the text ("▁word"). Marking its end by an option of the trainer would number the
    pieces in the order of a hash table, another one in every process.
    """
    tokenizer = Tokenizer(models.BPE(unk_token="<unknown>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always"),
            pre_tokenizers.Punctuation(),
            pre_tokenizers.Digits(individual_digits=True),
        ]
    )
    tokenizer.decoder = decoders.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary,
        special_tokens=["<pad>", "<start>", "<unknown>", "<end>"],
        min_frequency=2,
        show_progress=False,
    )
    lines = [text for c in pairs.captions for text in (c.fixed(), *c.translations)]
    tokenizer.train_from_iterator(lines, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: list[str]) -> torch.Tensor:
    """Token ids int64 [B, T], T the longest caption here (at most 20); the tail after <end> is padding."""
    rows = [[BOS, *encoding.ids[: MAX_TOKENS - 2], EOS] for encoding in tokenizer.encode_batch(texts)]
    ids = torch.full((len(rows), max(map(len, rows), default=2)), PAD)
    for row, out in zip(rows, ids, strict=True):
        out[: len(row)] = torch.tensor(row)
    return ids


def prepared(pairs: Pairs, tokenizer: Tokenizer) -> dict[str, torch.Tensor]:
    """Pictures and fixed captions as `mmbal mcl extract` takes them: what a CLIP sees in every evaluation."""
    ids = encode(tokenizer, [caption.fixed() for caption in pairs.captions])
    return {"pixel_values": normalize(pairs.images), "input_ids": ids}


def normalize(images: torch.Tensor) -> torch.Tensor:
    """uint8 or float 0..255 [B, 3, 48, 48] -> float32 in [-1, 1]; white paper is 1."""
    return images.float() / 127.5 - 1.0


def augment(images: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random flip, rotation, scale, shift and colour of uint8 [B, 3, 48, 48] -> normalised float32, same shape."""
    count = len(images)

    def uniform(low: float, high: float, *shape: int) -> torch.Tensor:
        return torch.rand(count, *shape, generator=generator) * (high - low) + low

    angle, scale, stretch = uniform(-0.2, 0.2), uniform(0.75, 1.15), uniform(0.9, 1.1)
    flip = torch.where(uniform(0, 1) < 0.5, -1.0, 1.0)
    cos, sin = angle.cos() * scale, angle.sin() * scale
    affine = torch.stack(
        [
            torch.stack([cos * flip * stretch, -sin, uniform(-0.15, 0.15)], -1),
            torch.stack([sin * flip * stretch, cos, uniform(-0.15, 0.15)], -1),
        ],
        1,
    )  # [B, 2, 3]
    grid = F.affine_grid(affine, list(images.shape), align_corners=False)
    # 0 stands for white paper while the picture moves, so that the border fills with paper.
    moved = F.grid_sample(normalize(images) - 1.0, grid, align_corners=False)
    gain, channel_gain = uniform(0.75, 1.15, 1, 1, 1), uniform(0.85, 1.15, 3, 1, 1)
    grey = moved.mean(1, keepdim=True)
    saturation = uniform(0.6, 1.2, 1, 1, 1)
    return (grey + saturation * (moved - grey)) * gain * channel_gain + 1.0


def batch(
    pairs: Pairs, index: list[int], tokenizer: Tokenizer, rng: random.Random, generator: torch.Generator
) -> tuple[torch.Tensor, torch.Tensor]:
    """One augmented training batch: pixels float32 [B, 3, 48, 48], ids int64 [B, T]."""
    texts = [pairs.captions[i].sampled(rng) for i in index]
    return augment(pairs.images[index], generator), encode(tokenizer, texts)
