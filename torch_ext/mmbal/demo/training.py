"""One training loop for every stage of the demo. Shapes: B batch, T caption tokens."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from tokenizers import Tokenizer
from torch import Tensor, nn

from mmbal.distributed import clip_loss
from mmbal.moe import collect_router, router_losses

from . import data
from .model import embed_images, embed_texts


def cosine(step: int, steps: int, warmup: int) -> float:
    """Linear warm-up, then half a cosine to zero: the share of the full learning rate at this step."""
    if step < warmup:
        return (step + 1) / warmup
    return 0.5 * (1 + math.cos(math.pi * (step - warmup) / max(1, steps - warmup)))


def adamw(parameters: Iterable[Tensor], learning_rate: float, weight_decay: float) -> torch.optim.AdamW:
    """Matrices decay; biases, LayerNorms and the logit scale do not."""
    trainable = list(parameters)
    groups = [
        {"params": [p for p in trainable if p.ndim > 1], "weight_decay": weight_decay},
        {"params": [p for p in trainable if p.ndim <= 1], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=learning_rate, betas=(0.9, 0.98))


class Epochs:
    """Batches of indices: every item once an epoch, in a new order each time, forever."""

    def __init__(self, items: Sequence[int], batch_size: int, rng: random.Random):
        self.items, self.batch_size, self.rng, self.queue = items, batch_size, rng, []

    def __iter__(self) -> Iterator[list[int]]:
        return self

    def __next__(self) -> list[int]:
        while len(self.queue) < self.batch_size:
            self.queue += self.rng.sample(self.items, len(self.items))
        taken, self.queue = self.queue[: self.batch_size], self.queue[self.batch_size :]
        return taken


@dataclass
class Step:
    """What one step did."""

    number: int  # counted from 1
    loss: float  # contrastive part, averaged over the last steps
    learning_rate: float
    tokens: int  # patch and caption positions that the towers saw


def optimise(
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    learning_rate: float,
    steps: int,
    batches: Iterator[list[int]],
    pairs: data.Pairs,
    tokenizer: Tokenizer,
    rng: random.Random,
    generator: torch.Generator,
    warmup: int,
    label_smoothing: float,
    balance: float = 0.0,
    first: int = 0,
    running: float | None = None,
) -> Iterator[Step]:
    """Train from step `first` to `steps`, one `Step` at a time; `balance` weighs the routers' load-balance loss."""
    patches = model.vision_model.embeddings.num_positions
    trained = [p for group in optimizer.param_groups for p in group["params"]]
    model.train()
    for step in range(first, steps):
        rate = learning_rate * cosine(step, steps, warmup)
        for group in optimizer.param_groups:
            group["lr"] = rate
        pixels, ids = data.batch(pairs, next(batches), tokenizer, rng, generator)
        with collect_router(model) if balance else nullcontext() as routers:
            images, texts = embed_images(model, pixels), embed_texts(model, ids)
        contrastive = clip_loss(images, texts, model.logit_scale.exp(), label_smoothing)
        loss = contrastive + router_losses(routers, load_balance=balance).total if balance else contrastive
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        with torch.no_grad():
            model.logit_scale.clamp_(max=math.log(100.0))
        value = contrastive.item()
        running = value if running is None else 0.98 * running + 0.02 * value
        yield Step(step + 1, running, rate, len(ids) * (patches + ids.shape[1]))
    model.eval()
