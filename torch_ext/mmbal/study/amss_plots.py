"""The two pictures of the study of AMSS."""

from __future__ import annotations

import math
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from matplotlib.ticker import MaxNLocator

from mmbal.files import replace_file

from .amss_arms import FUSED, OPTIMIZERS, TITLES
from .amss_data import DATA_SETS
from .amss_report import COMPARED, MASKED, key_of, title_of
from .comparing import dress, gain_dot, verdict_handles

MODALITY_COLOURS = ("#2468b4", "#c0562f", "#3a8f5c", "#8d5fb0")
MARKERS = ("o", "s", "^", "D")
GAP_LINES = {  # arm: colour and width
    "joint": ("#222222", 2.2),
    "amss": ("#2468b4", 2.2),
    "amss_plus": ("#5aa9e6", 2.2),
    "ogm": ("#c0562f", 1.6),
}
SHOWN = "sgd"  # the optimizer of the curves


def _save(figure, path: Path) -> None:
    replace_file(path, lambda file: figure.savefig(file, dpi=130, format="png"))
    plt.close(figure)


def _seeds_text(results: dict, bars: str) -> str:
    count = results["seeds"]
    return f"{bars} of {count} seeds" if count > 1 else "one seed"


def _common_reach(results: dict) -> dict[int, float]:
    """One scale for all panels: to the right every interval of a fused arm shows whole, to the left nine in ten."""
    gains = [own["arms"][arm]["over_joint"] for own in results["settings"].values() for arm in COMPARED if arm in FUSED]
    far = {}
    for side in (-1, 1):
        ends = sorted(side * gain["mean"] + (gain["half_interval"] or 0) for gain in gains)
        share = 1 if side > 0 else 0.9
        far[side] = max(1.1 * ends[math.ceil(share * len(ends)) - 1], 0.5)
    return far


def plot_gains(results: dict, path: Path) -> None:
    """A panel a data set and optimizer, a dot an arm: its gain over joint training with the 95 % interval."""
    figure, axes = plt.subplots(len(OPTIMIZERS), len(DATA_SETS), figsize=(12, 7.2), layout="constrained", squeeze=False)
    far = _common_reach(results)
    for row, optimizer in zip(axes, OPTIMIZERS, strict=True):
        for axis, data_set in zip(row, DATA_SETS, strict=True):
            arms = results["settings"][key_of(data_set, optimizer)]["arms"]
            axis.axvline(0, color="black", linewidth=1.2)
            for place, arm in enumerate(COMPARED):
                gain_dot(axis, arms[arm]["over_joint"], place, far)
            axis.axhline(len(MASKED) - 0.5, color="#b0b0b0", linewidth=0.8, linestyle=":")
            axis.set_xlim(-far[-1], far[1])
            axis.set_ylim(len(COMPARED) - 0.5, -0.5)
            dress(axis, title_of(data_set, optimizer), "accuracy gained, points")
            labels = [TITLES[arm] for arm in COMPARED]
            axis.set_yticks(range(len(labels)), labels if axis is row[0] else [""] * len(labels))
    bars = _seeds_text(results, "mean and 95 % interval")
    figure.suptitle(f"Does AMSS beat joint training (the black line)? {bars}", fontsize=12.5)
    figure.legend(handles=verdict_handles(plt), loc="outside lower center", ncols=3, frameon=False)
    _save(figure, path)


def _plain(axis) -> None:
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color="#e4e4e4", linewidth=0.7)
    axis.set_axisbelow(True)


def plot_rho(results: dict, path: Path) -> None:
    """A column a data set: AMSS's update ratio of each modality over the epochs, below it the modality gap of arms."""
    figure, axes = plt.subplots(2, len(DATA_SETS), figsize=(12, 7), layout="constrained", sharex="col")
    for column, data_set in enumerate(DATA_SETS):
        setting = results["settings"][key_of(data_set, SHOWN)]
        top, bottom = axes[0, column], axes[1, column]
        for place, (colour, name) in enumerate(zip(MODALITY_COLOURS, data_set.modalities, strict=False)):
            values = setting["arms"]["amss"]["ratio"][name]
            strong = name == setting["strong"]
            look = {"linewidth": 2.8} if strong else {"linewidth": 1.5, "marker": MARKERS[place], "markersize": 6}
            look["markevery"] = (place, 4)  # of lines that coincide each shows its own markers
            label = f"{name} (best alone)" if strong else name
            top.plot(range(1, len(values) + 1), values, color=colour, label=label, **look)
        balanced = 1 - 1 / len(data_set.modalities)
        top.axhline(balanced, color="#7d8794", linewidth=1, linestyle=":", label="if none is ahead")
        top.set_ylim(0, 1)
        top.set_title(title_of(data_set, SHOWN), fontsize=11)
        top.legend(edgecolor="none", framealpha=0.9, fontsize=9, ncols=2 if len(data_set.modalities) > 2 else 1)
        for arm, (colour, width) in GAP_LINES.items():
            values = setting["arms"][arm]["gap"]
            bottom.plot(range(1, len(values) + 1), values, color=colour, linewidth=width, label=TITLES[arm])
        bottom.axhline(0, color="black", linewidth=0.8)
        bottom.set_xlabel("epoch")
        bottom.xaxis.set_major_locator(MaxNLocator(integer=True))
        _plain(top)
        _plain(bottom)
    axes[0, 0].set_ylabel("share of the encoder that AMSS\nupdates in a step (rho)")
    axes[1, 0].set_ylabel("modality gap, points: accuracy of the\nmodality best alone minus the others'")
    figure.legend(
        *axes[1, 0].get_legend_handles_labels(), loc="outside lower center", ncols=len(GAP_LINES), frameon=False
    )
    bars = _seeds_text(results, "mean")
    figure.suptitle(f"AMSS updates less of the modality that is ahead: does the gap close? {bars}", fontsize=12.5)
    _save(figure, path)
