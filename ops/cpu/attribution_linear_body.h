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

/* g = coefficients W for LINEAR_ROWS samples a piece of work, so that a row of weights is read once for them. */
static mmbal_status NAME(linear_gradients_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const linear_rows *t = context;
    const int64_t B = t->attribution->B, C = t->head->C, d = t->attribution->modalities[t->m].d;
    const STORED *weights = t->head->weights[t->m];
    REAL sums[LINEAR_ROWS][LINEAR_TILE];
    for (int64_t block = begin; block < end; block++) {
        const int64_t first = block * LINEAR_ROWS, rows = B - first < LINEAR_ROWS ? B - first : LINEAR_ROWS;
        for (int64_t from = 0; from < d; from += LINEAR_TILE) {
            const int64_t n = d - from < LINEAR_TILE ? d - from : LINEAR_TILE;
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = 0; i < n; i++) sums[r][i] = 0;
            for (int64_t c = 0; c < C; c++)
                for (int64_t r = 0; r < rows; r++) {
                    const REAL factor = ((const REAL *)t->coefficients)[(first + r) * C + c];
                    const STORED *w = weights + c * d + from;
                    for (int64_t i = 0; i < n && factor != 0; i++) sums[r][i] += factor * LOAD(w[i]);
                }
            for (int64_t r = 0; r < rows; r++)
                memcpy((REAL *)t->gradients[t->m] + (first + r) * d + from, sums[r], (size_t)n * sizeof(REAL));
        }
    }
    return MMBAL_OK;
}

static REAL NAME(product_of_rows)(const REAL *v, const STORED *w, int64_t n) {
    REAL parts[PARTS] = {0}, sum = 0;
    int64_t i = 0;
    for (; i + PARTS <= n; i += PARTS)
        for (int part = 0; part < PARTS; part++) parts[part] += v[i + part] * LOAD(w[i + part]);
    for (int part = 0; i < n; i++, part++) parts[part] += v[i] * LOAD(w[i]);
    for (int part = 0; part < PARTS; part++) sum += parts[part];
    return sum;
}

/* zeta from the products of v and the weights' rows. */
static mmbal_status NAME(linear_zeta_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const linear_rows *t = context;
    const int64_t C = t->head->C;
    for (int64_t b = begin; b < end; b++) {
        const REAL *coefficient = (const REAL *)t->coefficients + b * C;
        REAL *zeta = (REAL *)t->zeta + b * C, mean = 0;
        for (int64_t c = 0; c < C; c++) {
            zeta[c] = 0;
            if (!(coefficient[c] < 0) || C == 1) continue; /* not one of the others */
            for (int64_t m = 0; m < t->attribution->M; m++) {
                const int64_t d = t->attribution->modalities[m].d;
                zeta[c] += NAME(product_of_rows)((const REAL *)t->gradients[m] + b * d,
                                                 (const STORED *)t->head->weights[m] + c * d, d);
            }
            mean -= coefficient[c] * zeta[c];
        }
        for (int64_t c = 0; c < C; c++) zeta[c] = coefficient[c] < 0 && C > 1 ? coefficient[c] * (zeta[c] - mean) : 0;
    }
    return MMBAL_OK;
}

/* dW = coefficients^T v + zeta^T e for LINEAR_ROWS classes a piece of work. */
static mmbal_status NAME(linear_weights_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const linear_rows *t = context;
    const int64_t B = t->attribution->B, C = t->head->C, d = t->attribution->modalities[t->m].d;
    REAL sums[LINEAR_ROWS][LINEAR_TILE];
    for (int64_t block = begin; block < end; block++) {
        const int64_t first = block * LINEAR_ROWS, rows = C - first < LINEAR_ROWS ? C - first : LINEAR_ROWS;
        for (int64_t from = 0; from < d; from += LINEAR_TILE) {
            const int64_t n = d - from < LINEAR_TILE ? d - from : LINEAR_TILE;
            for (int64_t r = 0; r < rows; r++)
                for (int64_t i = 0; i < n; i++) sums[r][i] = 0;
            for (int64_t b = 0; b < B; b++) {
                const REAL *v = (const REAL *)t->gradients[t->m] + b * d + from;
                const REAL *e = (const REAL *)t->embeddings[t->m] + b * d + from;
                for (int64_t r = 0; r < rows; r++) {
                    const REAL of_v = ((const REAL *)t->coefficients)[b * C + first + r];
                    const REAL of_e = ((const REAL *)t->zeta)[b * C + first + r];
                    for (int64_t i = 0; i < n && of_v != 0; i++) sums[r][i] += of_v * v[i] + of_e * e[i];
                }
            }
            for (int64_t r = 0; r < rows; r++) {
                STORED *dw = (STORED *)t->dweights[t->m] + (first + r) * d + from;
                for (int64_t i = 0; i < n; i++) dw[i] = STORE(sums[r][i]);
            }
        }
    }
    return MMBAL_OK;
}
