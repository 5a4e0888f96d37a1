"""The report and the pictures of the study of attribution regularisation."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from .amss_data import DATA_SETS
from .attribution_arms import CONDITIONS, DROPPED, LEAST_SHARE, STRONG_WEIGHT, TITLES, WEIGHT
from .comparing import (
    comparison,
    gain_text,
    listed,
    mean_deviation,
    mean_text,
    provenance_line,
)
from .gain_panels import plot_gain_panels, save_figure

COMPARED = tuple(arm for arm in TITLES if arm != "plain")
MODALITY_COLOURS = ("#2468b4", "#c0562f", "#3a8f5c", "#8d5fb0")


def summarise(runs: list[dict]) -> dict:
    """Runs of all seeds -> for each data set metrics, gains over plain under each condition, shares."""
    settings = {}
    for data_set in DATA_SETS:
        own = [run for run in runs if run["data_set"] == data_set.name]
        arms = {}
        for arm in TITLES:
            of_arm = [run["arms"][arm] for run in own]
            conditions = {}
            for condition in CONDITIONS:
                values = [100 * a["metrics"][condition]["accuracy"] for a in of_arm]
                plain = [100 * run["arms"]["plain"]["metrics"][condition]["accuracy"] for run in own]
                conditions[condition] = {
                    "accuracy": mean_deviation(values),
                    "over_plain": comparison([a - b for a, b in zip(values, plain, strict=True)]),
                }
            arms[arm] = {
                "conditions": conditions,
                "macro_f1": mean_deviation([100 * a["metrics"]["clean"]["macro_f1"] for a in of_arm]),
                "shares": _means([a["shares"] for a in of_arm]),
                "seconds": mean_deviation([a["seconds"] for a in of_arm])[0],
            }
        settings[data_set.name] = {
            "arms": arms,
            "alone": _means([run["alone"] for run in own]),
            "asked": _means([run["asked"] for run in own]),
            "strong": Counter(run["strong"] for run in own).most_common(),
            "rows": own[0]["rows"],
        }
    return settings


def _means(of_seeds: list[dict[str, float]]) -> dict[str, float]:
    return {name: mean_deviation([one[name] for one in of_seeds])[0] for name in of_seeds[0]}


def verdicts(results: dict) -> list[str]:
    """What each arm does under each condition."""
    lines = []
    settings = results["settings"]
    for condition, title in CONDITIONS.items():
        for arm in COMPARED:
            gains = {name: s["arms"][arm]["conditions"][condition]["over_plain"] for name, s in settings.items()}
            better = [name for name, gain in gains.items() if gain["verdict"] == "better"]
            worse = [name for name, gain in gains.items() if gain["verdict"] == "worse"]
            lines.append(
                f"{title}, {TITLES[arm]}: clearly better than plain in {listed(better)}; worse in {listed(worse)}."
            )
    return lines


def _accuracy_table(setting: dict) -> list[str]:
    head = " | ".join(f"{title}, % | gained" for title in CONDITIONS.values())
    lines = [f"| arm | {head} | macro-F1, clean, % |", "|---" * (2 + 2 * len(CONDITIONS)) + "|"]
    for arm, title in TITLES.items():
        own = setting["arms"][arm]
        cells = []
        for condition in CONDITIONS:
            found = own["conditions"][condition]
            gain = gain_text(found["over_plain"])
            text = gain if found["over_plain"]["verdict"] == "unclear" else f"**{gain}**"
            cells += [mean_text(*found["accuracy"], 1), "" if arm == "plain" else text]
        lines.append(f"| {title} | {' | '.join(cells)} | {mean_text(*own['macro_f1'], 1)} |")
    return lines


def _shares_table(setting: dict) -> list[str]:
    names = list(setting["alone"])
    lines = [f"| share in test decisions | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    for arm, title in TITLES.items():
        shares = setting["arms"][arm]["shares"]
        lines.append(f"| {title} | {' | '.join(f'{shares[name]:.2f}' for name in names)} |")
    asked, alone = setting["asked"], setting["alone"]
    lines.append(f"| (asked for by strength) | {' | '.join(f'{asked[name]:.2f}' for name in names)} |")
    lines.append(f"| (validation accuracy alone, %) | {' | '.join(f'{100 * alone[name]:.1f}' for name in names)} |")
    return lines


COMPARISONS = len(COMPARED) * len(CONDITIONS) * len(DATA_SETS)
COST = (
    "Seconds of one training, with whatever else the machine did meanwhile; what the regulariser costs is measured by "
    "`make bench-attribution`."
)
HOW = f"""
- Data, splits and models are those of the study of AMSS: late fusion by one linear layer, Adam with the learning rate
  and weight decay chosen there for plain training; the epoch with the best validation accuracy counts. All arms of a
  seed share initial weights and batches.
- Equal shares, shares by strength: `mmbal.AttributionRegularizer` with its defaults (log-odds, L2 pool, L1 penalty),
  its value times {WEIGHT:g} added to the loss, once also times {STRONG_WEIGHT:g}. It has gradients for the linear layer
  alone. Strength: by how much each modality alone beats the most frequent class on validation rows, at least
  {LEAST_SHARE:g}.
- Entropy bonus: {WEIGHT:g} times the mean entropy of the shares, for the linear layer alone too.
- Modality dropout: in training each modality's features are 0 with probability {DROPPED:g}, one at least is left.
- Strong modality: the one that is best alone on validation rows, in each seed. Of another row: its features come from
  another test row, drawn by seed. Missing: they are the mean of the training rows.
- Better and worse: the 95 % interval (Student's t) of the paired gain over the seeds leaves out zero; other test rows
  are not in it. Of {COMPARISONS} comparisons about {max(1, round(0.05 * COMPARISONS))} would be clear by chance.
""".strip()


def markdown(results: dict) -> str:
    """The report."""
    count = results["seeds"]
    lines = [
        "# Attribution regularisation: saying how much each modality should matter",
        "",
        f"{len(DATA_SETS)} data sets, {count} seed{'s' if count > 1 else ''}. Accuracy, mean ± standard deviation over "
        "the seeds; gains are points paired with plain training of the same seed, mean ± standard error, positive is "
        "better, bold where clear.",
        "",
        "## Verdict",
        "",
        *(f"- {line}" for line in verdicts(results)),
        "",
        "![Gain of each arm over plain training](attribution.png)",
        "",
        "![Shares of the modalities in test decisions](attribution-shares.png)",
    ]
    for data_set in DATA_SETS:
        setting = results["settings"][data_set.name]
        rows = setting["rows"]
        strong = ", ".join(f"{name} ({times} of {count})" for name, times in setting["strong"])
        lines += [
            "",
            f"## {data_set.name}: {data_set.title}",
            "",
            f"{rows['train']} training, {rows['validation']} validation, {rows['test']} test rows. Strong: {strong}.",
            "",
            *_accuracy_table(setting),
            "",
            *_shares_table(setting),
        ]
    lines += ["", "## How", "", HOW, "", "## Cost", "", COST, ""]
    lines += [f"| trained | {' | '.join(results['settings'])} |", "|---" * (len(DATA_SETS) + 1) + "|"]
    for arm, title in TITLES.items():
        cells = " | ".join(f"{s['arms'][arm]['seconds']:.1f}" for s in results["settings"].values())
        lines.append(f"| {title} | {cells} |")
    lines += ["", provenance_line(results), ""]
    return "\n".join(lines)


def plot_gains(results: dict, path: Path) -> None:
    """A row a data set, a panel a condition, a dot an arm: its gain over plain training with the 95 % interval."""
    rows = []
    for data_set in DATA_SETS:
        arms = results["settings"][data_set.name]["arms"]
        rows.append(
            {
                f"{data_set.title}\n{title}": [arms[arm]["conditions"][condition]["over_plain"] for arm in COMPARED]
                for condition, title in CONDITIONS.items()
            }
        )
    heading = "Does asking for shares beat plain training (the black line)?"
    names = [TITLES[arm] for arm in COMPARED]
    plot_gain_panels(path, rows, names, "accuracy gained, points", heading, results["seeds"], height=9.6)


def plot_shares(results: dict, path: Path) -> None:
    """A panel a data set, a bar an arm, cut by the modalities' mean shares in test decisions."""
    figure, axes = plt.subplots(1, len(DATA_SETS), figsize=(12, 4), layout="constrained", squeeze=False)
    for axis, data_set in zip(axes[0], DATA_SETS, strict=True):
        setting = results["settings"][data_set.name]
        left = [0.0] * len(TITLES)
        for name, colour in zip(setting["alone"], MODALITY_COLOURS, strict=False):
            widths = [setting["arms"][arm]["shares"][name] for arm in TITLES]
            axis.barh(range(len(TITLES)), widths, left=left, color=colour, edgecolor="white", label=name)
            left = [a + b for a, b in zip(left, widths, strict=True)]
        axis.set_yticks(range(len(TITLES)), list(TITLES.values()) if axis is axes[0][0] else [])
        axis.set_ylim(len(TITLES) - 0.5, -0.5)
        axis.set_xlim(0, 1)
        axis.set_title(data_set.title, fontsize=11)
        axis.spines[["top", "right", "left"]].set_visible(False)
        axis.tick_params(axis="y", length=0)
        axis.legend(loc="upper center", bbox_to_anchor=(0.5, -0.1), ncols=2, frameon=False, fontsize=9)
    figure.suptitle("Mean share of each modality in the decisions on test rows, by arm", fontsize=12.5)
    save_figure(figure, path)
