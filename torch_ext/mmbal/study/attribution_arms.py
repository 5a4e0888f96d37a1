"""What the study of attribution regularisation compares: one late-fusion model, trained with different wishes for the
modalities' shares in its decisions.

Every arm of a seed starts from the same weights and sees the same batches. Shapes: N rows of a split, B batch, M
modalities, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import mmbal

from .amss_arms import CHOICES, accuracy
from .amss_data import DataSet
from .amss_models import Fusion
from .data import Data
from .training import classification_metrics, epochs

WEIGHT, STRONG_WEIGHT = 0.1, 1.0  # of the penalty beside the task's loss: the class's advice, and ten times that
DROPPED = 0.3  # probability that a modality of a training row is dropped
LEAST_SHARE = 0.05  # of a modality that is no better than the most frequent class
TITLES = {
    "plain": "plain",
    "uniform": "equal shares",
    "uniform_strong": "equal shares, weight 1",
    "strength": "shares by unimodal strength",
    "entropy": "entropy bonus on shares",
    "dropout": "modality dropout",
}
CONDITIONS = {
    "clean": "clean test rows",
    "corrupted": "strong modality of another row",
    "missing": "strong modality missing",
}
Penalty = Callable[[dict[str, Tensor], Tensor], Tensor]


@dataclass(frozen=True)
class Recipe:
    """None: what the data set says. Learning rate and weight decay are those of Adam in the study of AMSS."""

    epochs: int | None = None
    weight: float = WEIGHT
    strong_weight: float = STRONG_WEIGHT
    dropped: float = DROPPED

    @classmethod
    def quick(cls) -> Recipe:
        """Shows that it runs, not what it gains."""
        return cls(epochs=2)


@dataclass(frozen=True)
class Training:
    """One data set's part of the recipe, as the training loop reads it."""

    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float

    @classmethod
    def of(cls, recipe: Recipe, data_set: DataSet) -> Training:
        choice = CHOICES[f"{data_set.name}-adam"]
        return cls(recipe.epochs or data_set.epochs, data_set.batch, choice.learning_rate, choice.weight_decay)


@dataclass
class Outcome:
    """What an arm made of the test rows in the epoch with the best validation accuracy, then loss."""

    predictions: dict[str, Tensor]  # by condition, logits [N, C]
    shares: dict[str, float]  # mean of the clean test rows
    best_epoch: int
    validation_accuracy: float
    validation_loss: float
    seconds: float = 0.0

    @property
    def rank(self) -> tuple[float, float]:
        return self.validation_accuracy, -self.validation_loss


def strengths(alone: dict[str, float], majority: float) -> dict[str, float]:
    """Shares by how much better than the most frequent class each modality alone is on validation rows."""
    gains = {name: max(accuracy - majority, 0.0) for name, accuracy in alone.items()}
    total = sum(gains.values())
    if total == 0:
        return {name: 1 / len(gains) for name in gains}
    raised = {name: max(gain / total, LEAST_SHARE) for name, gain in gains.items()}
    return {name: share / sum(raised.values()) for name, share in raised.items()}


def entropy_of_shares(head: torch.nn.Linear, features: dict[str, Tensor]) -> Tensor:
    """Mean entropy of the shares [B, M] over the batch, with gradients for the head alone."""
    leaves = [z.detach().requires_grad_() for z in features.values()]
    logits = head(torch.cat(leaves, 1))
    chosen = F.one_hot(logits.argmax(1), logits.shape[1]).bool()
    odds = logits[chosen] - logits.masked_fill(chosen, -torch.inf).logsumexp(1)
    gradients = torch.autograd.grad(odds.sum(), leaves, create_graph=True)
    _, shares, _ = torch.ops.mmbal.attribution_reg(
        list(gradients), [z.detach() for z in leaves], torch.ones(len(leaves))
    )
    return torch.special.entr(shares).sum(1).mean()


def drop(features: dict[str, Tensor], probability: float, generator: torch.Generator) -> dict[str, Tensor]:
    """Features of some modalities of each row set to zero; one at least is left."""
    rows, M = next(iter(features.values())).shape[0], len(features)
    kept = torch.rand(rows, M, generator=generator) >= probability
    saved = torch.randint(M, (rows,), generator=generator)
    kept[torch.arange(rows), saved] |= ~kept.any(1)
    return {name: z * kept[:, m, None] for m, (name, z) in enumerate(features.items())}


def penalty_of(arm: str, model: Fusion, recipe: Recipe, asked: dict[str, float]) -> Penalty | None:
    """What an arm adds to the task's loss, of features and logits."""
    if arm in ("uniform", "uniform_strong", "strength"):
        shares = asked if arm == "strength" else None
        regularizer = mmbal.AttributionRegularizer(list(model.encoders), model.head, shares=shares)
        weight = recipe.strong_weight if arm == "uniform_strong" else recipe.weight
        return lambda features, logits: weight * regularizer(features, logits)[0]
    if arm == "entropy":
        return lambda features, logits: -recipe.weight * entropy_of_shares(model.head, features)
    return None


def train(
    arm: str,
    data: Data,
    training: Training,
    recipe: Recipe,
    seed: int,
    strong: str,
    asked: dict[str, float],
) -> Outcome:
    """Train one arm and predict the test rows under every condition."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    model = Fusion(data.train.inputs, data.outputs)
    penalty = penalty_of(arm, model, recipe, asked)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
    )
    generator = torch.Generator().manual_seed(seed)
    shuffled = torch.randperm(len(data.test), generator=torch.Generator().manual_seed(seed))

    def batch_loss(rows: Tensor) -> Tensor:
        inputs, target = {name: x[rows] for name, x in data.train.inputs.items()}, data.train.target[rows]
        logits, features = model(inputs)
        if arm == "dropout":
            logits = model.head(torch.cat(list(drop(features, recipe.dropped, generator).values()), 1))
        loss = F.cross_entropy(logits, target)
        return loss if penalty is None else loss + penalty(features, logits)

    best = None
    rows = torch.arange(len(data.train))
    for epoch in epochs(model, optimizer, rows, batch_loss, training, seed):
        with torch.no_grad():
            logits, _ = model(data.validation.inputs)
            right, loss = (
                accuracy(logits, data.validation.target),
                float(F.cross_entropy(logits, data.validation.target)),
            )
            if best is None or (right, -loss) > best.rank:
                best = Outcome(*_on_test(model, data, strong, shuffled), epoch, right, loss)
    best.seconds = time.perf_counter() - started
    return best


def _on_test(model: Fusion, data: Data, strong: str, shuffled: Tensor) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Logits under every condition, and mean shares."""
    clean, features = model(data.test.inputs)
    _, known = model(data.train.inputs)
    monitor = mmbal.AttributionRegularizer(list(model.encoders), model.head)
    _, info = monitor(features, clean)

    def with_strong(values: Tensor) -> Tensor:
        return model.head(torch.cat(list({**features, strong: values}.values()), 1))

    corrupted = with_strong(features[strong][shuffled])
    missing = with_strong(known[strong].mean(0).expand_as(features[strong]))
    return {"clean": clean, "corrupted": corrupted, "missing": missing}, info.mean()


def train_alone(data: Data, training: Training, seed: int, name: str) -> float:
    """Best validation accuracy of a model of one modality."""
    torch.manual_seed(seed)
    inputs = {name: data.train.inputs[name]}
    model = Fusion(inputs, data.outputs)
    optimizer = torch.optim.Adam(
        model.parameters(), lr=training.learning_rate, weight_decay=training.weight_decay, fused=True
    )

    def batch_loss(rows: Tensor) -> Tensor:
        return F.cross_entropy(model({name: inputs[name][rows]})[0], data.train.target[rows])

    best = 0.0
    for _ in epochs(model, optimizer, torch.arange(len(data.train)), batch_loss, training, seed):
        with torch.no_grad():
            logits, _ = model({name: data.validation.inputs[name]})
            best = max(best, accuracy(logits, data.validation.target))
    return best


def run_arms(data: Data, training: Training, recipe: Recipe, seed: int, trained: Callable[[], None] = lambda: None):
    """Every arm of one data set and seed: ({arm: Outcome}, {modality: validation accuracy alone}, asked shares, the
    strong modality). trained() is called after each training."""
    alone = {}
    for name in data.modalities:
        alone[name] = train_alone(data, training, seed, name)
        trained()
    majority = float(torch.bincount(data.validation.target).max() / len(data.validation))
    asked, strong = strengths(alone, majority), max(alone, key=alone.__getitem__)
    outcomes = {}
    for arm in TITLES:
        outcomes[arm] = train(arm, data, training, recipe, seed, strong, asked)
        trained()
    return outcomes, alone, asked, strong


def as_numbers(outcome: Outcome, target: Tensor) -> dict:
    """An outcome without its predictions, with the metrics of the test rows under each condition."""
    numbers = {name: value for name, value in vars(outcome).items() if name != "predictions"}
    return {"metrics": {c: classification_metrics(z, target) for c, z in outcome.predictions.items()}, **numbers}
