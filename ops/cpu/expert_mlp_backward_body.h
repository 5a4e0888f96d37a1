/* Backward of expert_mlp.c for one dtype. Each gradient is a pass of its own, taken only when it is asked for; those of
 * the biases fall out of the passes over the weights. */

static void NAME(joint_workspace)(NAME(call) * c, int workers, arena *from);

static int64_t NAME(parts)(const NAME(call) * c) { return 1 + ceil_div(c->F, PART_COLS); }

static void NAME(backward_workspace)(NAME(call) * c, int workers, arena *from) {
    c->input = carve(from, NAME(operand_bytes)(c->wave_rows, c->D));
    c->hidden = carve(from, NAME(operand_bytes)(c->wave_rows, c->F));
    c->dhidden = carve(from, NAME(operand_bytes)(c->wave_rows, c->F));
    c->g = carve(from, NAME(operand_bytes)(c->wave_rows, c->D));
    const int64_t turned_bytes = c->turned_stride * (int64_t)sizeof(OPERAND);
    c->dhidden_turned = carve(from, c->F * turned_bytes);
    c->g_turned = carve(from, c->D * turned_bytes);
    c->turned = carve(from, c->E * (int64_t)sizeof(int64_t));
    c->rows = carve(from, c->R * c->D * (int64_t)sizeof(REAL));
    c->dot_parts = carve(from, c->R * NAME(parts)(c) * (int64_t)sizeof(REAL));
    NAME(joint_workspace)(c, workers, from);
    c->scratch = carve(from, workers * (int64_t)sizeof(NAME(scratch)));
}

static mmbal_status NAME(backward_bytes)(mmbal_expert_mlp_shape s, const int64_t *offsets, int workers,
                                         int64_t *bytes) {
    NAME(call) c = {.R = s.N * s.K, .D = s.D, .F = s.F, .E = s.E, .wave_rows = largest_wave(offsets, s.E, workers)};
    c.turned_stride = NAME(turned_stride)(c.wave_rows, s.E);
    arena from = {0};
    NAME(backward_workspace)(&c, workers, &from);
    *bytes = bytes_carved(&from);
    return MMBAL_OK;
}

/* input = x and g = dy * mask of row r; the first part of its dweights is <g, b2> */
static void NAME(gather_gradient_row)(const NAME(call) * c, int64_t expert, int64_t r, REAL *g, REAL *b2) {
    const int64_t pair = c->permutation[r];
    OPERAND *kept = c->g + (r - c->first_row) * NAME(row_stride)(c->D);
    REAL dot = 0;
    if (c->dw1) NAME(gather_row)(c, c->x, r, c->input);
    for (int64_t from = 0; from < c->D; from += BLOCK_COLS) {
        const int64_t n = least(BLOCK_COLS, c->D - from);
        const STORED *dy = c->dy + pair / c->K * c->D + from;
        NAME(widen)(c->kernels, n, dy, g);
        NAME(mask)(&c->output_dropout, pair * c->D + from, n, g);
        NAME(to_operands)(c->kernels, n, g, kept + from);
        if (!c->b2 || !c->dweights) continue;
        NAME(widen)(c->kernels, n, c->b2 + expert * c->D + from, b2);
        dot += NAME(dot)(n, g, b2);
    }
    NAME(end_row)(kept, c->D);
    c->dot_parts[r * NAME(parts)(c)] = dot;
}

/* Where row r of an expert stands in a turned matrix. */
static int64_t NAME(turned_place)(const NAME(call) * c, int64_t expert, int64_t r) {
    return c->turned[expert] + r - c->offsets[expert];
}

/* g_turned = (weights g)^T */
static void NAME(turn_gradient)(const NAME(call) * c, block at, OPERAND *scaled) {
    const int64_t stride = c->turned_stride, place = NAME(turned_place)(c, at.expert, at.row);
    const NAME(rows) g = {c->g, NAME(row_stride)(c->D), c->first_row};
    REAL line[BLOCK_COLS];
    for (int64_t from = 0; from < c->D; from += BLOCK_COLS) {
        const int64_t n = least(BLOCK_COLS, c->D - from);
        for (int64_t i = 0; i < at.rows; i++) {
            const REAL weight = c->weights[c->permutation[at.row + i]];
            NAME(from_operands)(c->kernels, n, NAME(row_of)(&g, at.row + i) + from, line);
            for (int64_t d = 0; d < n; d++) line[d] *= weight;
            NAME(to_operands)(c->kernels, n, line, scaled + i * BLOCK_COLS);
        }
        NAME(turn)(c->kernels, scaled, BLOCK_COLS, at.rows, n, c->g_turned + from * stride + place, stride);
    }
}

static int64_t NAME(gather_blocks)(const NAME(call) * c) {
    return count_row_blocks(c->offsets, c->E, GATHERED, c->tile_rows, 1);
}

static mmbal_status NAME(gather_gradient_task)(void *context, int worker, int64_t begin, int64_t end) {
    const NAME(call) *c = context;
    NAME(scratch) *s = c->scratch + worker;
    for (int64_t index = begin; index < end; index++) {
        const block at = find_row_block(c->offsets, GATHERED, c->tile_rows, 1, index);
        for (int64_t i = 0; i < at.rows; i++)
            NAME(gather_gradient_row)(c, at.expert, at.row + i, s->c, s->c + BLOCK_COLS);
        if (c->dw2 || c->db2) NAME(turn_gradient)(c, at, s->b);
    }
    return MMBAL_OK;
}

/* Makes a strip of g w2 the gradient of the hidden rows, and a where `hidden`, its first row, is not NULL. Rows before
 * `last` are finished next. */
static void NAME(finish_hidden_gradient)(const NAME(call) * c, block at, int64_t last, REAL *h, OPERAND *hidden,
                                         int64_t hidden_stride) {
    const int64_t stride = NAME(row_stride)(c->F);
    REAL line[3 * BLOCK_COLS];
    for (int64_t r = at.row; r < at.row + at.rows; r++, h += at.stride, hidden += hidden ? hidden_stride : 0) {
        const int64_t pair = c->permutation[r], place = (r - c->first_row) * stride + at.col;
        const STORED *u = c->preactivation + r * c->F + at.col;
        if (r + FETCH_AHEAD < last) {
            fetch_span(u + FETCH_AHEAD * c->F, at.cols * (int64_t)sizeof(STORED));
            fetch_span(c->dhidden + place + FETCH_AHEAD * stride, at.cols * (int64_t)sizeof(OPERAND));
            if (hidden && r + FETCH_AHEAD < at.row + at.rows)
                fetch_span(hidden + FETCH_AHEAD * hidden_stride, at.cols * (int64_t)sizeof(OPERAND));
        }
#if STORED_IS_REAL
        const REAL *x = u;
        REAL *du = c->dhidden + place, *value = hidden ? hidden : line;
#else
        REAL *x = line, *du = line + BLOCK_COLS, *value = line + 2 * BLOCK_COLS;
        NAME(widen)(c->kernels, at.cols, u, x);
#endif
        NAME(mask)(&c->hidden_dropout, pair * c->F + at.col, at.cols, h);
        for (int64_t f = 0; f < at.cols; f += PART_COLS) {
            REAL *part = c->dot_parts + r * NAME(parts)(c) + 1 + (at.col + f) / PART_COLS;
            c->kernels->OF_REAL(gradient_row)(c->activation, least(PART_COLS, at.cols - f), x + f, h + f,
                                              c->weights[pair], value + f, du + f, part);
        }
        if (hidden) NAME(mask)(&c->hidden_dropout, pair * c->F + at.col, at.cols, value);
#if !STORED_IS_REAL
        NAME(to_operands)(c->kernels, at.cols, du, c->dhidden + place);
        if (hidden) NAME(to_operands)(c->kernels, at.cols, value, hidden);
#endif
        if (at.col + at.cols == c->F) NAME(end_row)(c->dhidden + place - at.col, c->F);
    }
}

/* h = (g w2) * mask; parts of <h, activation(u)>, du = weights h activation'(u), hidden = a */
static mmbal_status NAME(hidden_gradient_task)(void *context, int worker, int64_t begin, int64_t end) {
    const NAME(call) *c = context;
    NAME(scratch) *s = c->scratch + worker;
    const NAME(product)
        product = {.a = {c->g, NAME(row_stride)(c->D), c->first_row}, .depth = c->D, .cols = c->F, .weights = c->w2};
    const int64_t stride = NAME(row_stride)(c->F);
    for (int64_t index = begin; index < end; index++) {
        const block at = NAME(multiply_block)(c, &product, index, end, s);
        for (int64_t left = 0; left < at.cols; left += BLOCK_COLS)
            NAME(finish_hidden_gradient)(c, strip_of(at, left), at.row + at.rows, s->c + left,
                                         c->dw2 ? c->hidden + (at.row - c->first_row) * stride + at.col + left : NULL,
                                         stride);
        if (!c->dw1 && !c->db1) continue;
        NAME(turn)(c->kernels, c->dhidden + (at.row - c->first_row) * stride + at.col, stride, at.rows, at.cols,
                   c->dhidden_turned + at.col * c->turned_stride + NAME(turned_place)(c, at.expert, at.row),
                   c->turned_stride);
    }
    return MMBAL_OK;
}

/* dweights = <g, b2> + <h, a> */
static mmbal_status NAME(dweights_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(call) *c = context;
    for (int64_t r = begin; r < end; r++) {
        REAL dot = 0;
        for (int64_t part = 0; part < NAME(parts)(c); part++) dot += c->dot_parts[r * NAME(parts)(c) + part];
        c->dweights[c->permutation[r]] = dot;
    }
    return MMBAL_OK;
}

/* rows = du w1 */
static mmbal_status NAME(input_gradient_task)(void *context, int worker, int64_t begin, int64_t end) {
    const NAME(call) *c = context;
    NAME(scratch) *s = c->scratch + worker;
    const NAME(product) product = {
        .a = {c->dhidden, NAME(row_stride)(c->F), c->first_row}, .depth = c->F, .cols = c->D, .weights = c->w1};
    for (int64_t index = begin; index < end; index++) {
        const block at = NAME(multiply_block)(c, &product, index, end, s);
        const REAL *dx = s->c;
        for (int64_t r = at.row; r < at.row + at.rows; r++, dx += at.stride)
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

/* The gradient of a weight, dw(i, j) = sum over the rows r of an expert of left(i, r) right(r, j), and of its bias,
 * db(i) = sum of left(i, r); left is turned. */
typedef struct {
    const OPERAND *left;
    NAME(rows) right;
    int64_t rows, cols;
    STORED *dw, *db; /* [E, rows, cols], [E, rows]; NULL where not asked for */
} NAME(weight_gradient);

/* to[i, j] = from[i, j], rounded; from is part of a block */
static void NAME(store_rows)(const mmbal_kernels *kernels, const REAL *from, int64_t from_stride, int64_t rows,
                             int64_t cols, STORED *to, int64_t to_stride, int past_caches) {
    for (int64_t i = 0; i < rows; i++, from += from_stride, to += to_stride) {
        if (past_caches)
            NAME(narrow_past_caches)(kernels, cols, from, to);
        else
            NAME(narrow)(kernels, cols, from, to);
    }
}

#if STORED_IS_REAL
/* Whether the tiles of a block are whole, and begin and end on cache lines in the gradient. */
static int NAME(on_lines)(const NAME(call) * c, const NAME(weight_gradient) * w, block at) {
    const int64_t size = (int64_t)sizeof(STORED), tile_cols = c->kernels->OF_OPERAND(tile_cols);
    return at.cols % tile_cols == 0 && tile_cols * size % CACHE_LINE == 0 && w->cols * size % CACHE_LINE == 0 &&
           (uintptr_t)w->dw % CACHE_LINE == 0;
}
#endif

static void NAME(weight_gradient_block)(const NAME(call) * c, const NAME(weight_gradient) * w, int64_t index,
                                        NAME(scratch) * s) {
    const block at = find_expert_block(c->blocking, w->rows, w->cols, index);
    const int64_t begin = c->offsets[at.expert], end = c->offsets[at.expert + 1];
    const int64_t stride = c->turned_stride, first = at.expert * w->rows + at.row;
    const OPERAND *left = w->left + at.row * stride + c->turned[at.expert];
    for (int64_t i = 0; w->db && at.col == 0 && i < at.rows; i++) {
        const REAL sum = NAME(sum)(c->kernels, 0, end - begin, left + i * stride);
        NAME(narrow)(c->kernels, 1, &sum, w->db + first + i);
    }
    if (!w->dw) return;
    int64_t from = begin;
    do { /* once at least: without rows the sums are zeros */
        const int64_t depth = least(NAME(depth_step)(c), end - from), next = from + depth;
        const int64_t packed_depth = NAME(packed_depth)(depth);
        const int first_step = from == begin, last_step = next == end;
        NAME(pack_rows)(c->kernels, &w->right, from, depth, at.col, at.cols, c->kernels->OF_OPERAND(tile_cols), depth,
                        s->b);
        const NAME(panels) right = NAME(packed_panels)(c->kernels, s->b, packed_depth);
        fetches ahead = {
            .later = make_fetch(NAME(row_of)(&w->right, next) + at.col, w->right.stride * (int64_t)sizeof(OPERAND),
                                least(NAME(depth_step)(c), end - next), at.cols * (int64_t)sizeof(OPERAND))};
        set_pace(&ahead.later, NAME(tile_steps)(c->kernels, at.rows, at.cols, packed_depth));
#if STORED_IS_REAL
        if (first_step && last_step && NAME(on_lines)(c, w, at)) {
            NAME(multiply_panels)(c->kernels, at.rows, at.cols, packed_depth, left, stride, at.rows, right,
                                  w->dw + first * w->cols + at.col, w->cols, c->past_caches ? TILE_STREAM : TILE_SET,
                                  &ahead);
            break;
        }
#endif
        /* The last step goes by strips, stored while they are in the first-level cache; if it is the only one, all
         * strips have the same memory. */
        const int64_t strip = last_step ? c->tile_rows : at.rows;
        for (int64_t i = 0; i < at.rows; i += strip) {
            const int64_t rows = least(strip, at.rows - i);
            REAL *sums = s->c + (first_step && last_step ? 0 : i * at.stride);
            NAME(multiply_panels)(c->kernels, rows, at.cols, packed_depth, left + i * stride + from - begin, stride,
                                  at.rows - i, right, sums, at.stride, first_step ? TILE_SET : TILE_ADD, &ahead);
            if (last_step)
                NAME(store_rows)(c->kernels, sums, at.stride, rows, at.cols, w->dw + (first + i) * w->cols + at.col,
                                 w->cols, c->past_caches);
        }
        from = next;
    } while (from < end);
    stream_end();
}

static mmbal_status NAME(dw1_task)(void *context, int worker, int64_t begin, int64_t end) {
    const NAME(call) *c = context;
    const NAME(weight_gradient) w = {.left = c->dhidden_turned,
                                     .right = {c->input, NAME(row_stride)(c->D), c->first_row},
                                     .rows = c->F,
                                     .cols = c->D,
                                     .dw = c->dw1,
                                     .db = c->db1};
    for (int64_t index = begin; index < end; index++) NAME(weight_gradient_block)(c, &w, index, c->scratch + worker);
    return MMBAL_OK;
}

static mmbal_status NAME(dw2_task)(void *context, int worker, int64_t begin, int64_t end) {
    const NAME(call) *c = context;
    const NAME(weight_gradient) w = {.left = c->g_turned,
                                     .right = {c->hidden, NAME(row_stride)(c->F), c->first_row},
                                     .rows = c->D,
                                     .cols = c->F,
                                     .dw = c->dw2,
                                     .db = c->db2};
    for (int64_t index = begin; index < end; index++) NAME(weight_gradient_block)(c, &w, index, c->scratch + worker);
    return MMBAL_OK;
}

#include "expert_mlp_joint_body.h"

static mmbal_status NAME(backward)(const void *dy, const mmbal_expert_mlp_inputs *inputs, const void *preactivation,
                                   mmbal_expert_mlp_shape shape, const mmbal_expert_mlp_options *options,
                                   const mmbal_expert_mlp_gradients *gradients, void *workspace,
                                   const mmbal_pool *pool) {
    if (!workspace) return MMBAL_INVALID_ARGUMENT;
    NAME(call) c = NAME(begin_call)(inputs, shape, options, pool->workers);
    arena from = {(uintptr_t)workspace};
    NAME(backward_workspace)(&c, pool->workers, &from);
    c.dy = dy, c.preactivation = preactivation, c.dx = gradients->dx, c.dweights = gradients->dweights;
    c.dw1 = gradients->dw1, c.db1 = gradients->db1, c.dw2 = gradients->dw2, c.db2 = gradients->db2;

    const int hidden_needed = c.dx || c.dw1 || c.db1 || c.dw2 || c.dweights;
    mmbal_status status = MMBAL_OK;
    for (int64_t first = 0, last; first < c.E && status == MMBAL_OK; first = last) {
        last = wave_end(c.offsets, c.E, first, pool->workers);
        NAME(call) wave = NAME(wave)(&c, first, last);
        wave.turned[0] = 0;
        for (int64_t e = 1; e < wave.E; e++)
            wave.turned[e] = wave.turned[e - 1] + NAME(whole_lines)(wave.offsets[e] - wave.offsets[e - 1]);
        const int jointly = NAME(goes_jointly)(&wave, pool->workers);
        const pass passes[] = {
            {1, NAME(gather_blocks)(&wave), 1, NAME(gather_gradient_task)},
            {jointly, NAME(x_blocks)(&wave) * ceil_div(c.D, c.kernels->OF_OPERAND(tile_cols)), 1, NAME(x_panels_task)},
            {jointly, NAME(joint_blocks)(&wave), blocks_per_task(NAME(joint_blocks)(&wave), pool->workers),
             NAME(joint_task)},
            {jointly && c.db2, wave.E * c.D, ROWS_PER_TASK, NAME(db2_task)},
            {!jointly && hidden_needed, NAME(row_blocks)(&wave, c.F),
             blocks_per_task(NAME(row_blocks)(&wave, c.F), pool->workers), NAME(hidden_gradient_task)},
            {c.dx != NULL, NAME(row_blocks)(&wave, c.D), blocks_per_task(NAME(row_blocks)(&wave, c.D), pool->workers),
             NAME(input_gradient_task)},
            {!jointly && (c.dw1 || c.db1), count_expert_blocks(wave.E, c.blocking, c.F, c.D), 1, NAME(dw1_task)},
            {!jointly && (c.dw2 || c.db2), count_expert_blocks(wave.E, c.blocking, c.D, c.F), 1, NAME(dw2_task)},
        };
        status = run_passes(passes, sizeof passes / sizeof passes[0], &wave, pool);
    }
    const pass passes[] = {
        {c.dweights != NULL, c.R, ROWS_PER_TASK, NAME(dweights_task)},
        {c.dx != NULL, c.N, ROWS_PER_TASK, NAME(combine_dx_task)},
    };
    return status == MMBAL_OK ? run_passes(passes, sizeof passes / sizeof passes[0], &c, pool) : status;
}
