"""What the demo leaves behind to read: report.json, report.md and two pictures."""

from __future__ import annotations

import json
import os
import platform
from importlib import metadata
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import torch

from mmbal.files import replace_file

from .evaluate import RANKS, mean_recall

TITLES = {
    "dense": "dense parent",
    "dense_continued": "dense, trained on",
    "sparse_upcycling": "sparse upcycling",
    "clip_moe": "CLIP-MoE",
}
COLOURS = {"dense": "#b8bec6", "dense_continued": "#7d8794", "sparse_upcycling": "#e2a24c", "clip_moe": "#2468b4"}
DIRECTIONS = {"image_to_text": "image → text", "text_to_image": "text → image"}


def machine() -> dict[str, str | int]:
    name = platform.processor() or platform.machine()
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            name = next((line.split(":", 1)[1].strip() for line in file if line.startswith("model name")), name)
    except OSError:
        pass
    return {"processor": name, "cores": os.cpu_count() or 1, "threads": torch.get_num_threads()}


def versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in ("mmbal", "torch", "transformers", "scikit-learn", "tokenizers"):
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = "not installed"
    return found


def layer_title(name: str) -> str:
    """vision_model.encoder.layers.0.mlp -> image 1."""
    tower = "image" if "vision" in name else "text"
    number = next((int(part) for part in name.split(".") if part.isdigit()), 0)
    return f"{tower} {number + 1}"


def markdown(report: dict) -> str:
    lines = [
        "# CLIP-MoE on emoji and clip art",
        "",
        f"Retrieval on {report['test_pairs']} held-out pairs, percent. Each variant but the dense parent was trained "
        f"for {report['recipe_total_steps']} steps on top of it. Seed {report['seed']}.",
        "",
        "| variant | mean of six | " + " | ".join(f"{title} R@{k}" for title in ("I→T", "T→I") for k in RANKS) + " |",
        "|---" * 8 + "|",
    ]
    for name, result in report["variants"].items():
        values = [result[side][f"R@{k}"] for side in DIRECTIONS for k in RANKS]
        cells = " | ".join(f"{value:.1f}" for value in values)
        lines.append(f"| {TITLES[name]} | **{mean_recall(result):.2f}** | {cells} |")
    experts = len(next(iter(report["expert_usage"].values())))
    lines += ["", "## Expert usage", "", "Share of the routed tokens of the held-out pairs, percent.", ""]
    lines.append("| layer | expert 0 (parent) | " + " | ".join(f"expert {e}" for e in range(1, experts)) + " |")
    lines.append("|---" * (experts + 1) + "|")
    for name, shares in report["expert_usage"].items():
        lines.append(f"| {layer_title(name)} | " + " | ".join(f"{100 * share:.0f}" for share in shares) + " |")
    lines += ["", "## Cost", "", "| stage | steps | seconds | tokens/s |", "|---|---|---|---|"]
    for name, cost in report["stages"].items():
        lines.append(f"| {name} | {cost['steps']} | {cost['seconds']:.1f} | {cost.get('tokens_per_second', 0):.0f} |")
    machine, versions = report["machine"], report["versions"]
    lines += [
        "",
        f"{machine['processor']}, {machine['threads']} threads; "
        + ", ".join(f"{name} {version}" for name, version in versions.items())
        + ".",
        "",
    ]
    return "\n".join(lines)


def plot_retrieval(report: dict, path: Path) -> None:
    """Bars: recalls of the variants, one panel a direction, and the mean of the six."""
    figure, axes = plt.subplots(1, 3, figsize=(11, 4.2), width_ratios=[3, 3, 2], layout="constrained")
    variants = report["variants"]
    width = 0.8 / len(variants)
    for axis, (side, title) in zip(axes, DIRECTIONS.items(), strict=False):
        for position, (name, result) in enumerate(variants.items()):
            heights = [result[side][f"R@{k}"] for k in RANKS]
            places = [group + (position - (len(variants) - 1) / 2) * width for group in range(len(RANKS))]
            bars = axis.bar(places, heights, width * 0.94, color=COLOURS[name], label=TITLES[name])
            axis.bar_label(bars, fmt="%.0f", fontsize=7.5, padding=1)
        axis.set_xticks(range(len(RANKS)), [f"R@{k}" for k in RANKS])
        axis.set_title(title)
    axes[0].set_ylabel("found among the best k, percent")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=4, frameon=False, fontsize=9)
    means = [mean_recall(result) for result in variants.values()]
    bars = axes[2].bar(range(len(means)), means, color=[COLOURS[name] for name in variants])
    axes[2].bar_label(bars, fmt="%.1f", padding=1, fontweight="bold")
    axes[2].set_xticks(range(len(means)), [TITLES[name].replace(" ", "\n") for name in variants], fontsize=8.5)
    axes[2].set_title("mean of the six recalls")
    top = max(axis.get_ylim()[1] for axis in axes[:2]) * 1.08  # one scale for both directions
    for axis, limit in zip(axes, (top, top, axes[2].get_ylim()[1] * 1.08), strict=True):
        axis.spines[["top", "right"]].set_visible(False)
        axis.set_ylim(0, limit)
    figure.suptitle(f"Finding the right one of {report['test_pairs']} held-out image-caption pairs", fontsize=12)
    replace_file(path, lambda file: figure.savefig(file, dpi=140, format="png"))
    plt.close(figure)


def plot_usage(report: dict, path: Path) -> None:
    """Stacked bars: the share of the tokens that each expert takes in each layer."""
    usage = report["expert_usage"]
    experts = len(next(iter(usage.values())))
    figure, axis = plt.subplots(figsize=(8.5, 0.52 * len(usage) + 1.7), layout="constrained")
    colours = ["#b8bec6", "#2468b4", "#e2a24c", "#58a05a", "#b4567c", "#7a62b0", "#4aa8b0", "#8a6a4a"]
    start = [0.0] * len(usage)
    for expert in range(experts):
        shares = [100 * row[expert] for row in usage.values()]
        label = "expert 0 (the parent's)" if expert == 0 else f"expert {expert} (MCL stage {expert})"
        bars = axis.barh(range(len(usage)), shares, left=start, color=colours[expert % len(colours)], label=label)
        labels = [f"{share:.0f}" if share >= 4 else "" for share in shares]
        axis.bar_label(bars, labels, label_type="center", fontsize=9, color="black" if expert in (0, 2) else "white")
        start = [a + b for a, b in zip(start, shares, strict=True)]
    for edge in range(1, experts):
        axis.axvline(100 * edge / experts, color="black", linewidth=0.6, linestyle=":")
    axis.set_yticks(range(len(usage)), [layer_title(name) for name in usage])
    axis.invert_yaxis()
    axis.set_xlim(0, 100)
    axis.set_xlabel("share of the routed tokens, percent (dotted: equal shares)")
    axis.set_ylabel("tower and layer")
    axis.spines[["top", "right"]].set_visible(False)
    figure.suptitle("Which expert the tokens of held-out pairs go to")
    figure.legend(loc="outside lower center", ncols=2 if experts <= 4 else 4, frameon=False, fontsize=9)
    replace_file(path, lambda file: figure.savefig(file, dpi=140, format="png"))
    plt.close(figure)


def write_report(out: Path, report: dict) -> None:
    replace_file(out / "report.json", lambda file: file.write_text(json.dumps(report, indent=2) + "\n", "utf-8"))
    replace_file(out / "report.md", lambda file: file.write_text(markdown(report), "utf-8"))
    plot_retrieval(report, out / "retrieval.png")
    plot_usage(report, out / "expert_usage.png")
