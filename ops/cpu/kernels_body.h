/* The kernels of one instruction set: VECTOR_BYTES wide, TILE_ROWS x 2 vectors a tile, published as KERNELS. */
#include <math.h>
#include <string.h>

#include "kernels.h"

/* Constants of the activations: 1.702 from arXiv 1606.08415 section 2, 0.044715 and sqrt(2 / pi) from its tanh form. */
#define QUICK_GELU_SLOPE 1.702
#define TANH_GELU_CUBIC 0.044715
#define SQRT_2_OVER_PI 0.79788456080286535588
#define SQRT_HALF 0.70710678118654752440
#define ONE_OVER_SQRT_2_PI 0.39894228040143267794

/* exp for float32: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; no branches, so that the loops around it become
 * vectors. Coefficients: the Taylor series to order 7, whose remainder there is 6e-9 relative. */
static inline float exp_f32(float x) {
    const float round_to_integer = 12582912.0f; /* 1.5 * 2^23: adding it leaves no bits for a fraction */
    const float above = x > -104.0f ? x : -104.0f, kept = above < 89.0f ? above : 89.0f;
    const float n = kept * 1.44269504f + round_to_integer - round_to_integer;
    const float r = (kept - n * 0.693359375f) + n * 2.12194440e-4f; /* ln 2 in two parts (Cody and Waite) */
    float p = 1.0f / 5040;
    p = p * r + 1.0f / 720;
    p = p * r + 1.0f / 120;
    p = p * r + 1.0f / 24;
    p = p * r + 1.0f / 6;
    p = p * r + 0.5f;
    p = p * r + 1.0f;
    p = p * r + 1.0f;
    /* 2^n in two factors: n may be below the least exponent of a normal number. */
    const int32_t whole = (int32_t)n, half = whole / 2;
    const int32_t bits[2] = {(half + 127) << 23, (whole - half + 127) << 23};
    float scale[2];
    memcpy(scale, bits, sizeof scale);
    const float value = x > 88.8f ? INFINITY : p * scale[0] * scale[1];
    return x != x ? x : value;
}

static inline float erf_f32(float x) { return erff(x); }
static inline double exp_f64(double x) { return exp(x); }
static inline double erf_f64(double x) { return erf(x); }

#define REAL float
#define NAME(f) f##_f32
#include "kernels_real.h"
#undef REAL
#undef NAME

#define REAL double
#define NAME(f) f##_f64
#include "kernels_real.h"
#undef REAL
#undef NAME

const mmbal_kernels KERNELS = {.tile_rows_f32 = TILE_ROWS,
                               .tile_cols_f32 = 2 * VECTOR_BYTES / (int)sizeof(float),
                               .tile_rows_f64 = TILE_ROWS,
                               .tile_cols_f64 = 2 * VECTOR_BYTES / (int)sizeof(double),
                               .tile_f32 = tile_f32,
                               .tile_f64 = tile_f64,
                               .activate_f32 = activate_f32,
                               .activate_f64 = activate_f64};
