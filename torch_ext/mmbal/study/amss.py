"""`mmbal study amss`: does masking subnetworks by AMSS help on real data, and against what?"""

from __future__ import annotations

import inspect
import os
import time
from functools import partial
from pathlib import Path

import mmbal
from mmbal.demo import data as demo_data

from .amss_arms import FUSED, OPTIMIZERS, Recipe, Training, as_numbers, run_arms
from .amss_data import DATA_SETS, DataSet, load
from .amss_plots import plot_gains, plot_rho
from .amss_report import markdown, summarise
from .data import ASSETS
from .runs import Job, Study, check_seeds, conduct

CODE = ("data", "training", "amss_data", "amss_models", "ogm", "amss_arms", "amss")  # what the numbers rest on
METHOD = ("amss", "gradients", "ratios", "unit_spec")  # of mmbal.methods


def run_study(
    out: str | os.PathLike = "mmbal-study/amss", seeds: int = 5, quick: bool = False, recipe: Recipe | None = None
) -> dict:
    """Run every data set, optimizer and seed that `out` does not hold yet, write the report and return its numbers."""
    seeds = check_seeds(seeds, quick)
    recipe = recipe or (Recipe.quick() if quick else Recipe())
    code = [Path(__file__).with_name(f"{name}.py") for name in CODE]
    clipart = [demo_data.ASSETS / name for name in ("clipart.tsv", "clipart48.png")]
    method = [Path(inspect.getfile(mmbal.AMSS)).with_name(f"{name}.py") for name in METHOD]
    files = [*code, *method, *sorted(ASSETS.glob("*.csv.gz")), *clipart]
    pictures = {"amss.png": plot_gains, "amss-rho.png": plot_rho}
    jobs = [
        Job(
            f"{data_set.name}-{optimizer}-{seed}",
            len(data_set.modalities) + len(FUSED),
            partial(run_setting, data_set, optimizer, seed, recipe),
        )
        for seed in range(seeds)
        for data_set in DATA_SETS
        for optimizer in OPTIMIZERS
    ]
    return conduct(Study(recipe, files, summarise, markdown, pictures), out, seeds, jobs)


def run_setting(data_set: DataSet, optimizer: str, seed: int, recipe: Recipe, trained=lambda: None) -> dict:
    """All arms of one data set, optimizer and seed as numbers; trained() is called after each training."""
    started = time.perf_counter()
    data = load(data_set, seed)
    outcomes, alone = run_arms(data, Training.of(recipe, data_set, optimizer), seed, trained)
    return {
        "data_set": data_set.name,
        "optimizer": optimizer,
        "seed": seed,
        "rows": {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
        "arms": {arm: as_numbers(outcome, data.test.target) for arm, outcome in outcomes.items()},
        "unimodal": {name: as_numbers(outcome, data.test.target) for name, outcome in alone.items()},
        "seconds": {"total": time.perf_counter() - started},
    }
