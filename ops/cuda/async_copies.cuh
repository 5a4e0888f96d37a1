// Copies that go on while a kernel computes: instructions of compute capability 8.0.
#pragma once

#include "packs.cuh"

namespace mmbal {

// 16 bytes from global to shared memory, there after wait_for_copies.
__device__ __forceinline__ void copy_async(void *shared, const void *global) {
#ifdef MMBAL_CUDA_ON_CPU
    cuda_shim::copy_async(shared, global);
#else
    const unsigned to = static_cast<unsigned>(__cvta_generic_to_shared(shared));
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(to), "l"(global) : "memory");
#endif
}

// Copies are waited for in groups.
__device__ __forceinline__ void end_group_of_copies() {
#ifdef MMBAL_CUDA_ON_CPU
    cuda_shim::end_group_of_copies();
#else
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
}

// Until at most PENDING of this thread's groups are on their way.
template <int PENDING>
__device__ __forceinline__ void wait_for_copies() {
#ifdef MMBAL_CUDA_ON_CPU
    cuda_shim::wait_for_copies(PENDING);
#else
    asm volatile("cp.async.wait_group %0;" ::"n"(PENDING) : "memory");
#endif
}

} // namespace mmbal
