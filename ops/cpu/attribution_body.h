/* Attributions of samples for one dtype; see each_dtype.h and mmbal/attribution.h. Elements are taken in float64: no
 * square of a float32 over- or underflows there. */

static double NAME(attributed_squares)(const STORED *g, const STORED *e, int64_t n) {
    double parts[PARTS] = {0};
    int64_t i = 0;
    for (; i + PARTS <= n; i += PARTS)
        for (int part = 0; part < PARTS; part++) {
            const double alpha = (double)LOAD(g[i + part]) * (double)LOAD(e[i + part]);
            parts[part] += alpha * alpha;
        }
    for (int part = 0; i < n; i++, part++) {
        const double alpha = (double)LOAD(g[i]) * (double)LOAD(e[i]);
        parts[part] += alpha * alpha;
    }
    return sum_of_parts(parts);
}

/* sum of alpha (dg e + de g), what is NULL counts as 0 */
static double NAME(attributed_beta)(const STORED *g, const STORED *e, const STORED *dg, const STORED *de, int64_t n) {
    double parts[PARTS] = {0};
    for (int64_t i = 0; i < n; i++) {
        const double gradient = (double)LOAD(g[i]), embedding = (double)LOAD(e[i]);
        const double first = dg ? (double)LOAD(dg[i]) * embedding : 0, second = de ? (double)LOAD(de[i]) * gradient : 0;
        parts[i % PARTS] += gradient * embedding * (first + second);
    }
    return sum_of_parts(parts);
}

static void NAME(attributed_gradients)(const STORED *g, const STORED *e, int64_t n, double c, STORED *dg, STORED *de) {
    for (int64_t i = 0; i < n && dg; i++) {
        const double embedding = (double)LOAD(e[i]);
        dg[i] = STORE(c == 0 ? 0 : (REAL)(c * (double)LOAD(g[i]) * embedding * embedding));
    }
    for (int64_t i = 0; i < n && de; i++) {
        const double gradient = (double)LOAD(g[i]);
        de[i] = STORE(c == 0 ? 0 : (REAL)(c * gradient * gradient * (double)LOAD(e[i])));
    }
}

static void NAME(attributed_second)(const mmbal_attributed *of, int64_t first, double c, double k) {
    const STORED *g = (const STORED *)of->gradient + first, *e = (const STORED *)of->embedding + first;
    const STORED *up_g = (const STORED *)of->ddgradient, *up_e = (const STORED *)of->ddembedding;
    STORED *dg = (STORED *)of->dgradient, *de = (STORED *)of->dembedding;
    for (int64_t i = 0; i < of->d; i++) {
        const double gradient = (double)LOAD(g[i]), embedding = (double)LOAD(e[i]), alpha = gradient * embedding;
        const double G = up_g ? (double)LOAD(up_g[first + i]) : 0, E = up_e ? (double)LOAD(up_e[first + i]) : 0;
        const double to_g = c * (G * embedding + 2 * gradient * E) * embedding + k * alpha * embedding;
        const double to_e = c * (2 * embedding * G + gradient * E) * gradient + k * alpha * gradient;
        if (dg) dg[first + i] = STORE(c == 0 && k == 0 ? 0 : (REAL)to_g);
        if (de) de[first + i] = STORE(c == 0 && k == 0 ? 0 : (REAL)to_e);
    }
}

/* The sample from its gradients and embeddings. */
static void NAME(attribute_sample)(const attributed_rows *rows, int64_t b, attributed_sample *sample) {
    const mmbal_attribution *t = rows->attribution;
    for (int64_t m = 0; m < t->M; m++) {
        const mmbal_attributed *of = &t->modalities[m];
        sample->a[m] = 0;
        if (!is_present(t, b, m)) continue;
        const double squares = NAME(attributed_squares)((const STORED *)of->gradient + gradient_row(rows, m, b),
                                                        (const STORED *)of->embedding + b * of->d, of->d);
        sample->a[m] = sqrt(t->options.pool == MMBAL_POOL_RMS ? squares / (double)of->d : squares);
    }
    find_shares(t, b, sample);
}

static mmbal_status NAME(attribution_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const attributed_rows *rows = context;
    const mmbal_attribution *t = rows->attribution;
    attributed_sample sample;
    for (int64_t b = begin; b < end; b++) {
        NAME(attribute_sample)(rows, b, &sample);
        ((REAL *)rows->reg)[b] = (REAL)regulariser_of(t, b, &sample);
        for (int64_t m = 0; m < t->M; m++) {
            ((REAL *)rows->shares)[b * t->M + m] = (REAL)sample.p[m];
            ((REAL *)rows->magnitudes)[b * t->M + m] = (REAL)sample.a[m];
        }
    }
    return MMBAL_OK;
}

/* The sample again from its magnitudes, or anew where a float32 has no room for these; and what is upstream of it. */
static void NAME(load_sample)(const attributed_rows *rows, int64_t b, attributed_sample *sample, upstream *up) {
    const int64_t M = rows->attribution->M;
    for (int64_t m = 0; m < M; m++) {
        sample->a[m] = (double)((const REAL *)rows->magnitudes)[b * M + m];
        up->shares[m] = rows->dshares ? (double)((const REAL *)rows->dshares)[b * M + m] : 0;
        up->magnitudes[m] = rows->dmagnitudes ? (double)((const REAL *)rows->dmagnitudes)[b * M + m] : 0;
    }
    up->reg = (double)((const REAL *)rows->dreg)[b];
    find_shares(rows->attribution, b, sample);
    if (!(sample->sum >= LEAST_SUM && isfinite(sample->sum))) NAME(attribute_sample)(rows, b, sample);
}

static mmbal_status NAME(attribution_backward_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const attributed_rows *rows = context;
    const mmbal_attribution *t = rows->attribution;
    attributed_sample sample;
    upstream up;
    double c[MMBAL_MAX_MODALITIES];
    for (int64_t b = begin; b < end; b++) {
        NAME(load_sample)(rows, b, &sample, &up);
        find_factors(t, b, &sample, &up, c);
        for (int64_t m = 0; m < t->M; m++) {
            const mmbal_attributed *of = &t->modalities[m];
            const int64_t first = b * of->d, row = gradient_row(rows, m, b);
            NAME(attributed_gradients)((const STORED *)of->gradient + row, (const STORED *)of->embedding + first, of->d,
                                       c[m], of->dgradient ? (STORED *)of->dgradient + row : NULL,
                                       of->dembedding ? (STORED *)of->dembedding + first : NULL);
        }
    }
    return MMBAL_OK;
}

static mmbal_status NAME(attribution_second_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const attributed_rows *rows = context;
    const mmbal_attribution *t = rows->attribution;
    attributed_sample sample;
    upstream up, down;
    double beta[MMBAL_MAX_MODALITIES], c[MMBAL_MAX_MODALITIES], k[MMBAL_MAX_MODALITIES];
    for (int64_t b = begin; b < end; b++) {
        NAME(load_sample)(rows, b, &sample, &up);
        for (int64_t m = 0; m < t->M; m++) {
            const mmbal_attributed *of = &t->modalities[m];
            const int64_t first = b * of->d;
            const STORED *dg = of->ddgradient ? (const STORED *)of->ddgradient + first : NULL;
            const STORED *de = of->ddembedding ? (const STORED *)of->ddembedding + first : NULL;
            beta[m] = root_scale(t, b, &sample, m) == 0
                          ? 0
                          : NAME(attributed_beta)((const STORED *)of->gradient + first,
                                                  (const STORED *)of->embedding + first, dg, de, of->d);
        }
        find_second(t, b, &sample, &up, beta, c, k, &down);
        for (int64_t m = 0; m < t->M; m++)
            NAME(attributed_second)(&t->modalities[m], b * t->modalities[m].d, c[m], k[m]);
        ((REAL *)rows->ddreg)[b] = (REAL)down.reg;
        for (int64_t m = 0; m < t->M; m++) {
            ((REAL *)rows->ddshares)[b * t->M + m] = (REAL)down.shares[m];
            ((REAL *)rows->ddmagnitudes)[b * t->M + m] = (REAL)down.magnitudes[m];
        }
    }
    return MMBAL_OK;
}
