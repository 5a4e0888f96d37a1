"""The picture that several studies end with: panels of arms, a dot for each arm's gain over one of them."""

from __future__ import annotations

from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

from mmbal.files import replace_file

from .comparing import dress, gain_dot, reach_of, verdict_handles


def save_figure(figure, path: Path) -> None:
    replace_file(path, lambda file: figure.savefig(file, dpi=130, format="png"))
    plt.close(figure)


def plot_gain_panels(
    path: Path, rows: list[dict[str, list[dict]]], arms: list[str], label: str, heading: str, seeds: int, height: float
) -> None:
    """rows: of panels, {title: gain of each arm with its 95 % interval}; heading goes before the number of seeds."""
    figure, axes = plt.subplots(len(rows), len(rows[0]), figsize=(12, height), layout="constrained", squeeze=False)
    for row, panels in zip(axes, rows, strict=True):
        for axis, (title, gains) in zip(row, panels.items(), strict=True):
            far = reach_of(gains)
            axis.axvline(0, color="black", linewidth=1.2)
            for place, gain in enumerate(gains):
                gain_dot(axis, gain, place, far)
            axis.set_xlim(-far[-1], far[1])
            axis.set_ylim(len(arms) - 0.5, -0.5)
            axis.set_yticks(range(len(arms)), arms if axis is row[0] else [])
            dress(axis, title, label)
    bars = f"mean and 95 % interval of {seeds} seeds" if seeds > 1 else "one seed, no interval"
    figure.suptitle(f"{heading} {bars}", fontsize=12.5)
    figure.legend(handles=verdict_handles(plt), loc="outside lower center", ncols=3, frameon=False)
    save_figure(figure, path)
