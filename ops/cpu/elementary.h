/* exp and log in float32 without branches, so that the loops around them become vectors; float64 has the C library's.
 * tests/core/test_divergence.cc holds them to their bounds through the operators, test_kernels.cc the activations. */
#ifndef MMBAL_CPU_ELEMENTARY_H
#define MMBAL_CPU_ELEMENTARY_H

#include <math.h>
#include <stdint.h>
#include <string.h>

/* a b + c, rounded once where there is an instruction for it. Spelt out, so that a number has the same bits in a vector
 * and alone though nothing else is fused. */
static inline float fused(float a, float b, float c) {
#ifdef __FMA__
    return __builtin_fmaf(a, b, c);
#else
    return a * b + c;
#endif
}

static inline float power_of_two(int32_t exponent) {
    const int32_t bits = (exponent + 127) << 23;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* (exp(r) - 1 - r) / r^2 by its Taylor series to order 5 */
static inline float exp_series(float r) {
    float p = 1.0f / 5040;
    p = fused(p, r, 1.0f / 720);
    p = fused(p, r, 1.0f / 120);
    p = fused(p, r, 1.0f / 24);
    p = fused(p, r, 1.0f / 6);
    return fused(p, r, 0.5f);
}

/* exp for float32: 2^n times a polynomial on [-ln 2 / 2, ln 2 / 2]; no branches, so that the loops around it become
 * vectors. Coefficients: the Taylor series to order 7, whose remainder there is 6e-9 relative. */
static inline float exp_f32(float x) {
    const float round_to_integer = 12582912.0f; /* 1.5 * 2^23: adding it leaves no bits for a fraction */
    const float above = x > -104.0f ? x : -104.0f, kept = above < 89.0f ? above : 89.0f;
    const float n = fused(kept, 1.44269504f, round_to_integer) - round_to_integer;
    const float r = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, kept)); /* ln 2 in two parts (Cody and Waite) */
    const float p = fused(exp_series(r) * r, r, 1 + r);
    /* 2^n in two factors: n may be below the least exponent of a normal number. */
    const int32_t whole = (int32_t)n, half = whole / 2;
    const float value = x > 88.8f ? INFINITY : p * power_of_two(half) * power_of_two(whole - half);
    return x != x ? x : value;
}

/* exp(x) - 1 - x without cancellation near 0. With exp(x) = 2^n exp(r) it is 2^n (exp(r) - 1 - r), which is small, plus
 * what is 0 for n = 0. */
static inline float exp_beyond_linear_f32(float x) {
    const float round_to_integer = 12582912.0f;
    const float above = x > -87.0f ? x : -87.0f, kept = above < 88.0f ? above : 88.0f;
    const float n = fused(kept, 1.44269504f, round_to_integer) - round_to_integer;
    const float r = fused(n, 2.12194440e-4f, fused(n, -0.693359375f, kept));
    const float scale = power_of_two((int32_t)n);
    const float value = fused(scale * exp_series(r), r * r, fused(scale, r, -x) + (scale - 1));
    return x > 88.0f ? INFINITY : value;
}

/* log for float32: x = 2^n (1 + f) with 1 + f in [sqrt 1/2, sqrt 2), log(1 + f) = 2 artanh(f / (2 + f)) by its series
 * to order 9, whose remainder there is 7e-10. 0 gives -inf, what is below 0 NaN. */
static inline float log_f32(float x) {
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
static inline double exp_beyond_linear_f64(double x) {
    double series = 0; /* orders 2 to 14; the next term is below 2^-53 of the sum for |x| < 0.35 */
    for (int order = 14; order >= 2; order--) series = (series * x + 1) / order;
    return x > -0.35 && x < 0.35 ? series * x * x : expm1(x) - x;
}
static inline double log_f64(double x) { return log(x); }

#endif
