/* The closed form of a linear head for one dtype; see each_dtype.h and mmbal/attribution.h. */

/* Coefficients of the weights' rows in the score's gradient, of samples begin .. end; the embeddings as real. */
static mmbal_status NAME(linear_scores_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const linear_rows *t = context;
    const mmbal_linear_head *head = t->head;
    const int64_t C = head->C;
    for (int64_t b = begin; b < end; b++) {
        const STORED *z = (const STORED *)head->logits + b * C;
        REAL *coefficient = (REAL *)t->coefficients + b * C;
        int64_t chosen = head->classes ? head->classes[b] : 0;
        for (int64_t c = 1; c < C && !head->classes; c++)
            if (LOAD(z[c]) > LOAD(z[chosen])) chosen = c;
        REAL largest = -(REAL)INFINITY, sum = 0;
        for (int64_t c = 0; c < C; c++) {
            coefficient[c] = 0;
            if (c != chosen && LOAD(z[c]) > largest) largest = LOAD(z[c]);
        }
        for (int64_t c = 0; c < C && C > 1 && head->score == MMBAL_SCORE_ODDS; c++) {
            coefficient[c] = c == chosen ? 0 : OF_REAL(exp_nonpositive)(LOAD(z[c]) - largest);
            sum += coefficient[c];
        }
        for (int64_t c = 0; c < C && sum != 0; c++) coefficient[c] = -coefficient[c] / sum;
        coefficient[chosen] = C == 1 && head->score == MMBAL_SCORE_ODDS && LOAD(z[0]) < 0 ? -1 : 1;
        for (int64_t m = 0; m < t->attribution->M; m++) {
            const mmbal_attributed *of = &t->attribution->modalities[m];
            const STORED *e = (const STORED *)of->embedding + b * of->d;
            REAL *real = (REAL *)t->embeddings[m] + b * of->d;
            for (int64_t i = 0; i < of->d && (const void *)real != (const void *)e; i++) real[i] = LOAD(e[i]);
        }
    }
    return MMBAL_OK;
}

/* sums[r][i] += factors[r][t] terms[t][i], each sum loaded and stored once for LINEAR_TERMS terms */
static void NAME(add_terms)(REAL (*sums)[LINEAR_TILE], REAL (*factors)[LINEAR_TERMS], const STORED *const *terms,
                            int64_t n) {
    const STORED *restrict first = terms[0], *restrict second = terms[1];
    const STORED *restrict third = terms[2], *restrict fourth = terms[3];
    for (int r = 0; r < LINEAR_ROWS; r++) {
        REAL *restrict row = sums[r];
        const REAL f0 = factors[r][0], f1 = factors[r][1], f2 = factors[r][2], f3 = factors[r][3];
        for (int64_t i = 0; i < n; i++) {
            REAL sum = OF_REAL(fused)(f0, LOAD(first[i]), row[i]);
            sum = OF_REAL(fused)(f1, LOAD(second[i]), sum);
            sum = OF_REAL(fused)(f2, LOAD(third[i]), sum);
            row[i] = OF_REAL(fused)(f3, LOAD(fourth[i]), sum);
        }
    }
}

/* g = coefficients W for LINEAR_ROWS samples a piece of work. Beyond the last class or sample the factors are 0. */
static mmbal_status NAME(linear_gradients_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const linear_rows *t = context;
    const int64_t B = t->attribution->B, C = t->head->C, d = t->attribution->modalities[t->m].d;
    const STORED *weights = t->head->weights[t->m];
    const REAL *coefficients = t->coefficients;
    REAL sums[LINEAR_ROWS][LINEAR_TILE];
    for (int64_t block = begin; block < end; block++) {
        const int64_t first = block * LINEAR_ROWS, rows = B - first < LINEAR_ROWS ? B - first : LINEAR_ROWS;
        for (int64_t from = 0; from < d; from += LINEAR_TILE) {
            const int64_t n = d - from < LINEAR_TILE ? d - from : LINEAR_TILE;
            memset(sums, 0, sizeof sums);
            for (int64_t c = 0; c < C; c += LINEAR_TERMS) {
                REAL factors[LINEAR_ROWS][LINEAR_TERMS] = {{0}};
                const STORED *terms[LINEAR_TERMS];
                int used = 0;
                for (int64_t k = 0; k < LINEAR_TERMS; k++) {
                    terms[k] = weights + (c + k < C ? c + k : c) * d + from;
                    for (int64_t r = 0; r < rows && c + k < C; r++) {
                        factors[r][k] = coefficients[(first + r) * C + c + k];
                        used |= factors[r][k] != 0;
                    }
                }
                if (used) NAME(add_terms)(sums, factors, terms, n);
            }
            for (int64_t r = 0; r < rows; r++)
                memcpy((REAL *)t->gradients[t->m] + (first + r) * d + from, sums[r], (size_t)n * sizeof(REAL));
        }
    }
    return MMBAL_OK;
}

/* The products of v with LINEAR_TERMS rows side by side: one alone would wait for each of its additions. */
static void NAME(products_of_rows)(const REAL *v, const STORED *const *rows, int64_t n, REAL *products) {
    const STORED *first = rows[0], *second = rows[1], *third = rows[2], *fourth = rows[3];
    REAL a[PARTS] = {0}, b[PARTS] = {0}, c[PARTS] = {0}, d[PARTS] = {0};
    int64_t i = 0;
    for (; i + PARTS <= n; i += PARTS)
        for (int part = 0; part < PARTS; part++) {
            a[part] = OF_REAL(fused)(v[i + part], LOAD(first[i + part]), a[part]);
            b[part] = OF_REAL(fused)(v[i + part], LOAD(second[i + part]), b[part]);
            c[part] = OF_REAL(fused)(v[i + part], LOAD(third[i + part]), c[part]);
            d[part] = OF_REAL(fused)(v[i + part], LOAD(fourth[i + part]), d[part]);
        }
    for (int k = 0; k < LINEAR_TERMS; k++) {
        REAL *parts = k == 0 ? a : k == 1 ? b : k == 2 ? c : d;
        for (int64_t rest = i, part = 0; rest < n; rest++, part++)
            parts[part] = OF_REAL(fused)(v[rest], LOAD(rows[k][rest]), parts[part]);
        products[k] = 0;
        for (int part = 0; part < PARTS; part++) products[k] += parts[part];
    }
}

/* zeta from the products of v and the weights' rows. */
static mmbal_status NAME(linear_zeta_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const linear_rows *t = context;
    const int64_t C = t->head->C;
    for (int64_t b = begin; b < end; b++) {
        const REAL *coefficient = (const REAL *)t->coefficients + b * C;
        REAL *zeta = (REAL *)t->zeta + b * C, mean = 0;
        for (int64_t c = 0; c < C; c++) zeta[c] = 0;
        for (int64_t c = 0; c < C && C > 1 && t->head->score == MMBAL_SCORE_ODDS; c += LINEAR_TERMS)
            for (int64_t m = 0; m < t->attribution->M; m++) {
                const int64_t d = t->attribution->modalities[m].d;
                const STORED *rows[LINEAR_TERMS];
                REAL products[LINEAR_TERMS];
                for (int64_t k = 0; k < LINEAR_TERMS; k++)
                    rows[k] = (const STORED *)t->head->weights[m] + (c + k < C ? c + k : c) * d;
                NAME(products_of_rows)((const REAL *)t->gradients[m] + b * d, rows, d, products);
                for (int64_t k = 0; k < LINEAR_TERMS && c + k < C; k++) zeta[c + k] += products[k];
            }
        for (int64_t c = 0; c < C; c++) mean -= coefficient[c] < 0 ? coefficient[c] * zeta[c] : 0;
        for (int64_t c = 0; c < C; c++) zeta[c] = coefficient[c] < 0 && C > 1 ? coefficient[c] * (zeta[c] - mean) : 0;
    }
    return MMBAL_OK;
}

/* dW = coefficients^T v + zeta^T e for LINEAR_ROWS classes a piece of work: v and e of half of LINEAR_TERMS samples are
 * the terms. */
static mmbal_status NAME(linear_weights_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const linear_rows *t = context;
    const int64_t B = t->attribution->B, C = t->head->C, d = t->attribution->modalities[t->m].d;
    const REAL *coefficients = t->coefficients, *zeta = t->zeta;
    enum { SAMPLES = LINEAR_TERMS / 2 };
    REAL sums[LINEAR_ROWS][LINEAR_TILE];
    for (int64_t block = begin; block < end; block++) {
        const int64_t first = block * LINEAR_ROWS, rows = C - first < LINEAR_ROWS ? C - first : LINEAR_ROWS;
        for (int64_t from = 0; from < d; from += LINEAR_TILE) {
            const int64_t n = d - from < LINEAR_TILE ? d - from : LINEAR_TILE;
            memset(sums, 0, sizeof sums);
            for (int64_t b = 0; b < B; b += SAMPLES) {
                REAL factors[LINEAR_ROWS][LINEAR_TERMS] = {{0}};
                const REAL *terms[LINEAR_TERMS];
                int used = 0;
                for (int64_t k = 0; k < SAMPLES; k++) {
                    const int64_t sample = b + k < B ? b + k : b;
                    terms[2 * k] = (const REAL *)t->gradients[t->m] + sample * d + from;
                    terms[2 * k + 1] = (const REAL *)t->embeddings[t->m] + sample * d + from;
                    for (int64_t r = 0; r < rows && b + k < B; r++) {
                        factors[r][2 * k] = coefficients[sample * C + first + r];
                        factors[r][2 * k + 1] = zeta[sample * C + first + r];
                        used |= factors[r][2 * k] != 0;
                    }
                }
                if (used) OF_REAL(add_terms)(sums, factors, terms, n);
            }
            for (int64_t r = 0; r < rows; r++) {
                STORED *dw = (STORED *)t->dweights[t->m] + (first + r) * d + from;
                for (int64_t i = 0; i < n; i++) dw[i] = STORE(sums[r][i]);
            }
        }
    }
    return MMBAL_OK;
}
