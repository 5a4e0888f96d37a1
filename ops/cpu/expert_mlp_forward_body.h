/* Forward of expert_mlp.c for one dtype: two products over the routed rows, then a weighted sum for each token. */

static void NAME(forward_workspace)(NAME(call) * c, int workers, arena *from) {
    c->hidden = carve(from, c->R * c->F * (int64_t)sizeof(STORED));
    c->rows = carve(from, c->R * c->D * (int64_t)sizeof(REAL));
    c->scratch = carve(from, workers * (int64_t)sizeof(REAL) * NAME(SCRATCH));
}

static mmbal_status NAME(forward_bytes)(mmbal_expert_mlp_shape s, int workers, int64_t *bytes) {
    NAME(call) c = {.R = s.N * s.K, .D = s.D, .F = s.F};
    arena from = {0};
    NAME(forward_workspace)(&c, workers, &from);
    *bytes = bytes_carved(&from);
    return MMBAL_OK;
}

/* u = x w1^T + b1, hidden = activation(u) * mask */
static mmbal_status NAME(hidden_task)(void *context, int worker, int64_t begin, int64_t end) {
    const NAME(call) *c = context;
    for (int64_t index = begin; index < end; index++) {
        const block at = find_row_block(c->offsets, c->height, c->F, index);
        const NAME(matrix) x = {.data = c->x, .stride = c->D, .token = c->permutation, .K = c->K};
        const NAME(matrix) w1 = {.data = c->w1 + at.expert * c->F * c->D, .stride = c->D};
        REAL *u = NAME(multiply)(c->kernels, &x, &w1, at, 0, c->D, NAME(scratch_of)(c, worker));
        for (int64_t r = at.row; r < at.row + at.rows; r++, u += BLOCK_COLS) {
            const int64_t place = r * c->F + at.col;
            for (int64_t f = 0; f < at.cols; f++) {
                const REAL bias = c->b1 ? LOAD(c->b1[at.expert * c->F + at.col + f]) : 0;
                const STORED rounded = STORE(u[f] + bias);
                if (c->kept_preactivation) c->kept_preactivation[place + f] = rounded;
                u[f] = LOAD(rounded);
            }
            c->kernels->OF_REAL(activate)(c->activation, at.cols, u, u, NULL);
            NAME(mask)(&c->hidden_dropout, c->permutation[r] * c->F + at.col, at.cols, u);
            for (int64_t f = 0; f < at.cols; f++) c->hidden[place + f] = STORE(u[f]);
        }
    }
    return MMBAL_OK;
}

/* rows = (hidden w2^T + b2) * mask */
static mmbal_status NAME(output_task)(void *context, int worker, int64_t begin, int64_t end) {
    const NAME(call) *c = context;
    for (int64_t index = begin; index < end; index++) {
        const block at = find_row_block(c->offsets, c->height, c->D, index);
        const NAME(matrix) hidden = {.data = c->hidden, .stride = c->F};
        const NAME(matrix) w2 = {.data = c->w2 + at.expert * c->D * c->F, .stride = c->F};
        REAL *o = NAME(multiply)(c->kernels, &hidden, &w2, at, 0, c->F, NAME(scratch_of)(c, worker));
        for (int64_t r = at.row; r < at.row + at.rows; r++, o += BLOCK_COLS) {
            for (int64_t d = 0; c->b2 && d < at.cols; d++) o[d] += LOAD(c->b2[at.expert * c->D + at.col + d]);
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
    NAME(call) c = NAME(begin_call)(inputs, shape, options);
    arena from = {(uintptr_t)workspace};
    NAME(forward_workspace)(&c, pool->workers, &from);
    c.y = y, c.kept_preactivation = preactivation;
    const int64_t hidden_blocks = count_row_blocks(c.offsets, c.E, c.height, c.F);
    const int64_t output_blocks = count_row_blocks(c.offsets, c.E, c.height, c.D);
    mmbal_status status = pool->run(pool->self, hidden_blocks, 1, NAME(hidden_task), &c);
    if (status == MMBAL_OK) status = pool->run(pool->self, output_blocks, 1, NAME(output_task), &c);
    if (status == MMBAL_OK) status = pool->run(pool->self, c.N, ROWS_PER_TASK, NAME(combine_task), &c);
    return status;
}
