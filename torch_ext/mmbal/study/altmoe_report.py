"""The report and the pictures of the study of Alt-MoE."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from .altmoe_arms import GROWTH, KS, TITLES, mean_recall
from .altmoe_data import DATA_SETS, DataSet
from .comparing import (
    comparison,
    gain_text,
    mean_deviation,
    mean_text,
    provenance_line,
)
from .gain_panels import plot_gain_panels, save_figure

BASE = "alternating"
COMPARED = tuple(arm for arm in TITLES if arm != BASE)


def of_view(recalls: dict, view: str, used: bool = True) -> list[str]:
    """The directions that use a view, or do not."""
    return [name for name in recalls if (view in name.split("->")) == used]


def summarise(runs: list[dict]) -> dict:
    """Runs of all seeds -> for each data set mean recalls of each arm over the directions, gains, growth."""
    settings = {}
    for data_set in DATA_SETS:
        own = [run for run in runs if run["data_set"] == data_set.name]
        settings[data_set.name] = {
            "arms": {arm: _arm(own, arm) for arm in TITLES},
            "directions": {
                name: mean_deviation([100 * run["arms"][BASE]["recalls"][name]["1"] for run in own])[0]
                for name in own[0]["arms"][BASE]["recalls"]
            },
            "growth": {way: _growth(own, way, data_set.seventh) for way in (GROWTH if data_set.seventh else ())},
            "usage": own[0]["arms"][BASE]["usage"],
            "rows": own[0]["rows"],
        }
    return settings


def _percent(run: dict, arm: str, k: int) -> float:
    return 100 * mean_recall(run["arms"][arm]["recalls"], k)


def _arm(runs: list[dict], arm: str) -> dict:
    recalls = {k: [_percent(run, arm, k) for run in runs] for k in KS}
    gains = {k: [v - _percent(run, BASE, k) for v, run in zip(recalls[k], runs, strict=True)] for k in KS}
    own = [run["arms"][arm] for run in runs]
    return {
        "recalls": {str(k): mean_deviation(values) for k, values in recalls.items()},
        "gains": {str(k): comparison(values) for k, values in gains.items()},
        "parameters": own[0]["parameters"],
        "best_epoch": mean_deviation([o["best_epoch"] for o in own])[0],
        "seconds": mean_deviation([o["seconds"] for o in own])[0],
    }


def _growth(runs: list[dict], way: str, seventh: str) -> dict:
    of_way = [run["growth"][way]["recalls"] for run in runs]
    old = [100 * mean_recall(r, 1, of_view(r, seventh, False)) for r in of_way]
    return {
        "old": mean_deviation(old),
        "new": mean_deviation([100 * mean_recall(r, 1, of_view(r, seventh)) for r in of_way]),
        "old_change": comparison([value - _percent(run, BASE, 1) for value, run in zip(old, runs, strict=True)]),
        "seconds": mean_deviation([run["growth"][way]["seconds"] for run in runs])[0],
    }


def verdicts(settings: dict) -> list[str]:
    """What each arm does against the alternating one, and what growth costs."""
    words = {"better": "clearly better than", "worse": "clearly worse than", "unclear": "not clearly different from"}
    lines = []
    for name, setting in settings.items():
        for arm in COMPARED:
            gain = setting["arms"][arm]["gains"]["1"]
            text = f"{words[gain['verdict']]} the alternating mixture (recall@1 {gain_text(gain, ' points')})"
            lines.append(f"{name}, {TITLES[arm]}: {text}.")
        for way, found in setting["growth"].items():
            old, new = gain_text(found["old_change"], " points"), mean_text(*found["new"], 1)
            lines.append(f"{name}, a view more, {GROWTH[way]}: recall@1 of old directions {old}, of new ones {new} %.")
    return lines


def _arms_table(settings: dict) -> list[str]:
    head = " | ".join(f"R@{k}, % | gained" for k in KS)
    lines = [f"| arm | {head} | parameters | best epoch | s |", "|---" * (4 + 2 * len(KS)) + "|"]
    for arm, title in TITLES.items():
        own, cells = settings["arms"][arm], []
        for k in KS:
            gain = own["gains"][str(k)]
            text = gain_text(gain) if gain["verdict"] == "unclear" else f"**{gain_text(gain)}**"
            cells += [mean_text(*own["recalls"][str(k)], 1), "" if arm == BASE else text]
        size = f"{own['parameters']:,} | {own['best_epoch']:.0f} | {own['seconds']:.0f}"
        lines.append(f"| {title} | {' | '.join(cells)} | {size} |")
    return lines


def _directions_table(data_set: DataSet, setting: dict) -> list[str]:
    views = data_set.views
    lines = [f"| from, to | {' | '.join(views)} |", "|---" * (len(views) + 1) + "|"]
    for src in views:
        cells = ["" if src == tgt else f"{setting['directions'][f'{src}->{tgt}']:.1f}" for tgt in views]
        lines.append(f"| {src} | {' | '.join(cells)} |")
    return lines


def _growth_table(setting: dict) -> list[str]:
    lines = ["| a view more | old directions, R@1, % | changed | new directions, R@1, % | s |", "|---" * 5 + "|"]
    for way, found in setting["growth"].items():
        lines.append(
            f"| {GROWTH[way]} | {mean_text(*found['old'], 1)} | {gain_text(found['old_change'])} | "
            f"{mean_text(*found['new'], 1)} | {found['seconds']:.0f} |"
        )
    return lines


def _how(recipe: dict) -> str:
    return f"""
- Retrieve the same item by another view of it among all test items. Views are standardised with the training items.
- All arms see each direction in {recipe["epochs"]} passes over the training items: alternating arms in one optimizer
  step a batch and direction, the joint arm in one step a batch with the mean loss of all directions, so in as many
  times fewer steps. It has a learning rate of its own ({recipe["joint_learning_rate"]:g} against
  {recipe["learning_rate"]:g}), each the best of those tried on validation digits of another
  seed (of the same 2,000 digits); all other arms took the mixture's. AdamW, weight decay
  {recipe["weight_decay"]:g}, half a cosine, gradients clipped to 1; the best of {recipe["evaluations"]} evaluations by
  mean validation recall@1 counts.
- Connector: `mmbal.MoEConnector`, width {recipe["hidden"]}, {recipe["experts"]} experts, top-{recipe["top_k"]}, dropout
  {recipe["dropout"]:g}; `mmbal.AlignLoss` with its defaults. The MLPs are one expert, {recipe["top_k"]} and
  {recipe["experts"]} times as wide. A connector for each direction: as many of them, each with all experts.
- The seventh view of a digit is the logarithm of the magnitudes of the spectrum of its pixels; as many passes in each
  new direction as the first had. In the first way all that was there is frozen, so old directions stay bit for bit.
- Clear: the 95 % interval (Student's t) of the paired gain over the seeds leaves out zero; with few seeds only large
  and steady gains are clear. Recalls are means over directions; other test items are not in the interval.
""".strip()


def markdown(results: dict) -> str:
    """The report."""
    settings, count = results["settings"], results["seeds"]
    lines = [
        "# Alt-MoE: any view from any other, direction by direction",
        "",
        f"{count} seed{'s' if count > 1 else ''}. Mean ± standard deviation over the seeds; gains are points paired "
        "with the alternating mixture of the same seed, mean ± standard error, bold where clear.",
        "",
        "## Verdict",
        "",
        *(f"- {line}" for line in verdicts(settings)),
        "",
        "![Gain of each arm over the alternating mixture](altmoe.png)",
        "",
        "![Share of each expert in each direction](altmoe-usage.png)",
    ]
    for data_set in DATA_SETS:
        setting = settings[data_set.name]
        rows, views = setting["rows"], "; ".join(f"{name}: {title}" for name, title in data_set.views.items())
        lines += [
            "",
            f"## {data_set.name}: {data_set.title}",
            "",
            f"{rows['train']} training, {rows['validation']} validation, {rows['test']} test items, "
            f"{data_set.directions} directions. {views}.",
            "",
            *_arms_table(setting),
            "",
            "Recall@1 of each direction of the alternating mixture, %:",
            "",
            *_directions_table(data_set, setting),
        ]
        if setting["growth"]:
            lines += ["", *_growth_table(setting)]
    lines += ["", "## How", "", _how(results["recipe"]), "", provenance_line(results), ""]
    return "\n".join(lines)


def plot_gains(results: dict, path: Path) -> None:
    """A row a data set, a panel a rank, a dot an arm: its gain over the alternating mixture with the 95 % interval."""
    rows = []
    for data_set in DATA_SETS:
        arms = results["settings"][data_set.name]["arms"]
        titles = {k: f"{data_set.title}\nrecall@{k}" if k == KS[0] else f"recall@{k}" for k in KS}
        rows.append({titles[k]: [arms[arm]["gains"][str(k)] for arm in COMPARED] for k in KS})
    heading = "Against the alternating mixture (the black line), mean of all directions:"
    names = [TITLES[arm] for arm in COMPARED]
    plot_gain_panels(path, rows, names, "points gained", heading, results["seeds"], height=6.8)


def plot_usage(results: dict, path: Path) -> None:
    """Panels of data sets and branches: a row a direction, a column an expert, dark where test items go."""
    figure, axes = plt.subplots(1, 2 * len(DATA_SETS), figsize=(15, 7.6), layout="constrained")
    for first, data_set in enumerate(DATA_SETS):
        usage = results["settings"][data_set.name]["usage"]
        names, shares = list(usage), np.array(list(usage.values()))  # [directions, 2, experts]
        for axis, branch in zip(axes[2 * first : 2 * first + 2], (0, 1), strict=True):
            image = axis.imshow(shares[:, branch], cmap="Blues", vmin=0, vmax=0.5, aspect="auto")
            axis.set_xticks(range(shares.shape[2]), [str(e) for e in range(shares.shape[2])])
            labels = [name.replace("->", " \N{RIGHTWARDS ARROW} ") for name in names] if branch == 0 else []
            axis.set_yticks(range(len(labels)), labels, fontsize=8.5)
            axis.set_xlabel("expert")
            axis.set_title(f"{data_set.name}, {('regression', 'contrastive')[branch]} branch", fontsize=11)
            axis.tick_params(length=0)
            for edge in range(len(data_set.views) - 1, len(names), len(data_set.views) - 1):
                axis.axhline(edge - 0.5, color="#7d8794", linewidth=0.8)
    figure.colorbar(image, ax=axes, label="share of a direction's choices", shrink=0.6)
    figure.suptitle("Which experts each direction uses on test items, seed 0", fontsize=12.5)
    save_figure(figure, path)
