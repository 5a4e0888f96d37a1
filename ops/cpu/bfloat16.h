/* bfloat16: the upper half of a float32. */
#ifndef MMBAL_CPU_BFLOAT16_H
#define MMBAL_CPU_BFLOAT16_H

#include <stdint.h>
#include <string.h>

typedef uint16_t bfloat16;

static inline float float_of_bfloat16(bfloat16 stored) {
    const uint32_t bits = (uint32_t)stored << 16;
    float value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* Rounds to nearest, ties to even; a NaN stays a NaN though its payload may be cut. */
static inline bfloat16 bfloat16_of_float(float value) {
    uint32_t bits;
    memcpy(&bits, &value, sizeof bits);
    const uint32_t rounded = (bits + 0x7FFFu + ((bits >> 16) & 1u)) >> 16;
    return (bfloat16)((bits & 0x7FFFFFFFu) > 0x7F800000u ? (bits >> 16) | 0x40u : rounded);
}

#endif
