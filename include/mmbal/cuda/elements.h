/* elements.h on a GPU; see stream.h. What is kept and what it is multiplied by is that of a CPU with fused
 * multiply-adds (x86: AVX2), to the bit. A rho outside [0, 1], or 0 where unbiased, ends the launch, as an index
 * outside its range does. */
#ifndef MMBAL_CUDA_ELEMENTS_H
#define MMBAL_CUDA_ELEMENTS_H

#include "mmbal/cuda/stream.h"
#include "mmbal/elements.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of workspace, aligned to 8. */
int64_t mmbal_mask_elements_workspace_cuda(const mmbal_elements *tensors, int64_t T);

/* The list is in the host's memory and not needed any more when it returns; what it points to is on the device.
 * skip [1] or NULL: where it is not 0 nothing is changed. */
mmbal_status mmbal_mask_elements_cuda(const mmbal_elements *tensors, /* [T], on the host */
                                      const double *rho,             /* [M] */
                                      int64_t T, int64_t M, int64_t seed, int64_t step, mmbal_importance importance,
                                      mmbal_mask_options options, const uint8_t *skip, void *workspace,
                                      mmbal_stream stream);

#ifdef __cplusplus
}
#endif
#endif
