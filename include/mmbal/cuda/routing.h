/* routing.h on a GPU; see stream.h. */
#ifndef MMBAL_CUDA_ROUTING_H
#define MMBAL_CUDA_ROUTING_H

#include "mmbal/cuda/stream.h"
#include "mmbal/routing.h"

#ifdef __cplusplus
extern "C" {
#endif

mmbal_status mmbal_moe_topk_cuda(mmbal_dtype dtype, const void *logits,                         /* [N, E] */
                                 const void *selection_bias,                                    /* [E] or NULL */
                                 int64_t N, int64_t E, int64_t K, int normalize, void *weights, /* [N, K] out */
                                 int64_t *indices,                                              /* [N, K] out */
                                 mmbal_stream stream);

mmbal_status mmbal_moe_topk_backward_cuda(mmbal_dtype dtype, const void *dweights, /* [N, K] */
                                          const void *logits,                      /* [N, E] */
                                          const void *weights,                     /* [N, K] */
                                          const int64_t *indices,                  /* [N, K] */
                                          int64_t N, int64_t E, int64_t K, int normalize,
                                          void *dlogits, /* [N, E] out */
                                          mmbal_stream stream);

int64_t mmbal_moe_dispatch_workspace_cuda(int64_t N, int64_t K, int64_t E);

/* workspace: aligned to 8 bytes. E below 2^31. */
mmbal_status mmbal_moe_dispatch_cuda(const int64_t *indices,                                /* [N, K] */
                                     int64_t N, int64_t K, int64_t E, int64_t *permutation, /* [R] out */
                                     int64_t *offsets,                                      /* [E + 1] out */
                                     int64_t *inverse,                                      /* [N, K] out */
                                     void *workspace, mmbal_stream stream);

#ifdef __cplusplus
}
#endif
#endif
