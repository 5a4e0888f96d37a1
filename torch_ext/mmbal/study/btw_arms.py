"""What the study compares: ways to weigh modalities in one and the same fusion model, and what needs no such model.

Every arm of a seed starts from the same weights and sees the same batches; only the weights of the embeddings differ.

Shapes: N rows of a split, M modalities, C classes.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import mmbal

from .btw_models import Fusion, Unimodal, multiply
from .data import Data, Split
from .training import epochs

PARTS = ("train", "validation", "test")
Predictions = dict[str, dict[str, Tensor]]  # of each part and modality
METHODS = {  # arms whose weights are BTW's: arguments of Weighted
    "diverge": {"mode": "diverge", "factors": "kl+mi"},
    "diverge_mean": {"mode": "diverge", "factors": "kl+mi", "held_out": "mean"},
    "agree": {"mode": "agree", "factors": "kl+mi"},
    "kl": {"mode": "diverge", "factors": "kl"},
    "mi": {"factors": "mi"},
}
TITLES = {
    "plain": "plain fusion",
    "diverge": "BTW, diverge (KL and MI)",
    "diverge_mean": "BTW, diverge, mean weights at test",
    "agree": "BTW, agree (KL and MI)",
    "kl": "KL only, diverge",
    "mi": "MI only",
    "uniform": "uniform weights, sum 1",
    "single": "best single modality",
    "average": "average of all models",
    "published": "published protocol",
}
LEAKING = "published"
TRAINED = tuple(arm for arm in TITLES if arm not in ("single", "average"))


@dataclass(frozen=True)
class Recipe:
    """Every hyper-parameter of the models. BTW's own are the defaults of mmbal.BTW."""

    epochs: int = 40
    batch: int = 128
    learning_rate: float = 2e-3
    weight_decay: float = 1e-4

    @classmethod
    def quick(cls) -> Recipe:
        """Shows that it runs, not what it gains."""
        return cls(epochs=2)


@dataclass
class Outcome:
    """What an arm made of the test rows."""

    prediction: Tensor  # [N] standardised, or log-probabilities [N, C]
    weights: Tensor | None = None  # [N, M]
    best_epoch: int | None = None
    validation_loss: float | None = None
    seconds: float = 0.0


def loss_of(task: str, prediction: Tensor, target: Tensor) -> Tensor:
    """Absolute error (the metric of a regression) or cross entropy, mean of the rows."""
    return F.l1_loss(prediction, target) if task == "regression" else F.cross_entropy(prediction, target)


def adam(model: nn.Module, recipe: Recipe) -> torch.optim.Adam:
    return torch.optim.Adam(model.parameters(), lr=recipe.learning_rate, weight_decay=recipe.weight_decay, fused=True)


class Constant:
    """Weights that depend on nothing but which modalities are present: 1 each, or 1 / their number."""

    scale = staticmethod(multiply)

    def __init__(self, data: Data, uniform: bool):
        self.data, self.uniform = data, uniform
        self.train = self._of(data.train)

    def _of(self, split: Split) -> Tensor:
        present = split.present.float()
        return present / present.sum(1, keepdim=True) if self.uniform else present

    def training_weights(self, rows: Tensor) -> Tensor:
        """Weights [B, M] of these training rows."""
        return self.train[rows]

    def held_out(self, model: Fusion, part: str) -> tuple[Tensor, Tensor]:
        """Prediction and weights of a split, "validation" or "test"."""
        split = getattr(self.data, part)
        weights = self._of(split)
        return model(split.stacked, weights), weights

    def begin_evaluation(self, model: Fusion) -> None:
        """Called after each epoch, before the validation loss is taken."""

    def end_evaluation(self, model: Fusion, loss: float, improved: bool) -> None:
        """Called with the validation loss, after the test rows were predicted if that is the best so far."""


class Weighted:
    """BTW without any label of a held-out row: its rows get weights from predictions alone."""

    def __init__(self, data: Data, unimodal: Predictions, held_out: str = "own", **arguments):
        self.data, self.unimodal, self.own = data, unimodal, held_out == "own"
        self.btw = mmbal.BTW(data.modalities, data.task, len(data.train), **arguments)
        self.regression = data.task == "regression"

    def scale(self, embeddings: Sequence[Tensor], weights: Tensor) -> Sequence[Tensor]:
        return self.btw.apply(embeddings, weights=weights)

    def training_weights(self, rows: Tensor) -> Tensor:
        return self.btw.weights(rows) * self.data.train.present[rows]

    def update(self, model: Fusion, part: str, btw: mmbal.BTW) -> Tensor:
        """New weights in the table of a split from what the model predicts with those that it held: this prediction."""
        split, rows = getattr(self.data, part), torch.arange(len(getattr(self.data, part)))
        fused = model(split.stacked, btw.weights(rows) * split.present, self.scale)
        target = split.target if self.regression else None
        btw.update(rows, self.unimodal[part], fused, target, present=split.present)
        return fused

    def held_out(self, model: Fusion, part: str) -> tuple[Tensor, Tensor]:
        """Two passes: a first prediction with mean weights, from it the weights of each row, and the final one."""
        split, unimodal = getattr(self.data, part), self.unimodal[part]
        weights = self.btw.weights(present=split.present)
        prediction = model(split.stacked, weights, self.scale)
        if self.own:
            weights = self.btw.weights(unimodal=unimodal, fused=prediction, present=split.present)
            prediction = model(split.stacked, weights, self.scale)
        return prediction, weights

    def begin_evaluation(self, model: Fusion) -> None:
        fused, train = self.update(model, "train", self.btw), self.data.train
        if self.regression:
            rows = torch.arange(len(train))
            self.btw.fit_sigma(rows, self.unimodal["train"], fused, train.target, present=train.present)

    def end_evaluation(self, model: Fusion, loss: float, improved: bool) -> None:
        self.btw.step(loss)


class Published(Weighted):
    """The published protocol, which looks at the rows it is tested on.

    Each split has a table of its own, with the split's own mutual information. Regression: weights come from the
    residuals of the split's OWN LABELS, tables change after epochs with a new best validation loss, alpha goes by the
    TEST loss. Classification: no label is needed, but the test table, made once, takes all test rows together.
    """

    def __init__(self, data: Data, unimodal: Predictions):
        super().__init__(data, unimodal, mean_one=False)
        self.tables = {"train": self.btw}
        for part in ("validation", "test"):
            self.tables[part] = mmbal.BTW(data.modalities, data.task, len(getattr(data, part)), mean_one=False)

    def held_out(self, model: Fusion, part: str) -> tuple[Tensor, Tensor]:
        split, table = getattr(self.data, part), self.tables[part]
        if part == "test" and not self.regression:
            table = copy.deepcopy(table)  # still all ones: "once" is after the best epoch
            self.update(model, part, table)
        weights = table.weights(torch.arange(len(split))) * split.present
        return model(split.stacked, weights, self.scale), weights

    def begin_evaluation(self, model: Fusion) -> None:
        pass

    def end_evaluation(self, model: Fusion, loss: float, improved: bool) -> None:
        if self.regression and not improved:
            return
        for part in ("train", "validation", "test") if self.regression else ("train", "validation"):
            self.update(model, part, self.tables[part])
        if self.regression:
            prediction, _ = self.held_out(model, "test")
            loss = float(loss_of(self.data.task, prediction, self.data.test.target))
        for table in self.tables.values():
            table.step(loss)


def weighting_of(arm: str, data: Data, unimodal: Predictions) -> Constant | Weighted:
    """The weights that a trained arm gives."""
    if arm in METHODS:
        return Weighted(data, unimodal, **METHODS[arm])
    return Published(data, unimodal) if arm == LEAKING else Constant(data, uniform=arm == "uniform")


def train_unimodal(data: Data, name: str, recipe: Recipe, seed: int) -> tuple[dict[str, Tensor], float]:
    """Predictions of every split by a model of one modality, and its validation loss where that is present."""
    torch.manual_seed(seed)
    position = data.modalities.index(name)
    model = Unimodal(data.columns[position], data.outputs)
    train, validation = data.train, data.validation
    seen = validation.present[:, position]

    def batch_loss(rows: Tensor) -> Tensor:
        return loss_of(data.task, model(train.inputs[name][rows]), train.target[rows])

    predictions, best = {}, None
    rows = train.present[:, position].nonzero().squeeze(1)
    for _ in epochs(model, adam(model, recipe), rows, batch_loss, recipe, seed):
        with torch.no_grad():
            loss = float(loss_of(data.task, model(validation.inputs[name])[seen], validation.target[seen]))
            if best is None or loss < best:
                best = loss
                predictions = {part: model(getattr(data, part).inputs[name]) for part in PARTS}
    return predictions, best


def train_fusion(arm: str, data: Data, unimodal: Predictions, recipe: Recipe, seed: int) -> Outcome:
    """Train one arm; the test rows are predicted by the epoch with the best validation loss."""
    started = time.perf_counter()
    torch.manual_seed(seed)
    model = Fusion(data.columns, data.outputs)
    weighting = weighting_of(arm, data, unimodal)
    train = data.train

    def batch_loss(rows: Tensor) -> Tensor:
        prediction = model(train.stacked[:, rows], weighting.training_weights(rows), weighting.scale)
        return loss_of(data.task, prediction, train.target[rows])

    best = None
    for epoch in epochs(model, adam(model, recipe), torch.arange(len(train)), batch_loss, recipe, seed):
        with torch.no_grad():
            weighting.begin_evaluation(model)
            prediction, _ = weighting.held_out(model, "validation")
            loss = float(loss_of(data.task, prediction, data.validation.target))
            improved = best is None or loss < best.validation_loss
            if improved:
                best = Outcome(*weighting.held_out(model, "test"), epoch, loss)
            weighting.end_evaluation(model, loss, improved)
    best.seconds = time.perf_counter() - started
    return best


def single(data: Data, predictions: dict[str, Tensor], losses: dict[str, float]) -> Outcome:
    """Of each test row the prediction of its best present modality, in the order of the validation losses."""
    order = sorted(data.modalities, key=losses.__getitem__)
    present = data.test.present[:, [data.modalities.index(name) for name in order]]
    first = present.float().argmax(1)
    rows = torch.arange(len(data.test))
    chosen = torch.stack([predictions[name] for name in order])[first, rows]
    weights = torch.zeros(len(rows), len(order))
    weights[rows, torch.tensor([data.modalities.index(name) for name in order])[first]] = 1
    return Outcome(chosen, weights, validation_loss=losses[order[0]])


def average(data: Data, fused: Tensor, predictions: dict[str, Tensor]) -> Outcome:
    """Mean of the plain fusion's prediction (of classes: probability) and of those of the present modalities."""
    every = torch.stack([fused, *predictions.values()])
    present = torch.cat([torch.ones(1, len(data.test)), data.test.present.T.float()])
    share = present / present.sum(0)
    if data.task == "regression":
        return Outcome((every * share).sum(0))
    return Outcome((every.softmax(-1) * share[..., None]).sum(0).log())


def run_arms(data: Data, recipe: Recipe, seed: int, trained: Callable[[], None] = lambda: None):
    """Every arm of one setting and seed: ({arm: Outcome}, {modality: test prediction}, seconds of the latter).

    trained() is called after each training.
    """
    started = time.perf_counter()
    unimodal: Predictions = {part: {} for part in PARTS}
    losses = {}
    for name in data.modalities:
        predictions, losses[name] = train_unimodal(data, name, recipe, seed)
        trained()
        for part, values in predictions.items():
            unimodal[part][name] = values
    unimodal_seconds = time.perf_counter() - started
    outcomes = {}
    for arm in TRAINED:
        outcomes[arm] = train_fusion(arm, data, unimodal, recipe, seed)
        trained()
    outcomes["single"] = single(data, unimodal["test"], losses)
    outcomes["average"] = average(data, outcomes["plain"].prediction, unimodal["test"])
    return {arm: outcomes[arm] for arm in TITLES}, unimodal["test"], unimodal_seconds
