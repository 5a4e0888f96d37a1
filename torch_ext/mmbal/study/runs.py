"""A study's runs: each is a file once it is finished, so that an interrupted study goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from mmbal.demo.report import machine, versions
from mmbal.demo.store import fingerprint
from mmbal.files import replace_file


@dataclass(frozen=True)
class Job:
    """One run: its name, how many models it trains, what gives its numbers (its argument is called after each)."""

    name: str
    models: int
    run: Callable[[Callable[[], None]], dict]


@dataclass(frozen=True)
class Study:
    """A study's recipe (a dataclass), the files that its numbers rest on, and what turns its runs into a report."""

    recipe: object
    files: Sequence[Path]
    summarise: Callable[[list[dict]], dict]  # all runs -> numbers of each setting
    markdown: Callable[[dict], str]  # all results -> the report
    pictures: dict[str, Callable[[dict, Path], None]]  # file name -> what draws it from the results


def check_seeds(seeds: int, quick: bool) -> int:
    """How many seeds to run."""
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    return 1 if quick else seeds


def conduct(study: Study, out: str | os.PathLike, seeds: int, jobs: Sequence[Job]) -> dict:
    """Run every job that `out` does not hold yet, write the report there and return its numbers."""
    out = Path(out)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # models this small only get slower with more
    try:
        runs = _finished(out / "runs" / _mark(study), jobs)
    except KeyboardInterrupt:
        print(f"\nInterrupted. What is finished is kept in {out}; the same command goes on from there.")
        raise
    finally:
        torch.set_num_threads(threads)
    results = {
        "settings": study.summarise(runs),
        "runs": runs,
        "seeds": seeds,
        "recipe": asdict(study.recipe),
        "seconds": sum(run["seconds"]["total"] for run in runs),
        "machine": machine() | {"threads": 1},
        "versions": versions(),
    }
    for name, draw in study.pictures.items():
        draw(results, out / name)
    report, numbers = study.markdown(results), json.dumps(results, indent=2, allow_nan=False) + "\n"
    replace_file(out / "report.md", lambda file: file.write_text(report, "utf-8"))
    replace_file(out / "results.json", lambda file: file.write_text(numbers, "utf-8"))
    print(report)
    print(f"Written to {out}: {', '.join(('report.md', *study.pictures, 'results.json'))}.")
    return results


def _mark(study: Study) -> str:
    """Another recipe, version, table or line of the study's code does not reuse what is finished."""
    return fingerprint({"recipe": asdict(study.recipe), "versions": versions()}, *study.files)


def _finished(folder: Path, jobs: Sequence[Job]) -> list[dict]:
    """Results of the jobs, in their order."""
    runs = []
    with tqdm(total=sum(job.models for job in jobs), unit="model") as bar:
        for job in jobs:
            file = folder / f"{job.name}.json"
            if file.exists():
                runs.append(json.loads(file.read_text("utf-8")))
                bar.update(job.models)
                continue
            bar.set_description(job.name)
            run = job.run(lambda: bar.update(1))
            text = json.dumps(run, indent=2) + "\n"
            replace_file(file, lambda path, text=text: path.write_text(text, "utf-8"))
            runs.append(run)
    return runs
