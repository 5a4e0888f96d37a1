/* exp and log in float32 without branches, so that the loops around them become vectors; float64 has the C library's.
 * tests/core/test_divergence.cc holds them to their bounds through the operators, test_kernels.cc the activations. */
#ifndef MMBAL_CPU_ELEMENTARY_H
#define MMBAL_CPU_ELEMENTARY_H

#include <math.h>
#include <stdint.h>
#include <string.h>

#include "mmbal/any_device.h"

/* A function that is called instead of inlined is no part of a vector. */
#define IN_VECTORS MMBAL_ON_ANY_DEVICE __attribute__((always_inline))

/* a b + c, rounded once where there is an instruction for it (MMBAL_FUSES: as on a GPU). Spelt out, so that a number
 * has the same bits in a vector and alone though nothing else is fused. */
IN_VECTORS float fused(float a, float b, float c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(MMBAL_FUSES)
    return fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

IN_VECTORS float fused_f32(float a, float b, float c) { return fused(a, b, c); }
IN_VECTORS double fused_f64(double a, double b, double c) {
#if defined(__FMA__) || defined(__ARM_FEATURE_FMA) || defined(MMBAL_FUSES)
    return fma(a, b, c);
#else
    return a * b + c;
#endif
}

/* 2^exponent, -126 <= exponent <= 127; any number else. */
IN_VECTORS float power_of_two(int32_t exponent) {
    const uint32_t bits = (uint32_t)(exponent + 127) << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* x = n ln 2 + r with the integer n next to x / ln 2; a NaN stays in r. */
typedef struct {
    float r;
    int32_t n;
} reduced;

IN_VECTORS reduced reduce(float x) {
    const float magic = 12582912.0f; /* 1.5 * 2^23: added, it leaves no bits for a fraction, and n in the lowest ones */
    const float shifted = fused(x, 1.44269504f, magic), n = shifted - magic;
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    const reduced result = {fused(n, 2.12194440e-4f, fused(n, -0.693359375f, x)), /* ln 2 in two parts (Cody, Waite) */
                            (int32_t)((bits & 0x7FFFFFu) - 0x400000u)};
    return result;
}

/* (exp(r) - 1 - r) / r^2 by its Taylor series to order 5 */
IN_VECTORS float exp_series(float r) {
    float p = 1.0f / 5040;
    p = fused(p, r, 1.0f / 720);
    p = fused(p, r, 1.0f / 120);
    p = fused(p, r, 1.0f / 24);
    p = fused(p, r, 1.0f / 6);
    return fused(p, r, 0.5f);
}

/* exp for float32: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; the series' remainder there is 6e-9 relative. */
IN_VECTORS float exp_f32(float x) {
    /* Beyond these bounds the product is infinite or 0 by itself; a NaN is neither below nor above. */
    const float above = x < -104.0f ? -104.0f : x;
    const reduced of = reduce(above > 89.0f ? 89.0f : above);
    const float p = fused(exp_series(of.r) * of.r, of.r, 1 + of.r);
    const int32_t half = of.n >> 1; /* 2^n in two factors: n may be below the least exponent of a normal number */
    return p * power_of_two(half) * power_of_two(of.n - half);
}

/* exp for float32 where x <= 0, in fewer steps: a polynomial of order 6, 3e-9 off relative. 0 below least_exponent,
 * where float32 has no normal number for it. */
static const float least_exponent_f32 = -87;
IN_VECTORS float exp_nonpositive_f32(float x) {
    const float magic = 12582912.0f + 127; /* as in reduce: the lowest bits are then those of the exponent of 2^n */
    const float above = x < least_exponent_f32 ? least_exponent_f32 : x;
    const float shifted = fused(above, 1.44269504f, magic), n = shifted - magic;
    const float r = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, above));
    float p = 1.38145988e-3f, scale;
    p = fused(p, r, 8.36871658e-3f);
    p = fused(p, r, 4.16683890e-2f);
    p = fused(p, r, 1.66665211e-1f);
    p = fused(p, r, 4.99999940e-1f);
    p = fused(p, r, 1);
    p = fused(p, r, 1);
    uint32_t bits;
    memcpy(&bits, &shifted, sizeof bits);
    bits <<= 23;
    memcpy(&scale, &bits, sizeof scale);
    return x < least_exponent_f32 ? 0 : p * scale;
}

/* exp(x) - 1 - x without cancellation near 0. With exp(x) = 2^n exp(r) it is 2^n (exp(r) - 1 - r), which is small, plus
 * what is 0 for n = 0. Infinite from 88 on, where it is 1.6e38. */
IN_VECTORS float exp_beyond_linear_f32(float x) {
    const float above = x < -87.0f ? -87.0f : x;
    const reduced of = reduce(above > 88.0f ? 88.0f : above);
    const float scale = power_of_two(of.n);
    const float value = fused(scale * exp_series(of.r), of.r * of.r, fused(scale, of.r, -x) + (scale - 1));
    return x > 88.0f ? INFINITY : value;
}

/* log for float32: x = 2^n (1 + f) with 1 + f in [sqrt 1/2, sqrt 2), log(1 + f) = 2 artanh(f / (2 + f)) by its series
 * to order 9, whose remainder there is 7e-10. 0 gives -inf, what is below 0 NaN. */
IN_VECTORS float log_f32(float x) {
    const int32_t sqrt_half_bits = 0x3F3504F3;
    const int tiny = x < 1.17549435e-38f;           /* below the least normal number */
    const float normal = tiny ? x * 8388608.0f : x; /* 2^23 */
    int32_t bits;
    memcpy(&bits, &normal, sizeof bits);
    const int32_t n = (bits - sqrt_half_bits) >> 23;
    bits -= (int32_t)((uint32_t)n << 23);
    float m;
    memcpy(&m, &bits, sizeof m);
    const float f = m - 1, s = f / (2 + f), s2 = s * s;
    float p = 2.0f / 9;
    p = fused(p, s2, 2.0f / 7);
    p = fused(p, s2, 2.0f / 5);
    p = fused(p, s2, 2.0f / 3);
    const float scale = (float)(tiny ? n - 23 : n);
    /* ln 2 in two parts (Cody and Waite): the first has few bits, so that its product with n is exact */
    const float value = fused(scale, 0.693359375f, fused(scale, -2.12194440e-4f, fused(p * s2, s, 2 * s)));
    const float above = x < INFINITY ? value : x; /* infinity and NaN */
    return x > 0 ? above : x == 0 ? -INFINITY : NAN;
}

static inline double exp_f64(double x) { return exp(x); }
static const double least_exponent_f64 = -745;
static inline double exp_nonpositive_f64(double x) { return x < least_exponent_f64 ? 0 : exp(x); }
static inline double exp_beyond_linear_f64(double x) {
    double series = 0; /* orders 2 to 14; the next term is below 2^-53 of the sum for |x| < 0.35 */
    for (int order = 14; order >= 2; order--) series = (series * x + 1) / order;
    return x > -0.35 && x < 0.35 ? series * x * x : expm1(x) - x;
}
static inline double log_f64(double x) { return log(x); }

#endif
