// The first k of lists of scores, without a histogram: the k-th largest key is found bit by bit, by counting how many
// are at least as large. What comes out keeps its order, so ties go to the lower index.
#include "retrieval.cuh"

#include <type_traits>

namespace mmbal {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr int HELD = 16, HELD_SEGMENT = HELD * THREADS; // keys that a thread keeps in registers
constexpr int64_t SEGMENT_OF_K = 4;                     // a segment has at least so many times k elements
constexpr int64_t RUN = THREADS;                        // sorted by one block

#ifdef MMBAL_CUDA_ON_CPU // so small that tests pass it
constexpr int64_t MOST_HELD_K = 40;
#else
constexpr int64_t MOST_HELD_K = HELD_SEGMENT / SEGMENT_OF_K;
#endif

// Of a block's segment a warp has neighbours, `share` of them, 32 at a time.
template <typename R, bool IS_HELD>
class Segment {
public:
    using Count = std::conditional_t<IS_HELD, int, int64_t>;

    __device__ __forceinline__ Segment(const R *scores, int64_t size)
        : scores_(scores), size_(size), share_(IS_HELD ? HELD * WARP : ceil_div(ceil_div(size, WARPS), WARP) * WARP),
          first_(threadIdx.x / WARP * share_ + threadIdx.x % WARP) {
        if constexpr (IS_HELD) {
#pragma unroll
            for (int step = 0; step < HELD; step++) held_[step] = read(first_ + step * WARP);
        }
    }

    // body(key, place); all lanes of a warp take the same number of steps.
    template <typename Body>
    __device__ __forceinline__ void for_keys(Body body) const {
        if constexpr (IS_HELD) {
#pragma unroll
            for (int step = 0; step < HELD; step++) body(held_[step], first_ + step * WARP);
        } else {
            for (int64_t step = 0; step < share_; step += WARP) body(read(first_ + step), first_ + step);
        }
    }

    // The warp's keys that hold, the same for all of its lanes. A warp has fewer than 2^32.
    template <typename Holds>
    __device__ __forceinline__ Count count(Holds holds) const {
        unsigned count = 0;
        for_keys([&](Key<R> key, int64_t) { count += holds(key) ? 1 : 0; });
        return static_cast<Count>(__reduce_add_sync(ALL_LANES, count));
    }

private:
    __device__ __forceinline__ Key<R> read(int64_t place) const { return place < size_ ? key_of(scores_[place]) : 0; }

    const R *scores_;
    const int64_t size_, share_, first_;
    Key<R> held_[IS_HELD ? HELD : 1];
};

// of_warps [WARPS]: not that of the sum before.
template <typename Count>
__device__ __forceinline__ Count sum_of_block(Count of_warp, Count *of_warps) {
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = of_warp;
    __syncthreads();
    Count sum = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) sum += of_warps[warp];
    return sum;
}

template <typename R, bool IS_HELD>
__global__ void __launch_bounds__(THREADS, IS_HELD ? 3 : 1)
    keep_first(int64_t queries, Found<R> from, SelectionSizes sizes, Found<R> to, int64_t to_first) {
    using Count = typename Segment<R, IS_HELD>::Count;
    Count *shared = shared_memory<Count>(); // [4, WARPS]
    const int lane = threadIdx.x % WARP, my_warp = threadIdx.x / WARP;
    const int64_t segments = ceil_div(from.count, sizes.segment);
    for (int64_t index = blockIdx.x; index < queries * segments; index += gridDim.x) {
        const int64_t query = index / segments, begin = index % segments * sizes.segment;
        const int64_t size = from.count - begin < sizes.segment ? from.count - begin : sizes.segment;
        const R *scores = from.scores + query * from.stride + begin;
        const Segment<R, IS_HELD> segment(scores, size);
        const Count wanted = static_cast<Count>(size < sizes.k ? size : sizes.k);
        Key<R> least = 0; // the largest key that is not above `wanted` keys
        for (int bit = 8 * sizeof(R) - 1; bit >= 0; bit--) {
            const Key<R> candidate = least | Key<R>{1} << bit;
            const Count there =
                sum_of_block(segment.count([&](Key<R> key) { return key >= candidate; }), shared + bit % 2 * WARPS);
            if (there >= wanted) least = candidate;
            if (there == wanted) break;
        }
        // Above the least key all are wanted, and of those with it the first.
        Count *above_of_warps = shared + 2 * WARPS, *equal_of_warps = shared + 3 * WARPS;
        const Count all_above = sum_of_block(segment.count([&](Key<R> key) { return key > least; }), above_of_warps);
        sum_of_block(segment.count([&](Key<R> key) { return key == least; }), equal_of_warps);
        const Count wanted_equal = wanted - all_above;
        Count above = 0, equal = 0; // before the warp's next ones
        for (int warp = 0; warp < my_warp; warp++) above += above_of_warps[warp], equal += equal_of_warps[warp];
        const int64_t at = query * to.stride + to_first + index % segments * sizes.k;
        segment.for_keys([&](Key<R> key, int64_t place) {
            const unsigned is_above = __ballot_sync(ALL_LANES, key > least);
            const unsigned is_equal = __ballot_sync(ALL_LANES, key == least), before = (1u << lane) - 1;
            const Count equal_before = equal + __popc(is_equal & before);
            if (key > least || (key == least && equal_before < wanted_equal)) {
                const int64_t slot = at + above + __popc(is_above & before) +
                                     (equal_before < wanted_equal ? equal_before : wanted_equal);
                to.scores[slot] = scores[place];
                to.indices[slot] =
                    from.indices ? from.indices[query * from.stride + begin + place] : from.first_index + begin + place;
            }
            above += __popc(is_above), equal += __popc(is_equal);
        });
        __syncthreads(); // shared memory is the next segment's
    }
}

template <typename R>
__device__ __forceinline__ bool comes_before(Key<R> key, int64_t index, Key<R> other, int64_t other_index) {
    return key > other || (key == other && index < other_index);
}

// Runs of RUN, each sorted by counting what comes before each element.
template <typename R>
__global__ void __launch_bounds__(THREADS, 1) sort_runs(int64_t queries, int64_t k, Found<R> from, Found<R> to) {
    int64_t *indices = shared_memory<int64_t>(); // [RUN]
    Key<R> *keys = reinterpret_cast<Key<R> *>(indices + RUN);
    const int64_t runs = ceil_div(k, RUN);
    for (int64_t run = blockIdx.x; run < queries * runs; run += gridDim.x) {
        const int64_t query = run / runs, begin = run % runs * RUN;
        const int size = static_cast<int>(k - begin < RUN ? k - begin : RUN), mine = threadIdx.x;
        R score = 0;
        int64_t index = 0;
        if (mine < size) {
            score = from.scores[query * from.stride + begin + mine];
            index = from.indices[query * from.stride + begin + mine];
            keys[mine] = key_of(score), indices[mine] = index;
        }
        __syncthreads();
        if (mine < size) {
            const Key<R> key = key_of(score);
            int64_t at = query * to.stride + begin;
            for (int other = 0; other < size; other++) at += comes_before<R>(keys[other], indices[other], key, index);
            to.scores[at] = score, to.indices[at] = index;
        }
        __syncthreads(); // shared memory is the next run's
    }
}

// Pairs of sorted runs of `length` become one: an element goes behind those of its own run and those of the other that
// come before it.
template <typename R>
__global__ void __launch_bounds__(THREADS, 1)
    merge_runs(int64_t queries, int64_t k, int64_t length, Found<R> from, Found<R> to) {
    for (int64_t i = first_group<1>(); i < queries * k; i += group_count<1>()) {
        const int64_t query = i / k, mine = i % k, begin = mine / (2 * length) * 2 * length;
        const int64_t middle = begin + length < k ? begin + length : k;
        const int64_t end = begin + 2 * length < k ? begin + 2 * length : k;
        const R *scores = from.scores + query * from.stride;
        const int64_t *indices = from.indices + query * from.stride;
        const Key<R> key = key_of(scores[mine]);
        const int64_t other = mine < middle ? middle : begin;
        int64_t low = other, high = mine < middle ? end : middle; // the first of the other run that comes after it
        while (low < high) {
            const int64_t between = low + (high - low) / 2;
            if (comes_before<R>(key_of(scores[between]), indices[between], key, indices[mine]))
                low = between + 1;
            else
                high = between;
        }
        const int64_t at = query * to.stride + begin + (mine - (mine < middle ? begin : middle)) + (low - other);
        to.scores[at] = scores[mine], to.indices[at] = indices[mine];
    }
}

} // namespace

SelectionSizes selection_sizes(int64_t k) {
    if (k <= MOST_HELD_K) return {HELD_SEGMENT, k};
    return {ceil_div(SEGMENT_OF_K * k, WARP) * WARP, k};
}

template <typename R>
mmbal_status select_of_segments(int64_t queries, const Found<R> &from, const SelectionSizes &sizes, const Found<R> &to,
                                int64_t to_first, mmbal_stream stream) {
    const int64_t blocks = queries * ceil_div(from.count, sizes.segment);
    if (sizes.k <= MOST_HELD_K)
        return launch(stream, blocks, THREADS, 4 * WARPS * sizeof(int), keep_first<R, true>, queries, from, sizes, to,
                      to_first);
    return launch(stream, blocks, THREADS, 4 * WARPS * sizeof(int64_t), keep_first<R, false>, queries, from, sizes, to,
                  to_first);
}

template <typename R>
mmbal_status sort_found(int64_t queries, int64_t k, const Found<R> &from, const Found<R> &other, R *scores,
                        int64_t *indices, mmbal_stream stream) {
    const Found<R> result = {scores, indices, k, k, 0};
    int64_t merges = 0;
    for (int64_t length = RUN; length < k; length *= 2) merges++;
    // The last of the passes ends in the result.
    const auto place = [&](int64_t merges_left) { return merges_left % 2 == 0 ? result : other; };
    MMBAL_RETURN_UNLESS_OK(launch(stream, queries * ceil_div(k, RUN), THREADS, RUN * (sizeof(int64_t) + sizeof(Key<R>)),
                                  sort_runs<R>, queries, k, from, place(merges)));
    for (int64_t length = RUN; length < k; length *= 2, merges--)
        MMBAL_RETURN_UNLESS_OK(launch(stream, ceil_div(queries * k, THREADS), THREADS, 0, merge_runs<R>, queries, k,
                                      length, place(merges), place(merges - 1)));
    return MMBAL_OK;
}

#define MMBAL_INSTANTIATE(R)                                                                                           \
    template mmbal_status select_of_segments<R>(int64_t, const Found<R> &, const SelectionSizes &, const Found<R> &,   \
                                                int64_t, mmbal_stream);                                                \
    template mmbal_status sort_found<R>(int64_t, int64_t, const Found<R> &, const Found<R> &, R *, int64_t *,          \
                                        mmbal_stream);
MMBAL_INSTANTIATE(float)
MMBAL_INSTANTIATE(double)

} // namespace mmbal
