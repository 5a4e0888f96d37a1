/* BTW's weights for one dtype; see each_dtype.h. */

/* What a task needs of the options, as REAL. modality[m]: v (diverge) or ln v (agree). */
typedef struct {
    REAL floor, ceiling, inverse_temperature;
    REAL modality[MMBAL_MAX_MODALITIES];
} NAME(weight_terms);

static NAME(weight_terms) NAME(terms_of)(const weight_rows *t) {
    const mmbal_btw_options *o = t->options;
    NAME(weight_terms) terms = {(REAL)o->floor, (REAL)o->ceiling, (REAL)(1 / o->temperature), {0}};
    double largest = o->floor; /* of v: only their ratios matter, and these products stay in range */
    for (int64_t m = 0; m < t->M; m++) largest = t->mi[m] > largest ? t->mi[m] : largest;
    for (int64_t m = 0; m < t->M; m++) {
        const double v = (t->mi[m] > o->floor ? t->mi[m] : o->floor) / largest;
        terms.modality[m] = (REAL)(o->mode == MMBAL_BTW_AGREE ? log(v) : v);
    }
    return terms;
}

/* A tile of rows as columns: kl, NaN where a modality does not count, becomes weights that sum to one; scale[r] is what
 * mean_one multiplies a row by. */
static inline void NAME(weigh)(const weight_rows *t, const NAME(weight_terms) * terms, int64_t rows, int64_t stride,
                               REAL *restrict columns, REAL *restrict scale) {
    const int64_t M = t->M;
    const int agree = t->options->mode == MMBAL_BTW_AGREE, mean_one = t->options->mean_one;
    const REAL floor = terms->floor, ceiling = terms->ceiling, inverse_temperature = terms->inverse_temperature;
    REAL top[TILE], total[TILE];
    for (int64_t r = 0; r < rows; r++) top[r] = -INFINITY, total[r] = scale[r] = 0;
    for (int64_t m = 0; m < M; m++) {
        REAL *restrict column = columns + m * stride;
        const REAL modality = terms->modality[m];
        if (mean_one)
            for (int64_t r = 0; r < rows; r++) scale[r] += column[r] == column[r];
        if (agree) {
            for (int64_t r = 0; r < rows; r++) {
                const REAL below = column[r] < ceiling ? column[r] : ceiling;
                const REAL level = modality - (below > -ceiling ? below : -ceiling) * inverse_temperature;
                column[r] = column[r] == column[r] ? level : -INFINITY;
                top[r] = column[r] > top[r] ? column[r] : top[r];
            }
        } else {
            for (int64_t r = 0; r < rows; r++) {
                const REAL below = column[r] < ceiling ? column[r] : ceiling, D = below > floor ? below : floor;
                column[r] = column[r] == column[r] ? D * modality : 0;
            }
        }
    }
    for (int64_t m = 0; m < M && !agree; m += 2) { /* by pairs, as the vectors below do */
        const REAL *restrict even = columns + m * stride, *restrict odd = even + stride;
        if (m + 1 < M)
            for (int64_t r = 0; r < rows; r++) total[r] += even[r] + odd[r];
        else
            for (int64_t r = 0; r < rows; r++) total[r] += even[r];
    }
    if (agree) {
        for (int64_t r = 0; r < rows; r++) top[r] = top[r] == -INFINITY ? 0 : top[r]; /* nothing counts: exp(-inf) */
        for (int64_t m = 0; m < M; m++)
            for (int64_t r = 0; r < rows; r++) {
                columns[m * stride + r] = OF_REAL(exp)(columns[m * stride + r] - top[r]);
                total[r] += columns[m * stride + r];
            }
    }
    for (int64_t r = 0; r < rows; r++) total[r] = total[r] > 0 ? 1 / total[r] : 0;
    for (int64_t r = 0; r < rows; r++) scale[r] = mean_one ? scale[r] : 1;
    for (int64_t m = 0; m < M; m++)
        for (int64_t r = 0; r < rows; r++) columns[m * stride + r] *= total[r];
}

/* The divergences of a tile as columns, NaN where a modality is not present. */
static inline void NAME(load_divergences)(const weight_rows *t, int64_t n, int64_t rows, int64_t stride,
                                          REAL *restrict columns) {
    const int64_t M = t->M;
    NAME(columns_of)((const STORED *)t->kl + n * M, rows, M, columns, stride);
    const uint8_t *present = t->present ? t->present + n * M : NULL;
    for (int64_t m = 0; m < M && present; m++)
        for (int64_t r = 0; r < rows; r++) columns[m * stride + r] = present[r * M + m] ? columns[m * stride + r] : NAN;
}

/* The usual case without a detour: diverge, all present, few modalities. A vector holds as many whole rows as fit; what
 * is in the lanes behind them is written again by the next vector, so the last rows are left to the caller, who gets
 * the same bits. Returns the rows done. */
typedef REAL NAME(lanes) __attribute__((vector_size(VECTOR_BYTES)));
typedef OF_REAL(lane_integer) NAME(lane_integers) __attribute__((vector_size(VECTOR_BYTES)));
enum {
    NAME(LANES) = VECTOR_BYTES / sizeof(REAL),
    /* Lanes are chosen by one instruction: 16 or 8 floats, 8 doubles. */
    NAME(CHOOSES_LANES) = VECTOR_BYTES == 64 || (VECTOR_BYTES == 32 && sizeof(REAL) == 4)
};

#ifndef __clang__ /* which has no __builtin_shuffle */
/* For rows of M terms in a vector, the sum of a row by pairs, in the lane of its first term. later[m]: the lane m
 * further on. */
IN_VECTORS NAME(lanes) NAME(sums_of_rows)(NAME(lanes) terms, const NAME(lane_integers) * later, int64_t M) {
    const NAME(lanes) pairs = terms + __builtin_shuffle(terms, later[1]);
    NAME(lanes) sum = pairs;
#pragma GCC unroll 16
    for (int64_t m = 2; m + 1 < M; m += 2) sum += __builtin_shuffle(pairs, later[m]);
    return M % 2 ? sum + __builtin_shuffle(terms, later[M - 1]) : sum;
}

static inline NAME(lanes) NAME(where)(NAME(lane_integers) condition, NAME(lanes) value) {
    return (NAME(lanes))(condition & (NAME(lane_integers))value);
}

IN_VECTORS int64_t NAME(weigh_vectors)(const STORED *restrict kl, const NAME(weight_terms) * terms, int mean_one,
                                       int64_t rows, int64_t M, REAL *restrict weights) {
    /* Division takes longest, so two vectors share one: rows of 2 or more fill half of the lanes at most. */
    enum { LANES = NAME(LANES), HALF = LANES / 2, PAIR = 2 };
    const int64_t step = LANES / M * M, most = rows * M - step - LANES;
    const REAL floor = terms->floor, ceiling = terms->ceiling;
    REAL modality[LANES];
    /* both: the first lanes of the rows of two vectors; row: where in it a lane's row is; first: of a lane's row */
    NAME(lane_integers) both, row[PAIR], first, later[LANES];
    for (int i = 0; i < LANES; i++) {
        modality[i] = terms->modality[i % M];
        both[i] = i < HALF ? i * M % LANES : LANES + (i - HALF) * M % LANES;
        row[0][i] = i / M, row[1][i] = HALF + i / M, first[i] = i / M * M;
        for (int64_t m = 1; m < M; m++) later[m][i] = (i + m) % LANES;
    }
    int64_t i = 0;
    for (; i <= most; i += PAIR * step) {
        NAME(lanes) share[PAIR], one[PAIR], total[PAIR];
#pragma GCC unroll 2
        for (int v = 0; v < PAIR; v++) {
            REAL shares[LANES], ones[LANES];
            for (int lane = 0; lane < LANES; lane++) {
                const REAL value = LOAD(kl[i + v * step + lane]), below = value < ceiling ? value : ceiling;
                shares[lane] = value == value ? (below > floor ? below : floor) * modality[lane] : 0;
                ones[lane] = value == value;
            }
            memcpy(&share[v], shares, sizeof shares), memcpy(&one[v], ones, sizeof ones);
            total[v] = NAME(sums_of_rows)(share[v], later, M);
        }
        const NAME(lanes) totals = __builtin_shuffle(total[0], total[1], both);
        const NAME(lanes) inverses = NAME(where)(totals > 0, 1 / totals);
#pragma GCC unroll 2
        for (int v = 0; v < PAIR; v++) {
            NAME(lanes) weight = share[v] * __builtin_shuffle(inverses, row[v]);
            if (mean_one) weight *= __builtin_shuffle(NAME(sums_of_rows)(one[v], later, M), first);
            memcpy(weights + i + v * step, &weight, sizeof weight);
        }
    }
    return i / M;
}

/* LANES whole rows of three at a time, or of six as three pairs: M vectors hold them, so that none straddles a cache
 * line and one division serves all. */
enum { NAME(MOST_BLOCK) = 6 };

/* From `three` vectors with three numbers of each of LANES rows: the sum of each row. */
IN_VECTORS NAME(lanes) NAME(sums_of_threes)(const NAME(lanes) * three, const NAME(lane_integers) * of_two,
                                            const NAME(lane_integers) * of_third) {
    NAME(lanes) term[3];
#pragma GCC unroll 3
    for (int m = 0; m < 3; m++)
        term[m] = __builtin_shuffle(__builtin_shuffle(three[0], three[1], of_two[m]), three[2], of_third[m]);
    return (term[0] + term[1]) + term[2];
}

/* The sums of the LANES rows of M in as many vectors, by pairs where M is six. */
IN_VECTORS NAME(lanes)
    NAME(sums_of_block)(const NAME(lanes) * terms, int M, const NAME(lane_integers) * of_two,
                        const NAME(lane_integers) * of_third, NAME(lane_integers) neighbour, NAME(lane_integers) even) {
    NAME(lanes) three[3];
    if (M == 3) return NAME(sums_of_threes)(terms, of_two, of_third);
#pragma GCC unroll 3
    for (int v = 0; v < 3; v++) {
        const NAME(lanes) first = terms[2 * v] + __builtin_shuffle(terms[2 * v], neighbour);
        const NAME(lanes) second = terms[2 * v + 1] + __builtin_shuffle(terms[2 * v + 1], neighbour);
        three[v] = __builtin_shuffle(first, second, even);
    }
    return NAME(sums_of_threes)(three, of_two, of_third);
}

IN_VECTORS int64_t NAME(weigh_blocks)(const STORED *restrict kl, const NAME(weight_terms) * terms, int mean_one,
                                      int64_t rows, int M, REAL *restrict weights) {
    enum { LANES = NAME(LANES) };
    const REAL floor = terms->floor, ceiling = terms->ceiling;
    REAL modality[NAME(MOST_BLOCK)][LANES];
    /* Number m of three of row r lies in vector (3 r + m) / LANES: from the first two vectors, then with the third. */
    NAME(lane_integers) of_two[3], of_third[3], row[NAME(MOST_BLOCK)], neighbour, even;
    for (int i = 0; i < LANES; i++) {
        neighbour[i] = i ^ 1, even[i] = 2 * i;
        for (int m = 0; m < 3; m++) {
            const int at = 3 * i + m;
            of_two[m][i] = at < 2 * LANES ? at : 0, of_third[m][i] = at < 2 * LANES ? i : at - LANES;
        }
        for (int v = 0; v < M; v++)
            modality[v][i] = terms->modality[(LANES * v + i) % M], row[v][i] = (LANES * v + i) / M;
    }
    int64_t n = 0;
    for (; n + LANES <= rows; n += LANES) {
        NAME(lanes) share[NAME(MOST_BLOCK)], one[NAME(MOST_BLOCK)];
#pragma GCC unroll 6
        for (int v = 0; v < M; v++) {
            REAL shares[LANES], ones[LANES];
            for (int lane = 0; lane < LANES; lane++) {
                const REAL value = LOAD(kl[n * M + v * LANES + lane]), below = value < ceiling ? value : ceiling;
                shares[lane] = value == value ? (below > floor ? below : floor) * modality[v][lane] : 0;
                ones[lane] = value == value;
            }
            memcpy(&share[v], shares, sizeof shares), memcpy(&one[v], ones, sizeof ones);
        }
        const NAME(lanes) total = NAME(sums_of_block)(share, M, of_two, of_third, neighbour, even);
        NAME(lanes) factor = NAME(where)(total > 0, 1 / total), count = {0};
        if (mean_one) count = NAME(sums_of_block)(one, M, of_two, of_third, neighbour, even);
#pragma GCC unroll 6
        for (int v = 0; v < M; v++) {
            NAME(lanes) weight = share[v] * __builtin_shuffle(factor, row[v]);
            if (mean_one) weight *= __builtin_shuffle(count, row[v]);
            memcpy(weights + n * M + v * LANES, &weight, sizeof weight);
        }
    }
    return n;
}
#endif

static mmbal_status NAME(weights_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const weight_rows *t = context;
    const NAME(weight_terms) terms = NAME(terms_of)(t);
    const int64_t M = t->M, most = TILE / M;
#ifndef __clang__
    if (NAME(CHOOSES_LANES) && t->options->mode == MMBAL_BTW_DIVERGE && !t->present && M >= 2 && M <= NAME(LANES)) {
        const STORED *kl = (const STORED *)t->kl + begin * M;
        REAL *weights = (REAL *)t->weights + begin * M;
        int64_t done = 0;
#define WEIGH(M) done = NAME(weigh_vectors)(kl, &terms, t->options->mean_one, end - begin, M, weights)
        if (M == 3)
            done = NAME(weigh_blocks)(kl, &terms, t->options->mean_one, end - begin, 3, weights);
        else if (M == 6)
            done = NAME(weigh_blocks)(kl, &terms, t->options->mean_one, end - begin, 6, weights);
        else
            FOR_USUAL_WIDTHS(M, WEIGH)
#undef WEIGH
        begin += done;
    }
#endif
    REAL columns[TILE], scale[TILE];
    for (int64_t n = begin; n < end; n += most) {
        const int64_t rows = end - n < most ? end - n : most;
        NAME(load_divergences)(t, n, rows, most, columns);
        NAME(weigh)(t, &terms, rows, most, columns, scale);
        for (int64_t m = 0; m < M && t->options->mean_one; m++)
            for (int64_t r = 0; r < rows; r++) columns[m * most + r] *= scale[r];
        NAME(real_rows_of)(columns, most, rows, M, (REAL *)t->weights + n * M);
    }
    return MMBAL_OK;
}

static mmbal_status NAME(weights_backward_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const weight_rows *t = context;
    const NAME(weight_terms) terms = NAME(terms_of)(t);
    const int64_t M = t->M, most = TILE / M;
    const int agree = t->options->mode == MMBAL_BTW_AGREE;
    REAL kl[TILE], weights[TILE], slopes[TILE], mean[TILE], scale[TILE];
    for (int64_t chunk = begin; chunk < end; chunk++) {
        double *dmi = t->dmi_parts ? t->dmi_parts + chunk * M : NULL;
        for (int64_t m = 0; m < M && dmi; m++) dmi[m] = 0;
        const int64_t first = chunk * ROWS_PER_CHUNK, left = t->N - first;
        const int64_t last = first + (left < ROWS_PER_CHUNK ? left : ROWS_PER_CHUNK);
        for (int64_t n = first; n < last; n += most) {
            const int64_t rows = last - n < most ? last - n : most;
            NAME(load_divergences)(t, n, rows, most, kl);
            memcpy(weights, kl, sizeof weights);
            NAME(weigh)(t, &terms, rows, most, weights, scale);
            NAME(real_columns_of)((const REAL *)t->dweights + n * M, rows, M, slopes, most);
            for (int64_t r = 0; r < rows; r++) mean[r] = 0;
            for (int64_t m = 0; m < M; m++)
                for (int64_t r = 0; r < rows; r++) {
                    const int64_t i = m * most + r;
                    mean[r] += weights[i] == 0 ? 0 : weights[i] * slopes[i];
                }
            for (int64_t m = 0; m < M; m++) {
                for (int64_t r = 0; r < rows; r++) {
                    const int64_t i = m * most + r;
                    slopes[i] = weights[i] == 0 ? 0 : scale[r] * weights[i] * (slopes[i] - mean[r]);
                }
                for (int64_t r = 0; r < rows && dmi; r++) dmi[m] += (double)slopes[m * most + r];
                for (int64_t r = 0; r < rows; r++) {
                    const int64_t i = m * most + r;
                    const REAL dkl = agree ? -slopes[i] * terms.inverse_temperature : slopes[i] / kl[i];
                    const int moves = kl[i] < terms.ceiling && (agree || kl[i] > terms.floor) && weights[i] != 0;
                    slopes[i] = moves ? dkl : 0;
                }
            }
            if (t->dkl) NAME(rows_of)(slopes, most, rows, M, (STORED *)t->dkl + n * M);
        }
    }
    return MMBAL_OK;
}
