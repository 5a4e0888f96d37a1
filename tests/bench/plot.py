"""GFLOP/s over the number of tokens, from a file that run.py has written.

python tests/bench/plot.py build/bench/subset-ISA.jsonl docs/performance.png
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
from contenders import Shape

STYLES = {
    "mmbal": {"color": "#0b5fa5", "marker": "o", "linewidth": 2.4},
    "grouped_mm": {"color": "#c46a1b", "marker": "s"},
    "eager": {"color": "#8a8a8a", "marker": "^"},
    "loop": {"color": "#3f8f4f", "marker": "v"},
}
NAMES = {
    "mmbal": "mmbal",
    "grouped_mm": "transformers, grouped_mm",
    "eager": "transformers, eager",
    "loop": "loop over experts",
}


def main(source: Path, target: Path) -> None:
    results = [json.loads(line) for line in source.read_text().splitlines()]
    figure, axes = plt.subplots(1, 2, figsize=(10, 4.2), layout="constrained")
    for axis, dtype in zip(axes, ("float32", "bfloat16"), strict=True):
        of = [r for r in results if Shape(**{**r["shape"], "N": 1}) == Shape(768, 3072, 1, dtype=dtype)]
        of.sort(key=lambda r: r["shape"]["N"])
        tokens = [r["shape"]["N"] for r in of]
        for name, style in STYLES.items():
            axis.plot(tokens, [r["gflop"] / r["seconds"][name] for r in of], label=NAMES[name], **style)
        peak = [r["peak_gflops"] for r in of]
        if max(peak) > 0:
            axis.plot(tokens, peak, color="black", linestyle=":", label="peak of a register-only loop")
        axis.set_xscale("log", base=2)
        powers = [n for n in tokens if n & (n - 1) == 0]
        axis.set_xticks(powers, [str(n) for n in powers])
        axis.minorticks_off()
        axis.set_ylim(bottom=0)
        axis.set_title(dtype)
        axis.set_xlabel("tokens")
        axis.set_ylabel("GFLOP/s, forward + backward")
        axis.grid(alpha=0.25)
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), frameon=False, loc="outside lower center", ncols=5, fontsize=9)
    figure.suptitle("Training a mixture of 4 experts, 2 a token, 768 x 3072, on two cores", fontsize=11)
    figure.savefig(target, dpi=140)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
