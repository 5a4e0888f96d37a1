// Rows of experts: whose a row is, tiles of rows, dropout masks and activations. See mmbal/expert_mlp.h.
#pragma once

#include <math.h>

#include "dtypes.cuh"
#include "launch.cuh"
#include "mmbal/expert_mlp.h"
#include "packs.cuh"

namespace mmbal {

// The expert e with offsets[e] <= r < offsets[e + 1].
__device__ __forceinline__ int64_t expert_of(const int64_t *__restrict__ offsets, int64_t E, int64_t r) {
    int64_t low = 0, high = E; // offsets[low] <= r < offsets[high]
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (offsets[middle] <= r)
            low = middle;
        else
            high = middle;
    }
    return low;
}

// Rows of one expert, at most `height` of them.
struct RowTile {
    int64_t expert, first, last;
};

// No more tiles than this, whatever the offsets are.
__host__ __device__ inline int64_t most_row_tiles(int64_t R, int64_t E, int64_t height) {
    return R / height + (R < E ? R : E);
}

// Tile number `index` in the order of experts and rows; beyond the last one, expert is -1.
__device__ __forceinline__ RowTile row_tile(const int64_t *__restrict__ offsets, int64_t E, int64_t height,
                                            int64_t index) {
    for (int64_t e = 0; e < E; e++) {
        const int64_t tiles = ceil_div(offsets[e + 1] - offsets[e], height);
        if (index < tiles) {
            const int64_t first = offsets[e] + index * height, end = offsets[e + 1];
            return {e, first, first + height < end ? first + height : end};
        }
        index -= tiles;
    }
    return {-1, 0, 0};
}

// The masks of expert_mlp.h. Kept is what has its 24 bits at least as large as the threshold.
struct Dropout {
    uint32_t key[2], counter_high[2], threshold;
    double scale;
};

inline Dropout make_dropout(const mmbal_expert_mlp_options &options, bool output) {
    const uint64_t seed = static_cast<uint64_t>(options.seed), offset = static_cast<uint64_t>(options.offset);
    const double p = output ? options.output_dropout : options.dropout;
    return {{static_cast<uint32_t>(seed), static_cast<uint32_t>(seed >> 32)},
            {static_cast<uint32_t>(offset), static_cast<uint32_t>(offset >> 32) << 8 | (output ? 2u : 1u)},
            static_cast<uint32_t>(ceil(p * 16777216.0)), // 2^24
            1 / (1 - p)};
}

// Philox4x32-10; see mmbal/philox.h.
__device__ __forceinline__ uint4 philox(const Dropout &d, uint64_t four) {
    uint32_t c0 = static_cast<uint32_t>(four), c1 = static_cast<uint32_t>(four >> 32);
    uint32_t c2 = d.counter_high[0], c3 = d.counter_high[1], k0 = d.key[0], k1 = d.key[1];
#pragma unroll
    for (int round = 0; round < 10; round++) {
        const uint64_t product0 = static_cast<uint64_t>(0xD2511F53u) * c0;
        const uint64_t product1 = static_cast<uint64_t>(0xCD9E8D57u) * c2;
        c0 = static_cast<uint32_t>(product1 >> 32) ^ c1 ^ k0;
        c1 = static_cast<uint32_t>(product1);
        c2 = static_cast<uint32_t>(product0 >> 32) ^ c3 ^ k1;
        c3 = static_cast<uint32_t>(product0);
        k0 += 0x9E3779B9u;
        k1 += 0xBB67AE85u;
    }
    return {c0, c1, c2, c3};
}

// Bit i: element first + i is kept. Which word an element has is no array index: that would put the words into local
// memory.
template <int COUNT>
__device__ __forceinline__ unsigned kept_bits(const Dropout &d, int64_t first) {
    constexpr int BLOCKS = (3 + COUNT + 3) / 4; // COUNT elements behind at most 3 that are skipped
    const int skip = static_cast<int>(first % 4);
    unsigned bits = 0;
#pragma unroll
    for (int block = 0; block < BLOCKS; block++) {
        if (block * 4 >= COUNT + skip) break;
        const uint4 words = philox(d, static_cast<uint64_t>(first) / 4 + block);
        const unsigned four = (words.x >> 8 >= d.threshold ? 1u : 0) | (words.y >> 8 >= d.threshold ? 2u : 0) |
                              (words.z >> 8 >= d.threshold ? 4u : 0) | (words.w >> 8 >= d.threshold ? 8u : 0);
        bits |= four << (4 * block);
    }
    return bits >> skip;
}

// Activations and their derivatives; constants as in ops/cpu/kernels_body.h.
template <typename R>
struct Activated {
    R value, slope;
};

template <typename R>
__device__ __forceinline__ Activated<R> gated(R u, R z, R slope_of_z) {
    const R s = 1 / (1 + exp_real(-z));
    return {u * s, s + u * s * (1 - s) * slope_of_z};
}

__device__ __forceinline__ float erfc_real(float x) { return erfcf(x); }
__device__ __forceinline__ double erfc_real(double x) { return erfc(x); }

template <typename R>
__device__ __forceinline__ Activated<R> activate(mmbal_activation activation, R u) {
    constexpr R QUICK = static_cast<R>(1.702), CUBIC = static_cast<R>(0.044715);
    constexpr R TWICE = static_cast<R>(1.5957691216057308);      // 2 sqrt(2 / pi)
    constexpr R ROOT_HALF = static_cast<R>(0.70710678118654752); // sqrt(1 / 2)
    constexpr R GAUSS = static_cast<R>(0.39894228040143268);     // 1 / sqrt(2 pi)
    switch (activation) {
    case MMBAL_QUICK_GELU: return gated(u, QUICK * u, QUICK);
    case MMBAL_SILU: return gated(u, u, static_cast<R>(1));
    case MMBAL_GELU_TANH: { // (1 + tanh(z / 2)) / 2 = sigmoid(z); beyond 10 the slope is 0 or 1
        const R square = u * u, bounded = square < 100 ? square : 100;
        return gated(u, TWICE * u * (1 + CUBIC * square), TWICE * (1 + 3 * CUBIC * bounded));
    }
    case MMBAL_GELU: {
        const R phi = erfc_real(-u * ROOT_HALF) / 2;
        return {u * phi, phi + u * GAUSS * exp_real(u * u * static_cast<R>(-0.5))};
    }
    case MMBAL_RELU: return {u < 0 ? 0 : u, static_cast<R>(u > 0 ? 1 : 0)}; // a NaN stays a NaN
    case MMBAL_RELU2: {
        const R positive = u < 0 ? 0 : u;
        return {positive * positive, 2 * positive};
    }
    case MMBAL_IDENTITY: break;
    }
    return {u, 1};
}

} // namespace mmbal
