// A tile of a matrix product, whatever multiplies: how its operands come to shared memory, a step of the sum at a time.
//
// `Multiply` is a type of
//   Left, Right, Sum       elements of a and b in memory, and what their products are summed in
//   THREADS, BLOCKS        of a block; blocks that share a multiprocessor
//   TILE, COLUMNS          rows and columns of a block's result
//   DEPTH                  of a step
//   template <A_ALONG, B_ALONG> void step(a, b)     adds a step in shared memory to the thread's sums
//   template <A_ALONG, B_ALONG> void write(rows, columns, stride, out)
//   template <A_ALONG, B_ALONG> void begin(rows, columns, stride, out)     sums that begin with what is there, if
//   wanted
#pragma once

#include "async_copies.cuh"

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
template <typename Multiply, typename Stored, int TILE>
struct Stage {
    static constexpr int PACK = Pack<Stored>::SIZE, DEPTH = Multiply::DEPTH;
    template <bool ALONG_DEPTH>
    static constexpr int STRIDE = (ALONG_DEPTH ? DEPTH : TILE) + PACK;
    static constexpr int ALONG = TILE * STRIDE<true>, ACROSS = DEPTH * STRIDE<false>;
    static constexpr int BYTES = (ALONG > ACROSS ? ALONG : ACROSS) * static_cast<int>(sizeof(Stored));

    template <bool ALONG_DEPTH>
    static __device__ __forceinline__ void fetch(const Operand<Stored> &from, int64_t first_depth, Stored *stage) {
        constexpr int ROW = (ALONG_DEPTH ? DEPTH : TILE) / PACK; // packs of a row
        constexpr int PACKS = TILE * DEPTH / PACK;
#pragma unroll
        for (int begin = 0; begin < PACKS; begin += Multiply::THREADS) {
            const int index = begin + static_cast<int>(threadIdx.x);
            if (PACKS % Multiply::THREADS != 0 && index >= PACKS) break;
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

// Both operands' steps.
template <typename Multiply>
struct Stages {
    using Left = Stage<Multiply, typename Multiply::Left, Multiply::TILE>;
    using Right = Stage<Multiply, typename Multiply::Right, Multiply::COLUMNS>;
    static constexpr int LEFT = Left::BYTES, BYTES = LEFT + Right::BYTES;
    static constexpr size_t SHARED = static_cast<size_t>(STAGES) * BYTES;
};

// out[i, j] = sum over k of a(i, k) b(j, k), k ascending; ADDS: to what is there. `out` may lie in the shared memory
// that the launch asked for: the steps are no longer needed when it is written. All threads must meet before another
// tile.
template <typename Multiply, bool A_ALONG, bool B_ALONG, bool ADDS = false, typename To>
__device__ __forceinline__ void multiply_tile(const Operand<typename Multiply::Left> &a,
                                              const Operand<typename Multiply::Right> &b, int64_t stride, To *out) {
    using Left = typename Multiply::Left;
    using Right = typename Multiply::Right;
    constexpr int DEPTH = Multiply::DEPTH;
    Left *memory = shared_memory<Left>();
    constexpr int LEFT = Stages<Multiply>::LEFT / static_cast<int>(sizeof(Left));
    constexpr int BOTH = Stages<Multiply>::BYTES / static_cast<int>(sizeof(Left));
    const auto fetch = [&](int64_t step) {
        Left *stage = memory + step % STAGES * BOTH;
        if (step * DEPTH < a.depth) {
            Stages<Multiply>::Left::template fetch<A_ALONG>(a, step * DEPTH, stage);
            Stages<Multiply>::Right::template fetch<B_ALONG>(b, step * DEPTH, reinterpret_cast<Right *>(stage + LEFT));
        }
        end_group_of_copies(); // where it is empty too: they are counted
    };
    for (int step = 0; step < STAGES - 1; step++) fetch(step);
    Multiply multiply(a.rows, b.rows);
    if constexpr (ADDS) multiply.template begin<A_ALONG, B_ALONG>(a.rows, b.rows, stride, out);
    for (int64_t step = 0; step * DEPTH < a.depth; step++) {
        wait_for_copies<STAGES - 2>();
        __syncthreads(); // this step is there, and all have read the one before, whose place is taken now
        fetch(step + STAGES - 1);
        const Left *stage = memory + step % STAGES * BOTH;
        multiply.template step<A_ALONG, B_ALONG>(stage, reinterpret_cast<const Right *>(stage + LEFT));
    }
    wait_for_copies<0>();
    __syncthreads(); // shared memory is the next tile's
    multiply.template write<A_ALONG, B_ALONG>(a.rows, b.rows, stride, out);
}

} // namespace mmbal
