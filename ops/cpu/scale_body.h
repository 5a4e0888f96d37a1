/* Embeddings times weights for one dtype; see each_dtype.h. */

static mmbal_status NAME(scale_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const embedding_rows *t = context;
    const int64_t d = t->d;
    for (int64_t n = begin; n < end; n++) {
        const REAL weight = ((const REAL *)t->weights)[n * t->M + t->m];
        const STORED *restrict h = (const STORED *)t->h + n * d;
        STORED *restrict scaled = (STORED *)t->scaled + n * d;
        if (weight == 0) { /* whatever h holds */
            for (int64_t i = 0; i < d; i++) scaled[i] = STORE((REAL)0);
            continue;
        }
        for (int64_t i = 0; i < d; i++) scaled[i] = STORE(weight * LOAD(h[i]));
    }
    return MMBAL_OK;
}

static mmbal_status NAME(scale_dweights_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const embedding_rows *t = context;
    const int64_t d = t->d;
    for (int64_t n = begin; n < end; n++) {
        const STORED *h = (const STORED *)t->h + n * d, *dscaled = (const STORED *)t->dscaled + n * d;
        REAL parts[PARTS] = {0}, sum = 0;
        int64_t i = 0;
        for (; i + PARTS <= d; i += PARTS)
            for (int part = 0; part < PARTS; part++) parts[part] += LOAD(dscaled[i + part]) * LOAD(h[i + part]);
        for (int part = 0; i < d; i++, part++) parts[part] += LOAD(dscaled[i]) * LOAD(h[i]);
        for (int part = 0; part < PARTS; part++) sum += parts[part];
        ((REAL *)t->dweights)[n * t->M + t->m] = sum;
    }
    return MMBAL_OK;
}
