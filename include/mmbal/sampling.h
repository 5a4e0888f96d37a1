/* Which units are updated: sampling without replacement, with inclusion probabilities that are known where an unbiased
 * gradient needs them (AMSS and AMSS+: Yang et al., TPAMI 47(6), 2025, arXiv 2404.08347).
 *
 * Random words are Philox4x32-10's. Key: seed. Counter of unit u of tensor `id` at a step (see mmbal_unit_words):
 *   { low 32 bits of u/4, bits 32-43 of u/4 | purpose << 12 | bits 32-47 of step << 16, id, low 32 bits of step }
 * and word u mod 4 of it. So masks are the same for any number of threads.
 */
#ifndef MMBAL_SAMPLING_H
#define MMBAL_SAMPLING_H

#include <stdint.h>

#include "mmbal/dtype.h"
#include "mmbal/philox.h"
#include "mmbal/pool.h"
#include "mmbal/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* 0 <= step < MMBAL_STEPS; 0 <= id < 2^32; units of a tensor below 2^46. */
#define MMBAL_STEPS (INT64_C(1) << 48)

/* What a word decides: its own unit; the unit's place in the order of a systematic draw; that draw's start (unit: the
 * first of the segment). */
typedef enum mmbal_purpose { MMBAL_DRAW_UNIT = 0, MMBAL_DRAW_ORDER, MMBAL_DRAW_START } mmbal_purpose;

/* The four words of the units 4 group .. 4 group + 3. */
MMBAL_ON_ANY_DEVICE void mmbal_unit_words(int64_t seed, int64_t step, int64_t id, mmbal_purpose purpose, int64_t group,
                                          uint32_t words[4]) {
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)((uint64_t)seed >> 32)};
    const uint32_t high = (uint32_t)(group >> 32) | (uint32_t)purpose << 12 | (uint32_t)(step >> 32) << 16;
    const uint32_t counter[4] = {(uint32_t)group, high, (uint32_t)id, (uint32_t)step};
    mmbal_philox4x32(counter, key, words);
}

/* BOTTOMK      successive sampling, the law of drawing k units one by one with probability proportional to what is
 *              left: the k smallest keys e / w are kept, e = -log1p(-(word + 0.5) 2^-32) an exponential variable
 * SYSTEMATIC   inclusion probabilities p (waterfill), the number kept is the sum of p rounded down or up: in a random
 *              order one unit for every whole number that the running sum of p passes, from a random start
 * INDEPENDENT  inclusion probabilities p (waterfill), each unit by itself: kept where word < p 2^32
 * TOPK         the k largest energies
 * UNIFORM      k of all with equal probability: BOTTOMK with w = 1 */
typedef enum mmbal_sampler {
    MMBAL_BOTTOMK = 0,
    MMBAL_SYSTEMATIC,
    MMBAL_INDEPENDENT,
    MMBAL_TOPK,
    MMBAL_UNIFORM
} mmbal_sampler;

int64_t mmbal_weighted_sample_workspace(int64_t N, const mmbal_pool *pool);

/* BOTTOMK for S rows: mask[s, n] = 1 for the k[s] drawn, 0 else; a weight of 0 is never drawn, so fewer than k are
 * where fewer are positive. Equal keys: the lower n. Unit of the words: s N + n, id 0. MMBAL_F32 and MMBAL_F64.
 * MMBAL_INVALID_ARGUMENT before any work when a weight is negative, infinite or NaN, or k[s] is not in [0, N]. */
mmbal_status mmbal_weighted_sample(mmbal_dtype dtype, const void *weights,                          /* [S, N] */
                                   const int64_t *k,                                                /* [S] */
                                   int64_t S, int64_t N, int64_t seed, int64_t step, uint8_t *mask, /* [S, N] out */
                                   void *workspace, const mmbal_pool *pool);

int64_t mmbal_waterfill_workspace(int64_t N, const mmbal_pool *pool);

/* Capped probabilities proportional to size: with
 *   q[n] = (1 - mix) w[n] / sum(w) + mix / N     (its first term 0 where all w are 0)
 *   p[n] = min(1, c q[n]) with sum(p) = kappa;   c = infinity where that needs every p with q > 0 at 1.
 * 0 <= mix <= 1. MMBAL_F32 and MMBAL_F64, sums float64. MMBAL_INVALID_ARGUMENT when a weight is negative, infinite or
 * NaN, kappa is not in [0, N], or greater than the number of q > 0. */
mmbal_status mmbal_waterfill(mmbal_dtype dtype, const void *weights,                /* [S, N] */
                             const double *kappa,                                   /* [S] */
                             int64_t S, int64_t N, double mix, void *probabilities, /* [S, N] out */
                             double *c,                                             /* [S] out */
                             void *workspace, const mmbal_pool *pool);

/* Units that are drawn together: their energies lie side by side. */
typedef struct mmbal_segment {
    int64_t first, units; /* of energy[U]; units >= 0 */
    int64_t modality;     /* of rho[M] */
    int64_t id;           /* of the tensor, for the random words */
    int64_t first_unit;   /* the number of the first unit within the tensor, for the random words */
} mmbal_segment;

typedef struct mmbal_mask_options {
    mmbal_sampler sampler;
    int unbiased; /* not 0: a kept unit is multiplied by 1 / (its probability to be kept) */
    double mix;   /* of waterfill, 0 <= mix <= 1; for BOTTOMK that of its weights where unbiased, 0 where not */
} mmbal_mask_options;

int64_t mmbal_mask_units_workspace(const mmbal_segment *segments, int64_t S, const mmbal_pool *pool);

/* scale[u] = 0, or what the gradient of unit u is to be multiplied by: 1, or 1 / probability[u] where unbiased.
 *
 * BOTTOMK, TOPK, UNIFORM keep k = ceil(rho units - 1e-7 units) units (at least 1 where rho > 0; of BOTTOMK and TOPK no
 * more than have weight, which is energy but where mix gives some to all; ties: the lower u). SYSTEMATIC and
 * INDEPENDENT keep rho units on average, with
 *   probability = clamp(round(p 2^32), 1, 2^32) 2^-32,
 * of SYSTEMATIC the sum of these is round(rho units 2^32) where that is at least units: what rounding leaves is given
 * to the largest below 1 first, and where all with energy are at 1, theirs is taken for the 2^-32 of the others.
 * probability[u] is also given where the unit is not kept. BOTTOMK: the probability to be kept given the keys of all
 * other units, 1 - exp(-w t) with t their k-th smallest key (1 where there are no k others): 1 / probability is
 * unbiased (rank conditioning). TOPK: 0 or 1. UNIFORM: k / units.
 *
 * A segment without energy keeps its gradient: scale and probability are 1. So do units where rho >= 1.
 * MMBAL_INVALID_ARGUMENT: rho outside [0, 1] or NaN; rho = 0 where unbiased; TOPK where unbiased; mix = 0 with
 * SYSTEMATIC or INDEPENDENT where fewer units have energy than are to be kept on average is no error: all of them are.
 * An energy that is negative or not finite makes every scale and probability 1: nothing is masked then. */
mmbal_status mmbal_mask_units(const double *energy,          /* [U] */
                              const mmbal_segment *segments, /* [S] */
                              const double *rho,             /* [M] */
                              int64_t U, int64_t S, int64_t M, int64_t seed, int64_t step, mmbal_mask_options options,
                              double *scale,       /* [U] out */
                              double *probability, /* [U] out */
                              void *workspace, const mmbal_pool *pool);

#ifdef __cplusplus
}
#endif
#endif
