/* significance.h on a GPU; see stream.h. The arrays of mmbal_modality and of dims lie in the host's memory and are not
 * read after the call; what they point to lies on the device, as do all other pointers. Sums over a row and over the
 * samples are in an order that the sizes fix. A target that the CPU answers with MMBAL_INVALID_INDEX ends the launch.
 */
#ifndef MMBAL_CUDA_SIGNIFICANCE_H
#define MMBAL_CUDA_SIGNIFICANCE_H

#include "mmbal/cuda/stream.h"
#include "mmbal/significance.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of workspace, aligned to 8. */
int64_t mmbal_modal_stats_workspace_cuda(int64_t B, int64_t M, int64_t C);

mmbal_status mmbal_modal_stats_cuda(const mmbal_modality *modalities,                                      /* [M] */
                                    const int64_t *targets,                                                /* [B] */
                                    int64_t M, int64_t B, int64_t C, int64_t ignore_index, double *ce_sum, /* [M] out */
                                    double *entropy_sum,                                                   /* [M] out */
                                    double *histogram,                                                     /* [C] out */
                                    double *rows,                                                          /* [1] out */
                                    void *workspace, mmbal_stream stream);

mmbal_status mmbal_update_ratio_cuda(const double *ce_sum,                                            /* [M] */
                                     const double *entropy_sum,                                       /* [M] */
                                     const double *histogram,                                         /* [C] */
                                     const double *rows,                                              /* [1] */
                                     const int64_t *dims,                                             /* [M]: each D */
                                     int64_t M, int64_t C, mmbal_ratio_options options, double *rate, /* [M] out */
                                     double *rho,                                                     /* [M] out */
                                     mmbal_stream stream);

mmbal_status mmbal_ratio_of_rates_cuda(const double *rate,                                  /* [M] */
                                       int64_t M, mmbal_ratio_options options, double *rho, /* [M] out */
                                       mmbal_stream stream);

#ifdef __cplusplus
}
#endif
#endif
