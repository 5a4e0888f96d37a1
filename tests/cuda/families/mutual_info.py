import torch
from case import Case, Random

ops = torch.ops.mmbal


def continuous(N, dtype, M=3, neighbors=3, masked=False, options=()):
    """Counts are those of the CPU, one of which would show in mi by 1 / N^2 at least."""
    random = Random(40)
    truth = random.normal(N)
    x = torch.stack([truth + m * random.normal(N) for m in range(M)], 1).to(dtype)
    y = (truth + 0.3 * random.normal(N)).to(dtype)
    present = random.uniform(N, M) < 0.7 if masked else None
    if masked and N > 100:
        x[3, 0], y[7] = float("nan"), float("inf")
    return Case(
        f"ksg_mutual_info {N} x {M}, {neighbors}, {options}, {dtype}{', masked' if masked else ''}",
        lambda x, y, present: ops.ksg_mutual_info(x, y, present, neighbors, *options).nan_to_num(-1),
        [x, y],
        {"present": present},
        tolerance=1e-11,
    )


def labels(N, M=3, C=7, masked=False, num_classes=-1):
    random = Random(41)
    b = (random.uniform(N) * C).long()
    a = torch.where(random.uniform(M, N) < 0.6, b, (random.uniform(M, N) * C).long())
    present = random.uniform(N, M) < 0.7 if masked else None
    return Case(
        f"discrete_mutual_info {M} x {N} of {C}, {num_classes}{', masked' if masked else ''}",
        lambda a, b, present: ops.discrete_mutual_info(a, b, present, num_classes).nan_to_num(-1),
        [a, b],
        {"present": present},
        tolerance=1e-11,
    )


def cases(dtype):
    found = [continuous(N, dtype, neighbors=1) for N in (2, 3)]
    for N in (5, 100, 3000):
        found += [continuous(N, dtype), continuous(N, dtype, masked=True, options=(True, 1e-10, 3))]
        found += [labels(N), labels(N, C=30, masked=True, num_classes=40)]
    found += [
        continuous(100, dtype, neighbors=64),
        continuous(30_000, dtype, M=2),
        continuous(500, dtype, options=(False, 0.0)),
        labels(0),
        labels(1),
        labels(100_000, M=2, C=700),
    ]
    return found


def plain(N, dtype):
    return [continuous(N + 4, dtype), labels(N + 4, masked=True)]  # of nothing it is NaN, which equals nothing


def watched(torch_products):
    return [continuous(100, torch.float32, M=2, masked=True, options=(True, 1e-10, 3)), labels(700)]
