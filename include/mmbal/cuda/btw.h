/* btw.h on a GPU; see stream.h. What the CPU answers with MMBAL_INVALID_ARGUMENT for a value of mi that is not finite,
 * and with MMBAL_DUPLICATE_INDEX, ends the launch, as an index outside its range does. */
#ifndef MMBAL_CUDA_BTW_H
#define MMBAL_CUDA_BTW_H

#include "mmbal/btw.h"
#include "mmbal/cuda/stream.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of workspace of the weights and of their backward, aligned to 8. */
int64_t mmbal_btw_weights_workspace_cuda(int64_t N, int64_t M);

mmbal_status mmbal_btw_weights_cuda(mmbal_dtype dtype, const void *kl, /* [N, M] */
                                    const double *mi,                  /* [M] */
                                    const uint8_t *present,            /* [N, M] or NULL: all */
                                    int64_t N, int64_t M, mmbal_btw_options options,
                                    void *weights, /* [N, M] real, out */
                                    void *workspace, mmbal_stream stream);

mmbal_status mmbal_btw_weights_backward_cuda(mmbal_dtype dtype, const void *dweights, /* [N, M] real */
                                             const void *kl,                          /* [N, M] */
                                             const double *mi,                        /* [M] */
                                             const uint8_t *present,                  /* [N, M] or NULL: all */
                                             int64_t N, int64_t M, mmbal_btw_options options,
                                             void *dkl,   /* [N, M] out */
                                             double *dmi, /* [M] out */
                                             void *workspace, mmbal_stream stream);

/* Bytes of workspace, aligned to 4. */
int64_t mmbal_ema_rows_workspace_cuda(int64_t S);

mmbal_status mmbal_ema_rows_cuda(mmbal_dtype dtype, void *table, /* [S, M] in and out */
                                 const int64_t *index,           /* [N] */
                                 const void *weights,            /* [N, M] */
                                 int64_t S, int64_t N, int64_t M, double alpha, void *workspace, mmbal_stream stream);

mmbal_status mmbal_scale_modality_cuda(mmbal_dtype dtype, const void *h,                         /* [N, d] */
                                       const void *weights,                                      /* [N, M] real */
                                       int64_t m, int64_t N, int64_t M, int64_t d, void *scaled, /* [N, d] out */
                                       mmbal_stream stream);

/* The sum over a row is that of 32 lanes' parts, in an order that d fixes. */
mmbal_status mmbal_scale_modality_dweights_cuda(mmbal_dtype dtype, const void *dscaled, /* [N, d] */
                                                const void *h,                          /* [N, d] */
                                                int64_t m, int64_t N, int64_t M, int64_t d,
                                                void *dweights, /* [N, M] real, out */
                                                mmbal_stream stream);

#ifdef __cplusplus
}
#endif
#endif
