import torch
from case import Case

import oracles

ops = torch.ops.mmbal


def losses(N, dtype, E=5, K=2, normalize="mixtral", masked=False):
    logits = oracles.separated_logits(N, E, dtype)
    others = {
        "indices": oracles.topk(logits.double(), K)[1],
        "mask": torch.arange(N) % 3 != 1 if masked else None,
    }
    return Case(
        f"router losses {N} x {E}, {normalize}, {dtype}{', masked' if masked else ''}",
        lambda logits, indices, mask: (
            ops.load_balance_loss(logits, indices, mask, normalize),
            ops.router_z_loss(logits, mask),
        ),
        [logits],
        others,
    )


def cases(dtype):
    found = [losses(50_000, dtype, E=8, normalize="switch")]
    for N in (0, 1, 37, 1000):
        found += [losses(N, dtype, masked=True), losses(N, dtype, E=64, K=4, normalize="megatron")]
    return found


def plain(N, dtype):
    return [losses(N, dtype, masked=True)]


def small():
    return [losses(7, torch.float64, masked=True), losses(5, torch.float64, E=40, K=2, normalize="switch")]
