"""Whether a written checkpoint is what it should be: bit for bit, and expert by expert in what it computes."""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from mmbal.dense import ACTIVATIONS
from mmbal.moe import MoEMLP

from .checkpoint import Checkpoint, mixture_layers
from .layouts import ffn_names


class LayerReport(NamedTuple):
    """Of one mixture layer on random rows.

    error : largest difference between an expert run by the mixture kernels and its FFN by torch, over the FFN's largest
        output. spread : smallest relative distance |y_i - y_j| / |y_i| between the outputs of two routed experts (0 for
        copies); NaN with one expert.
    """

    block: str
    error: float
    spread: float


def differing_tensors(written: Checkpoint, expected: Checkpoint) -> list[str]:
    """Canonical names whose bits are not the expected ones, after rounding to the dtype of the file."""
    names = []
    for name in expected.tensors:
        if name not in written.tensors:
            names.append(name)
            continue
        found = written[name]
        wanted = expected[name].to(found.dtype)
        same = found.shape == wanted.shape and torch.equal(found.isnan(), wanted.isnan())
        if not same or not torch.equal(found.nan_to_num(0.0), wanted.nan_to_num(0.0)):
            names.append(name)
    return names


@torch.no_grad()
def verify_layers(checkpoint: Checkpoint, rows: int, seed: int = 0) -> list[LayerReport]:
    """Runs every expert of every mixture layer on ``rows`` unit-normal rows and compares it with torch's own FFN."""
    reports = []
    for tower, _, block in mixture_layers(checkpoint.architecture):
        sizes, mixture = checkpoint.architecture.tower(tower), checkpoint.architecture.mixtures[tower]
        x_ND = torch.randn(rows, sizes.width, generator=torch.Generator().manual_seed(seed))
        error, outputs = 0.0, []
        for j in range(mixture.stacked_experts):
            w1, b1, w2, b2 = (checkpoint[name].float() for name in ffn_names(block, j))
            alone = MoEMLP(
                sizes.width, sizes.mlp_width, 1, top_k=1, activation=mixture.activation, normalize=False, device="meta"
            ).eval()
            weights = {"router.weight": torch.zeros(1, sizes.width)}
            weights |= {
                f"experts.{n}": t[None] for n, t in zip(("w1", "b1", "w2", "b2"), (w1, b1, w2, b2), strict=True)
            }
            alone.load_state_dict(weights, assign=True)
            wanted = F.linear(ACTIVATIONS[mixture.activation](F.linear(x_ND, w1, b1)), w2, b2)
            got = alone(x_ND)
            largest = wanted.abs().max().clamp_min(torch.finfo(torch.float32).tiny)
            error = max(error, ((got - wanted).abs().max() / largest).item())
            if j < mixture.num_experts:
                outputs.append(wanted)
        spreads = [
            ((a - b).norm() / a.norm().clamp_min(torch.finfo(torch.float32).tiny)).item()
            for i, a in enumerate(outputs)
            for b in outputs[i + 1 :]
        ]
        reports.append(LayerReport(block, error, min(spreads, default=float("nan"))))
    return reports
