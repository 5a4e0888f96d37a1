// Tiles of a product of 16-bit elements: tensor cores, sums in float32.
#pragma once

#include "tensor_cores.cuh"
#include "tile_product.cuh"

namespace mmbal {

template <typename Of>
class TensorCores {
public:
    using Stored = Of;
    using Left = Of;
    using Right = Of;
    using Sum = float;
    static constexpr int THREADS = 256, BLOCKS = 2; // 2 x 4 warps
    static constexpr int TILE = 128, COLUMNS = TILE, DEPTH = 32;

    __device__ __forceinline__ TensorCores(int64_t rows, int64_t columns)
        : row_(threadIdx.x / WARP / 4 * 16 * DOWN), column_(threadIdx.x / WARP % 4 * 8 * ACROSS),
          works_(row_ < rows && column_ < columns) {}

    // In steps of 16 in ascending order.
    template <bool A_ALONG, bool B_ALONG>
    __device__ __forceinline__ void step(const Stored *a, const Stored *b) {
        if (!works_) return; // the same for a warp's lanes
#pragma unroll
        for (int k = 0; k < DEPTH; k += 16) {
            uint32_t of_a[DOWN][4], of_b[ACROSS / 2][4];
#pragma unroll
            for (int m = 0; m < DOWN; m++) read<A_ALONG, true>(a, row_ + 16 * m, k, of_a[m]);
#pragma unroll
            for (int n = 0; n < ACROSS / 2; n++) read<B_ALONG, false>(b, column_ + 16 * n, k, of_b[n]);
#pragma unroll
            for (int m = 0; m < DOWN; m++)
#pragma unroll
                for (int n = 0; n < ACROSS; n++)
                    multiply_add<Stored>(sums_[m][n], of_a[m], of_b[n / 2][n % 2 * 2], of_b[n / 2][n % 2 * 2 + 1]);
        }
    }

    template <bool, bool, typename To>
    __device__ __forceinline__ void write(int64_t rows, int64_t columns, int64_t stride, To *out) const {
        const int lane = threadIdx.x % WARP;
        const bool in_pairs = stride % 2 == 0 && reinterpret_cast<uintptr_t>(out) % sizeof(Pair<To>) == 0;
#pragma unroll
        for (int m = 0; m < DOWN; m++)
#pragma unroll
            for (int n = 0; n < ACROSS; n++)
#pragma unroll
                for (int half = 0; half < 2; half++) {
                    const int64_t i = row_ + 16 * m + lane / 4 + 8 * half, j = column_ + 8 * n + lane % 4 * 2;
                    if (i >= rows || j >= columns) continue;
                    Pair<To> pair;
                    store(&pair.of[0], sums_[m][n][2 * half]);
                    store(&pair.of[1], sums_[m][n][2 * half + 1]);
                    To *to = out + i * stride + j;
                    if (in_pairs && j + 1 < columns) {
                        *reinterpret_cast<Pair<To> *>(to) = pair;
                    } else {
                        to[0] = pair.of[0];
                        if (j + 1 < columns) to[1] = pair.of[1];
                    }
                }
    }

private:
    static constexpr int DOWN = 4, ACROSS = 4; // 16 x 8 results of a warp, whose share is 64 x 32

    // The four 8 x 8 matrices of rows i ... i + 15 and k ... k + 15: a's registers, or those of two of b's.
    template <bool ALONG_DEPTH, bool IS_A>
    static __device__ __forceinline__ void read(const Stored *stage, int i, int k, uint32_t (&pairs)[4]) {
        constexpr int STRIDE = Stage<TensorCores, Stored, TILE>::template STRIDE<ALONG_DEPTH>;
        const int lane = threadIdx.x % WARP, row = lane % 8, low = lane / 8 % 2 * 8, high = lane / 16 * 8;
        i += IS_A ? low : high, k += IS_A ? high : low;
        load_matrices<!ALONG_DEPTH>(stage + (ALONG_DEPTH ? (i + row) * STRIDE + k : (k + row) * STRIDE + i), pairs);
    }

    const int row_, column_;
    const bool works_;
    float sums_[DOWN][ACROSS][4] = {};
};

} // namespace mmbal
