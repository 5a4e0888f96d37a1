/* KL of categorical distributions for one dtype; see each_dtype.h. A tile is as many whole rows of C classes as TILE
 * elements hold, one at least, in the worker's slice of the workspace. Few classes lie as columns [C, r], so that loops
 * over r are vectors; many as rows [r, C], each a vector itself. */

static inline REAL NAME(sum_of)(const REAL *values, int64_t count) {
    REAL parts[PARTS] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + PARTS <= count; i += PARTS)
        for (int part = 0; part < PARTS; part++) parts[part] += values[i + part];
    for (int part = 0; i < count; i++, part++) parts[part] += values[i];
    for (int part = 0; part < PARTS; part++) sum += parts[part];
    return sum;
}

/* p = softmax of each row, log_p its logarithm; rows as columns. */
static void NAME(log_softmax_columns)(int64_t rows, int64_t C, int64_t stride, REAL *restrict p, REAL *restrict log_p) {
    REAL top[TILE], total[TILE];
    for (int64_t r = 0; r < rows; r++) top[r] = log_p[r], total[r] = 0;
    for (int64_t c = 1; c < C; c++)
        for (int64_t r = 0; r < rows; r++) top[r] = log_p[c * stride + r] > top[r] ? log_p[c * stride + r] : top[r];
    for (int64_t c = 0; c < C; c++) {
        REAL *restrict p_c = p + c * stride, *restrict log_c = log_p + c * stride;
        for (int64_t r = 0; r < rows; r++) {
            log_c[r] -= top[r];
            p_c[r] = OF_REAL(exp)(log_c[r]);
            total[r] += p_c[r];
        }
    }
    for (int64_t r = 0; r < rows; r++) top[r] = OF_REAL(log)(total[r]), total[r] = 1 / total[r];
    for (int64_t c = 0; c < C; c++)
        for (int64_t r = 0; r < rows; r++) p[c * stride + r] *= total[r], log_p[c * stride + r] -= top[r];
}

static void NAME(log_softmax_row)(int64_t C, REAL *restrict p, REAL *restrict log_p) {
    REAL tops[PARTS], top;
    int64_t c = 0;
    for (int part = 0; part < PARTS; part++) tops[part] = log_p[0];
    for (; c + PARTS <= C; c += PARTS)
        for (int part = 0; part < PARTS; part++)
            tops[part] = log_p[c + part] > tops[part] ? log_p[c + part] : tops[part];
    for (int part = 0; c < C; c++, part++) tops[part] = log_p[c] > tops[part] ? log_p[c] : tops[part];
    top = tops[0];
    for (int part = 1; part < PARTS; part++) top = tops[part] > top ? tops[part] : top;
    for (c = 0; c < C; c++) log_p[c] -= top;
    for (c = 0; c < C; c++) p[c] = OF_REAL(exp)(log_p[c]);
    const REAL total = NAME(sum_of)(p, C), log_total = OF_REAL(log)(total), inverse = 1 / total;
    for (c = 0; c < C; c++) p[c] *= inverse, log_p[c] -= log_total;
}

static void NAME(log_softmax)(const STORED *logits, int64_t rows, int64_t C, REAL *p, REAL *log_p) {
    if (C <= FEW_CLASSES) {
        const int64_t stride = categorical_tile(C) / C;
        NAME(columns_of)(logits, rows, C, log_p, stride);
        NAME(log_softmax_columns)(rows, C, stride, p, log_p);
    } else {
        NAME(load_all)(logits, rows * C, log_p);
        for (int64_t r = 0; r < rows; r++) NAME(log_softmax_row)(C, p + r * C, log_p + r * C);
    }
}

/* kl[r] = sum_c p (ln p - ln q); a class that p lacks adds nothing. */
static void NAME(relative_entropies)(const REAL *p, const REAL *log_p, const REAL *log_q, int64_t rows, int64_t C,
                                     REAL *kl) {
    if (C <= FEW_CLASSES) {
        const int64_t stride = categorical_tile(C) / C;
        for (int64_t r = 0; r < rows; r++) kl[r] = 0;
        for (int64_t i = 0; i < C * stride; i += stride)
            for (int64_t r = 0; r < rows; r++) kl[r] += p[i + r] == 0 ? 0 : p[i + r] * (log_p[i + r] - log_q[i + r]);
    } else {
        for (int64_t r = 0; r < rows; r++) {
            const REAL *p_r = p + r * C, *log_p_r = log_p + r * C, *log_q_r = log_q + r * C;
            REAL parts[PARTS] = {0}, sum = 0;
            int64_t c = 0;
            for (; c + PARTS <= C; c += PARTS)
                for (int part = 0; part < PARTS; part++) {
                    const int64_t i = c + part;
                    parts[part] += p_r[i] == 0 ? 0 : p_r[i] * (log_p_r[i] - log_q_r[i]);
                }
            for (int part = 0; c < C; c++, part++) parts[part] += p_r[c] == 0 ? 0 : p_r[c] * (log_p_r[c] - log_q_r[c]);
            for (int part = 0; part < PARTS; part++) sum += parts[part];
            kl[r] = sum;
        }
    }
    for (int64_t r = 0; r < rows; r++) kl[r] = kl[r] < 0 ? 0 : kl[r];
}

static mmbal_status NAME(categorical_kl_task)(void *context, int worker, int64_t begin, int64_t end) {
    const categorical_rows *t = context;
    const int64_t M = t->M, N = t->N, C = t->C, size = categorical_tile(C), most = size / C;
    const STORED *logits = t->logits, *fused_logits = t->fused_logits;
    REAL *p = (REAL *)t->workspace + worker * CATEGORICAL_ARRAYS * size, *log_p = p + size;
    REAL *q = log_p + size, *log_q = q + size, *kl = t->kl, kl_m[TILE];
    for (int64_t n = begin; n < end; n += most) {
        const int64_t rows = end - n < most ? end - n : most;
        NAME(log_softmax)(fused_logits + n * C, rows, C, q, log_q);
        for (int64_t m = 0; m < M; m++) {
            NAME(log_softmax)(logits + (m * N + n) * C, rows, C, p, log_p);
            if (t->reverse)
                NAME(relative_entropies)(q, log_q, log_p, rows, C, kl_m);
            else
                NAME(relative_entropies)(p, log_p, log_q, rows, C, kl_m);
            for (int64_t r = 0; r < rows; r++) kl[(n + r) * M + m] = kl_m[r];
        }
    }
    return MMBAL_OK;
}

/* The gradient of g[r] kl[r]: the modality's takes the place of log_p, the fused one's is added to dfused. */
static void NAME(add_slopes)(int reverse, const REAL *g, const REAL *kl, int64_t rows, int64_t C, const REAL *p,
                             REAL *restrict log_p, const REAL *q, const REAL *log_q, REAL *restrict dfused) {
    const int columns = C <= FEW_CLASSES;
    const int64_t outer = columns ? C : rows, inner = columns ? rows : C,
                  stride = columns ? categorical_tile(C) / C : C;
    for (int64_t o = 0; o < outer; o++)
        for (int64_t j = 0; j < inner; j++) {
            const int64_t i = o * stride + j, r = columns ? j : o;
            const REAL share = reverse ? q[i] : p[i], ahead = reverse ? log_q[i] - log_p[i] : log_p[i] - log_q[i];
            const REAL to_first = share == 0 ? 0 : g[r] * share * (ahead - kl[r]);
            const REAL to_second = g[r] * (reverse ? p[i] - q[i] : q[i] - p[i]);
            /* g = 0 whatever the row holds: a missing modality may hold NaN */
            dfused[i] += g[r] == 0 ? 0 : reverse ? to_first : to_second;
            log_p[i] = g[r] == 0 ? 0 : reverse ? to_second : to_first;
        }
}

static void NAME(store_tile)(const REAL *tile, int64_t rows, int64_t C, STORED *to) {
    if (C <= FEW_CLASSES) {
        NAME(rows_of)(tile, categorical_tile(C) / C, rows, C, to);
    } else {
        for (int64_t i = 0; i < rows * C; i++) to[i] = STORE(tile[i]);
    }
}

static mmbal_status NAME(categorical_kl_backward_task)(void *context, int worker, int64_t begin, int64_t end) {
    const categorical_rows *t = context;
    const int64_t M = t->M, N = t->N, C = t->C, size = categorical_tile(C), most = size / C;
    const STORED *logits = t->logits, *fused_logits = t->fused_logits;
    const REAL *dkl = t->dkl;
    REAL *p = (REAL *)t->workspace + worker * CATEGORICAL_ARRAYS * size, *log_p = p + size;
    REAL *q = log_p + size, *log_q = q + size, *dfused = log_q + size, kl[TILE], g[TILE];
    for (int64_t n = begin; n < end; n += most) {
        const int64_t rows = end - n < most ? end - n : most;
        NAME(log_softmax)(fused_logits + n * C, rows, C, q, log_q);
        for (int64_t i = 0; i < size; i++) dfused[i] = 0;
        for (int64_t m = 0; m < M; m++) {
            NAME(log_softmax)(logits + (m * N + n) * C, rows, C, p, log_p);
            if (t->reverse)
                NAME(relative_entropies)(q, log_q, log_p, rows, C, kl);
            else
                NAME(relative_entropies)(p, log_p, log_q, rows, C, kl);
            for (int64_t r = 0; r < rows; r++) g[r] = dkl[(n + r) * M + m];
            NAME(add_slopes)(t->reverse, g, kl, rows, C, p, log_p, q, log_q, dfused);
            if (t->dlogits) NAME(store_tile)(log_p, rows, C, (STORED *)t->dlogits + (m * N + n) * C);
        }
        if (t->dfused_logits) NAME(store_tile)(dfused, rows, C, (STORED *)t->dfused_logits + n * C);
    }
    return MMBAL_OK;
}
