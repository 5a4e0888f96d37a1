"""What the study of AMSS compares: ways to change the gradients of one and the same late-fusion model.

Every arm of a seed starts from the same weights and sees the same batches.

Shapes: N rows of a split, B batch, C classes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmbal

from .amss_data import DataSet
from .amss_models import Fusion
from .data import Data
from .ogm import OGM
from .training import classification_metrics, epochs

METHODS = {  # arms whose masks are AMSS's: arguments of mmbal.AMSS
    "amss": {},
    "amss_plus": {"plus": True},
    "uniform": {"sampler": "uniform"},
    "topk": {"sampler": "topk"},
}
TITLES = {
    "joint": "joint training",
    "amss": "AMSS",
    "amss_plus": "AMSS+",
    "uniform": "uniform random masks",
    "topk": "top-k masks",
    "ogm": "OGM-GE",
    "single": "best single modality",
}
FUSED = tuple(arm for arm in TITLES if arm != "single")
OPTIMIZERS = ("sgd", "adam")
OPTIMIZER_TITLES = {"sgd": "SGD", "adam": "Adam"}
Balance = Callable[[dict[str, Tensor], dict[str, Tensor], Tensor], dict[str, float]]


@dataclass(frozen=True)
class Choice:
    """Learning rate and weight decay of joint training, and alpha of OGM-GE, all chosen on validation rows."""

    learning_rate: float
    weight_decay: float
    alpha: float


CHOICES = {  # by `python -m mmbal.study.amss_tuning`; AMSS's own values are its defaults
    "cells-sgd": Choice(0.03, 1e-4, 0.3),
    "cells-adam": Choice(1e-3, 1e-4, 0.8),
    "chicago-sgd": Choice(0.1, 1e-4, 0.1),
    "chicago-adam": Choice(3e-3, 1e-4, 0.8),
    "clipart-sgd": Choice(0.1, 1e-2, 0.1),
    "clipart-adam": Choice(1e-3, 1e-4, 0.1),
}


@dataclass(frozen=True)
class Recipe:
    """Every hyper-parameter of the models; None: what the data set says."""

    epochs: int | None = None
    batch: int | None = None
    choices: dict[str, Choice] = field(default_factory=lambda: dict(CHOICES))

    @classmethod
    def quick(cls) -> Recipe:
        """Shows that it runs, not what it gains."""
        return cls(epochs=2)


@dataclass(frozen=True)
class Training:
    """One setting of the recipe, as the training loop reads it."""

    optimizer: str
    epochs: int
    batch: int
    learning_rate: float
    weight_decay: float
    alpha: float

    @classmethod
    def of(cls, recipe: Recipe, data_set: DataSet, optimizer: str) -> Training:
        choice = recipe.choices[f"{data_set.name}-{optimizer}"]
        return cls(optimizer, recipe.epochs or data_set.epochs, recipe.batch or data_set.batch, **asdict(choice))

    def make_optimizer(self, model: nn.Module) -> torch.optim.Optimizer:
        arguments = {"lr": self.learning_rate, "weight_decay": self.weight_decay, "fused": True}
        if self.optimizer == "adam":
            return torch.optim.Adam(model.parameters(), **arguments)
        return torch.optim.SGD(model.parameters(), momentum=0.9, **arguments)


@dataclass
class Outcome:
    """What an arm made of the test rows, and what it went through, an entry an epoch."""

    prediction: Tensor  # [N, C], as the next three of the epoch with the best validation accuracy, then loss
    best_epoch: int
    validation_accuracy: float
    validation_loss: float
    own_accuracy: dict[str, list[float]]  # validation rows right by a modality's own logits
    ratio: dict[str, list[float]]  # rho, or the coefficient of OGM-GE: the mean of an epoch's steps; empty: neither
    seconds: float = 0.0

    @property
    def rank(self) -> tuple[float, float]:
        """The larger the better on validation rows."""
        return self.validation_accuracy, -self.validation_loss


def balance_of(arm: str, model: Fusion, training: Training, seed: int) -> Balance | None:
    """What an arm does between backward and the optimizer's step, given own logits, features and classes."""
    encoders = dict(model.encoders.items())
    if arm in METHODS:
        amss = mmbal.AMSS(encoders, seed=seed, **METHODS[arm])

        def mask(own: dict[str, Tensor], features: dict[str, Tensor], target: Tensor) -> dict[str, float]:
            amss.step({name: (own[name], features[name]) for name in features}, target)
            return amss.rho

        return mask
    if arm == "ogm":
        ogm = OGM(encoders, training.alpha, seed)
        return lambda own, features, target: ogm.step(own, target)
    return None


def train(arm: str, data: Data, training: Training, seed: int, modality: str | None = None) -> Outcome:
    """Train one arm, or (joint training of) one modality alone."""
    started = time.perf_counter()
    names = (modality,) if modality else data.modalities
    splits = {
        part: ({name: getattr(data, part).inputs[name] for name in names}, getattr(data, part).target)
        for part in ("train", "validation", "test")
    }
    inputs, targets = splits["train"]
    torch.manual_seed(seed)
    model = Fusion(inputs, data.outputs)
    balance = balance_of(arm, model, training, seed)
    seen: tuple[dict[str, Tensor], Tensor] | None = None  # features and classes of the batch
    ratios: list[dict[str, float]] = []

    def batch_loss(rows: Tensor) -> Tensor:
        nonlocal seen
        target = targets[rows]
        logits, features = model({name: values[rows] for name, values in inputs.items()})
        seen = {name: values.detach() for name, values in features.items()}, target
        return F.cross_entropy(logits, target)

    def after_backward() -> None:
        if balance is not None:
            features, target = seen
            ratios.append(balance(model.own_logits(features), features, target))

    best: Outcome | None = None
    own_accuracy: dict[str, list[float]] = {name: [] for name in names}
    ratio: dict[str, list[float]] = {}
    optimizer = training.make_optimizer(model)
    for epoch in epochs(model, optimizer, torch.arange(len(targets)), batch_loss, training, seed, after_backward):
        if ratios:
            for name in names:
                ratio.setdefault(name, []).append(sum(step[name] for step in ratios) / len(ratios))
            ratios.clear()
        with torch.no_grad():
            held_out, classes = splits["validation"]
            logits, features = model(held_out)
            for name, own in model.own_logits(features).items():
                own_accuracy[name].append(accuracy(own, classes))
            right, loss = accuracy(logits, classes), float(F.cross_entropy(logits, classes))
            if best is None or (right, -loss) > best.rank:
                best = Outcome(model(splits["test"][0])[0], epoch, right, loss, own_accuracy, ratio)
    best.seconds = time.perf_counter() - started
    return best


def accuracy(logits: Tensor, target: Tensor) -> float:
    return float((logits.argmax(1) == target).double().mean())


def run_arms(data: Data, training: Training, seed: int, trained: Callable[[], None] = lambda: None):
    """Every arm of one setting and seed, and every modality alone: ({arm: Outcome}, {modality: Outcome}).

    trained() is called after each training. The best single modality is the one that is best on validation rows.
    """
    alone, outcomes = {}, {}
    for name in data.modalities:
        alone[name] = train("joint", data, training, seed, name)
        trained()
    for arm in FUSED:
        outcomes[arm] = train(arm, data, training, seed)
        trained()
    outcomes["single"] = max(alone.values(), key=lambda outcome: outcome.rank)
    return outcomes, alone


def as_numbers(outcome: Outcome, target: Tensor) -> dict:
    """An outcome without its prediction, with the metrics of the test rows."""
    numbers = {name: value for name, value in vars(outcome).items() if name != "prediction"}
    return {"metrics": classification_metrics(outcome.prediction, target), **numbers}
