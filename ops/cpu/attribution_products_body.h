/* The products of attribution_linear.c for one dtype; see each_dtype.h and docs/kernels.md. Tiles take right factors
 * from packed panels of tile_cols columns; each result is one sum in the order of its depth. */

static void NAME(turn)(const linear_products *t, const REAL *from, int64_t from_stride, int64_t rows, int64_t cols,
                       REAL *to, int64_t to_stride) {
    (sizeof(REAL) == 4 ? t->kernels->transpose_32 : t->kernels->transpose_64)(from, from_stride, rows, cols, to,
                                                                              to_stride);
}

/* c = a b for one panel b [depth, tile_cols]. */
static void NAME(multiply_panel)(const linear_products *t, int64_t rows, int64_t depth, const REAL *a, int64_t a_stride,
                                 const REAL *b, REAL *c, int64_t c_stride, tile_result result) {
    const int64_t most = t->kernels->OF_REAL(tile_rows), cols = t->kernels->OF_REAL(tile_cols);
    const int64_t height = ceil_div(rows, ceil_div(rows, most));
    fetches nothing = {.later = {.pace = 0}};
    for (int64_t i = 0; i < rows; i += height)
        t->kernels->OF_REAL(tile)((int)least(height, rows - i), depth, a + i * a_stride, a_stride, b, cols,
                                  c + i * c_stride, c_stride, result, &nothing);
}

/* Panels of W for the gradients, one a piece of work, and turned for the products of v with its rows. */
static mmbal_status NAME(pack_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const linear_products *t = context;
    const int64_t C = t->head->C, wide = t->wide;
    for (int64_t index = begin; index < end; index++) {
        const columns at = columns_of(t, index, 1);
        const STORED *weights = (const STORED *)t->head->weights[at.m] + at.first;
        const int64_t stride = weight_stride(t->head, at.d);
        REAL *panel = (REAL *)t->packed[at.m] + at.first * C, *turned = (REAL *)t->turned[at.m] + at.first * wide;
        fetch ahead = make_fetch(weights, stride * (int64_t)sizeof(STORED), C, at.count * (int64_t)sizeof(STORED));
        fetch_lines_now(&ahead, 2 * FETCH_AHEAD * ahead.lines);
        for (int64_t c = 0; c < C; c++, fetch_lines_now(&ahead, ahead.lines))
            for (int64_t i = 0; i < wide; i++) panel[c * wide + i] = i < at.count ? LOAD(weights[c * stride + i]) : 0;
        for (int64_t c = 0; c < C && t->has_zeta; c += wide, turned += at.d * wide) {
            const int64_t here = least(wide, C - c);
            if (here < wide) memset(turned, 0, sizeof(REAL) * (size_t)(at.count * wide));
            NAME(turn)(t, panel + c * wide, wide, here, at.count, turned, wide);
        }
    }
    return MMBAL_OK;
}

/* zeta of samples first .. first + rows from the products of v with the rows of W. */
static void NAME(find_zeta)(const linear_products *t, int64_t first, int64_t rows) {
    const int64_t C = t->head->C, wide = t->wide, stride = ceil_div(C, wide) * wide;
    REAL *zeta = (REAL *)t->zeta + first * stride;
    for (int64_t m = 0; m < t->attribution->M; m++) {
        const int64_t d = t->attribution->modalities[m].d, v_stride = t->gradient_strides[m];
        for (int64_t c = 0; c < C; c += wide)
            NAME(multiply_panel)(t, rows, d, (const REAL *)t->gradients[m] + first * v_stride, v_stride,
                                 (const REAL *)t->turned[m] + c * d, zeta + c, stride, m > 0 ? TILE_ADD : TILE_SET);
    }
    for (int64_t r = 0; r < rows; r++) {
        const REAL *coefficient = (const REAL *)t->coefficients + (first + r) * C;
        REAL *of_row = zeta + r * stride, mean = 0;
        for (int64_t c = 0; c < C; c++) mean -= coefficient[c] < 0 ? coefficient[c] * of_row[c] : 0;
        for (int64_t c = 0; c < C; c++) of_row[c] = coefficient[c] < 0 ? coefficient[c] * (of_row[c] - mean) : 0;
    }
    NAME(turn)(t, zeta, stride, rows, C, (REAL *)t->factors + t->attribution->B + first, t->factor_stride);
}

/* t->height samples a piece of work, from their logits to v and both factors of dW. */
static mmbal_status NAME(samples_task)(void *context, int worker, int64_t begin, int64_t end) {
    const linear_products *t = context;
    const int64_t B = t->attribution->B, C = t->head->C;
    for (int64_t piece = begin; piece < end; piece++) {
        const int64_t first = piece * t->height, rows = least(t->height, B - first);
        const REAL *coefficients = (const REAL *)t->coefficients + first * C;
        mmbal_status status = t->scores_task(t->scores, worker, first, first + rows);
        for (int64_t m = 0; m < t->attribution->M; m++) {
            const int64_t stride = t->gradient_strides[m];
            REAL *g = (REAL *)t->gradients[m] + first * stride;
            for (int64_t i = 0; i < t->attribution->modalities[m].d; i += t->wide)
                NAME(multiply_panel)(t, rows, C, coefficients, C, (const REAL *)t->packed[m] + i * C, g + i, stride,
                                     TILE_SET);
        }
        if (status == MMBAL_OK) status = t->forward_task(t->reg, worker, first, first + rows);
        if (status == MMBAL_OK) status = t->backward_task(t->reg, worker, first, first + rows);
        if (status != MMBAL_OK) return status;
        NAME(turn)(t, coefficients, C, rows, C, (REAL *)t->factors + first, t->factor_stride);
        if (t->has_zeta) NAME(find_zeta)(t, first, rows);
    }
    return MMBAL_OK;
}

/* Rows of v, then of e, as panels: those of columns `at`, t->panel_elements apart. */
static void NAME(pack_samples)(const linear_products *t, columns at, REAL *panels) {
    const int64_t B = t->attribution->B, wide = t->wide;
    for (int64_t half = 0; half < t->depth; half += B) {
        const REAL *rows = (const REAL *)(half ? t->embeddings : t->gradients)[at.m] + at.first;
        const int64_t stride = half ? at.d : t->gradient_strides[at.m];
        fetch ahead = make_fetch(rows, stride * (int64_t)sizeof(REAL), B, at.count * (int64_t)sizeof(REAL));
        fetch_lines_now(&ahead, FETCH_AHEAD * ahead.lines);
        for (int64_t b = 0; b < B; b++) {
            fetch_lines_now(&ahead, ahead.lines);
            REAL *to = panels + (half + b) * wide;
            for (int64_t i = 0; i < at.count; i += wide, to += t->panel_elements) {
                if (at.count - i < wide) memset(to, 0, sizeof(REAL) * (size_t)wide);
                memcpy(to, rows + b * stride + i, sizeof(REAL) * (size_t)least(wide, at.count - i));
            }
        }
    }
}

/* dW = coefficients^T v + zeta^T e, LINEAR_PANELS panels of columns a piece of work. */
static mmbal_status NAME(weights_task)(void *context, int worker, int64_t begin, int64_t end) {
    const linear_products *t = context;
    const int64_t C = t->head->C, wide = t->wide;
    REAL *panel = (REAL *)t->panels + worker * LINEAR_PANELS * t->panel_elements, sums[MOST_TILE_ROWS * MOST_TILE_COLS];
    for (int64_t index = begin; index < end; index++) {
        const columns at = columns_of(t, index, LINEAR_PANELS);
        const int64_t stride = weight_stride(t->head, at.d);
        NAME(pack_samples)(t, at, panel);
        for (int64_t i = 0; i < at.count; i += wide) {
            STORED *dw = (STORED *)t->dweights[at.m] + at.first + i;
            const REAL *b = panel + i / wide * t->panel_elements;
            const int64_t here = least(wide, at.count - i), direct = sizeof(STORED) == sizeof(REAL) && here == wide;
            if (direct)
                NAME(multiply_panel)(t, C, t->depth, t->factors, t->factor_stride, b, (REAL *)dw, stride, TILE_SET);
            for (int64_t c = 0; c < C && !direct; c += MOST_TILE_ROWS) {
                const int64_t rows = least(MOST_TILE_ROWS, C - c);
                const REAL *factors = (const REAL *)t->factors + c * t->factor_stride;
                NAME(multiply_panel)(t, rows, t->depth, factors, t->factor_stride, b, sums, wide, TILE_SET);
                for (int64_t r = 0; r < rows; r++)
                    for (int64_t k = 0; k < here; k++) dw[(c + r) * stride + k] = STORE(sums[r * wide + k]);
            }
        }
    }
    return MMBAL_OK;
}

static void NAME(sum_zeta)(const linear_products *t, void *dbias) {
    for (int64_t c = 0; c < t->head->C; c++) {
        const REAL *zeta = (const REAL *)t->factors + c * t->factor_stride + t->attribution->B;
        double sum = 0;
        for (int64_t b = 0; b < t->attribution->B && t->has_zeta; b++) sum += (double)zeta[b];
        ((STORED *)dbias)[c] = STORE((REAL)sum);
    }
}

static mmbal_status NAME(multiply_linear)(linear_products *t, void *dbias, const mmbal_pool *pool) {
    const int64_t B = t->attribution->B, most = t->kernels->OF_REAL(tile_rows);
    const int64_t pieces = ceil_div(ceil_div(B, most), pool->workers) * pool->workers; /* equally many a worker */
    t->height = B > 0 ? ceil_div(B, pieces) : 1;
    mmbal_status status = pool->run(pool->self, count_columns(t, 1), 1, NAME(pack_task), t);
    if (status == MMBAL_OK) status = pool->run(pool->self, ceil_div(B, t->height), 1, NAME(samples_task), t);
    if (status == MMBAL_OK) status = pool->run(pool->self, count_columns(t, LINEAR_PANELS), 1, NAME(weights_task), t);
    if (status == MMBAL_OK) NAME(sum_zeta)(t, dbias);
    return status;
}
