"""The stages that turn the dense parent into CLIP-MoE, and the baselines it is compared with.

Each stage trains a model in place, with its own random numbers: what it gives does not depend on what ran before it.

Shapes: n training pairs, E experts.
"""

from __future__ import annotations

import random
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from tokenizers import Tokenizer
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPModel

from mmbal import mcl
from mmbal.moe import freeze_except_router

from .data import Pairs
from .training import Epochs, adamw, optimise


@dataclass(frozen=True)
class Recipe:
    """Every hyper-parameter. "published": the CLIP-MoE paper or code; "searched": chosen on validation pairs."""

    batch: int = 128  # fits the small data; published 800 of a million pairs
    mcl_stages: int = 3  # published: base + 3 = 4 experts
    clusters: int = 3  # published: k-means clusters a modality and stage
    mcl_steps: int = 40  # searched: 120 and 160 gave the mixture nothing more
    mcl_learning_rate: float = 2e-3  # searched: 1e-3 and 5e-3 came out a little lower; published 1e-5
    cluster_share: float = 0.25  # searched; the other batches are drawn from all pairs; published 1.0
    top_k: int = 2  # published
    layers: str = "all"  # published
    router_steps: int = 20  # searched: 40 after longer stages gave nothing more
    router_learning_rate: float = 3e-3  # 3e-4 came out level; published 1e-6 would not move a router in so few steps
    balance: float = 0.01  # published
    final_steps: int = 0  # published; steps of all weights at the end, as CLIP-UP does, gained nothing
    final_learning_rate: float = 3e-5  # searched: 3e-4 lost a point of recall in 80 steps, this lost none
    dense_learning_rate: float = 1e-4  # searched for this baseline alone: 5e-4 came out lower
    sparse_learning_rate: float = 1e-4  # the dense baseline's, not searched
    label_smoothing: float = 0.1  # published
    weight_decay: float = 0.2  # published, for MCL
    warmup: float = 0.1  # share of a stage's steps

    @property
    def total_steps(self) -> int:
        """What CLIP-MoE spends on top of the parent, and therefore what every baseline may spend."""
        return self.mcl_stages * self.mcl_steps + self.router_steps + self.final_steps

    @classmethod
    def quick(cls) -> Recipe:
        """The same stages with a few small steps each: shows that everything works, and no gain."""
        return cls(batch=32, mcl_steps=2, router_steps=2, final_steps=min(2, cls.final_steps))


@dataclass
class Outcome:
    """A stage's model with what it cost."""

    model: CLIPModel
    seconds: float
    tokens: int


@dataclass
class Trainer:
    """What every stage needs besides its model."""

    recipe: Recipe
    pairs: Pairs
    tokenizer: Tokenizer
    seed: int

    def fit(
        self,
        name: str,
        model: CLIPModel,
        trained: list[Tensor],
        steps: int,
        learning_rate: float,
        labels: np.ndarray | None = None,
        balance: float = 0.0,
    ) -> Outcome:
        """Train only `trained` (in place); with `labels` [n] part of the batches come from one cluster each."""
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        for parameter in trained:
            parameter.requires_grad_(True)
        # One stream of random numbers a stage, whatever ran before it.
        stream = random.Random(f"{self.seed} {name}")
        rng, generator = random.Random(stream.random()), torch.Generator().manual_seed(stream.getrandbits(32))
        torch.manual_seed(stream.getrandbits(32))
        batches = self._batches(rng, labels, stream.getrandbits(32))
        recipe = self.recipe
        started, tokens = time.perf_counter(), 0
        run = optimise(
            model,
            adamw(trained, learning_rate, recipe.weight_decay),
            learning_rate,
            steps,
            batches,
            self.pairs,
            self.tokenizer,
            rng,
            generator,
            warmup=max(1, round(recipe.warmup * steps)),
            label_smoothing=recipe.label_smoothing,
            balance=balance,
        )
        bar = tqdm(run, total=steps, desc=f"{name:24s}")
        for step in bar:
            tokens += step.tokens
            bar.set_postfix(loss=f"{step.loss:.3f}", refresh=False)
        return Outcome(model, time.perf_counter() - started, tokens)

    def _batches(self, rng: random.Random, labels: np.ndarray | None, seed: int) -> Iterator[list[int]]:
        everywhere = Epochs(range(len(self.pairs)), self.recipe.batch, rng)
        if labels is None:
            yield from everywhere
        clustered = _cluster_batches(labels, self.recipe.batch, seed)
        while True:
            yield next(clustered if rng.random() < self.recipe.cluster_share else everywhere)


def _cluster_batches(labels: np.ndarray, batch: int, seed: int) -> Iterator[list[int]]:
    """One-cluster batches, epoch after epoch; a larger cluster gives more of them."""
    sampler = mcl.ClusterBatchSampler(labels, batch, seed=seed, order="shuffled")
    if len(sampler) == 0:
        raise ValueError(f"batch must be at most the {len(labels)} training pairs, got {batch}")
    epoch = 0
    while True:
        sampler.set_epoch(epoch)
        yield from sampler
        epoch += 1


def mcl_stage(trainer: Trainer, model: CLIPModel, labels: Path, stage: int) -> Outcome:
    """Expert `stage` (from 1): the parent with its FFNs trained on batches from one accumulated cluster.

    `labels`: the file that `mmbal mcl cluster` made of the features of all models before it. Every stage starts from
    the parent, as published.
    """
    recipe = trainer.recipe
    trained, clusters = _named(model, mcl.ffn_parameters(model)), mcl.load_labels(labels)
    return trainer.fit(f"MCL stage {stage}", model, trained, recipe.mcl_steps, recipe.mcl_learning_rate, clusters)


def train_router(trainer: Trainer, model: CLIPModel) -> Outcome:
    """The routers alone, CLIP loss + balance loss."""
    recipe = trainer.recipe
    routers = _named(model, freeze_except_router(model))
    return trainer.fit(
        "router", model, routers, recipe.router_steps, recipe.router_learning_rate, balance=recipe.balance
    )


def _named(model: CLIPModel, names: list[str]) -> list[Tensor]:
    return [model.get_parameter(name) for name in names]


def _all_but_scale(model: CLIPModel) -> list[Tensor]:
    """The temperature stays the parent's in every stage, so that no variant gains by it."""
    return [parameter for name, parameter in model.named_parameters() if name != "logit_scale"]


def train_everything(trainer: Trainer, model: CLIPModel) -> Outcome:
    """The last stage of CLIP-MoE: all weights, with a small learning rate."""
    recipe = trainer.recipe
    return trainer.fit(
        "everything",
        model,
        _all_but_scale(model),
        recipe.final_steps,
        recipe.final_learning_rate,
        balance=recipe.balance,
    )


def continue_dense(trainer: Trainer, model: CLIPModel) -> Outcome:
    """Baseline: the dense parent trained on for all the steps that CLIP-MoE spends."""
    recipe = trainer.recipe
    return trainer.fit(
        "dense, trained on", model, _all_but_scale(model), recipe.total_steps, recipe.dense_learning_rate
    )


def sparse_upcycling(trainer: Trainer, model: CLIPModel) -> Outcome:
    """Baseline: E copies of each FFN behind a random router, everything trains for as many steps."""
    recipe = trainer.recipe
    return trainer.fit(
        "sparse upcycling",
        model,
        _all_but_scale(model),
        recipe.total_steps,
        recipe.sparse_learning_rate,
        balance=recipe.balance,
    )
