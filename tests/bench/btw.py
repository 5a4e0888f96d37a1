"""Benchmarks of BTW's operators: weights and their application against torch.mul, divergences against eager torch,
mutual information against scikit-learn, and an update of the table against its mutual information. Two threads."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from functools import partial

import torch
from measure import interleaved, machine, titled_table
from rich.console import Console
from rich.table import Table
from sklearn.feature_selection import mutual_info_regression
from torch import Tensor

import mmbal

ops = torch.ops.mmbal
Run = Callable[[], object]


def bandwidth(seconds: float) -> Table:
    """Bytes that must be read and written over time: torch.mul reads two arrays and writes one."""
    table = titled_table(
        "Bytes per second over those of torch.mul with a fresh output (at least 0.9)",
        "what",
        "mmbal GB/s",
        "torch.mul GB/s",
        "ratio",
        "spread",
    )

    def add(name: str, run: Run, moved: int, mul: Run, mul_moved: int) -> None:
        times = interleaved({"mmbal": run, "mul": mul}, seconds)
        mine, theirs = moved / times["mmbal"].median / 1e9, mul_moved / times["mul"].median / 1e9
        spread = f"{100 * times['mmbal'].spread:.0f} %"
        table.add_row(name, f"{mine:.1f}", f"{theirs:.1f}", f"{mine / theirs:.2f}", spread)

    for elements in (1 << 22, 1 << 24):
        for M in (2, 3, 4, 6):
            kl, other, mi = torch.rand(elements // M, M), torch.rand(elements // M, M), torch.rand(M)
            add(
                f"btw_weights {elements // M:,} x {M}",
                lambda kl=kl, mi=mi: ops.btw_weights(kl, mi),
                8 * kl.numel(),
                lambda kl=kl, other=other: torch.mul(kl, other),
                12 * kl.numel(),
            )
    for N, d, M in ((4096, 256, 4), (65536, 16, 4), (8192, 768, 3)):
        hs, w = [torch.randn(N, d) for _ in range(M)], torch.rand(N, M)
        add(
            f"scale_modalities {M} of {N:,} x {d}",
            lambda hs=hs, w=w: ops.scale_modalities(hs, w),
            8 * M * N * d,
            lambda hs=hs, w=w: [torch.mul(h, w[:, m, None]) for m, h in enumerate(hs)],
            8 * M * N * d,
        )
    return table


def eager_gaussian(mu: Tensor, log_sigma: Tensor, fused_mu: Tensor, fused_log_sigma: Tensor) -> Tensor:
    log_ratio = 2 * (log_sigma - fused_log_sigma[:, None])
    scaled = (mu - fused_mu[:, None]) * torch.exp(-fused_log_sigma)[:, None]
    return 0.5 * (torch.expm1(log_ratio) - log_ratio) + 0.5 * scaled**2


def eager_residual(mu: Tensor, fused_mu: Tensor, target: Tensor) -> Tensor:
    sigma = (target[:, None] - mu).abs().clamp_min(1e-3)
    fused_sigma = (target - fused_mu).abs().clamp_min(1e-3)[:, None]
    difference = mu - fused_mu[:, None]
    return torch.log(fused_sigma / sigma) + (sigma**2 + difference**2) / (2 * fused_sigma**2) - 0.5


def eager_categorical(logits: Tensor, fused_logits: Tensor) -> Tensor:
    log_p, log_q = torch.log_softmax(logits, -1), torch.log_softmax(fused_logits, -1)
    return (log_p.exp() * (log_p - log_q)).sum(-1).clamp_min(0).T


def with_backward(run: Callable[..., Tensor], inputs: list[Tensor]) -> Run:
    leaves = [t.clone().requires_grad_() for t in inputs]
    upstream = torch.randn_like(run(*inputs))
    return lambda: torch.autograd.grad(run(*leaves), leaves, upstream)


def divergences(seconds: float) -> Table:
    table = titled_table(
        "Divergences: times faster than the eager expression (at least 5)",
        "what",
        "ms",
        "forward",
        "forward + backward",
        "spread",
    )

    def add(name: str, mine: Callable[..., Tensor], eager: Callable[..., Tensor], inputs: list[Tensor]) -> None:
        error = ((mine(*inputs) - eager(*inputs)).abs() / (1 + eager(*inputs))).max().item()
        assert error < 1e-5, f"{name}: the contenders differ by {error}"
        forward = interleaved({"mmbal": lambda: mine(*inputs), "eager": lambda: eager(*inputs)}, seconds)
        both = {"mmbal": with_backward(mine, inputs), "eager": with_backward(eager, inputs)}
        backward = interleaved(both, seconds)
        table.add_row(
            name,
            f"{1e3 * forward['mmbal'].median:.2f}",
            f"{forward['eager'].median / forward['mmbal'].median:.1f}",
            f"{backward['eager'].median / backward['mmbal'].median:.1f}",
            f"{100 * forward['mmbal'].spread:.0f} %",
        )

    for N, M in ((4096, 3), (1 << 18, 4), (1 << 20, 4)):
        normal = [torch.randn(N, M), torch.randn(N, M), torch.randn(N), torch.randn(N)]
        add(f"gaussian_kl {N:,} x {M}", ops.gaussian_kl, eager_gaussian, normal)
        mu, _, fused, target = normal
        target = fused + torch.sign(target) * (1 + target.abs())  # residuals of a size that float32 keeps
        add(
            f"residual_kl {N:,} x {M}",
            lambda mu, fused, target: ops.residual_kl(mu, fused, target, 1e-3),
            eager_residual,
            [mu, fused, target],
        )
    for M, N, C in ((3, 4096, 10), (4, 1 << 19, 2), (4, 100_000, 10), (4, 1000, 1000)):
        logits = [torch.randn(M, N, C), torch.randn(N, C)]
        add(f"categorical_kl {M} x {N:,} x {C}", ops.categorical_kl, eager_categorical, logits)
    return table


def predictions(N: int, M: int) -> tuple[Tensor, Tensor]:
    """[N, M] and [N]: from almost the fused prediction to almost noise."""
    torch.manual_seed(N)
    fused = torch.randn(N)
    return torch.stack([fused + (0.1 + m) * torch.randn(N) for m in range(M)], 1), fused


def mutual_information(seconds: float) -> Table:
    table = titled_table(
        "ksg_mutual_info, M = 3: times faster than mutual_info_regression of scikit-learn (20 at N = 16,000, else 1)",
        "N",
        "mmbal ms",
        "scikit-learn ms",
        "times faster",
        "mmbal us a sample",
        "spread",
    )
    for N in (1000, 4000, 16000, 64000, 256000):
        x, y = predictions(N, 3)
        theirs_of = partial(mutual_info_regression, x.double().numpy(), y.double().numpy())
        error = abs(ops.ksg_mutual_info(x.double(), y.double()).numpy() - theirs_of()).max()
        assert error < 1e-4, f"the contenders differ by {error}"  # by the jitter that one of them adds
        times = interleaved({"mmbal": partial(ops.ksg_mutual_info, x, y), "theirs": theirs_of}, seconds)
        mine, theirs = times["mmbal"].median, times["theirs"].median
        spread = f"{100 * times['mmbal'].spread:.0f} %"
        table.add_row(
            f"{N:,}",
            f"{1e3 * mine:.2f}",
            f"{1e3 * theirs:.0f}",
            f"{theirs / mine:.1f}",
            f"{1e6 * mine / N:.2f}",
            spread,
        )
    return table


def update(seconds: float) -> Table:
    table = titled_table(
        "BTW.update of a 16,000 x 4 table over its mutual information (at most 1.3)", "task", "ms", "ratio", "spread"
    )
    N, M = 16000, 4
    rows = torch.arange(N)
    x, y = predictions(N, M)
    btw = mmbal.BTW([str(m) for m in range(M)], "regression", N)
    target = y + 0.3 * torch.randn(N)
    logits, fused = torch.randn(N, M, 10), torch.randn(N, 10)
    classes = mmbal.BTW([str(m) for m in range(M)], "classification", N)
    labels, fused_labels = logits.argmax(2).T.contiguous(), fused.argmax(1)
    tasks = {
        "regression": (
            lambda: btw.update(rows, list(x.unbind(1)), y, target),
            lambda: ops.ksg_mutual_info(x, y),
        ),
        "classification of 10 (no bar)": (
            lambda: classes.update(rows, list(logits.unbind(1)), fused),
            lambda: ops.discrete_mutual_info(labels, fused_labels, None, 10),
        ),
    }
    for name, (whole, part) in tasks.items():
        times = interleaved({"update": whole, "mi": part}, seconds)
        ratio = times["update"].median / times["mi"].median
        spread = f"{100 * times['update'].spread:.0f} %"
        table.add_row(name, f"{1e3 * times['update'].median:.2f}", f"{ratio:.2f}", spread)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--seconds", type=float, default=2, help="of turns for each row of a table")
    options = parser.parse_args()
    torch.set_num_threads(2)
    console = Console(width=150 if not sys.stdout.isatty() else None)
    console.print(machine())
    for part in (bandwidth, divergences, mutual_information, update):
        console.print(part(options.seconds), highlight=False)


if __name__ == "__main__":
    main()
