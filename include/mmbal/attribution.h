/* How much each modality contributes to a decision, and a regulariser that asks for given shares (Yerramilli et al.,
 * "Attribution Regularization for Multimodal Paradigms", arXiv 2404.02359). For each of B samples, with g_m the
 * gradient of the sample's score for the embedding e_m of modality m (d_m numbers each) and "present" modalities alone:
 *   alpha_m = g_m e_m (elementwise)     a_m = sqrt(sum alpha_m^2)  (l2)  or  sqrt(sum alpha_m^2 / d_m)  (rms)
 *   p_m = a_m / S, S = sum_j a_j        q_m = r_m / sum_j r_j of the target shares r
 *   R = sum_m psi(p_m - q_m)            psi(x) = |x| (l1), x^2 (squared), |x| - 0.05 beyond 0.1 and 5 x^2 below (huber)
 * S = 0, or fewer than two present: p = q, R = 0, and no gradient. Sums are float64, in an order that depends on d
 * alone.
 */
#ifndef MMBAL_ATTRIBUTION_H
#define MMBAL_ATTRIBUTION_H

#include <stdint.h>

#include "mmbal/dtype.h"
#include "mmbal/modalities.h"
#include "mmbal/pool.h"
#include "mmbal/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum mmbal_attribution_pool { MMBAL_POOL_L2 = 0, MMBAL_POOL_RMS } mmbal_attribution_pool;
typedef enum mmbal_attribution_penalty { MMBAL_L1 = 0, MMBAL_SQUARED, MMBAL_HUBER } mmbal_attribution_penalty;

typedef struct mmbal_attribution_options {
    mmbal_attribution_pool pool;
    mmbal_attribution_penalty penalty;
    double eps; /* 0 <= eps < 1: a modality with p <= eps has no gradient: its root is too near to 0 */
} mmbal_attribution_options;

/* One modality of B samples. All of a call have one dtype. */
typedef struct mmbal_attributed {
    const void *gradient, *embedding;     /* [B, d] */
    int64_t d;                            /* >= 1 */
    void *dgradient, *dembedding;         /* [B, d] out of the backward ones, or NULL */
    const void *ddgradient, *ddembedding; /* [B, d] into the second backward: what is upstream of its two, or NULL: 0 */
} mmbal_attributed;

/* The samples and what is asked of them. */
typedef struct mmbal_attribution {
    const mmbal_attributed *modalities; /* [M] */
    const double *target;               /* [B, M] or, with target_rows = 1, [1, M]: r >= 0, finite */
    int64_t target_rows;                /* B or 1 */
    const uint8_t *present;             /* [B, M] or NULL: all */
    int64_t B, M;
    mmbal_dtype dtype;
    mmbal_attribution_options options;
} mmbal_attribution;

/* "real" is float32, or float64 for MMBAL_F64. Outputs where a modality is not present: share and magnitude 0.
 * MMBAL_INVALID_ARGUMENT when a target is negative or not finite, or those of a sample's present modalities sum to 0.
 */
mmbal_status mmbal_attribution_reg(const mmbal_attribution *attribution, void *reg, /* [B] real, out */
                                   void *shares,                                    /* [B, M] real, out */
                                   void *magnitudes,                                /* [B, M] real, out: a */
                                   const mmbal_pool *pool);

/* With what is upstream of the three outputs, y_m = dreg psi'(p_m - q_m) + dshares_m and
 *   A_m = (y_m - sum_j y_j p_j) / S + dmagnitudes_m,   c_m = A_m / (a_m n_m),   n_m = d_m (rms) or 1 (l2):
 *   dgradient_m = c_m g_m e_m^2     dembedding_m = c_m g_m^2 e_m
 * magnitudes: those of the forward. dshares and dmagnitudes may be NULL: 0. */
mmbal_status mmbal_attribution_reg_backward(const mmbal_attribution *attribution, const void *dreg, /* [B] real */
                                            const void *dshares,                                    /* [B, M] real */
                                            const void *dmagnitudes,                                /* [B, M] real */
                                            const void *magnitudes,                                 /* [B, M] real */
                                            const mmbal_pool *pool);

/* The derivative of the backward: of
 *   sum_m <ddgradient_m, c_m g_m e_m^2> + <ddembedding_m, c_m g_m^2 e_m>  =  sum_m c_m beta_m,
 *   beta_m = sum g_m e_m (ddgradient_m e_m + ddembedding_m g_m)
 * for g, e (dgradient, dembedding of the modalities), dreg, dshares and dmagnitudes, each [..] real, out. */
mmbal_status mmbal_attribution_reg_backward_backward(const mmbal_attribution *attribution, const void *dreg,
                                                     const void *dshares, const void *dmagnitudes,
                                                     const void *magnitudes, void *ddreg, /* [B] */
                                                     void *ddshares,                      /* [B, M] */
                                                     void *ddmagnitudes,                  /* [B, M] */
                                                     const mmbal_pool *pool);

/* The score of a sample that attributions are of: c* is the class with the largest logit (the first of equal ones), or
 * a given one.
 *   odds   z[c*] - log sum_{c != c*} exp z[c], which gives the attributions of the probability and never saturates;
 *          with one class |z|
 *   logit  z[c*] */
typedef enum mmbal_score { MMBAL_SCORE_ODDS = 0, MMBAL_SCORE_LOGIT } mmbal_score;

/* A linear head z = sum_m W_m e_m + b; of attributed modalities the embedding, of W the rows are classes. */
typedef struct mmbal_linear_head {
    const void *const *weights; /* [M] pointers to [C, d_m] of the dtype */
    int64_t row_stride;         /* elements from one row of each W, and of its gradient, to the next; 0: d_m */
    const void *logits;         /* [B, C] of the dtype: z */
    const int64_t *classes;     /* [B]: c*, or NULL */
    int64_t C;
    mmbal_score score;
} mmbal_linear_head;

int64_t mmbal_attribution_linear_workspace(const mmbal_attribution *attribution, int64_t C, const mmbal_pool *pool);

/* mmbal_attribution_reg of a linear head, its gradients g_m in closed form, and the gradient of sum_b dreg[b] R[b] for
 * the head's parameters, in one call (spec: with coef = onehot(c*) - softmax over the others, v_m the backward's
 * dgradient, m = sum_m W_m v_m, zeta = -pi (m - mean of m under pi), pi that softmax):
 *   g_m = coef W_m     dW_m = coef^T v_m + zeta^T e_m     db = sum_b zeta        (logit: coef = onehot(c*), zeta = 0)
 * Below 2^-64 a probability counts as 0 where real is float32.
 * gradient of the modalities is not read. Products and sums are in real, in an order that depends on the shapes alone.
 */
mmbal_status mmbal_attribution_linear(const mmbal_attribution *attribution, const mmbal_linear_head *head,
                                      const void *dreg,        /* [B] real */
                                      void *reg, void *shares, /* [B], [B, M] real, out */
                                      void *magnitudes,        /* [B, M] real, out */
                                      void *const *dweights,   /* [M] pointers to [C, d_m] of the dtype, out */
                                      void *dbias,             /* [C] of the dtype, out */
                                      void *workspace, const mmbal_pool *pool);

#ifdef __cplusplus
}
#endif
#endif
