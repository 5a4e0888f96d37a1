// Softmax of a row of logits. A thread takes a row (LANES = 1) where it is short, and sums as the CPU does; a warp
// where it is long.
#pragma once

#include "dtypes.cuh"
#include "launch.cuh"

namespace mmbal {

// Below this a probability is 0; see ops/cpu/elementary.h.
template <typename R>
__device__ __forceinline__ R least_exponent() {
    return sizeof(R) == 8 ? -745 : -87;
}

template <typename R>
__device__ __forceinline__ R exp_nonpositive(R x) {
    return x < least_exponent<R>() ? 0 : exp_real(x);
}

constexpr int64_t FEW_EXPERTS = 32; // a thread's row

template <int LANES, typename T>
__device__ __forceinline__ T largest_over_lanes(T value) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) {
        const T other = __shfl_xor_sync(ALL_LANES, value, step);
        value = other > value ? other : value;
    }
    return value;
}

// *top = the largest logit, returns the sum of exp(logit - *top), in the type Sum.
template <int LANES, typename Sum, typename Stored>
__device__ __forceinline__ Sum softmax_total(const Stored *logits, int64_t E, int lane, Sum *top) {
    Sum largest = load(logits[0]), total = 0;
    for (int64_t e = lane; e < E; e += LANES) {
        const Sum logit = load(logits[e]);
        largest = logit > largest ? logit : largest;
    }
    largest = largest_over_lanes<LANES>(largest);
    for (int64_t e = lane; e < E; e += LANES) total += exp_real(static_cast<Sum>(load(logits[e])) - largest);
    *top = largest;
    return sum_over_lanes<LANES>(total);
}

// 1 / total within a unit in the last place, for what softmax_total returns: 1 to E, or NaN. Newton's steps from a
// float32 estimate double its digits; the division of float64 would call a subroutine, and registers be spilt for it.
__device__ __forceinline__ double inverse_of_total(double total) {
    double inverse = __fdividef(1.0f, static_cast<float>(total));
#pragma unroll
    for (int step = 0; step < 2; step++) inverse += inverse * (1 - total * inverse);
    return inverse;
}

} // namespace mmbal
