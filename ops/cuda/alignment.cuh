// What the files of the alignment loss share: the weight of a row, unit vectors, a tile of logits; see
// mmbal/alignment.h.
#pragma once

#include <math.h>

#include "mmbal/cuda/alignment.h"
#include "pieces.cuh"
#include "register_tile.cuh"
#include "softmax.cuh"

namespace mmbal {

constexpr int ALIGN_THREADS = 256, ALIGN_BLOCK_THREADS = 1024;

// Of a call, known once the present candidates are counted.
struct AlignScale {
    double of_row;                  // what an own row's loss weighs
    double regression, contrastive; // backward: of a row's regression, and of its row of similarities; 0: no gradient
    int contrasted;                 // there is something to contrast
};

// Vectors of length 1.
template <typename R>
struct UnitRows {
    R *unit;         // [A, stride]
    double *inverse; // [A] 1 / |x|, 0 where there is no gradient
};

// What the similarities are taken from.
template <typename R>
struct Similarities {
    UnitRows<R> source, target;
    int64_t stride; // of unit vectors: whole packs
    const int64_t *groups;
    const uint8_t *present;
    int64_t A, C;
    R inverse_tau;
    const AlignScale *scale;
};

template <typename R>
Similarities<R> take_similarities(const mmbal_alignment &t, Pieces *from) {
    Similarities<R> c = {};
    c.A = t.A, c.C = t.C, c.groups = t.groups, c.present = t.present;
    c.stride = ceil_div(t.C, Pack<R>::SIZE) * Pack<R>::SIZE;
    c.inverse_tau = static_cast<R>(1 / t.tau);
    c.source = {from->take<R>(c.A * c.stride), from->take<double>(c.A)};
    c.target = {from->take<R>(c.A * c.stride), from->take<double>(c.A)};
    return c;
}

// A tile of logits in shared memory, rows this far apart: neither rows nor columns meet one bank.
template <typename Multiply>
constexpr int LOGITS_STRIDE = Multiply::TILE + 1;
template <typename Multiply>
constexpr size_t LOGITS_BYTES = sizeof(typename Multiply::Sum) * Multiply::TILE * LOGITS_STRIDE<Multiply>;
template <typename Multiply>
constexpr size_t LOGITS_SHARED =
    Stages<Multiply>::SHARED > LOGITS_BYTES<Multiply> ? Stages<Multiply>::SHARED : LOGITS_BYTES<Multiply>;

// z = <source_i, target_j> / tau, -inf where j is no candidate of i. All threads of the block; they must meet before
// shared memory is used again.
template <typename Multiply, typename R>
__device__ __forceinline__ const R *logits_of_tile(const Similarities<R> &c, int64_t row, int64_t col) {
    constexpr int TILE = Multiply::TILE, STRIDE = LOGITS_STRIDE<Multiply>;
    R *z = shared_memory<R>();
    const int64_t rows = at_most(c.A - row, TILE), cols = at_most(c.A - col, TILE);
    multiply_tile<Multiply, true, true>({c.source.unit + row * c.stride, c.stride, 1, rows, c.C, true},
                                        {c.target.unit + col * c.stride, c.stride, 1, cols, c.C, true}, STRIDE, z);
    __syncthreads();
    const int j = threadIdx.x % TILE;
    if (j < cols) {
        const bool there = !c.present || c.present[col + j];
        const int64_t group = c.groups ? c.groups[col + j] : 0;
        for (int i = threadIdx.x / TILE; i < rows; i += Multiply::THREADS / TILE) {
            const bool apart = !c.groups || c.groups[row + i] != group || row + i == col + j;
            R *logit = z + i * STRIDE + j;
            const bool counts = there && apart && (!c.present || c.present[row + i]);
            *logit = counts ? *logit * c.inverse_tau : -static_cast<R>(INFINITY);
        }
    }
    __syncthreads();
    return z;
}

// Few candidates are cut into small tiles, so that there are some for each multiprocessor. A stripe has so many
// columns, and statistics of a row are kept for so many segments of the candidates at most.
#ifdef MMBAL_CUDA_ON_CPU // so few that tests pass them
constexpr int64_t FEW_CANDIDATES = 200, STRIPE = 256, MOST_SEGMENTS = 2;
#else
constexpr int64_t FEW_CANDIDATES = 2048, STRIPE = 1024, MOST_SEGMENTS = 64;
#endif
template <typename R>
using LargeTile = Registers<R>;
template <typename R>
using SmallTile = Registers<R, R, 4>;

bool alignment_is_served(const mmbal_alignment &t, mmbal_status *status);

// AlignScale from what is present, and in the backward from what is upstream (else NULL).
template <typename R>
mmbal_status weigh_rows(const mmbal_alignment &t, const R *dloss, const R *dregression, const R *dcontrastive,
                        AlignScale *scale, mmbal_stream stream);

// Unit vectors of source and target, where they are contrasted.
template <typename Stored>
mmbal_status take_units(const mmbal_alignment &t, const Similarities<Real<Stored>> &c, mmbal_stream stream);

// dx [count, C] of the rows first ... from the gradients of their unit vectors: the sum of `parts` of them [count,
// stride], part_size apart. 0 where nothing is contrasted.
template <typename Stored>
mmbal_status give_unit_gradient(const Similarities<Real<Stored>> &c, const UnitRows<Real<Stored>> &rows, int64_t first,
                                int64_t count, const Real<Stored> *dunit, int64_t parts, int64_t part_size, void *dx,
                                mmbal_stream stream);

// losses [B] of own rows, 0 where they are not present.
template <typename Stored>
mmbal_status take_regression(const mmbal_alignment &t, double *losses, mmbal_stream stream);
template <typename Stored>
mmbal_status give_regression_gradient(const mmbal_alignment &t, const AlignScale *scale, void *dpred, void *dtarget,
                                      mmbal_stream stream);

} // namespace mmbal
