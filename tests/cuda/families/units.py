import torch
from case import Case, Random

ops = torch.ops.mmbal


def gradients(N, dtype, count=3):
    """Filters, rows and heads as columns, N units at most; enough of them for more than one launch."""
    random = Random(20)
    shapes = [(N, 5), (N, 3, 2, 2), (N,), (4, 12)] * count
    return [random.normal(*shape, dtype=dtype) for shape in shapes]


def heads(columns, first, count):
    """specs of `count` columns of a matrix [4, columns] as units."""
    return [1, count, 4, 1, 0, 1, columns, 1, first]


def energies(N, dtype, importance="gn", count=3):
    weights = [1 + g.abs() for g in gradients(N, dtype, count)]

    def energy(*grads, **others):
        given = list(others.values()) if importance == "gn_wn" else None
        return ops.unit_energy_foreach(list(grads), [], given, importance)

    others = {f"w{t}": w for t, w in enumerate(weights)}
    # of float64 sums in another order, whatever the dtype
    grads = gradients(N, dtype, count)
    return Case(f"unit_energy {N}, {importance}, {dtype}", energy, grads, others, tolerance=1e-11, any_layout=False)


def columns(N, dtype):
    grad = Random(21).normal(4, N + 6, dtype=dtype)

    def energy(grad, other):
        return ops.unit_energy_foreach([grad, other], heads(grad.shape[1], 2, N) + heads(grad.shape[1], 0, N + 6))

    return Case(f"unit_energy of {N} columns, {dtype}", energy, [grad, -grad], tolerance=1e-11, any_layout=False)


def long(dtype):
    grads = [Random(22).normal(*shape, dtype=dtype) for shape in ((3, 70_001), (1, 300_000), (300, 9), (70_000, 2))]
    return Case(
        f"unit_energy of long units, {dtype}",
        lambda *grads: ops.unit_energy_foreach(list(grads), []),
        grads,
        tolerance=1e-11,
    )


def scaling(N, dtype, based=False, skip=None):
    random = Random(23)
    grads = gradients(N, dtype, 1)
    units = sum(g.shape[0] for g in grads)
    scale = (random.uniform(units) * 3).round() * 0.75
    others = {"scale": scale, "skip": None if skip is None else torch.tensor([skip])}
    others |= {f"base{t}": g / 2 for t, g in enumerate(grads)} if based else {}

    def scaled(*grads, scale, skip, **bases):
        grads = [g.detach().clone() for g in grads]
        ops.scale_units_foreach_(grads, [], scale, skip, list(bases.values()) or None)
        return grads

    return Case(f"scale_units {N}, {based}, {skip}, {dtype}", scaled, grads, others, tolerance=0, any_layout=False)


def cases(dtype):
    found = [long(dtype)]
    for N in (0, 1, 37, 1000):
        found += plain(N, dtype)
        found += [energies(N, dtype, "sqrt_gn"), energies(N, dtype, "gn_wn"), energies(N, dtype, count=20)]
        found += [scaling(N, dtype, based=True, skip=False), scaling(N, dtype, skip=True)]
    return found


def plain(N, dtype):
    return [energies(N, dtype), columns(N, dtype), scaling(N, dtype)]


def watched(torch_products):
    return [energies(5, torch.float32, "gn_wn"), columns(40, torch.bfloat16), scaling(9, torch.float32, based=True)]
