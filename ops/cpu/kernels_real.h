/* Tile product and activations for one REAL; included by kernels_body.h once for float, once for double. */

enum { NAME(LANES) = VECTOR_BYTES / sizeof(REAL) };
typedef REAL NAME(vector) __attribute__((vector_size(VECTOR_BYTES)));
typedef NAME(vector) NAME(unaligned_vector) __attribute__((aligned(sizeof(REAL)), may_alias));

static inline NAME(vector) NAME(load)(const REAL *from) { return *(const NAME(unaligned_vector) *)from; }
static inline void NAME(store)(REAL *to, NAME(vector) v) { *(NAME(unaligned_vector) *)to = v; }

/* Around the caches; to is aligned to the vector. */
static inline void NAME(stream_vector)(REAL *to, NAME(vector) v) {
#if VECTOR_BYTES == 64
    _mm512_stream_si512((void *)to, (__m512i)v);
#elif VECTOR_BYTES == 32
    _mm256_stream_si256((void *)to, (__m256i)v);
#else
    NAME(store)(to, v);
#endif
}

/* The tile for a number of rows and vectors that the compiler knows, so that the sums stay in registers. Rows of a are
 * addressed in threes from every third row's pointer: one pointer a row would not fit the integer registers. */
static inline __attribute__((always_inline)) void NAME(tile_of)(const int rows, const int vectors, int64_t depth,
                                                                const REAL *a, int64_t a_stride, const REAL *b,
                                                                int64_t b_stride, REAL *c, int64_t c_stride,
                                                                tile_result result, fetches *ahead) {
    NAME(vector) sum[TILE_ROWS][2];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++)
            sum[i][v] = result == TILE_ADD ? NAME(load)(c + i * c_stride + v * NAME(LANES)) : (NAME(vector)){0};
    const REAL *third[(TILE_ROWS + 2) / 3];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i += 3) third[i / 3] = a + i * a_stride;
    for (int64_t d = 0; d < depth;) {
        fetch_next(ahead);
        const int64_t pause = least(d + FETCH_STEPS, depth);
        for (; d < pause; d++, b += b_stride) {
            NAME(vector) column[2];
#pragma GCC unroll 2
            for (int v = 0; v < vectors; v++) column[v] = NAME(load)(b + v * NAME(LANES));
#pragma GCC unroll 16
            for (int i = 0; i < rows; i++) {
                const REAL element = third[i / 3][i % 3 * a_stride + d];
#pragma GCC unroll 2
                for (int v = 0; v < vectors; v++) sum[i][v] += element * column[v];
            }
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
#pragma GCC unroll 2
        for (int v = 0; v < vectors; v++) {
            REAL *to = c + i * c_stride + v * NAME(LANES);
            if (result == TILE_STREAM)
                NAME(stream_vector)(to, sum[i][v]);
            else
                NAME(store)(to, sum[i][v]);
        }
    }
}

#define FOR_ROWS(n)                                                                                                    \
    case n: NAME(tile_of)(n, VECTORS, depth, a, a_stride, b, b_stride, c, c_stride, result, ahead); return
static void NAME(tile)(int rows, int64_t depth, const REAL *a, int64_t a_stride, const REAL *b, int64_t b_stride,
                       REAL *c, int64_t c_stride, tile_result result, fetches *ahead) {
#define VECTORS 2
    SWITCH_ROWS
#undef VECTORS
}

static void NAME(half_tile)(int rows, int64_t depth, const REAL *a, int64_t a_stride, const REAL *b, int64_t b_stride,
                            REAL *c, int64_t c_stride, tile_result result, fetches *ahead) {
#define VECTORS 1
    SWITCH_ROWS
#undef VECTORS
}
#undef FOR_ROWS

/* A few vectors of a row at a time, in arrays that overlap nothing, so that every loop over them becomes vectors: at
 * most 32 numbers, so that a row of 96 columns is whole chunks. */
enum { NAME(CHUNK) = (VECTOR_BYTES == 64 ? 2 : 4) * NAME(LANES) };

/* s[i] = 1 / (1 + exp(-z[i])) for a whole chunk */
static inline void NAME(sigmoids)(const REAL *restrict z, REAL *restrict s) {
#ifdef SIGMOID_OF_A_VECTOR
#pragma GCC unroll 2
    for (int i = 0; i < NAME(CHUNK); i += NAME(LANES)) NAME(store)(s + i, SIGMOID_OF_A_VECTOR(NAME(load)(z + i)));
#else
    for (int i = 0; i < NAME(CHUNK); i++) s[i] = 1 / (1 + NAME(exp)(-z[i]));
#endif
}

/* value = x sigmoid(z(x)); slope = s + x s (1 - s) z'(x). Three of the activations have this form. */
#define SIGMOID_GATE(z_of_x, slope_of_z)                                                                               \
    for (int i = 0; i < NAME(CHUNK); i++) {                                                                            \
        const REAL x = u[i];                                                                                           \
        z[i] = (REAL)(z_of_x);                                                                                         \
    }                                                                                                                  \
    NAME(sigmoids)(z, sigmoid);                                                                                        \
    for (int i = 0; i < NAME(CHUNK); i++) {                                                                            \
        const REAL x = u[i], s = sigmoid[i];                                                                           \
        value[i] = x * s;                                                                                              \
        slope[i] = s + x * s * (1 - s) * (REAL)(slope_of_z);                                                           \
    }                                                                                                                  \
    return

/* value[i] and slope[i] of u[i] for a whole chunk. */
static inline void NAME(activate_chunk)(mmbal_activation activation, const REAL *restrict u, REAL *restrict value,
                                        REAL *restrict slope) {
    const REAL cubic = (REAL)TANH_GELU_CUBIC, twice = (REAL)(2 * SQRT_2_OVER_PI);
    REAL z[NAME(CHUNK)], sigmoid[NAME(CHUNK)];
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

/* Sums run side by side: in one alone every addition waits for the one before it. */
static inline REAL NAME(sum_of_chunk)(REAL *side) {
    for (int width = NAME(CHUNK) / 2; width > 0; width /= 2)
        for (int k = 0; k < width; k++) side[k] += side[k + width];
    return side[0];
}

static void NAME(activate)(mmbal_activation activation, int64_t n, const REAL *u, REAL *value, REAL *slope) {
    REAL x[NAME(CHUNK)], v[NAME(CHUNK)], s[NAME(CHUNK)];
    int64_t i = 0;
    for (; i + NAME(CHUNK) <= n; i += NAME(CHUNK)) {
        memcpy(x, u + i, sizeof x); /* u may be value */
        NAME(activate_chunk)(activation, x, value + i, s);
        if (slope) memcpy(slope + i, s, sizeof s);
    }
    if (i == n) return;
    const size_t bytes = sizeof(REAL) * (size_t)(n - i);
    memset(x, 0, sizeof x);
    memcpy(x, u + i, bytes);
    NAME(activate_chunk)(activation, x, v, s);
    memcpy(value + i, v, bytes);
    if (slope) memcpy(slope + i, s, bytes);
}

/* value and du of a whole chunk, and what it adds to the dot product. */
static inline void NAME(gradient_chunk)(mmbal_activation activation, const REAL *restrict u, const REAL *restrict h,
                                        REAL weight, REAL *restrict value, REAL *restrict du, REAL *restrict side) {
    NAME(activate_chunk)(activation, u, value, du);
    for (int k = 0; k < NAME(CHUNK); k++) {
        side[k] += h[k] * value[k];
        du[k] *= weight * h[k];
    }
}

static void NAME(gradient_row)(mmbal_activation activation, int64_t n, const REAL *u, const REAL *h, REAL weight,
                               REAL *value, REAL *du, REAL *dot) {
    REAL x[NAME(CHUNK)] = {0}, y[NAME(CHUNK)] = {0}, v[NAME(CHUNK)], slope[NAME(CHUNK)], side[NAME(CHUNK)] = {0};
    int64_t i = 0;
    for (; i + NAME(CHUNK) <= n; i += NAME(CHUNK))
        NAME(gradient_chunk)(activation, u + i, h + i, weight, value + i, du + i, side);
    if (i < n) { /* what is not there adds nothing */
        const size_t bytes = sizeof(REAL) * (size_t)(n - i);
        memcpy(x, u + i, bytes);
        memcpy(y, h + i, bytes);
        NAME(gradient_chunk)(activation, x, y, weight, v, slope, side);
        memcpy(value + i, v, bytes);
        memcpy(du + i, slope, bytes);
    }
    *dot = NAME(sum_of_chunk)(side);
}

static void NAME(add)(int64_t n, const REAL *restrict addend, REAL *restrict sum) {
    for (int64_t i = 0; i < n; i++) sum[i] += addend[i];
}

static REAL NAME(sum)(int64_t n, const REAL *a) {
    enum { VECTORS_SIDE_BY_SIDE = NAME(CHUNK) / NAME(LANES) };
    union {
        NAME(vector) vectors[VECTORS_SIDE_BY_SIDE];
        REAL side[NAME(CHUNK)];
    } sums = {{{0}}};
    int64_t i = 0;
    for (; i + NAME(CHUNK) <= n; i += NAME(CHUNK))
        for (int v = 0; v < VECTORS_SIDE_BY_SIDE; v++) sums.vectors[v] += NAME(load)(a + i + v * NAME(LANES));
    const int64_t whole = i;
    for (; i + NAME(LANES) <= n; i += NAME(LANES)) sums.vectors[(i - whole) / NAME(LANES)] += NAME(load)(a + i);
    for (; i < n; i++) sums.side[i - whole] += a[i];
    return NAME(sum_of_chunk)(sums.side);
}
