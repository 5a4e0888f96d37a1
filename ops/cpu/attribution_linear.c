#include <math.h>
#include <stddef.h>
#include <string.h>

#include "arena.h"
#include "kernels.h"
#include "mmbal/attribution.h"
#include "rows.h"

enum {
    MOST_TILE_ROWS = 14, /* of any instruction set, docs/kernels.md */
    MOST_TILE_COLS = 32,
    LINEAR_PANELS = 4 /* of dW at a time: 512 bytes of a row, so that a page is not opened for two lines */
};

/* Shapes with T = wide, the columns of a tile; all real. */
typedef struct {
    const mmbal_attribution *attribution;
    const mmbal_linear_head *head;
    const mmbal_kernels *kernels;
    int64_t wide, depth;                    /* of dW: 2 B, or B where zeta is 0 */
    int has_zeta;                           /* 0: it is 0, of a logit or one class */
    void *coefficients;                     /* [B, C] */
    void *zeta;                             /* [B, C], rows of whole panels */
    void *factors;                          /* [C, 2 B]: both of them turned, rows factor_stride apart */
    void *panels;                           /* [workers, LINEAR_PANELS, 2 B, T], panel_elements each */
    void *gradients[MMBAL_MAX_MODALITIES];  /* [B, d], rows gradient_strides apart: g, which becomes v */
    void *embeddings[MMBAL_MAX_MODALITIES]; /* [B, d] */
    void *packed[MMBAL_MAX_MODALITIES];     /* [panels of d][C, T]: W */
    void *turned[MMBAL_MAX_MODALITIES];     /* [panels of C][d, T]: W^T */
    void *const *dweights;
    int64_t gradient_strides[MMBAL_MAX_MODALITIES], factor_stride, panel_elements;
    int64_t height; /* samples of a piece of work */
    mmbal_task *scores_task, *forward_task, *backward_task;
    linear_rows *scores;
    attributed_rows *reg;
} linear_products;

/* Columns first .. first + count of modality m. */
typedef struct {
    int64_t m, d, first, count;
} columns;

static columns columns_of(const linear_products *t, int64_t index, int64_t panels) {
    const int64_t width = panels * t->wide;
    for (int64_t m = 0;; m++) {
        const int64_t d = t->attribution->modalities[m].d, pieces = ceil_div(d, width);
        if (index < pieces) return (columns){m, d, index * width, least(width, d - index * width)};
        index -= pieces;
    }
}

static int64_t count_columns(const linear_products *t, int64_t panels) {
    int64_t pieces = 0;
    for (int64_t m = 0; m < t->attribution->M; m++)
        pieces += ceil_div(t->attribution->modalities[m].d, panels * t->wide);
    return pieces;
}

static int64_t weight_stride(const mmbal_linear_head *head, int64_t d) {
    return head->row_stride > 0 ? head->row_stride : d;
}

#define BODY "attribution_products_body.h"
#include "each_dtype.h"
#undef BODY

static int is_real(mmbal_dtype dtype) { return dtype == MMBAL_F64 || dtype == MMBAL_F32; }

static int64_t lay_out(const mmbal_attribution *t, int64_t C, int workers, arena *from, linear_products *p) {
    const int64_t size = t->dtype == MMBAL_F64 ? 8 : 4, line = CACHE_LINE / size, B = t->B;
    p->kernels = mmbal_kernels_in_use();
    p->wide = t->dtype == MMBAL_F64 ? p->kernels->tile_cols_f64 : p->kernels->tile_cols_f32;
    const int64_t classes = ceil_div(C, p->wide) * p->wide;
    p->factor_stride = (ceil_div(2 * B, line) | 1) * line; /* rows of a tile never meet in one set of a cache */
    p->panel_elements = 2 * B * p->wide;
    p->coefficients = carve(from, B * C * size), p->zeta = carve(from, B * classes * size);
    p->factors = carve(from, C * p->factor_stride * size);
    p->panels = carve(from, workers * LINEAR_PANELS * p->panel_elements * size);
    for (int64_t m = 0; m < t->M && m < MMBAL_MAX_MODALITIES; m++) { /* sizes are not checked yet */
        const int64_t d = t->modalities[m].d, whole = ceil_div(d, p->wide) * p->wide;
        p->gradient_strides[m] = (ceil_div(whole, line) | 1) * line;
        p->gradients[m] = carve(from, B * p->gradient_strides[m] * size);
        p->embeddings[m] = is_real(t->dtype) ? (void *)t->modalities[m].embedding : carve(from, B * d * size);
        p->packed[m] = carve(from, C * whole * size), p->turned[m] = carve(from, classes * d * size);
    }
    return bytes_carved(from);
}

int64_t mmbal_attribution_linear_workspace(const mmbal_attribution *attribution, int64_t C, const mmbal_pool *pool) {
    linear_products products;
    return lay_out(attribution, C, pool->workers, &(arena){0}, &products);
}

static mmbal_status check_head(const mmbal_attribution *t, const mmbal_linear_head *head) {
    if (head->C < 1 || (head->score != MMBAL_SCORE_ODDS && head->score != MMBAL_SCORE_LOGIT))
        return MMBAL_INVALID_ARGUMENT;
    for (int64_t m = 0; m < t->M; m++)
        if (head->row_stride != 0 && head->row_stride < t->modalities[m].d) return MMBAL_INVALID_ARGUMENT;
    for (int64_t b = 0; b < t->B && head->classes; b++)
        if (head->classes[b] < 0 || head->classes[b] >= head->C) return MMBAL_INVALID_INDEX;
    return MMBAL_OK;
}

static mmbal_status multiply(linear_products *products, void *dbias, mmbal_dtype dtype, const mmbal_pool *pool) {
    RETURN_FOR_DTYPE(dtype, multiply_linear, products, dbias, pool);
}

mmbal_status mmbal_attribution_linear(const mmbal_attribution *attribution, const mmbal_linear_head *head,
                                      const void *dreg, void *reg, void *shares, void *magnitudes,
                                      void *const *dweights, void *dbias, void *workspace, const mmbal_pool *pool) {
    mmbal_status status = mmbal_check_attribution(attribution);
    if (status == MMBAL_OK) status = check_head(attribution, head);
    if (status != MMBAL_OK) return status;
    const mmbal_dtype dtype = attribution->dtype, real_dtype = dtype == MMBAL_F64 ? MMBAL_F64 : MMBAL_F32;
    linear_products products = {.attribution = attribution, .head = head, .dweights = dweights};
    products.has_zeta = head->score == MMBAL_SCORE_ODDS && head->C > 1;
    products.depth = attribution->B * (products.has_zeta ? 2 : 1);
    lay_out(attribution, head->C, pool->workers, &(arena){(uintptr_t)workspace}, &products);
    mmbal_attributed modalities[MMBAL_MAX_MODALITIES];
    for (int64_t m = 0; m < attribution->M; m++)
        modalities[m] = (mmbal_attributed){.gradient = products.gradients[m],
                                           .embedding = products.embeddings[m],
                                           .d = attribution->modalities[m].d,
                                           .dgradient = products.gradients[m]}; /* element by element in place */
    mmbal_attribution real = *attribution;
    real.modalities = modalities, real.dtype = real_dtype;
    linear_rows scores = {attribution, head, products.coefficients, products.embeddings};
    attributed_rows rows = {.attribution = &real,
                            .dreg = dreg,
                            .reg = reg,
                            .shares = shares,
                            .magnitudes = magnitudes,
                            .gradient_strides = products.gradient_strides};
    const mmbal_row_tasks *tasks = mmbal_row_tasks_in_use();
    products.scores = &scores, products.scores_task = tasks->linear_scores[dtype];
    products.reg = &rows, products.forward_task = tasks->attribution[real_dtype];
    products.backward_task = tasks->attribution_backward[real_dtype];
    return multiply(&products, dbias, dtype, pool);
}
