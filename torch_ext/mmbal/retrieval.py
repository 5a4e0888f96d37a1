"""Fake kernels of ``topk_search`` and ``recall_at_k``; what they promise is in include/mmbal/retrieval.h.

Letters: Q queries, n rows of the bank, D width, K found of a query, P positives of all.
"""

import torch
from torch.library import register_autograd, register_fake

from mmbal._library import check_devices
from mmbal.routing import real_dtype


@register_fake("mmbal::topk_search")
def _(query_QD, bank_nD, k):
    check_devices("topk_search", query=query_QD, bank=bank_nD)
    Q = query_QD.shape[0]
    return query_QD.new_empty(Q, k, dtype=real_dtype(bank_nD.dtype)), query_QD.new_empty(Q, k, dtype=torch.int64)


@register_fake("mmbal::recall_at_k")
def _(indices_QK, positives_P, offsets_Q1, ks):
    check_devices("recall_at_k", indices=indices_QK, positives=positives_P, offsets=offsets_Q1)
    return indices_QK.new_empty(len(ks), dtype=torch.float64)


def _refuse(ctx, *gradients):
    raise RuntimeError(
        "mmbal::topk_search has no derivative; take the scores again: (query[:, None] * bank[indices]).sum(-1)"
    )


def _save(ctx, inputs, output):
    ctx.mark_non_differentiable(output[1])


register_autograd("mmbal::topk_search", _refuse, setup_context=_save)
