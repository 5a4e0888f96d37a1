/* Philox4x32-10, the counter-based generator of Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (SC 2011).
 * No state: the four words depend on counter and key alone, so masks are the same for any number of threads. */
#ifndef MMBAL_PHILOX_H
#define MMBAL_PHILOX_H

#include <stdint.h>

#include "mmbal/any_device.h"

MMBAL_ON_ANY_DEVICE void mmbal_philox4x32(const uint32_t counter[4], const uint32_t key[2], uint32_t out[4]) {
    /* Multipliers and Weyl increments from table 2 and section 4 of the paper. */
    const uint32_t multiplier0 = 0xD2511F53u, multiplier1 = 0xCD9E8D57u;
    const uint32_t increment0 = 0x9E3779B9u, increment1 = 0xBB67AE85u;
    uint32_t c0 = counter[0], c1 = counter[1], c2 = counter[2], c3 = counter[3], k0 = key[0], k1 = key[1];
    for (int round = 0; round < 10; round++) {
        const uint64_t product0 = (uint64_t)multiplier0 * c0, product1 = (uint64_t)multiplier1 * c2;
        c0 = (uint32_t)(product1 >> 32) ^ c1 ^ k0;
        c1 = (uint32_t)product1;
        c2 = (uint32_t)(product0 >> 32) ^ c3 ^ k1;
        c3 = (uint32_t)product0;
        k0 += increment0;
        k1 += increment1;
    }
    out[0] = c0, out[1] = c1, out[2] = c2, out[3] = c3;
}

#endif
