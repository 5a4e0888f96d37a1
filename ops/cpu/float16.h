/* float16 (IEEE 754 binary16): 1 sign, 5 exponent and 10 fraction bits. Without branches, so that loops become vectors.
 */
#ifndef MMBAL_CPU_FLOAT16_H
#define MMBAL_CPU_FLOAT16_H

#include <stdint.h>
#include <string.h>

typedef uint16_t float16;

static inline float float_of_bits(uint32_t bits) {
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

static inline uint32_t bits_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

/* Exact. */
static inline float float_of_float16(float16 stored) {
    const uint32_t magnitude = (uint32_t)(stored & 0x7FFFu) << 13, sign = (uint32_t)(stored & 0x8000u) << 16;
    /* As a float32 the bits have the exponent 127 - 15 too low; the product moves subnormal numbers as well. */
    const uint32_t finite = bits_of_float(float_of_bits(magnitude) * 0x1p112f);
    const uint32_t bits = magnitude >= 0x7C00u << 13 ? magnitude | 0x7F800000u : finite;
    return float_of_bits(sign | bits);
}

/* Rounds to nearest, ties to even; beyond 65504 to infinity; a NaN stays a NaN. */
static inline float16 float16_of_float(float value) {
    const uint32_t bits = bits_of_float(value), magnitude = bits & 0x7FFFFFFFu, sign = (bits >> 16) & 0x8000u;
    /* Normal: rebias the exponent, round off 13 bits. */
    const uint32_t normal = (magnitude - (112u << 23) + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
    /* Below 2^-14: adding 0.5 puts the last kept bit, 2^-24, at the end of the sum's fraction and rounds there. */
    const uint32_t tiny = bits_of_float(float_of_bits(magnitude) + 0.5f) - bits_of_float(0.5f);
    const uint32_t small = magnitude < 113u << 23 ? tiny : normal;
    const uint32_t large = magnitude > 0x7F800000u ? 0x7E00u : 0x7C00u;
    return (float16)(sign | (magnitude >= 143u << 23 ? large : small));
}

#endif
