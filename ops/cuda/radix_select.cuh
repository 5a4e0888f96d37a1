// The k smallest of 64-bit keys, by the threads of one block: an exact radix select, from the upper bits down.
#pragma once

#include "block.cuh"

namespace mmbal {

constexpr uint64_t NEVER = UINT64_MAX; // the key of what has no weight

template <int THREADS>
struct SelectShared {
    static constexpr int BITS = 11, BINS = 1 << BITS;
    BlockShared<THREADS> block;
    Bin bin;
    uint64_t key;
    uint32_t bins[BINS];
};

// As in ops/cpu/sampling.c.
struct Smallest {
    uint64_t last, next; // the largest key that is kept, the smallest that is not (NEVER: there is none)
    int64_t ties, equal; // of `equal` keys that are `last`, how many are kept
};

// keys [n] as the block's threads wrote them before a barrier; n < 2^32, 0 <= k <= n.
template <int THREADS>
__device__ __forceinline__ Smallest find_smallest(const uint64_t *keys, int64_t n, int64_t k,
                                                  SelectShared<THREADS> &shared) {
    constexpr int BITS = SelectShared<THREADS>::BITS, BINS = SelectShared<THREADS>::BINS;
    Smallest found = {0, NEVER, 0, 0};
    if (k == 0) return found;
    int64_t place = k;
    for (int high = 64;;) { // the bits from here up are known
        const int low = high > BITS ? high - BITS : 0;
        const uint64_t last_digit = (uint64_t{1} << (high - low)) - 1;
        for (int bin = threadIdx.x; bin < BINS; bin += THREADS) shared.bins[bin] = 0;
        __syncthreads();
        for (int64_t i = threadIdx.x; i < n; i += THREADS) {
            const uint64_t key = keys[i];
            const bool matches = high == 64 || (key ^ found.last) >> (high % 64) == 0;
            if (matches) atomicAdd(&shared.bins[key >> low & last_digit], 1u);
        }
        __syncthreads();
        const Bin bin = find_bin<THREADS, BINS>(shared.bins, place, shared.block, &shared.bin);
        found.last |= static_cast<uint64_t>(bin.number) << low;
        place -= bin.before;
        found.ties = place, found.equal = bin.inside;
        if (low == 0) break;
        if (bin.inside == 1) { // the other bits are those of the one that is left
            for (int64_t i = threadIdx.x; i < n; i += THREADS)
                if ((keys[i] ^ found.last) >> low == 0) shared.key = keys[i];
            __syncthreads();
            found.last = shared.key;
            break;
        }
        high = low;
    }
    return found;
}

// The smallest key that is not among the k of `found`.
template <int THREADS>
__device__ __forceinline__ uint64_t find_next(const uint64_t *keys, int64_t n, const Smallest &found,
                                              SelectShared<THREADS> &shared) {
    uint64_t next = found.equal > found.ties ? found.last : NEVER;
    for (int64_t i = threadIdx.x; i < n; i += THREADS)
        if (keys[i] > found.last && keys[i] < next) next = keys[i];
    return smallest_over_block<THREADS>(next, shared.block);
}

// Calls act(i, kept) for all i of [0, n), a thread for every THREADS-th: kept are the k of `found`, of equal keys those
// that come first.
template <int THREADS, typename Act>
__device__ __forceinline__ void take_smallest(const uint64_t *keys, int64_t n, int64_t k, const Smallest &found,
                                              SelectShared<THREADS> &shared, Act act) {
    int64_t ties = 0; // so far
    for (int64_t first = 0; first < n; first += THREADS) {
        const int64_t i = first + threadIdx.x;
        const uint64_t key = i < n ? keys[i] : NEVER;
        bool kept = k > 0 && key <= found.last;
        if (k > 0 && found.ties < found.equal) { // the same in all threads
            const bool tied = i < n && key == found.last;
            int64_t here;
            const int64_t before = ties + sum_before<THREADS>(tied, shared.block, &here);
            if (tied) kept = before < found.ties;
            ties += here;
        }
        if (i < n) act(i, kept);
    }
}

} // namespace mmbal
