/* Forward of expert_mlp.c for one dtype: two products over the routed rows, then a weighted sum for each token. */

static void NAME(forward_workspace)(NAME(call) * c, int64_t columns, int workers, arena *from) {
    c->input = carve(from, NAME(operand_bytes)(c->wave_rows, c->D));
    c->hidden = carve(from, NAME(operand_bytes)(c->wave_rows, c->F));
    c->input_columns = carve(from, columns * c->D * (int64_t)sizeof(OPERAND));
    c->hidden_columns = carve(from, columns * c->F * (int64_t)sizeof(OPERAND));
    c->columns = carve(from, (c->E + 1) * (int64_t)sizeof(int64_t));
    c->rows = carve(from, c->R * c->D * (int64_t)sizeof(REAL));
    c->scratch = carve(from, workers * (int64_t)sizeof(NAME(scratch)));
}

static mmbal_status NAME(forward_bytes)(mmbal_expert_mlp_shape s, const int64_t *offsets, int workers, int64_t *bytes) {
    NAME(call) c = {.R = s.N * s.K, .D = s.D, .F = s.F, .E = s.E, .wave_rows = largest_wave(offsets, s.E, workers)};
    arena from = {0};
    NAME(forward_workspace)(&c, NAME(most_columns)(offsets, s.E, workers), workers, &from);
    *bytes = bytes_carved(&from);
    return MMBAL_OK;
}

static mmbal_status NAME(gather_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(call) *c = context;
    for (int64_t i = begin; i < end; i++) NAME(gather_row)(c, c->x, c->first_row + i, c->input);
    return MMBAL_OK;
}

/* The input of experts first .. last with few rows as a right factor. */
static mmbal_status NAME(input_columns_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(call) *c = context;
    const int64_t stride = NAME(row_stride)(c->D);
    for (int64_t e = begin; e < end; e++)
        NAME(pack_few)(c, c->input + (c->offsets[e] - c->first_row) * stride, stride, e, c->D, 0, c->D,
                       c->input_columns);
    return MMBAL_OK;
}

/* Adds the bias to a strip of u, keeps it, and makes it hidden rows: the first one begins at `hidden`. */
static void NAME(finish_hidden)(const NAME(call) * c, block at, REAL *u, OPERAND *hidden, int64_t stride) {
    REAL bias[BLOCK_COLS] = {0};
    if (c->b1) NAME(widen)(c->kernels, at.cols, c->b1 + at.expert * c->F + at.col, bias);
    for (int64_t r = at.row; r < at.row + at.rows; r++, u += at.stride, hidden += stride) {
        STORED *kept = c->kept_preactivation ? c->kept_preactivation + r * c->F + at.col : NULL;
        if (r + FETCH_AHEAD < at.row + at.rows) {
            if (kept && !c->keep_past_caches) fetch_span(kept + FETCH_AHEAD * c->F, at.cols * (int64_t)sizeof(STORED));
            fetch_span(hidden + FETCH_AHEAD * stride, at.cols * (int64_t)sizeof(OPERAND));
        }
        if (c->b1) c->kernels->OF_REAL(add)(at.cols, bias, u);
        NAME(round_row)(c->kernels, at.cols, u, kept, c->keep_past_caches);
#if STORED_IS_REAL
        REAL *value = hidden;
#else
        REAL *value = u;
#endif
        c->kernels->OF_REAL(activate)(c->activation, at.cols, u, value, NULL);
        NAME(mask)(&c->hidden_dropout, c->permutation[r] * c->F + at.col, at.cols, value);
#if !STORED_IS_REAL
        NAME(to_operands)(c->kernels, at.cols, value, hidden);
#endif
        if (at.col + at.cols == c->F) NAME(end_row)(hidden, at.cols);
    }
}

/* u = x w1^T + b1, hidden = activation(u) * mask */
static mmbal_status NAME(hidden_task)(void *context, int worker, int64_t begin, int64_t end) {
    const NAME(call) *c = context;
    NAME(scratch) *s = c->scratch + worker;
    const NAME(product) product = {.a = {c->input, NAME(row_stride)(c->D), c->first_row},
                                   .depth = c->D,
                                   .cols = c->F,
                                   .weights = c->w1,
                                   .transposed = 1,
                                   .packed = c->packed_w1,
                                   .columns = c->input_columns};
    const int64_t stride = NAME(row_stride)(c->F);
    for (int64_t index = begin; index < end; index++) {
        const block at = NAME(multiply_block)(c, &product, index, end, s);
        for (int64_t left = 0; left < at.cols; left += BLOCK_COLS) {
            const block strip = strip_of(at, left);
            if (c->hidden_columns && at.few && NAME(go_right)(at.rows)) { /* as a right factor alone */
                NAME(finish_hidden)(c, strip, s->c + left, s->b, BLOCK_COLS);
                NAME(pack_few)(c, s->b, BLOCK_COLS, at.expert, c->F, strip.col, strip.cols, c->hidden_columns);
            } else {
                NAME(finish_hidden)(c, strip, s->c + left, c->hidden + (at.row - c->first_row) * stride + strip.col,
                                    stride);
            }
        }
    }
    stream_end();
    return MMBAL_OK;
}

/* Adds the bias to a strip of o. */
static void NAME(finish_output)(const NAME(call) * c, block at, const REAL *o) {
    REAL bias[BLOCK_COLS] = {0};
    if (c->b2) NAME(widen)(c->kernels, at.cols, c->b2 + at.expert * c->D + at.col, bias);
    for (int64_t r = at.row; r < at.row + at.rows; r++, o += at.stride) {
        REAL *row = c->rows + r * c->D + at.col;
        for (int64_t d = 0; d < at.cols; d++) row[d] = o[d] + bias[d];
        NAME(mask)(&c->output_dropout, c->permutation[r] * c->D + at.col, at.cols, row);
    }
}

/* rows = (hidden w2^T + b2) * mask */
static mmbal_status NAME(output_task)(void *context, int worker, int64_t begin, int64_t end) {
    const NAME(call) *c = context;
    NAME(scratch) *s = c->scratch + worker;
    const NAME(product) product = {.a = {c->hidden, NAME(row_stride)(c->F), c->first_row},
                                   .depth = c->F,
                                   .cols = c->D,
                                   .weights = c->w2,
                                   .transposed = 1,
                                   .packed = c->packed_w2,
                                   .columns = c->hidden_columns};
    for (int64_t index = begin; index < end; index++) {
        const block at = NAME(multiply_block)(c, &product, index, end, s);
        for (int64_t left = 0; left < at.cols; left += BLOCK_COLS)
            NAME(finish_output)(c, strip_of(at, left), s->c + left);
    }
    return MMBAL_OK;
}

static mmbal_status NAME(combine_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(call) *c = context;
    NAME(combine)(c, c->weights, begin, end, c->y);
    return MMBAL_OK;
}

static mmbal_status NAME(forward)(const mmbal_expert_mlp_inputs *inputs, mmbal_expert_mlp_shape shape,
                                  const mmbal_expert_mlp_options *options, void *y, void *preactivation,
                                  void *workspace, const mmbal_pool *pool) {
    if (!workspace) return MMBAL_INVALID_ARGUMENT;
    NAME(call) c = NAME(begin_call)(inputs, shape, options, pool->workers);
    arena from = {(uintptr_t)workspace};
    NAME(forward_workspace)(&c, NAME(most_columns)(c.offsets, c.E, pool->workers), pool->workers, &from);
    c.y = y, c.kept_preactivation = preactivation;
    c.keep_past_caches = c.R * c.F * (int64_t)sizeof(STORED) >= STREAMED_BYTES;
    if (!NAME(weights_go_left)(c.kernels, c.D)) c.input_columns = NULL;
    if (!NAME(weights_go_left)(c.kernels, c.F)) c.hidden_columns = NULL;
    c.row_blocking.wide_from = c.input_columns && c.hidden_columns ? NAME(FEWEST_RIGHT) : FEW_ROWS + 1;
    mmbal_status status = MMBAL_OK;
    for (int64_t first = 0, last; first < c.E && status == MMBAL_OK; first = last) {
        last = wave_end(c.offsets, c.E, first, pool->workers);
        NAME(call) wave = NAME(wave)(&c, first, last);
        const int few = NAME(count_columns)(c.kernels, c.offsets, first, last, c.columns) > 0;
        const pass passes[] = {
            {1, c.offsets[last] - c.offsets[first], ROWS_PER_TASK, NAME(gather_task)},
            {few && c.input_columns, wave.E, 1, NAME(input_columns_task)},
            {1, NAME(row_blocks)(&wave, c.F), blocks_per_task(NAME(row_blocks)(&wave, c.F), pool->workers),
             NAME(hidden_task)},
            {1, NAME(row_blocks)(&wave, c.D), blocks_per_task(NAME(row_blocks)(&wave, c.D), pool->workers),
             NAME(output_task)},
        };
        status = run_passes(passes, sizeof passes / sizeof passes[0], &wave, pool);
    }
    const pass combine = {1, c.N, ROWS_PER_TASK, NAME(combine_task)};
    return status == MMBAL_OK ? run_passes(&combine, 1, &c, pool) : status;
}
