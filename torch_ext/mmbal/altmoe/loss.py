"""The loss of a direction: regression in the target's feature space and InfoNCE (arXiv 2409.05929v6, section 3)."""

from __future__ import annotations

import math
from typing import NamedTuple

import torch
from torch import Tensor, nn

from mmbal.alignment import align_loss
from mmbal.altmoe.parts import ConnectorOut, TargetOut
from mmbal.methods.rows import choose, every, gather_with_gradient, rank_of, ranks

REGRESSIONS = ("smooth_l1", "mse", "l2", "cosine")


class AlignLossOut(NamedTuple):
    """Scalars; ``loss`` is to be differentiated."""

    loss: Tensor
    reg: Tensor
    cl: Tensor


class AlignLoss(nn.Module):
    """alpha regression(out.reg, target.reg) + (1 - alpha) InfoNCE(out.cl, target.cl).

    The regression is a mean over items; the contrastive loss is the cross-entropy of cosine similarities divided by
    tau, each item against all targets of the batch (and, where symmetric, each target against all items, halved).

    Parameters
    ----------
    tau : temperature. 0.03 is that of the authors' code.
    alpha : share of the regression. 0.5 is the paper's.
    regression : "smooth_l1" (mean over dimensions, ``beta`` where it turns linear; the authors' code), "mse" (mean),
        "l2" (sum over dimensions; the paper's text, three orders of magnitude larger at its widths), or "cosine".
    symmetric : False is the paper's text, True its code.
    negatives : "local", those of this process, as in the authors' code; or "gathered", those of every rank of
        ``group``: the mean of the ranks' losses is then the loss of the joined batch, and so are gradients that are
        averaged over ranks, as DistributedDataParallel and AlternatingTrainer do.
    group : the process group; None: all processes, where torch.distributed is initialised.

    Items without a token (``valid`` False in either) are left out. ``group_ids`` int64 [B] says which items belong
    together (captions of one picture): they are no negatives of each other. Where none are given and the target is one
    class an item (``target.classes``), items of a class belong together; ``torch.arange(B)`` makes them negatives all
    the same. The contrastive loss of one item is 0.
    """

    def __init__(
        self,
        tau: float = 0.03,
        alpha: float = 0.5,
        regression: str = "smooth_l1",
        beta: float = 1.0,
        symmetric: bool = True,
        negatives: str = "local",
        group=None,
    ):
        super().__init__()
        choose("AlignLoss", "regression", regression, REGRESSIONS)
        choose("AlignLoss", "negatives", negatives, ("local", "gathered"))
        if not 0 < tau < math.inf:
            raise ValueError(f"AlignLoss: tau must be finite and greater than 0, got {tau}")
        if not 0 <= alpha <= 1:
            raise ValueError(f"AlignLoss: alpha must be from 0 to 1, got {alpha}")
        if not 0 <= beta < math.inf:
            raise ValueError(f"AlignLoss: beta must be finite and not negative, got {beta}")
        self.tau, self.alpha, self.regression, self.beta = tau, alpha, regression, beta
        self.symmetric, self.negatives, self.group = symmetric, negatives, group

    def extra_repr(self) -> str:
        names = ("tau", "alpha", "regression", "beta", "symmetric", "negatives")
        return ", ".join(f"{name}={getattr(self, name)!r}" for name in names)

    def forward(self, out: ConnectorOut, target: TargetOut, group_ids: Tensor | None = None) -> AlignLossOut:
        group_ids = target.classes if group_ids is None else group_ids
        present = out.valid if target.valid is None else target.valid
        if out.valid is not None and target.valid is not None:
            present = out.valid & target.valid
        options = (self.tau, self.alpha, self.regression, self.beta, self.symmetric)
        if self.negatives == "local" or ranks(self.group) == 1:
            tensors = (out.reg, target.reg, out.cl, target.cl)
            return AlignLossOut(*align_loss(*tensors, group_ids, present, 0, *options))
        return self._gathered(out, target, group_ids, present, options)

    def _gathered(self, out, target, group_ids, present, options) -> AlignLossOut:
        B, device = out.cl.shape[0], out.cl.device
        found = every(self.group, [B, group_ids is not None, present is not None])
        counts, rank = found[:, 0].tolist(), rank_of(self.group)
        if 0 < int(found[:, 1].sum()) < len(counts):
            raise ValueError("AlignLoss: group_ids must be given on every rank or on none")
        if int(found[:, 2].sum()) and present is None:  # another rank has a mask
            present = torch.ones(B, dtype=torch.bool, device=device)
        source, aim, ids, there = (
            None if t is None else gather_with_gradient(t, counts, self.group)
            for t in (out.cl, target.cl, group_ids, present)
        )
        losses = align_loss(out.reg, target.reg, source, aim, ids, there, sum(counts[:rank]), *options)
        share = len(counts) * B / sum(counts)  # 1 where all ranks have as many rows
        return AlignLossOut(*(losses if share == 1 else (loss * share for loss in losses)))
