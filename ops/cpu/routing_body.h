/* The kernels of routing.c for one dtype; see each_dtype.h. */

typedef struct {
    const STORED *logits;       /* [N, E] */
    const REAL *selection_bias; /* [E] or NULL */
    const REAL *dweights;       /* [N, K], backward only */
    int64_t E, K;
    int normalize;
    REAL *weights;    /* [N, K] */
    int64_t *indices; /* [N, K] */
    STORED *dlogits;  /* [N, E], backward only */
} NAME(topk_rows);

/* Fills best[K] and index[K], descending, ties to the lower index. Returns 0 if a score is NaN. */
static int NAME(select_largest)(const NAME(topk_rows) * t, const STORED *logits, REAL *best, int64_t *index) {
    int64_t kept = 0;
    for (int64_t e = 0; e < t->E; e++) {
        const REAL score = LOAD(logits[e]) + (t->selection_bias ? t->selection_bias[e] : 0);
        if (isnan(score)) return 0;
        if (kept == t->K && score <= best[kept - 1]) continue;
        int64_t place = kept < t->K ? kept++ : kept - 1;
        for (; place > 0 && best[place - 1] < score; place--)
            best[place] = best[place - 1], index[place] = index[place - 1];
        best[place] = score, index[place] = e;
    }
    return 1;
}

static REAL NAME(largest_logit)(const STORED *logits, int64_t E) {
    REAL top = LOAD(logits[0]);
    for (int64_t e = 1; e < E; e++) top = LOAD(logits[e]) > top ? LOAD(logits[e]) : top;
    return top;
}

static mmbal_status NAME(topk_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(topk_rows) *t = context;
    const int64_t E = t->E, K = t->K;
    for (int64_t n = begin; n < end; n++) {
        const STORED *logits = t->logits + n * E;
        REAL *w = t->weights + n * K;
        int64_t *index = t->indices + n * K;
        if (!NAME(select_largest)(t, logits, w, index)) {
            for (int64_t k = 0; k < K; k++) w[k] = (REAL)NAN, index[k] = k;
            continue;
        }
        REAL top = LOAD(logits[index[0]]), total = 0;
        for (int64_t k = 0; k < K; k++) {
            w[k] = LOAD(logits[index[k]]); /* what was there is the biased score */
            top = w[k] > top ? w[k] : top;
        }
        const REAL top_kept = top;
        if (!t->normalize) {
            top = NAME(largest_logit)(logits, E);
            for (int64_t e = 0; e < E; e++) total += EXP(LOAD(logits[e]) - top);
        }
        for (int64_t k = 0; k < K; k++) w[k] = EXP(w[k] - top);
        if (t->normalize)
            for (int64_t k = 0; k < K; k++) total += w[k];
        for (int64_t k = 0; k < K; k++) w[k] = top_kept == -(REAL)INFINITY ? (REAL)NAN : w[k] / total;
    }
    return MMBAL_OK;
}

static mmbal_status NAME(topk_backward_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(topk_rows) *t = context;
    const int64_t E = t->E, K = t->K;
    for (int64_t n = begin; n < end; n++) {
        const STORED *logits = t->logits + n * E;
        const REAL *w = t->weights + n * K, *dw = t->dweights + n * K;
        const int64_t *index = t->indices + n * K;
        STORED *dl = t->dlogits + n * E;
        REAL mean = 0;
        for (int64_t k = 0; k < K; k++) mean += w[k] * dw[k];
        if (t->normalize) {
            for (int64_t e = 0; e < E; e++) dl[e] = STORE((REAL)0);
            for (int64_t k = 0; k < K; k++) dl[index[k]] = STORE(w[k] * (dw[k] - mean));
            continue;
        }
        const REAL top = NAME(largest_logit)(logits, E);
        REAL total = 0;
        for (int64_t e = 0; e < E; e++) total += EXP(LOAD(logits[e]) - top);
        for (int64_t e = 0; e < E; e++) dl[e] = STORE(-EXP(LOAD(logits[e]) - top) / total * mean);
        for (int64_t k = 0; k < K; k++) dl[index[k]] = STORE(w[k] * (dw[k] - mean));
    }
    return MMBAL_OK;
}

static mmbal_status NAME(topk)(const void *logits, const void *selection_bias, int64_t N, int64_t E, int64_t K,
                               int normalize, void *weights, int64_t *indices, const mmbal_pool *pool) {
    NAME(topk_rows)
    rows = {.logits = logits, .selection_bias = selection_bias, .E = E, .K = K, .normalize = normalize};
    rows.weights = weights, rows.indices = indices;
    return pool->run(pool->self, N, ROWS_PER_TASK, NAME(topk_task), &rows);
}

static mmbal_status NAME(topk_backward)(const void *dweights, const void *logits, const void *weights,
                                        const int64_t *indices, int64_t N, int64_t E, int64_t K, int normalize,
                                        void *dlogits, const mmbal_pool *pool) {
    NAME(topk_rows) rows = {.logits = logits, .dweights = dweights, .E = E, .K = K, .normalize = normalize};
    rows.weights = (void *)weights, rows.indices = (int64_t *)indices, rows.dlogits = dlogits; /* read only */
    return pool->run(pool->self, N, ROWS_PER_TASK, NAME(topk_backward_task), &rows);
}
