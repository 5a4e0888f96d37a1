/* Forward of expert_mlp.c for one dtype: two products over the routed rows, then a weighted sum for each token. */

static void NAME(forward_workspace)(NAME(call) * c, int workers, arena *from) {
    c->input = carve(from, NAME(operand_bytes)(c->R, c->D));
    c->hidden = carve(from, NAME(operand_bytes)(c->R, c->F));
    c->rows = carve(from, c->R * c->D * (int64_t)sizeof(REAL));
    c->scratch = carve(from, workers * (int64_t)sizeof(NAME(scratch)));
}

static mmbal_status NAME(forward_bytes)(mmbal_expert_mlp_shape s, int workers, int64_t *bytes) {
    NAME(call) c = {.R = s.N * s.K, .D = s.D, .F = s.F};
    arena from = {0};
    NAME(forward_workspace)(&c, workers, &from);
    *bytes = bytes_carved(&from);
    return MMBAL_OK;
}

static mmbal_status NAME(gather_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(call) *c = context;
    for (int64_t r = begin; r < end; r++) NAME(gather_row)(c, c->x, r, c->input);
    return MMBAL_OK;
}

/* u = x w1^T + b1, hidden = activation(u) * mask */
static mmbal_status NAME(hidden_task)(void *context, int worker, int64_t begin, int64_t end) {
    const NAME(call) *c = context;
    NAME(scratch) *s = c->scratch + worker;
    const NAME(rows) x = {c->input, NAME(row_stride)(c->D)};
    for (int64_t index = begin; index < end; index++) {
        const block at = NAME(row_block)(c, c->F, index);
        const NAME(weights) w1 = {c->w1 + at.expert * c->F * c->D, c->D, 1};
        NAME(multiply)(c->kernels, x, w1, at, c->D, s);
        const STORED *b1 = c->b1 ? c->b1 + at.expert * c->F + at.col : NULL;
        REAL *u = s->c;
        for (int64_t r = at.row; r < at.row + at.rows; r++, u += BLOCK_COLS) {
            for (int64_t f = 0; b1 && f < at.cols; f++) u[f] += LOAD(b1[f]);
            if (c->kept_preactivation) {
                STORED *kept = c->kept_preactivation + r * c->F + at.col;
                for (int64_t f = 0; f < at.cols; f++) kept[f] = STORE(u[f]);
            }
            for (int64_t f = 0; f < at.cols; f++) u[f] = ROUNDED(u[f]);
            c->kernels->OF_REAL(activate)(c->activation, at.cols, u, u, NULL);
            NAME(mask)(&c->hidden_dropout, c->permutation[r] * c->F + at.col, at.cols, u);
            OPERAND *hidden = c->hidden + r * NAME(row_stride)(c->F) + at.col;
            for (int64_t f = 0; f < at.cols; f++) hidden[f] = TO_OPERAND(u[f]);
            if (at.col + at.cols == c->F) NAME(end_row)(c->hidden, r, c->F);
        }
    }
    return MMBAL_OK;
}

/* rows = (hidden w2^T + b2) * mask */
static mmbal_status NAME(output_task)(void *context, int worker, int64_t begin, int64_t end) {
    const NAME(call) *c = context;
    NAME(scratch) *s = c->scratch + worker;
    const NAME(rows) hidden = {c->hidden, NAME(row_stride)(c->F)};
    for (int64_t index = begin; index < end; index++) {
        const block at = NAME(row_block)(c, c->D, index);
        const NAME(weights) w2 = {c->w2 + at.expert * c->D * c->F, c->F, 1};
        NAME(multiply)(c->kernels, hidden, w2, at, c->F, s);
        const STORED *b2 = c->b2 ? c->b2 + at.expert * c->D + at.col : NULL;
        REAL *o = s->c;
        for (int64_t r = at.row; r < at.row + at.rows; r++, o += BLOCK_COLS) {
            for (int64_t d = 0; b2 && d < at.cols; d++) o[d] += LOAD(b2[d]);
            NAME(mask)(&c->output_dropout, c->permutation[r] * c->D + at.col, at.cols, o);
            memcpy(c->rows + r * c->D + at.col, o, sizeof(REAL) * (size_t)at.cols);
        }
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
    NAME(call) c = NAME(begin_call)(inputs, shape, options, pool->workers);
    arena from = {(uintptr_t)workspace};
    NAME(forward_workspace)(&c, pool->workers, &from);
    c.y = y, c.kept_preactivation = preactivation;
    const pass passes[] = {
        {1, c.R, ROWS_PER_TASK, NAME(gather_task)},
        {1, NAME(row_blocks)(&c, c.F), 1, NAME(hidden_task)},
        {1, NAME(row_blocks)(&c, c.D), 1, NAME(output_task)},
        {1, c.N, ROWS_PER_TASK, NAME(combine_task)},
    };
    return run_passes(passes, sizeof passes / sizeof passes[0], &c, pool);
}
