"""The regulariser as a function of gradients and embeddings, and what is asked of which sample.

Letters: B samples, M modalities, C classes; g gradients of scores for embeddings, p shares, q those asked for.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from mmbal._library import ops
from mmbal.methods import rows

PENALTIES = {
    "l1": torch.abs,
    "squared": torch.square,
    "huber": lambda x: torch.where(x.abs() > 0.1, x.abs() - 0.05, 5 * x.square()),
}
Info = tuple[Tensor, Tensor, Tensor]  # shares, magnitudes, counted


@dataclass
class Asked:
    """What is asked of each sample, as the operators take it: those refuse a sample with nothing to ask for."""

    q: Tensor  # [M] or [B, M]
    there: Tensor  # [B, M] bool
    counted: Tensor  # [B] bool: two modalities or more are there, and a share above 0 is asked of them
    present: Tensor | None  # [B, M]: those that are there, all of a sample that does not count; None: all of all

    def info(self, shares: Tensor, magnitudes: Tensor) -> Info:
        q = self.q.to(shares) * self.there
        q = q / torch.where(q.sum(1) > 0, q.sum(1), 1.0).unsqueeze(1)
        shares = torch.where(self.counted.unsqueeze(1), shares, q).detach()
        magnitudes = (magnitudes * self.there).detach()
        return shares, magnitudes, self.counted & (magnitudes.sum(1) > 0)


def ask(q: Tensor, present: Tensor | None, each: Sequence[Tensor], masks: Sequence[Tensor | None]) -> Asked:
    """An embedding of zeros, where it is not padding, is missing: no gradient could revive it."""
    found = []
    for e, mask in zip(each, masks, strict=True):
        if mask is None:
            found.append(e.detach().flatten(1).abs().amax(1) != 0)  # several times as fast as any()
            continue
        nonzero = e.detach() != 0
        nonzero = nonzero.flatten(2).any(2) & mask if e.dim() > 2 else nonzero & mask
        found.append(nonzero.flatten(1).any(1))
    there = torch.stack(found, 1)
    if present is not None:
        there = there & present
    q = q.to(there.device)
    counted = (there.sum(1) >= 2) & ((q * there).sum(1) > 0)
    all_there = rows.at_hand(there) and bool(there.all())
    return Asked(q, there, counted, None if all_there else there | ~counted.unsqueeze(1))


def midpoints(each: Sequence[Tensor], baselines: Sequence[Tensor] | None, steps: int) -> list[list[Tensor]]:
    """The leaves on the straight line from baseline to embedding whose gradients are averaged."""
    points = []
    for k in range(steps):
        t = (k + 0.5) / steps
        starts = [0.0] * len(each) if baselines is None else baselines
        points.append([(b + t * (e.detach() - b)).requires_grad_() for e, b in zip(each, starts, strict=True)])
    return points


def inputs(each: Sequence[Tensor], baselines, masks: Sequence[Tensor | None], pool: str) -> list[Tensor]:
    """What gradients are multiplied by: embeddings less the baseline, 0 where padding is; with rms such that the mean
    is over real tokens."""
    found = []
    for i, (e, mask) in enumerate(zip(each, masks, strict=True)):
        delta = e.detach() if baselines is None else e.detach() - baselines[i]
        if mask is not None:
            weight = mask.to(delta.dtype)
            if pool == "rms":
                real = mask.sum(1, keepdim=True, dtype=torch.float64).clamp_min(1)
                weight = weight * (mask.shape[1] / real).sqrt().to(delta.dtype)
            delta = delta * weight.view(*mask.shape, *[1] * (e.dim() - 2))
        found.append(delta)
    return found


def _of_means(magnitudes: Tensor, asked: Asked, penalty: str) -> Tensor:
    """The penalty on shares of the batch's mean magnitudes, each over the samples that have the modality."""
    weight = (asked.there & asked.counted.unsqueeze(1)).to(magnitudes)
    live = weight.sum(0) > 0
    a = (magnitudes * weight).sum(0) / weight.sum(0).clamp_min(1)
    q = asked.q.to(a) * live
    total, asked_for = a.sum(), q.sum()
    counts = (live.sum() >= 2) & (total > 0) & (asked_for > 0)
    p, q = a / torch.where(counts, total, 1.0), q / torch.where(counts, asked_for, 1.0)
    return torch.where(counts, PENALTIES[penalty](p - q).sum(), 0 * total)


def regularizer(
    g: Sequence[Tensor], delta: Sequence[Tensor], asked: Asked, level: str, pool: str, penalty: str, eps: float, v: bool
) -> tuple[Tensor, Info, list[Tensor]]:
    """Value, info, and where v is asked for the value's gradients for g. 16-bit numbers are taken in float32: their
    squares would be 0."""
    dtype = torch.float32
    for t in (*g, *delta):
        dtype = torch.promote_types(dtype, t.dtype)
    g = [x.detach().to(dtype).requires_grad_(v) for x in g]
    delta = [x.to(dtype) for x in delta]
    reg_B, shares, magnitudes = ops.attribution_reg(g, delta, asked.q, asked.present, pool, penalty, eps)
    if level == "batch":
        value = _of_means(magnitudes, asked, penalty)
    else:
        value = (reg_B * asked.counted).sum() / max(len(reg_B), 1)
    gradients = list(torch.autograd.grad(value, g)) if v else []
    return value.detach(), asked.info(shares, magnitudes), gradients
