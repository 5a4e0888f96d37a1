"""The training loop and the scores that the studies share. Shapes: N rows, B batch, C classes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn


def epochs(
    model: nn.Module,
    optimiser: torch.optim.Optimizer,
    rows: Tensor,
    batch_loss: Callable[[Tensor], Tensor],
    recipe,
    seed: int,
    after_backward: Callable[[], None] = lambda: None,
) -> Iterator[int]:
    """Train on the training rows with these numbers [N]; after each epoch its number, the model in evaluation mode.

    The learning rate falls as half a cosine to zero. after_backward() may change gradients.
    """
    rates = [group["lr"] for group in optimiser.param_groups]
    generator = torch.Generator().manual_seed(seed)
    for epoch in range(recipe.epochs):
        for group, rate in zip(optimiser.param_groups, rates, strict=True):
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * epoch / recipe.epochs))
        model.train()
        for batch in rows[torch.randperm(len(rows), generator=generator)].split(recipe.batch):
            optimiser.zero_grad(set_to_none=True)
            batch_loss(batch).backward()
            after_backward()
            optimiser.step()
        model.eval()
        yield epoch + 1


def classification_metrics(prediction: Tensor, target: Tensor) -> dict[str, float]:
    """Accuracy and macro F1 of logits (or probabilities) [N, C] against classes [N]."""
    said = prediction.argmax(1)
    scores = []
    for label in range(prediction.shape[1]):
        right = int(((said == label) & (target == label)).sum())
        scores.append(2 * right / max(1, int((said == label).sum() + (target == label).sum())))
    return {"accuracy": float((said == target).double().mean()), "macro_f1": sum(scores) / len(scores)}
