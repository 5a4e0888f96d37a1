// topk_search: products of some queries with some rows of the bank, of which the first k of each segment are kept,
// until one list is left; and recall_at_k.
#include "mmbal/cuda/retrieval.h"

#include <math.h>

#include "register_tile.cuh"
#include "retrieval.cuh"
#include "skinny_tile.cuh"

namespace mmbal {
namespace {

#ifdef MMBAL_CUDA_ON_CPU // so small that tests pass them
constexpr int64_t FEW_QUERIES = 20, QUERIES_AT_ONCE = 128, SCORES_BYTES = 1 << 16, KEPT_BYTES = 1 << 16;
#else
constexpr int64_t FEW_QUERIES = 32, QUERIES_AT_ONCE = 1024; // a tile's columns do for few
constexpr int64_t SCORES_BYTES = 32 << 20;                  // they stay in the second-level cache
constexpr int64_t KEPT_BYTES = 64 << 20;
#endif

// scores [Q, columns] of rows of the bank.
template <typename Multiply>
__global__ void __launch_bounds__(Multiply::THREADS, Multiply::BLOCKS)
    take_scores(const typename Multiply::Left *__restrict__ query, const typename Multiply::Right *__restrict__ bank,
                int64_t Q, int64_t columns, int64_t D, bool query_aligned, bool bank_aligned,
                typename Multiply::Sum *__restrict__ scores) {
    constexpr int TILE = Multiply::TILE, COLUMNS = Multiply::COLUMNS;
    const int64_t down = ceil_div(Q, TILE), tiles = down * ceil_div(columns, COLUMNS);
    for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) { // neighbours share rows of the bank
        const int64_t row = index % down * TILE, column = index / down * COLUMNS;
        multiply_tile<Multiply, true, true>(
            {query + row * D, D, 1, at_most(Q - row, TILE), D, query_aligned},
            {bank + column * D, D, 1, at_most(columns - column, COLUMNS), D, bank_aligned}, columns,
            scores + row * columns + column);
    }
}

// How a search is cut, from its sizes alone.
struct Plan {
    SelectionSizes sizes;
    int64_t queries, columns; // of the bank at once: whole segments, or all of it
    int64_t kept, kept_again; // of a query: after the first selection, and after the next
};

template <typename T>
T smaller(T a, T b) {
    return a < b ? a : b;
}
template <typename T>
T larger(T a, T b) {
    return a > b ? a : b;
}

template <typename R>
Plan plan_of(int64_t Q, int64_t n, int64_t k) {
    Plan p = {};
    p.sizes = selection_sizes(k);
    p.kept = p.sizes.kept_of(n), p.kept_again = larger(p.sizes.kept_of(p.kept), k);
    const int64_t bytes = static_cast<int64_t>(sizeof(R)), entry = bytes + static_cast<int64_t>(sizeof(int64_t));
    const int64_t segment = smaller(p.sizes.segment, n);
    const int64_t few = smaller(KEPT_BYTES / (entry * (p.kept + p.kept_again)), SCORES_BYTES / (bytes * segment));
    p.queries = smaller(Q, larger(smaller(few, QUERIES_AT_ONCE), int64_t{1}));
    constexpr int64_t TILE = Registers<R>::TILE;
    if (p.queries < Q && p.queries > TILE) p.queries -= p.queries % TILE;
    const int64_t segments = SCORES_BYTES / (bytes * segment * larger(p.queries, int64_t{1}));
    p.columns = smaller(n, larger(segments, int64_t{1}) * p.sizes.segment);
    return p;
}

// Memory of a workspace. From NULL, its size.
template <typename R>
struct Memory {
    R *products;       // [queries, columns]
    Found<R> kept[2];  // [queries, kept], [queries, kept_again]
    int64_t bytes = 0; // of all
};

template <typename R>
Memory<R> lay_out(const Plan &p, void *workspace) {
    Memory<R> m = {};
    unsigned char *memory = static_cast<unsigned char *>(workspace);
    const auto take = [&](int64_t count, size_t size) {
        void *piece = memory ? memory + m.bytes : nullptr;
        m.bytes += ceil_div(count * static_cast<int64_t>(size), 16) * 16;
        return piece;
    };
    m.products = static_cast<R *>(take(p.queries * p.columns, sizeof(R)));
    for (int i = 0; i < 2; i++) {
        Found<R> &kept = m.kept[i];
        kept.count = kept.stride = i == 0 ? p.kept : p.kept_again;
        kept.scores = static_cast<R *>(take(p.queries * kept.count, sizeof(R)));
        kept.indices = static_cast<int64_t *>(take(p.queries * kept.count, sizeof(int64_t)));
    }
    return m;
}

struct Arguments {
    const void *query, *bank;
    int64_t Q, n, D, k;
    void *scores;
    int64_t *indices;
    void *workspace;
    mmbal_stream stream;
};

template <typename Multiply>
mmbal_status run_scores(const Arguments &a, const void *query, int64_t Q, int64_t first, int64_t columns,
                        typename Multiply::Sum *scores) {
    using Query = typename Multiply::Left;
    using Bank = typename Multiply::Right;
    const Bank *rows = static_cast<const Bank *>(a.bank) + first * a.D;
    return launch(a.stream, ceil_div(Q, Multiply::TILE) * ceil_div(columns, Multiply::COLUMNS), Multiply::THREADS,
                  Stages<Multiply>::SHARED, take_scores<Multiply>, static_cast<const Query *>(query), rows, Q, columns,
                  a.D, rows_are_aligned(query, a.D, sizeof(Query)), rows_are_aligned(rows, a.D, sizeof(Bank)), scores);
}

template <typename Query, typename Bank>
mmbal_status search(const Arguments &a) {
    using R = Real<Bank>;
    const Plan p = plan_of<R>(a.Q, a.n, a.k);
    const Memory<R> m = lay_out<R>(p, a.workspace);
    for (int64_t begin = 0; begin < a.Q; begin += p.queries) {
        const int64_t queries = smaller(p.queries, a.Q - begin);
        const Query *query = static_cast<const Query *>(a.query) + begin * a.D;
        for (int64_t first = 0; first < a.n; first += p.columns) {
            const int64_t columns = smaller(p.columns, a.n - first);
            MMBAL_RETURN_UNLESS_OK((queries <= FEW_QUERIES ? run_scores<Skinny<Query, Bank>>
                                                           : run_scores<Registers<Query, Bank>>)(a, query, queries,
                                                                                                 first, columns,
                                                                                                 m.products));
            MMBAL_RETURN_UNLESS_OK(select_of_segments<R>(queries, {m.products, nullptr, columns, columns, first},
                                                         p.sizes, m.kept[0], p.sizes.kept_of(first), a.stream));
        }
        int last = 0;
        Found<R> found = m.kept[0];
        while (found.count > a.k) {
            Found<R> next = m.kept[1 - last];
            next.count = next.stride = p.sizes.kept_of(found.count);
            MMBAL_RETURN_UNLESS_OK(select_of_segments<R>(queries, found, p.sizes, next, 0, a.stream));
            found = next, last = 1 - last;
        }
        Found<R> other = m.kept[1 - last];
        other.count = other.stride = a.k;
        MMBAL_RETURN_UNLESS_OK(sort_found<R>(queries, a.k, found, other, static_cast<R *>(a.scores) + begin * a.k,
                                             a.indices + begin * a.k, a.stream));
    }
    return MMBAL_OK;
}

bool search_is_served(int64_t Q, int64_t n, int64_t D, int64_t k) { return Q >= 0 && D >= 1 && k >= 1 && k <= n; }

constexpr int RECALL_THREADS = 256, COUNT_THREADS = 512;

// Of the first positive among a query's indices, from 0: K where there is none, -1 without positives. A warp takes a
// query.
__global__ void __launch_bounds__(RECALL_THREADS, 1)
    rank_queries(const int64_t *__restrict__ indices, const int64_t *__restrict__ positives,
                 const int64_t *__restrict__ offsets, int64_t Q, int64_t K, int64_t P, int64_t *__restrict__ ranks) {
    const int lane = threadIdx.x % WARP;
    for (int64_t q = first_group<WARP>(); q < Q; q += group_count<WARP>()) {
        const int64_t first = offsets[q], last = offsets[q + 1];
        if (first < 0 || last < first || last > P) __trap();
        for (int64_t p = first + lane; p < last; p += WARP)
            if (positives[p] < 0) __trap();
        int64_t rank = 0;
        for (; rank < K && first < last; rank++) {
            const int64_t index = indices[q * K + rank];
            bool found = false;
            for (int64_t p = first + lane; p < last; p += WARP) found |= positives[p] == index;
            if (__any_sync(ALL_LANES, found)) break;
        }
        if (lane == 0) ranks[q] = first < last ? rank : -1;
    }
}

// As many ks as a launch's parameters carry.
struct Ranks {
    static constexpr int MOST = 128;
    int64_t ks[MOST];
};

// A block takes a k.
__global__ void __launch_bounds__(COUNT_THREADS, 1)
    count_found(const int64_t *__restrict__ ranks, const int64_t *__restrict__ offsets, int64_t Q, int64_t P, Ranks of,
                int64_t count, double *__restrict__ recall) {
    int64_t *of_warps = shared_memory<int64_t>(); // [2, WARP]
    if (offsets[0] != 0 || offsets[Q] != P) __trap();
    for (int64_t i = blockIdx.x; i < count; i += gridDim.x) {
        int64_t counted = 0, found = 0;
        for (int64_t q = threadIdx.x; q < Q; q += COUNT_THREADS)
            counted += ranks[q] >= 0, found += ranks[q] >= 0 && ranks[q] < of.ks[i];
        counted = sum_over_lanes<WARP>(counted), found = sum_over_lanes<WARP>(found);
        if (threadIdx.x % WARP == 0)
            of_warps[threadIdx.x / WARP] = counted, of_warps[WARP + threadIdx.x / WARP] = found;
        __syncthreads();
        if (threadIdx.x == 0) {
            counted = found = 0;
            for (int warp = 0; warp < COUNT_THREADS / WARP; warp++)
                counted += of_warps[warp], found += of_warps[WARP + warp];
            recall[i] = counted ? static_cast<double>(found) / static_cast<double>(counted) : static_cast<double>(NAN);
        }
        __syncthreads(); // shared memory is the next one's
    }
}

} // namespace
} // namespace mmbal

using namespace mmbal;

int64_t mmbal_topk_search_workspace_cuda(mmbal_dtype bank_dtype, int64_t Q, int64_t n, int64_t D, int64_t k) {
    if (!search_is_served(Q, n, D, k)) return 0;
    switch (bank_dtype) {
    case MMBAL_F32:
    case MMBAL_BF16:
    case MMBAL_F16: return lay_out<float>(plan_of<float>(Q, n, k), nullptr).bytes;
    case MMBAL_F64: return lay_out<double>(plan_of<double>(Q, n, k), nullptr).bytes;
    }
    return 0;
}

mmbal_status mmbal_topk_search_cuda(mmbal_dtype query_dtype, const void *query, mmbal_dtype bank_dtype,
                                    const void *bank, int64_t Q, int64_t n, int64_t D, int64_t k, void *scores,
                                    int64_t *indices, void *workspace, mmbal_stream stream) {
    const Arguments a = {query, bank, Q, n, D, k, scores, indices, workspace, stream};
    const bool half = bank_dtype == MMBAL_BF16 || bank_dtype == MMBAL_F16;
    if (query_dtype != bank_dtype && !(half && query_dtype == MMBAL_F32)) return MMBAL_UNSUPPORTED;
    const bool served = search_is_served(Q, n, D, k);
    switch (bank_dtype) {
    case MMBAL_F32: return served ? search<float, float>(a) : MMBAL_INVALID_ARGUMENT;
    case MMBAL_F64: return served ? search<double, double>(a) : MMBAL_INVALID_ARGUMENT;
    case MMBAL_BF16:
        if (!served) return MMBAL_INVALID_ARGUMENT;
        return query_dtype == MMBAL_F32 ? search<float, BF16>(a) : search<BF16, BF16>(a);
    case MMBAL_F16:
        if (!served) return MMBAL_INVALID_ARGUMENT;
        return query_dtype == MMBAL_F32 ? search<float, F16>(a) : search<F16, F16>(a);
    }
    return MMBAL_UNSUPPORTED;
}

int64_t mmbal_recall_at_k_workspace_cuda(int64_t Q) { return (Q > 0 ? Q : 1) * static_cast<int64_t>(sizeof(int64_t)); }

mmbal_status mmbal_recall_at_k_cuda(const int64_t *indices, const int64_t *positives, const int64_t *offsets,
                                    const int64_t *ks, int64_t Q, int64_t K, int64_t P, int64_t count, double *recall,
                                    void *workspace, mmbal_stream stream) {
    if (Q < 0 || K < 1 || P < 0 || count < 0) return MMBAL_INVALID_ARGUMENT;
    for (int64_t i = 0; i < count; i++)
        if (ks[i] < 1 || ks[i] > K) return MMBAL_INVALID_ARGUMENT;
    int64_t *ranks = static_cast<int64_t *>(workspace);
    MMBAL_RETURN_UNLESS_OK(launch(stream, ceil_div(Q * WARP, RECALL_THREADS), RECALL_THREADS, 0, rank_queries, indices,
                                  positives, offsets, Q, K, P, ranks));
    for (int64_t first = 0; first < count; first += Ranks::MOST) {
        const int64_t here = smaller<int64_t>(count - first, Ranks::MOST);
        Ranks of = {};
        for (int64_t i = 0; i < here; i++) of.ks[i] = ks[first + i];
        MMBAL_RETURN_UNLESS_OK(launch(stream, here, COUNT_THREADS, 2 * WARP * sizeof(int64_t), count_found, ranks,
                                      offsets, Q, P, of, here, recall + first));
    }
    return MMBAL_OK;
}
