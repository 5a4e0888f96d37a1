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
