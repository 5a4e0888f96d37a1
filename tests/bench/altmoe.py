"""Benchmarks of Alt-MoE's operators. topk_search against faiss's exact index and torch's product and topk by blocks of
the bank; align_loss, forward and backward, against the same loss in eager torch and under torch.compile, in time and in
memory. Two threads.

Memory is that of a process of its own: how far its peak of resident memory (VmHWM, set back before) lies above what is
resident when all inputs are there, over three steps. It includes the gradients, whatever an allocator keeps, and the
operator's scratch memory."""

from __future__ import annotations

import argparse
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import faiss
import torch
import torch.nn.functional as F
from measure import interleaved, machine, titled_table
from rich.console import Console
from rich.table import Table
from torch import Tensor

from mmbal.alignment import align_loss

THREADS, TAU, BANK_BLOCK = 2, 0.03, 1 << 16


def unit_vectors(rows: int, width: int, seed: int) -> Tensor:
    return F.normalize(torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)), dim=1)


def torch_search(query: Tensor, bank: Tensor, k: int) -> tuple[Tensor, Tensor]:
    found = []
    for first in range(0, len(bank), BANK_BLOCK):
        scores, indices = (query @ bank[first : first + BANK_BLOCK].T).topk(min(k, len(bank) - first), dim=1)
        found.append((scores, indices + first))
    scores, places = torch.cat([s for s, _ in found], 1).topk(k, dim=1)
    return scores, torch.cat([i for _, i in found], 1).gather(1, places)


def searches(seconds: float, million: bool) -> Table:
    table = titled_table(
        "topk_search in float32: ratio of times (bar: 1 against faiss at 1,000,000 x 384, Q = 1000, k = 10)",
        "bank",
        "Q",
        "k",
        "mmbal ms",
        "GFLOP/s",
        "faiss",
        "torch",
        "spread",
    )
    shapes = [
        (100_000, 384, 1, 10),
        (100_000, 384, 32, 10),
        (100_000, 384, 1000, 10),
        (100_000, 384, 1000, 100),
        (10_000, 512, 1000, 10),
        (10_000, 512, 1000, 1000),
    ]
    if million:
        shapes = [(1_000_000, 384, 1, 10), (1_000_000, 384, 1000, 10)]
    for n, D, Q, k in shapes:
        bank, query = unit_vectors(n, D, 0), unit_vectors(Q, D, 1)
        index = faiss.IndexFlatIP(D)
        index.add(bank.numpy())
        runs: dict[str, Callable] = {
            "mmbal": lambda query=query, bank=bank, k=k: torch.ops.mmbal.topk_search(query, bank, k),
            "faiss": lambda query=query, index=index, k=k: index.search(query.numpy(), k),
            "torch": lambda query=query, bank=bank, k=k: torch_search(query, bank, k),
        }
        scores = {name: torch.as_tensor(run()[0]) for name, run in runs.items()}
        for name in ("faiss", "torch"):
            torch.testing.assert_close(scores["mmbal"], scores[name], rtol=0, atol=2e-6)
        times = interleaved(runs, seconds, least=1 if million and Q > 1 else 3)
        ours = times["mmbal"].median
        table.add_row(
            f"{n:,} x {D}",
            str(Q),
            str(k),
            f"{1e3 * ours:.1f}",
            f"{2e-9 * n * D * Q / ours:.0f}",
            *(f"{times[name].median / ours:.2f}" for name in ("faiss", "torch")),
            f"{100 * times['mmbal'].spread:.0f} %",
        )
    return table


def eager_loss(pred: Tensor, target: Tensor, source: Tensor, candidates: Tensor) -> Tensor:
    """One matrix of similarities for both directions: less work than the two products of the usual code."""
    z = F.normalize(source, dim=1) @ F.normalize(candidates, dim=1).T / TAU
    labels = torch.arange(len(z))
    contrastive = (F.cross_entropy(z, labels) + F.cross_entropy(z.T, labels)) / 2
    return 0.5 * F.smooth_l1_loss(pred, target) + 0.5 * contrastive


def ours(*tensors: Tensor) -> Tensor:
    return align_loss(*tensors, tau=TAU)[0]


LOSSES: dict[str, Callable[[], Callable[..., Tensor]]] = {
    "mmbal": lambda: ours,
    "eager": lambda: eager_loss,
    "compile": lambda: torch.compile(eager_loss, dynamic=False),
}


def embeddings(B: int, D: int) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(B, D, generator=generator).requires_grad_() for _ in range(4)]


def stepper(loss: Callable[..., Tensor], tensors: list[Tensor]) -> Callable[[], tuple[Tensor, ...]]:
    return lambda: torch.autograd.grad(loss(*tensors), tensors)


def resident(name: str) -> int:
    (line,) = [line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith(name)]
    return int(line.split()[1]) << 10


def print_peak(name: str, B: int, D: int) -> None:
    """In a process of its own: bytes of the peak above what was there before."""
    torch.set_num_threads(THREADS)
    loss, tensors = LOSSES[name](), embeddings(B, D)
    if name == "compile":  # compiles for this shape; what it then holds is given back where it can be
        stepper(loss, tensors)()
    else:
        stepper(loss, embeddings(8, 8))()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(3):
        stepper(loss, tensors)()
    print(resident("VmHWM") - before)


def peak(name: str, B: int, D: int) -> float:
    """MiB"""
    command = [sys.executable, __file__, "--peak", name, str(B), str(D)]
    return int(subprocess.run(command, check=True, capture_output=True, text=True).stdout) / 2**20


def losses(seconds: float, compiled: bool) -> Table:
    names = ["mmbal", "eager"] + (["compile"] if compiled else [])
    table = titled_table(
        "align_loss, forward and backward, float32 (bars at 4096 x 512: 1.5 against eager, half of its memory)",
        "B x D",
        "mmbal ms",
        *(name for name in names[1:]),
        "spread",
        *(f"{name} MiB" for name in names),
    )
    for B, D in ((32, 512), (128, 512), (512, 512), (1024, 2048), (4096, 512)):
        tensors = embeddings(B, D)
        runs = {name: stepper(LOSSES[name](), tensors) for name in names}
        expected = runs["eager"]()
        for name in names:
            for got, other in zip(runs[name](), expected, strict=True):
                torch.testing.assert_close(got, other, rtol=1e-3, atol=1e-3 * other.abs().max().item())
        times = interleaved(runs, seconds)
        own = times["mmbal"].median
        table.add_row(
            f"{B} x {D}",
            f"{1e3 * own:.2f}",
            *(f"{times[name].median / own:.2f}" for name in names[1:]),
            f"{100 * times['mmbal'].spread:.0f} %",
            *(f"{peak(name, B, D):.0f}" for name in names),
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3, help="of turns for each row")
    parser.add_argument("--compile", action="store_true", help="torch.compile too")
    parser.add_argument("--only", choices=["search", "million", "loss"], help="million: a bank of so many rows, 6 GB")
    parser.add_argument("--peak", nargs=3, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.peak:
        name, B, D = options.peak
        print_peak(name, int(B), int(D))
        return
    torch.set_num_threads(THREADS)
    faiss.omp_set_num_threads(THREADS)
    console = Console(width=150 if not sys.stdout.isatty() else None)
    console.print(f"{machine()}, faiss {faiss.__version__}")
    if options.only in (None, "loss"):
        console.print(losses(options.seconds, options.compile), highlight=False)
    if options.only != "loss":
        console.print(searches(options.seconds, options.only == "million"), highlight=False)


if __name__ == "__main__":
    main()
