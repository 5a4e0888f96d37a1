#include "mmbal/attribution.h"

#include <math.h>
#include <stddef.h>

#include "rows.h"

mmbal_status mmbal_check_attribution(const mmbal_attribution *t) {
    const mmbal_attribution_options o = t->options;
    if (!is_dtype(t->dtype)) return MMBAL_UNSUPPORTED;
    if (t->B < 0 || t->M < 1 || t->M > MMBAL_MAX_MODALITIES) return MMBAL_INVALID_ARGUMENT;
    if (t->target_rows != 1 && t->target_rows != t->B) return MMBAL_INVALID_ARGUMENT;
    if ((o.pool != MMBAL_POOL_L2 && o.pool != MMBAL_POOL_RMS) || !(o.eps >= 0 && o.eps < 1))
        return MMBAL_INVALID_ARGUMENT;
    if (o.penalty != MMBAL_L1 && o.penalty != MMBAL_SQUARED && o.penalty != MMBAL_HUBER) return MMBAL_INVALID_ARGUMENT;
    for (int64_t m = 0; m < t->M; m++)
        if (t->modalities[m].d < 1) return MMBAL_INVALID_ARGUMENT;
    for (int64_t i = 0; i < t->target_rows * t->M; i++)
        if (!(t->target[i] >= 0 && isfinite(t->target[i]))) return MMBAL_INVALID_ARGUMENT;
    for (int64_t b = 0; b < t->B; b++) {
        const double *target = t->target + (t->target_rows == 1 ? 0 : b * t->M);
        double asked = 0;
        int present = 0;
        for (int64_t m = 0; m < t->M; m++) {
            if (t->present && !t->present[b * t->M + m]) continue;
            asked += target[m], present = 1;
        }
        if (present && !(asked > 0 && isfinite(asked))) return MMBAL_INVALID_ARGUMENT;
    }
    return MMBAL_OK;
}

static mmbal_status run(mmbal_task *const *tasks, const mmbal_attribution *t, attributed_rows *rows,
                        const mmbal_pool *pool) {
    const mmbal_status status = mmbal_check_attribution(t);
    if (status != MMBAL_OK) return status;
    int64_t width = 0;
    for (int64_t m = 0; m < t->M; m++) width += t->modalities[m].d;
    rows->attribution = t;
    return pool->run(pool->self, t->B, rows_per_task(t->B, width, pool), tasks[t->dtype], rows);
}

mmbal_status mmbal_attribution_reg(const mmbal_attribution *attribution, void *reg, void *shares, void *magnitudes,
                                   const mmbal_pool *pool) {
    attributed_rows rows = {.reg = reg, .shares = shares, .magnitudes = magnitudes};
    return run(mmbal_row_tasks_in_use()->attribution, attribution, &rows, pool);
}

mmbal_status mmbal_attribution_reg_backward(const mmbal_attribution *attribution, const void *dreg, const void *dshares,
                                            const void *dmagnitudes, const void *magnitudes, const mmbal_pool *pool) {
    attributed_rows rows = {.dreg = dreg, .dshares = dshares, .dmagnitudes = dmagnitudes};
    rows.magnitudes = (void *)magnitudes; /* read */
    return run(mmbal_row_tasks_in_use()->attribution_backward, attribution, &rows, pool);
}

mmbal_status mmbal_attribution_reg_backward_backward(const mmbal_attribution *attribution, const void *dreg,
                                                     const void *dshares, const void *dmagnitudes,
                                                     const void *magnitudes, void *ddreg, void *ddshares,
                                                     void *ddmagnitudes, const mmbal_pool *pool) {
    attributed_rows rows = {.dreg = dreg, .dshares = dshares, .dmagnitudes = dmagnitudes};
    rows.magnitudes = (void *)magnitudes; /* read */
    rows.ddreg = ddreg, rows.ddshares = ddshares, rows.ddmagnitudes = ddmagnitudes;
    return run(mmbal_row_tasks_in_use()->attribution_second, attribution, &rows, pool);
}
