"""Benchmarks of expert_mlp against what else can be installed. `make bench` prints a chosen subset within ten minutes;
`make bench-full` measures every shape, in one random order, appends each to a file and goes on there when it is started
again: what it has measured when it is stopped, or after --minutes, is an even sample of all."""

from __future__ import annotations

import argparse
import json
import math
import random
import statistics
import sys
import time
from dataclasses import asdict
from pathlib import Path

import torch
from contenders import Problem, Shape
from costs import inference, kept_bytes, router_stage, routing_cost
from measure import interleaved, machine, peak_gflops
from rich.console import Console
from rich.table import Table

from mmbal import _core

WIDTHS = ((512, 2048), (768, 3072), (1024, 4096))
TOKENS = (16, 64, 256, 1024, 4096, 8192, 197 * 8, 77 * 32)
PEERS = ("grouped_mm", "eager", "loop")
OUT = Path("build/bench")


def subset() -> list[Shape]:
    """Every N at one width, then one change at a time."""
    shapes = [Shape(768, 3072, N) for N in (16, 64, 256, 1024, 197 * 8, 4096)]
    shapes += [Shape(512, 2048, N) for N in (64, 77 * 32)] + [Shape(1024, 4096, N) for N in (64, 1024)]
    shapes += [Shape(768, 3072, 256, E=8), Shape(768, 3072, 256, K=1)]
    shapes += [Shape(768, 3072, 256, routing=routing) for routing in ("zipf", "one")]
    shapes += [Shape(768, 3072, N, threads=1) for N in (64, 256)]
    shapes += [Shape(768, 3072, N, dtype="bfloat16") for N in (16, 64, 256, 1024)]
    shapes += [Shape(768, 3072, 4096, dtype="bfloat16"), Shape(1024, 4096, 64, dtype="bfloat16")]
    shapes += [Shape(512, 2048, 77 * 32, dtype="bfloat16")]
    return shapes


def every_shape() -> list[Shape]:
    """In an order that mixes them and is always the same."""
    shapes = [
        Shape(D, F, N, E, K, routing, dtype, threads)
        for dtype in ("float32", "bfloat16")
        for threads in (2, 1)
        for D, F in WIDTHS
        for E in (4, 8)
        for K in (2, 1)
        for routing in ("balanced", "zipf", "one")
        for N in TOKENS
    ]
    random.Random(0).shuffle(shapes)
    return shapes


def measure(shape: Shape, seconds: float, check: bool) -> dict:
    torch.set_num_threads(shape.threads)
    problem = Problem(shape)
    if check:
        problem.check()
    peaks = []

    def peak() -> None:
        time.sleep(0.01)  # until torch's threads no longer spin
        peaks.append(peak_gflops(shape.dtype, shape.threads))

    times = interleaved(problem.contenders() | {"peak": peak}, seconds)
    del times["peak"]
    return {
        "shape": asdict(shape),
        "peak_gflops": statistics.median(peaks),
        "gflop": shape.gflop(),
        "seconds": {name: found.median for name, found in times.items()},
        "spread": {name: found.spread for name, found in times.items()},
        "turns": len(times["mmbal"].seconds),
    }


def geometric_mean(values: list[float]) -> float:
    return math.exp(sum(map(math.log, values)) / len(values)) if values else float("nan")


def sampled_mean(values: list[float], whole: int) -> str:
    """The geometric mean; of some of the `whole` with its standard error, if these were drawn at random."""
    mean, n = geometric_mean(values), len(values)
    if n in (1, whole):
        return f"{mean:.2f}"
    error = statistics.stdev(map(math.log, values)) * math.sqrt(1 / n - 1 / whole)
    return f"{mean:.2f} +- {mean * error:.2f} ({n} of {whole} shapes)"


def ratio_table(results: list[dict], dtype: str) -> Table:
    table = Table(title=f"Forward + backward, {dtype}: how many times faster than", title_justify="left")
    for column in ("shape", "grouped_mm", "eager", "loop", "dense FFN", "mmbal GFLOP/s", "of peak", "spread"):
        table.add_column(column, justify="left" if column == "shape" else "right")
    for result in results:
        seconds, shape = result["seconds"], Shape(**result["shape"])
        speed = result["gflop"] / seconds["mmbal"]
        peak = f"{100 * speed / result['peak_gflops']:.0f} %" if result["peak_gflops"] else ""
        ratios = [seconds[name] / seconds["mmbal"] for name in (*PEERS, "dense")]
        table.add_row(
            str(shape), *(f"{r:.2f}" for r in ratios), f"{speed:.0f}", peak, f"{100 * result['spread']['mmbal']:.0f} %"
        )
    return table


def rows_an_expert(result: dict) -> float:
    shape = Shape(**result["shape"])
    return shape.rows / shape.E if shape.routing == "balanced" else 0


def summary(results: list[dict], wanted: list[Shape]) -> Table:
    table = Table(title="Bars", title_justify="left")
    for column in ("what", "at least", "measured"):
        table.add_column(column)
    bar = {"float32": ("1.3, never below 1.0"), "bfloat16": bfloat16_bar()}
    for dtype in ("float32", "bfloat16"):
        of = [r for r in results if r["shape"]["dtype"] == dtype]
        if not of:
            continue
        whole = sum(shape.dtype == dtype for shape in wanted)
        grouped = [r["seconds"]["grouped_mm"] / r["seconds"]["mmbal"] for r in of]
        fastest = [min(r["seconds"][peer] for peer in PEERS) / r["seconds"]["mmbal"] for r in of]
        worst = min(range(len(of)), key=fastest.__getitem__)
        if dtype == "float32":
            table.add_row("float32 against grouped_mm, geometric mean", "1.8", sampled_mean(grouped, whole))
        table.add_row(
            f"{dtype} against the fastest peer, geometric mean and worst",
            bar[dtype],
            f"{sampled_mean(fastest, whole)}, {fastest[worst]:.2f} at {Shape(**of[worst]['shape'])}",
        )
        large = [r for r in of if rows_an_expert(r) >= 512]
        if dtype == "float32" and large:
            dense = [r["seconds"]["dense"] / r["seconds"]["mmbal"] for r in large]
            share = [r["gflop"] / r["seconds"]["mmbal"] / r["peak_gflops"] for r in large]
            table.add_row("float32 against the dense FFN, >= 512 rows an expert, least", "1.0", f"{min(dense):.2f}")
            table.add_row(
                "float32 share of the peak, >= 512 rows an expert, least to largest",
                "75 %",
                f"{100 * min(share):.0f} to {100 * max(share):.0f} %",
            )
    return table


def bfloat16_bar() -> str:
    """What the peers can use counts, not what the kernels do."""
    return "1.3" if "avx512_bf16" in _core.cpu_features() else "3"


def load(path: Path) -> dict[str, dict]:
    """What an earlier run has measured, by shape; a line cut off by an interruption is left out."""
    found = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        try:
            result = json.loads(line)
        except json.JSONDecodeError:
            continue
        found[str(Shape(**result["shape"]))] = result
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--full", action="store_true", help="every shape; goes on where it was stopped")
    parser.add_argument("--minutes", type=float, default=math.inf, help="begin no shape after as many")
    parser.add_argument("--seconds", type=float, default=4, help="of turns for each shape")
    parser.add_argument("--no-check", action="store_true", help="do not compare the results of the contenders first")
    parser.add_argument("--only", default="", help="measure shapes whose line contains this text")
    parser.add_argument("--no-costs", action="store_true", help="only the shapes")
    options = parser.parse_args()
    console = Console(width=150 if not sys.stdout.isatty() else None)
    OUT.mkdir(parents=True, exist_ok=True)
    path = OUT / f"{'full' if options.full else 'subset'}-{_core.isa_in_use()}.jsonl"
    if not options.full:
        path.unlink(missing_ok=True)
    known = load(path)
    shapes = [s for s in (every_shape() if options.full else subset()) if options.only in str(s)]
    console.print(machine())
    begin = time.perf_counter()
    for number, shape in enumerate(shapes, 1):
        if str(shape) in known:
            continue
        if time.perf_counter() - begin > 60 * options.minutes:
            break
        result = measure(shape, options.seconds, not options.no_check)
        known[str(shape)] = result
        with path.open("a") as file:
            file.write(json.dumps(result) + "\n")
        best = min(result["seconds"][peer] for peer in PEERS) / result["seconds"]["mmbal"]
        console.print(
            f"{number}/{len(shapes)} {shape}: {best:.2f} times the fastest peer", style="dim", highlight=False
        )
    results = [known[str(shape)] for shape in shapes if str(shape) in known]
    for dtype in ("float32", "bfloat16"):
        of = [r for r in results if r["shape"]["dtype"] == dtype]
        if of:
            console.print(ratio_table(of, dtype), highlight=False)
    console.print(summary(results, shapes), highlight=False)
    if not options.no_costs:
        seconds = options.seconds
        for table in (kept_bytes(), router_stage(seconds), routing_cost(seconds), inference(seconds)):
            console.print(table, highlight=False)
    console.print(f"{time.perf_counter() - begin:.0f} s; every figure: {path}", highlight=False)


if __name__ == "__main__":
    main()
