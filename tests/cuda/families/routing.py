import torch
from case import Case, Random, real

import oracles

ops = torch.ops.mmbal


def topk(N, dtype, E=5, K=2, normalize=True, bias=False):
    logits = oracles.separated_logits(N, E, dtype)
    selection_bias = torch.linspace(-1, 1, E, dtype=real(dtype)) if bias else None
    return Case(
        f"moe_topk {N} x {E}, {K}, {'normalized, ' if normalize else ''}{dtype}",
        lambda logits, selection_bias: ops.moe_topk(logits, K, normalize, selection_bias),
        [logits],
        {"selection_bias": selection_bias},
    )


def dispatch(N, E=5, K=2):
    return Case(
        f"moe_dispatch {N} x {K} of {E}",
        lambda indices: ops.moe_dispatch(indices, E),
        [],
        {"indices": Random(1).choices(N, E, K)},
    )


def cases(dtype):
    found = [dispatch(200_000, E=8)]
    for N in (0, 1, 37, 1000):
        found += [
            topk(N, dtype),
            topk(N, dtype, normalize=False, bias=True),
            topk(N, dtype, E=70, K=6, normalize=False),
            dispatch(N),
            dispatch(N, E=300, K=3),
        ]
    return found


def plain(N, dtype):
    return [topk(N, dtype), dispatch(N)]


def small():
    return [
        topk(6, torch.float64),
        topk(6, torch.float64, normalize=False, bias=True),
        topk(3, torch.float64, E=40, K=3, normalize=False),
    ]


def watched(torch_products):
    return [dispatch(700, E=7)]
