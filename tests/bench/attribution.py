"""Benchmarks of attribution regularisation: what its routes cost beside a plain training step of two encoders and a
head. Two threads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable

import torch
import torch.nn.functional as F
from amss import resnet18
from measure import interleaved, machine, titled_table
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import mmbal

NAMES = ["audio", "video"]
CLASSES = 31  # Kinetics-Sounds


def layers(width: int, count: int) -> nn.Sequential:
    return nn.Sequential(*[part for _ in range(count) for part in (nn.Linear(width, width), nn.GELU())])


class Model(nn.Module):
    """Two encoders that give [B, width], and a linear head on both or one with a hidden layer."""

    def __init__(self, encoders: list[nn.Module], width: int, hidden: int = 0):
        super().__init__()
        self.encoders = nn.ModuleDict(dict(zip(NAMES, encoders, strict=True)))
        linear = nn.Linear(2 * width, CLASSES)
        mlp = nn.Sequential(nn.Linear(2 * width, hidden), nn.GELU(), nn.Linear(hidden, CLASSES)) if hidden else None
        self.head = mlp or linear

    def forward(self, x: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        z = {name: self.encoders[name](x[name]) for name in NAMES}
        return self.head(torch.cat(list(z.values()), 1)), z


def stepper(
    model: Model, optimizer: torch.optim.Optimizer, mode: str | None, x: dict[str, Tensor], y: Tensor
) -> Callable[[], None]:
    """mode: of the regulariser; "own graph" is "double" through the model's own pass; None: no regulariser."""
    regularizer = None
    if mode == "own graph":
        regularizer = mmbal.AttributionRegularizer(NAMES, parameters=model.head.parameters())
    elif mode:
        regularizer = mmbal.AttributionRegularizer(NAMES, model.head, mode=mode)

    def step() -> None:
        optimizer.zero_grad()
        logits, z = model(x)
        loss = F.cross_entropy(logits, y)
        if regularizer is not None:
            loss = loss + 0.1 * regularizer(z, logits)[0]
        loss.backward()
        optimizer.step()

    return step


def dense(width: int, count: int, hidden: int, batch: int) -> tuple[str, Model, dict[str, Tensor]]:
    model = Model([layers(width, count) for _ in NAMES], width, hidden)
    return f"2 of {count} x {width}", model, {name: torch.randn(batch, width) for name in NAMES}


def pictures(batch: int, side: int) -> tuple[str, Model, dict[str, Tensor]]:
    model = Model([resnet18()[:-1] for _ in NAMES], 512)
    return f"2 ResNet-18, {side} x {side}", model, {name: torch.randn(batch, 3, side, side) for name in NAMES}


def steps(seconds: float) -> Table:
    table = titled_table(
        "A training step with the regulariser over a plain one: the median over rounds and its standard error (closed "
        "form at most 1.05, double backward at most 1.6)",
        *("encoders", "head", "batch", "plain ms", "closed", "double", "own graph", "forward", "difference"),
    )
    for encoders, hidden, batch in (
        (pictures(64, 64), 0, 64),
        (dense(1024, 3, 0, 256), 0, 256),
        (dense(1024, 3, 0, 64), 0, 64),
        (dense(512, 2, 0, 64), 0, 64),
        (dense(1024, 3, 512, 256), 512, 256),
        (dense(512, 2, 1024, 256), 1024, 256),
    ):
        torch.manual_seed(0)
        name, model, x = encoders
        y = torch.randint(CLASSES, (batch,))
        # One model of all contenders: where memory lies shall not decide.
        optimizer = torch.optim.SGD(model.parameters(), lr=1e-5, momentum=0.9)

        def against_plain(modes, model=model, optimizer=optimizer, x=x, y=y) -> dict[str, tuple[float, float]]:
            runs = {mode or "plain": stepper(model, optimizer, mode, x, y) for mode in (None, *modes)}
            times = interleaved(runs, seconds, least=5)
            ratios = {mode: times[mode].over(times["plain"]) for mode in modes}
            return ratios | {"plain": (times["plain"].median, 0.0)}

        # The closed form by itself: what the others leave in the caches is not its own.
        found = against_plain(("double", "own graph", "forward", "difference"))
        found |= {} if hidden else against_plain(("closed",))
        columns = ["" if hidden else "{:.3f} ± {:.3f}".format(*found["closed"])]
        columns += ["{:.2f} ± {:.2f}".format(*found[mode]) for mode in ("double", "own graph", "forward", "difference")]
        head = f"hidden {hidden}" if hidden else "linear"
        table.add_row(name, head, str(batch), f"{1e3 * found['plain'][0]:.2f}", *columns)
    return table


def calls(seconds: float) -> Table:
    """What a call alone takes, and the operator in it: caches are warm, as they are in no training step."""
    table = titled_table(
        "The closed form alone: value and gradients of a linear head of 31 classes",
        "embeddings",
        "call us",
        "operator us",
    )
    for batch, width in ((64, 512), (64, 1024), (256, 1024)):
        torch.manual_seed(0)
        z, head = {name: torch.randn(batch, width, requires_grad=True) for name in NAMES}, nn.Linear(2 * width, CLASSES)
        logits, regularizer = head(torch.cat(list(z.values()), 1)), mmbal.AttributionRegularizer(NAMES, head)
        e, share = [t.detach() for t in z.values()], torch.ones(2, dtype=torch.float64)
        arguments = (e, [head.weight.detach()], logits.detach(), share, torch.full((batch,), 1 / batch))
        runs = {
            "call": lambda z=z, logits=logits, regularizer=regularizer: regularizer(z, logits),
            "operator": lambda arguments=arguments: torch.ops.mmbal.attribution_linear(*arguments),
        }
        times = interleaved(runs, seconds)
        table.add_row(f"2 of [{batch}, {width}]", *(f"{1e6 * times[name].median:.0f}" for name in runs))
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=8, help="of turns for each row")
    options = parser.parse_args()
    torch.set_num_threads(2)
    console = Console(width=150 if not sys.stdout.isatty() else None)
    console.print(machine())
    console.print(calls(options.seconds / 5), highlight=False)
    console.print(steps(options.seconds), highlight=False)


if __name__ == "__main__":
    main()
