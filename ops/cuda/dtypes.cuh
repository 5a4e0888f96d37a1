// Storage dtypes on a GPU, and 16 bytes of them at a time.
#pragma once

#include <cuda_runtime.h>
#include <stdint.h>
#include <string.h>

#include "mmbal/dtype.h"
#include "mmbal/status.h"

#ifdef MMBAL_CUDA_ON_CPU
extern "C" {
#include "../cpu/bfloat16.h"
#include "../cpu/float16.h"
}
#else
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace mmbal {

struct BF16 {
    uint16_t bits;
};
struct F16 {
    uint16_t bits;
};

inline int64_t stored_size(mmbal_dtype dtype) { return dtype == MMBAL_F64 ? 8 : dtype == MMBAL_F32 ? 4 : 2; }

// The type that sums are taken in.
template <typename Stored>
struct RealOf {
    using type = float;
};
template <>
struct RealOf<double> {
    using type = double;
};
template <typename Stored>
using Real = typename RealOf<Stored>::type;

__device__ __forceinline__ float load(float stored) { return stored; }
__device__ __forceinline__ double load(double stored) { return stored; }
#ifdef MMBAL_CUDA_ON_CPU
inline float load(BF16 stored) { return float_of_bfloat16(stored.bits); }
inline float load(F16 stored) { return float_of_float16(stored.bits); }
inline void store(BF16 *to, float value) { to->bits = bfloat16_of_float(value); }
inline void store(F16 *to, float value) { to->bits = float16_of_float(value); }
#else
__device__ __forceinline__ float load(BF16 stored) { return __uint_as_float(static_cast<uint32_t>(stored.bits) << 16); }
__device__ __forceinline__ float load(F16 stored) { return __half2float(__ushort_as_half(stored.bits)); }
__device__ __forceinline__ void store(BF16 *to, float value) {
    to->bits = __bfloat16_as_ushort(__float2bfloat16_rn(value));
}
__device__ __forceinline__ void store(F16 *to, float value) { to->bits = __half_as_ushort(__float2half_rn(value)); }
#endif
__device__ __forceinline__ void store(float *to, float value) { *to = value; }
__device__ __forceinline__ void store(double *to, double value) { *to = value; }

// 16 bytes, moved by one instruction; their address must be a multiple of 16.
template <typename Stored>
struct __align__(16) Pack {
    static constexpr int SIZE = 16 / sizeof(Stored);
    Stored of[SIZE];
};

__device__ __forceinline__ float exp_real(float x) { return expf(x); }
__device__ __forceinline__ double exp_real(double x) { return exp(x); }
__device__ __forceinline__ float log_real(float x) { return logf(x); }
__device__ __forceinline__ double log_real(double x) { return log(x); }

// A C caller's enum may hold what C++ has no name for, and must not load.
template <typename Enum>
int number_of(const Enum &value) {
    int number;
    static_assert(sizeof number == sizeof value, "C's enums are ints");
    memcpy(&number, &value, sizeof number);
    return number;
}
inline bool is_dtype(const mmbal_dtype &dtype) {
    const int number = number_of(dtype);
    return number == MMBAL_F32 || number == MMBAL_BF16 || number == MMBAL_F16 || number == MMBAL_F64;
}

// Returns f's version for dtype from the enclosing function.
#define MMBAL_RETURN_FOR_DTYPE(dtype, f, ...)                                                                          \
    switch (dtype) {                                                                                                   \
    case MMBAL_F32: return f<float>(__VA_ARGS__);                                                                      \
    case MMBAL_BF16: return f<mmbal::BF16>(__VA_ARGS__);                                                               \
    case MMBAL_F16: return f<mmbal::F16>(__VA_ARGS__);                                                                 \
    case MMBAL_F64: return f<double>(__VA_ARGS__);                                                                     \
    }                                                                                                                  \
    return MMBAL_UNSUPPORTED

} // namespace mmbal
