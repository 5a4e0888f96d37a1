/* Passes over tiles of elements for one dtype; see each_dtype.h, rows.h and elements.c. */

IN_VECTORS double NAME(importance_of)(mmbal_importance importance, STORED stored, const STORED *parameter, int64_t i) {
    const double g = LOAD(stored);
    if (importance == MMBAL_SQRT_GN) return fabs(g);
    if (importance == MMBAL_GN) return g * g;
    const double w = LOAD(parameter[i]);
    return g * g / (w * w + 0x1p-126);
}

static void NAME(element_weights)(const element_pass *pass, int64_t first, int64_t n, double *weights) {
    const mmbal_elements *t = pass->tensor;
    const STORED *g = (const STORED *)(t->gradient ? t->gradient : t->data) + first;
    const STORED *parameter = (const STORED *)t->weights;
    switch (pass->importance) { /* each a loop of vectors */
    case MMBAL_GN:
        for (int64_t i = 0; i < n; i++) weights[i] = NAME(importance_of)(MMBAL_GN, g[i], NULL, 0);
        break;
    case MMBAL_SQRT_GN:
        for (int64_t i = 0; i < n; i++) weights[i] = NAME(importance_of)(MMBAL_SQRT_GN, g[i], NULL, 0);
        break;
    case MMBAL_GN_WN:
        for (int64_t i = 0; i < n; i++) weights[i] = NAME(importance_of)(MMBAL_GN_WN, g[i], parameter + first, i);
        break;
    }
}

/* The upper 32 bits of the float64 whose smallest are kept; that of infinity where there is no weight. */
static void NAME(element_keys)(const element_pass *pass, int64_t first, int64_t n, uint32_t *keys) {
    uint32_t words[ELEMENTS_PER_TILE];
    double weights[ELEMENTS_PER_TILE], values[ELEMENTS_PER_TILE];
    if (pass->sampler != MMBAL_UNIFORM) NAME(element_weights)(pass, first, n, weights);
    if (pass->sampler != MMBAL_TOPK) words_of_tile(pass, first, words);
    switch (pass->sampler) {
    case MMBAL_TOPK:
        for (int64_t i = 0; i < n; i++) values[i] = 1 / weights[i];
        break;
    case MMBAL_UNIFORM:
        for (int64_t i = 0; i < n; i++) values[i] = exponential_f32(words[i]);
        break;
    default:
        for (int64_t i = 0; i < n; i++) values[i] = exponential_f32(words[i]) / weights[i];
    }
    for (int64_t i = 0; i < n; i++) {
        uint64_t bits;
        memcpy(&bits, &values[i], sizeof bits);
        keys[i] = (uint32_t)(bits >> 32);
    }
}

/* Independent draws: what each element is multiplied by. */
static void NAME(element_kept)(const element_pass *pass, int64_t first, int64_t n, double *multipliers) {
    uint32_t words[ELEMENTS_PER_TILE];
    double weights[ELEMENTS_PER_TILE];
    NAME(element_weights)(pass, first, n, weights);
    words_of_tile(pass, first, words);
    for (int64_t i = 0; i < n; i++) {
        const double q = pass->scale_of_weight * weights[i] + pass->floor, size = pass->level * q;
        const double p = fixed_point(q == 0 ? 0 : size < 1 ? size : 1);
        const double multiplier = pass->multiplier != 0 ? pass->multiplier : 0x1p32 / p;
        multipliers[i] = (double)words[i] < p ? multiplier : 0;
    }
}

static void NAME(element_multiply)(const element_pass *pass, int64_t first, int64_t n, const double *multipliers) {
    STORED *x = (STORED *)pass->tensor->data + first;
    const STORED *base = (const STORED *)pass->tensor->base;
    for (int64_t i = 0; i < n && !base; i++) {
        const STORED product = STORE((REAL)multipliers[i] * LOAD(x[i]));
        x[i] = multipliers[i] == 1 ? x[i] : multipliers[i] == 0 ? STORE((REAL)0) : product;
    }
    for (int64_t i = 0; i < n && base; i++) {
        const REAL from = LOAD(base[first + i]);
        const STORED moved = STORE(from + (REAL)multipliers[i] * (LOAD(x[i]) - from));
        x[i] = multipliers[i] == 1 ? x[i] : multipliers[i] == 0 ? base[first + i] : moved;
    }
}
