"""Fake kernels of ``topk_search`` and ``recall_at_k``; what they promise is in include/mmbal/retrieval.h.

Letters: Q queries, n rows of the bank, D width, K found of a query, P positives of all.
"""

import torch
from torch.library import register_fake

from mmbal._library import (
    check,
    check_devices,
    check_shape,
    check_storage_dtype,
    dtype_text,
    give_constants,
    refuse_gradient,
)
from mmbal.routing import real_dtype


@register_fake("mmbal::topk_search")
def _(query_QD, bank_nD, k):
    check_devices("topk_search", query=query_QD, bank=bank_nD)
    op = "topk_search"
    check_shape(op, "query", query_QD, "[Q, D]", (None, None))
    Q, D = query_QD.shape
    check(op, D >= 1, "query must have at least one column, got ", list(query_QD.shape))
    check_shape(op, "bank", bank_nD, "[n, D]", (None, D))
    check_storage_dtype(op, "query", query_QD)
    check_storage_dtype(op, "bank", bank_nD)
    widened = query_QD.dtype == torch.float32 and bank_nD.dtype in (torch.bfloat16, torch.float16)
    allowed = f"{dtype_text(bank_nD.dtype)} as bank is, or float32 with a bfloat16 or float16 bank"
    same = widened or query_QD.dtype == bank_nD.dtype
    check(op, same, "query must be ", allowed, ", got ", dtype_text(query_QD.dtype))
    n = bank_nD.shape[0]
    check(op, 1 <= k <= n, "k must be from 1 to the number of rows of the bank ", n, ", got ", k)
    return query_QD.new_empty(Q, k, dtype=real_dtype(bank_nD.dtype)), query_QD.new_empty(Q, k, dtype=torch.int64)


@register_fake("mmbal::recall_at_k")
def _(indices_QK, positives_P, offsets_Q1, ks):
    check_devices("recall_at_k", indices=indices_QK, positives=positives_P, offsets=offsets_Q1)
    return indices_QK.new_empty(len(ks), dtype=torch.float64)


refuse_gradient("topk_search", "; take the scores again: (query[:, None] * bank[indices]).sum(-1)")
give_constants("recall_at_k")
