/* Routing of tokens to experts (DMU: arXiv 2409.19291, section 4; Mixtral-style top-k).
 *
 * N tokens, E experts, K experts a token, R = N K routed pairs. Logits and their gradient have the storage dtype;
 * weights, their gradient and the selection bias are real (float32, or float64 for MMBAL_F64).
 */
#ifndef MMBAL_ROUTING_H
#define MMBAL_ROUTING_H

#include <stdint.h>

#include "mmbal/dtype.h"
#include "mmbal/pool.h"
#include "mmbal/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* indices[n,:] = the K largest logits[n,e] + bias[e] in descending order, ties to the lower e
 * weights[n,:] = softmax(logits[n, indices[n,:]])          normalize
 *              = softmax(logits[n,:])[indices[n,:]]        otherwise
 * -inf is a mask (weight 0). A row with a NaN, in logits or bias, has indices 0..K-1 and NaN weights; a row whose
 * kept logits are all -inf has NaN weights. MMBAL_INVALID_ARGUMENT unless 1 <= K <= E and N >= 0. */
mmbal_status mmbal_moe_topk(mmbal_dtype dtype, const void *logits,                         /* [N, E] */
                            const void *selection_bias,                                    /* [E] or NULL */
                            int64_t N, int64_t E, int64_t K, int normalize, void *weights, /* [N, K] out */
                            int64_t *indices,                                              /* [N, K] out */
                            const mmbal_pool *pool);

/* normalize: dlogits[n, indices[n,k]] = w[n,k] (dw[n,k] - sum_j w[n,j] dw[n,j]), 0 where not chosen
 * otherwise: dlogits[n,e] = p[n,e] ([e = indices[n,k]] dw[n,k] - sum_j w[n,j] dw[n,j]), p = softmax(logits[n,:]) */
mmbal_status mmbal_moe_topk_backward(mmbal_dtype dtype, const void *dweights, /* [N, K] */
                                     const void *logits,                      /* [N, E] */
                                     const void *weights,                     /* [N, K] as returned by the forward */
                                     const int64_t *indices,                  /* [N, K] as returned by the forward */
                                     int64_t N, int64_t E, int64_t K, int normalize, void *dlogits, /* [N, E] out */
                                     const mmbal_pool *pool);

/* The pairs n K + k sorted by expert, in order of n K + k within an expert:
 *     permutation[r] = the pair in place r, inverse its inverse, expert e owns the places offsets[e] .. offsets[e+1]
 * MMBAL_INVALID_INDEX when an index is outside [0, E); outputs are undefined then. */
mmbal_status mmbal_moe_dispatch(const int64_t *indices,                                /* [N, K] */
                                int64_t N, int64_t K, int64_t E, int64_t *permutation, /* [R] out */
                                int64_t *offsets,                                      /* [E + 1] out */
                                int64_t *inverse);                                     /* [N, K] out */

/* MMBAL_OK when offsets rise from 0 to R. */
mmbal_status mmbal_moe_check_offsets(const int64_t *offsets, /* [E + 1] */
                                     int64_t R, int64_t E);

/* MMBAL_OK when permutation and inverse undo each other and offsets rise from 0 to R: all that memory safety needs. */
mmbal_status mmbal_moe_check_dispatch(const int64_t *permutation, /* [R] */
                                      const int64_t *offsets,     /* [E + 1] */
                                      const int64_t *inverse,     /* [R] */
                                      int64_t R, int64_t E);

#ifdef __cplusplus
}
#endif
#endif
