/* What is drawn for a tile of elements, in vectors: random words, keys, and which are kept. */
#ifndef MMBAL_CPU_ELEMENT_DRAWS_H
#define MMBAL_CPU_ELEMENT_DRAWS_H

#include <float.h>

#include "exponential.h"
#include "masks.h"
#include "mmbal/philox.h"
#include "rows.h"

enum { BLOCKS_PER_TILE = ELEMENTS_PER_TILE / 4 };

/* mmbal_unit_words of a tile, whose first element is a multiple of its size: Philox for all its blocks side by side. */
static void words_of_tile(const element_pass *pass, int64_t first, uint32_t words[ELEMENTS_PER_TILE]) {
    uint32_t c[4][BLOCKS_PER_TILE];
    const uint64_t block = (uint64_t)first / 4, step = (uint64_t)pass->step, seed = (uint64_t)pass->seed;
    uint32_t k0 = (uint32_t)seed, k1 = (uint32_t)(seed >> 32);
    for (int j = 0; j < BLOCKS_PER_TILE; j++) {
        c[0][j] = (uint32_t)block + (uint32_t)j;
        c[1][j] = (uint32_t)(block >> 32) | (uint32_t)MMBAL_DRAW_UNIT << 12 | (uint32_t)(step >> 32) << 16;
        c[2][j] = (uint32_t)pass->tensor->id;
        c[3][j] = (uint32_t)step;
    }
    for (int round = 0; round < 10; round++) {
        for (int j = 0; j < BLOCKS_PER_TILE; j++) { /* mmbal/philox.h says where the numbers come from */
            const uint64_t product0 = (uint64_t)0xD2511F53u * c[0][j], product1 = (uint64_t)0xCD9E8D57u * c[2][j];
            c[0][j] = (uint32_t)(product1 >> 32) ^ c[1][j] ^ k0;
            c[1][j] = (uint32_t)product1;
            c[2][j] = (uint32_t)(product0 >> 32) ^ c[3][j] ^ k1;
            c[3][j] = (uint32_t)product0;
        }
        k0 += 0x9E3779B9u, k1 += 0xBB67AE85u;
    }
    for (int j = 0; j < BLOCKS_PER_TILE; j++)
        for (int lane = 0; lane < 4; lane++) words[4 * j + lane] = c[lane][j];
}

static double sum_of_parts(const double *parts) {
    double sum = 0;
    for (int part = 0; part < PARTS; part++) sum += parts[part];
    return sum;
}

/* Adds a tile's weights, and how many are greater than 0. */
static void add_weights(int64_t n, const double *w, double *sum, int64_t *positive) {
    double sums[PARTS] = {0}, counts[PARTS] = {0};
    int64_t i = 0;
    for (; i + PARTS <= n; i += PARTS)
        for (int part = 0; part < PARTS; part++) {
            sums[part] += w[i + part];
            counts[part] += w[i + part] > 0 ? 1.0 : 0.0;
        }
    for (int part = 0; i < n; i++, part++) sums[part] += w[i], counts[part] += w[i] > 0 ? 1.0 : 0.0;
    *sum += sum_of_parts(sums), *positive += (int64_t)sum_of_parts(counts);
}

/* Adds the q of a tile that are not capped at the present level, and how many are. */
static void add_uncapped(const element_pass *pass, int64_t n, const double *w, double *sum, int64_t *capped) {
    const double level = pass->level, scale = pass->scale_of_weight, floor = pass->floor;
    double sums[PARTS] = {0}, counts[PARTS] = {0};
    int64_t i = 0;
    for (; i + PARTS <= n; i += PARTS)
        for (int part = 0; part < PARTS; part++) {
            const double q = scale * w[i + part] + floor;
            sums[part] += level * q >= 1 ? 0 : q;
            counts[part] += level * q >= 1 ? 1.0 : 0.0;
        }
    for (int part = 0; i < n; i++, part++) {
        const double q = scale * w[i] + floor;
        sums[part] += level * q >= 1 ? 0 : q;
        counts[part] += level * q >= 1 ? 1.0 : 0.0;
    }
    *sum += sum_of_parts(sums), *capped += (int64_t)sum_of_parts(counts);
}

/* Infinity is the key of what has no weight, and of that alone. */
IN_VECTORS double below_infinity(double key, double w) { return w > 0 && key > DBL_MAX ? DBL_MAX : key; }

/* The upper 32 bits of the float64 whose smallest are kept; that of infinity where there is no weight. Without the
 * sign, which only a NaN can have (x86 makes negative ones): keys choose bins before anyone knows that all is finite.
 */
static void element_keys(const element_pass *pass, int64_t first, int64_t n, const double *w, uint32_t *keys) {
    uint32_t words[ELEMENTS_PER_TILE];
    double values[ELEMENTS_PER_TILE];
    if (pass->sampler != MMBAL_TOPK) words_of_tile(pass, first, words);
    switch (pass->sampler) {
    case MMBAL_TOPK:
        for (int64_t i = 0; i < n; i++) values[i] = below_infinity(1 / w[i], w[i]);
        break;
    case MMBAL_UNIFORM:
        for (int64_t i = 0; i < n; i++) values[i] = (double)exponential_f32(words[i]);
        break;
    default:
        for (int64_t i = 0; i < n; i++) values[i] = below_infinity((double)exponential_f32(words[i]) / w[i], w[i]);
    }
    for (int64_t i = 0; i < n; i++) {
        uint64_t bits;
        memcpy(&bits, &values[i], sizeof bits);
        keys[i] = (uint32_t)(bits >> 32) & 0x7FFFFFFFu;
    }
}

/* Keys below the threshold are kept; returns how many equal it. */
static int64_t keep_smallest(const element_pass *pass, int64_t n, const uint32_t *keys, double *multipliers) {
    const uint32_t threshold = pass->threshold;
    const double multiplier = pass->multiplier, tie_multiplier = pass->tie_multiplier;
    uint32_t ties = 0;
    for (int64_t i = 0; i < n; i++) {
        multipliers[i] = keys[i] < threshold ? multiplier : keys[i] == threshold ? tie_multiplier : 0;
        ties += keys[i] == threshold;
    }
    return ties;
}

/* Independent draws. */
static void keep_drawn(const element_pass *pass, int64_t first, int64_t n, const double *w, double *multipliers) {
    uint32_t words[ELEMENTS_PER_TILE];
    words_of_tile(pass, first, words);
    for (int64_t i = 0; i < n; i++) {
        const double q = pass->scale_of_weight * w[i] + pass->floor, size = pass->level * q;
        const double p = fixed_point(q == 0 ? 0 : size < 1 ? size : 1);
        const double multiplier = pass->multiplier != 0 ? pass->multiplier : 0x1p32 / p;
        multipliers[i] = (double)words[i] < p ? multiplier : 0;
    }
}

#endif
