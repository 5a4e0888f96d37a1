"""`mmbal study altmoe`: what does training direction by direction through one mixture gain on real data?"""

from __future__ import annotations

import inspect
import os
import time
from functools import partial
from pathlib import Path

import mmbal
from mmbal.demo import data as demo_data

from .altmoe_arms import GROWTH, TITLES, Recipe, as_numbers, grow, train
from .altmoe_data import DATA_SETS, DataSet, load
from .altmoe_report import markdown, plot_gains, plot_usage, summarise
from .altmoe_towers import missing_packages
from .data import ASSETS
from .runs import Job, Study, check_seeds, conduct

CODE = ("data", "altmoe_data", "altmoe_towers", "altmoe_arms", "altmoe")


def run_study(
    out: str | os.PathLike = "mmbal-study/altmoe",
    seeds: int = 3,
    quick: bool = False,
    recipe: Recipe | None = None,
) -> dict:
    """Run every data set and seed that `out` does not hold yet, write the report and return its numbers."""
    seeds = check_seeds(seeds, quick)
    if missing := missing_packages():
        raise ImportError(f"the emoji need {', '.join(missing)}: pip install 'mmbal[towers]'")
    recipe = recipe or (Recipe.quick() if quick else Recipe())
    code = [Path(__file__).with_name(f"{name}.py") for name in CODE]
    method = sorted(Path(inspect.getfile(mmbal.MoEConnector)).parent.glob("*.py"))
    emoji = [demo_data.ASSETS / name for name in ("emoji.tsv", "emoji48.png")]
    jobs = [
        Job(
            f"{data_set.name}-{seed}",
            len(TITLES) + (len(GROWTH) if data_set.seventh else 0),
            partial(run_setting, data_set, seed, recipe, Path(out)),
        )
        for seed in range(seeds)
        for data_set in DATA_SETS
    ]
    pictures = {"altmoe.png": plot_gains, "altmoe-usage.png": plot_usage}
    study = Study(recipe, [*code, *method, ASSETS / "mfeat.csv.gz", *emoji], summarise, markdown, pictures)
    return conduct(study, out, seeds, jobs)


def run_setting(data_set: DataSet, seed: int, recipe: Recipe, folder: Path, trained=lambda: None) -> dict:
    """All arms of one data set and seed as numbers; trained() is called after each."""
    started = time.perf_counter()
    views, arms, grown, first = load(data_set, seed, folder), {}, {}, None
    for arm in TITLES:
        outcome = train(arm, views.of(data_set.views), recipe, seed)
        first = outcome if arm == "alternating" else first
        arms[arm] = as_numbers(outcome)
        trained()
    for way in GROWTH if data_set.seventh else ():
        grown[way] = as_numbers(grow(way, data_set, first, views, recipe, seed))
        trained()
    return {
        "data_set": data_set.name,
        "seed": seed,
        "rows": {name: len(next(iter(split.values()))) for name, split in vars(views).items()},
        "arms": arms,
        "growth": grown,
        "seconds": {"total": time.perf_counter() - started},
    }
