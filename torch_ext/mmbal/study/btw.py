"""`mmbal study btw`: does weighting modalities by BTW help on real data, and against what?"""

from __future__ import annotations

import inspect
import json
import os
import time
from dataclasses import asdict
from pathlib import Path

import torch
from tqdm import tqdm

import mmbal
from mmbal.demo.model import replace_file
from mmbal.demo.report import machine, versions
from mmbal.demo.store import fingerprint

from .arms import TRAINED, Recipe, run_arms
from .data import ASSETS, SETTINGS, Data, Setting, load_setting
from .report import markdown, summarise, write_report


def run_study(
    out: str | os.PathLike = "mmbal-study/btw", seeds: int = 5, quick: bool = False, recipe: Recipe | None = None
) -> dict:
    """Run every setting and seed that `out` does not hold yet, write the report there and return its numbers."""
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    out = Path(out)
    recipe = recipe or (Recipe.quick() if quick else Recipe())
    seeds = 1 if quick else seeds
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only get slower with more
    try:
        runs = _runs(out / "runs" / _mark(recipe), seeds, recipe)
    except KeyboardInterrupt:
        print(f"\nInterrupted. What is finished is kept in {out}; the same command goes on from there.")
        raise
    finally:
        torch.set_num_threads(threads)
    results = {
        "settings": summarise(runs),
        "runs": runs,
        "seeds": seeds,
        "recipe": asdict(recipe),
        "seconds": sum(run["seconds"]["total"] for run in runs),
        "machine": machine() | {"threads": 1},
        "versions": versions(),
    }
    write_report(out, results)
    print(markdown(results))
    print(f"Written to {out}: report.md, btw.png, results.json.")
    return results


def _mark(recipe: Recipe) -> str:
    """Another recipe, version, table or line of the study's code does not reuse what is finished."""
    code = [Path(__file__).with_name(f"{name}.py") for name in ("data", "models", "arms", "btw")]
    files = [*code, Path(inspect.getfile(mmbal.BTW)), *sorted(ASSETS.glob("*.csv.gz"))]
    return fingerprint({"recipe": asdict(recipe), "versions": versions()}, *files)


def _runs(folder: Path, seeds: int, recipe: Recipe) -> list[dict]:
    """Results of every seed and setting, in this order; each is a file once it is finished."""
    runs = []
    per_run = 4 + len(TRAINED)  # four unimodal models
    jobs = [(seed, setting) for seed in range(seeds) for setting in SETTINGS]
    with tqdm(total=per_run * len(jobs), unit="model") as bar:
        for seed, setting in jobs:
            file = folder / f"{setting.name}-{seed}.json"
            if file.exists():
                runs.append(json.loads(file.read_text("utf-8")))
                bar.update(per_run)
                continue
            bar.set_description(f"{setting.name}, seed {seed}")
            run = run_setting(setting, seed, recipe, lambda: bar.update(1))
            text = json.dumps(run, indent=2) + "\n"
            replace_file(file, lambda path, text=text: path.write_text(text, "utf-8"))
            runs.append(run)
    return runs


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
    said = prediction.argmax(1)
    scores = []
    for label in range(data.outputs):
        right = int(((said == label) & (target == label)).sum())
        scores.append(2 * right / max(1, int((said == label).sum() + (target == label).sum())))
    return {"accuracy": float((said == target).double().mean()), "macro_f1": sum(scores) / len(scores)}
