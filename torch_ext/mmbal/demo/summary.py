"""One table from several runs of the demo: python -m mmbal.demo.summary DIR DIR ..."""

from __future__ import annotations

import json
import statistics
import sys
from pathlib import Path

from .evaluate import RANKS, mean_recall
from .report import DIRECTIONS, TITLES


def summary(reports: list[dict]) -> str:
    """Mean over the runs, and the least and largest mean of six; then the mean of six of every run."""
    if not reports:
        raise ValueError("summary: at least one folder with a report.json is needed")
    titles = [f"{title} R@{k}" for title in ("I→T", "T→I") for k in RANKS]
    lines = ["| variant | mean of six | least to largest | " + " | ".join(titles) + " |", "|---" * 9 + "|"]
    for name, title in TITLES.items():
        results = [report["variants"][name] for report in reports]
        means = [mean_recall(result) for result in results]
        cells = [f"{statistics.mean(r[side][f'R@{k}'] for r in results):.1f}" for side in DIRECTIONS for k in RANKS]
        spread = f"{min(means):.2f} to {max(means):.2f}"
        lines.append(f"| {title} | **{statistics.mean(means):.2f}** | {spread} | " + " | ".join(cells) + " |")
    lines += ["", "| seed | " + " | ".join(TITLES.values()) + " |", "|---" * (len(TITLES) + 1) + "|"]
    for report in reports:
        cells = [f"{mean_recall(report['variants'][name]):.2f}" for name in TITLES]
        lines.append(f"| {report['seed']} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(summary([json.loads((Path(folder) / "report.json").read_text("utf-8")) for folder in sys.argv[1:]]))
