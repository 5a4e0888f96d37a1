/* router_loss.h on a GPU; see stream.h. Sums over tokens are float64 in an order that N and E fix. */
#ifndef MMBAL_CUDA_ROUTER_LOSS_H
#define MMBAL_CUDA_ROUTER_LOSS_H

#include "mmbal/cuda/stream.h"
#include "mmbal/router_loss.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of workspace of each of the functions below, aligned to 8. */
int64_t mmbal_router_loss_workspace_cuda(int64_t N, int64_t E);

mmbal_status mmbal_load_balance_loss_cuda(mmbal_dtype dtype, const void *logits, /* [N, E] */
                                          const int64_t *indices,                /* [N, K] */
                                          const uint8_t *token_mask,             /* [N] or NULL: all counted */
                                          int64_t N, int64_t E, int64_t K, mmbal_balance balance,
                                          void *loss, /* [] real, out */
                                          void *workspace, mmbal_stream stream);

mmbal_status mmbal_load_balance_loss_backward_cuda(mmbal_dtype dtype, const void *dloss, /* [] real */
                                                   const void *logits,                   /* [N, E] */
                                                   const int64_t *indices,               /* [N, K] */
                                                   const uint8_t *token_mask,            /* [N] or NULL */
                                                   int64_t N, int64_t E, int64_t K, mmbal_balance balance,
                                                   void *dlogits, /* [N, E] out */
                                                   void *workspace, mmbal_stream stream);

mmbal_status mmbal_router_z_loss_cuda(mmbal_dtype dtype, const void *logits, /* [N, E] */
                                      const uint8_t *token_mask,             /* [N] or NULL */
                                      int64_t N, int64_t E, void *loss,      /* [] real, out */
                                      void *workspace, mmbal_stream stream);

mmbal_status mmbal_router_z_loss_backward_cuda(mmbal_dtype dtype, const void *dloss, /* [] real */
                                               const void *logits,                   /* [N, E] */
                                               const uint8_t *token_mask,            /* [N] or NULL */
                                               int64_t N, int64_t E, void *dlogits,  /* [N, E] out */
                                               void *workspace, mmbal_stream stream);

#ifdef __cplusplus
}
#endif
#endif
