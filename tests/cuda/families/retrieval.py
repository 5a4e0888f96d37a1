import torch
from case import Case, Random

ops = torch.ops.mmbal


def whole_numbers(random, *shape, dtype):
    """So small that sums of their products are exact: both devices find the same, and many are equal."""
    return (random.uniform(*shape) * 7).floor().sub(3).to(dtype)


def search(Q, dtype, n=60, D=9, k=4, query_dtype=None):
    random, query_dtype = Random(10), query_dtype or dtype
    return Case(
        f"topk_search {Q} in {n} x {D}, k {k}, {query_dtype} in {dtype}",
        lambda query, bank: ops.topk_search(query, bank, k),
        [],
        {
            "query": whole_numbers(random, Q, D, dtype=query_dtype),
            "bank": whole_numbers(random, n, D, dtype=dtype),
        },
    )


def recall(Q, K=6, ks=(1, 3, 6)):
    random = Random(11)
    indices = (random.uniform(Q, K) * 40).long() - 1
    counts = (random.uniform(Q) * 4).long()
    counts[0] = 2  # without any the recall is NaN
    offsets = torch.cat([counts.new_zeros(1), counts.cumsum(0)])
    positives = (random.uniform(int(counts.sum())) * 40).long()
    return Case(
        f"recall_at_k {Q} x {K}",
        lambda indices, positives, offsets: ops.recall_at_k(indices, positives, offsets, list(ks)),
        [],
        {"indices": indices, "positives": positives, "offsets": offsets},
    )


def cases(dtype):
    found = [
        search(3, dtype, n=100_000, D=16, k=10),
        search(200, dtype, n=9000, D=24, k=50),
        search(2, dtype, n=20_000, D=3, k=3000),
        search(40, dtype, n=700, D=33, k=700),
        search(1100, dtype, n=300, D=5, k=1),
        recall(37),
        recall(3000, K=100, ks=range(1, 101)),
    ]
    if dtype in (torch.bfloat16, torch.float16):
        found += [search(Q, dtype, n=500, D=17, query_dtype=torch.float32) for Q in (5, 70)]
    return found + [search(Q, dtype) for Q in (0, 1, 37, 130)]


def plain(N, dtype):
    return [search(N, dtype), recall(max(N, 1))]


def small():
    return []


def watched(torch_products):
    return [search(3, torch.float32, n=5000), search(40, torch.bfloat16, k=30), recall(50)]
