"""Timing: contenders take turns in one process, so that what else the machine does meets them all alike."""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import torch
from rich.table import Table

from mmbal import _core


@dataclass(frozen=True)
class Times:
    """Seconds of each turn."""

    seconds: tuple[float, ...]

    @property
    def median(self) -> float:
        return statistics.median(self.seconds)

    @property
    def spread(self) -> float:
        """Distance of the quartiles over the median."""
        if len(self.seconds) < 4:
            return (max(self.seconds) - min(self.seconds)) / self.median
        low, _, high = statistics.quantiles(self.seconds, n=4)
        return (high - low) / self.median

    def over(self, other: Times) -> tuple[float, float]:
        """The median ratio to the other's turn of the same round, as what slows the machine meets both, and the
        standard error of that median (of normal ratios, from their quartiles)."""
        ratios = [mine / its for mine, its in zip(self.seconds, other.seconds, strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4)
        return middle, 1.2533 * (high - low) / 1.349 / len(ratios) ** 0.5


def interleaved(
    contenders: dict[str, Callable[[], None]], seconds: float, least: int = 3, before: Callable[[], None] | None = None
) -> dict[str, Times]:
    """One warm-up each, then turns for about `seconds` in all, in an order that moves by one each round. `before` runs
    before every turn and is not timed."""
    for run in contenders.values():
        run()
    names, found = list(contenders), {name: [] for name in contenders}
    begin, rounds = time.perf_counter(), 0
    while rounds < least or time.perf_counter() - begin < seconds:
        shift = rounds % len(names)
        for name in names[shift:] + names[:shift]:
            if before is not None:
                before()
            start = time.perf_counter()
            contenders[name]()
            found[name].append(time.perf_counter() - start)
        rounds += 1
    return {name: Times(tuple(values)) for name, values in found.items()}


def titled_table(title: str, *columns: str) -> Table:
    table = Table(title=title, title_justify="left")
    for column in columns:
        table.add_column(column, justify="left" if column == columns[0] else "right")
    return table


def machine() -> str:
    return (
        f"kernels {_core.isa_in_use()} ({', '.join(_core.cpu_features())}), {os.cpu_count()} cores, "
        f"torch {torch.__version__}, Python {platform.python_version()}"
    )


@cache
def _peak_library() -> ctypes.CDLL:
    source = Path(__file__).with_name("peak.c")
    name = f"mmbal-peak-{hashlib.sha256(source.read_bytes()).hexdigest()[:16]}.so"
    with tempfile.TemporaryDirectory() as folder:
        target = Path(folder) / name
        flags = ["-O3", "-march=native", "-std=c11", "-ffp-contract=fast", "-shared", "-fPIC"]
        subprocess.run(["cc", *flags, "-o", target, source], check=True)
        library = ctypes.CDLL(str(target))
    for function in (library.peak_float32, library.peak_bfloat16):
        function.restype, function.argtypes = ctypes.c_double, [ctypes.c_double]
    return library


def peak_gflops(dtype: str, threads: int, seconds: float = 0.03) -> float:
    """GFLOP/s of `threads` register-only loops side by side, a product and a sum counted as two; 0 where there is no
    such instruction."""
    if dtype == "bfloat16" and _core.isa_in_use() == "amx":
        return 0.0  # its peak is that of tiles, not of this loop
    if not _core.multiplies_bfloat16():
        dtype = "float32"  # which bfloat16 is multiplied as
    function = getattr(_peak_library(), f"peak_{dtype}")
    with ThreadPoolExecutor(threads) as pool:
        return 2e-9 * sum(pool.map(function, [seconds] * threads))
