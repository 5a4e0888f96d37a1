// Matrices of 16-bit elements on tensor cores: what a warp reads from shared memory, multiplies and adds.
// Instructions of compute capability 8.0; PTX ISA 9.7.14.5 has the layouts.
#pragma once

#include <type_traits>

#include "dtypes.cuh"
#include "launch.cuh"

namespace mmbal {

// Four 8 x 8 matrices of 16-bit elements; lanes 8 j ... 8 j + 7 hold the addresses of the rows of matrix j. Lane l gets
// elements 2 (l % 4) and the next one of row l / 4 of each matrix, or, TRANSPOSED, of column l / 4.
template <bool TRANSPOSED>
__device__ __forceinline__ void load_matrices(const void *row, uint32_t (&pairs)[4]) {
#ifdef MMBAL_CUDA_ON_CPU
    cuda_shim::load_matrices(TRANSPOSED, row, pairs);
#else
    const unsigned from = static_cast<unsigned>(__cvta_generic_to_shared(row));
    if constexpr (TRANSPOSED)
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.trans.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
                     : "r"(from)
                     : "memory");
    else
        asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
                     : "=r"(pairs[0]), "=r"(pairs[1]), "=r"(pairs[2]), "=r"(pairs[3])
                     : "r"(from)
                     : "memory");
#endif
}

// sums += a b, a 16 x 16, b 16 x 8. With g = lane / 4 and t = lane % 4, a lane holds
//   a       pairs of columns 2 t, 2 t + 1: rows g, g + 8 of columns below 8, then of those from 8 on;
//   b0, b1  pairs of rows 2 t, 2 t + 1 of column g: below 8, from 8 on;
//   sums    columns 2 t, 2 t + 1 of row g, then of row g + 8.
template <typename Stored>
__device__ __forceinline__ void multiply_add(float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#ifdef MMBAL_CUDA_ON_CPU
    cuda_shim::multiply_add([](uint16_t bits) { return load(Stored{bits}); }, sums, a, b0, b1);
#else
    if constexpr (std::is_same_v<Stored, F16>)
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
                     "{%0, %1, %2, %3};"
                     : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
    else
        asm volatile("mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, "
                     "{%8, %9}, {%0, %1, %2, %3};"
                     : "+f"(sums[0]), "+f"(sums[1]), "+f"(sums[2]), "+f"(sums[3])
                     : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
}

} // namespace mmbal
