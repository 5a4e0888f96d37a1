// What every CUDA file shares: launches, shared memory, sums over lanes, checks of an index.
#pragma once

#include <cuda_runtime.h>
#include <stddef.h>
#include <stdint.h>

#include <utility>

#include "mmbal/cuda/stream.h"
#include "mmbal/status.h"

namespace mmbal {

// Blocks of a launch at most. Kernels stride over their work by the grid, so that any number of blocks will do.
#ifndef MMBAL_MOST_BLOCKS
#define MMBAL_MOST_BLOCKS (int64_t{1} << 20)
#endif

constexpr int WARP = 32;
constexpr unsigned ALL_LANES = 0xFFFFFFFFu;

__host__ __device__ constexpr int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// Returns a status from the enclosing function unless it is MMBAL_OK.
#define MMBAL_RETURN_UNLESS_OK(call)                                                                                   \
    do {                                                                                                               \
        const mmbal_status status_of_call = (call);                                                                    \
        if (status_of_call != MMBAL_OK) return status_of_call;                                                         \
    } while (0)

// No work, no launch.
template <typename... Expected, typename... Given>
mmbal_status launch(mmbal_stream stream, int64_t blocks, int threads, size_t shared_bytes, void (*kernel)(Expected...),
                    Given &&...given) {
    if (blocks <= 0) return MMBAL_OK;
    constexpr size_t WITHOUT_ASKING = 48 << 10;
    if (shared_bytes > WITHOUT_ASKING && cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize,
                                                              static_cast<int>(shared_bytes)) != cudaSuccess)
        return MMBAL_DEVICE_ERROR;
    cudaLaunchConfig_t config = {};
    config.gridDim = dim3(static_cast<unsigned>(blocks < MMBAL_MOST_BLOCKS ? blocks : MMBAL_MOST_BLOCKS));
    config.blockDim = dim3(static_cast<unsigned>(threads));
    config.dynamicSmemBytes = shared_bytes;
    config.stream = static_cast<cudaStream_t>(stream);
    const cudaError_t error = cudaLaunchKernelEx(&config, kernel, std::forward<Given>(given)...);
    return error == cudaSuccess ? MMBAL_OK : MMBAL_DEVICE_ERROR;
}

// The block's shared memory, as many bytes as the launch asked for. All of it is asked for so: tests/cuda then gives a
// block exactly that much.
template <typename T>
__device__ __forceinline__ T *shared_memory() {
#ifdef MMBAL_CUDA_ON_CPU
    return static_cast<T *>(cuda_shim::shared_memory());
#else
    extern __shared__ __align__(16) unsigned char mmbal_shared[];
    return reinterpret_cast<T *>(mmbal_shared);
#endif
}

// This thread's place among all groups of LANES threads of the grid, and their number.
template <int LANES>
__device__ __forceinline__ int64_t first_group() {
    return (static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x) / LANES;
}
template <int LANES>
__device__ __forceinline__ int64_t group_count() {
    return static_cast<int64_t>(gridDim.x) * blockDim.x / LANES;
}

// Sum over a group of lanes, the same in each, added in one order.
template <int LANES, typename T>
__device__ __forceinline__ T sum_over_lanes(T value) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) value += __shfl_xor_sync(ALL_LANES, value, step);
    return value;
}

// What the CPU answers with MMBAL_INVALID_INDEX: here nobody waits for an answer, and the launch fails instead, as
// torch's own kernels do it. (A GPU then refuses all further work of the process.)
__device__ __forceinline__ void require_index(int64_t index, int64_t end) {
    if (index < 0 || index >= end) __trap();
}

} // namespace mmbal
