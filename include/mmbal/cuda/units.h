/* units.h on a GPU; see stream.h. The arrays of mmbal_units lie in the host's memory and are not read after the call;
 * what they point to lies on the device, as do all other pointers. */
#ifndef MMBAL_CUDA_UNITS_H
#define MMBAL_CUDA_UNITS_H

#include "mmbal/cuda/stream.h"
#include "mmbal/units.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of workspace, aligned to 8. */
int64_t mmbal_unit_energy_workspace_cuda(const mmbal_units *tensors, const mmbal_units *weights, int64_t T);

/* Sums are float64, in an order that dtype, sizes and strides fix. */
mmbal_status mmbal_unit_energy_cuda(const mmbal_units *tensors,                             /* [T], read */
                                    const mmbal_units *weights,                             /* [T] or NULL */
                                    int64_t T, mmbal_importance importance, double *energy, /* [U] out */
                                    uint8_t *nonfinite,                                     /* [1] out */
                                    void *workspace, mmbal_stream stream);

/* Does nothing where *skip is not 0: who waits for nothing cannot know it before. */
mmbal_status mmbal_scale_units_cuda(const mmbal_units *tensors,     /* [T], in and out */
                                    const mmbal_units *bases,       /* [T] of the same dtypes and sizes, or NULL */
                                    int64_t T, const double *scale, /* [U] */
                                    const uint8_t *skip,            /* [1] or NULL */
                                    mmbal_stream stream);

#ifdef __cplusplus
}
#endif
#endif
