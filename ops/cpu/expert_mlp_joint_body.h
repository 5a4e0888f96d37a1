/* The backward of experts with many rows, for one dtype: h, du, dw1 and dw2 of some columns of F in one task. a and du
 * turned, which only dw1 and dw2 read, never leave the second-level cache; w2 is packed once. Every sum runs in the
 * order of those of expert_mlp_backward_body.h. */

enum { NAME(FINISHED_AT_ONCE) = 32 /* rows; an even number */ };

/* What a worker holds of a task, beside its scratch: c holds h, b the panels of a. */
typedef struct {
    OPERAND *weights; /* panels of w2 over the whole of D, step by step */
    OPERAND *turned;  /* [cols, row_stride(rows at once)] du transposed */
    REAL *dw1, *dw2;  /* [cols, whole panels of D], [D, cols] sums that another step of the rows is added to */
} NAME(joint);

/* Rows that are taken at once. */
static int64_t NAME(joint_rows)(void) { return mmbal_blocking_in_use().depth_bytes / (int64_t)sizeof(OPERAND); }

static int64_t NAME(whole_cols)(const mmbal_kernels *kernels, int64_t cols) {
    return whole_multiples(kernels->OF_OPERAND(tile_cols), cols);
}

static NAME(joint) NAME(carve_joint)(const NAME(call) * c, arena *from) {
    const int64_t cols = mmbal_blocking_in_use().cols, size = (int64_t)sizeof(OPERAND);
    const NAME(joint)
        made = {.weights = carve(from, cols * NAME(packed_depth)(c->D) * size),
                .turned = carve(from, cols * NAME(row_stride)(NAME(joint_rows)()) * size),
                .dw1 = carve(from, cols * NAME(whole_cols)(mmbal_kernels_in_use(), c->D) * (int64_t)sizeof(REAL)),
                .dw2 = carve(from, c->D * cols * (int64_t)sizeof(REAL))};
    return made;
}

static int64_t NAME(joint_bytes)(const NAME(call) * c) {
    arena nothing = {0};
    NAME(carve_joint)(c, &nothing);
    return bytes_carved(&nothing);
}

static void NAME(joint_workspace)(NAME(call) * c, int workers, arena *from) {
    const int64_t D = NAME(whole_cols)(mmbal_kernels_in_use(), c->D);
    c->x_panels = carve(from, c->turned_stride * D * (int64_t)sizeof(OPERAND));
    c->joint = carve(from, workers * NAME(joint_bytes)(c));
}

/* Whether all experts of a wave that have rows have many, there are tasks enough to keep the workers equally busy, and
 * the gradients of both weights are asked for. */
static int NAME(goes_jointly)(const NAME(call) * wave, int workers) {
    int64_t many = 0;
    for (int64_t e = 0; e < wave->E; e++) {
        const int64_t rows = wave->offsets[e + 1] - wave->offsets[e];
        if (few_rows(rows)) return 0;
        many += rows > 0;
    }
    const int64_t tasks = many * ceil_div(wave->F, wave->blocking.cols);
    return wave->dw1 && wave->dw2 && tasks >= 2 * BLOCKS_OF_A_WORKER * (int64_t)workers;
}

/* The input of an expert's rows from .. as a right factor. */
static OPERAND *NAME(x_panels_of)(const NAME(call) * c, int64_t expert, int64_t from) {
    return c->x_panels + (c->turned[expert] + from) * NAME(whole_cols)(c->kernels, c->D);
}

static int64_t NAME(x_blocks)(const NAME(call) * c) {
    int64_t count = 0;
    for (int64_t e = 0; e < c->E; e++) count += ceil_div(c->offsets[e + 1] - c->offsets[e], NAME(joint_rows)());
    return count;
}

static mmbal_status NAME(x_panels_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(call) *c = context;
    const NAME(rows) x = {c->input, NAME(row_stride)(c->D), c->first_row};
    const int tile_cols = c->kernels->OF_OPERAND(tile_cols);
    for (int64_t index = begin; index < end; index++) {
        int64_t e = 0, step = index / ceil_div(c->D, tile_cols), rows = NAME(joint_rows)();
        const int64_t col = index % ceil_div(c->D, tile_cols) * tile_cols;
        for (; step >= ceil_div(c->offsets[e + 1] - c->offsets[e], rows); e++)
            step -= ceil_div(c->offsets[e + 1] - c->offsets[e], rows);
        const int64_t from = step * rows, first = c->offsets[e] + from;
        rows = least(rows, c->offsets[e + 1] - first);
        NAME(pack_rows)(c->kernels, &x, first, rows, col, least(tile_cols, c->D - col), tile_cols, rows,
                        NAME(x_panels_of)(c, e, from) + col * NAME(packed_depth)(rows));
    }
    return MMBAL_OK;
}

/* w2 of some columns, all of its depth. */
static void NAME(joint_weights)(const NAME(call) * c, block at, OPERAND *packed) {
    const NAME(weights) w2 = {c->w2 + at.expert * c->D * c->F, c->F, 0, NULL};
    const int64_t step = NAME(depth_step)(c), cols = NAME(whole_cols)(c->kernels, at.cols);
    for (int64_t from = 0; from < c->D; from += step)
        NAME(pack_weights)(c->kernels, &w2, from, least(step, c->D - from), at.col, at.cols,
                           c->kernels->OF_OPERAND(tile_cols), packed + from * cols);
}

/* h = g w2 of the rows of `at` */
static void NAME(joint_product)(const NAME(call) * c, block at, const OPERAND *weights, REAL *h) {
    const NAME(rows) g = {c->g, NAME(row_stride)(c->D), c->first_row};
    const int64_t step = NAME(depth_step)(c), cols = NAME(whole_cols)(c->kernels, at.cols);
    for (int64_t from = 0; from < c->D; from += step) {
        const int64_t depth = NAME(packed_depth)(least(step, c->D - from));
        fetches nothing = {.later = {.pace = 0}};
        NAME(multiply_panels)(c->kernels, at.rows, at.cols, depth, NAME(row_of)(&g, at.row) + from, g.stride, at.rows,
                              NAME(packed_panels)(c->kernels, weights + from * cols, depth), h, at.stride,
                              from > 0 ? TILE_ADD : TILE_SET, &nothing);
    }
}

/* du of the rows of `at`, also turned, and panels of a. */
static void NAME(joint_gradient)(const NAME(call) * c, block at, REAL *h, OPERAND *turned, OPERAND *a) {
    const int tile_cols = c->kernels->OF_OPERAND(tile_cols);
    const int64_t stride = NAME(row_stride)(c->F), end = at.row + at.rows;
    OPERAND values[NAME(FINISHED_AT_ONCE) * BLOCK_COLS];
    for (int64_t i = 0; i < at.rows; i += NAME(FINISHED_AT_ONCE)) {
        block some = at;
        some.row += i, some.rows = least(NAME(FINISHED_AT_ONCE), at.rows - i);
        NAME(finish_hidden_gradient)(c, some, end, h + i * at.stride, values, BLOCK_COLS);
        const NAME(rows) rows = {values, BLOCK_COLS, 0};
        NAME(pack_rows)(c->kernels, &rows, 0, some.rows, 0, at.cols, tile_cols, at.rows, a + i * tile_cols);
    }
    NAME(turn)(c->kernels, c->dhidden + (at.row - c->first_row) * stride + at.col, stride, at.rows, at.cols, turned,
               NAME(row_stride)(NAME(joint_rows)()));
}

/* dw1 of at.cols of its rows: panel by panel of x, while du stays in the second-level cache. */
static void NAME(joint_dw1)(const NAME(call) * c, block at, const OPERAND *turned, const OPERAND *x, REAL *sums,
                            int64_t stride, tile_result result) {
    const int64_t tile_cols = c->kernels->OF_OPERAND(tile_cols), depth = NAME(packed_depth)(at.rows);
    NAME(panels) panel = NAME(packed_panels)(c->kernels, x, depth);
    for (int64_t col = 0; col < c->D; col += tile_cols, panel.data += panel.panel) {
        fetches ahead = {.later = make_fetch(panel.data + panel.panel, 0, col + tile_cols < c->D,
                                             panel.panel * (int64_t)sizeof(OPERAND))};
        set_pace(&ahead.later, NAME(tile_steps)(c->kernels, at.cols, tile_cols, depth));
        NAME(multiply_rows)(c->kernels, at.cols, depth, turned, NAME(row_stride)(NAME(joint_rows)()), panel, sums + col,
                            stride, result, &ahead);
    }
}

/* dw2 of at.cols of its columns. */
static void NAME(joint_dw2)(const NAME(call) * c, block at, int64_t from, const OPERAND *a, REAL *sums, int64_t stride,
                            tile_result result, fetch later) {
    const int64_t depth = NAME(packed_depth)(at.rows);
    fetches ahead = {.later = later};
    set_pace(&ahead.later, NAME(tile_steps)(c->kernels, c->D, at.cols, depth));
    NAME(multiply_panels)(c->kernels, c->D, at.cols, depth, c->g_turned + c->turned[at.expert] + from, c->turned_stride,
                          c->D, NAME(packed_panels)(c->kernels, a, depth), sums, stride, result, &ahead);
}

static block NAME(joint_block)(const NAME(call) * c, int64_t index) {
    const int64_t across = ceil_div(c->F, c->blocking.cols), col = index % across * c->blocking.cols;
    return (block){.expert = index / across,
                   .row = c->offsets[index / across],
                   .col = col,
                   .cols = least(c->blocking.cols, c->F - col),
                   .stride = c->blocking.cols};
}

static int64_t NAME(joint_blocks)(const NAME(call) * c) { return c->E * ceil_div(c->F, c->blocking.cols); }

static fetch NAME(fetch_joint_weights)(const NAME(call) * c, block at) {
    const int64_t size = (int64_t)sizeof(STORED);
    return make_fetch(c->w2 + at.expert * c->D * c->F + at.col, c->F * size, least(c->D, rows_that_stay(c->F * size)),
                      at.cols * size);
}

static void NAME(joint_columns)(const NAME(call) * c, block whole, fetch next, int worker) {
    const int64_t D = c->D, F = c->F, first = whole.row, count = c->offsets[whole.expert + 1] - first;
    const int64_t padded_D = NAME(whole_cols)(c->kernels, D), most = NAME(joint_rows)();
    arena memory = {(uintptr_t)(c->joint + worker * NAME(joint_bytes)(c))};
    const NAME(joint) s = NAME(carve_joint)(c, &memory);
    NAME(scratch) *scratch = c->scratch + worker;
    STORED *dw1 = c->dw1 + (whole.expert * F + whole.col) * D, *dw2 = c->dw2 + whole.expert * D * F + whole.col;
    REAL *dw1_sums = s.dw1, *dw2_sums = s.dw2, db1[BLOCK_COLS] = {0};
    int64_t dw1_stride = padded_D, dw2_stride = whole.stride;
    tile_result result = TILE_SET;
#if STORED_IS_REAL
    const NAME(weight_gradient) first_gradient = {.dw = c->dw1, .cols = D}, second = {.dw = c->dw2, .cols = F};
    block columns_of_x = whole;
    columns_of_x.cols = D;
    const int direct =
        count <= most && NAME(on_lines)(c, &first_gradient, columns_of_x) && NAME(on_lines)(c, &second, whole);
    if (direct) {
        dw1_sums = dw1, dw2_sums = dw2, dw1_stride = D, dw2_stride = F;
        if (c->past_caches) result = TILE_STREAM;
    }
#else
    const int direct = 0;
#endif
    if (count > 0) NAME(joint_weights)(c, whole, s.weights);
    int64_t from = 0;
    do { /* once at least: without rows the sums are zeros */
        block at = whole;
        at.row += from, at.rows = least(most, count - from);
        NAME(joint_product)(c, at, s.weights, scratch->c);
        NAME(joint_gradient)(c, at, scratch->c, s.turned, scratch->b);
        for (int64_t f = 0; c->db1 && f < at.cols; f++)
            db1[f] = NAME(sum)(c->kernels, db1[f], at.rows, s.turned + f * NAME(row_stride)(most));
        NAME(joint_dw1)(c, at, s.turned, NAME(x_panels_of)(c, at.expert, from), dw1_sums, dw1_stride, result);
        const int last = from + at.rows == count;
        NAME(joint_dw2)(c, at, from, scratch->b, dw2_sums, dw2_stride, result, last ? next : (fetch){.groups = 0});
        result = TILE_ADD;
        from += at.rows;
    } while (from < count);
    if (c->db1) NAME(narrow)(c->kernels, whole.cols, db1, c->db1 + whole.expert * F + whole.col);
    if (!direct) {
        NAME(store_rows)(c->kernels, dw1_sums, dw1_stride, whole.cols, D, dw1, D, c->past_caches);
        NAME(store_rows)(c->kernels, dw2_sums, dw2_stride, D, whole.cols, dw2, F, c->past_caches);
    }
    stream_end();
}

static mmbal_status NAME(joint_task)(void *context, int worker, int64_t begin, int64_t end) {
    const NAME(call) *c = context;
    for (int64_t index = begin; index < end; index++) {
        const fetch next =
            index + 1 < end ? NAME(fetch_joint_weights)(c, NAME(joint_block)(c, index + 1)) : (fetch){.groups = 0};
        NAME(joint_columns)(c, NAME(joint_block)(c, index), next, worker);
    }
    return MMBAL_OK;
}

/* db2(e, d) = the sum of g_turned(d, .) over the rows of expert e */
static mmbal_status NAME(db2_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(call) *c = context;
    for (int64_t index = begin; index < end; index++) {
        const int64_t e = index / c->D, d = index % c->D;
        const REAL sum = NAME(sum)(c->kernels, 0, c->offsets[e + 1] - c->offsets[e],
                                   c->g_turned + d * c->turned_stride + c->turned[e]);
        NAME(narrow)(c->kernels, 1, &sum, c->db2 + index);
    }
    return MMBAL_OK;
}
