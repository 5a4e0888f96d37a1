"""Gains of arms over each other, paired by seed, and how they are shown."""

from __future__ import annotations

import math
import statistics

from scipy import stats

COLOURS = {"better": "#2468b4", "worse": "#c0562f", "unclear": "#7d8794"}
VERDICT_TITLES = {"better": "clearly better", "worse": "clearly worse", "unclear": "no clear difference"}


def mean_deviation(values: list[float]) -> tuple[float, float | None]:
    """Mean and standard deviation; no deviation of a single value."""
    return statistics.mean(values), statistics.stdev(values) if len(values) > 1 else None


def comparison(gains: list[float]) -> dict:
    """Paired gains of the seeds (positive: better) -> mean, standard error, 95 % interval, seeds won, verdict."""
    mean, deviation = mean_deviation(gains)
    count, error, half, verdict = len(gains), None, None, "unclear"
    if deviation is not None:
        error = deviation / math.sqrt(count)
        half = error * float(stats.t.ppf(0.975, count - 1))
        verdict = "better" if mean > half else "worse" if mean < -half else "unclear"
    return {
        "mean": mean,
        "standard_error": error,
        "half_interval": half,
        "seeds_better": sum(gain > 0 for gain in gains),
        "seeds": count,
        "verdict": verdict,
    }


def listed(names: list[str]) -> str:
    return ", ".join(names) if names else "no setting"


def gain_text(gain: dict, unit: str = "") -> str:
    """A comparison's mean and standard error."""
    error = "" if gain["standard_error"] is None else f" ± {gain['standard_error']:.2f}"
    return f"{gain['mean']:+.2f}{unit}{error}"


def mean_text(mean: float, deviation: float | None, digits: int) -> str:
    return f"{mean:.{digits}f}" + ("" if deviation is None else f" ± {deviation:.{digits}f}")


def provenance_line(results: dict) -> str:
    """Seconds, machine and versions."""
    machine = results["machine"]
    return f"{results['seconds']:.0f} s in all. {machine['processor']}, {machine['threads']} thread; " + (
        ", ".join(f"{name} {version}" for name, version in results["versions"].items()) + "."
    )


def dress(axis, title: str, label: str) -> None:
    """Title, axis label and grid of a panel of gains, worse to the left."""
    axis.set_title(title, fontsize=11)
    axis.set_xlabel(f"← worse      {label}      better →", fontsize=9.5)
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color="#e4e4e4", linewidth=0.7)
    axis.set_axisbelow(True)


def gain_dot(axis, gain: dict, place: float, far: dict[int, float], unit: str = "", **look) -> None:
    """A comparison as a dot with its 95 % interval; beyond the panel's reach `far` an arrow with a number.

    far: the end of the panel to the left (-1) and to the right (1), both as positive numbers.
    """
    colour = look.pop("color", COLOURS[gain["verdict"]])
    side = int(math.copysign(1, gain["mean"]))
    if abs(gain["mean"]) > far[side]:
        style = {"arrowstyle": "-|>", "color": colour, "linewidth": 1.8, "shrinkA": 0, "shrinkB": 0}
        axis.annotate("", (side * far[side], place), (side * 0.86 * far[side], place), arrowprops=style)
        text = f"{gain['mean']:+.0f}{unit}".replace("-", "\N{MINUS SIGN}")
        axis.text(side * 0.83 * far[side], place, text, va="center", ha="left" if side < 0 else "right", fontsize=9)
        return
    look = {"fmt": "o", "markersize": 7.5, "capsize": 3} | look
    axis.errorbar(gain["mean"], place, xerr=gain["half_interval"], color=colour, **look)


def reach_of(gains: list[dict]) -> dict[int, float]:
    """How far a panel reaches to the left (-1) and to the right (1)."""
    reach = sorted(abs(gain["mean"]) + (gain["half_interval"] or 0) for gain in gains)
    limit = max(1.15 * reach[len(reach) // 2], 1.0)  # a far arm must not press the others together
    far = {}
    for side in (-1, 1):
        ends = [side * gain["mean"] + (gain["half_interval"] or 0) for gain in gains]
        far[side] = min((1.5 + 0.5 * side) * limit, max(0.3 * limit, 1.1 * max(ends)))  # what is better shows whole
    return far


def verdict_handles(plt) -> list:
    """Legend entries of the colours."""
    return [
        plt.Line2D([], [], marker="o", linestyle="", color=COLOURS[verdict], label=title)
        for verdict, title in VERDICT_TITLES.items()
    ]
