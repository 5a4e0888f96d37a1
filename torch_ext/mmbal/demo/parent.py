"""Train the demo's parent: a small CLIP from random weights to the plateau of its validation recall."""

from __future__ import annotations

import csv
import os
import random
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from mmbal.files import replace_file

from . import data
from .evaluate import mean_recall, retrieval
from .model import build_clip, save_parent
from .training import Epochs, Step, adamw, optimise


@dataclass(frozen=True)
class ParentRecipe:
    width: int = 128
    layers: int = 3
    patch: int = 12
    vocabulary: int = 4096
    steps: int = 3000
    batch: int = 128
    learning_rate: float = 1e-3
    weight_decay: float = 0.2
    warmup: int = 200
    label_smoothing: float = 0.1
    attention_dropout: float = 0.1
    evaluate_every: int = 250
    save_every: int = 250
    seed: int = 0


def train_parent(folder: Path, recipe: ParentRecipe | None = None, progress: bool = True) -> Path:
    """Train, writing parent.safetensors, parent_config.json, tokenizer.json and parent_log.csv to `folder`.

    An interrupted run goes on from its last checkpoint (`folder`/checkpoint.pt), with the same random numbers.
    """
    recipe = recipe or ParentRecipe()
    splits = data.load_splits()
    tokenizer = data.train_tokenizer(splits.train, recipe.vocabulary)
    model = build_clip(
        tokenizer.get_vocab_size(),
        recipe.width,
        recipe.layers,
        recipe.patch,
        recipe.attention_dropout,
        recipe.seed,
    )
    optimizer = adamw(model.parameters(), recipe.learning_rate, recipe.weight_decay)
    rng, generator = random.Random(recipe.seed), torch.Generator().manual_seed(recipe.seed)
    epochs, first, log, running = Epochs(range(len(splits.train)), recipe.batch, rng), 0, [], None

    # As many training pairs as validation pairs: the gap of the two recalls tells how much is learnt by heart.
    sample = random.Random(recipe.seed).sample(range(len(splits.train)), len(splits.validation))

    checkpoint = folder / "checkpoint.pt"
    if checkpoint.exists():
        saved = torch.load(checkpoint, weights_only=True)
        if saved["recipe"] == asdict(recipe):
            model.load_state_dict(saved["model"])
            optimizer.load_state_dict(saved["optimizer"])
            first, log, running, epochs.queue = saved["step"], saved["log"], saved["running"], saved["queue"]
            rng.setstate(saved["rng"])
            generator.set_state(saved["generator"])
            torch.set_rng_state(saved["torch"])
    if not first:
        torch.manual_seed(recipe.seed)

    def save(done: Step) -> None:
        state = {
            "recipe": asdict(recipe),
            "model": model.state_dict(),
            "optimizer": optimizer.state_dict(),
            "step": done.number,
            "log": log,
            "running": done.loss,
            "queue": epochs.queue,
            "rng": rng.getstate(),
            "generator": generator.get_state(),
            "torch": torch.get_rng_state(),
        }
        replace_file(checkpoint, lambda file: torch.save(state, file))

    steps = optimise(
        model,
        optimizer,
        recipe.learning_rate,
        recipe.steps,
        epochs,
        splits.train,
        tokenizer,
        rng,
        generator,
        recipe.warmup,
        recipe.label_smoothing,
        first=first,
        running=running,
    )
    bar = tqdm(steps, initial=first, total=recipe.steps, desc="parent", disable=not progress)
    for done in bar:
        if done.number % recipe.evaluate_every == 0 or done.number == recipe.steps:
            score = mean_recall(retrieval(model, tokenizer, splits.validation))
            seen = mean_recall(retrieval(model, tokenizer, splits.train.subset(sample)))
            log.append(
                {
                    "step": done.number,
                    "learning_rate": f"{done.learning_rate:.3e}",
                    "train_loss": f"{done.loss:.4f}",
                    "train_mean_recall": f"{seen:.2f}",
                    "validation_mean_recall": f"{score:.2f}",
                }
            )
            replace_file(folder / "parent_log.csv", lambda file: _write_log(file, log))
            bar.set_postfix(loss=f"{done.loss:.3f}", recall=f"{score:.1f}")
        if done.number % recipe.save_every == 0:
            save(done)
    save_parent(folder, model, tokenizer)
    if checkpoint.exists():
        os.remove(checkpoint)
    return folder


def _write_log(path: Path, rows: list[dict]) -> None:
    with open(path, "w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
