// The grouped products of expert_mlp, whatever multiplies: which rows and columns a block has, and how its operands
// come to shared memory, a step of the sum at a time.
//
// `Multiply` is a type of
//   Stored, Sum            elements in memory, and what they are summed in
//   THREADS, BLOCKS        of a block; blocks that share a multiprocessor
//   TILE, DEPTH            rows and columns of a block's result, and the depth of a step
//   template <A_ALONG, B_ALONG> void step(a, b)     adds a step in shared memory to the thread's sums
//   template <A_ALONG, B_ALONG> void write(rows, columns, stride, out)
#pragma once

#include "async_copies.cuh"
#include "experts.cuh"
#include "mmbal/cuda/expert_mlp.h"

namespace mmbal {

// Element (i, k) of an operand: rows i of a tile, k along the sum; one of the strides is 1.
template <typename Stored>
struct Operand {
    const Stored *data;
    int64_t row_stride, depth_stride, rows, depth; // rows and depth: beyond them it is 0
    bool aligned;                                  // packs are
};

__device__ __forceinline__ int64_t at_most(int64_t value, int64_t most) { return value < most ? value : most; }

// Two neighbours of a row, moved at once.
template <typename To>
struct __align__(2 * sizeof(To)) Pair {
    To of[2];
};

// Steps in shared memory: one in use, the others on their way.
constexpr int STAGES = 4;

// A step of an operand in shared memory: as in global memory, a row for each i where it is contiguous along the depth,
// a row for each k otherwise. A pack lies between rows, so that reads of neighbouring rows meet different banks.
template <typename Multiply>
struct Stage {
    using Stored = typename Multiply::Stored;
    static constexpr int PACK = Pack<Stored>::SIZE, TILE = Multiply::TILE, DEPTH = Multiply::DEPTH;
    template <bool ALONG_DEPTH>
    static constexpr int STRIDE = (ALONG_DEPTH ? DEPTH : TILE) + PACK;
    static constexpr int SIZE = TILE * (DEPTH + PACK);
    static_assert(DEPTH * (TILE + PACK) <= SIZE);
    static constexpr size_t SHARED = 2 * STAGES * SIZE * sizeof(Stored);

    template <bool ALONG_DEPTH>
    static __device__ __forceinline__ void fetch(const Operand<Stored> &from, int64_t first_depth, Stored *stage) {
        constexpr int ROW = (ALONG_DEPTH ? DEPTH : TILE) / PACK; // packs of a row
#pragma unroll
        for (int number = 0; number < TILE * DEPTH / PACK / Multiply::THREADS; number++) {
            const int index = number * Multiply::THREADS + static_cast<int>(threadIdx.x);
            const int row = index / ROW, column = index % ROW * PACK;
            const int64_t i = ALONG_DEPTH ? row : column, k = first_depth + (ALONG_DEPTH ? column : row);
            const bool there = ALONG_DEPTH ? i < from.rows : k < from.depth;
            const int64_t left = there ? (ALONG_DEPTH ? from.depth - k : from.rows - i) : 0;
            const Stored *source = from.data + i * from.row_stride + k * from.depth_stride;
            Stored *to = stage + row * STRIDE<ALONG_DEPTH> + column;
            if (from.aligned && left >= PACK)
                copy_async(to, source);
            else
                store_pack(to, load_pack(source, left, false), PACK, true);
        }
    }
};

// out[i, j] = sum over k of a(i, k) b(j, k), k ascending.
template <typename Multiply, bool A_ALONG, bool B_ALONG, typename To>
__device__ __forceinline__ void multiply_tile(const Operand<typename Multiply::Stored> &a,
                                              const Operand<typename Multiply::Stored> &b, int64_t stride, To *out) {
    using S = Stage<Multiply>;
    typename Multiply::Stored *memory = shared_memory<typename Multiply::Stored>();
    const auto fetch = [&](int64_t step) {
        typename Multiply::Stored *stage = memory + step % STAGES * 2 * S::SIZE;
        if (step * S::DEPTH < a.depth) {
            S::template fetch<A_ALONG>(a, step * S::DEPTH, stage);
            S::template fetch<B_ALONG>(b, step * S::DEPTH, stage + S::SIZE);
        }
        end_group_of_copies(); // where it is empty too: they are counted
    };
    for (int step = 0; step < STAGES - 1; step++) fetch(step);
    Multiply multiply(a.rows, b.rows);
    for (int64_t step = 0; step * S::DEPTH < a.depth; step++) {
        wait_for_copies<STAGES - 2>();
        __syncthreads(); // this step is there, and all have read the one before, whose place is taken now
        fetch(step + STAGES - 1);
        const typename Multiply::Stored *stage = memory + step % STAGES * 2 * S::SIZE;
        multiply.template step<A_ALONG, B_ALONG>(stage, stage + S::SIZE);
    }
    wait_for_copies<0>();
    __syncthreads(); // shared memory is the next tile's
    multiply.template write<A_ALONG, B_ALONG>(a.rows, b.rows, stride, out);
}

template <typename Multiply, bool TRANSPOSED>
__global__ void __launch_bounds__(Multiply::THREADS, Multiply::BLOCKS)
    rows_product(const typename Multiply::Stored *__restrict__ a, const typename Multiply::Stored *__restrict__ w,
                 const int64_t *__restrict__ offsets, int64_t R, int64_t E, int64_t in, int64_t out_size,
                 int64_t w_stride, bool a_aligned, bool w_aligned, typename Multiply::Sum *__restrict__ out) {
    constexpr int TILE = Multiply::TILE;
    const int64_t across = ceil_div(out_size, TILE), tiles = most_row_tiles(R, E, TILE) * across;
    for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
        const RowTile rows = row_tile(offsets, E, TILE, index / across);
        if (rows.expert < 0) return; // the same for all threads
        const int64_t column = index % across * TILE, columns = at_most(out_size - column, TILE);
        const typename Multiply::Stored *of_expert = w + rows.expert * (TRANSPOSED ? out_size : in) * w_stride;
        const Operand<typename Multiply::Stored> left = {a + rows.first * in,    in, 1,
                                                         rows.last - rows.first, in, a_aligned};
        Operand<typename Multiply::Stored> right = {of_expert + column, 1, w_stride, columns, in, w_aligned};
        if (TRANSPOSED) right = {of_expert + column * w_stride, w_stride, 1, columns, in, w_aligned};
        multiply_tile<Multiply, true, TRANSPOSED>(left, right, out_size, out + rows.first * out_size + column);
    }
}

template <typename Multiply>
__global__ void __launch_bounds__(Multiply::THREADS, Multiply::BLOCKS)
    weights_product(const typename Multiply::Stored *__restrict__ a, const typename Multiply::Stored *__restrict__ w,
                    const int64_t *__restrict__ offsets, int64_t E, int64_t in, int64_t out_size, bool a_aligned,
                    bool w_aligned, typename Multiply::Stored *__restrict__ out) {
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
    using Stored = typename Multiply::Stored;
    constexpr int TILE = Multiply::TILE, THREADS = Multiply::THREADS;
    const Stored *left = static_cast<const Stored *>(a), *right = static_cast<const Stored *>(w);
    const auto is_aligned = [](const void *data, int64_t columns) {
        return rows_are_aligned(data, columns, sizeof(Stored));
    };
    if (product == MMBAL_ROWS_TRANSPOSED_TIMES_ROWS)
        return launch(stream, E * ceil_div(in, TILE) * ceil_div(out_size, TILE), THREADS, Stage<Multiply>::SHARED,
                      weights_product<Multiply>, left, right, offsets, E, in, out_size, is_aligned(a, in),
                      is_aligned(w, out_size), static_cast<Stored *>(out));
    const bool transposed = product == MMBAL_ROWS_TIMES_TRANSPOSED;
    return launch(stream, most_row_tiles(R, E, TILE) * ceil_div(out_size, TILE), THREADS, Stage<Multiply>::SHARED,
                  transposed ? rows_product<Multiply, true> : rows_product<Multiply, false>, left, right, offsets, R, E,
                  in, out_size, w_stride, is_aligned(a, in), is_aligned(w, w_stride),
                  static_cast<typename Multiply::Sum *>(out));
}

// mmbal_expert_product_cuda on 16-bit elements.
mmbal_status tensor_product(mmbal_dtype dtype, mmbal_expert_product product, const void *a, const void *w,
                            const int64_t *offsets, int64_t R, int64_t E, int64_t in, int64_t out_size,
                            int64_t w_stride, void *out, mmbal_stream stream);

} // namespace mmbal
