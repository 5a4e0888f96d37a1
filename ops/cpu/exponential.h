/* Exponential variables from random words and the probability to be below one, in arithmetic that is written out: on
 * every device the same bits, where the C library's log1p and expm1 differ in the last one. */
#ifndef MMBAL_CPU_EXPONENTIAL_H
#define MMBAL_CPU_EXPONENTIAL_H

#include "elementary.h"

/* -log1p(-v) with v = (word + 0.5) 2^-32, in float64. u = 1 - v is exact, and u = 2^n (1 + f) with 1 + f in
 * [sqrt 1/2, sqrt 2): log(1 + f) = 2 artanh(f / (2 + f)) by its series to order 19, whose remainder there is 3e-17 of
 * it. Small ones, which win, are 2 artanh alone and keep all bits of the word. */
IN_VECTORS double exponential(uint32_t word) {
    const uint64_t sqrt_half_bits = UINT64_C(0x3FE6A09E667F3BCD);
    const double u = ((double)~word + 0.5) * 0x1p-32;
    uint64_t bits;
    memcpy(&bits, &u, sizeof bits);
    const int64_t n = (int64_t)(bits - sqrt_half_bits) >> 52;
    bits -= (uint64_t)n << 52;
    double m;
    memcpy(&m, &bits, sizeof m);
    const double f = m - 1, s = f / (2 + f), s2 = s * s, twice = 2 * s, scale = (double)n;
    double p = 2.0 / 19;
    p = p * s2 + 2.0 / 17;
    p = p * s2 + 2.0 / 15;
    p = p * s2 + 2.0 / 13;
    p = p * s2 + 2.0 / 11;
    p = p * s2 + 2.0 / 9;
    p = p * s2 + 2.0 / 7;
    p = p * s2 + 2.0 / 5;
    p = p * s2 + 2.0 / 3;
    /* ln 2 in two parts (Cody and Waite): the first has 42 bits, so that its product with n is exact */
    const double low = scale * 0x1.ef35793c7673p-45 + p * s2 * s;
    return -(scale * 0x1.62e42fefa38p-1 + (low + twice));
}

/* 1 - exp(-x) for x >= 0: with exp(-x) = 2^-n exp(r) it is (1 - 2^-n) - 2^-n (exp(r) - 1), and exp(r) - 1 is its
 * Taylor series to order 14, whose remainder for |r| <= ln 2 / 2 is 3e-18 of it. */
IN_VECTORS double below_exponential(double x) {
    const double most = 64; /* exp(-64) is no part of 1 */
    const double within = x < most ? x : most;
    const int64_t n = (int64_t)(within * 0x1.71547652b82fep+0 + 0.5); /* next to x / ln 2 */
    const double count = (double)n;
    const double r = (count * 0x1.62e42fefa38p-1 - within) + count * 0x1.ef35793c7673p-45;
    double series = 1.0 / 87178291200;
    series = series * r + 1.0 / 6227020800;
    series = series * r + 1.0 / 479001600;
    series = series * r + 1.0 / 39916800;
    series = series * r + 1.0 / 3628800;
    series = series * r + 1.0 / 362880;
    series = series * r + 1.0 / 40320;
    series = series * r + 1.0 / 5040;
    series = series * r + 1.0 / 720;
    series = series * r + 1.0 / 120;
    series = series * r + 1.0 / 24;
    series = series * r + 1.0 / 6;
    series = series * r + 1.0 / 2;
    const uint64_t bits = (uint64_t)(1023 - n) << 52;
    double scale; /* 2^-n */
    memcpy(&scale, &bits, sizeof scale);
    const double beyond = series * r * r + r; /* exp(r) - 1 */
    return (1 - scale) - scale * beyond;
}

/* exponential in float32. Above 1/2 it is -log(1 - v), of a 1 - v that keeps its bits; below, 1 - v rounds, and what it
 * lost is put back: log1p(-v) = log(u) + (1 - v - u) / u, where 2 - u is near enough to 1 / u. */
IN_VECTORS float exponential_f32(uint32_t word) {
    const float v = ((float)word + 0.5f) * 0x1p-32f, u = ((float)~word + 0.5f) * 0x1p-32f;
    const float lost = u < 0.5f ? 0 : ((1 - u) - v) * (2 - u);
    return -(log_f32(u) + lost);
}

#endif
