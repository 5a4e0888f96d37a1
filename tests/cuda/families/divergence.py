import torch
from case import Case, Random

ops = torch.ops.mmbal


def divergences(N, dtype, M=3, C=5):
    random = Random(4)
    mu, log_sigma = random.normal(N, M, dtype=dtype), random.normal(N, M, dtype=dtype)
    fused_mu, fused_log_sigma, target = (random.normal(N, dtype=dtype) for _ in range(3))
    logits, fused_logits = random.normal(M, N, C, dtype=dtype), random.normal(N, C, dtype=dtype)
    return [
        Case(f"gaussian_kl {N} x {M}, {dtype}", ops.gaussian_kl, [mu, log_sigma, fused_mu, fused_log_sigma]),
        Case(f"residual_kl {N} x {M}, {dtype}", lambda *t: ops.residual_kl(*t, 0.1), [mu, fused_mu, target]),
        Case(f"categorical_kl {M} x {N} x {C}, {dtype}", ops.categorical_kl, [logits, fused_logits]),
        Case(
            f"categorical_kl {M} x {N} x {C}, reverse, {dtype}",
            lambda *t: ops.categorical_kl(*t, True),
            [logits, fused_logits],
        ),
    ]


def cases(dtype):
    found = divergences(40, dtype, M=17, C=1000)
    for N in (0, 1, 37, 1000):
        found += divergences(N, dtype)
    return found


def plain(N, dtype):
    return divergences(N, dtype)


def small():
    return divergences(4, torch.float64, M=2, C=3) + divergences(2, torch.float64, M=2, C=40)[2:]
