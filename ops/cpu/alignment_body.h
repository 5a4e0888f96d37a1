/* The products of the alignment loss for float32 and float64; see each_product.h and mmbal/alignment.h. */
#if STORED_IS_REAL
#include "gemm_body.h"

/* One call. A stripe is all rows by SIMILARITY_COLS columns, a block one of `height` of its rows. */
typedef struct {
    const mmbal_kernels *kernels;
    const mmbal_row_tasks *tasks;
    const mmbal_alignment *alignment;
    int64_t A, C, offset, end; /* own rows: offset .. end */
    int64_t tile_cols, depth_step, cols_at_once;
    int64_t height, row_blocks, stripes; /* height: rows of a block */
    int64_t unit_stride, turned_stride, dsource_stride, dtarget_stride;
    unit_rows source, target;
    OPERAND *target_panels; /* columns of the product of similarities: one candidate each */
    REAL *penalty;          /* [A] */
    REAL *z;                /* [workers, SIMILARITY_ROWS, z_stride] */
    int64_t z_stride;
    /* forward */
    REAL *row_largest, *row_sum; /* [stripes, A] */
    REAL *col_largest, *col_sum; /* [row_blocks, A] */
    REAL *diagonal;              /* [A], own ones */
    double *losses;              /* [B]: L + R of own rows */
    double *regression;          /* [B] */
    REAL *normalizers;           /* [2, B] */
    /* backward */
    similarity_weights weights;
    REAL *row_normalizer, *row_weight, *col_normalizer, *col_weight; /* what the weights point to */
    OPERAND *target_rows;            /* panels of the target's unit vectors as rows of a right factor */
    OPERAND *source_turned;          /* [C, turned_stride] */
    REAL *dsource;                   /* [A, dsource_stride] */
    REAL *dtarget;                   /* [C, dtarget_stride], transposed */
    OPERAND *gradient;               /* panels of the gradient of a stripe, A deep */
    REAL *lines;                     /* [workers, ROWS_TURNED_BACK, C] */
    int64_t stripe;                  /* the one under way */
    int64_t first_block, last_block; /* of its blocks, those that own rows or columns pass through */
} NAME(aligned);

enum { NAME(ROWS_TURNED_BACK) = CACHE_LINE / sizeof(REAL) };

static int64_t NAME(whole_tiles)(const NAME(aligned) * c, int64_t cols) {
    return ceil_div(cols, c->tile_cols) * c->tile_cols;
}

static void *NAME(carve_reals)(arena *from, int64_t count) { return carve(from, count * (int64_t)sizeof(REAL)); }

/* What forward and backward share. */
static NAME(aligned) NAME(begin)(const mmbal_alignment *t, int workers, arena *from) {
    const mmbal_kernels *kernels = mmbal_kernels_in_use();
    const blocking cut = mmbal_blocking_in_use();
    NAME(aligned) c = {.kernels = kernels, .tasks = mmbal_row_tasks_in_use(), .alignment = t};
    c.A = t->A, c.C = t->C, c.offset = t->offset, c.end = t->offset + t->B;
    c.tile_cols = kernels->OF_OPERAND(tile_cols);
    c.depth_step = cut.depth_bytes / (int64_t)sizeof(OPERAND), c.cols_at_once = cut.cols;
    c.height = block_height_of(c.A, c.kernels->OF_OPERAND(tile_rows));
    c.row_blocks = ceil_div(c.A, c.height), c.stripes = ceil_div(c.A, SIMILARITY_COLS);
    c.unit_stride = NAME(row_stride)(c.C), c.z_stride = NAME(row_stride)(SIMILARITY_COLS);
    const unit_rows rows = {.present = t->present, .width = c.C, .stride = c.unit_stride};
    c.source = rows, c.source.x = t->source_embedding;
    c.target = rows, c.target.x = t->target_embedding;
    c.source.unit = NAME(carve_reals)(from, c.A * c.unit_stride);
    c.target.unit = NAME(carve_reals)(from, c.A * c.unit_stride);
    c.source.inverse = carve(from, c.A * (int64_t)sizeof(double));
    c.target.inverse = carve(from, c.A * (int64_t)sizeof(double));
    c.target_panels = carve(from, NAME(panel_elements)(kernels, c.A, c.C) * (int64_t)sizeof(OPERAND));
    c.penalty = NAME(carve_reals)(from, c.A);
    c.z = NAME(carve_reals)(from, workers * c.height * c.z_stride);
    return c;
}

static void NAME(forward_workspace)(NAME(aligned) * c, arena *from) {
    c->row_largest = NAME(carve_reals)(from, c->stripes * c->A),
    c->row_sum = NAME(carve_reals)(from, c->stripes * c->A);
    c->col_largest = NAME(carve_reals)(from, c->row_blocks * c->A);
    c->col_sum = NAME(carve_reals)(from, c->row_blocks * c->A);
    c->diagonal = NAME(carve_reals)(from, c->A);
    c->losses = carve(from, c->alignment->B * (int64_t)sizeof(double));
    c->regression = carve(from, c->alignment->B * (int64_t)sizeof(double));
}

static void NAME(backward_workspace)(NAME(aligned) * c, const mmbal_alignment_gradients *to, int workers, arena *from) {
    c->row_normalizer = NAME(carve_reals)(from, c->A), c->row_weight = NAME(carve_reals)(from, c->A);
    c->col_normalizer = NAME(carve_reals)(from, c->A), c->col_weight = NAME(carve_reals)(from, c->A);
    if (to->source_embedding) {
        c->dsource_stride = NAME(whole_tiles)(c, c->C);
        c->target_rows = carve(from, NAME(panel_elements)(c->kernels, c->C, c->A) * (int64_t)sizeof(OPERAND));
        c->dsource = NAME(carve_reals)(from, c->A * c->dsource_stride);
    }
    if (to->target_embedding) {
        c->dtarget_stride = NAME(whole_tiles)(c, c->A), c->turned_stride = NAME(row_stride)(c->A);
        c->source_turned = carve(from, c->C * c->turned_stride * (int64_t)sizeof(OPERAND));
        c->dtarget = NAME(carve_reals)(from, c->C * c->dtarget_stride);
        c->gradient = carve(from, NAME(whole_tiles)(c, SIMILARITY_COLS) * c->A * (int64_t)sizeof(OPERAND));
        c->lines = NAME(carve_reals)(from, workers * NAME(ROWS_TURNED_BACK) * c->C);
    }
}

/* Panel by panel. */
static mmbal_status NAME(pack_targets_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(aligned) *c = context;
    for (int64_t panel = begin; panel < end; panel++) {
        const int64_t first = panel * c->tile_cols;
        const NAME(weights) b = {(const REAL *)c->target.unit + first * c->unit_stride, c->unit_stride, 1, NULL};
        NAME(pack_all)(c->kernels, b, c->C, least(c->tile_cols, c->A - first), c->target_panels + first * c->C);
    }
    return MMBAL_OK;
}

static mmbal_status NAME(pack_target_rows_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(aligned) *c = context;
    for (int64_t panel = begin; panel < end; panel++) {
        const int64_t first = panel * c->tile_cols;
        const NAME(weights) b = {(const REAL *)c->target.unit + first, c->unit_stride, 0, NULL};
        NAME(pack_all)(c->kernels, b, c->A, least(c->tile_cols, c->C - first), c->target_rows + first * c->A);
    }
    return MMBAL_OK;
}

/* Unit vectors, their panels, and who is a candidate. */
static mmbal_status NAME(prepare)(NAME(aligned) * c, const mmbal_pool *pool) {
    mmbal_task *unit = c->tasks->unit[c->alignment->dtype];
    const int64_t few = rows_per_task(c->A, c->C, pool);
    for (int64_t a = 0; a < c->A; a++)
        c->penalty[a] = c->alignment->present && !c->alignment->present[a] ? -(REAL)INFINITY : 0;
    mmbal_status status = pool->run(pool->self, c->A, few, unit, &c->source);
    if (status == MMBAL_OK) status = pool->run(pool->self, c->A, few, unit, &c->target);
    if (status == MMBAL_OK) status = pool->run(pool->self, ceil_div(c->A, c->tile_cols), 1, NAME(pack_targets_task), c);
    return status;
}

/* c[rows, cols] = a b over the depth, cols a few at a time so that their panels stay in the second-level cache. */
static void NAME(multiply_by_columns)(const NAME(aligned) * c, int64_t rows, int64_t cols, int64_t depth,
                                      const OPERAND *a, int64_t a_stride, NAME(panels) b, REAL *to, int64_t to_stride,
                                      tile_result first) {
    for (int64_t col = 0; col < cols; col += c->cols_at_once)
        for (int64_t from = 0; from < depth; from += c->depth_step) {
            fetches ahead = {.later = {.pace = 0}};
            NAME(panels) here = b;
            here.data += col / c->tile_cols * b.panel + from * b.stride;
            NAME(multiply_panels)(c->kernels, rows, least(c->cols_at_once, cols - col),
                                  least(c->depth_step, depth - from), a + from, a_stride, rows, here, to + col,
                                  to_stride, from > 0 ? TILE_ADD : first, &ahead);
        }
}

static similarity_block NAME(block_at)(const NAME(aligned) * c, int64_t row_block, int64_t stripe, int worker) {
    const int64_t row = row_block * c->height, col = stripe * SIMILARITY_COLS;
    const similarity_block part = {.z = c->z + worker * c->height * c->z_stride,
                                   .rows = least(c->height, c->A - row),
                                   .cols = least(SIMILARITY_COLS, c->A - col),
                                   .stride = c->z_stride,
                                   .row = row,
                                   .col = col,
                                   .inverse_tau = 1 / c->alignment->tau,
                                   .penalty = c->penalty,
                                   .groups = c->alignment->groups};
    return part;
}

static int NAME(has_own)(const NAME(aligned) * c, int64_t first, int64_t count) {
    return first < c->end && first + count > c->offset;
}

/* The logits of a part. */
static void NAME(take_similarities)(const NAME(aligned) * c, const similarity_block *part) {
    const NAME(panels) b = NAME(packed_panels)(c->kernels, c->target_panels + part->col * c->C, c->C);
    NAME(multiply_by_columns)(c, part->rows, part->cols, c->C,
                              (const REAL *)c->source.unit + part->row * c->unit_stride, c->unit_stride, b, part->z,
                              part->stride, TILE_SET);
    c->tasks->similarity_logits[sizeof(REAL) == sizeof(double)](part);
}

static mmbal_status NAME(statistics_task)(void *context, int worker, int64_t begin, int64_t end) {
    const NAME(aligned) *c = context;
    const int is_double = sizeof(REAL) == sizeof(double);
    for (int64_t index = begin; index < end; index++) {
        const int64_t row_block = index % c->row_blocks, stripe = index / c->row_blocks;
        const similarity_block part = NAME(block_at)(c, row_block, stripe, worker);
        const int own_rows = NAME(has_own)(c, part.row, part.rows), own_cols = NAME(has_own)(c, part.col, part.cols);
        if (!own_rows && !(own_cols && c->alignment->symmetric)) continue;
        NAME(take_similarities)(c, &part);
        if (own_rows) {
            const int64_t at = stripe * c->A + part.row;
            c->tasks->similarity_rows[is_double](&part, c->row_largest + at, c->row_sum + at);
        }
        if (own_cols && c->alignment->symmetric) {
            const int64_t at = row_block * c->A + part.col;
            c->tasks->similarity_cols[is_double](&part, c->col_largest + at, c->col_sum + at);
        }
        for (int64_t i = 0; i < part.rows; i++)
            if (part.row + i >= part.col && part.row + i < part.col + part.cols)
                c->diagonal[part.row + i] = ((const REAL *)part.z)[i * part.stride + part.row + i - part.col];
    }
    return MMBAL_OK;
}

/* logsumexp of parts, `stride` apart, in their order */
static double NAME(logsumexp_of_parts)(const REAL *largest, const REAL *sums, int64_t parts, int64_t stride) {
    double top = -(double)INFINITY, sum = 0;
    for (int64_t p = 0; p < parts; p++) top = (double)largest[p * stride] > top ? (double)largest[p * stride] : top;
    for (int64_t p = 0; p < parts; p++)
        if (sums[p * stride] != 0) sum += (double)sums[p * stride] * exp((double)largest[p * stride] - top);
    return top + log(sum);
}

static mmbal_status NAME(combine_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(aligned) *c = context;
    const int64_t A = c->A, B = c->alignment->B;
    const int symmetric = c->alignment->symmetric;
    for (int64_t b = begin; b < end; b++) {
        const int64_t a = c->offset + b;
        c->losses[b] = 0, c->normalizers[b] = 0, c->normalizers[B + b] = 0;
        if (c->penalty[a] < 0) continue;
        const double of_row = NAME(logsumexp_of_parts)(c->row_largest + a, c->row_sum + a, c->stripes, A);
        c->normalizers[b] = (REAL)of_row, c->losses[b] = of_row - (double)c->diagonal[a];
        if (!symmetric) continue;
        const double of_col = NAME(logsumexp_of_parts)(c->col_largest + a, c->col_sum + a, c->row_blocks, A);
        c->normalizers[B + b] = (REAL)of_col;
        c->losses[b] = 0.5 * (c->losses[b] + of_col - (double)c->diagonal[a]);
    }
    return MMBAL_OK;
}

static mmbal_status NAME(align)(const mmbal_alignment *t, void *loss, void *regression, void *contrastive,
                                void *normalizers, void *workspace, const mmbal_pool *pool) {
    arena from = {(uintptr_t)workspace};
    NAME(aligned) c = NAME(begin)(t, pool->workers, &from);
    NAME(forward_workspace)(&c, &from);
    c.normalizers = normalizers;
    const align_scale scale = scale_of(t);
    regression_rows rows = {.alignment = t, .losses = c.regression};
    mmbal_status status =
        pool->run(pool->self, t->B, rows_per_task(t->B, t->D, pool), c.tasks->regression[t->dtype], &rows);
    for (int64_t i = 0; i < 2 * t->B && !scale.contrasted; i++) c.normalizers[i] = 0;
    if (status == MMBAL_OK && scale.contrasted) {
        status = NAME(prepare)(&c, pool);
        if (status == MMBAL_OK) status = pool->run(pool->self, c.row_blocks * c.stripes, 1, NAME(statistics_task), &c);
        if (status == MMBAL_OK) status = pool->run(pool->self, t->B, COMBINED_AT_ONCE, NAME(combine_task), &c);
    }
    if (status != MMBAL_OK) return status;
    double of_regression = 0, of_contrast = 0;
    for (int64_t b = 0; b < t->B; b++) {
        of_regression += c.regression[b];
        if (scale.contrasted) of_contrast += c.losses[b];
    }
    of_regression = scale.of_row == 0 ? 0 : of_regression * scale.of_row;
    of_contrast = scale.contrasted ? of_contrast * scale.of_row : 0;
    *(REAL *)regression = (REAL)of_regression, *(REAL *)contrastive = (REAL)of_contrast;
    *(REAL *)loss =
        (REAL)((t->alpha > 0 ? t->alpha * of_regression : 0) + (t->alpha < 1 ? (1 - t->alpha) * of_contrast : 0));
    return MMBAL_OK;
}

static mmbal_status NAME(clear_source_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(aligned) *c = context;
    memset(c->dsource + begin * c->dsource_stride, 0, (size_t)((end - begin) * c->dsource_stride) * sizeof(REAL));
    return MMBAL_OK;
}

static mmbal_status NAME(turn_source_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(aligned) *c = context;
    NAME(turn)(c->kernels, (const REAL *)c->source.unit + begin * c->unit_stride, c->unit_stride, end - begin, c->C,
               c->source_turned + begin, c->turned_stride);
    return MMBAL_OK;
}

/* The gradient of a block of the stripe, into the stripe's panels, and its product with the targets. */
static mmbal_status NAME(gradient_task)(void *context, int worker, int64_t begin, int64_t end) {
    const NAME(aligned) *c = context;
    for (int64_t index = begin; index < end; index++) {
        const similarity_block part = NAME(block_at)(c, c->first_block + index, c->stripe, worker);
        NAME(take_similarities)(c, &part);
        c->tasks->similarity_gradient[sizeof(REAL) == sizeof(double)](&part, &c->weights);
        for (int64_t i = 0; i < part.rows && c->gradient; i++)
            NAME(deal)((const REAL *)part.z + i * part.stride, part.cols, (int)c->tile_cols, c->A,
                       c->gradient + (part.row + i) * c->tile_cols);
        if (!c->dsource) continue;
        NAME(panels) b = NAME(packed_panels)(c->kernels, c->target_rows, c->A);
        b.data += part.col * c->tile_cols;
        NAME(multiply_by_columns)(c, part.rows, c->C, part.cols, part.z, part.stride, b,
                                  c->dsource + part.row * c->dsource_stride, c->dsource_stride, TILE_ADD);
    }
    return MMBAL_OK;
}

/* dtarget of the stripe's columns, transposed: the turned source times the gradient, over the rows of its blocks. */
static mmbal_status NAME(dtarget_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(aligned) *c = context;
    const int64_t col = c->stripe * SIMILARITY_COLS, cols = least(SIMILARITY_COLS, c->A - col);
    const int64_t across = ceil_div(cols, c->cols_at_once);
    const int64_t first = c->first_block * c->height, last = least(c->last_block * c->height, c->A);
    for (int64_t index = begin; index < end; index++) {
        const int64_t from = index % across * c->cols_at_once, row = index / across * SOURCE_ROWS;
        NAME(panels) b = NAME(packed_panels)(c->kernels, c->gradient, c->A);
        b.data += from / c->tile_cols * b.panel + first * b.stride;
        NAME(multiply_by_columns)(c, least(SOURCE_ROWS, c->C - row), least(c->cols_at_once, cols - from), last - first,
                                  c->source_turned + row * c->turned_stride + first, c->turned_stride, b,
                                  c->dtarget + row * c->dtarget_stride + col + from, c->dtarget_stride, TILE_SET);
    }
    return MMBAL_OK;
}

static mmbal_status NAME(finish_source_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(aligned) *c = context;
    for (int64_t a = begin; a < end; a++)
        c->tasks->unit_gradient[c->alignment->dtype](&c->source, a, c->dsource + a * c->dsource_stride);
    return MMBAL_OK;
}

static mmbal_status NAME(finish_target_task)(void *context, int worker, int64_t begin, int64_t end) {
    const NAME(aligned) *c = context;
    REAL *lines = c->lines + worker * NAME(ROWS_TURNED_BACK) * c->C;
    for (int64_t a = begin; a < end; a += NAME(ROWS_TURNED_BACK)) {
        const int64_t rows = least(NAME(ROWS_TURNED_BACK), end - a);
        TRANSPOSE(c->kernels, c->dtarget + a, c->dtarget_stride, c->C, rows, lines, c->C);
        for (int64_t i = 0; i < rows; i++)
            c->tasks->unit_gradient[c->alignment->dtype](&c->target, a + i, lines + i * c->C);
    }
    return MMBAL_OK;
}

/* What a candidate's row and column weigh, and their normalizers: infinite where they are none of our own. */
static void NAME(weigh)(NAME(aligned) * c, const REAL *normalizers, double scale) {
    const mmbal_alignment *t = c->alignment;
    for (int64_t a = 0; a < c->A; a++) {
        const int own = a >= c->offset && a < c->end && c->penalty[a] == 0;
        c->row_normalizer[a] = own ? normalizers[a - c->offset] : (REAL)INFINITY;
        c->col_normalizer[a] = own && t->symmetric ? normalizers[t->B + a - c->offset] : (REAL)INFINITY;
        c->row_weight[a] = own ? (REAL)(t->symmetric ? 0.5 * scale : scale) : 0;
        c->col_weight[a] = own && t->symmetric ? (REAL)(0.5 * scale) : 0;
    }
    c->weights = (similarity_weights){c->row_normalizer, c->row_weight, c->col_normalizer, c->col_weight, t->symmetric};
}

static mmbal_status NAME(contrastive_backward)(NAME(aligned) * c, const REAL *normalizers, double scale,
                                               const mmbal_alignment_gradients *to, const mmbal_pool *pool) {
    const mmbal_alignment *t = c->alignment;
    c->source.dx = to->source_embedding, c->target.dx = to->target_embedding;
    mmbal_status status = NAME(prepare)(c, pool);
    NAME(weigh)(c, normalizers, scale);
    if (status == MMBAL_OK && c->dsource) {
        status = pool->run(pool->self, c->A, ROWS_AT_ONCE, NAME(clear_source_task), c);
        if (status == MMBAL_OK)
            status = pool->run(pool->self, ceil_div(c->C, c->tile_cols), 1, NAME(pack_target_rows_task), c);
    }
    if (status == MMBAL_OK && c->dtarget) status = pool->run(pool->self, c->A, ROWS_AT_ONCE, NAME(turn_source_task), c);
    for (c->stripe = 0; c->stripe < c->stripes && status == MMBAL_OK; c->stripe++) {
        const int64_t col = c->stripe * SIMILARITY_COLS, cols = least(SIMILARITY_COLS, c->A - col);
        const int all = t->symmetric && NAME(has_own)(c, col, cols);
        c->first_block = all ? 0 : c->offset / c->height;
        c->last_block = all ? c->row_blocks : ceil_div(c->end, c->height);
        status = pool->run(pool->self, c->last_block - c->first_block, 1, NAME(gradient_task), c);
        if (status == MMBAL_OK && c->dtarget)
            status = pool->run(pool->self, ceil_div(cols, c->cols_at_once) * ceil_div(c->C, SOURCE_ROWS), 1,
                               NAME(dtarget_task), c);
    }
    if (status == MMBAL_OK && c->dsource)
        status = pool->run(pool->self, c->A, ROWS_AT_ONCE, NAME(finish_source_task), c);
    if (status == MMBAL_OK && c->dtarget)
        status = pool->run(pool->self, c->A, ROWS_AT_ONCE, NAME(finish_target_task), c);
    return status;
}

static mmbal_status NAME(align_backward)(const mmbal_alignment *t, const void *dloss, const void *dregression,
                                         const void *dcontrastive, const void *normalizers,
                                         const mmbal_alignment_gradients *to, void *workspace, const mmbal_pool *pool) {
    const align_scale scale = scale_of(t);
    const double of_loss = (double)*(const REAL *)dloss;
    double of_regression = (double)*(const REAL *)dregression, of_contrast = (double)*(const REAL *)dcontrastive;
    if (t->alpha > 0) of_regression += t->alpha * of_loss;
    if (t->alpha < 1) of_contrast += (1 - t->alpha) * of_loss;
    mmbal_status status = MMBAL_OK;
    if (to->pred || to->target) {
        regression_rows rows = {.alignment = t, .dpred = to->pred, .dtarget = to->target};
        rows.scale = scale.of_row == 0 ? 0 : of_regression * scale.of_row;
        status = pool->run(pool->self, t->B, rows_per_task(t->B, t->D, pool),
                           mmbal_row_tasks_in_use()->regression_backward[t->dtype], &rows);
    }
    if (status != MMBAL_OK || !(to->source_embedding || to->target_embedding)) return status;
    if (!scale.contrasted || of_contrast == 0) {
        const size_t bytes = (size_t)(t->A * t->C) * size_of(t->dtype);
        if (to->source_embedding) memset(to->source_embedding, 0, bytes);
        if (to->target_embedding) memset(to->target_embedding, 0, bytes);
        return MMBAL_OK;
    }
    arena from = {(uintptr_t)workspace};
    NAME(aligned) c = NAME(begin)(t, pool->workers, &from);
    NAME(backward_workspace)(&c, to, pool->workers, &from);
    return NAME(contrastive_backward)(&c, normalizers, of_contrast * scale.of_row / t->tau, to, pool);
}

static int64_t NAME(forward_bytes)(const mmbal_alignment *t, int workers) {
    arena from = {0};
    NAME(aligned) c = NAME(begin)(t, workers, &from);
    NAME(forward_workspace)(&c, &from);
    return bytes_carved(&from);
}

static int64_t NAME(backward_bytes)(const mmbal_alignment *t, const mmbal_alignment_gradients *to, int workers) {
    arena from = {0};
    NAME(aligned) c = NAME(begin)(t, workers, &from);
    NAME(backward_workspace)(&c, to, workers, &from);
    return bytes_carved(&from);
}
#endif
