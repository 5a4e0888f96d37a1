import torch
from case import Case, Random, real

ops = torch.ops.mmbal


def asked(random, N, M, masked):
    """target_shares and, masked, present: one modality of each sample at least."""
    if not masked:
        return {"target": random.uniform(M) + 0.1, "present": None}
    present = random.uniform(N, M) < 0.6
    present[:, 0] |= ~present.any(1)
    return {"target": random.uniform(N, M) + 0.1, "present": present}


def regulariser(N, dtype, sizes=((7,), (3, 5), (24,)), pool="l2", penalty="l1", masked=False):
    random, M = Random(11), len(sizes)
    lists = [random.normal(N, *size, dtype=dtype) for _ in range(2) for size in sizes]
    return Case(
        f"attribution_reg {N} of {M} {sizes[0]}, {pool}, {penalty}, {dtype}{', masked' if masked else ''}",
        lambda *lists, target, present: ops.attribution_reg(
            list(lists[:M]), list(lists[M:]), target, present, pool, penalty, 1e-12
        ),
        lists,
        asked(random, N, M, masked),
        twice=True,
    )


def second_order(N, dtype, sizes=((7,), (3, 5)), penalty="l1"):
    """The backward as an operator, whose gradient is attribution_reg_backward_backward."""
    random, M = Random(13), len(sizes)
    upstream = [random.normal(*size, dtype=real(dtype)) for size in ((N,), (N, M), (N, M))]
    lists = [random.normal(N, *size, dtype=dtype) for _ in range(2) for size in sizes]

    def call(dreg, dshares, dmagnitudes, *lists, target, present):
        grads, embeddings, options = list(lists[:M]), list(lists[M:]), ("l2", penalty, 1e-12)
        magnitudes = ops.attribution_reg(grads, embeddings, target, present, *options)[2].detach()
        dgrads, dembeddings = ops.attribution_reg_backward(
            dreg, dshares, dmagnitudes, grads, embeddings, target, present, magnitudes, *options
        )
        return *dgrads, *dembeddings

    name = f"attribution_reg_backward {N} of {M} {sizes[0]}, {penalty}, {dtype}"
    return Case(name, call, upstream + lists, asked(random, N, M, masked=True))


def linear_head(N, dtype, sizes=(16, 5), C=7, score="odds", joined=False, masked=False, labels=False):
    """Squared: rounding of products in float32 can take no share over a jump of a slope."""
    random, M = Random(12), len(sizes)
    embeddings = [random.normal(N, size, dtype=dtype) for size in sizes]
    weights = [random.normal(C, size, dtype=dtype) for size in ((sum(sizes),) if joined else sizes)]
    logits, dreg = random.normal(N, C, dtype=dtype), random.uniform(N, dtype=real(dtype))

    def call(logits, dreg, *lists, target, present, classes):
        logits, dreg, *lists = (t.detach() for t in (logits, dreg, *lists))  # it has no derivative
        reg, shares, magnitudes, dweights, dbias = ops.attribution_linear(
            lists[:M], lists[M:], logits, target, dreg, present, classes, score, "l2", "squared"
        )
        return reg, shares, magnitudes, *dweights, dbias

    classes = random.choices(N, C, 1)[:, 0] if labels else None
    return Case(
        f"attribution_linear {N} of {M} {sizes[0]}, {C} classes, {score}, {dtype}"
        + "".join(f", {what}" for what, holds in (("joined", joined), ("masked", masked), ("labels", labels)) if holds),
        call,
        [logits, dreg, *embeddings, *weights],
        asked(random, N, M, masked) | {"classes": classes},
    )


def cases(dtype):
    found = [c for N in (0, 1, 37, 1000) for c in plain(N, dtype)]
    found += [
        regulariser(3, dtype, ((70_001,), (1,))),
        regulariser(5, dtype, ((1024,), (1025,)), "rms", "huber", masked=True),
        regulariser(4, dtype, tuple((1 + m % 5,) for m in range(256)), penalty="squared"),
        regulariser(70_000, dtype, ((2,), (3,)), penalty="huber"),
        linear_head(130, dtype, (256, 129), C=300, labels=True),
        linear_head(400, dtype, (512, 256), C=700, joined=True),
        linear_head(20, dtype, (3,) * 70, C=1),
        linear_head(40, dtype, (30, 20), C=2, score="logit", joined=True, labels=True),
    ]
    return found


def plain(N, dtype):
    return [
        regulariser(N, dtype),
        regulariser(N, dtype, pool="rms", penalty="squared", masked=True),
        second_order(N, dtype),
        linear_head(N, dtype),
        linear_head(N, dtype, score="logit", joined=True, masked=True),
    ]


def small():
    return [
        regulariser(4, torch.float64, ((3,), (2, 2))),
        regulariser(3, torch.float64, ((2,), (3,), (1,)), "rms", "squared", masked=True),
        second_order(3, torch.float64, ((3,), (2, 2)), "squared"),
    ]


def watched(torch_products):
    return [
        regulariser(3, torch.float32, ((1500,), (7,))),
        linear_head(4, torch.float64, (3, 2), C=3),
        linear_head(70, torch.bfloat16, (70, 9), C=33, joined=True),
    ]
