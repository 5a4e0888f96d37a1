// Tiles of a product of few rows with many: a thread has one of the many and all of the few. An element is one sum in
// the order of the depth, to the bit what Registers (register_tile.cuh) gives.
#pragma once

#include "tile_product.cuh"

namespace mmbal {

template <typename L, typename R = L>
class Skinny {
public:
    using Left = L;
    using Right = R;
    using Sum = Real<L>;
    static constexpr int TILE = 8, COLUMNS = 128, THREADS = COLUMNS, BLOCKS = 2;
    static constexpr int DEPTH = 128 / sizeof(Right); // whole lines of memory

    __device__ __forceinline__ Skinny(int64_t, int64_t) {}

    template <bool A_ALONG, bool B_ALONG>
    __device__ __forceinline__ void step(const Left *a, const Right *b) {
        static_assert(A_ALONG && B_ALONG);
        constexpr int STEP = Pack<Left>::SIZE > Pack<Right>::SIZE ? Pack<Left>::SIZE : Pack<Right>::SIZE;
        const Right *mine = b + threadIdx.x * Stages<Skinny>::Right::template STRIDE<true>;
#pragma unroll 2
        for (int k = 0; k < DEPTH; k += STEP) {
            Sum of_b[STEP];
            read(mine + k, of_b);
#pragma unroll
            for (int i = 0; i < TILE; i++) {
                Sum of_a[STEP];
                read(a + i * Stages<Skinny>::Left::template STRIDE<true> + k, of_a);
#pragma unroll
                for (int next = 0; next < STEP; next++) sums_[i] += of_a[next] * of_b[next];
            }
        }
    }

    template <bool, bool, typename To>
    __device__ __forceinline__ void write(int64_t rows, int64_t columns, int64_t stride, To *out) const {
#pragma unroll
        for (int i = 0; i < TILE; i++)
            if (i < rows && threadIdx.x < columns)
                store(&out[i * stride + threadIdx.x], sums_[i] + 0); // no -0: steps end in zeros, which make it +0
    }

private:
    template <typename Stored, int COUNT>
    static __device__ __forceinline__ void read(const Stored *from, Sum (&values)[COUNT]) {
        constexpr int SIZE = Pack<Stored>::SIZE;
#pragma unroll
        for (int first = 0; first < COUNT; first += SIZE) {
            const Pack<Stored> pack = *reinterpret_cast<const Pack<Stored> *>(from + first);
#pragma unroll
            for (int i = 0; i < SIZE; i++) values[first + i] = load(pack.of[i]);
        }
    }

    Sum sums_[TILE] = {};
};

} // namespace mmbal
