"""What the study of BTW leaves behind to read: its summary, its report and one picture."""

from __future__ import annotations

import statistics
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mmbal.files import replace_file

from .btw_arms import LEAKING, METHODS, TITLES
from .comparing import (
    comparison,
    dress,
    gain_dot,
    gain_text,
    listed,
    mean_deviation,
    mean_text,
    provenance_line,
    reach_of,
    verdict_handles,
)
from .data import SETTINGS

METRICS = {  # of a table: the main metric first
    "chicago": {"mae": "MAE, thousand riders", "r2": "R²"},
    "cells": {"accuracy": "accuracy, %", "macro_f1": "macro-F1, %"},
}
LEAK_TITLES = {
    "chicago": "published protocol: USES TEST LABELS",
    "cells": "published protocol: sees all test rows at once",
}
COMPARED = tuple(arm for arm in TITLES if arm not in ("plain", LEAKING))


def _shown(metric: str, value: float) -> float:
    return 100 * value if metric in ("accuracy", "macro_f1") else value


def summarise(runs: list[dict]) -> dict:
    """Of each setting: metrics of each arm over the seeds, gains over plain fusion and over the average of models.

    A gain is how much lower the MAE is, in percent of the other arm's, or how many points higher the accuracy.
    """
    summary = {}
    for setting in SETTINGS:
        own = [run for run in runs if run["setting"] == setting.name]
        names = list(METRICS[setting.table])
        main = names[0]

        def values(arm: str, metric: str, own=own) -> list[float]:
            return [_shown(metric, run["arms"][arm]["metrics"][metric]) for run in own]

        def gains(arm: str, other: str, main=main, values=values) -> list[float]:
            pairs = zip(values(arm, main), values(other, main), strict=True)
            return [100 * (b - a) / b if main == "mae" else a - b for a, b in pairs]

        arms = {}
        for arm in TITLES:
            arms[arm] = {
                "metrics": {metric: mean_deviation(values(arm, metric)) for metric in names},
                "seconds": statistics.mean(run["arms"][arm]["seconds"] for run in own),
            }
            weights = [run["arms"][arm]["weights"] for run in own if "weights" in run["arms"][arm]]
            if weights:
                arms[arm]["weights"] = {name: statistics.mean(w[name] for w in weights) for name in weights[0]}
            if arm != "plain":
                arms[arm]["over_plain"] = comparison(gains(arm, "plain"))
            if arm in METHODS:
                arms[arm]["over_average"] = comparison(gains(arm, "average"))
        alone = {
            name: statistics.mean(_shown(main, run["unimodal"][name][main]) for run in own)
            for name in own[0]["unimodal"]
        }
        summary[setting.name] = {
            "rows": own[0]["rows"],
            "arms": arms,
            "unimodal": alone,
            "unimodal_seconds": statistics.mean(run["seconds"]["unimodal"] for run in own),
        }
    return summary


def verdicts(results: dict) -> list[str]:
    """One line an arm, then what follows; all from the numbers."""
    if results["seeds"] < 2:
        return ["One seed: no verdict."]
    settings = results["settings"]

    def where(arm: str, verdict: str, against: str = "over_plain") -> list[str]:
        return [name for name in settings if settings[name]["arms"][arm][against]["verdict"] == verdict]

    lines = []
    for arm in COMPARED:
        better, worse = where(arm, "better"), where(arm, "worse")
        lines.append(f"{TITLES[arm]}: clearly better than plain fusion in {listed(better)}; worse in {listed(worse)}.")
    helpful = [TITLES[arm] for arm in COMPARED if where(arm, "better") and not where(arm, "worse")]
    lines.append(
        "**Clearly better than plain fusion somewhere and clearly worse nowhere:** "
        + (", ".join(helpful) or "no arm")
        + "."
    )
    of_btw = [TITLES[arm] for arm in METHODS if where(arm, "better") and not where(arm, "worse")]
    lines.append(f"**Of the arms with BTW's weights:** {', '.join(of_btw) or 'none'}.")
    none = [name for name in settings if not any(name in where(arm, "better") for arm in METHODS)]
    lines.append(f"**No arm with BTW's weights clearly beats plain fusion in:** {listed(none)}.")
    cheap, both = [], []
    for arm in METHODS:
        found = where(arm, "better", "over_average")
        cheap += [f"{TITLES[arm]} ({listed(found)})"] if found else []
        found = [name for name in found if name in where(arm, "better")]
        both += [f"{TITLES[arm]} ({listed(found)})"] if found else []
    lines.append(
        "**At equal cost**, clearly better than the average of the models that BTW needs too: "
        f"{'; '.join(cheap) or 'no arm'}. Clearly better than this average and than plain fusion: "
        f"{'; '.join(both) or 'no arm'}."
    )
    for name, setting in settings.items():
        gain = setting["arms"][LEAKING]["over_plain"]
        title = LEAK_TITLES[name.partition("-")[0]]
        lines.append(f"{name}, {title} (no result of a method): {_gain(name, gain)} against plain fusion.")
    return lines


def _gain(setting: str, gain: dict) -> str:
    return gain_text(gain, " %" if setting.startswith("chicago") else "")


def _metric_cells(summary: dict) -> str:
    digits = {metric: 1 if metric in ("accuracy", "macro_f1") else 3 for metric in summary["metrics"]}
    return " | ".join(mean_text(*values, digits[metric]) for metric, values in summary["metrics"].items())


def _table(setting, summary: dict) -> list[str]:
    titles = METRICS[setting.table]
    gain = "MAE lower by" if setting.table == "chicago" else "points gained"
    head = [
        f"| arm | {' | '.join(titles.values())} | {gain} | seeds better | verdict |",
        "|---" * (len(titles) + 4) + "|",
    ]

    def row(arm: str, title: str) -> str:
        arm_summary = summary["arms"][arm]
        if arm == "plain":
            return f"| {title} | {_metric_cells(arm_summary)} | | | |"
        against = arm_summary["over_plain"]
        verdict = against["verdict"] if against["seeds"] > 1 else ""
        return (
            f"| {title} | {_metric_cells(arm_summary)} | {_gain(setting.name, against)} "
            f"| {against['seeds_better']} of {against['seeds']} | {verdict} |"
        )

    return [
        *head,
        *(row(arm, TITLES[arm]) for arm in TITLES if arm != LEAKING),
        "",
        "Apart, because it looks at the rows it is tested on:",
        "",
        *head,
        row(LEAKING, f"**{LEAK_TITLES[setting.table]}**"),
    ]


def _weights_table(setting, summary: dict) -> list[str]:
    names = list(summary["unimodal"])
    unit = "MAE" if setting.table == "chicago" else "accuracy"
    digits = 2 if setting.table == "chicago" else 1
    lines = [f"| mean weight of a test row | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
    alone = " | ".join(f"{summary['unimodal'][name]:.{digits}f}" for name in names)
    lines.append(f"| ({unit} of the modality alone) | {alone} |")
    for arm in (*METHODS, LEAKING):
        cells = " | ".join(f"{summary['arms'][arm]['weights'][name]:.2f}" for name in names)
        lines.append(f"| {TITLES[arm] if arm != LEAKING else LEAK_TITLES[setting.table]} | {cells} |")
    return lines


HOW = """
- Data: `chicago`, daily ridership of a station; train before 2012, validation 2012, test from 2013 on. `cells`, is a
  cell well segmented; test as the table says, validation a stratified fifth of the training cells by seed. In the
  variants with missing modalities each modality of each row is absent with probability 0.3, at least one is left; the
  rows are the same in every arm of a seed. Inputs are standardised with the training rows that have the modality.
- Models: linear-ReLU-linear to 32 a modality, concatenated, linear-ReLU-linear; Adam, a cosine to zero. Loss and
  selection by absolute error or cross entropy; the epoch with the best validation loss counts. All arms of a seed share
  initial weights and batches. Learning rate and weight decay were chosen for plain fusion on validation rows; BTW's own
  values are its defaults.
- BTW: after every epoch the training rows are predicted with their present weights and the weights renewed; the
  validation loss moves alpha. Held-out rows have no label and no row in the table: a first prediction with the mean
  weights, from it their own weights (constant sigma of the training residuals, frozen mutual information), then the
  final prediction. "Mean weights at test" stops after the first prediction, which tells what the second one does.
- Sum 1: weights 1 / number of present modalities, what the shrinking of the published weights does by itself. The other
  arms with BTW's weights keep a row's mean weight at 1.
- Best single modality: of the modalities that a row has, the one with the best validation loss of its model.
- Average: plain fusion and the models of the present modalities, all weighing the same (classes: probabilities).
  Every arm with BTW's weights needs these models too.
- Published protocol: rows summing to 1, each split with a table and a mutual information of its own. Regression takes
  the deviations of validation and test rows from THEIR LABELS and moves alpha by the test loss: label leakage. In
  classification neither factor needs a label, but the mutual information is that of the test rows together
  (transductive). Its numbers are no result of a method.
- Better and worse: the 95 % interval (Student's t) of the paired gain over the seeds leaves out zero. Seeds change
  initial weights, batches, missing modalities and, in `cells`, the validation rows; never the test rows, so the
  interval says nothing of other test rows. Among {comparisons} comparisons about {chance} would look clear by chance.
""".strip()


def markdown(results: dict) -> str:
    """The report."""
    settings = results["settings"]
    count = results["seeds"]
    lines = [
        "# BTW: weighting modalities by divergence and mutual information",
        "",
        f"{len(SETTINGS)} settings, {count} seed{'s' if count > 1 else ''}, {results['recipe']['epochs']} epochs. "
        "Mean ± standard deviation over the seeds; gains are paired with plain fusion of the same seed, mean ± "
        "standard error, positive is better.",
        "",
        "## Verdict",
        "",
        *(f"- {line}" for line in verdicts(results)),
        "",
        "![Gain of each arm over plain fusion](btw.png)",
    ]
    for setting in SETTINGS:
        summary = settings[setting.name]
        rows = summary["rows"]
        lines += [
            "",
            f"## {setting.name}: {setting.title}",
            "",
            f"{rows['train']} training, {rows['validation']} validation, {rows['test']} test rows.",
            "",
            *_table(setting, summary),
            "",
            *_weights_table(setting, summary),
        ]
    comparisons = len(COMPARED) * len(settings)
    lines += ["", "## How", "", HOW.format(comparisons=comparisons, chance=max(1, round(0.05 * comparisons)))]
    lines += ["", "## Cost", "", "Seconds of one seed.", "", f"| trained | {' | '.join(settings)} |"]
    lines.append("|---" * (len(settings) + 1) + "|")
    lines.append(
        "| the four unimodal models | " + " | ".join(f"{s['unimodal_seconds']:.1f}" for s in settings.values()) + " |"
    )
    for arm in TITLES:
        if arm not in ("single", "average"):
            cells = " | ".join(f"{s['arms'][arm]['seconds']:.1f}" for s in settings.values())
            lines.append(f"| {TITLES[arm]} | {cells} |")
    lines += ["", provenance_line(results), ""]
    return "\n".join(lines)


def _panel(axis, setting, summary: dict, order: list[str]) -> None:
    """Dots: gain of each arm over plain fusion with its 95 % interval; what lies outside is an arrow with a number."""
    gains = {arm: summary["arms"][arm]["over_plain"] for arm in order}
    far = reach_of(list(gains.values()))
    unit = " %" if setting.table == "chicago" else ""
    axis.axvline(0, color="black", linewidth=1.2)
    for place, arm in enumerate(order):
        look = {"color": "#8a8a8a", "mfc": "white"} if arm == LEAKING else {}
        gain_dot(axis, gains[arm], place, far, unit, **look)
    last = len(order) - 1
    axis.axhspan(last - 0.5, last + 0.5, facecolor="#eeeeee", edgecolor="#cccccc", hatch="///", linewidth=0, zorder=0)
    axis.axhline(len(METHODS) - 0.5, color="#b0b0b0", linewidth=0.8, linestyle=":")
    axis.set_xlim(-far[-1], far[1])
    axis.set_ylim(last + 0.5, -0.5)
    dress(axis, setting.title, "MAE lower by, %" if setting.table == "chicago" else "accuracy gained, points")


def plot(results: dict, path: Path) -> None:
    """A panel a setting, a dot an arm."""
    order = [*METHODS, *(arm for arm in COMPARED if arm not in METHODS), LEAKING]
    figure, axes = plt.subplots(2, 2, figsize=(11, 8), layout="constrained")
    for axis, setting in zip(axes.flat, SETTINGS, strict=True):
        _panel(axis, setting, results["settings"][setting.name], order)
        labels = [TITLES[arm] for arm in order]
        labels[-1] = "NOT A RESULT: " + LEAK_TITLES[setting.table].replace(": ", ",\n")
        axis.set_yticks(range(len(order)), labels if setting.missing is False else [""] * len(order))
    count = results["seeds"]
    bars = f"mean and 95 % interval of {count} seeds" if count > 1 else "one seed, no interval"
    figure.suptitle(f"Does weighting the modalities beat plain fusion (the black line)? {bars}", fontsize=12.5)
    figure.legend(handles=verdict_handles(plt), loc="outside lower center", ncols=3, frameon=False)
    replace_file(path, lambda file: figure.savefig(file, dpi=130, format="png"))
    plt.close(figure)
