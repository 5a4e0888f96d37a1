/* KL of normal distributions for one dtype; see each_dtype.h. With s_q the fused standard deviation and ratio that of
 * the modality over s_q,
 *   kl = spread + scaled^2 / 2,  scaled = (mu - fused_mu) / s_q,  excess = ratio^2 - 1,  spread = excess / 2 - ln ratio
 */

/* A residual as a standard deviation; NaN stays. */
static inline REAL NAME(bounded)(REAL residual, REAL sigma_min) {
    const REAL size = residual < 0 ? -residual : residual;
    return size <= sigma_min ? sigma_min : size;
}

static inline REAL NAME(bounded_slope)(REAL residual, REAL sigma_min) {
    return residual > sigma_min ? 1 : residual < -sigma_min ? -1 : 0;
}

/* Some rows, as columns. */
typedef struct {
    int64_t stride;                 /* of columns */
    REAL mu[TILE], log_sigma[TILE]; /* [M, r] */
    REAL fused_mu[TILE];            /* [r] */
    REAL inverse[TILE];             /* [r] 1 / s_q */
    REAL other[TILE];               /* [r] fused_log_sigma, or target */
} NAME(normal_tile);

static void NAME(load_tile)(const normal_rows *t, int64_t n, int64_t rows, NAME(normal_tile) * tile) {
    const int64_t M = t->M;
    const REAL sigma_min = (REAL)t->sigma_min;
    tile->stride = TILE / M;
    NAME(columns_of)((const STORED *)t->mu + n * M, rows, M, tile->mu, tile->stride);
    NAME(load_all)((const STORED *)t->fused_mu + n, rows, tile->fused_mu);
    if (t->target) {
        NAME(load_all)((const STORED *)t->target + n, rows, tile->other);
        for (int64_t r = 0; r < rows; r++)
            tile->inverse[r] = 1 / NAME(bounded)(tile->other[r] - tile->fused_mu[r], sigma_min);
    } else {
        NAME(columns_of)((const STORED *)t->log_sigma + n * M, rows, M, tile->log_sigma, tile->stride);
        NAME(load_all)((const STORED *)t->fused_log_sigma + n, rows, tile->other);
        for (int64_t r = 0; r < rows; r++) tile->inverse[r] = OF_REAL(exp)(-tile->other[r]);
    }
}

static mmbal_status NAME(normal_kl_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const normal_rows *t = context;
    const int64_t M = t->M, most = TILE / M;
    const REAL sigma_min = (REAL)t->sigma_min;
    NAME(normal_tile) tile;
    for (int64_t n = begin; n < end; n += most) {
        const int64_t rows = end - n < most ? end - n : most;
        NAME(load_tile)(t, n, rows, &tile);
        const int64_t left = end - n - rows, next = (left < most ? left : most) * M * (int64_t)sizeof(STORED);
        for (int64_t m = 0; m < M; m++) {
            REAL *restrict mu = tile.mu + m * most, *restrict log_sigma = tile.log_sigma + m * most;
            fetch_part((const STORED *)t->mu + (n + rows) * M, next, m, M, 0);
            if (t->log_sigma) fetch_part((const STORED *)t->log_sigma + (n + rows) * M, next, m, M, 0);
            fetch_part((REAL *)t->kl + n * M, rows * M * (int64_t)sizeof(REAL), m, M, 1);
            if (t->target) {
                for (int64_t r = 0; r < rows; r++) {
                    const REAL ratio = NAME(bounded)(tile.other[r] - mu[r], sigma_min) * tile.inverse[r];
                    const REAL spread = (REAL)0.5 * (ratio - 1) * (ratio + 1) - OF_REAL(log)(ratio);
                    log_sigma[r] = ratio < INFINITY ? spread : ratio;
                }
            } else {
                for (int64_t r = 0; r < rows; r++)
                    log_sigma[r] = (REAL)0.5 * OF_REAL(exp_beyond_linear)(2 * (log_sigma[r] - tile.other[r]));
            }
            for (int64_t r = 0; r < rows; r++) {
                const REAL scaled = (mu[r] - tile.fused_mu[r]) * tile.inverse[r];
                const REAL kl = log_sigma[r] + (REAL)0.5 * scaled * scaled;
                mu[r] = kl < 0 ? 0 : kl;
            }
        }
        NAME(real_rows_of)(tile.mu, most, rows, M, (REAL *)t->kl + n * M);
    }
    return MMBAL_OK;
}

static mmbal_status NAME(normal_kl_backward_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const normal_rows *t = context;
    const int64_t M = t->M, most = TILE / M;
    const REAL sigma_min = (REAL)t->sigma_min;
    NAME(normal_tile) tile;
    REAL dkl[TILE], along_sum[TILE], width_sum[TILE];
    for (int64_t n = begin; n < end; n += most) {
        const int64_t rows = end - n < most ? end - n : most;
        NAME(load_tile)(t, n, rows, &tile);
        NAME(real_columns_of)((const REAL *)t->dkl + n * M, rows, M, dkl, most);
        for (int64_t r = 0; r < rows; r++) along_sum[r] = width_sum[r] = 0;
        for (int64_t m = 0; m < M; m++) {
            REAL *restrict mu = tile.mu + m * most, *restrict log_sigma = tile.log_sigma + m * most;
            for (int64_t r = 0; r < rows; r++) {
                const REAL c = dkl[m * most + r], inverse = tile.inverse[r];
                const REAL scaled = (mu[r] - tile.fused_mu[r]) * inverse;
                REAL excess, turned = 0;
                if (t->target) {
                    const REAL residual = tile.other[r] - mu[r], sigma = NAME(bounded)(residual, sigma_min);
                    const REAL ratio = sigma * inverse;
                    excess = (ratio - 1) * (ratio + 1);
                    turned = c * excess / sigma * NAME(bounded_slope)(residual, sigma_min);
                } else {
                    const REAL log_ratio = 2 * (log_sigma[r] - tile.other[r]);
                    excess = OF_REAL(exp_beyond_linear)(log_ratio) + log_ratio;
                }
                /* No gradient passes an entry without one, whatever it holds: a missing modality may hold NaN. */
                const REAL along = c == 0 ? 0 : c * scaled * inverse, width = c == 0 ? 0 : c * excess;
                along_sum[r] += along;
                width_sum[r] += c == 0 ? 0 : width + c * scaled * scaled;
                mu[r] = c == 0 ? 0 : along - turned;
                log_sigma[r] = width;
            }
        }
        if (t->dmu) NAME(rows_of)(tile.mu, most, rows, M, (STORED *)t->dmu + n * M);
        if (t->dlog_sigma) NAME(rows_of)(tile.log_sigma, most, rows, M, (STORED *)t->dlog_sigma + n * M);
        for (int64_t r = 0; r < rows && t->dfused_mu; r++) {
            const REAL residual = tile.other[r] - tile.fused_mu[r];
            const REAL turned =
                t->target ? width_sum[r] * tile.inverse[r] * NAME(bounded_slope)(residual, sigma_min) : 0;
            ((STORED *)t->dfused_mu)[n + r] = STORE(turned - along_sum[r]);
        }
        for (int64_t r = 0; r < rows && t->dfused_log_sigma; r++)
            ((STORED *)t->dfused_log_sigma)[n + r] = STORE(-width_sum[r]);
    }
    return MMBAL_OK;
}
