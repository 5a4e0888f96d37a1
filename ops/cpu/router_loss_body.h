/* The kernels of router_loss.c for one dtype; see each_dtype.h. */

typedef struct {
    const STORED *logits; /* [N, E] */
    const uint8_t *mask;  /* [N] or NULL */
    int64_t N, E;
    double *sums;        /* [chunks, E + 1] forward: sum of p over the chunk's tokens, then of logsumexp^2 */
    const double *share; /* [E] F, load balance only */
    double scale;        /* backward: what multiplies every row */
    int z_loss;
    STORED *dlogits; /* [N, E] */
} NAME(loss_rows);

/* *top = max logits, returns sum exp(logits - *top). */
static double NAME(softmax_total)(const STORED *logits, int64_t E, double *top) {
    *top = LOAD(logits[0]);
    for (int64_t e = 1; e < E; e++) *top = (double)LOAD(logits[e]) > *top ? (double)LOAD(logits[e]) : *top;
    double total = 0;
    for (int64_t e = 0; e < E; e++) total += exp((double)LOAD(logits[e]) - *top);
    return total;
}

static mmbal_status NAME(loss_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(loss_rows) *t = context;
    const int64_t E = t->E;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        double *sums = t->sums + chunk * (E + 1);
        for (int64_t e = 0; e <= E; e++) sums[e] = 0;
        const int64_t first = chunk * TOKENS_PER_CHUNK;
        const int64_t last = first + TOKENS_PER_CHUNK < t->N ? first + TOKENS_PER_CHUNK : t->N;
        for (int64_t n = first; n < last; n++) {
            if (t->mask && !t->mask[n]) continue;
            const STORED *logits = t->logits + n * E;
            double top;
            const double total = NAME(softmax_total)(logits, E, &top), logsumexp = top + log(total);
            if (!t->z_loss)
                for (int64_t e = 0; e < E; e++) sums[e] += exp((double)LOAD(logits[e]) - top) / total;
            sums[E] += logsumexp * logsumexp;
        }
    }
    return MMBAL_OK;
}

static mmbal_status NAME(loss_backward_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(loss_rows) *t = context;
    const int64_t E = t->E;
    for (int64_t n = begin; n < end; n++) {
        const STORED *logits = t->logits + n * E;
        STORED *dl = t->dlogits + n * E;
        if (t->mask && !t->mask[n]) {
            for (int64_t e = 0; e < E; e++) dl[e] = STORE((REAL)0);
            continue;
        }
        double top, mean = 0;
        const double total = NAME(softmax_total)(logits, E, &top);
        if (!t->z_loss)
            for (int64_t e = 0; e < E; e++) mean += exp((double)LOAD(logits[e]) - top) / total * t->share[e];
        for (int64_t e = 0; e < E; e++) {
            const double p = exp((double)LOAD(logits[e]) - top) / total;
            const double slope = t->z_loss ? p * (top + log(total)) : p * (t->share[e] - mean);
            dl[e] = STORE((REAL)(t->scale * slope));
        }
    }
    return MMBAL_OK;
}

static mmbal_status NAME(loss_value)(const void *logits, const uint8_t *mask, int64_t N, int64_t E, int z_loss,
                                     const double *share, double scale, double *sums, void *loss,
                                     const mmbal_pool *pool) {
    NAME(loss_rows) rows = {.logits = logits, .mask = mask, .N = N, .E = E, .sums = sums, .z_loss = z_loss};
    const int64_t chunks = (N + TOKENS_PER_CHUNK - 1) / TOKENS_PER_CHUNK;
    const mmbal_status status = pool->run(pool->self, chunks, 1, NAME(loss_task), &rows);
    double value = 0;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const double *of_chunk = sums + chunk * (E + 1);
        if (z_loss) value += of_chunk[E];
        for (int64_t e = 0; e < E && !z_loss; e++) value += share[e] * of_chunk[e];
    }
    *(REAL *)loss = (REAL)(scale > 0 ? scale * value : 0);
    return status;
}

static mmbal_status NAME(loss_gradient)(const void *dloss, const void *logits, const uint8_t *mask, int64_t N,
                                        int64_t E, int z_loss, const double *share, double scale, void *dlogits,
                                        const mmbal_pool *pool) {
    NAME(loss_rows) rows = {.logits = logits, .mask = mask, .N = N, .E = E, .z_loss = z_loss, .share = share};
    rows.scale = scale * (double)*(const REAL *)dloss, rows.dlogits = dlogits;
    return pool->run(pool->self, N, TOKENS_PER_CHUNK, NAME(loss_backward_task), &rows);
}
