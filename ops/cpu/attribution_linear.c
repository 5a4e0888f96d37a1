#include <math.h>
#include <stddef.h>

#include "arena.h"
#include "bfloat16.h"
#include "float16.h"
#include "mmbal/attribution.h"
#include "rows.h"

/* Scratch memory of a call, all real: coefficients and zeta [B, C], and of each modality g, which becomes v, and e. */
typedef struct {
    void *coefficients, *zeta;
    void *gradients[MMBAL_MAX_MODALITIES], *embeddings[MMBAL_MAX_MODALITIES];
} linear_scratch;

static int64_t real_size(mmbal_dtype dtype) { return dtype == MMBAL_F64 ? 8 : 4; }
static int is_real(mmbal_dtype dtype) { return dtype == MMBAL_F64 || dtype == MMBAL_F32; }

static int64_t lay_out(const mmbal_attribution *t, int64_t C, arena *from, linear_scratch *scratch) {
    const int64_t size = real_size(t->dtype);
    scratch->coefficients = carve(from, t->B * C * size), scratch->zeta = carve(from, t->B * C * size);
    for (int64_t m = 0; m < t->M && m < MMBAL_MAX_MODALITIES; m++) { /* sizes are not checked yet */
        const mmbal_attributed *of = &t->modalities[m];
        scratch->gradients[m] = carve(from, t->B * of->d * size);
        scratch->embeddings[m] = is_real(t->dtype) ? (void *)of->embedding : carve(from, t->B * of->d * size);
    }
    return bytes_carved(from);
}

int64_t mmbal_attribution_linear_workspace(const mmbal_attribution *attribution, int64_t C) {
    linear_scratch scratch;
    return lay_out(attribution, C, &(arena){0}, &scratch);
}

static mmbal_status check_head(const mmbal_attribution *t, const mmbal_linear_head *head) {
    if (head->C < 1 || (head->score != MMBAL_SCORE_ODDS && head->score != MMBAL_SCORE_LOGIT))
        return MMBAL_INVALID_ARGUMENT;
    for (int64_t b = 0; b < t->B && head->classes; b++)
        if (head->classes[b] < 0 || head->classes[b] >= head->C) return MMBAL_INVALID_INDEX;
    return MMBAL_OK;
}

/* dbias, rounded to its dtype once. */
static void sum_zeta(const linear_rows *rows, mmbal_dtype dtype, void *dbias) {
    const int64_t B = rows->attribution->B, C = rows->head->C;
    for (int64_t c = 0; c < C; c++) {
        double sum = 0;
        for (int64_t b = 0; b < B; b++)
            sum += dtype == MMBAL_F64 ? ((const double *)rows->zeta)[b * C + c]
                                      : (double)((const float *)rows->zeta)[b * C + c];
        switch (dtype) {
        case MMBAL_F64: ((double *)dbias)[c] = sum; break;
        case MMBAL_F32: ((float *)dbias)[c] = (float)sum; break;
        case MMBAL_BF16: ((bfloat16 *)dbias)[c] = bfloat16_of_float((float)sum); break;
        case MMBAL_F16: ((float16 *)dbias)[c] = float16_of_float((float)sum); break;
        }
    }
}

mmbal_status mmbal_attribution_linear(const mmbal_attribution *attribution, const mmbal_linear_head *head,
                                      const void *dreg, void *reg, void *shares, void *magnitudes,
                                      void *const *dweights, void *dbias, void *workspace, const mmbal_pool *pool) {
    const int64_t B = attribution->B, M = attribution->M, C = head->C;
    const mmbal_dtype dtype = attribution->dtype;
    mmbal_status status = mmbal_check_attribution(attribution);
    if (status == MMBAL_OK) status = check_head(attribution, head);
    if (status != MMBAL_OK) return status;
    linear_scratch scratch;
    lay_out(attribution, C, &(arena){(uintptr_t)workspace}, &scratch);
    mmbal_attributed real_modalities[MMBAL_MAX_MODALITIES];
    mmbal_attribution real = *attribution;
    real.modalities = real_modalities, real.dtype = dtype == MMBAL_F64 ? MMBAL_F64 : MMBAL_F32;
    int64_t width = 0;
    for (int64_t m = 0; m < M; m++) {
        real_modalities[m] = (mmbal_attributed){.gradient = scratch.gradients[m],
                                                .embedding = scratch.embeddings[m],
                                                .d = attribution->modalities[m].d,
                                                .dgradient = scratch.gradients[m]}; /* element by element in place */
        width += attribution->modalities[m].d;
    }
    linear_rows rows = {.attribution = attribution, .head = head, .dweights = dweights};
    rows.coefficients = scratch.coefficients, rows.zeta = scratch.zeta;
    rows.gradients = scratch.gradients, rows.embeddings = scratch.embeddings;
    const mmbal_row_tasks *tasks = mmbal_row_tasks_in_use();
    const int64_t few = rows_per_task(B, width + C, pool);
    status = pool->run(pool->self, B, few, tasks->linear_scores[dtype], &rows);
    for (rows.m = 0; rows.m < M && status == MMBAL_OK; rows.m++)
        status = pool->run(pool->self, (B + LINEAR_ROWS - 1) / LINEAR_ROWS, 1, tasks->linear_gradients[dtype], &rows);
    if (status == MMBAL_OK) status = mmbal_attribution_reg(&real, reg, shares, magnitudes, pool);
    if (status == MMBAL_OK) status = mmbal_attribution_reg_backward(&real, dreg, NULL, NULL, magnitudes, pool);
    if (status == MMBAL_OK) status = pool->run(pool->self, B, 1, tasks->linear_zeta[dtype], &rows);
    for (rows.m = 0; rows.m < M && status == MMBAL_OK; rows.m++)
        status = pool->run(pool->self, (C + LINEAR_ROWS - 1) / LINEAR_ROWS, 1, tasks->linear_weights[dtype], &rows);
    if (status == MMBAL_OK) sum_zeta(&rows, dtype, dbias);
    return status;
}
