// What the grouped products share: see expert_product.cu and tensor_product.cu.
#pragma once

#include "experts.cuh"
#include "mmbal/cuda/expert_mlp.h"

namespace mmbal {

// Element (i, k) of an operand: rows i of a tile, k along the sum.
template <typename Stored>
struct Operand {
    const Stored *data;
    int64_t row_stride, depth_stride, rows, depth; // rows and depth: beyond them it is 0
};

__device__ __forceinline__ int64_t at_most(int64_t value, int64_t most) { return value < most ? value : most; }

// Two neighbours of a row, written at once.
template <typename To>
struct __align__(2 * sizeof(To)) Pair {
    To of[2];
};

// mmbal_expert_product_cuda on 16-bit elements.
mmbal_status tensor_product(mmbal_dtype dtype, mmbal_expert_product product, const void *a, const void *w,
                            const int64_t *offsets, int64_t R, int64_t E, int64_t in, int64_t out_size, void *out,
                            mmbal_stream stream);

} // namespace mmbal
