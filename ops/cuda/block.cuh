// What the threads of one block work out together. All of them must call each function.
#pragma once

#include <math.h>

#include "launch.cuh"

namespace mmbal {

// Shared memory of these functions.
template <int THREADS>
struct BlockShared {
    static constexpr int WARPS = THREADS / WARP;
    static_assert(WARPS >= 1 && WARPS <= WARP && (WARPS & (WARPS - 1)) == 0, "a power of two of warps");
    double reals[WARPS];
    int64_t integers[WARPS];
    uint64_t keys[WARPS];

    __device__ __forceinline__ double *of_warps(double) { return reals; }
    __device__ __forceinline__ int64_t *of_warps(int64_t) { return integers; }
    __device__ __forceinline__ uint64_t *of_warps(uint64_t) { return keys; }
};

// The same in every thread. Values are combined by halves of a warp, then by halves of the warps: of a sum in the
// order of SUM_LANES (ops/cpu/masks.h).
template <int THREADS, typename T, typename Combine>
__device__ __forceinline__ T combine_over_block(T value, BlockShared<THREADS> &shared, Combine combine) {
    constexpr int WARPS = THREADS / WARP;
    T *of_warps = shared.of_warps(T{});
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) value = combine(value, __shfl_xor_sync(ALL_LANES, value, step));
    __syncthreads(); // what the call before left is read
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = value;
    __syncthreads();
    T all = of_warps[threadIdx.x % WARPS];
#pragma unroll
    for (int step = WARPS / 2; step > 0; step /= 2) all = combine(all, __shfl_xor_sync(ALL_LANES, all, step));
    return all;
}

template <int THREADS, typename T>
__device__ __forceinline__ T sum_over_block(T value, BlockShared<THREADS> &shared) {
    return combine_over_block<THREADS>(value, shared, [](T a, T b) { return a + b; });
}
template <int THREADS, typename T>
__device__ __forceinline__ T largest_over_block(T value, BlockShared<THREADS> &shared) {
    return combine_over_block<THREADS>(value, shared, [](T a, T b) { return b > a ? b : a; });
}
template <int THREADS, typename T>
__device__ __forceinline__ T smallest_over_block(T value, BlockShared<THREADS> &shared) {
    return combine_over_block<THREADS>(value, shared, [](T a, T b) { return b < a ? b : a; });
}

// The sum of the values of the threads before this one; *total is that of all.
template <int THREADS>
__device__ __forceinline__ int64_t sum_before(int64_t value, BlockShared<THREADS> &shared, int64_t *total) {
    constexpr int WARPS = THREADS / WARP;
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int64_t up_to = value, warps_up_to;
#pragma unroll
    for (int step = 1; step < WARP; step *= 2) {
        const int64_t other = __shfl_up_sync(ALL_LANES, up_to, step);
        if (lane >= step) up_to += other;
    }
    __syncthreads(); // what the call before left is read
    if (lane == WARP - 1) shared.integers[warp] = up_to;
    __syncthreads();
    warps_up_to = shared.integers[lane % WARPS];
#pragma unroll
    for (int step = 1; step < WARPS; step *= 2) {
        const int64_t other = __shfl_up_sync(ALL_LANES, warps_up_to, step, WARPS);
        if (lane % WARPS >= step) warps_up_to += other;
    }
    *total = __shfl_sync(ALL_LANES, warps_up_to, WARPS - 1);
    const int64_t warps_before = __shfl_sync(ALL_LANES, warps_up_to, warp > 0 ? warp - 1 : 0);
    return (warp > 0 ? warps_before : 0) + up_to - value;
}

// A bin of a histogram.
struct Bin {
    int64_t before, inside; // how many the bins before it hold, and it
    int64_t number;
};

// The bin in which the place-th lies, from 1; there are as many. bins [BINS] are as the block's threads wrote them
// before a barrier, or an earlier kernel did.
template <int THREADS, int BINS, typename Count>
__device__ __forceinline__ Bin find_bin(const Count *bins, int64_t place, BlockShared<THREADS> &shared, Bin *found) {
    constexpr int OWN = BINS / THREADS;
    static_assert(BINS % THREADS == 0, "all threads have as many bins");
    int64_t here = 0, total;
#pragma unroll
    for (int i = 0; i < OWN; i++) here += static_cast<int64_t>(bins[threadIdx.x * OWN + i]);
    int64_t before = sum_before<THREADS>(here, shared, &total);
    if (before < place && place <= before + here) {
        int64_t number = threadIdx.x * OWN;
        while (before + static_cast<int64_t>(bins[number]) < place) before += static_cast<int64_t>(bins[number++]);
        *found = {before, static_cast<int64_t>(bins[number]), number};
    }
    __syncthreads();
    return *found;
}

} // namespace mmbal
