/* The kernels of one instruction set: VECTOR_BYTES wide, TILE_ROWS x 2 vectors a tile, published as KERNELS. TILE_BF16
 * is the file with its tile of bfloat16, if it has one. */
#include <math.h>
#include <string.h>

#include "elementary.h"
#include "float16.h"
#include "kernels.h"
#include "stream.h"
#include "transpose.h"
#ifdef __AVX512F__
#include "transpose_avx512.h"
#define TRANSPOSE_32 transpose_by_sixteen
#else
#define TRANSPOSE_32 transpose_32
#endif

/* Constants of the activations: 1.702 from arXiv 1606.08415 section 2, 0.044715 and sqrt(2 / pi) from its tanh form. */
#define QUICK_GELU_SLOPE 1.702
#define TANH_GELU_CUBIC 0.044715
#define SQRT_2_OVER_PI 0.79788456080286535588
#define SQRT_HALF 0.70710678118654752440
#define ONE_OVER_SQRT_2_PI 0.39894228040143267794

/* The normal distribution function of x, whose density is exp(-x x / 2) times a constant. Phi(-t) / exp(-t t / 2) for
 * t >= 0 is a polynomial in w = 1 / (1 + 0.4 t), fitted by weighted least squares to its relative error, 1.1e-8 at most
 * for t <= 14; so a small Phi keeps its digits. */
static inline float gauss_f32(float x, float exp_of_half_square) {
    const float t = x < 0 ? -x : x, w = 1 / (1 + 0.4f * t);
    float p = 2.8768042e-02f;
    p = p * w - 1.5742736e-01f;
    p = p * w + 3.3477333e-01f;
    p = p * w - 3.0734047e-01f;
    p = p * w + 6.0381327e-02f;
    p = p * w + 7.61451e-03f;
    p = p * w + 7.800428e-02f;
    p = p * w + 1.365083e-01f;
    p = p * w + 1.59097e-01f;
    p = p * w + 1.596228e-01f;
    p = p * w - 1.7676385e-06f;
    const float below = p * exp_of_half_square;
    return x < 0 ? below : 1 - below;
}

static inline double gauss_f64(double x, double exp_of_half_square) {
    (void)exp_of_half_square;
    return 0.5 * erfc(-x * SQRT_HALF);
}

/* Calls FOR_ROWS for every number of rows that a tile may have. */
#define UP_TO_4                                                                                                        \
    FOR_ROWS(1);                                                                                                       \
    FOR_ROWS(2);                                                                                                       \
    FOR_ROWS(3);                                                                                                       \
    FOR_ROWS(4)
#define UP_TO_6                                                                                                        \
    UP_TO_4;                                                                                                           \
    FOR_ROWS(5);                                                                                                       \
    FOR_ROWS(6)
#define UP_TO_14                                                                                                       \
    UP_TO_6;                                                                                                           \
    FOR_ROWS(7);                                                                                                       \
    FOR_ROWS(8);                                                                                                       \
    FOR_ROWS(9);                                                                                                       \
    FOR_ROWS(10);                                                                                                      \
    FOR_ROWS(11);                                                                                                      \
    FOR_ROWS(12);                                                                                                      \
    FOR_ROWS(13);                                                                                                      \
    FOR_ROWS(14)
#if TILE_ROWS == 4
#define SWITCH_ROWS                                                                                                    \
    switch (rows) { UP_TO_4; }
#elif TILE_ROWS == 6
#define SWITCH_ROWS                                                                                                    \
    switch (rows) { UP_TO_6; }
#elif TILE_ROWS == 14
#define SWITCH_ROWS                                                                                                    \
    switch (rows) { UP_TO_14; }
#endif

#ifdef __AVX512F__
#include "sigmoid_avx512.h"
#define SIGMOID_OF_A_VECTOR sigmoid_sixteen
#endif
#define REAL float
#define NAME(f) f##_f32
#include "kernels_real.h"
#undef REAL
#undef NAME
#undef SIGMOID_OF_A_VECTOR

#define REAL double
#define NAME(f) f##_f64
#include "kernels_real.h"
#undef REAL
#undef NAME

static void widen_bf16(int64_t n, const uint16_t *restrict from, float *restrict to) {
    for (int64_t i = 0; i < n; i++) to[i] = float_of_bfloat16(from[i]);
}

static void widen_f16(int64_t n, const uint16_t *restrict from, float *restrict to) {
    for (int64_t i = 0; i < n; i++) to[i] = float_of_float16(from[i]);
}

static void narrow_bf16(int64_t n, const float *restrict from, uint16_t *restrict to) {
    for (int64_t i = 0; i < n; i++) to[i] = bfloat16_of_float(from[i]);
}

static void narrow_f16(int64_t n, const float *restrict from, uint16_t *restrict to) {
    for (int64_t i = 0; i < n; i++) to[i] = float16_of_float(from[i]);
}

static void stream(int64_t bytes, const void *from, void *to) { stream_bytes(to, from, bytes); }

static void interleave(int64_t n, const uint16_t *restrict first, const uint16_t *restrict second,
                       uint16_t *restrict to) {
    for (int64_t i = 0; i < n; i++) to[2 * i] = first[i], to[2 * i + 1] = second[i];
}

#ifdef TILE_BF16
#include TILE_BF16
#endif

const mmbal_kernels KERNELS = {.tile_rows_f32 = TILE_ROWS,
                               .tile_cols_f32 = 2 * VECTOR_BYTES / (int)sizeof(float),
                               .tile_rows_f64 = TILE_ROWS,
                               .tile_cols_f64 = 2 * VECTOR_BYTES / (int)sizeof(double),
                               .tile_f32 = tile_f32,
                               .tile_f64 = tile_f64,
                               .half_tile_f32 = half_tile_f32,
                               .half_tile_f64 = half_tile_f64,
                               .tile_in_place_f32 = tile_f32,
                               .tile_in_place_f64 = tile_f64,
#ifdef TILE_BF16
                               .tile_rows_bf16 = TILE_ROWS_BF16,
                               .tile_cols_bf16 = TILE_COLS_BF16,
                               .tile_bf16 = tile_bf16,
                               .half_tile_bf16 = HALF_TILE_BF16,
                               .tile_in_place_bf16 = TILE_IN_PLACE_BF16,
#endif
                               .transpose_32 = TRANSPOSE_32,
                               .transpose_64 = transpose_64,
                               .activate_f32 = activate_f32,
                               .activate_f64 = activate_f64,
                               .gradient_row_f32 = gradient_row_f32,
                               .gradient_row_f64 = gradient_row_f64,
                               .add_f32 = add_f32,
                               .add_f64 = add_f64,
                               .sum_f32 = sum_f32,
                               .sum_f64 = sum_f64,
                               .widen_bf16 = widen_bf16,
                               .widen_f16 = widen_f16,
                               .narrow_bf16 = narrow_bf16,
                               .narrow_f16 = narrow_f16,
                               .stream = stream,
                               .interleave = interleave};
