"""`mmbal study attribution`: does saying how much each modality should matter help on real data, and against what?"""

from __future__ import annotations

import inspect
import os
import time
from functools import partial
from pathlib import Path

import mmbal
from mmbal.demo import data as demo_data

from .amss_data import DATA_SETS, DataSet, load
from .attribution_arms import TITLES, Recipe, Training, as_numbers, run_arms
from .attribution_report import markdown, plot_gains, plot_shares, summarise
from .data import ASSETS
from .runs import Job, Study, check_seeds, conduct

CODE = ("data", "training", "amss_data", "amss_models", "amss_arms", "attribution_arms", "attribution")
METHOD = ("attribution", "attribution_routes", "attribution_values")  # of mmbal.methods


def run_study(
    out: str | os.PathLike = "mmbal-study/attribution",
    seeds: int = 5,
    quick: bool = False,
    recipe: Recipe | None = None,
) -> dict:
    """Run every data set and seed that `out` does not hold yet, write the report and return its numbers."""
    seeds = check_seeds(seeds, quick)
    recipe = recipe or (Recipe.quick() if quick else Recipe())
    code = [Path(__file__).with_name(f"{name}.py") for name in CODE]
    clipart = [demo_data.ASSETS / name for name in ("clipart.tsv", "clipart48.png")]
    method = [Path(inspect.getfile(mmbal.AttributionRegularizer)).with_name(f"{name}.py") for name in METHOD]
    files = [*code, *method, *sorted(ASSETS.glob("*.csv.gz")), *clipart]
    jobs = [
        Job(
            f"{data_set.name}-{seed}",
            len(data_set.modalities) + len(TITLES),
            partial(run_setting, data_set, seed, recipe),
        )
        for seed in range(seeds)
        for data_set in DATA_SETS
    ]
    pictures = {"attribution.png": plot_gains, "attribution-shares.png": plot_shares}
    return conduct(Study(recipe, files, summarise, markdown, pictures), out, seeds, jobs)


def run_setting(data_set: DataSet, seed: int, recipe: Recipe, trained=lambda: None) -> dict:
    """All arms of one data set and seed as numbers; trained() is called after each training."""
    started = time.perf_counter()
    data = load(data_set, seed)
    outcomes, alone, asked, strong = run_arms(data, Training.of(recipe, data_set), recipe, seed, trained)
    return {
        "data_set": data_set.name,
        "seed": seed,
        "rows": {"train": len(data.train), "validation": len(data.validation), "test": len(data.test)},
        "arms": {arm: as_numbers(outcome, data.test.target) for arm, outcome in outcomes.items()},
        "alone": alone,
        "asked": asked,
        "strong": strong,
        "seconds": {"total": time.perf_counter() - started},
    }
