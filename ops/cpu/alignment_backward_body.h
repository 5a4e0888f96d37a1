/* The gradient of the alignment loss; see alignment_body.h. Similarities are taken again stripe by stripe. A block of
 * the stripe owns the rows of dsource, which it adds to in the order of the stripes; then the columns of dtarget are
 * owned by blocks of a product of their own, over all rows in their order. */

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

static int64_t NAME(backward_bytes)(const mmbal_alignment *t, const mmbal_alignment_gradients *to, int workers) {
    arena from = {0};
    NAME(aligned) c = NAME(begin)(t, workers, &from);
    NAME(backward_workspace)(&c, to, workers, &from);
    return bytes_carved(&from);
}
