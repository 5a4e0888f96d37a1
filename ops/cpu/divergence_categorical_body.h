/* KL of categorical distributions for one dtype; see each_dtype.h. A tile is as many whole rows of C classes as TILE
 * elements hold, one at least, in the worker's slice of the workspace. Few classes lie as columns [C, r], so that loops
 * over r are vectors; many as rows [r, C], each a vector itself. */

/* Distributions of a tile, not divided by their sums: with x = logit - largest logit of the row,
 * p = exp(x) / total, ln p = x - ln total. Below least_exponent p is 0. */
typedef struct {
    REAL *x, *exp_x;  /* [C, r] or [r, C] */
    REAL total[TILE]; /* [r] */
} NAME(distributions);

/* exp(x) (ln p - ln q) but for the totals; a class that p lacks adds nothing. */
static inline REAL NAME(entropy_term)(REAL exp_x, REAL x, REAL x_q) {
    return x < OF_REAL(least_exponent) ? 0 : exp_x * (x - x_q);
}

/* The KL of the sum of these terms. */
static inline REAL NAME(relative_entropy)(REAL terms, REAL total, REAL total_q) {
    const REAL kl = terms / total - OF_REAL(log)(total / total_q);
    return kl < 0 ? 0 : kl;
}

static inline REAL NAME(larger)(REAL a, REAL b) { return a > b ? a : b; }

static void NAME(softmax_columns)(int64_t rows, int64_t C, const STORED *next, int64_t next_bytes,
                                  NAME(distributions) * of) {
    const int64_t stride = tile_rows(C);
    REAL top[TILE], *restrict total = of->total;
    for (int64_t r = 0; r < rows; r++) top[r] = of->x[r], total[r] = 0;
    for (int64_t c = 1; c < C; c++) {
        const REAL *restrict x = of->x + c * stride;
        for (int64_t r = 0; r < rows; r++) top[r] = NAME(larger)(x[r], top[r]);
    }
    for (int64_t c = 0; c < C; c++) {
        REAL *restrict x = of->x + c * stride, *restrict exp_x = of->exp_x + c * stride;
        fetch_part(next, next_bytes, c, C, 0);
        for (int64_t r = 0; r < rows; r++) {
            x[r] -= top[r];
            exp_x[r] = OF_REAL(exp_nonpositive)(x[r]);
            total[r] += exp_x[r];
        }
    }
}

/* Long rows go by blocks of PARTS classes, and are summed in as many interleaved parts, which become a vector where
 * their loop is not unrolled, and these by halves. The last block is filled up with logits of probability 0. */
typedef struct {
    const STORED *logits; /* [C] */
    int64_t whole;        /* classes of whole blocks */
    STORED last[PARTS];
} NAME(long_row);

static inline NAME(long_row) NAME(long_row_of)(const STORED *logits, int64_t C) {
    NAME(long_row) row = {.logits = logits, .whole = C / PARTS * PARTS};
    for (int part = 0; part < PARTS && row.whole < C; part++)
        row.last[part] = row.whole + part < C ? logits[row.whole + part] : STORE((REAL)-INFINITY);
    return row;
}

static inline const STORED *NAME(block)(const NAME(long_row) * row, int64_t c) {
    return c < row->whole ? row->logits + c : row->last;
}

static inline REAL NAME(sum_of_parts)(REAL parts[PARTS]) {
#pragma GCC unroll 4
    for (int half = PARTS / 2; half > 0; half /= 2)
        for (int part = 0; part < half; part++) parts[part] += parts[part + half];
    return parts[0];
}

static inline REAL NAME(largest_logit)(const NAME(long_row) * row, int64_t C) {
    enum { CHAINS = 2 }; /* a comparison takes several cycles, and nothing else fills them here */
    REAL parts[CHAINS * PARTS];
    for (int part = 0; part < CHAINS * PARTS; part++) parts[part] = LOAD(row->logits[0]);
    int64_t c = 0;
    for (; c + CHAINS * PARTS <= row->whole; c += CHAINS * PARTS)
#pragma GCC unroll 1
        for (int part = 0; part < CHAINS * PARTS; part++)
            parts[part] = NAME(larger)(LOAD(row->logits[c + part]), parts[part]);
    for (; c < C; c += PARTS) {
        const STORED *block = NAME(block)(row, c);
#pragma GCC unroll 1
        for (int part = 0; part < PARTS; part++) parts[part] = NAME(larger)(LOAD(block[part]), parts[part]);
    }
#pragma GCC unroll 5
    for (int half = CHAINS * PARTS / 2; half > 0; half /= 2)
        for (int part = 0; part < half; part++) parts[part] = NAME(larger)(parts[part + half], parts[part]);
    return parts[0];
}

/* A block of the row after this one, into the second-level cache. Behind the last row nothing is read. */
static inline void NAME(fetch_next_row)(const STORED *logits, int64_t C, int64_t c) {
    for (int64_t byte = 0; byte < PARTS * (int64_t)sizeof(STORED); byte += CACHE_LINE)
        __builtin_prefetch((const char *)(logits + C + c) + byte, 0, 2);
}

static void NAME(softmax_row)(const STORED *logits, int64_t r, int64_t C, NAME(distributions) * of) {
    const NAME(long_row) row = NAME(long_row_of)(logits, C);
    const REAL top = NAME(largest_logit)(&row, C);
    REAL totals[PARTS] = {0};
    for (int64_t c = 0; c < C; c += PARTS) {
        const STORED *restrict block = NAME(block)(&row, c);
        REAL *restrict x = of->x + r * row_stride(C) + c, *restrict exp_x = of->exp_x + r * row_stride(C) + c;
        NAME(fetch_next_row)(logits, C, c);
#pragma GCC ivdep
#pragma GCC unroll 1
        for (int part = 0; part < PARTS; part++) {
            x[part] = LOAD(block[part]) - top;
            exp_x[part] = OF_REAL(exp_nonpositive)(x[part]);
            totals[part] += exp_x[part];
        }
    }
    of->total[r] = NAME(sum_of_parts)(totals);
}

/* next_rows: those of the tile after this one. */
static void NAME(softmax)(const STORED *logits, int64_t rows, int64_t next_rows, int64_t C, NAME(distributions) * of) {
    if (C <= FEW_CLASSES) {
        NAME(columns_of)(logits, rows, C, of->x, tile_rows(C));
        NAME(softmax_columns)(rows, C, logits + rows * C, next_rows * C * (int64_t)sizeof(STORED), of);
    } else {
        for (int64_t r = 0; r < rows; r++) NAME(softmax_row)(logits + r * C, r, C, of);
    }
}

/* kl[r] = sum_c p (ln p - ln q) */
static void NAME(relative_entropies)(const NAME(distributions) * p, const NAME(distributions) * q, int64_t rows,
                                     int64_t C, REAL *restrict kl) {
    if (C <= FEW_CLASSES) {
        const int64_t stride = tile_rows(C);
        for (int64_t r = 0; r < rows; r++) kl[r] = 0;
        for (int64_t i = 0; i < C * stride; i += stride)
            for (int64_t r = 0; r < rows; r++) kl[r] += NAME(entropy_term)(p->exp_x[i + r], p->x[i + r], q->x[i + r]);
    } else {
        for (int64_t r = 0; r < rows; r++) {
            REAL terms[PARTS] = {0};
            for (int64_t c = 0; c < C; c += PARTS) {
                const int64_t i = r * row_stride(C) + c;
#pragma GCC ivdep
#pragma GCC unroll 1
                for (int part = 0; part < PARTS; part++)
                    terms[part] += NAME(entropy_term)(p->exp_x[i + part], p->x[i + part], q->x[i + part]);
            }
            kl[r] = NAME(sum_of_parts)(terms);
        }
    }
    for (int64_t r = 0; r < rows; r++) kl[r] = NAME(relative_entropy)(kl[r], p->total[r], q->total[r]);
}

/* The KL of one row of many classes and row r of q, or of these in reverse, where only the sums are wanted: softmax and
 * relative entropy in one sweep. */
IN_VECTORS REAL NAME(kl_of_row)(const STORED *logits, const NAME(distributions) * q, int64_t r, int64_t C,
                                int reverse) {
    const NAME(long_row) row = NAME(long_row_of)(logits, C);
    const REAL top = NAME(largest_logit)(&row, C);
    REAL totals[PARTS] = {0}, terms[PARTS] = {0};
    for (int64_t c = 0; c < C; c += PARTS) {
        const STORED *restrict block = NAME(block)(&row, c);
        const REAL *restrict x_q = q->x + r * row_stride(C) + c, *restrict exp_x_q = q->exp_x + r * row_stride(C) + c;
        NAME(fetch_next_row)(logits, C, c);
#pragma GCC ivdep
#pragma GCC unroll 1
        for (int part = 0; part < PARTS; part++) {
            const REAL x = LOAD(block[part]) - top, exp_x = OF_REAL(exp_nonpositive)(x);
            totals[part] += exp_x;
            terms[part] +=
                reverse ? NAME(entropy_term)(exp_x_q[part], x_q[part], x) : NAME(entropy_term)(exp_x, x, x_q[part]);
        }
    }
    const REAL sum = NAME(sum_of_parts)(terms), total = NAME(sum_of_parts)(totals);
    return reverse ? NAME(relative_entropy)(sum, q->total[r], total) : NAME(relative_entropy)(sum, total, q->total[r]);
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
    const int64_t M = t->M, N = t->N, C = t->C, most = tile_rows(C);
    const STORED *logits = t->logits, *fused_logits = t->fused_logits;
    NAME(distributions) p, q;
    NAME(lay_out)(t, worker, &p, &q);
    REAL *kl = t->kl, kl_m[TILE];
    for (int64_t n = begin; n < end; n += most) {
        const int64_t rows = end - n < most ? end - n : most, left = end - n - rows, next = left < most ? left : most;
        NAME(softmax)(fused_logits + n * C, rows, next, C, &q);
        for (int64_t m = 0; m < M; m++) {
            const STORED *of_m = logits + (m * N + n) * C;
            if (C <= FEW_CLASSES) {
                NAME(softmax)(of_m, rows, next, C, &p);
                NAME(relative_entropies)(t->reverse ? &q : &p, t->reverse ? &p : &q, rows, C, kl_m);
            } else if (t->reverse) {
                for (int64_t r = 0; r < rows; r++) kl_m[r] = NAME(kl_of_row)(of_m + r * C, &q, r, C, 1);
            } else {
                for (int64_t r = 0; r < rows; r++) kl_m[r] = NAME(kl_of_row)(of_m + r * C, &q, r, C, 0);
            }
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
                  stride = columns ? tile_rows(C) : row_stride(C);
    REAL inverse[TILE], fused_inverse[TILE], log_ratio[TILE];
    for (int64_t r = 0; r < rows; r++) {
        inverse[r] = 1 / modality->total[r], fused_inverse[r] = 1 / fused->total[r];
        log_ratio[r] = OF_REAL(log)(modality->total[r] / fused->total[r]);
    }
    for (int64_t o = 0; o < outer; o++)
        for (int64_t j = 0; j < inner; j++) {
            const int64_t i = o * stride + j, r = columns ? j : o;
            const REAL x = modality->x[i], fused_x = fused->x[i], log_odds = x - fused_x - log_ratio[r];
            const REAL p = modality->exp_x[i] * inverse[r], q = fused->exp_x[i] * fused_inverse[r];
            const REAL share = reverse ? q : p, ahead = reverse ? -log_odds : log_odds;
            const int lacks = (reverse ? fused_x : x) < OF_REAL(least_exponent);
            const int is_number = kl[r] == kl[r]; /* of a row that is none, no gradient is */
            const REAL to_first = lacks && is_number ? 0 : g[r] * share * (ahead - kl[r]);
            const REAL to_second = g[r] * (reverse ? p - q : q - p);
            /* g = 0 whatever the row holds: a missing modality may hold NaN */
            dfused[i] += g[r] == 0 ? 0 : reverse ? to_first : to_second;
            modality->x[i] = g[r] == 0 ? 0 : reverse ? to_second : to_first;
        }
}

static void NAME(store_tile)(const REAL *tile, int64_t rows, int64_t C, STORED *to) {
    if (C <= FEW_CLASSES) {
        NAME(rows_of)(tile, tile_rows(C), rows, C, to);
    } else {
        for (int64_t r = 0; r < rows; r++)
            for (int64_t c = 0; c < C; c++) to[r * C + c] = STORE(tile[r * row_stride(C) + c]);
    }
}

static mmbal_status NAME(categorical_kl_backward_task)(void *context, int worker, int64_t begin, int64_t end) {
    const categorical_rows *t = context;
    const int64_t M = t->M, N = t->N, C = t->C, size = categorical_tile(C), most = tile_rows(C);
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
