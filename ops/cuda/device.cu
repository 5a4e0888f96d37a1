#include <cuda_runtime.h>

#include "mmbal/cuda/stream.h"

int mmbal_cuda_capability_major(void) {
    int device = 0, major = 0;
    if (cudaGetDevice(&device) != cudaSuccess) return 0;
    const cudaError_t error = cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    return error == cudaSuccess ? major : 0;
}
