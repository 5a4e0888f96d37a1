/* Tile product and activations for one REAL; included by kernels_body.h once for float, once for double. */

enum { NAME(LANES) = VECTOR_BYTES / sizeof(REAL) };
typedef REAL NAME(vector) __attribute__((vector_size(VECTOR_BYTES)));
typedef NAME(vector) NAME(unaligned_vector) __attribute__((aligned(sizeof(REAL)), may_alias));

static inline NAME(vector) NAME(load)(const REAL *from) { return *(const NAME(unaligned_vector) *)from; }
static inline void NAME(store)(REAL *to, NAME(vector) v) { *(NAME(unaligned_vector) *)to = v; }

/* The tile for a number of rows that the compiler knows, so that the sums stay in registers. Rows of a are addressed
 * in threes from every third row's pointer: one pointer a row would not fit the integer registers. */
static inline __attribute__((always_inline)) void NAME(tile_of)(const int rows, int64_t depth, const REAL *a,
                                                                int64_t a_stride, const REAL *b, int64_t b_stride,
                                                                REAL *c, int64_t c_stride, int add, fetch *ahead) {
    NAME(vector) sum[TILE_ROWS][2];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        sum[i][0] = add ? NAME(load)(c + i * c_stride) : (NAME(vector)){0};
        sum[i][1] = add ? NAME(load)(c + i * c_stride + NAME(LANES)) : (NAME(vector)){0};
    }
    const REAL *third[(TILE_ROWS + 2) / 3];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i += 3) third[i / 3] = a + i * a_stride;
    fetch next = *ahead; /* a copy: nothing that is stored may change it */
    for (int64_t d = 0; d < depth; d++, b += b_stride) {
        fetch_lines(&next, next.pace);
        const NAME(vector) b0 = NAME(load)(b), b1 = NAME(load)(b + NAME(LANES));
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            const REAL element = third[i / 3][i % 3 * a_stride + d];
            sum[i][0] += element * b0;
            sum[i][1] += element * b1;
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        NAME(store)(c + i * c_stride, sum[i][0]);
        NAME(store)(c + i * c_stride + NAME(LANES), sum[i][1]);
    }
    *ahead = next;
}

static void NAME(tile)(int rows, int64_t depth, const REAL *a, int64_t a_stride, const REAL *b, int64_t b_stride,
                       REAL *c, int64_t c_stride, int add, fetch *ahead) {
#define FOR_ROWS(n)                                                                                                    \
    case n: NAME(tile_of)(n, depth, a, a_stride, b, b_stride, c, c_stride, add, ahead); return
    SWITCH_ROWS
#undef FOR_ROWS
}

static inline REAL NAME(sigmoid)(REAL z) { return 1 / (1 + NAME(exp)(-z)); }

/* A few vectors of a row at a time, in arrays that overlap nothing, so that every loop over them becomes vectors. */
enum { NAME(CHUNK) = 4 * NAME(LANES) };

/* value = x sigmoid(z(x)); slope = s + x s (1 - s) z'(x). Three of the activations have this form. */
#define SIGMOID_GATE(z_of_x, slope_of_z)                                                                               \
    for (int i = 0; i < NAME(CHUNK); i++) {                                                                            \
        const REAL x = u[i], s = NAME(sigmoid)((REAL)(z_of_x));                                                        \
        value[i] = x * s;                                                                                              \
        slope[i] = s + x * s * (1 - s) * (REAL)(slope_of_z);                                                           \
    }                                                                                                                  \
    return

/* value[i] and slope[i] of u[i] for a whole chunk. */
static inline void NAME(activate_chunk)(mmbal_activation activation, const REAL *restrict u, REAL *restrict value,
                                        REAL *restrict slope) {
    const REAL cubic = (REAL)TANH_GELU_CUBIC, twice = (REAL)(2 * SQRT_2_OVER_PI);
    switch (activation) {
    case MMBAL_QUICK_GELU: SIGMOID_GATE((REAL)QUICK_GELU_SLOPE * x, QUICK_GELU_SLOPE);
    case MMBAL_SILU: SIGMOID_GATE(x, 1);
    case MMBAL_GELU_TANH: /* (1 + tanh(z / 2)) / 2 = sigmoid(z) */
        /* beyond 10 the slope is 0 or 1, and x * x must not overflow into 0 * inf */
        SIGMOID_GATE(twice * x * (1 + cubic * x * x), twice * (1 + 3 * cubic * (x * x < 100 ? x * x : 100)));
    case MMBAL_GELU:
        for (int i = 0; i < NAME(CHUNK); i++) {
            const REAL x = u[i], e = NAME(exp)(x * x * (REAL)-0.5), phi = NAME(gauss)(x, e);
            value[i] = x * phi;
            slope[i] = phi + x * (REAL)ONE_OVER_SQRT_2_PI * e;
        }
        return;
    case MMBAL_RELU:
        for (int i = 0; i < NAME(CHUNK); i++) {
            const REAL x = u[i];
            value[i] = x < 0 ? 0 : x; /* a NaN stays a NaN */
            slope[i] = x > 0 ? 1 : 0;
        }
        return;
    case MMBAL_RELU2:
        for (int i = 0; i < NAME(CHUNK); i++) {
            const REAL x = u[i] < 0 ? 0 : u[i];
            value[i] = x * x;
            slope[i] = 2 * x;
        }
        return;
    case MMBAL_IDENTITY:
        for (int i = 0; i < NAME(CHUNK); i++) value[i] = u[i], slope[i] = 1;
        return;
    }
}
#undef SIGMOID_GATE

static void NAME(activate)(mmbal_activation activation, int64_t n, const REAL *u, REAL *value, REAL *slope) {
    REAL x[NAME(CHUNK)] = {0}, v[NAME(CHUNK)], s[NAME(CHUNK)];
    for (int64_t i = 0; i < n; i += NAME(CHUNK)) {
        const size_t bytes = sizeof(REAL) * (size_t)(n - i < NAME(CHUNK) ? n - i : NAME(CHUNK));
        memcpy(x, u + i, bytes);
        NAME(activate_chunk)(activation, x, v, s);
        memcpy(value + i, v, bytes);
        if (slope) memcpy(slope + i, s, bytes);
    }
}
