"""topk_search against a stable sort, numpy and faiss; recall_at_k against cases made by hand and a plain loop."""

import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import mmbal  # noqa: F401  (loads the operators)
import oracles

topk_search, recall_at_k = torch.ops.mmbal.topk_search, torch.ops.mmbal.recall_at_k
DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
NAN, INF = math.nan, math.inf


def whole(Q, D, dtype=torch.float32, seed=0):
    """Small whole numbers: products are exact in every order, and many are equal."""
    return torch.randint(-3, 4, (Q, D), generator=torch.Generator().manual_seed(seed)).to(dtype)


def by_sorting(query, bank, k):
    scores = query.double() @ bank.double().T
    found = torch.sort(scores, dim=1, descending=True, stable=True)
    return found.values[:, :k], found.indices[:, :k]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(
    ("Q", "n", "D", "k"),
    [(1, 1, 1, 1), (3, 5, 4, 5), (1, 1000, 33, 7), (130, 700, 5, 1), (40, 3000, 70, 100), (1100, 600, 3, 600)],
)
def test_it_finds_what_a_stable_sort_finds(Q, n, D, k, dtype, poisoned_memory):
    query, bank = whole(Q, D, dtype), whole(n, D, dtype, seed=1)
    scores, indices = topk_search(query, bank, k)
    expected, expected_indices = by_sorting(query, bank, k)
    assert scores.dtype == (torch.float64 if dtype == torch.float64 else torch.float32) and indices.dtype == torch.int64
    assert torch.equal(scores.double(), expected) and torch.equal(indices, expected_indices)


def test_more_queries_than_go_through_the_bank_at_once():
    query, bank = whole(2100, 6), whole(900, 6, seed=1)
    scores, indices = topk_search(query, bank, 4)
    expected, expected_indices = by_sorting(query, bank, 4)
    assert torch.equal(scores.double(), expected) and torch.equal(indices, expected_indices)


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_are_inner_products(dtype):
    query, bank = torch.randn(9, 700).to(dtype), torch.randn(400, 700).to(dtype)
    scores, indices = topk_search(query, bank, 6)
    expected = (query.double()[:, None] * bank.double()[indices]).sum(2)
    oracles.assert_near(scores, expected, 1e-12 if dtype == torch.float64 else 2e-6)
    oracles.assert_near(scores, by_sorting(query, bank, 6)[0], 1e-12 if dtype == torch.float64 else 2e-6)
    assert (scores.diff() <= 0).all()


def test_it_agrees_with_faiss():
    faiss = pytest.importorskip("faiss")
    query, bank = (F.normalize(torch.randn(rows, 48), dim=1) for rows in (60, 5000))
    index = faiss.IndexFlatIP(48)
    index.add(bank.numpy())
    expected, expected_indices = index.search(query.numpy(), 10)
    scores, indices = topk_search(query, bank, 10)
    np.testing.assert_allclose(scores.numpy(), expected, atol=1e-6)
    differ = indices.numpy() != expected_indices  # only where two scores are equal but for their rounding
    exact = (query.double() @ bank.double().T).numpy()
    ours, theirs = (np.take_along_axis(exact, i, 1)[differ] for i in (indices.numpy(), expected_indices))
    np.testing.assert_allclose(ours, theirs, atol=1e-6)
    assert differ.mean() < 0.01


def test_it_agrees_with_numpy():
    query, bank = torch.randn(20, 30).double(), torch.randn(500, 30).double()
    scores = query.numpy() @ bank.numpy().T
    assert (topk_search(query, bank, 9)[1].numpy() == np.argsort(-scores, axis=1, kind="stable")[:, :9]).all()


def test_ties_go_to_the_lower_index():
    bank = torch.ones(1500, 3)
    bank[700] = 2
    scores, indices = topk_search(torch.ones(2, 3), bank, 5)
    assert indices.tolist() == [[700, 0, 1, 2, 3]] * 2
    assert scores.tolist() == [[6, 3, 3, 3, 3]] * 2
    assert topk_search(torch.zeros(1, 2), torch.tensor([[-1.0, 0], [1, 0]]), 2)[1].tolist() == [[0, 1]]  # -0 and 0


def test_nan_comes_after_every_number_in_the_order_of_its_index():
    bank = torch.tensor([[NAN], [-INF], [1.0], [NAN], [INF], [-2.0]])
    scores, indices = topk_search(torch.ones(1, 1), bank, 6)
    assert indices.tolist() == [[4, 2, 5, 1, 0, 3]]
    assert scores[0, :4].tolist() == [INF, 1, -2, -INF] and scores[0, 4:].isnan().all()
    assert topk_search(torch.ones(1, 1), bank, 3)[1].tolist() == [[4, 2, 5]]
    scores, indices = topk_search(torch.tensor([[NAN], [1.0]]), bank, 5)
    assert scores[0].isnan().all() and indices.tolist() == [[0, 1, 2, 3, 4], [4, 2, 5, 1, 0]]


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_banks_in_half_precision_take_float32_queries_and_sum_in_float32(dtype):
    query, bank = torch.randn(5, 3000), torch.randn(50, 3000).to(dtype)
    scores, indices = topk_search(query, bank, 8)
    expected, expected_indices = topk_search(query, bank.float(), 8)
    assert torch.equal(scores, expected) and torch.equal(indices, expected_indices)


def test_any_layout_gives_the_same():
    query, bank = torch.randn(6, 10), torch.randn(80, 10)
    expected = topk_search(query, bank, 3)
    wide = torch.full((160, 20), NAN)
    wide[::2, ::2] = bank
    for q, b in ((query.t().contiguous().t(), bank), (query, wide[::2, ::2])):
        assert all(torch.equal(x, y) for x, y in zip(topk_search(q, b, 3), expected, strict=True))


def test_no_queries_find_nothing():
    scores, indices = topk_search(torch.zeros(0, 4), torch.randn(5, 4), 2)
    assert scores.shape == indices.shape == (0, 2)


@pytest.mark.parametrize("k", [1, 10, 300])
def test_bitwise_the_same_at_any_thread_count(at_each_thread_count, k):
    query, bank = torch.randn(70, 50), torch.randn(4000, 50)
    bank[2000:] = bank[:2000]
    at_each_thread_count(lambda: topk_search(query, bank, k))


def test_a_score_depends_on_its_two_vectors_alone():
    query, bank = torch.randn(40, 600), torch.randn(900, 600)
    scores, indices = topk_search(query, bank, 20)
    for q, place in ((0, 3), (17, 0), (39, 19)):
        alone = topk_search(query[q : q + 1], bank[indices[q, place]][None], 1)[0]
        assert alone.item() == scores[q, place].item()


def test_it_is_not_differentiable():
    query = torch.randn(3, 4, requires_grad=True)
    scores, indices = topk_search(query, torch.randn(6, 4), 2)
    assert not indices.requires_grad
    with pytest.raises(RuntimeError, match="topk_search has no derivative"):
        scores.sum().backward()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("Q", [0, 3])
def test_opcheck(Q, dtype):
    torch.library.opcheck(topk_search.default, (torch.randn(Q, 4).to(dtype), torch.randn(9, 4).to(dtype), 2))
    if Q > 0:  # without queries the recall is NaN, which equals nothing
        indices, positives = torch.zeros(Q, 3, dtype=torch.int64), torch.zeros(Q, dtype=torch.int64)
        torch.library.opcheck(recall_at_k.default, (indices, positives, torch.arange(Q + 1), [1, 3]))


def test_compile_gives_what_eager_gives():
    def search(query, bank, positives, offsets):
        scores, indices = topk_search(query, bank, 3)
        return scores, recall_at_k(indices, positives, offsets, [1, 3])

    arguments = torch.randn(6, 4), torch.randn(9, 4), torch.arange(6), torch.arange(7)
    compiled = torch.compile(search, fullgraph=True, backend="aot_eager")
    assert all(torch.equal(a, b) for a, b in zip(compiled(*arguments), search(*arguments), strict=True))


@pytest.mark.parametrize(
    ("query", "bank", "k", "message"),
    [
        (torch.zeros(4), torch.zeros(3, 4), 1, r"query must be \[Q, D\].*got \[4\]"),
        (torch.zeros(2, 4), torch.zeros(3, 5), 1, r"bank must be \[n, D\] = \[\*, 4\], got \[3, 5\]"),
        (torch.zeros(2, 0), torch.zeros(3, 0), 1, "query must have at least one column"),
        (torch.zeros(2, 4), torch.zeros(3, 4), 0, "k must be from 1 to the number of rows of the bank 3, got 0"),
        (torch.zeros(2, 4), torch.zeros(3, 4), 4, "k must be from 1 to the number of rows of the bank 3, got 4"),
        (torch.zeros(2, 4), torch.zeros(0, 4), 1, "k must be from 1 to the number of rows of the bank 0, got 1"),
        (torch.zeros(2, 4).int(), torch.zeros(3, 4), 1, "query must be float32.*got int32"),
        (torch.zeros(2, 4), torch.zeros(3, 4).long(), 1, "bank must be float32.*got int64"),
        (torch.zeros(2, 4), torch.zeros(3, 4).double(), 1, "query must be float64 as bank is.*got float32"),
        (torch.zeros(2, 4).half(), torch.zeros(3, 4), 1, "query must be float32 as bank is.*got float16"),
    ],
)
def test_bad_arguments_of_the_search_are_named_by_the_kernel_and_where_nothing_is_computed(query, bank, k, message):
    for device in ("cpu", "meta"):
        with pytest.raises(RuntimeError, match="topk_search: " + message):
            topk_search(query.to(device), bank.to(device), k)


def test_an_argument_elsewhere_is_named():
    with pytest.raises(RuntimeError, match="topk_search: bank must be on"):
        topk_search(torch.zeros(2, 4), torch.zeros(3, 4, device="meta"), 1)


# --- recall -----------------------------------------------------------------------------------------------------------


def csr(positives):
    offsets = torch.tensor([0, *np.cumsum([len(p) for p in positives])], dtype=torch.int64)
    return torch.tensor([i for p in positives for i in p], dtype=torch.int64), offsets


def test_five_captions_an_image_by_hand():
    """Three images, captions 5 i .. 5 i + 5; to the image, any of its five captions counts; to a caption, its image."""
    captions = csr([range(5 * i, 5 * i + 5) for i in range(3)])
    found = torch.tensor([[4, 9, 0], [0, 14, 7], [3, 1, 8]])  # of images: first, third, never
    assert recall_at_k(found, *captions, [1, 2, 3]).tolist() == [1 / 3, 1 / 3, 2 / 3]
    images = csr([[i // 5] for i in range(15)])
    back = torch.tensor([[0, 1, 2]] * 5 + [[0, 1, 2]] * 5 + [[2, 0, 1]] * 4 + [[1, 0, 2]])
    got = recall_at_k(back, *images, [3, 1, 2]).tolist()  # in the order that was asked for
    assert got == [1.0, 9 / 15, 14 / 15]


def test_queries_without_positives_are_left_out():
    indices = torch.tensor([[1, 2], [3, 4], [5, 6]])
    assert recall_at_k(indices, *csr([[2], [], [9]]), [1, 2]).tolist() == [0, 0.5]
    assert recall_at_k(indices, *csr([[], [], []]), [1, 2]).isnan().all()
    assert recall_at_k(indices[:0], *csr([]), [1]).isnan().all()
    assert recall_at_k(indices, *csr([[1], [3], [5]]), []).shape == (0,)


def test_nothing_found_is_no_hit():
    assert recall_at_k(torch.tensor([[-1, -1, 4]]), *csr([[4]]), [2, 3]).tolist() == [0, 1]


def test_it_equals_a_plain_loop(at_each_thread_count):
    generator = torch.Generator().manual_seed(0)
    indices = torch.rand(500, 40, generator=generator).argsort(1)[:, :12]
    positives = [torch.randperm(40, generator=generator)[: q % 4].tolist() for q in range(500)]
    ks = [1, 5, 12]
    hits = [[bool(set(row[:k].tolist()) & set(p)) for row, p in zip(indices, positives, strict=True) if p] for k in ks]
    assert recall_at_k(indices, *csr(positives), ks).tolist() == pytest.approx([np.mean(h) for h in hits], abs=1e-15)
    at_each_thread_count(lambda: (recall_at_k(indices, *csr(positives), ks),))


ONE = torch.tensor([[0, 1]])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"indices": torch.tensor([0, 1])}, r"indices must be \[Q, K\].*got \[2\]"),
        ({"indices": ONE.int()}, "indices must be int64, got int32"),
        ({"indices": ONE[:, :0]}, "indices must have at least one column"),
        ({"positives": torch.tensor([0.0])}, "positives must be int64, got float32"),
        ({"positives": torch.tensor([-1])}, "positives must not be negative"),
        ({"positives": torch.tensor([[0]])}, r"positives must be \[P\]"),
        ({"offsets": torch.tensor([0])}, r"offsets must be \[Q \+ 1\] = \[2\], got \[1\]"),
        ({"offsets": torch.tensor([0, 2])}, "offsets must ascend from 0 to the number of positives 1"),
        ({"offsets": torch.tensor([1, 1])}, "offsets must ascend from 0 to the number of positives 1"),
        ({"offsets": torch.tensor([0, 1]).int()}, "offsets must be int64, got int32"),
        ({"ks": [0]}, "ks must be from 1 to the columns of indices 2, got 0"),
        ({"ks": [1, 3]}, "ks must be from 1 to the columns of indices 2, got 3"),
    ],
)
def test_bad_arguments_of_recall_are_named(change, message):
    arguments = {"indices": ONE, "positives": torch.tensor([0]), "offsets": torch.tensor([0, 1]), "ks": [1]} | change
    with pytest.raises(RuntimeError, match="recall_at_k: .*" + message):
        recall_at_k(**arguments)
