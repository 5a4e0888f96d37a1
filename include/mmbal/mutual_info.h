/* How much a modality's predictions say about the fused ones: mutual information in nats, the modality factor of BTW.
 * Float64 throughout. A modality with too few samples to say anything has NaN.
 */
#ifndef MMBAL_MUTUAL_INFO_H
#define MMBAL_MUTUAL_INFO_H

#include <stdint.h>

#include "mmbal/dtype.h"
#include "mmbal/pool.h"
#include "mmbal/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of workspace: about 76 N M + 48 N. */
int64_t mmbal_ksg_mutual_info_workspace(int64_t N, int64_t M, const mmbal_pool *pool);

/* Estimator 1 of Kraskov, Stoegbauer and Grassberger (Phys. Rev. E 69, 066138, 2004, eq. 8), k = neighbors, over the n
 * samples of a modality that are present and finite in x and y (pairwise deletion):
 *   eps_i = Chebyshev distance in (x, y) from i to its k-th nearest other sample
 *   mi = max(0, psi(n) + psi(k) - mean_i [psi(nx_i + 1) + psi(ny_i + 1)]),   nx_i = #{j != i : |x_j - x_i| < eps_i}
 * standardize divides x and y by their standard deviation (over n, not n - 1; where it is 0 or not finite they are left
 * as they are); then jitter > 0 adds jitter max(1, mean|x|) times a normal number that (seed, modality, sample) alone
 * determine. Where the k nearest coincide with i, eps_i = 0 and the samples equal to i are counted, as scikit-learn
 * does without its jitter; many ties make the estimate too large, which jitter (1e-10 there) avoids. n <= neighbors
 * gives NaN. 0 <= jitter < infinity, 1 <= neighbors <= MMBAL_MAX_NEIGHBORS, N < 2^31. Time about N sqrt(N) at worst. */
enum { MMBAL_MAX_NEIGHBORS = 64 };
mmbal_status mmbal_ksg_mutual_info(mmbal_dtype dtype, const void *x, /* [N, M] */
                                   const void *y,                    /* [N] */
                                   const uint8_t *present,           /* [N, M] or NULL: all */
                                   int64_t N, int64_t M, int64_t neighbors, int standardize, double jitter,
                                   uint64_t seed, double *mi, /* [M] out */
                                   void *workspace, const mmbal_pool *pool);

/* 1 + the largest class among b and the present entries of a; 1 without entries. MMBAL_INVALID_INDEX: one is < 0 or
 * 2^63 - 1. */
mmbal_status mmbal_count_classes(const int64_t *a,       /* [M, N] */
                                 const int64_t *b,       /* [N] */
                                 const uint8_t *present, /* [N, M] or NULL: all */
                                 int64_t M, int64_t N, int64_t *C);

/* Bytes of workspace: a table of C x C counts for every modality. */
int64_t mmbal_discrete_mutual_info_workspace(int64_t M, int64_t C);

/* The plug-in estimate from the table of counts n[i,j] of (a, b) over the n present samples:
 *   mi = sum_ij n[i,j] / n ln(n n[i,j] / (sum_j n[i,j] sum_i n[i,j]))
 * n = 0 gives NaN. MMBAL_INVALID_INDEX when b or a present entry of a is outside [0, C). */
mmbal_status mmbal_discrete_mutual_info(const int64_t *a,                            /* [M, N] */
                                        const int64_t *b,                            /* [N] */
                                        const uint8_t *present,                      /* [N, M] or NULL: all */
                                        int64_t M, int64_t N, int64_t C, double *mi, /* [M] out */
                                        void *workspace, const mmbal_pool *pool);

#ifdef __cplusplus
}
#endif
#endif
