/* What sampling.c, elements.c and their CUDA kernels share. */
#ifndef MMBAL_CPU_MASKS_H
#define MMBAL_CPU_MASKS_H

#include <math.h>
#include <stdint.h>

#include "mmbal/sampling.h"

static inline int is_step(int64_t step) { return step >= 0 && step < MMBAL_STEPS; }

static inline int mask_is_served(const double *rho, int64_t M, int64_t step, mmbal_mask_options options) {
    const int known = options.sampler >= MMBAL_BOTTOMK && options.sampler <= MMBAL_UNIFORM;
    if (M < 0 || !known || !is_step(step)) return 0;
    if (!(options.mix >= 0 && options.mix <= 1) || (options.unbiased && options.sampler == MMBAL_TOPK)) return 0;
    for (int64_t m = 0; m < M; m++)
        if (!(rho[m] >= 0 && rho[m] <= 1) || (options.unbiased && rho[m] == 0)) return 0;
    return 1;
}

/* ceil(rho n), which a rho rounded up to float32 does not make one more, and 1 at least. */
MMBAL_ON_ANY_DEVICE int64_t count_kept(double rho, int64_t n) {
    const double k = ceil(rho * (double)n - 1e-7 * (double)n);
    return k >= 1 ? (int64_t)k : rho > 0;
}

/* Sums over units are SUM_LANES sums side by side, of every SUM_LANES-th number each; these are added by halves within
 * groups of SUM_GROUP, then the groups by halves: an order that vectors and the threads of a GPU's block can keep. */
enum { SUM_LANES = 512, SUM_GROUP = 32 };

/* p in units of 2^-32, from 1 to 2^32 */
MMBAL_ON_ANY_DEVICE double fixed_point(double p) {
    const double fixed = rint(p * 0x1p32);
    return fixed < 1 ? 1 : fixed;
}

#endif
