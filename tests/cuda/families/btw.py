import torch
from case import Case, Random, real

ops = torch.ops.mmbal


def weights(N, dtype, M=3):
    random = Random(6)
    kl, mi = random.uniform(N, M) * 4, random.uniform(M) + 0.1
    present = random.uniform(N, M) < 0.7
    return [
        Case(f"btw_weights {N} x {M}, {dtype}", lambda kl, mi: ops.btw_weights(kl, mi), [kl.to(dtype), mi]),
        Case(
            f"btw_weights {N} x {M}, agree, {dtype}",
            lambda kl, mi, present: ops.btw_weights(kl, mi, present, 1e-5, 3.0, "agree", 2.0, True),
            [kl.to(dtype), mi],
            {"present": present},
        ),
    ]


def scaling(N, dtype, M=3, d=24):
    random = Random(7)
    embeddings = [random.uniform(N, d + m, dtype=dtype) for m in range(M)]
    return Case(
        f"scale_modalities {N} x {d}, {dtype}",
        lambda w, *embeddings: ops.scale_modalities(list(embeddings), w),
        [random.uniform(N, M, dtype=real(dtype)), *embeddings],
    )


def moving_average(N, dtype, M=3):
    random = Random(8)
    table, w = random.uniform(2 * N, M, dtype=real(dtype)), random.uniform(N, M, dtype=real(dtype))

    def average(table, w, index):
        table = table.detach().clone()
        ops.ema_rows_(table, index, w.detach(), 0.3)
        return table

    index = random.choices(1, 2 * N, N)[0] if N else torch.empty(0, dtype=torch.int64)
    return Case(f"ema_rows_ {N} x {M}, {real(dtype)}", average, [table, w], {"index": index}, any_layout=False)


def cases(dtype):
    return [c for N in (0, 1, 37, 1000) for c in plain(N, dtype)]


def plain(N, dtype):
    return [*weights(N, dtype), scaling(N, dtype), moving_average(N, dtype)]


def small():
    return [*weights(4, torch.float64, M=2), scaling(4, torch.float64, M=2, d=3)]


def watched(torch_products):
    return [moving_average(20, torch.float32)]
