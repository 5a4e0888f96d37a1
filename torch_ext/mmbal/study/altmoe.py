"""`mmbal study altmoe`: what does training direction by direction through one mixture gain on real data?"""

from __future__ import annotations

import inspect
import os
import time
from functools import partial
from pathlib import Path

import mmbal

from .altmoe_arms import GROWTH, TITLES, Recipe, as_numbers, grow, train
from .altmoe_data import load_views
from .altmoe_report import markdown, plot_gains, plot_usage, summarise
from .data import ASSETS
from .runs import Job, Study, check_seeds, conduct

CODE = ("data", "altmoe_data", "altmoe_arms", "altmoe")


def run_study(
    out: str | os.PathLike = "mmbal-study/altmoe",
    seeds: int = 3,
    quick: bool = False,
    recipe: Recipe | None = None,
) -> dict:
    """Run every seed that `out` does not hold yet, write the report and return its numbers."""
    seeds = check_seeds(seeds, quick)
    recipe = recipe or (Recipe.quick() if quick else Recipe())
    code = [Path(__file__).with_name(f"{name}.py") for name in CODE]
    method = sorted(Path(inspect.getfile(mmbal.MoEConnector)).parent.glob("*.py"))
    jobs = [Job(f"mfeat-{seed}", len(TITLES) + len(GROWTH), partial(run_seed, seed, recipe)) for seed in range(seeds)]
    pictures = {"altmoe.png": plot_gains, "altmoe-usage.png": plot_usage}
    study = Study(recipe, [*code, *method, ASSETS / "mfeat.csv.gz"], summarise, markdown, pictures)
    return conduct(study, out, seeds, jobs)


def run_seed(seed: int, recipe: Recipe, trained=lambda: None) -> dict:
    """All arms of one seed as numbers; trained() is called after each."""
    started = time.perf_counter()
    views, arms, grown, six = load_views(seed), {}, {}, None
    for arm in TITLES:
        outcome = train(arm, views, recipe, seed)
        six = outcome if arm == "alternating" else six
        arms[arm] = as_numbers(outcome)
        trained()
    for way in GROWTH:
        grown[way] = as_numbers(grow(way, six, views, recipe, seed))
        trained()
    return {
        "seed": seed,
        "rows": {name: len(next(iter(split.values()))) for name, split in vars(views).items()},
        "arms": arms,
        "growth": grown,
        "seconds": {"total": time.perf_counter() - started},
    }
