/* The alignment loss; see alignment_body.h. */

static void NAME(forward_workspace)(NAME(aligned) * c, arena *from) {
    c->row_largest = NAME(carve_reals)(from, c->stripes * c->A),
    c->row_sum = NAME(carve_reals)(from, c->stripes * c->A);
    c->col_largest = NAME(carve_reals)(from, c->row_blocks * c->A);
    c->col_sum = NAME(carve_reals)(from, c->row_blocks * c->A);
    c->diagonal = NAME(carve_reals)(from, c->A);
    c->losses = carve(from, c->alignment->B * (int64_t)sizeof(double));
    c->regression = carve(from, c->alignment->B * (int64_t)sizeof(double));
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

static int64_t NAME(forward_bytes)(const mmbal_alignment *t, int workers) {
    arena from = {0};
    NAME(aligned) c = NAME(begin)(t, workers, &from);
    NAME(forward_workspace)(&c, &from);
    return bytes_carved(&from);
}
