// The grouped products of expert_mlp, whatever multiplies (tile_product.cuh): which rows and columns a block has.
#pragma once

#include "experts.cuh"
#include "mmbal/cuda/expert_mlp.h"
#include "tile_product.cuh"

namespace mmbal {

template <typename Multiply, bool TRANSPOSED>
__global__ void __launch_bounds__(Multiply::THREADS, Multiply::BLOCKS)
    rows_product(const typename Multiply::Left *__restrict__ a, const typename Multiply::Left *__restrict__ w,
                 const int64_t *__restrict__ offsets, int64_t R, int64_t E, int64_t in, int64_t out_size,
                 int64_t w_stride, bool a_aligned, bool w_aligned, typename Multiply::Sum *__restrict__ out) {
    constexpr int TILE = Multiply::TILE;
    const int64_t across = ceil_div(out_size, TILE), tiles = most_row_tiles(R, E, TILE) * across;
    for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
        const RowTile rows = row_tile(offsets, E, TILE, index / across);
        if (rows.expert < 0) return; // the same for all threads
        const int64_t column = index % across * TILE, columns = at_most(out_size - column, TILE);
        const typename Multiply::Left *of_expert = w + rows.expert * (TRANSPOSED ? out_size : in) * w_stride;
        const Operand<typename Multiply::Left> left = {a + rows.first * in,    in, 1,
                                                       rows.last - rows.first, in, a_aligned};
        Operand<typename Multiply::Left> right = {of_expert + column, 1, w_stride, columns, in, w_aligned};
        if (TRANSPOSED) right = {of_expert + column * w_stride, w_stride, 1, columns, in, w_aligned};
        multiply_tile<Multiply, true, TRANSPOSED>(left, right, out_size, out + rows.first * out_size + column);
    }
}

template <typename Multiply>
__global__ void __launch_bounds__(Multiply::THREADS, Multiply::BLOCKS)
    weights_product(const typename Multiply::Left *__restrict__ a, const typename Multiply::Left *__restrict__ w,
                    const int64_t *__restrict__ offsets, int64_t E, int64_t in, int64_t out_size, bool a_aligned,
                    bool w_aligned, typename Multiply::Left *__restrict__ out) {
    constexpr int TILE = Multiply::TILE;
    const int64_t across = ceil_div(in, TILE), down = ceil_div(out_size, TILE);
    for (int64_t index = blockIdx.x; index < E * down * across; index += gridDim.x) {
        const int64_t e = index / (down * across), row = index / across % down * TILE;
        const int64_t column = index % across * TILE, first = offsets[e], depth = offsets[e + 1] - first;
        multiply_tile<Multiply, false, false>(
            {w + first * out_size + row, 1, out_size, at_most(out_size - row, TILE), depth, w_aligned},
            {a + first * in + column, 1, in, at_most(in - column, TILE), depth, a_aligned}, in,
            out + (e * out_size + row) * in + column);
    }
}

template <typename Multiply>
mmbal_status run_product(mmbal_expert_product product, const void *a, const void *w, const int64_t *offsets, int64_t R,
                         int64_t E, int64_t in, int64_t out_size, int64_t w_stride, void *out, mmbal_stream stream) {
    using Stored = typename Multiply::Left;
    constexpr int TILE = Multiply::TILE, THREADS = Multiply::THREADS;
    const Stored *left = static_cast<const Stored *>(a), *right = static_cast<const Stored *>(w);
    const auto is_aligned = [](const void *data, int64_t columns) {
        return rows_are_aligned(data, columns, sizeof(Stored));
    };
    if (product == MMBAL_ROWS_TRANSPOSED_TIMES_ROWS)
        return launch(stream, E * ceil_div(in, TILE) * ceil_div(out_size, TILE), THREADS, Stages<Multiply>::SHARED,
                      weights_product<Multiply>, left, right, offsets, E, in, out_size, is_aligned(a, in),
                      is_aligned(w, out_size), static_cast<Stored *>(out));
    const bool transposed = product == MMBAL_ROWS_TIMES_TRANSPOSED;
    return launch(stream, most_row_tiles(R, E, TILE) * ceil_div(out_size, TILE), THREADS, Stages<Multiply>::SHARED,
                  transposed ? rows_product<Multiply, true> : rows_product<Multiply, false>, left, right, offsets, R, E,
                  in, out_size, w_stride, is_aligned(a, in), is_aligned(w, w_stride),
                  static_cast<typename Multiply::Sum *>(out));
}

// mmbal_expert_product_cuda on 16-bit elements.
mmbal_status tensor_product(mmbal_dtype dtype, mmbal_expert_product product, const void *a, const void *w,
                            const int64_t *offsets, int64_t R, int64_t E, int64_t in, int64_t out_size,
                            int64_t w_stride, void *out, mmbal_stream stream);

} // namespace mmbal
