"""The report and the pictures of the study of Alt-MoE."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np

from mmbal.demo.model import replace_file

from .altmoe_arms import GROWTH, KS, TITLES, mean_recall
from .altmoe_data import SEVENTH, VIEWS
from .comparing import (
    comparison,
    dress,
    gain_dot,
    gain_text,
    mean_deviation,
    mean_text,
    provenance_line,
    reach_of,
    verdict_handles,
)

BASE = "alternating"
COMPARED = tuple(arm for arm in TITLES if arm != BASE)


def _old(recalls: dict) -> list[str]:
    return [name for name in recalls if SEVENTH not in name.split("->")]


def _new(recalls: dict) -> list[str]:
    return [name for name in recalls if SEVENTH in name.split("->")]


def summarise(runs: list[dict]) -> dict:
    """Runs of all seeds -> mean recalls of each arm over the directions, gains over the alternating arm, growth."""

    def percent(run: dict, arm: str, k: int) -> float:
        return 100 * mean_recall(run["arms"][arm]["recalls"], k)

    arms = {}
    for arm in TITLES:
        recalls = {k: [percent(run, arm, k) for run in runs] for k in KS}
        gains = {k: [v - percent(run, BASE, k) for v, run in zip(recalls[k], runs, strict=True)] for k in KS}
        own = [run["arms"][arm] for run in runs]
        arms[arm] = {
            "recalls": {str(k): mean_deviation(values) for k, values in recalls.items()},
            "gains": {str(k): comparison(values) for k, values in gains.items()},
            "parameters": own[0]["parameters"],
            "best_epoch": mean_deviation([o["best_epoch"] for o in own])[0],
            "seconds": mean_deviation([o["seconds"] for o in own])[0],
        }
    directions = {
        name: mean_deviation([100 * run["arms"][BASE]["recalls"][name]["1"] for run in runs])[0]
        for name in runs[0]["arms"][BASE]["recalls"]
    }
    growth = {}
    for way in GROWTH:
        of_way = [run["growth"][way]["recalls"] for run in runs]
        growth[way] = {
            "old": mean_deviation([100 * mean_recall(r, 1, _old(r)) for r in of_way]),
            "new": mean_deviation([100 * mean_recall(r, 1, _new(r)) for r in of_way]),
            "old_change": comparison(
                [100 * mean_recall(r, 1, _old(r)) - percent(run, BASE, 1) for r, run in zip(of_way, runs, strict=True)]
            ),
            "seconds": mean_deviation([run["growth"][way]["seconds"] for run in runs])[0],
        }
    usage = runs[0]["arms"][BASE]["usage"]
    return {"arms": arms, "directions": directions, "growth": growth, "usage": usage, "rows": runs[0]["rows"]}


def verdicts(settings: dict) -> list[str]:
    """What each arm does against the alternating one, and what growth costs."""
    words = {"better": "clearly better than", "worse": "clearly worse than", "unclear": "not clearly different from"}
    lines = []
    for arm in COMPARED:
        gain = settings["arms"][arm]["gains"]["1"]
        lines.append(
            f"{TITLES[arm]}: {words[gain['verdict']]} the alternating mixture (recall@1 {gain_text(gain, ' points')})."
        )
    for way, title in GROWTH.items():
        found = settings["growth"][way]
        old, new = gain_text(found["old_change"], " points"), mean_text(*found["new"], 1)
        lines.append(f"A seventh view, {title}: recall@1 of the old directions {old}, of the new ones {new} %.")
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


def _directions_table(settings: dict) -> list[str]:
    lines = [f"| from, to | {' | '.join(VIEWS)} |", "|---" * (len(VIEWS) + 1) + "|"]
    for src in VIEWS:
        cells = ["" if src == tgt else f"{settings['directions'][f'{src}->{tgt}']:.1f}" for tgt in VIEWS]
        lines.append(f"| {src} | {' | '.join(cells)} |")
    return lines


def _growth_table(settings: dict) -> list[str]:
    lines = ["| seventh view | old directions, R@1, % | changed | new directions, R@1, % | s |", "|---" * 5 + "|"]
    for way, title in GROWTH.items():
        found = settings["growth"][way]
        lines.append(
            f"| {title} | {mean_text(*found['old'], 1)} | {gain_text(found['old_change'])} | "
            f"{mean_text(*found['new'], 1)} | {found['seconds']:.0f} |"
        )
    return lines


def markdown(results: dict) -> str:
    """The report."""
    settings, count, recipe = results["settings"], results["seeds"], results["recipe"]
    rows = settings["rows"]
    views = "; ".join(f"{name}: {title}" for name, title in VIEWS.items())
    directions, passes = len(settings["directions"]), recipe["epochs"]
    how = f"""
- Retrieve the same picture of a digit by another view of it, among {rows["test"]} test pictures; {rows["train"]}
  training, {rows["validation"]} validation pictures. Views: {views}. Each is standardised.
- All arms see each of the {directions} directions in {passes} passes over the training pictures: alternating arms in
  one optimizer step a batch and direction, the joint arm in one step a batch with the mean loss of all directions, so
  in {directions} times fewer steps; it has a learning rate of its own ({recipe["joint_learning_rate"]:g} against
  {recipe["learning_rate"]:g}), each the best of those tried on validation pictures of another seed. AdamW, weight decay
  {recipe["weight_decay"]:g}, half a cosine, gradients clipped to 1; the best of {recipe["evaluations"]} evaluations by
  mean validation recall@1 counts.
- Connector: `mmbal.MoEConnector`, width {recipe["hidden"]}, {recipe["experts"]} experts, top-{recipe["top_k"]}, dropout
  {recipe["dropout"]:g}; `mmbal.AlignLoss` with its defaults. The MLPs are one expert, {recipe["top_k"]} and
  {recipe["experts"]} times as wide. A connector for each direction: as many of them, each with all experts.
- The seventh view is the logarithm of the magnitudes of the spectrum of the pixels: {2 * len(VIEWS)} new directions,
  as many passes in each as the first had. In the first way all that was there is frozen, so the old directions stay
  bit for bit.
- Clear: the 95 % interval (Student's t) of the paired gain over the seeds leaves out zero; with few seeds only large
  and steady gains are clear. Recalls are means over directions; other test pictures are not in the interval.
""".strip()
    lines = [
        "# Alt-MoE: any view of a digit from any other, direction by direction",
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
        "",
        "## Arms",
        "",
        *_arms_table(settings),
        "",
        "## Directions of the alternating mixture, recall@1, %",
        "",
        *_directions_table(settings),
        "",
        "## A seventh view",
        "",
        *_growth_table(settings),
        "",
        "## How",
        "",
        how,
        "",
        provenance_line(results),
        "",
    ]
    return "\n".join(lines)


def _save(figure, path: Path) -> None:
    replace_file(path, lambda file: figure.savefig(file, dpi=130, format="png"))
    plt.close(figure)


def plot_gains(results: dict, path: Path) -> None:
    """A panel a rank, a dot an arm: its gain over the alternating mixture with the 95 % interval."""
    arms = results["settings"]["arms"]
    figure, axes = plt.subplots(1, len(KS), figsize=(12, 3.9), layout="constrained", squeeze=False)
    for axis, k in zip(axes[0], KS, strict=True):
        gains = {arm: arms[arm]["gains"][str(k)] for arm in COMPARED}
        far = reach_of(list(gains.values()))
        axis.axvline(0, color="black", linewidth=1.2)
        for place, gain in enumerate(gains.values()):
            gain_dot(axis, gain, place, far)
        axis.set_xlim(-far[-1], far[1])
        axis.set_ylim(len(COMPARED) - 0.5, -0.5)
        axis.set_yticks(range(len(COMPARED)), [TITLES[arm] for arm in COMPARED] if axis is axes[0][0] else [])
        dress(axis, f"recall@{k}", "points gained")
    count = results["seeds"]
    bars = f"mean and 95 % interval of {count} seeds" if count > 1 else "one seed, no interval"
    figure.suptitle(f"Against the alternating mixture (the black line), mean of all directions: {bars}", fontsize=12.5)
    figure.legend(handles=verdict_handles(plt), loc="outside lower center", ncols=3, frameon=False)
    _save(figure, path)


def plot_usage(results: dict, path: Path) -> None:
    """A panel a branch: rows are directions, columns experts, dark where a direction's test pictures go."""
    usage = results["settings"]["usage"]
    names = list(usage)
    shares = np.array([usage[name] for name in names])  # [directions, 2, experts]
    figure, axes = plt.subplots(1, 2, figsize=(9, 8.2), layout="constrained", sharey=True)
    for axis, branch, title in zip(axes, (0, 1), ("regression branch", "contrastive branch"), strict=True):
        image = axis.imshow(shares[:, branch], cmap="Blues", vmin=0, vmax=shares.max(), aspect="auto")
        axis.set_xticks(range(shares.shape[2]), [str(e) for e in range(shares.shape[2])])
        axis.set_yticks(
            range(len(names)), [name.replace("->", " \N{RIGHTWARDS ARROW} ") for name in names], fontsize=8.5
        )
        axis.set_xlabel("expert")
        axis.set_title(title, fontsize=11)
        axis.tick_params(length=0)
        for edge in range(len(VIEWS) - 1, len(names), len(VIEWS) - 1):
            axis.axhline(edge - 0.5, color="#7d8794", linewidth=0.8)
    figure.colorbar(image, ax=axes, label="share of a direction's choices", shrink=0.6)
    figure.suptitle("Which experts each direction uses on test pictures, seed 0", fontsize=12.5)
    _save(figure, path)
