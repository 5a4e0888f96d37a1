/* KL of categorical distributions for one dtype; see each_dtype.h. A tile is as many whole rows of C classes as TILE
 * elements hold, one at least, in the worker's slice of the workspace. Few classes lie as columns [C, r], so that loops
 * over r are vectors; many as rows [r, C], each a vector itself. */

/* Distributions of a tile, not divided by their sums: with x = logit - largest logit of the row,
 * p = exp(x) inverse, ln p = x - log_total. */
typedef struct {
    REAL *x, *exp_x;                     /* [C, r] or [r, C] */
    REAL inverse[TILE], log_total[TILE]; /* [r] */
} NAME(distributions);

static void NAME(softmax_columns)(int64_t rows, int64_t C, const STORED *next, int64_t next_bytes,
                                  NAME(distributions) * of) {
    const int64_t stride = categorical_tile(C) / C;
    REAL top[TILE], total[TILE];
    for (int64_t r = 0; r < rows; r++) top[r] = of->x[r], total[r] = 0;
    for (int64_t c = 1; c < C; c++) {
        const REAL *restrict x = of->x + c * stride;
        for (int64_t r = 0; r < rows; r++) top[r] = x[r] > top[r] ? x[r] : top[r];
    }
    for (int64_t c = 0; c < C; c++) {
        REAL *restrict x = of->x + c * stride, *restrict exp_x = of->exp_x + c * stride;
        fetch_part(next, next_bytes, c, C, 0);
        for (int64_t r = 0; r < rows; r++) {
            x[r] -= top[r];
            exp_x[r] = OF_REAL(exp)(x[r]);
            total[r] += exp_x[r];
        }
    }
    for (int64_t r = 0; r < rows; r++) of->log_total[r] = OF_REAL(log)(total[r]), of->inverse[r] = 1 / total[r];
}

/* The sum of PARTS interleaved parts, added in their order. What is not unrolled becomes a vector. */
static inline REAL NAME(sum_of)(const REAL *values, int64_t count) {
    REAL parts[PARTS] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + PARTS <= count; i += PARTS)
#pragma GCC unroll 1
        for (int part = 0; part < PARTS; part++) parts[part] += values[i + part];
    for (int part = 0; i < count; i++, part++) parts[part] += values[i];
    for (int part = 0; part < PARTS; part++) sum += parts[part];
    return sum;
}

static inline REAL NAME(largest_of)(const REAL *values, int64_t count) {
    REAL parts[PARTS], top;
    int64_t i = 0;
    for (int part = 0; part < PARTS; part++) parts[part] = values[0];
    for (; i + PARTS <= count; i += PARTS)
#pragma GCC unroll 1
        for (int part = 0; part < PARTS; part++)
            parts[part] = values[i + part] > parts[part] ? values[i + part] : parts[part];
    for (int part = 0; i < count; i++, part++) parts[part] = values[i] > parts[part] ? values[i] : parts[part];
    top = parts[0];
    for (int part = 1; part < PARTS; part++) top = parts[part] > top ? parts[part] : top;
    return top;
}

static void NAME(softmax_row)(const STORED *logits, int64_t r, int64_t C, NAME(distributions) * of) {
    REAL *restrict x = of->x + r * C, *restrict exp_x = of->exp_x + r * C;
    NAME(load_all)(logits, C, x);
    const REAL top = NAME(largest_of)(x, C);
    for (int64_t first = 0; first < C; first += 256) {
        const int64_t last = C - first < 256 ? C : first + 256;
        /* the row after this one, a few lines at a time (at the end of the logits nobody's memory, which is not read)
         */
        fetch_part(logits + C + first, (last - first) * (int64_t)sizeof(STORED), 0, 1, 0);
        for (int64_t c = first; c < last; c++) {
            x[c] -= top;
            exp_x[c] = OF_REAL(exp)(x[c]);
        }
    }
    const REAL total = NAME(sum_of)(exp_x, C);
    of->log_total[r] = OF_REAL(log)(total), of->inverse[r] = 1 / total;
}

/* next_rows: those of the tile after this one. */
static void NAME(softmax)(const STORED *logits, int64_t rows, int64_t next_rows, int64_t C, NAME(distributions) * of) {
    if (C <= FEW_CLASSES) {
        NAME(columns_of)(logits, rows, C, of->x, categorical_tile(C) / C);
        NAME(softmax_columns)(rows, C, logits + rows * C, next_rows * C * (int64_t)sizeof(STORED), of);
    } else {
        for (int64_t r = 0; r < rows; r++) NAME(softmax_row)(logits + r * C, r, C, of);
    }
}

/* p (ln p - ln q) but for the division by p's sum; a class that p lacks adds nothing. */
static inline REAL NAME(entropy_term)(REAL exp_x, REAL log_p, REAL log_q) {
    return exp_x == 0 ? 0 : exp_x * (log_p - log_q);
}

/* kl[r] = sum_c p (ln p - ln q) */
static void NAME(relative_entropies)(const NAME(distributions) * p, const NAME(distributions) * q, int64_t rows,
                                     int64_t C, REAL *restrict kl) {
    if (C <= FEW_CLASSES) {
        const int64_t stride = categorical_tile(C) / C;
        for (int64_t r = 0; r < rows; r++) kl[r] = 0;
        for (int64_t i = 0; i < C * stride; i += stride)
            for (int64_t r = 0; r < rows; r++)
                kl[r] +=
                    NAME(entropy_term)(p->exp_x[i + r], p->x[i + r] - p->log_total[r], q->x[i + r] - q->log_total[r]);
    } else {
        for (int64_t r = 0; r < rows; r++) {
            const REAL *exp_x = p->exp_x + r * C, *x = p->x + r * C, *of_q = q->x + r * C;
            const REAL log_total = p->log_total[r], log_total_q = q->log_total[r];
            REAL terms[TILE], sum = 0;
            for (int64_t first = 0; first < C; first += TILE) {
                const int64_t count = C - first < TILE ? C - first : TILE;
                for (int64_t c = 0; c < count; c++)
                    terms[c] =
                        NAME(entropy_term)(exp_x[first + c], x[first + c] - log_total, of_q[first + c] - log_total_q);
                sum += NAME(sum_of)(terms, count);
            }
            kl[r] = sum;
        }
    }
    for (int64_t r = 0; r < rows; r++) {
        const REAL value = kl[r] * p->inverse[r];
        kl[r] = value < 0 ? 0 : value;
    }
}

/* The worker's tiles, for the modality and for the fused prediction. */
static REAL *NAME(lay_out)(const categorical_rows *t, int worker, NAME(distributions) * modality,
                           NAME(distributions) * fused) {
    const int64_t size = categorical_tile(t->C);
    REAL *memory = (REAL *)t->workspace + worker * CATEGORICAL_ARRAYS * size;
    modality->x = memory, modality->exp_x = memory + size;
    fused->x = memory + 2 * size, fused->exp_x = memory + 3 * size;
    return memory + 4 * size;
}

static mmbal_status NAME(categorical_kl_task)(void *context, int worker, int64_t begin, int64_t end) {
    const categorical_rows *t = context;
    const int64_t M = t->M, N = t->N, C = t->C, most = categorical_tile(C) / C;
    const STORED *logits = t->logits, *fused_logits = t->fused_logits;
    NAME(distributions) p, q;
    NAME(lay_out)(t, worker, &p, &q);
    REAL *kl = t->kl, kl_m[TILE];
    for (int64_t n = begin; n < end; n += most) {
        const int64_t rows = end - n < most ? end - n : most, left = end - n - rows, next = left < most ? left : most;
        NAME(softmax)(fused_logits + n * C, rows, next, C, &q);
        for (int64_t m = 0; m < M; m++) {
            NAME(softmax)(logits + (m * N + n) * C, rows, next, C, &p);
            NAME(relative_entropies)(t->reverse ? &q : &p, t->reverse ? &p : &q, rows, C, kl_m);
            for (int64_t r = 0; r < rows; r++) kl[(n + r) * M + m] = kl_m[r];
        }
    }
    return MMBAL_OK;
}

/* The gradient of g[r] kl[r]: the modality's takes the place of its x, the fused one's is added to dfused. */
static void NAME(add_slopes)(int reverse, const REAL *g, const REAL *kl, int64_t rows, int64_t C,
                             NAME(distributions) * modality, const NAME(distributions) * fused, REAL *restrict dfused) {
    const int columns = C <= FEW_CLASSES;
    const int64_t outer = columns ? C : rows, inner = columns ? rows : C,
                  stride = columns ? categorical_tile(C) / C : C;
    for (int64_t o = 0; o < outer; o++)
        for (int64_t j = 0; j < inner; j++) {
            const int64_t i = o * stride + j, r = columns ? j : o;
            const REAL p = modality->exp_x[i] * modality->inverse[r], log_p = modality->x[i] - modality->log_total[r];
            const REAL q = fused->exp_x[i] * fused->inverse[r], log_q = fused->x[i] - fused->log_total[r];
            const REAL share = reverse ? q : p, ahead = reverse ? log_q - log_p : log_p - log_q;
            const REAL to_first = share == 0 ? 0 : g[r] * share * (ahead - kl[r]);
            const REAL to_second = g[r] * (reverse ? p - q : q - p);
            /* g = 0 whatever the row holds: a missing modality may hold NaN */
            dfused[i] += g[r] == 0 ? 0 : reverse ? to_first : to_second;
            modality->x[i] = g[r] == 0 ? 0 : reverse ? to_second : to_first;
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
    NAME(distributions) p, q;
    REAL *dfused = NAME(lay_out)(t, worker, &p, &q), kl[TILE], g[TILE];
    for (int64_t n = begin; n < end; n += most) {
        const int64_t rows = end - n < most ? end - n : most, left = end - n - rows, next = left < most ? left : most;
        NAME(softmax)(fused_logits + n * C, rows, next, C, &q);
        for (int64_t i = 0; i < size; i++) dfused[i] = 0;
        for (int64_t m = 0; m < M; m++) {
            NAME(softmax)(logits + (m * N + n) * C, rows, next, C, &p);
            NAME(relative_entropies)(t->reverse ? &q : &p, t->reverse ? &p : &q, rows, C, kl);
            for (int64_t r = 0; r < rows; r++) g[r] = dkl[(n + r) * M + m];
            NAME(add_slopes)(t->reverse, g, kl, rows, C, &p, &q, dfused);
            if (t->dlogits) NAME(store_tile)(p.x, rows, C, (STORED *)t->dlogits + (m * N + n) * C);
        }
        if (t->dfused_logits) NAME(store_tile)(dfused, rows, C, (STORED *)t->dfused_logits + n * C);
    }
    return MMBAL_OK;
}
