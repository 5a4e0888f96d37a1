// CUDA on a CPU, for tests alone: with this folder in front of the compiler's search path, g++ compiles ops/cuda/*.cu
// unchanged and a launch runs every thread of every block.
//
// The threads of a block are fibres of one operating-system thread; they change places at barriers and warp
// primitives, in an order that `cuda_shim::options.seed` chooses. Blocks run one after another, in that order too.
// What a GPU hides is reported (see fibres.h and memory.h): barriers that threads of a block reach at different places,
// deadlock, lanes that name different masks, races, reads of memory that nothing wrote, accesses beyond its end.
//
// What it does not have: time, register limits, coalescing and bank conflicts, wgmma, the last
// bits of the GPU's own exp and log. Only what ops/cuda uses is here. `__shared__` is left out: kernels ask
// mmbal::shared_memory (ops/cuda/launch.cuh), so that each block gets exactly as much as its launch asked for.
#pragma once

#include <math.h>
#include <stdint.h>
#include <stdlib.h>
#include <string.h>

#include <tuple>
#include <type_traits>
#include <utility>

#include "fibres.h"
#include "memory.h"

#define MMBAL_CUDA_ON_CPU 1
#define __global__
#define __device__
#define __host__
#define __forceinline__ inline __attribute__((always_inline))
#define __launch_bounds__(...)
#define __grid_constant__
#define __restrict__ __restrict
#define __align__(bytes) __attribute__((aligned(bytes)))

using cuda_shim::blockDim, cuda_shim::blockIdx, cuda_shim::gridDim, cuda_shim::threadIdx;
using cuda_shim::dim3, cuda_shim::uint3;
constexpr int warpSize = 32;

struct __align__(16) uint4 {
    unsigned x, y, z, w;
};

// Where a barrier or primitive was called: the line of its call in the source of the kernel.
#define SHIM_SITE int site = __builtin_LINE()

inline void __syncthreads(SHIM_SITE) { cuda_shim::block_barrier(site); }
inline void __syncwarp(unsigned mask = 0xFFFFFFFFu, SHIM_SITE) { cuda_shim::gather(mask, 0, site, true); }

namespace cuda_shim {

template <typename T>
uint64_t bits_of(T value) {
    static_assert(sizeof(T) <= 8);
    uint64_t bits = 0;
    memcpy(&bits, &value, sizeof value);
    return bits;
}

// From an exited lane, or one outside the mask, the value is undefined: here it is the poison.
template <typename T>
T shuffled(unsigned mask, T value, int source, int site) {
    const Gathered lanes = gather(mask, bits_of(value), site);
    T result;
    if (lanes.present >> source & 1)
        memcpy(&result, &lanes.values[source], sizeof result);
    else
        memset(&result, options.poison, sizeof result);
    return result;
}

} // namespace cuda_shim

template <typename T>
T __shfl_sync(unsigned mask, T value, int source, int width = 32, SHIM_SITE) {
    const int lane = cuda_shim::lane();
    return cuda_shim::shuffled(mask, value, (lane & ~(width - 1)) | (source & (width - 1)), site);
}
template <typename T>
T __shfl_xor_sync(unsigned mask, T value, int bits, int width = 32, SHIM_SITE) {
    const int lane = cuda_shim::lane(), source = lane ^ bits;
    return cuda_shim::shuffled(mask, value, (source & ~(width - 1)) > (lane & ~(width - 1)) ? lane : source, site);
}
template <typename T>
T __shfl_up_sync(unsigned mask, T value, unsigned by, int width = 32, SHIM_SITE) {
    const int lane = cuda_shim::lane(), within = lane & (width - 1);
    return cuda_shim::shuffled(mask, value, within < static_cast<int>(by) ? lane : lane - static_cast<int>(by), site);
}
template <typename T>
T __shfl_down_sync(unsigned mask, T value, unsigned by, int width = 32, SHIM_SITE) {
    const int lane = cuda_shim::lane(), within = lane & (width - 1);
    const int source = within + static_cast<int>(by) < width ? lane + static_cast<int>(by) : lane;
    return cuda_shim::shuffled(mask, value, source, site);
}
inline unsigned __ballot_sync(unsigned mask, int predicate, SHIM_SITE) {
    const cuda_shim::Gathered lanes = cuda_shim::gather(mask, predicate != 0, site);
    unsigned result = 0;
    for (int i = 0; i < 32; i++) result |= (lanes.present >> i & 1) && lanes.values[i] ? 1u << i : 0;
    return result;
}
inline int __any_sync(unsigned mask, int predicate, SHIM_SITE) { return __ballot_sync(mask, predicate, site) != 0; }
inline int __all_sync(unsigned mask, int predicate, SHIM_SITE) { return __ballot_sync(mask, !predicate, site) == 0; }
inline unsigned __reduce_add_sync(unsigned mask, unsigned value, SHIM_SITE) {
    const cuda_shim::Gathered lanes = cuda_shim::gather(mask, value, site);
    unsigned result = 0;
    for (int i = 0; i < 32; i++) result += lanes.present >> i & 1 ? static_cast<unsigned>(lanes.values[i]) : 0;
    return result;
}
template <typename T>
unsigned __match_any_sync(unsigned mask, T value, SHIM_SITE) {
    const cuda_shim::Gathered lanes = cuda_shim::gather(mask, cuda_shim::bits_of(value), site);
    unsigned result = 0;
    for (int i = 0; i < 32; i++)
        result |= (lanes.present >> i & 1) && lanes.values[i] == cuda_shim::bits_of(value) ? 1u << i : 0;
    return result;
}

// What ops/cuda/tensor_cores.cuh has instructions for.
namespace cuda_shim {

// At once, or as late as the thread's waiting allows: a GPU may do either.
inline void copy_async(void *to, const void *from) {
    if (options.seed % 2)
        *static_cast<uint4 *>(to) = *static_cast<const uint4 *>(from);
    else
        begin_copy(to, from);
}

inline void wait_for_copies(int pending) {
    for (Copy copy; take_copy(pending, &copy);) *static_cast<uint4 *>(copy.to) = *static_cast<const uint4 *>(copy.from);
}

inline void load_matrices(bool transposed, const void *row, uint32_t (&pairs)[4], SHIM_SITE) {
    const Gathered rows = gather(0xFFFFFFFFu, reinterpret_cast<uint64_t>(row), site);
    const int outer = lane() / 4, inner = lane() % 4 * 2;
    for (int j = 0; j < 4; j++) {
        const auto element = [&](int r, int column) {
            return static_cast<uint32_t>(reinterpret_cast<const uint16_t *>(rows.values[8 * j + r])[column]);
        };
        pairs[j] = transposed ? element(inner, outer) | element(inner + 1, outer) << 16
                              : element(outer, inner) | element(outer, inner + 1) << 16;
    }
}

template <typename Load>
void multiply_add(Load load, float (&sums)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1, SHIM_SITE) {
    const auto both = [](uint32_t low, uint32_t high) { return low | static_cast<uint64_t>(high) << 32; };
    const Gathered first = gather(0xFFFFFFFFu, both(a[0], a[1]), site);
    const Gathered last = gather(0xFFFFFFFFu, both(a[2], a[3]), site);
    const Gathered right = gather(0xFFFFFFFFu, both(b0, b1), site);
    const auto element = [&](uint64_t registers, int number, int k) {
        return load(static_cast<uint16_t>(registers >> (32 * number + k % 2 * 16)));
    };
    for (int k = 0; k < 16; k++)
        for (int i = 0; i < 4; i++) { // a in row g or g + 8, b in column 2 t or 2 t + 1
            const int group = lane() / 4, t = lane() % 4, holder = k % 8 / 2;
            const uint64_t left = (k < 8 ? first : last).values[group * 4 + holder];
            sums[i] += element(left, i / 2, k) * element(right.values[(2 * t + i % 2) * 4 + holder], k / 8, k);
        }
}

} // namespace cuda_shim

inline float __fdividef(float a, float b) { return a / b; }
inline double __dadd_rn(double a, double b) { return a + b; }
inline double __dmul_rn(double a, double b) { return a * b; }
inline int atomicExch(int *address, int value) { return cuda_shim::exchange(address, value); }
template <typename T>
T atomicAdd(T *address, T value) {
    return cuda_shim::add(address, value);
}
inline int __popc(unsigned bits) { return __builtin_popcount(bits); }
inline int __ffs(int bits) { return __builtin_ffs(bits); }
template <typename T>
T __ldg(const T *address) {
    return *address;
}
[[noreturn]] inline void __trap() {
    cuda_shim::report("__trap: a check of the kernel failed, " + cuda_shim::where_am_i());
    cuda_shim::abandon();
}

// The host's side, as far as a launcher needs it. Streams are no more than a name: a launch returns when it is done.
enum cudaError_t { cudaSuccess = 0, cudaErrorInvalidValue = 1 };
typedef struct CUstream_st *cudaStream_t;
struct cudaLaunchAttribute {};
struct cudaLaunchConfig_t {
    dim3 gridDim, blockDim;
    size_t dynamicSmemBytes;
    cudaStream_t stream;
    cudaLaunchAttribute *attrs;
    unsigned numAttrs;
};

template <typename... Expected, typename... Given>
cudaError_t cudaLaunchKernelEx(const cudaLaunchConfig_t *config, void (*kernel)(Expected...), Given &&...given) {
    const std::tuple<Expected...> arguments(std::forward<Given>(given)...);
    cuda_shim::launch(config->gridDim, config->blockDim, config->dynamicSmemBytes,
                      [&] { std::apply(kernel, arguments); });
    return cudaSuccess;
}
inline cudaError_t cudaMemsetAsync(void *data, int byte, size_t bytes, cudaStream_t) {
    memset(data, byte, bytes);
    cuda_shim::mark_written(data, bytes);
    return cudaSuccess;
}
inline cudaError_t cudaGetLastError() { return cudaSuccess; }
inline const char *cudaGetErrorString(cudaError_t) { return "an error of the shim"; }

enum cudaFuncAttribute { cudaFuncAttributeMaxDynamicSharedMemorySize };
template <typename Kernel>
cudaError_t cudaFuncSetAttribute(Kernel *, cudaFuncAttribute, int) {
    return cudaSuccess;
}
enum cudaDeviceAttr { cudaDevAttrMultiProcessorCount, cudaDevAttrComputeCapabilityMajor };
inline cudaError_t cudaGetDevice(int *device) { return *device = 0, cudaSuccess; }
inline cudaError_t cudaDeviceGetAttribute(int *value, cudaDeviceAttr attribute, int) {
    *value = attribute == cudaDevAttrMultiProcessorCount ? 4 : 9;
    return cudaSuccess;
}
