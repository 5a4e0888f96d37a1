// Tiles of a product with sums in registers, one fused multiply-add at a time: an element is one sum in the order of
// the depth.
#pragma once

#include "tile_product.cuh"

namespace mmbal {

// Halves become float32 as they leave shared memory. A thread has M rows and M columns of a tile.
template <typename L, typename R = L, int M = sizeof(L) == 8 ? 4 : 8>
class Registers {
public:
    using Left = L;
    using Right = R;
    using Sum = Real<L>;
    static constexpr int SIDE = 16, THREADS = SIDE * SIDE;
    static constexpr int BLOCKS = sizeof(Left) == sizeof(Right) ? 2 : 1; // two types take more registers
    static constexpr int MICRO = M;
    static constexpr int TILE = SIDE * MICRO, COLUMNS = TILE, DEPTH = 16;

    __device__ __forceinline__ Registers(int64_t, int64_t) {}

    template <bool A_ALONG, bool B_ALONG>
    __device__ __forceinline__ void step(const Left *a, const Right *b) {
        const int down = threadIdx.x / SIDE, across = threadIdx.x % SIDE;
#pragma unroll 2
        for (int k = 0; k < DEPTH; k += 2) {
            Sum of_a[2][MICRO], of_b[2][MICRO];
            read<A_ALONG>(a, down, k, of_a);
            read<B_ALONG>(b, across, k, of_b);
#pragma unroll
            for (int next = 0; next < 2; next++)
#pragma unroll
                for (int m = 0; m < MICRO; m++)
#pragma unroll
                    for (int n = 0; n < MICRO; n++) sums_[m][n] += of_a[next][m] * of_b[next][n];
        }
    }

    template <bool A_ALONG, bool B_ALONG, typename To>
    __device__ __forceinline__ void write(int64_t rows, int64_t columns, int64_t stride, To *out) const {
#pragma unroll
        for (int m = 0; m < MICRO; m++) {
            const int i = row<A_ALONG, Left>(threadIdx.x / SIDE, m);
#pragma unroll
            for (int n = 0; n < MICRO; n++) {
                const int j = row<B_ALONG, Right>(threadIdx.x % SIDE, n);
                if (i < rows && j < columns) store(&out[i * stride + j], sums_[m][n] + 0); // no -0: steps end in zeros
            }
        }
    }

    template <bool A_ALONG, bool B_ALONG>
    __device__ __forceinline__ void begin(int64_t rows, int64_t columns, int64_t stride, const Sum *out) {
#pragma unroll
        for (int m = 0; m < MICRO; m++) {
            const int i = row<A_ALONG, Left>(threadIdx.x / SIDE, m);
#pragma unroll
            for (int n = 0; n < MICRO; n++) {
                const int j = row<B_ALONG, Right>(threadIdx.x % SIDE, n);
                if (i < rows && j < columns) sums_[m][n] = out[i * stride + j];
            }
        }
    }

private:
    // Row number m of the tile's that belong to a thread: those of neighbours are next to each other where rows lie
    // apart in shared memory, and packs are read where they lie together.
    template <bool ALONG_DEPTH, typename Stored>
    static __device__ __forceinline__ int row(int thread, int m) {
        constexpr int PACK = Pack<Stored>::SIZE;
        return ALONG_DEPTH ? m * SIDE + thread : m / PACK * SIDE * PACK + thread * PACK + m % PACK;
    }

    template <bool ALONG_DEPTH, typename Stored>
    static __device__ __forceinline__ void read(const Stored *stage, int thread, int k, Sum (&values)[2][MICRO]) {
        constexpr int STRIDE = Stage<Registers, Stored, TILE>::template STRIDE<ALONG_DEPTH>, PACK = Pack<Stored>::SIZE;
        if constexpr (ALONG_DEPTH) {
#pragma unroll
            for (int m = 0; m < MICRO; m++) {
                const Pair<Stored> pair =
                    *reinterpret_cast<const Pair<Stored> *>(stage + row<true, Stored>(thread, m) * STRIDE + k);
                values[0][m] = load(pair.of[0]), values[1][m] = load(pair.of[1]);
            }
        } else {
#pragma unroll
            for (int next = 0; next < 2; next++)
#pragma unroll
                for (int m = 0; m < MICRO; m += PACK) {
                    const Pack<Stored> pack = *reinterpret_cast<const Pack<Stored> *>(stage + (k + next) * STRIDE +
                                                                                      row<false, Stored>(thread, m));
#pragma unroll
                    for (int i = 0; i < PACK; i++) values[next][m + i] = load(pack.of[i]);
                }
        }
    }

    Sum sums_[MICRO][MICRO] = {};
};

} // namespace mmbal
