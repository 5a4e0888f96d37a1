#include "mmbal/divergence.h"

#include <math.h>

#include "rows.h"

/* Work of an element with its exponential or logarithm, about, in elements that are only moved. */
enum { COST = 8 };

static int sizes_are_served(int64_t N, int64_t M) { return N >= 0 && M >= 1 && M <= MMBAL_MAX_MODALITIES; }

static mmbal_status run(mmbal_task *const tasks[4], mmbal_dtype dtype, int64_t rows, int64_t row_size, void *context,
                        const mmbal_pool *pool) {
    if (!is_dtype(dtype)) return MMBAL_UNSUPPORTED;
    return pool->run(pool->self, rows, rows_per_task(rows, row_size, pool), tasks[dtype], context);
}

mmbal_status mmbal_gaussian_kl(mmbal_dtype dtype, const void *mu, const void *log_sigma, const void *fused_mu,
                               const void *fused_log_sigma, int64_t N, int64_t M, void *kl, const mmbal_pool *pool) {
    if (!sizes_are_served(N, M)) return MMBAL_INVALID_ARGUMENT;
    normal_rows rows = {.mu = mu, .log_sigma = log_sigma, .fused_mu = fused_mu, .fused_log_sigma = fused_log_sigma};
    rows.M = M, rows.kl = kl;
    return run(mmbal_row_tasks_in_use()->normal_kl, dtype, N, COST * M, &rows, pool);
}

mmbal_status mmbal_gaussian_kl_backward(mmbal_dtype dtype, const void *dkl, const void *mu, const void *log_sigma,
                                        const void *fused_mu, const void *fused_log_sigma, int64_t N, int64_t M,
                                        void *dmu, void *dlog_sigma, void *dfused_mu, void *dfused_log_sigma,
                                        const mmbal_pool *pool) {
    if (!sizes_are_served(N, M)) return MMBAL_INVALID_ARGUMENT;
    normal_rows rows = {.mu = mu, .log_sigma = log_sigma, .fused_mu = fused_mu, .fused_log_sigma = fused_log_sigma};
    rows.M = M, rows.dkl = dkl, rows.dmu = dmu, rows.dlog_sigma = dlog_sigma;
    rows.dfused_mu = dfused_mu, rows.dfused_log_sigma = dfused_log_sigma;
    return run(mmbal_row_tasks_in_use()->normal_kl_backward, dtype, N, COST * M, &rows, pool);
}

mmbal_status mmbal_residual_kl(mmbal_dtype dtype, const void *mu, const void *fused_mu, const void *target, int64_t N,
                               int64_t M, double sigma_min, void *kl, const mmbal_pool *pool) {
    if (!sizes_are_served(N, M) || !(sigma_min >= MMBAL_LEAST_SIGMA && sigma_min < INFINITY))
        return MMBAL_INVALID_ARGUMENT;
    normal_rows rows = {.mu = mu, .fused_mu = fused_mu, .target = target, .M = M, .sigma_min = sigma_min, .kl = kl};
    return run(mmbal_row_tasks_in_use()->normal_kl, dtype, N, COST * M, &rows, pool);
}

mmbal_status mmbal_residual_kl_backward(mmbal_dtype dtype, const void *dkl, const void *mu, const void *fused_mu,
                                        const void *target, int64_t N, int64_t M, double sigma_min, void *dmu,
                                        void *dfused_mu, const mmbal_pool *pool) {
    if (!sizes_are_served(N, M) || !(sigma_min >= MMBAL_LEAST_SIGMA && sigma_min < INFINITY))
        return MMBAL_INVALID_ARGUMENT;
    normal_rows rows = {.mu = mu, .fused_mu = fused_mu, .target = target, .M = M, .sigma_min = sigma_min};
    rows.dkl = dkl, rows.dmu = dmu, rows.dfused_mu = dfused_mu;
    return run(mmbal_row_tasks_in_use()->normal_kl_backward, dtype, N, COST * M, &rows, pool);
}

int64_t mmbal_categorical_kl_workspace(mmbal_dtype dtype, int64_t C, const mmbal_pool *pool) {
    const int64_t real = dtype == MMBAL_F64 ? sizeof(double) : sizeof(float);
    return pool->workers * CATEGORICAL_ARRAYS * categorical_tile(C) * real;
}

mmbal_status mmbal_categorical_kl(mmbal_dtype dtype, const void *logits, const void *fused_logits, int64_t M, int64_t N,
                                  int64_t C, int reverse, void *kl, void *workspace, const mmbal_pool *pool) {
    if (!sizes_are_served(N, M) || C < 1) return MMBAL_INVALID_ARGUMENT;
    categorical_rows rows = {.logits = logits, .fused_logits = fused_logits, .M = M, .N = N, .C = C};
    rows.reverse = reverse, rows.kl = kl, rows.workspace = workspace;
    return run(mmbal_row_tasks_in_use()->categorical_kl, dtype, N, COST * M * C, &rows, pool);
}

mmbal_status mmbal_categorical_kl_backward(mmbal_dtype dtype, const void *dkl, const void *logits,
                                           const void *fused_logits, int64_t M, int64_t N, int64_t C, int reverse,
                                           void *dlogits, void *dfused_logits, void *workspace,
                                           const mmbal_pool *pool) {
    if (!sizes_are_served(N, M) || C < 1) return MMBAL_INVALID_ARGUMENT;
    categorical_rows rows = {.logits = logits, .fused_logits = fused_logits, .M = M, .N = N, .C = C};
    rows.reverse = reverse, rows.dkl = dkl, rows.dlogits = dlogits, rows.dfused_logits = dfused_logits;
    rows.workspace = workspace;
    return run(mmbal_row_tasks_in_use()->categorical_kl_backward, dtype, N, COST * M * C, &rows, pool);
}
