import torch
from case import Case, Random, real

ops = torch.ops.mmbal


def energies(random, *shape, dtype=torch.float64):
    """Over some orders of magnitude, one in eight of them 0."""
    values = torch.exp2(20 * random.uniform(*shape) - 10)
    return torch.where(random.uniform(*shape) < 0.125, 0.0, values).to(dtype)


def rows(N, dtype, S=5):
    random = Random(20)
    w = energies(random, S, N, dtype=real(dtype))
    k = (random.uniform(S) * (N + 1)).long().clamp(max=N)
    kappa = random.uniform(S) * N
    return [
        Case(
            f"weighted_sample {S} x {N}, {real(dtype)}",
            lambda w, k: ops.weighted_sample(w, k, 7, 2**33 + 1),
            [w, k],
        ),
        Case(
            f"waterfill {S} x {N}, {real(dtype)}",
            lambda w, kappa: ops.waterfill(w, kappa, 0.3),
            [w, kappa],
            tolerance=0,
        ),
    ]


def masks(N, sampler, unbiased=False, lam=0.5, groups=2):
    random = Random(21)
    segments = [groups, N, 0, 3, 1, N + 1, 1, 4, 1, 12, 2, 2**32 - 1]
    energy = energies(random, groups * N + N + 13)
    rho = torch.tensor([0.3, 0.71, 1.0], dtype=torch.float64)
    return Case(
        f"mask_units {groups} x {N}, {sampler}{', unbiased' if unbiased else ''}",
        lambda energy, rho: ops.mask_units(energy, segments, rho, 7, 2**33 + 1, sampler, lam, unbiased),
        [energy, rho],
        tolerance=0,
    )


def every_mask(N, **options):
    return [
        masks(N, "bottomk", **options),
        masks(N, "bottomk", True, **options),
        masks(N, "topk", **options),
        masks(N, "uniform", True, **options),
        masks(N, "systematic", **options),
        masks(N, "systematic", True, **options),
        masks(N, "independent", True, 1.0, **options),
        masks(N, "independent", False, 0.0, **options),
    ]


def infinite():
    case = masks(9, "systematic")
    case.tensors[0][4] = torch.inf  # nothing is masked
    return case


def cases(dtype):
    found = [case for N in (0, 1, 37, 1000) for case in rows(N, dtype)] + rows(6, dtype, S=3000)
    if dtype in (torch.float32, torch.float64):
        found += rows(100_000, dtype, S=2)
    if dtype == torch.float64:  # the dtype of energies
        found += [case for N in (0, 1, 64, 513, 5000) for case in every_mask(N)]
        found += [*every_mask(12, groups=300), masks(70_000, "bottomk"), masks(70_000, "systematic", True), infinite()]
    return found


def plain(N, dtype):
    return [*rows(N, dtype), masks(N, "systematic", True), masks(N, "bottomk")]


def watched(torch_products):
    return [*rows(40, torch.float32), *every_mask(40), masks(700, "systematic")]
