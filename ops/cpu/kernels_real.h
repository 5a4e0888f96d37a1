/* Tile product and activations for one REAL; included by kernels_body.h once for float, once for double. */

enum { NAME(LANES) = VECTOR_BYTES / sizeof(REAL) };
typedef REAL NAME(vector) __attribute__((vector_size(VECTOR_BYTES)));
typedef NAME(vector) NAME(unaligned_vector) __attribute__((aligned(sizeof(REAL)), may_alias));

static inline NAME(vector) NAME(load)(const REAL *from) { return *(const NAME(unaligned_vector) *)from; }
static inline void NAME(store)(REAL *to, NAME(vector) v) { *(NAME(unaligned_vector) *)to = v; }

static void NAME(tile)(int64_t depth, const REAL *a, const REAL *b, REAL *c, int64_t c_stride) {
    NAME(vector) sum[TILE_ROWS][2];
#pragma GCC unroll 16
    for (int i = 0; i < TILE_ROWS; i++) {
        sum[i][0] = NAME(load)(c + i * c_stride);
        sum[i][1] = NAME(load)(c + i * c_stride + NAME(LANES));
    }
    for (int64_t d = 0; d < depth; d++, a += TILE_ROWS, b += 2 * NAME(LANES)) {
        const NAME(vector) b0 = NAME(load)(b), b1 = NAME(load)(b + NAME(LANES));
#pragma GCC unroll 16
        for (int i = 0; i < TILE_ROWS; i++) {
            sum[i][0] += a[i] * b0;
            sum[i][1] += a[i] * b1;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < TILE_ROWS; i++) {
        NAME(store)(c + i * c_stride, sum[i][0]);
        NAME(store)(c + i * c_stride + NAME(LANES), sum[i][1]);
    }
}

static inline REAL NAME(sigmoid)(REAL z) { return 1 / (1 + NAME(exp)(-z)); }

/* value = u sigmoid(z(u)); slope = s + u s (1 - s) z'(u). Three of the activations have this form. */
#define SIGMOID_GATE(z_of_u, slope_of_z)                                                                               \
    for (int64_t i = 0; i < n; i++) {                                                                                  \
        const REAL x = u[i], s = NAME(sigmoid)((REAL)(z_of_u));                                                        \
        if (slope) slope[i] = s + x * s * (1 - s) * (REAL)(slope_of_z);                                                \
        value[i] = x * s;                                                                                              \
    }                                                                                                                  \
    return

static void NAME(activate)(mmbal_activation activation, int64_t n, const REAL *u, REAL *value, REAL *slope) {
    const REAL cubic = (REAL)TANH_GELU_CUBIC, twice = (REAL)(2 * SQRT_2_OVER_PI);
    switch (activation) {
    case MMBAL_QUICK_GELU: SIGMOID_GATE((REAL)QUICK_GELU_SLOPE * x, QUICK_GELU_SLOPE);
    case MMBAL_SILU: SIGMOID_GATE(x, 1);
    case MMBAL_GELU_TANH: /* (1 + tanh(z / 2)) / 2 = sigmoid(z) */
        /* beyond 10 the slope is 0 or 1, and x * x must not overflow into 0 * inf */
        SIGMOID_GATE(twice * x * (1 + cubic * x * x), twice * (1 + 3 * cubic * (x * x < 100 ? x * x : 100)));
    case MMBAL_GELU:
        for (int64_t i = 0; i < n; i++) {
            const REAL x = u[i], phi = (REAL)0.5 * (1 + NAME(erf)(x * (REAL)SQRT_HALF));
            if (slope) slope[i] = phi + x * (REAL)ONE_OVER_SQRT_2_PI * NAME(exp)(x * x * (REAL)-0.5);
            value[i] = x * phi;
        }
        return;
    case MMBAL_RELU:
        for (int64_t i = 0; i < n; i++) {
            const REAL x = u[i];
            if (slope) slope[i] = x > 0 ? 1 : 0;
            value[i] = x < 0 ? 0 : x; /* a NaN stays a NaN */
        }
        return;
    case MMBAL_RELU2:
        for (int64_t i = 0; i < n; i++) {
            const REAL x = u[i] < 0 ? 0 : u[i];
            if (slope) slope[i] = 2 * x;
            value[i] = x * x;
        }
        return;
    case MMBAL_IDENTITY:
        for (int64_t i = 0; i < n; i++) {
            if (slope) slope[i] = 1;
            value[i] = u[i];
        }
        return;
    }
}
#undef SIGMOID_GATE
