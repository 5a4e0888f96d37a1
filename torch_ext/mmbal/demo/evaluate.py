"""Retrieval recalls of a CLIP on a fixed set of pairs. Deterministic: no augmentation, fixed captions."""

from __future__ import annotations

import torch
from tokenizers import Tokenizer
from transformers import CLIPModel

from mmbal.moe import collect_router

from .data import PAD, Pairs, prepared
from .model import embed_images, embed_texts

RANKS = (1, 5, 10)


def _recalls(scores: torch.Tensor) -> dict[str, float]:
    """scores [n, n], the match of query i in column i -> percent of queries whose match is among the best k."""
    own = scores.diagonal().unsqueeze(1)
    # Everything not clearly worse ranks before the match: ties and NaN never flatter a model.
    rank = (~(scores < own)).sum(1) - 1
    return {f"R@{k}": 100.0 * (rank < k).double().mean().item() for k in RANKS}


@torch.no_grad()
def features(
    model: CLIPModel, tokenizer: Tokenizer, pairs: Pairs, batch_size: int = 300
) -> tuple[torch.Tensor, torch.Tensor]:
    """Unit vectors of images and of fixed captions, [n, P] each."""
    was_training = model.training
    model.eval()
    inputs = prepared(pairs, tokenizer)
    images = [embed_images(model, part) for part in inputs["pixel_values"].split(batch_size)]
    texts = [embed_texts(model, part) for part in inputs["input_ids"].split(batch_size)]
    model.train(was_training)
    return torch.cat(images), torch.cat(texts)


def retrieval(model: CLIPModel, tokenizer: Tokenizer, pairs: Pairs) -> dict[str, dict[str, float]]:
    """{"image_to_text": {"R@1": ..., "R@5": ..., "R@10": ...}, "text_to_image": {...}}, in percent."""
    images, texts = features(model, tokenizer, pairs)
    scores = images.double() @ texts.double().T
    return {"image_to_text": _recalls(scores), "text_to_image": _recalls(scores.T)}


def mean_recall(result: dict[str, dict[str, float]]) -> float:
    """The mean of the six recalls."""
    return sum(value for side in result.values() for value in side.values()) / (2 * len(RANKS))


@torch.no_grad()
def expert_usage(model: CLIPModel, tokenizer: Tokenizer, pairs: Pairs, batch_size: int = 300) -> dict[str, list[float]]:
    """Share of the routed tokens that each expert takes, by layer; padding of captions is not counted."""
    inputs, counts = prepared(pairs, tokenizer), {}
    for embed, name in ((embed_images, "pixel_values"), (embed_texts, "input_ids")):
        for part in inputs[name].split(batch_size):
            with collect_router(model) as routers:
                embed(model, part)
            for record in routers:
                if embed is embed_texts:
                    record = record._replace(token_mask=(part != PAD).flatten())
                counts[record.name] = counts.get(record.name, 0) + record.counts
    return {name: (count / count.sum()).tolist() for name, count in counts.items()}
