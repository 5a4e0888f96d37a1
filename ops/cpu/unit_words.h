/* The random words of a tile of elements, and exponential variables of them, in vectors. */
#ifndef MMBAL_CPU_UNIT_WORDS_H
#define MMBAL_CPU_UNIT_WORDS_H

#include "elementary.h"
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

/* -log1p(-v) with v = (word + 0.5) 2^-32. Above 1/2 it is -log(1 - v), of a 1 - v that keeps its bits; below, 1 - v
 * rounds, and what it lost is put back: log1p(-v) = log(u) + (1 - v - u) / u. */
IN_VECTORS float exponential_f32(uint32_t word) {
    const float v = ((float)word + 0.5f) * 0x1p-32f, u = ((float)~word + 0.5f) * 0x1p-32f;
    const float lost = u < 0.5f ? 0 : ((1 - u) - v) / u;
    return -(log_f32(u) + lost);
}

#endif
