/* BTW's weights of modalities for each sample (Hou et al., Findings of EMNLP 2025, arXiv 2508.18551), their moving
 * average, and their application to embeddings. "real" is float32, or float64 for MMBAL_F64; [N, M] as in divergence.h,
 * 1 <= M <= MMBAL_MAX_MODALITIES. Sums over samples are float64 in an order that does not depend on threads.
 */
#ifndef MMBAL_BTW_H
#define MMBAL_BTW_H

#include <stdint.h>

#include "mmbal/dtype.h"
#include "mmbal/modalities.h"
#include "mmbal/pool.h"
#include "mmbal/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* diverge: w[n,m] = D[n,m] v[m] / sum_j D[n,j] v[j],  D = min(max(kl, floor), ceiling), v = max(mi, floor);
 *          weight grows with divergence, as in the authors' code
 * agree:   w[n,:] = softmax over m of ln v[m] - min(kl[n,m], ceiling) / temperature */
typedef enum mmbal_btw_mode { MMBAL_BTW_DIVERGE = 0, MMBAL_BTW_AGREE } mmbal_btw_mode;

/* Bounds of the options: float32 holds products of two. */
#define MMBAL_BTW_LEAST 1e-12
#define MMBAL_BTW_MOST 1e12

typedef struct mmbal_btw_options {
    double floor, ceiling, temperature; /* floor <= ceiling; all from MMBAL_BTW_LEAST to MMBAL_BTW_MOST */
    mmbal_btw_mode mode;
    int mean_one; /* not 0: a row is multiplied by its number of counted modalities, so that equal weights are 1 */
} mmbal_btw_options;

/* Counted are the modalities that are present and whose kl is not NaN; the others have weight 0. A row without any is
 * 0. mi must be finite. */
mmbal_status mmbal_btw_weights(mmbal_dtype dtype, const void *kl,                              /* [N, M] */
                               const double *mi,                                               /* [M] */
                               const uint8_t *present,                                         /* [N, M] or NULL: all */
                               int64_t N, int64_t M, mmbal_btw_options options, void *weights, /* [N, M] real, out */
                               const mmbal_pool *pool);

int64_t mmbal_btw_weights_backward_workspace(int64_t N, int64_t M);

/* With g = dweights (times the number counted if mean_one), w the weights before that, s = w (g - <g, w>_n):
 *   dkl = s / D where floor < kl < ceiling (diverge), -s / temperature where kl < ceiling (agree), else 0
 *   dmi = sum_n s / v where mi > floor, else 0
 * Outputs may be NULL: not needed. */
mmbal_status mmbal_btw_weights_backward(mmbal_dtype dtype, const void *dweights, /* [N, M] real */
                                        const void *kl,                          /* [N, M] */
                                        const double *mi,                        /* [M] */
                                        const uint8_t *present,                  /* [N, M] or NULL: all */
                                        int64_t N, int64_t M, mmbal_btw_options options, void *dkl, /* [N, M] out */
                                        double *dmi,                                                /* [M] out */
                                        void *workspace, const mmbal_pool *pool);

int64_t mmbal_ema_rows_workspace(int64_t S);

/* table[index[n], :] = alpha weights[n, :] + (1 - alpha) table[index[n], :]; other rows stay; weights must not lie
 * in the table. MMBAL_F32 and MMBAL_F64.
 * The table is untouched when index has an entry outside [0, S) (MMBAL_INVALID_INDEX) or one twice
 * (MMBAL_DUPLICATE_INDEX). 0 <= alpha <= 1. */
mmbal_status mmbal_ema_rows(mmbal_dtype dtype, void *table, /* [S, M] in and out */
                            const int64_t *index,           /* [N] */
                            const void *weights,            /* [N, M] */
                            int64_t S, int64_t N, int64_t M, double alpha, void *workspace, const mmbal_pool *pool);

/* scaled[n, :] = weights[n, m] h[n, :] for one modality m of [N, M] weights; d is the size of a row. Rounded once. A
 * weight of 0 gives 0 whatever h holds: what is missing may be NaN. */
mmbal_status mmbal_scale_modality(mmbal_dtype dtype, const void *h,                         /* [N, d] */
                                  const void *weights,                                      /* [N, M] real */
                                  int64_t m, int64_t N, int64_t M, int64_t d, void *scaled, /* [N, d] out */
                                  const mmbal_pool *pool);

/* dweights[n, m] = sum of dscaled[n, :] h[n, :]; column m alone is written. (dh is mmbal_scale_modality of dscaled.)
 * The sum over a row is that of 16 interleaved parts, added in their order. */
mmbal_status mmbal_scale_modality_dweights(mmbal_dtype dtype, const void *dscaled, /* [N, d] */
                                           const void *h,                          /* [N, d] */
                                           int64_t m, int64_t N, int64_t M, int64_t d,
                                           void *dweights, /* [N, M] real, out */
                                           const mmbal_pool *pool);

#ifdef __cplusplus
}
#endif
#endif
