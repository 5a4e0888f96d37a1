"""`mmbal study btw`: does weighting modalities by BTW help on real data, and against what?"""

from __future__ import annotations

import inspect
import os
import time
from functools import partial
from pathlib import Path

import torch

import mmbal

from .btw_arms import TRAINED, Recipe, run_arms
from .btw_report import markdown, plot, summarise
from .data import ASSETS, SETTINGS, Data, Setting, load_setting
from .runs import Job, Study, check_seeds, conduct
from .training import classification_metrics

CODE = ("data", "btw_models", "training", "btw_arms", "btw")  # what the numbers rest on


def run_study(
    out: str | os.PathLike = "mmbal-study/btw", seeds: int = 5, quick: bool = False, recipe: Recipe | None = None
) -> dict:
    """Run every setting and seed that `out` does not hold yet, write the report there and return its numbers."""
    seeds = check_seeds(seeds, quick)
    recipe = recipe or (Recipe.quick() if quick else Recipe())
    code = [Path(__file__).with_name(f"{name}.py") for name in CODE]
    files = [*code, Path(inspect.getfile(mmbal.BTW)), *sorted(ASSETS.glob("*.csv.gz"))]
    study = Study(recipe, files, summarise, markdown, {"btw.png": plot})
    jobs = [
        Job(f"{setting.name}-{seed}", 4 + len(TRAINED), partial(run_setting, setting, seed, recipe))
        for seed in range(seeds)
        for setting in SETTINGS
    ]
    return conduct(study, out, seeds, jobs)


def run_setting(setting: Setting, seed: int, recipe: Recipe, trained=lambda: None) -> dict:
    """All arms of one setting and seed as numbers; trained() is called after each training."""
    started = time.perf_counter()
    data = load_setting(setting, seed)
    outcomes, unimodal, unimodal_seconds = run_arms(data, recipe, seed, trained)
    present = data.test.present
    arms = {}
    for arm, outcome in outcomes.items():
        arms[arm] = {
            "metrics": metrics(data, outcome.prediction),
            "best_epoch": outcome.best_epoch,
            "validation_loss": outcome.validation_loss,
            "seconds": outcome.seconds,
        }
        if outcome.weights is not None:  # mean of the rows that have the modality
            means = (outcome.weights * present).sum(0) / present.sum(0)
            arms[arm]["weights"] = dict(zip(data.modalities, means.tolist(), strict=True))
    alone = {name: metrics(data, unimodal[name], present[:, position]) for position, name in enumerate(data.modalities)}
    seconds = {"total": time.perf_counter() - started, "unimodal": unimodal_seconds}
    rows = {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)}
    return {
        "setting": setting.name,
        "seed": seed,
        "rows": rows,
        "arms": arms,
        "unimodal": alone,
        "seconds": seconds,
    }


def metrics(data: Data, prediction: torch.Tensor, rows: torch.Tensor | None = None) -> dict[str, float]:
    """Of the test rows (or of those where `rows` is true): mae and r2, or accuracy and macro_f1."""
    target = data.test.target
    if rows is not None:
        prediction, target = prediction[rows], target[rows]
    if data.task == "regression":
        error = (prediction - target).double()
        spread = (target - target.mean()).double()
        return {
            "mae": float(error.abs().mean()) * data.scale,
            "r2": float(1 - error.square().sum() / spread.square().sum()),
        }
    return classification_metrics(prediction, target)
