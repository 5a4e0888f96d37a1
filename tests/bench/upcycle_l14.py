"""Upcycling at real size: a CLIP ViT-L/14 and three experts with random weights become a CLIP-MoE, by the command
that a user types; its peak of anonymous memory over the size of the file it writes. Needs 15 GB of disk."""

from __future__ import annotations

import argparse
import re
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import torch
from measure import titled_table
from rich.console import Console

from mmbal.checkpoints import Checkpoint, CLIPArchitecture, LazyTensor, TextTower, VisionTower, write_checkpoint
from mmbal.checkpoints.layouts import canonical_shapes, is_ffn
from mmbal.checkpoints.writing import write_ffns

BAR = 1.3
L14 = CLIPArchitecture(
    768,
    VisionTower(1024, 24, 16, 4096, 14, 224, "quick_gelu"),
    TextTower(768, 12, 12, 3072, 77, 49408, "quick_gelu"),
)
RUN = """
import sys, threading, time
from pathlib import Path
peak = 0
def watch():
    global peak
    while True:
        lines = Path("/proc/self/status").read_text().splitlines()
        peak = max(peak, *(int(line.split()[1]) * 1024 for line in lines if line.startswith("RssAnon")))
        time.sleep(0.01)
threading.Thread(target=watch, daemon=True).start()
from mmbal.cli import app
app(sys.argv[1:], standalone_mode=False)
print("PEAK", peak)
"""


def random_l14(seed: int, ffns_of: int, dtype: torch.dtype) -> Checkpoint:
    """Weights of ``seed``, but the FFNs of ``ffns_of``; made tensor by tensor."""

    def lazy(name: str, shape: tuple[int, ...], number: int) -> LazyTensor:
        def make() -> torch.Tensor:
            generator = torch.Generator().manual_seed(1000 * (ffns_of if is_ffn(name) else seed) + number)
            return (0.02 * torch.randn(shape, generator=generator)).to(dtype)

        return LazyTensor(shape, dtype, make)

    shapes = canonical_shapes(L14).items()
    return Checkpoint({name: lazy(name, shape, i) for i, (name, shape) in enumerate(shapes)}, L14, "model")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", type=Path, help="where files go; a temporary folder unless said")
    parser.add_argument("--layers", type=int, help="fewer layers a tower: shows that it runs")
    arguments = parser.parse_args()
    if arguments.layers:
        towers = {t: replace(L14.tower(t), layers=arguments.layers) for t in ("vision", "text")}
        globals()["L14"] = replace(L14, **towers)
    folder = Path(tempfile.mkdtemp(prefix="mmbal-l14-", dir=arguments.folder))
    table = titled_table(
        f"Upcycling a ViT-L/14 to four experts in all 36 blocks (memory at most {BAR} times the file)",
        *("base, experts", "written", "GB", "peak anonymous GB", "over the file", "s"),
    )
    try:
        for name, dtype in (("float32", torch.float32), ("float16", torch.float16)):
            write_checkpoint(random_l14(0, 0, dtype), folder / "base.pt", "openai", overwrite=True)
            for j in (1, 2, 3):
                write_ffns(random_l14(0, j, dtype), folder / f"expert{j}.pt")
            for format, out, more in (
                ("clipmoe", "clip-moe.pt", ["--text-positions", "248"]),
                ("transformers", "clip-moe", ["--dtype", "float32"]),
            ):
                words = ["upcycle", "--base", folder / "base.pt", "--from", "openai", "--experts"]
                words += [folder / f"expert{j}.pt" for j in (1, 2, 3)]
                words += [*more, "--format", format, "--out", folder / out]
                began = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, "-c", RUN, *map(str, words)], capture_output=True, text=True, check=False
                )
                seconds = time.perf_counter() - began
                if done.returncode:
                    sys.exit(done.stderr)
                path = folder / out
                size = path.stat().st_size if path.is_file() else sum(f.stat().st_size for f in path.iterdir())
                peak = int(re.search(r"PEAK (\d+)", done.stdout)[1])
                written = f"{format}{' float32' if '--dtype' in more else ''}"
                row = (f"{size / 1e9:.2f}", f"{peak / 1e9:.2f}", f"{peak / size:.2f}", f"{seconds:.0f}")
                table.add_row(name, written, *row)
                if name == "float32":
                    Console(width=120).print(done.stdout.partition("PEAK")[0], highlight=False)
                path.unlink() if path.is_file() else shutil.rmtree(path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    Console(width=120).print(table)


if __name__ == "__main__":
    main()
