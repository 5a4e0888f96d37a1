// Elements of gradients, four at a time: their weights, their keys, their products. See ops/cpu/elements.c, whose bits
// these are.
#pragma once

#include <float.h>

#include "block.cuh"
#include "draws.cuh"
#include "dtypes.cuh"
#include "mmbal/cuda/elements.h"

namespace mmbal {

constexpr int QUAD = 4;            // elements that share a block of random words
constexpr int TILE = 256;          // elements whose weights are summed by parts, as ELEMENTS_PER_TILE
constexpr int PARTS = 16;          // of a tile: every PARTS-th element
constexpr int64_t CHUNK = 1 << 15; // elements of a block's piece of work, as in elements.c

// A tensor of the list, as kernels see it.
struct Elements {
    void *data;
    const void *gradient, *weights, *base; // gradient: never NULL
    int64_t count, first_chunk;            // first_chunk: of all tensors
    int modality;
    uint32_t id;
    int dtype;
    bool aligned; // all begin at a multiple of 16 bytes
};

// What is known of a tensor's mask.
enum State { LEFT_ALONE = 0, SEARCHING, READY };
struct Found {
    double sum, scale_of_weight, floor; // of weights; q = scale_of_weight w + floor
    double level, kappa, multiplier;    // p = min(1, level q); multiplier: of what is kept, 0: 1 / p
    int64_t positive, capped;
    int64_t place;  // of the threshold, from 1, among the keys that begin as `below` does
    uint32_t below; // its upper bits; in the end keys below it are kept
    bool has_ties;  // keys that equal `below` are kept too,
    int64_t ties;   // the first of them
    State state;
};

struct Pass {
    Elements *tensors; // [T]
    Found *found;      // [T]
    int64_t T, chunks;
    const double *rho; // [M]
    const uint8_t *skip;
    int *stop; // not 0: a sum is not finite
    int64_t seed, step;
    mmbal_importance importance;
    mmbal_mask_options options;
    double *sums;             // [chunks]
    int64_t *counts;          // [chunks]
    unsigned long long *bins; // [T, BINS]

    __device__ __forceinline__ bool is_off() const { return (skip && *skip) || *stop; }
};

// The tensor that a chunk belongs to: the last whose first chunk is not beyond it.
__device__ __forceinline__ int64_t tensor_of(const Pass &pass, int64_t chunk) {
    int64_t low = 0, high = pass.T;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (pass.tensors[middle].first_chunk <= chunk)
            low = middle;
        else
            high = middle;
    }
    return low;
}

template <typename Stored>
struct __align__(sizeof(Stored) == 2 ? 8 : 16) Quad {
    Stored of[QUAD];
};

// `here` of them, at most QUAD; the others are 0.
template <typename Stored>
__device__ __forceinline__ Quad<Stored> load_quad(const Stored *from, int here, bool aligned) {
    if (aligned && here == QUAD) return *reinterpret_cast<const Quad<Stored> *>(from);
    Quad<Stored> quad;
#pragma unroll
    for (int i = 0; i < QUAD; i++) quad.of[i] = i < here ? from[i] : Stored{};
    return quad;
}

template <typename Stored>
__device__ __forceinline__ void numbers_of(const void *from, int64_t first, int here, bool aligned,
                                           double (&to)[QUAD]) {
    const Quad<Stored> quad = load_quad(static_cast<const Stored *>(from) + first, here, aligned);
#pragma unroll
    for (int i = 0; i < QUAD; i++) to[i] = static_cast<double>(load(quad.of[i]));
}

__device__ __forceinline__ void numbers_of(int dtype, const void *from, int64_t first, int here, bool aligned,
                                           double (&to)[QUAD]) {
    switch (dtype) {
    case MMBAL_F32: return numbers_of<float>(from, first, here, aligned, to);
    case MMBAL_BF16: return numbers_of<BF16>(from, first, here, aligned, to);
    case MMBAL_F16: return numbers_of<F16>(from, first, here, aligned, to);
    default: return numbers_of<double>(from, first, here, aligned, to);
    }
}

__device__ __forceinline__ int elements_here(const Elements &t, int64_t first) {
    const int64_t left = t.count - first;
    return left >= QUAD ? QUAD : left > 0 ? static_cast<int>(left) : 0;
}

// 0 where there are no elements.
__device__ __forceinline__ void weights_of(const Pass &pass, const Elements &t, int64_t first, int here,
                                           double (&w)[QUAD]) {
    double parameter[QUAD];
    numbers_of(t.dtype, t.gradient, first, here, t.aligned, w);
    if (pass.importance == MMBAL_SQRT_GN) {
#pragma unroll
        for (int i = 0; i < QUAD; i++) w[i] = fabs(w[i]);
        return;
    }
#pragma unroll
    for (int i = 0; i < QUAD; i++) w[i] *= w[i];
    if (pass.importance == MMBAL_GN) return;
    numbers_of(t.dtype, t.weights, first, here, t.aligned, parameter);
#pragma unroll
    for (int i = 0; i < QUAD; i++) w[i] /= parameter[i] * parameter[i] + 0x1p-126;
}

// The upper 32 bits, without the sign, of the float64 whose smallest are kept: infinity where there is no weight, and
// there alone.
__device__ __forceinline__ uint32_t key_of(double value, double w) {
    if (w > 0 && value > DBL_MAX) value = DBL_MAX;
    return static_cast<uint32_t>(bits_of(value) >> 32) & 0x7FFFFFFFu;
}

__device__ __forceinline__ void keys_of(const Pass &pass, const Elements &t, int64_t first, const double (&w)[QUAD],
                                        uint32_t (&keys)[QUAD]) {
    if (pass.options.sampler == MMBAL_TOPK) {
#pragma unroll
        for (int i = 0; i < QUAD; i++) keys[i] = key_of(1 / w[i], w[i]);
        return;
    }
    uint32_t words[QUAD];
    mmbal_unit_words(pass.seed, pass.step, t.id, MMBAL_DRAW_UNIT, first / QUAD, words);
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        const double e = static_cast<double>(exponential_f32(words[i]));
        keys[i] = pass.options.sampler == MMBAL_UNIFORM ? key_of(e, 0) : key_of(e / w[i], w[i]);
    }
}

// What independent draws multiply by.
__device__ __forceinline__ void draw_quad(const Pass &pass, const Elements &t, const Found &found, int64_t first,
                                          const double (&w)[QUAD], double (&multipliers)[QUAD]) {
    uint32_t words[QUAD];
    mmbal_unit_words(pass.seed, pass.step, t.id, MMBAL_DRAW_UNIT, first / QUAD, words);
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        const double q = found.scale_of_weight * w[i] + found.floor, size = found.level * q;
        const double p = fixed_point(q == 0 ? 0 : size < 1 ? size : 1);
        const double multiplier = found.multiplier != 0 ? found.multiplier : 0x1p32 / p;
        multipliers[i] = static_cast<double>(words[i]) < p ? multiplier : 0;
    }
}

template <typename Stored>
__device__ __forceinline__ void multiply(const Elements &t, int64_t first, int here,
                                         const double (&multipliers)[QUAD]) {
    using R = Real<Stored>;
    Stored *data = static_cast<Stored *>(t.data) + first;
    Quad<Stored> x = load_quad<Stored>(data, here, t.aligned), base = {};
    if (t.base) base = load_quad(static_cast<const Stored *>(t.base) + first, here, t.aligned);
#pragma unroll
    for (int i = 0; i < QUAD; i++) {
        const R multiplier = static_cast<R>(multipliers[i]), value = load(x.of[i]), from = load(base.of[i]);
        if (multipliers[i] == 1) continue;
        if (multipliers[i] == 0)
            x.of[i] = base.of[i];
        else
            store(&x.of[i], t.base ? from + multiplier * (value - from) : multiplier * value);
    }
    if (t.aligned && here == QUAD) {
        *reinterpret_cast<Quad<Stored> *>(data) = x;
        return;
    }
#pragma unroll
    for (int i = 0; i < QUAD; i++)
        if (i < here) data[i] = x.of[i];
}

__device__ __forceinline__ void multiply_quad(const Elements &t, int64_t first, int here,
                                              const double (&multipliers)[QUAD]) {
    bool changes = false;
#pragma unroll
    for (int i = 0; i < QUAD; i++) changes |= i < here && multipliers[i] != 1;
    if (!changes) return;
    switch (t.dtype) {
    case MMBAL_F32: return multiply<float>(t, first, here, multipliers);
    case MMBAL_BF16: return multiply<BF16>(t, first, here, multipliers);
    case MMBAL_F16: return multiply<F16>(t, first, here, multipliers);
    default: return multiply<double>(t, first, here, multipliers);
    }
}

} // namespace mmbal
