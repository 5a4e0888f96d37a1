/* Auxiliary losses of a router. p = softmax(logits[n,:]), m[n] = token_mask[n] (1 without a mask), M = sum_n m[n].
 * No token counted (M = 0) gives loss 0 and gradient 0. Logits of masked rows are not read; their indices must be
 * valid. Sums over tokens are taken in float64, in an order that does not depend on threads.
 */
#ifndef MMBAL_ROUTER_LOSS_H
#define MMBAL_ROUTER_LOSS_H

#include <stdint.h>

#include "mmbal/dtype.h"
#include "mmbal/pool.h"
#include "mmbal/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* L = c E sum_e F[e] P[e],  P[e] = sum_n m[n] p[n,e] / M,  F[e] = sum_n m[n] #{k counted : indices[n,k] = e} / M */
typedef enum mmbal_balance {
    MMBAL_BALANCE_MIXTRAL = 0, /* all K choices, c = 1 (transformers; CLIP-MoE's code); K when balanced */
    MMBAL_BALANCE_MEGATRON,    /* all K choices, c = 1/K (Megatron-LM, MegaBlocks); 1 when balanced */
    MMBAL_BALANCE_SWITCH       /* the first choice only, c = 1 (Switch Transformer, arXiv 2101.03961 eq. 4); 1 */
} mmbal_balance;

/* Bytes of workspace for the functions below that take one. */
int64_t mmbal_router_loss_workspace(int64_t N, int64_t E);

/* MMBAL_INVALID_INDEX when an index is outside [0, E). */
mmbal_status mmbal_load_balance_loss(mmbal_dtype dtype, const void *logits, /* [N, E] */
                                     const int64_t *indices,                /* [N, K] */
                                     const uint8_t *token_mask,             /* [N] or NULL: all counted */
                                     int64_t N, int64_t E, int64_t K, mmbal_balance balance,
                                     void *loss, /* [] real, out */
                                     void *workspace, const mmbal_pool *pool);

/* dlogits[n,e] = dloss c (E / M) m[n] p[n,e] (F[e] - sum_j p[n,j] F[j]) */
mmbal_status mmbal_load_balance_loss_backward(mmbal_dtype dtype, const void *dloss, /* [] real */
                                              const void *logits,                   /* [N, E] */
                                              const int64_t *indices,               /* [N, K] */
                                              const uint8_t *token_mask,            /* [N] or NULL */
                                              int64_t N, int64_t E, int64_t K, mmbal_balance balance,
                                              void *dlogits, /* [N, E] out */
                                              void *workspace, const mmbal_pool *pool);

/* L = sum_n m[n] logsumexp(logits[n,:])^2 / M   (ST-MoE, arXiv 2202.08906, eq. 5) */
mmbal_status mmbal_router_z_loss(mmbal_dtype dtype, const void *logits, /* [N, E] */
                                 const uint8_t *token_mask,             /* [N] or NULL */
                                 int64_t N, int64_t E, void *loss,      /* [] real, out */
                                 void *workspace, const mmbal_pool *pool);

/* dlogits[n,e] = dloss (2 / M) m[n] p[n,e] logsumexp(logits[n,:]) */
mmbal_status mmbal_router_z_loss_backward(mmbal_dtype dtype, const void *dloss, /* [] real */
                                          const void *logits,                   /* [N, E] */
                                          const uint8_t *token_mask,            /* [N] or NULL */
                                          int64_t N, int64_t E, void *dlogits,  /* [N, E] out */
                                          const mmbal_pool *pool);

#ifdef __cplusplus
}
#endif
#endif
