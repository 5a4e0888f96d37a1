/* How far each modality's own prediction is from the fused one: KL(modality || fused) in nats, the instance factor of
 * BTW (Hou et al., Findings of EMNLP 2025, arXiv 2508.18551; direction and residual form as in the authors' code).
 *
 * Sums are taken and results given in float32, float64 for float64 ("real"). A KL is never below 0 where its exact
 * value is not; what is too large is infinite; a NaN among the inputs of an entry makes that entry NaN and no other.
 * Logarithms of standard deviations are served from -80 to 80, where float32 holds their exponentials. Every gradient
 * output may be NULL: not needed. 1 <= M <= MMBAL_MAX_MODALITIES.
 */
#ifndef MMBAL_DIVERGENCE_H
#define MMBAL_DIVERGENCE_H

#include <stdint.h>

#include "mmbal/dtype.h"
#include "mmbal/modalities.h"
#include "mmbal/pool.h"
#include "mmbal/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Two normal distributions, with delta = log_sigma - fused_log_sigma:
 *   kl[n,m] = (exp(2 delta) - 1 - 2 delta) / 2 + ((mu - fused_mu) exp(-fused_log_sigma))^2 / 2
 * which equals ln(s_q / s_u) + (s_u^2 + (mu_u - mu_q)^2) / (2 s_q^2) - 1/2 without its cancellation. */
mmbal_status mmbal_gaussian_kl(mmbal_dtype dtype, const void *mu, /* [N, M] */
                               const void *log_sigma,             /* [N, M] */
                               const void *fused_mu,              /* [N] */
                               const void *fused_log_sigma,       /* [N] */
                               int64_t N, int64_t M, void *kl,    /* [N, M] real, out */
                               const mmbal_pool *pool);

/* With c = dkl, d = mu - fused_mu, s_q = exp(fused_log_sigma), r2 = exp(2 delta):
 *   dmu = c d / s_q^2                       dfused_mu = -sum_m c d / s_q^2
 *   dlog_sigma = c (r2 - 1)                 dfused_log_sigma = sum_m c (1 - r2 - d^2 / s_q^2) */
mmbal_status mmbal_gaussian_kl_backward(mmbal_dtype dtype, const void *dkl, /* [N, M] real */
                                        const void *mu,                     /* [N, M] */
                                        const void *log_sigma,              /* [N, M] */
                                        const void *fused_mu,               /* [N] */
                                        const void *fused_log_sigma,        /* [N] */
                                        int64_t N, int64_t M, void *dmu,    /* [N, M] out */
                                        void *dlog_sigma,                   /* [N, M] out */
                                        void *dfused_mu,                    /* [N] out */
                                        void *dfused_log_sigma,             /* [N] out */
                                        const mmbal_pool *pool);

#define MMBAL_LEAST_SIGMA 1e-30 /* float32 holds its reciprocal */

/* The same with the residuals as standard deviations, s = max(|target - mu|, sigma_min), for rows whose target the
 * model may see. MMBAL_LEAST_SIGMA <= sigma_min < infinity, in units of the target. Without the bound kl = r^2 - r -
 * ln|r|, r = (target - mu) / (target - fused_mu). */
mmbal_status mmbal_residual_kl(mmbal_dtype dtype, const void *mu,                /* [N, M] */
                               const void *fused_mu,                             /* [N] */
                               const void *target,                               /* [N] */
                               int64_t N, int64_t M, double sigma_min, void *kl, /* [N, M] real, out */
                               const mmbal_pool *pool);

/* The Gaussian's gradient with ds/dmu = -sign(target - mu) where |target - mu| > sigma_min, else 0; at the bound and at
 * a residual of 0 it is 0. A shift of mu, fused_mu and target together changes nothing, so
 * dtarget = -dfused_mu - sum_m dmu. */
mmbal_status mmbal_residual_kl_backward(mmbal_dtype dtype, const void *dkl,                /* [N, M] real */
                                        const void *mu,                                    /* [N, M] */
                                        const void *fused_mu,                              /* [N] */
                                        const void *target,                                /* [N] */
                                        int64_t N, int64_t M, double sigma_min, void *dmu, /* [N, M] out */
                                        void *dfused_mu,                                   /* [N] out */
                                        const mmbal_pool *pool);

/* Bytes of workspace for the two functions below. */
int64_t mmbal_categorical_kl_workspace(mmbal_dtype dtype, int64_t C, const mmbal_pool *pool);

/* Softmax distributions p = softmax(logits[m,n,:]) and q = softmax(fused_logits[n,:]), C >= 1:
 *   kl[n,m] = sum_c p (ln p - ln q); reverse: sum_c q (ln q - ln p)
 * A class that the first distribution lacks adds nothing, and gets no gradient: one whose logit is more than 87
 * (float64: 745) below the largest of its row. A logit of -inf in the second alone makes the sum infinite; what lies
 * above counts by its logit, however small its probability is. */
mmbal_status mmbal_categorical_kl(mmbal_dtype dtype, const void *logits,                  /* [M, N, C] */
                                  const void *fused_logits,                               /* [N, C] */
                                  int64_t M, int64_t N, int64_t C, int reverse, void *kl, /* [N, M] real, out */
                                  void *workspace, const mmbal_pool *pool);

/* With g = dkl[n,m]:
 *   dlogits = g p (ln p - ln q - kl), dfused_logits = sum_m g (q - p); reverse:
 *   dlogits = g (p - q),              dfused_logits = sum_m g q (ln q - ln p - kl) */
mmbal_status mmbal_categorical_kl_backward(mmbal_dtype dtype, const void *dkl, /* [N, M] real */
                                           const void *logits,                 /* [M, N, C] */
                                           const void *fused_logits,           /* [N, C] */
                                           int64_t M, int64_t N, int64_t C, int reverse,
                                           void *dlogits,       /* [M, N, C] out */
                                           void *dfused_logits, /* [N, C] out */
                                           void *workspace, const mmbal_pool *pool);

#ifdef __cplusplus
}
#endif
#endif
