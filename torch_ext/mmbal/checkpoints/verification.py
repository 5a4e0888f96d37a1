"""Whether a written checkpoint is what it should be: bit for bit, and expert by expert in what it computes."""

from __future__ import annotations

from dataclasses import fields
from typing import NamedTuple

import torch
import torch.nn.functional as F

from mmbal.dense import ACTIVATIONS
from mmbal.moe import MoEMLP

from .architecture import TOWERS
from .checkpoint import Checkpoint, mixture_layers
from .layouts import ffn_names


class LayerReport(NamedTuple):
    """Of one mixture layer on random rows.

    error : largest difference between an expert run by the mixture kernels and its FFN by torch, over the FFN's largest
        output; NaN where an expert puts out NaN or infinity. spread : smallest relative distance |y_i - y_j| / |y_i|
        between the outputs of two routed experts (0 for copies); NaN with one expert.
    """

    block: str
    error: float
    spread: float


def differing_tensors(written: Checkpoint, expected: Checkpoint) -> list[str]:
    """Canonical names whose bits are not the expected ones, after rounding to the dtype of the file. (The bits of NaN
    are not compared: rounding may change them.)"""
    names = []
    for name in expected.tensors:
        if name not in written.tensors:
            names.append(name)
            continue
        found = written[name]
        wanted = expected[name].to(found.dtype)
        if found.shape != wanted.shape or not _same_bits(found, wanted):
            names.append(name)
    return names


def _same_bits(a, b):
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[a.dtype.itemsize]
    same = a.contiguous().view(integers) == b.contiguous().view(integers)
    return bool(same.all()) or bool((same | (a.isnan() & b.isnan())).all())


def differing_sizes(written: Checkpoint, expected: Checkpoint) -> list[str]:
    """What the file's description says otherwise than the expected architecture, as "tower: field". The number of
    tables of positions does not count: formats differ in it."""
    found, wanted = written.architecture, expected.architecture
    pairs = [("", found, wanted)]
    for tower in TOWERS:
        pairs.append((f"{tower}: ", found.tower(tower), wanted.tower(tower)))
        pairs.append((f"mixture of {tower}: ", found.mixtures.get(tower), wanted.mixtures.get(tower)))
    different = []
    for title, a, b in pairs:
        if a is None or b is None:
            different += [title.rstrip(": ")] if a is not b else []
            continue
        names = [f.name for f in fields(b) if f.name not in (*TOWERS, "mixtures", "kept_positions")]
        different += [title + name for name in names if getattr(a, name) != getattr(b, name)]
    return different


@torch.no_grad()
def verify_layers(checkpoint: Checkpoint, rows: int, seed: int = 0) -> list[LayerReport]:
    """Runs every expert of every mixture layer on ``rows`` unit-normal rows and compares it with torch's own FFN."""
    reports = []
    for tower, _, block in mixture_layers(checkpoint.architecture):
        sizes, mixture = checkpoint.architecture.tower(tower), checkpoint.architecture.mixtures[tower]
        x_ND = torch.randn(rows, sizes.width, generator=torch.Generator().manual_seed(seed))
        errors, outputs = [], []
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
            errors.append((got - wanted).abs().max() / largest)
            if j < mixture.num_experts:
                outputs.append(wanted)
        spreads = [
            (a - b).norm() / a.norm().clamp_min(torch.finfo(torch.float32).tiny)
            for i, a in enumerate(outputs)
            for b in outputs[i + 1 :]
        ]
        spread = torch.stack(spreads).min().item() if spreads else float("nan")
        reports.append(LayerReport(block, torch.stack(errors).max().item(), spread))  # NaN is the largest of all
    return reports
