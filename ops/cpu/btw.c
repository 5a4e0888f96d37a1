#include "mmbal/btw.h"

#include <math.h>
#include <string.h>

#include "rows.h"

static int64_t count_chunks(int64_t N) { return (N + ROWS_PER_CHUNK - 1) / ROWS_PER_CHUNK; }

static mmbal_status check_weights(mmbal_dtype dtype, const double *mi, int64_t N, int64_t M, mmbal_btw_options o) {
    if (!is_dtype(dtype)) return MMBAL_UNSUPPORTED;
    const int known = o.mode == MMBAL_BTW_DIVERGE || o.mode == MMBAL_BTW_AGREE;
    if (N < 0 || M < 1 || M > MMBAL_MAX_MODALITIES || !known) return MMBAL_INVALID_ARGUMENT;
    if (!(o.floor >= MMBAL_BTW_LEAST) || !(o.ceiling >= o.floor) || !(o.ceiling <= MMBAL_BTW_MOST))
        return MMBAL_INVALID_ARGUMENT;
    if (!(o.temperature >= MMBAL_BTW_LEAST && o.temperature <= MMBAL_BTW_MOST)) return MMBAL_INVALID_ARGUMENT;
    for (int64_t m = 0; m < M; m++)
        if (!isfinite(mi[m])) return MMBAL_INVALID_ARGUMENT;
    return MMBAL_OK;
}

mmbal_status mmbal_btw_weights(mmbal_dtype dtype, const void *kl, const double *mi, const uint8_t *present, int64_t N,
                               int64_t M, mmbal_btw_options options, void *weights, const mmbal_pool *pool) {
    const mmbal_status status = check_weights(dtype, mi, N, M, options);
    if (status != MMBAL_OK) return status;
    weight_rows rows = {.kl = kl, .mi = mi, .present = present, .N = N, .M = M, .options = &options};
    rows.weights = weights;
    return pool->run(pool->self, N, rows_per_task(N, M, pool), mmbal_row_tasks_in_use()->weights[dtype], &rows);
}

int64_t mmbal_btw_weights_backward_workspace(int64_t N, int64_t M) {
    return count_chunks(N) * M * (int64_t)sizeof(double);
}

mmbal_status mmbal_btw_weights_backward(mmbal_dtype dtype, const void *dweights, const void *kl, const double *mi,
                                        const uint8_t *present, int64_t N, int64_t M, mmbal_btw_options options,
                                        void *dkl, double *dmi, void *workspace, const mmbal_pool *pool) {
    const mmbal_status status = check_weights(dtype, mi, N, M, options);
    if (status != MMBAL_OK) return status;
    weight_rows rows = {.kl = kl, .mi = mi, .present = present, .N = N, .M = M, .options = &options};
    rows.dweights = dweights, rows.dkl = dkl, rows.dmi_parts = dmi ? workspace : NULL;
    const int64_t chunks = count_chunks(N);
    const mmbal_status run = pool->run(pool->self, chunks, 1, mmbal_row_tasks_in_use()->weights_backward[dtype], &rows);
    for (int64_t m = 0; m < M && dmi; m++) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < chunks; chunk++) sum += rows.dmi_parts[chunk * M + m];
        dmi[m] = mi[m] > options.floor ? sum / mi[m] : 0;
    }
    return run;
}

typedef struct {
    void *table;         /* [S, M] */
    const void *weights; /* [N, M] */
    const int64_t *index;
    int64_t M;
    double alpha;
} averaged_rows;

static mmbal_status average_rows_f32(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const averaged_rows *t = context;
    const float alpha = (float)t->alpha, rest = (float)(1 - t->alpha);
    for (int64_t n = begin; n < end; n++) {
        float *row = (float *)t->table + t->index[n] * t->M;
        const float *weights = (const float *)t->weights + n * t->M;
        for (int64_t m = 0; m < t->M; m++) row[m] = alpha * weights[m] + rest * row[m];
    }
    return MMBAL_OK;
}

static mmbal_status average_rows_f64(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const averaged_rows *t = context;
    const double alpha = t->alpha, rest = 1 - t->alpha;
    for (int64_t n = begin; n < end; n++) {
        double *row = (double *)t->table + t->index[n] * t->M;
        const double *weights = (const double *)t->weights + n * t->M;
        for (int64_t m = 0; m < t->M; m++) row[m] = alpha * weights[m] + rest * row[m];
    }
    return MMBAL_OK;
}

int64_t mmbal_ema_rows_workspace(int64_t S) { return S; }

mmbal_status mmbal_ema_rows(mmbal_dtype dtype, void *table, const int64_t *index, const void *weights, int64_t S,
                            int64_t N, int64_t M, double alpha, void *workspace, const mmbal_pool *pool) {
    if (S < 0 || N < 0 || M < 1 || !(alpha >= 0 && alpha <= 1)) return MMBAL_INVALID_ARGUMENT;
    if (dtype != MMBAL_F32 && dtype != MMBAL_F64) return MMBAL_UNSUPPORTED;
    uint8_t *named = workspace;
    memset(named, 0, (size_t)S);
    for (int64_t n = 0; n < N; n++) {
        if (index[n] < 0 || index[n] >= S) return MMBAL_INVALID_INDEX;
        if (named[index[n]]) return MMBAL_DUPLICATE_INDEX;
        named[index[n]] = 1;
    }
    averaged_rows rows = {table, weights, index, M, alpha};
    return pool->run(pool->self, N, rows_per_task(N, M, pool), dtype == MMBAL_F64 ? average_rows_f64 : average_rows_f32,
                     &rows);
}

static int column_is_served(mmbal_dtype dtype, int64_t m, int64_t N, int64_t M, int64_t d) {
    return is_dtype(dtype) && N >= 0 && d >= 0 && m >= 0 && m < M && M <= MMBAL_MAX_MODALITIES;
}

mmbal_status mmbal_scale_modality(mmbal_dtype dtype, const void *h, const void *weights, int64_t m, int64_t N,
                                  int64_t M, int64_t d, void *scaled, const mmbal_pool *pool) {
    if (!column_is_served(dtype, m, N, M, d)) return MMBAL_INVALID_ARGUMENT;
    embedding_rows rows = {.h = h, .weights = weights, .m = m, .M = M, .d = d, .scaled = scaled};
    return pool->run(pool->self, N, rows_per_task(N, d + 1, pool), mmbal_row_tasks_in_use()->scale[dtype], &rows);
}

mmbal_status mmbal_scale_modality_dweights(mmbal_dtype dtype, const void *dscaled, const void *h, int64_t m, int64_t N,
                                           int64_t M, int64_t d, void *dweights, const mmbal_pool *pool) {
    if (!column_is_served(dtype, m, N, M, d)) return MMBAL_INVALID_ARGUMENT;
    embedding_rows rows = {.h = h, .dscaled = dscaled, .m = m, .M = M, .d = d, .dweights = dweights};
    return pool->run(pool->self, N, rows_per_task(N, d + 1, pool), mmbal_row_tasks_in_use()->scale_dweights[dtype],
                     &rows);
}
