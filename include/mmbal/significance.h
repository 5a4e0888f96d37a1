/* How much each modality's features say about the labels of a batch, and the update ratio that follows: the first half
 * of AMSS (Yang et al., TPAMI 47(6), 2025, arXiv 2404.08347). Entropies are in nats, sums float64.
 */
#ifndef MMBAL_SIGNIFICANCE_H
#define MMBAL_SIGNIFICANCE_H

#include <stdint.h>

#include "mmbal/dtype.h"
#include "mmbal/modalities.h"
#include "mmbal/pool.h"
#include "mmbal/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* What one modality alone makes of a batch of B samples. */
typedef struct mmbal_modality {
    const void *logits;   /* [B, C] of logits_dtype: what the head makes of this modality's features alone */
    const void *features; /* [B, D] of features_dtype: what its encoder gives */
    int64_t D;            /* >= 1 */
    mmbal_dtype logits_dtype, features_dtype;
} mmbal_modality;

int64_t mmbal_modal_stats_workspace(int64_t B, int64_t M);

/* Sums over the samples whose target is not ignore_index:
 *   ce_sum[m]      cross entropy of the logits with the target,  log sum_c exp(o[c]) - o[target]
 *   entropy_sum[m] entropy of softmax(features)
 *   histogram[c]   how often each class is the target            rows  how many samples
 * all of which add over batches and over processes. A logit or feature that is NaN or +infinity makes its modality's
 * sum NaN. MMBAL_INVALID_INDEX when a target is neither ignore_index nor in [0, C). */
mmbal_status mmbal_modal_stats(const mmbal_modality *modalities,                                      /* [M] */
                               const int64_t *targets,                                                /* [B] */
                               int64_t M, int64_t B, int64_t C, int64_t ignore_index, double *ce_sum, /* [M] out */
                               double *entropy_sum,                                                   /* [M] out */
                               double *histogram,                                                     /* [C] out */
                               double *rows,                                                          /* [1] out */
                               void *workspace, const mmbal_pool *pool);

/* The rate r of a modality; H(Y) is the entropy of the labels, CE the mean cross entropy, h the mean entropy of its
 * features' softmax over its largest value, ln D (1 where D = 1):
 *   rate               max(H(Y) - CE + offset, 0) / max(h, least_entropy)
 *   rate_unnormalised  max(H(Y) - CE + offset, 0) / (max(h, least_entropy) ln D)     (over h where D = 1)
 *   mi                 max(H(Y) - CE + offset, 0), a bound of the mutual information where offset = 0 */
typedef enum mmbal_significance { MMBAL_RATE = 0, MMBAL_RATE_UNNORMALISED, MMBAL_MI } mmbal_significance;

typedef struct mmbal_ratio_options {
    mmbal_significance significance;
    double temperature;   /* > 0 */
    double offset;        /* of the information, nats */
    double least, most;   /* bounds of rho, 0 <= least <= most <= 1 */
    double bias;          /* added to rho before it is bounded */
    double least_entropy; /* > 0 */
    int official_guard;   /* not 0: every rho is 0.5 where any H(Y) - CE + offset <= 0, as in the authors' code */
} mmbal_ratio_options;

/* rho[m] = min(max(1 - softmax(rate / temperature)[m] + bias, least), most): the weaker a modality, the larger the part
 * of it that is updated. Where M = 1 it is 1, always. Otherwise, where a rate is not finite or rows = 0, all are 1 -
 * 1/M, and where the official guard holds all are 0.5, within the bounds. */
mmbal_status mmbal_update_ratio(const double *ce_sum,                                            /* [M] */
                                const double *entropy_sum,                                       /* [M] */
                                const double *histogram,                                         /* [C] */
                                const double *rows,                                              /* [1] */
                                const int64_t *dims,                                             /* [M]: each D */
                                int64_t M, int64_t C, mmbal_ratio_options options, double *rate, /* [M] out */
                                double *rho);                                                    /* [M] out */

/* The second half of mmbal_update_ratio alone, for rates of the caller's own; the guard is not asked. */
mmbal_status mmbal_ratio_of_rates(const double *rate,                                   /* [M] */
                                  int64_t M, mmbal_ratio_options options, double *rho); /* [M] out */

#ifdef __cplusplus
}
#endif
#endif
