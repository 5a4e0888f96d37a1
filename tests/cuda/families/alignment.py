import torch
from case import Case, Random

ops = torch.ops.mmbal


def loss(B, dtype, D=12, more=0, C=16, regression="smooth_l1", masked=False, symmetric=True, tau=0.1):
    """B own rows among B + more candidates."""
    random, A = Random(9), B + more
    tensors = [random.normal(B, D, dtype=dtype) for _ in range(2)] + [random.normal(A, C, dtype=dtype) for _ in "st"]
    others = {
        "groups": torch.arange(A) // 3 if masked else None,
        "present": torch.arange(A) % 5 != 1 if masked else None,
    }
    return Case(
        f"align_loss {B} of {A} x {C}, {regression}, {dtype}{', masked' if masked else ''}",
        lambda *t, groups, present: ops.align_loss(
            *t, groups, present, more // 2, tau, 0.4, regression, 0.7, symmetric
        ),
        tensors,
        others,
        tolerance=5e-5 if dtype == torch.float32 else None,  # a temperature multiplies what the similarities round
        scale=1e-3 if C == 1 else 0.0,  # directions of one dimension have no gradient
    )


def cases(dtype):
    found = [
        loss(200, dtype, more=500, C=65, masked=True, symmetric=False),
        loss(2300, dtype, D=3, C=40, masked=True),  # large tiles, three stripes
        loss(300, dtype, D=3, more=2000, C=24),
        loss(37, dtype, D=1000, C=512),
    ]
    for B in (0, 1, 37, 150):
        found += [
            loss(B, dtype),
            loss(B, dtype, more=9, C=7, regression="mse", masked=True),
            loss(B, dtype, D=5, C=1, regression="l2", symmetric=False),
            loss(B, dtype, more=3, regression="cosine"),
        ]
    return found


def plain(N, dtype):
    return [loss(N, dtype, more=4, masked=True)]


def small():
    regressions = ("smooth_l1", "mse", "l2", "cosine")
    return [loss(5, torch.float64, D=3, more=2, C=4, regression=r, masked=r == "mse", tau=0.5) for r in regressions]


def watched(torch_products):
    return [loss(70, torch.float32, more=80, masked=True), loss(20, torch.float64)]
