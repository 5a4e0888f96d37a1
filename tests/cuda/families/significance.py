import torch
from case import Case, Random

ops = torch.ops.mmbal


def statistics(N, dtype, M=3, C=5, D=7):
    random = Random(30)
    logits = [random.normal(N, C, dtype=dtype) for _ in range(M)]
    features = [random.normal(N, D + m, dtype=dtype) for m in range(M)]
    targets = (random.uniform(N) * C).long()
    targets[::5] = -100

    def stats(*tensors, targets):
        return ops.modal_stats(list(tensors[:M]), list(tensors[M:]), targets)

    return Case(f"modal_stats {M} x {N} x {C}, {dtype}", stats, [*logits, *features], {"targets": targets})


def of_mixed_dtypes(N):
    random = Random(31)
    dtypes = torch.float32, torch.bfloat16, torch.float64, torch.float16
    logits = [random.normal(N, 40, dtype=dtype) for dtype in dtypes]
    features = [random.normal(N, 3 + 60 * m, dtype=dtype) for m, dtype in enumerate(dtypes[::-1])]
    targets = (random.uniform(N) * 40).long()
    return Case(
        f"modal_stats of four dtypes, {N}",
        lambda *t, targets: ops.modal_stats(list(t[:4]), list(t[4:]), targets),
        [*logits, *features],
        {"targets": targets},
        tolerance=1e-5,
    )


def ratios(M, C=10, **options):
    random = Random(32)
    histogram = (random.uniform(C) * 20).round()
    rows = histogram.sum().reshape(1)
    dims = [1 + 7 * m for m in range(M)]
    sums = [random.uniform(M) * rows * 2, random.uniform(M) * rows, histogram, rows]
    return Case(
        f"update_ratio {M}, {options}",
        lambda *sums: ops.update_ratio(*sums, dims, 0.7, **options),
        sums,
        tolerance=1e-12,
    )


def given_rates(M):
    return Case(
        f"ratio_of_rates {M}", lambda rate: ops.ratio_of_rates(rate, 0.5), [Random(33).uniform(M)], tolerance=1e-12
    )


def cases(dtype):
    found = [statistics(40, dtype, M=70, C=3), statistics(9, dtype, C=3000, D=2048), statistics(5000, dtype, C=2)]
    found += [of_mixed_dtypes(50)]
    found += [
        ratios(3, mode=mode, guard=guard) for mode in ("rate_unnormalised", "mi") for guard in ("clamp", "official")
    ]
    for N in (0, 1, 37, 1000):
        found += plain(N, dtype)
    return [*found, ratios(1), ratios(256, C=3000), given_rates(256)]


def plain(N, dtype):
    return [statistics(N, dtype), ratios(3), given_rates(4)]


def watched(torch_products):
    return [statistics(20, torch.float32, C=300), ratios(3)]
