"""Benchmarks of attribution regularisation: what its closed form and its double backward cost beside a plain training
step of two encoders and a head. Two threads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from measure import interleaved, machine, titled_table
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import mmbal

NAMES = ["audio", "video"]
CLASSES = 31  # Kinetics-Sounds


def encoder(width: int, layers: int) -> nn.Sequential:
    parts = []
    for _ in range(layers):
        parts += [nn.Linear(width, width), nn.GELU()]
    return nn.Sequential(*parts)


class Model(nn.Module):
    """Encoders of `layers` layers, then a linear head on both, or one with a hidden layer."""

    def __init__(self, width: int, layers: int, hidden: int):
        super().__init__()
        self.encoders = nn.ModuleDict({name: encoder(width, layers) for name in NAMES})
        linear = nn.Linear(2 * width, CLASSES)
        mlp = nn.Sequential(nn.Linear(2 * width, hidden), nn.GELU(), nn.Linear(hidden, CLASSES)) if hidden else None
        self.head = mlp or linear

    def forward(self, x: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        z = {name: self.encoders[name](x[name]) for name in NAMES}
        return self.head(torch.cat(list(z.values()), 1)), z


def stepper(
    model: Model, optimizer: torch.optim.Optimizer, mode: str | None, x: dict[str, Tensor], y: Tensor
) -> Callable[[], None]:
    regularizer = mmbal.AttributionRegularizer(NAMES, model.head, mode=mode) if mode else None

    def step() -> None:
        optimizer.zero_grad()
        logits, z = model(x)
        loss = F.cross_entropy(logits, y)
        if regularizer is not None:
            loss = loss + 0.1 * regularizer(z, logits)[0]
        loss.backward()
        optimizer.step()

    return step


def steps(seconds: float) -> Table:
    table = titled_table(
        "A training step with the regulariser over a plain one (closed form at most 1.05, double backward at most 1.6)",
        "encoders",
        "head",
        "batch",
        "plain ms",
        "closed",
        "double",
        "spread",
    )
    for width, layers, hidden, batch in (
        (512, 2, 0, 64),
        (1024, 3, 0, 64),
        (1024, 3, 0, 256),
        (1024, 3, 512, 256),
        (512, 2, 1024, 256),
    ):
        torch.manual_seed(0)
        x, y = {name: torch.randn(batch, width) for name in NAMES}, torch.randint(CLASSES, (batch,))
        modes = {"plain": None, "double": "double"} | ({} if hidden else {"closed": "closed"})
        model = Model(width, layers, hidden)  # of all contenders: where memory lies shall not decide
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)
        runs = {name: stepper(model, optimizer, mode, x, y) for name, mode in modes.items()}
        times = interleaved(runs, seconds)
        plain = times["plain"].median
        table.add_row(
            f"2 of {layers} x {width}",
            f"hidden {hidden}" if hidden else "linear",
            str(batch),
            f"{1e3 * plain:.2f}",
            f"{times['closed'].median / plain:.3f}" if "closed" in times else "",
            f"{times['double'].median / plain:.2f}",
            f"{100 * times['double'].spread:.0f} %",
        )
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=3, help="of turns for each row")
    options = parser.parse_args()
    torch.set_num_threads(2)
    console = Console(width=150 if not sys.stdout.isatty() else None)
    console.print(machine())
    console.print(steps(options.seconds), highlight=False)


if __name__ == "__main__":
    main()
