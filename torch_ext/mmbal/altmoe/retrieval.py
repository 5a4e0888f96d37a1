"""Recall of the right target among all, for vectors of queries and targets."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from mmbal._library import ops


def positives_of(group_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(positives [P], offsets [n + 1]): for each row, in order, the rows with its group id, itself among them."""
    order = group_ids.argsort(stable=True)
    _, group, sizes = group_ids.unique(return_inverse=True, return_counts=True)
    starts = sizes.cumsum(0) - sizes
    counts = sizes[group]
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    within = torch.arange(int(offsets[-1]), device=counts.device) - offsets[:-1].repeat_interleave(counts)
    return order[starts[group].repeat_interleave(counts) + within], offsets


def check_ks(ks: Sequence[int]) -> None:
    if not ks or not all(isinstance(k, int) and k >= 1 for k in ks):
        raise ValueError(f"recalls: ks must be integers of at least 1, got {ks!r}")


@torch.no_grad()
def recalls(query: Tensor, bank: Tensor, ks: Sequence[int] = (1, 5, 10), group_ids: Tensor | None = None) -> dict:
    """{k: share of the queries [n, D] with a right row of the bank [n, D] among the k of largest cosine}.

    Row i of the bank is right for query i, and so are rows with its group id. A k beyond n is taken as n. NaN without
    rows, and where a vector is not finite: an order of NaN would give the recalls of chance.
    """
    check_ks(ks)
    n = query.shape[0]
    if n == 0 or not (query.isfinite().all() and bank.isfinite().all()):
        return dict.fromkeys(ks, float("nan"))
    ids = torch.arange(n, device=query.device) if group_ids is None else group_ids
    ranks = [min(k, n) for k in ks]
    _, indices = ops.topk_search(F.normalize(query, dim=1), F.normalize(bank, dim=1), max(ranks))
    found = ops.recall_at_k(indices, *positives_of(ids), ranks)
    return dict(zip(ks, found.tolist(), strict=True))
