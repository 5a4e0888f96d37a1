/* Backward of expert_mlp.c for one dtype. Each gradient is a pass of its own, taken only when it is asked for. */

static int64_t NAME(blocks_across)(const NAME(call) * c) { return ceil_div(c->F, BLOCK_COLS); }

static void NAME(backward_workspace)(NAME(call) * c, int workers, arena *from) {
    c->hidden = carve(from, c->R * c->F * (int64_t)sizeof(STORED));
    c->dhidden = carve(from, c->R * c->F * (int64_t)sizeof(STORED));
    c->g = carve(from, c->R * c->D * (int64_t)sizeof(STORED));
    c->rows = carve(from, c->R * c->D * (int64_t)sizeof(REAL));
    c->dot_parts = carve(from, c->R * NAME(blocks_across)(c) * (int64_t)sizeof(REAL));
    c->scratch = carve(from, workers * (int64_t)sizeof(REAL) * NAME(SCRATCH));
}

static mmbal_status NAME(backward_bytes)(mmbal_expert_mlp_shape s, int workers, int64_t *bytes) {
    NAME(call) c = {.R = s.N * s.K, .D = s.D, .F = s.F};
    arena from = {0};
    NAME(backward_workspace)(&c, workers, &from);
    *bytes = bytes_carved(&from);
    return MMBAL_OK;
}

/* dy of every routed row: gathered from the tokens, or from g when an output mask had to be applied. */
static NAME(matrix) NAME(output_gradient)(const NAME(call) * c) {
    if (c->output_dropout.probability > 0) return (NAME(matrix)){.data = c->g, .stride = c->D};
    return (NAME(matrix)){.data = c->dy, .stride = c->D, .token = c->permutation, .K = c->K};
}

static mmbal_status NAME(output_mask_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(call) *c = context;
    REAL piece[BLOCK_COLS];
    for (int64_t r = begin; r < end; r++) {
        const int64_t pair = c->permutation[r];
        for (int64_t from = 0; from < c->D; from += BLOCK_COLS) {
            const int64_t n = least(BLOCK_COLS, c->D - from);
            for (int64_t d = 0; d < n; d++) piece[d] = LOAD(c->dy[pair / c->K * c->D + from + d]);
            NAME(mask)(&c->output_dropout, pair * c->D + from, n, piece);
            for (int64_t d = 0; d < n; d++) c->g[r * c->D + from + d] = STORE(piece[d]);
        }
    }
    return MMBAL_OK;
}

/* h = (g w2) * mask; parts of <h, activation(u)>, du = weights h activation'(u), hidden = weights a */
static mmbal_status NAME(hidden_gradient_task)(void *context, int worker, int64_t begin, int64_t end) {
    const NAME(call) *c = context;
    const NAME(matrix) g = NAME(output_gradient)(c);
    REAL value[BLOCK_COLS], slope[BLOCK_COLS];
    for (int64_t index = begin; index < end; index++) {
        const block at = find_row_block(c->offsets, c->height, c->F, index);
        const NAME(matrix) w2 = {.data = c->w2 + at.expert * c->D * c->F, .stride = c->F, .rows_contiguous = 1};
        REAL *h = NAME(multiply)(c->kernels, &g, &w2, at, 0, c->D, NAME(scratch_of)(c, worker));
        for (int64_t r = at.row; r < at.row + at.rows; r++, h += BLOCK_COLS) {
            const int64_t pair = c->permutation[r], place = r * c->F + at.col;
            const REAL weight = c->weights[pair];
            for (int64_t f = 0; f < at.cols; f++) value[f] = LOAD(c->preactivation[place + f]);
            c->kernels->OF_REAL(activate)(c->activation, at.cols, value, value, slope);
            NAME(mask)(&c->hidden_dropout, pair * c->F + at.col, at.cols, h);
            REAL dot = 0;
            for (int64_t f = 0; f < at.cols; f++) dot += h[f] * value[f];
            c->dot_parts[r * NAME(blocks_across)(c) + at.col / BLOCK_COLS] = dot;
            for (int64_t f = 0; f < at.cols; f++) c->dhidden[place + f] = STORE(weight * h[f] * slope[f]);
            if (!c->dw2) continue;
            NAME(mask)(&c->hidden_dropout, pair * c->F + at.col, at.cols, value);
            for (int64_t f = 0; f < at.cols; f++) c->hidden[place + f] = STORE(weight * value[f]);
        }
    }
    return MMBAL_OK;
}

/* dweights = <h, a> + <g, b2> */
static mmbal_status NAME(dweights_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(call) *c = context;
    const NAME(matrix) g = NAME(output_gradient)(c);
    const int64_t parts = NAME(blocks_across)(c);
    for (int64_t e = 0; e < c->E; e++) {
        const int64_t first = c->offsets[e] > begin ? c->offsets[e] : begin;
        for (int64_t r = first; r < least(c->offsets[e + 1], end); r++) {
            REAL dot = 0;
            for (int64_t part = 0; part < parts; part++) dot += c->dot_parts[r * parts + part];
            const STORED *dy = NAME(line)(&g, r);
            for (int64_t d = 0; c->b2 && d < c->D; d++) dot += LOAD(dy[d]) * LOAD(c->b2[e * c->D + d]);
            c->dweights[c->permutation[r]] = dot;
        }
    }
    return MMBAL_OK;
}

/* rows = du w1 */
static mmbal_status NAME(input_gradient_task)(void *context, int worker, int64_t begin, int64_t end) {
    const NAME(call) *c = context;
    for (int64_t index = begin; index < end; index++) {
        const block at = find_row_block(c->offsets, c->height, c->D, index);
        const NAME(matrix) du = {.data = c->dhidden, .stride = c->F};
        const NAME(matrix) w1 = {.data = c->w1 + at.expert * c->F * c->D, .stride = c->D, .rows_contiguous = 1};
        const REAL *dx = NAME(multiply)(c->kernels, &du, &w1, at, 0, c->F, NAME(scratch_of)(c, worker));
        for (int64_t r = at.row; r < at.row + at.rows; r++, dx += BLOCK_COLS)
            memcpy(c->rows + r * c->D + at.col, dx, sizeof(REAL) * (size_t)at.cols);
    }
    return MMBAL_OK;
}

static mmbal_status NAME(combine_dx_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(call) *c = context;
    NAME(combine)(c, NULL, begin, end, c->dx);
    return MMBAL_OK;
}

/* to[e] = a^T b over the rows of expert e, [rows, cols] */
static void NAME(weight_gradient)(const NAME(call) * c, const NAME(matrix) * a, const NAME(matrix) * b, int64_t rows,
                                  int64_t cols, int64_t index, int worker, STORED *to) {
    const block at = find_expert_block(rows, cols, c->height, index);
    const REAL *dw = NAME(multiply)(c->kernels, a, b, at, c->offsets[at.expert], c->offsets[at.expert + 1],
                                    NAME(scratch_of)(c, worker));
    for (int64_t i = at.row; i < at.row + at.rows; i++, dw += BLOCK_COLS)
        for (int64_t j = 0; j < at.cols; j++) to[(at.expert * rows + i) * cols + at.col + j] = STORE(dw[j]);
}

static mmbal_status NAME(dw1_task)(void *context, int worker, int64_t begin, int64_t end) {
    const NAME(call) *c = context;
    const NAME(matrix) du = {.data = c->dhidden, .stride = c->F, .rows_contiguous = 1};
    const NAME(matrix) x = {.data = c->x, .stride = c->D, .rows_contiguous = 1, .token = c->permutation, .K = c->K};
    for (int64_t index = begin; index < end; index++)
        NAME(weight_gradient)(c, &du, &x, c->F, c->D, index, worker, c->dw1);
    return MMBAL_OK;
}

static mmbal_status NAME(dw2_task)(void *context, int worker, int64_t begin, int64_t end) {
    const NAME(call) *c = context;
    NAME(matrix) g = NAME(output_gradient)(c);
    g.rows_contiguous = 1;
    const NAME(matrix) hidden = {.data = c->hidden, .stride = c->F, .rows_contiguous = 1};
    for (int64_t index = begin; index < end; index++)
        NAME(weight_gradient)(c, &g, &hidden, c->D, c->F, index, worker, c->dw2);
    return MMBAL_OK;
}

/* to[e] = sum of factor[pair] m(r) over the rows r of expert e, [cols]; factor NULL: 1 */
static void NAME(bias_gradient)(const NAME(call) * c, const NAME(matrix) * m, const REAL *factor, int64_t cols,
                                int64_t index, STORED *to) {
    REAL sum[BLOCK_COLS] = {0};
    const block at = find_expert_block(1, cols, 1, index);
    for (int64_t r = c->offsets[at.expert]; r < c->offsets[at.expert + 1]; r++) {
        const STORED *row = NAME(line)(m, r) + at.col;
        const REAL weight = factor ? factor[c->permutation[r]] : 1;
        for (int64_t j = 0; j < at.cols; j++) sum[j] += weight * LOAD(row[j]);
    }
    for (int64_t j = 0; j < at.cols; j++) to[at.expert * cols + at.col + j] = STORE(sum[j]);
}

static mmbal_status NAME(db1_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(call) *c = context;
    const NAME(matrix) du = {.data = c->dhidden, .stride = c->F};
    for (int64_t index = begin; index < end; index++) NAME(bias_gradient)(c, &du, NULL, c->F, index, c->db1);
    return MMBAL_OK;
}

static mmbal_status NAME(db2_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(call) *c = context;
    const NAME(matrix) g = NAME(output_gradient)(c);
    for (int64_t index = begin; index < end; index++) NAME(bias_gradient)(c, &g, c->weights, c->D, index, c->db2);
    return MMBAL_OK;
}

static mmbal_status NAME(backward)(const void *dy, const mmbal_expert_mlp_inputs *inputs, const void *preactivation,
                                   mmbal_expert_mlp_shape shape, const mmbal_expert_mlp_options *options,
                                   const mmbal_expert_mlp_gradients *gradients, void *workspace,
                                   const mmbal_pool *pool) {
    NAME(call) c = NAME(begin_call)(inputs, shape, options);
    arena from = {(uintptr_t)workspace};
    NAME(backward_workspace)(&c, pool->workers, &from);
    c.dy = dy, c.preactivation = preactivation, c.dx = gradients->dx, c.dweights = gradients->dweights;
    c.dw1 = gradients->dw1, c.db1 = gradients->db1, c.dw2 = gradients->dw2, c.db2 = gradients->db2;

    const int hidden_needed = c.dx || c.dw1 || c.db1 || c.dw2 || c.dweights;
    const int64_t token_tasks = c.N, row_tasks = c.R, across_F = NAME(blocks_across)(&c);
    const int64_t hidden_blocks = count_row_blocks(c.offsets, c.E, c.height, c.F);
    const int64_t input_blocks = count_row_blocks(c.offsets, c.E, c.height, c.D);
    const int64_t dw1_blocks = c.E * ceil_div(c.F, c.height) * ceil_div(c.D, BLOCK_COLS);
    const int64_t dw2_blocks = c.E * ceil_div(c.D, c.height) * across_F;
    const struct {
        int needed;
        int64_t count, grain;
        mmbal_task *task;
    } passes[] = {
        {c.output_dropout.probability > 0, row_tasks, ROWS_PER_TASK, NAME(output_mask_task)},
        {hidden_needed, hidden_blocks, 1, NAME(hidden_gradient_task)},
        {c.dweights != NULL, row_tasks, ROWS_PER_TASK, NAME(dweights_task)},
        {c.dx != NULL, input_blocks, 1, NAME(input_gradient_task)},
        {c.dx != NULL, token_tasks, ROWS_PER_TASK, NAME(combine_dx_task)},
        {c.dw1 != NULL, dw1_blocks, 1, NAME(dw1_task)},
        {c.db1 != NULL, c.E * across_F, 1, NAME(db1_task)},
        {c.dw2 != NULL, dw2_blocks, 1, NAME(dw2_task)},
        {c.db2 != NULL, c.E * ceil_div(c.D, BLOCK_COLS), 1, NAME(db2_task)},
    };
    for (size_t i = 0; i < sizeof passes / sizeof passes[0]; i++) {
        if (!passes[i].needed) continue;
        const mmbal_status status = pool->run(pool->self, passes[i].count, passes[i].grain, passes[i].task, &c);
        if (status != MMBAL_OK) return status;
    }
    return MMBAL_OK;
}
