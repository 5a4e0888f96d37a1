/* The loss that aligns two modalities (M3-JEPA, arXiv 2409.05929, section 3; its equation 10 is misprinted, this is the
 * usual form): a regression of a target representation, and InfoNCE (arXiv 1807.03748) in both directions.
 *   loss = alpha regression + (1 - alpha) contrastive
 *
 * Own rows and candidates. A process has B own rows (pred, target); source and target embeddings are those of A
 * candidates, gathered from all processes, of which rows offset .. offset + B are the own ones. On one process A = B.
 *
 *   regression   for an own row, over its D numbers d = pred - target:
 *                  smooth_l1  mean of d^2 / (2 beta) where |d| < beta, else of |d| - beta / 2
 *                  mse        mean of d^2              l2  sum of d^2              cosine  1 - cos(pred, target)
 *   contrastive  for an own row (L_i + R_i) / 2 where symmetric, else L_i, with
 *                  z[i,j] = cos(source_i, target_j) / tau
 *                  L_i = logsumexp_j z[i,j] - z[i,i],  R_i the same over column i
 *
 * Left out of the logsumexp: candidates that are not present, and j != i with the group of i (further positives, not
 * negatives).
 *
 * Regression and contrastive are summed over the own rows that are present, times A / (B P), P the number of present
 * candidates: their mean where A = B. The mean over processes with equal B is that of the joined batch, also where they
 * miss different numbers of rows (where B differs, the sum of B / A times each).
 *
 * P < 2: contrastive 0, without a gradient; P = 0 or B = 0: all 0. Rows that are not present are not read, and their
 * gradients are 0. cos(x, y) = <x, y> / (max(|x|, 1e-12) max(|y|, 1e-12)); where a norm is at most 1e-12 the vector has
 * no gradient. Norms, rows' sums and the sums over rows are float64, similarities and softmax real, every sum in an
 * order that depends on the shapes alone. [B, A] is never there as a whole: similarities are taken in blocks, twice. */
#ifndef MMBAL_ALIGNMENT_H
#define MMBAL_ALIGNMENT_H

#include <stdint.h>

#include "mmbal/dtype.h"
#include "mmbal/pool.h"
#include "mmbal/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum mmbal_regression {
    MMBAL_REGRESSION_SMOOTH_L1 = 0,
    MMBAL_REGRESSION_MSE,
    MMBAL_REGRESSION_L2,
    MMBAL_REGRESSION_COSINE
} mmbal_regression;

/* "smooth_l1", "mse", "l2", "cosine"; 0 where name is none of them. */
int mmbal_regression_from_name(const char *name, mmbal_regression *regression);

typedef struct mmbal_alignment {
    const void *pred, *target;                       /* [B, D] */
    const void *source_embedding, *target_embedding; /* [A, C] */
    const int64_t *groups;                           /* [A] or NULL: each its own */
    const uint8_t *present;                          /* [A] or NULL: all */
    int64_t B, D, A, C, offset;                      /* 0 <= offset <= A - B; D, C >= 1 */
    mmbal_dtype dtype;                               /* of the four */
    mmbal_regression regression;
    double tau;   /* 1e-30 <= tau <= 1e30 */
    double alpha; /* 0 <= alpha <= 1: what has no weight is left out, even if it is not finite */
    double beta;  /* finite, >= 0; 0: |d| */
    int symmetric;
} mmbal_alignment;

/* Gradients, NULL where not asked for. */
typedef struct mmbal_alignment_gradients {
    void *pred, *target;                       /* [B, D] */
    void *source_embedding, *target_embedding; /* [A, C] */
} mmbal_alignment_gradients;

int64_t mmbal_align_loss_workspace(const mmbal_alignment *alignment, int workers);

/* "real" is float32, or float64 for MMBAL_F64. */
mmbal_status mmbal_align_loss(const mmbal_alignment *alignment, void *loss, /* [] real, out */
                              void *regression, void *contrastive,          /* [] real, out */
                              void *normalizers, /* [2, B] real, out: the logsumexps of own rows and columns; 0 where
                                                    there is none */
                              void *workspace, const mmbal_pool *pool);

int64_t mmbal_align_loss_backward_workspace(const mmbal_alignment *alignment,
                                            const mmbal_alignment_gradients *gradients, int workers);

/* With g[i,j] = dcontrastive A / (2 B P tau) (softmax_j z[i,j] - [i = j]) of own rows, and the same of own columns:
 *   dsource_i = (I - s s^T) sum_j g[i,j] t_j / |source_i|,  s and t the vectors over their norms; dtarget_j alike.
 * normalizers: those of the forward. What is upstream of the loss reaches both of its parts. */
mmbal_status mmbal_align_loss_backward(const mmbal_alignment *alignment, const void *dloss, /* [] real */
                                       const void *dregression, const void *dcontrastive,   /* [] real */
                                       const void *normalizers,                             /* [2, B] real */
                                       const mmbal_alignment_gradients *gradients,          /* out */
                                       void *workspace, const mmbal_pool *pool);

#ifdef __cplusplus
}
#endif
#endif
