"""Benchmarks of AMSS: its cost on the gradients of two ResNet-18 against reading and scaling them once, against a
straightforward version in torch and against the training step, and of every further tensor. Two threads."""

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

RHO = {"audio": 0.3, "video": 0.7}


class Block(nn.Module):
    """Two 3 x 3 convolutions and a short cut (He et al., CVPR 2016)."""

    def __init__(self, inside: int, outside: int, stride: int):
        super().__init__()
        self.conv1 = nn.Conv2d(inside, outside, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outside, outside, 3, 1, 1, bias=False)
        self.norm1, self.norm2 = nn.BatchNorm2d(outside), nn.BatchNorm2d(outside)
        self.short = nn.Sequential()
        if stride != 1 or inside != outside:
            self.short = nn.Sequential(nn.Conv2d(inside, outside, 1, stride, bias=False), nn.BatchNorm2d(outside))

    def forward(self, x: Tensor) -> Tensor:
        return (self.norm2(self.conv2(self.norm1(self.conv1(x)).relu())) + self.short(x)).relu()


def resnet18() -> nn.Sequential:
    """With its layer of 1000 outputs: 11.7 million parameters."""
    widths = [(64, 64, 1), (64, 64, 1), (64, 128, 2), (128, 128, 1)]
    widths += [(128, 256, 2), (256, 256, 1), (256, 512, 2), (512, 512, 1)]
    stem = [nn.Conv2d(3, 64, 7, 2, 3, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(3, 2, 1)]
    return nn.Sequential(
        *stem, *(Block(*w) for w in widths), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 1000)
    )


def fill_gradients(parameters: list[nn.Parameter]) -> None:
    for p in parameters:
        p.grad = torch.randn_like(p)


def straightforward(parameters: dict[str, list[nn.Parameter]], seed: int) -> None:
    """AMSS by the book: energies, torch.multinomial and a product for every tensor."""
    generator = torch.Generator().manual_seed(seed)
    for name, each in parameters.items():
        for p in each:
            energy = p.grad.square().flatten(1).sum(1)
            k = max(1, int(-(-len(energy) * RHO[name] // 1)))
            chosen = torch.multinomial(energy / energy.sum(), k, generator=generator)
            mask = torch.zeros_like(energy).index_fill_(0, chosen, 1)
            p.grad.mul_(mask.view(-1, *[1] * (p.dim() - 1)))


def passes(encoders: dict[str, nn.Module], seconds: float) -> tuple[Table, float]:
    """The table, and the seconds of AMSS and AMSS+, the larger."""
    managed = {name: [p for p in e.parameters() if p.dim() >= 2] for name, e in encoders.items()}
    every = [p for each in managed.values() for p in each]
    fill_gradients(every)
    flat = torch.cat([p.grad.flatten() for p in every])
    amss = {plus: mmbal.AMSS(encoders, plus=plus, rho=RHO) for plus in (False, True)}
    elements = mmbal.AMSS(encoders, unit="element", rho=RHO)
    elements_plus = mmbal.AMSS(encoders, plus=True, unit="element", rho=RHO)
    runs: dict[str, Callable[[], object]] = {
        "read": lambda: flat.sum(),
        "read and write": lambda: flat.mul_(1.0),
        "AMSS": amss[False].step,
        "AMSS+": amss[True].step,
        "AMSS, by the book in torch": lambda: straightforward(managed, 0),
        "AMSS of single elements": elements.step,
        "AMSS+ of single elements": elements_plus.step,
    }
    full = [p.grad.clone() for p in every]  # what is masked would have less energy the next time
    times = interleaved(runs, seconds, before=lambda: torch._foreach_copy_([p.grad for p in every], full))
    once = times["read"].median + times["read and write"].median
    bars = {"AMSS": "1.5", "AMSS+": "2"}
    table = titled_table(
        f"AMSS on the gradients of two ResNet-18, {sum(p.numel() for p in every) / 1e6:.1f} million elements in "
        f"{len(every)} tensors, over one read and one read-write pass over them in one piece (torch.sum, torch.mul_)",
        "what",
        "ms",
        "ratio",
        "at most",
        "spread",
    )
    for name, found in times.items():
        ratio = "" if name.startswith("read") else f"{found.median / once:.2f}"
        table.add_row(name, f"{1e3 * found.median:.1f}", ratio, bars.get(name, ""), f"{100 * found.spread:.0f} %")
    return table, max(times["AMSS"].median, times["AMSS+"].median)


def training_step(encoders: dict[str, nn.Module], amss_seconds: float, batch: int) -> Table:
    """Forward, backward and SGD on pictures of 224 x 224."""
    head = nn.Linear(2000, 10)
    parameters = [*(p for e in encoders.values() for p in e.parameters()), *head.parameters()]
    optimizer = torch.optim.SGD(parameters, lr=1e-3, momentum=0.9)
    pictures, labels = torch.randn(2, batch, 3, 224, 224), torch.randint(0, 10, (batch,))

    def step() -> None:
        optimizer.zero_grad()
        features = [e(x) for e, x in zip(encoders.values(), pictures, strict=True)]
        F.cross_entropy(head(torch.cat(features, 1)), labels).backward()
        optimizer.step()

    median = interleaved({"step": step}, 0, least=3)["step"].median
    title = "AMSS or AMSS+, the slower, over a training step of both encoders (at most 1 %)"
    table = titled_table(title, "what", "s", "%")
    table.add_row(f"batch {batch} of 224 x 224", f"{median:.2f}", f"{100 * amss_seconds / median:.2f}")
    return table


def further_tensors(seconds: float) -> Table:
    """What a tensor of 16 x 8 costs beside many others."""
    table = titled_table("One tensor more (at most 2 us)", "what", "us a tensor", "spread")
    for plus in (False, True):
        runs = {}
        for count in (50, 450):
            parameters = [nn.Parameter(torch.randn(16, 8)) for _ in range(count)]
            fill_gradients(parameters)
            amss = mmbal.AMSS({"a": parameters[::2], "b": parameters[1::2]}, plus=plus, rho={"a": 0.999, "b": 0.999})
            runs[count] = amss.step
        times = interleaved({str(count): run for count, run in runs.items()}, seconds)
        each = (times["450"].median - times["50"].median) / 400
        table.add_row("AMSS+" if plus else "AMSS", f"{1e6 * each:.2f}", f"{100 * times['450'].spread:.0f} %")
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=12, help="of turns for each table")
    parser.add_argument("--batch", type=int, default=64, help="of the training step; 0 leaves it out")
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.manual_seed(0)
    console = Console(width=150 if not sys.stdout.isatty() else None)
    console.print(machine())
    encoders = {name: resnet18() for name in RHO}
    table, slower = passes(encoders, options.seconds)
    console.print(table, highlight=False)
    console.print(further_tensors(options.seconds / 4), highlight=False)
    if options.batch:
        console.print(training_step(encoders, slower, options.batch), highlight=False)


if __name__ == "__main__":
    main()
