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

#include "alignment_backward_body.h"
#include "alignment_forward_body.h"
#endif
