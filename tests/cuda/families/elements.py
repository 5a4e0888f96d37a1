import torch
from case import Case, Random

ops = torch.ops.mmbal
RHO = torch.tensor([0.3, 0.9, 0.0, 1.0], dtype=torch.float64)


def gradient(random, *shape, dtype=torch.float32):
    """Over some orders of magnitude, one in eight of them 0."""
    values = random.normal(*shape) * torch.exp(random.normal(*shape))
    return torch.where(random.uniform(*shape) < 0.125, 0.0, values).to(dtype)


def masked(
    sizes,
    dtype,
    sampler="bottomk",
    unbiased=False,
    lam=0.5,
    importance="gn",
    skip=None,
    update=False,
    at=0,
    change=None,
):
    """Tensors of these sizes, the first at an address that is no multiple of 16 (where `at` is not 0)."""
    random = Random(30)
    grads = [gradient(random, size, dtype=dtype) for size in sizes]
    if change is not None:
        change(grads)
    weights = [random.normal(size, dtype=dtype) for size in sizes] if importance == "gn_wn" else []
    moved = [random.normal(size, dtype=dtype) for size in sizes] if update else []
    bases = [random.normal(size, dtype=dtype) for size in sizes] if update else []
    modality = [i % (2 if unbiased else 4) for i in range(len(sizes))]
    count = len(sizes)

    def mask(*tensors, rho, skip):
        def take(first):
            return [t.detach() for t in tensors[first : first + count]]

        out = [t.clone() for t in take(2 * count if update else 0)]
        if at:
            out = [t.new_zeros(len(t) + at)[at:].copy_(t) for t in out]
        ops.mask_elements_foreach_(
            out,
            modality,
            [2**31 + i for i in range(count)],
            rho,
            7,
            2**33 + 1,
            sampler,
            lam,
            unbiased,
            importance,
            take(count) if importance == "gn_wn" else None,
            skip,
            take(0) if update else None,
            take(3 * count) if update else None,
        )
        return [t.nan_to_num(nan=1e4) for t in out]  # two NaN are not equal

    spare = grads if importance != "gn_wn" else []  # keeps the places of the others
    return Case(
        f"mask_elements_foreach_ {sizes}, {sampler}, {importance}{', unbiased' if unbiased else ''}, {dtype}",
        mask,
        [*grads, *(weights or spare), *moved, *bases],
        {"rho": RHO[:2] if unbiased else RHO, "skip": None if skip is None else torch.tensor([skip])},
        tolerance=0,
        any_layout=False,
    )


def every_sampler(sizes, dtype, **options):
    return [
        masked(sizes, dtype, "bottomk", **options),
        masked(sizes, dtype, "topk", **options),
        masked(sizes, dtype, "uniform", True, **options),
        masked(sizes, dtype, "independent", True, **options),
        masked(sizes, dtype, "independent", lam=0.0, **options),
    ]


def ties(grads):
    for g in grads:
        g.copy_(torch.arange(len(g)) % 3)


def no_number(grads):
    grads[-1][-1] = torch.nan


def cases(dtype):
    sizes, long = (0, 1, 5, 257, 1000), (100_003, 40_000, 65_536)
    found = [*every_sampler(sizes, dtype), *every_sampler(long, dtype), *every_sampler((3,) * 130, dtype)]
    found += [masked(sizes, dtype, importance="gn_wn"), masked(sizes, dtype, importance="sqrt_gn", at=1)]
    found += [masked(long, dtype, "topk", change=ties), masked(sizes, dtype, change=no_number)]
    found += [masked(sizes, dtype, skip=True), masked(sizes, dtype, skip=False)]
    found += [masked(sizes, dtype, "independent", True, update=True), masked(sizes, dtype, update=True, at=1)]
    return found


def plain(N, dtype):
    return [masked((N, 3 * N), dtype, skip=False), masked((N, 3 * N), dtype, "independent", True)]


def watched(torch_products):
    sizes = (0, 5, 700)
    return [*every_sampler(sizes, torch.bfloat16), masked((40_000,), torch.float32, "topk", change=ties)]
