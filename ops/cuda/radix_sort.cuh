// Units in the order of their random words, by the threads of one block: a counting sort of each byte.
#pragma once

#include "block.cuh"

namespace mmbal {

// A random word and the unit it belongs to.
struct Ordered {
    uint32_t word;
    int32_t unit;
};

template <int THREADS>
struct SortShared {
    static constexpr int BITS = 8, BUCKETS = 1 << BITS, WARPS = THREADS / WARP;
    int32_t places[BUCKETS * WARPS]; // [bucket][warp]
};

// Counts, or places, the entries of a warp by one byte, 32 at a time and in their order. places[bucket * WARPS] is
// where its next entry with that byte goes.
template <int WARPS, bool COUNT_ONLY>
__device__ __forceinline__ void deal_entries(const Ordered *entries, int64_t first, int64_t last, int shift,
                                             int32_t *places, Ordered *sorted) {
    const int lane = threadIdx.x % WARP;
    for (int64_t begin = first; begin < last; begin += WARP) {
        const bool mine = begin + lane < last;
        const Ordered entry = mine ? entries[begin + lane] : Ordered{0, 0};
        const int bucket = mine ? static_cast<int>(entry.word >> shift & 255u) : -1;
        const unsigned same = __match_any_sync(ALL_LANES, bucket), before = same & ((1u << lane) - 1);
        const int32_t start = mine ? places[bucket * WARPS] : 0;
        __syncwarp(); // all have read where their bucket's entries go
        if (mine && before == 0) places[bucket * WARPS] = start + __popc(same);
        if (mine && !COUNT_ONLY) sorted[start + __popc(before)] = entry;
        __syncwarp();
    }
}

// By word, equal words in the order they come; the result lies in entries. entries and spare [n] are as the block's
// threads wrote them before a barrier, n < 2^31.
template <int THREADS>
__device__ __forceinline__ void sort_by_word(Ordered *entries, Ordered *spare, int64_t n, SortShared<THREADS> &shared,
                                             BlockShared<THREADS> &block) {
    constexpr int WARPS = THREADS / WARP, PLACES = SortShared<THREADS>::BUCKETS * WARPS, OWN = PLACES / THREADS;
    const int warp = threadIdx.x / WARP;
    const int64_t part = ceil_div(ceil_div(n, WARPS), WARP) * WARP;
    const int64_t first = warp * part < n ? warp * part : n, last = first + part < n ? first + part : n;
    for (int shift = 0; shift < 32; shift += 8) {
        for (int i = threadIdx.x; i < PLACES; i += THREADS) shared.places[i] = 0;
        __syncthreads();
        deal_entries<WARPS, true>(entries, first, last, shift, shared.places + warp, nullptr);
        __syncthreads();
        int32_t *own = shared.places + threadIdx.x * OWN;
        int64_t here = 0, total;
        for (int i = 0; i < OWN; i++) here += own[i];
        int64_t place = sum_before<THREADS>(here, block, &total);
        for (int i = 0; i < OWN; i++) {
            const int32_t count = own[i];
            own[i] = static_cast<int32_t>(place);
            place += count;
        }
        __syncthreads();
        deal_entries<WARPS, false>(entries, first, last, shift, shared.places + warp, spare);
        __syncthreads();
        Ordered *sorted = spare;
        spare = entries, entries = sorted;
    }
}

} // namespace mmbal
