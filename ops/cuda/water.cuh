// Capped probabilities of one segment, by the threads of one block; with the bits of ops/cpu/sampling.c, whose sums are
// in the same order.
#pragma once

#include "../cpu/masks.h"
#include "block.cuh"

namespace mmbal {

constexpr int UNIT_THREADS = SUM_LANES; // of a block that draws from one segment or row
static_assert(SUM_GROUP == WARP, "a group of sums is a warp's");

// q = (1 - mix) w / sum(w) + mix / n, in q [n], of which each thread has written those it reads here: every
// UNIT_THREADS-th. Returns how many are greater than 0.
__device__ __forceinline__ int64_t mix_weights(double *q, int64_t n, double mix, BlockShared<UNIT_THREADS> &shared) {
    double largest = 0, sum = 0;
    for (int64_t i = threadIdx.x; i < n; i += UNIT_THREADS) largest = q[i] > largest ? q[i] : largest;
    largest = largest_over_block<UNIT_THREADS>(largest, shared);
    for (int64_t i = threadIdx.x; i < n; i += UNIT_THREADS) {
        if (largest > 0) q[i] /= largest;
        sum += q[i];
    }
    sum = sum_over_block<UNIT_THREADS>(sum, shared);
    int64_t positive = 0;
    for (int64_t i = threadIdx.x; i < n; i += UNIT_THREADS) {
        q[i] = (largest > 0 ? (1 - mix) * (q[i] / sum) : 0) + mix / static_cast<double>(n);
        positive += q[i] > 0;
    }
    return sum_over_block<UNIT_THREADS>(positive, shared);
}

// c of p = min(1, c q) with the sum kappa; see ops/cpu/sampling.c.
__device__ __forceinline__ double water_level(const double *q, int64_t n, int64_t positive, double kappa,
                                              BlockShared<UNIT_THREADS> &shared) {
    if (kappa == 0) return 0;
    if (kappa >= static_cast<double>(positive)) return static_cast<double>(INFINITY);
    int64_t capped = -1;
    for (double c = 0;;) {
        int64_t now = 0;
        double rest = 0;
        for (int64_t i = threadIdx.x; i < n; i += UNIT_THREADS) {
            const double value = q[i];
            now += c * value >= 1;
            rest += c * value >= 1 ? 0 : value;
        }
        now = sum_over_block<UNIT_THREADS>(now, shared);
        rest = sum_over_block<UNIT_THREADS>(rest, shared);
        if (now <= capped || !(kappa > static_cast<double>(now))) return c;
        capped = now, c = (kappa - static_cast<double>(now)) / rest;
    }
}

__device__ __forceinline__ double capped_probability(double c, double q) { return q == 0 ? 0 : c * q < 1 ? c * q : 1; }

} // namespace mmbal
