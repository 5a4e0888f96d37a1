"""What the study of Alt-MoE compares: ways to train a connector between views, and to add one to a trained connector.

Every arm of a seed sees each direction in the same number of batches, so that all cost about as many passes. Shapes: B
batch.
"""

from __future__ import annotations

import copy
import math
import time
from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import permutations

import torch
from torch import Tensor

from mmbal import AlignLoss, AlternatingTrainer, DirectionSchedule, MoEConnector, ResumableBatchSampler
from mmbal.altmoe.parts import Direction

from .altmoe_data import DataSet, Views

KS = (1, 5, 10)
TITLES = {
    "alternating": "alternating, mixture, shared",
    "joint": "joint: all directions in each step",
    "mlp": "MLP of equal active parameters",
    "wide_mlp": "MLP of equal parameters, all active",
    "by_direction": "moments for each direction",
    "v6": "gates of the paper's text",
    "separate": "a connector for each direction",
}
GROWTH = {
    "frozen": "new parts alone are trained",
    "new": "all is trained, on new directions",
    "all": "all is trained, on all directions",
    "scratch": "seven views from the start",
}


@dataclass(frozen=True)
class Recipe:
    """Learning rates were chosen on validation digits of another seed, as results.md tells."""

    epochs: int = 8  # passes over the training digits in each direction
    batch: int = 100
    hidden: int = 128
    experts: int = 8
    top_k: int = 2
    dropout: float = 0.1
    learning_rate: float = 1.6e-2
    joint_learning_rate: float = 2e-2
    weight_decay: float = 0.05
    evaluations: int = 10  # during a training

    @classmethod
    def quick(cls) -> Recipe:
        """Shows that it runs, not what it gains."""
        return cls(epochs=1, hidden=32, experts=4, evaluations=2)


@dataclass
class Outcome:
    """Of the evaluation with the best mean recall@1 on validation digits."""

    recalls: dict[str, dict[str, float]]  # of test digits, "fou->fac" -> {"1": ..., "5": ..., "10": ...}
    validation: float
    best_epoch: float
    parameters: int
    seconds: float = 0.0
    usage: dict[str, list] = field(default_factory=dict)  # of test digits, by direction: [2, experts] shares
    connector: MoEConnector | None = None


def as_text(direction: Direction) -> str:
    return f"{direction[0]}->{direction[1]}"


def plain(found: dict) -> dict[str, dict[str, float]]:
    """Recalls as JSON has them."""
    return {as_text(direction): {str(k): value for k, value in of.items()} for direction, of in found.items()}


def mean_recall(recalls: dict[str, dict[str, float]], k: int = 1, names: Iterable[str] | None = None) -> float:
    values = [recalls[name][str(k)] for name in (recalls if names is None else names)]
    return sum(values) / len(values)


class JointTrainer:
    """Each step takes the mean loss of all directions on one batch."""

    def __init__(self, connector: MoEConnector, optimizer: torch.optim.Optimizer, lr_scheduler):
        self.connector, self.optimizer, self.lr_scheduler, self.loss = connector, optimizer, lr_scheduler, AlignLoss()

    def step(self, batch: dict[str, Tensor]) -> None:
        self.optimizer.zero_grad()
        directions = self.connector.directions
        for src, tgt in directions:
            out, target = self.connector(batch[src], src, tgt), self.connector.target(batch[tgt], tgt)
            (self.loss(out, target).loss / len(directions)).backward()
        torch.nn.utils.clip_grad_norm_(self.connector.parameters(), 1.0)
        self.optimizer.step()
        self.lr_scheduler.step()


def make_connector(dims: dict[str, int], recipe: Recipe, seed: int, **options) -> MoEConnector:
    torch.manual_seed(seed)
    options = {"num_experts": recipe.experts, "top_k": recipe.top_k} | options
    return MoEConnector(dims, recipe.hidden, dropout=recipe.dropout, **options)


def fit(
    connector: MoEConnector,
    views: Views,
    recipe: Recipe,
    seed: int,
    *,
    joint: bool = False,
    state: str = "shared",
    directions: list[Direction] | None = None,
) -> Outcome:
    """Train, and keep the weights with the best mean validation recall@1 over the trained directions.

    The learning rate falls as half a cosine. directions: those that are trained and evaluated; all unless given.
    """
    started = time.perf_counter()
    directions = directions or list(connector.directions)
    sampler = ResumableBatchSampler(len(next(iter(views.train.values()))), recipe.batch, seed=seed)
    rate = recipe.joint_learning_rate if joint else recipe.learning_rate
    trained = [p for p in connector.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=recipe.weight_decay)
    batches = recipe.epochs * len(sampler) * (1 if joint else len(directions))
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda i: 0.5 * (1 + math.cos(math.pi * i / batches)))
    alternating = AlternatingTrainer(
        connector, optimizer, DirectionSchedule.cycle(directions), state=state, lr_scheduler=scheduler
    )
    trainer = JointTrainer(connector, optimizer, scheduler) if joint else alternating
    torch.manual_seed(seed)
    connector.train()
    every, done, best, weights = max(1, batches // recipe.evaluations), 0, None, None
    while done < batches:
        for rows in sampler:
            trainer.step({name: x[rows] for name, x in views.train.items()})
            sampler.advance()
            done += 1
            if done % every == 0 or done == batches:
                found = mean_recall(plain(alternating.evaluate(views.validation, KS)))
                if best is None or found > best.validation:
                    best = Outcome(
                        {}, found, recipe.epochs * done / batches, sum(p.numel() for p in connector.parameters())
                    )
                    weights = copy.deepcopy(connector.state_dict())
            if done == batches:
                break
    connector.load_state_dict(weights)
    connector.eval()
    connector.reset_usage()
    best.recalls = plain(alternating.evaluate(views.test, KS, directions=list(connector.directions)))
    usage = {as_text(d): connector.usage(d).double() for d in connector.directions}
    best.usage = {name: (u / u.sum(1, keepdim=True)).tolist() for name, u in usage.items()}
    best.connector, best.seconds = connector, time.perf_counter() - started
    return best


def train(arm: str, views: Views, recipe: Recipe, seed: int) -> Outcome:
    """One arm."""
    if arm == "separate":
        return _separate(views, recipe, seed)
    options = {
        "mlp": {"num_experts": 1, "top_k": 1, "ffn": recipe.top_k * recipe.hidden},
        "wide_mlp": {"num_experts": 1, "top_k": 1, "ffn": recipe.experts * recipe.hidden},
        "v6": {"preset": "v6"},
    }.get(arm, {})
    connector = make_connector(views.dims, recipe, seed, **options)
    return fit(
        connector,
        views,
        recipe,
        seed,
        joint=arm == "joint",
        state="per_direction" if arm == "by_direction" else "shared",
    )


def _separate(views: Views, recipe: Recipe, seed: int) -> Outcome:
    """Recalls of as many connectors as there are directions."""
    parts = []
    for src, tgt in permutations(views.dims, 2):
        connector = make_connector(views.of((src, tgt)).dims, recipe, seed, directions=[(src, tgt)])
        parts.append(fit(connector, views.of((src, tgt)), recipe, seed))
    return Outcome(
        {name: of for part in parts for name, of in part.recalls.items()},
        sum(part.validation for part in parts) / len(parts),
        sum(part.best_epoch for part in parts) / len(parts),
        sum(part.parameters for part in parts),
        sum(part.seconds for part in parts),
    )


def grow(way: str, data_set: DataSet, six: Outcome, views: Views, recipe: Recipe, seed: int) -> Outcome:
    """A seventh view for the trained connector of six, or seven views from the start."""
    if way == "scratch":
        return fit(make_connector(views.dims, recipe, seed), views, recipe, seed)
    connector, seventh = copy.deepcopy(six.connector), data_set.seventh
    connector.requires_grad_(way != "frozen")
    torch.manual_seed(seed)
    connector.add_modality(seventh, views.dims[seventh])
    new = [d for d in connector.directions if seventh in d]
    return fit(connector, views, recipe, seed, directions=list(connector.directions) if way == "all" else new)


def as_numbers(outcome: Outcome) -> dict:
    return {name: value for name, value in vars(outcome).items() if name != "connector"}
