/* divergence.h on a GPU; see stream.h. */
#ifndef MMBAL_CUDA_DIVERGENCE_H
#define MMBAL_CUDA_DIVERGENCE_H

#include "mmbal/cuda/stream.h"
#include "mmbal/divergence.h"

#ifdef __cplusplus
extern "C" {
#endif

mmbal_status mmbal_gaussian_kl_cuda(mmbal_dtype dtype, const void *mu, /* [N, M] */
                                    const void *log_sigma,             /* [N, M] */
                                    const void *fused_mu,              /* [N] */
                                    const void *fused_log_sigma,       /* [N] */
                                    int64_t N, int64_t M, void *kl,    /* [N, M] real, out */
                                    mmbal_stream stream);

mmbal_status mmbal_gaussian_kl_backward_cuda(mmbal_dtype dtype, const void *dkl, /* [N, M] real */
                                             const void *mu,                     /* [N, M] */
                                             const void *log_sigma,              /* [N, M] */
                                             const void *fused_mu,               /* [N] */
                                             const void *fused_log_sigma,        /* [N] */
                                             int64_t N, int64_t M, void *dmu,    /* [N, M] out */
                                             void *dlog_sigma,                   /* [N, M] out */
                                             void *dfused_mu,                    /* [N] out */
                                             void *dfused_log_sigma,             /* [N] out */
                                             mmbal_stream stream);

mmbal_status mmbal_residual_kl_cuda(mmbal_dtype dtype, const void *mu,                /* [N, M] */
                                    const void *fused_mu,                             /* [N] */
                                    const void *target,                               /* [N] */
                                    int64_t N, int64_t M, double sigma_min, void *kl, /* [N, M] real, out */
                                    mmbal_stream stream);

mmbal_status mmbal_residual_kl_backward_cuda(mmbal_dtype dtype, const void *dkl,                /* [N, M] real */
                                             const void *mu,                                    /* [N, M] */
                                             const void *fused_mu,                              /* [N] */
                                             const void *target,                                /* [N] */
                                             int64_t N, int64_t M, double sigma_min, void *dmu, /* [N, M] out */
                                             void *dfused_mu,                                   /* [N] out */
                                             mmbal_stream stream);

/* Bytes of workspace of the backward, aligned to 8. */
int64_t mmbal_categorical_kl_workspace_cuda(mmbal_dtype dtype, int64_t M, int64_t N);

mmbal_status mmbal_categorical_kl_cuda(mmbal_dtype dtype, const void *logits,                  /* [M, N, C] */
                                       const void *fused_logits,                               /* [N, C] */
                                       int64_t M, int64_t N, int64_t C, int reverse, void *kl, /* [N, M] real, out */
                                       mmbal_stream stream);

mmbal_status mmbal_categorical_kl_backward_cuda(mmbal_dtype dtype, const void *dkl, /* [N, M] real */
                                                const void *logits,                 /* [M, N, C] */
                                                const void *fused_logits,           /* [N, C] */
                                                int64_t M, int64_t N, int64_t C, int reverse,
                                                void *dlogits,       /* [M, N, C] out */
                                                void *dfused_logits, /* [N, C] out */
                                                void *workspace, mmbal_stream stream);

#ifdef __cplusplus
}
#endif
#endif
