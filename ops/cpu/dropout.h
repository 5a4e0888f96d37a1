/* Dropout masks of expert_mlp.h: which Philox word decides over which element. */
#ifndef MMBAL_CPU_DROPOUT_H
#define MMBAL_CPU_DROPOUT_H

#include "mmbal/expert_mlp.h"
#include "mmbal/philox.h"

typedef struct dropout {
    uint32_t key[2], counter_high[2];
    double probability, scale;
} dropout;

enum { HIDDEN_TENSOR = 1, OUTPUT_TENSOR = 2 };

static inline dropout make_dropout(const mmbal_expert_mlp_options *options, int tensor) {
    const uint64_t seed = (uint64_t)options->seed, offset = (uint64_t)options->offset;
    const double p = tensor == HIDDEN_TENSOR ? options->dropout : options->output_dropout;
    return (dropout){.key = {(uint32_t)seed, (uint32_t)(seed >> 32)},
                     .counter_high = {(uint32_t)offset, (uint32_t)(offset >> 32) << 8 | (uint32_t)tensor},
                     .probability = p,
                     .scale = 1 / (1 - p)};
}

/* mask[i] = 0 or scale for the elements first .. first + n */
static inline void fill_mask(const dropout *d, int64_t first, int64_t n, double *mask) {
    uint32_t words[4];
    for (int64_t i = 0; i < n; i++) {
        const uint64_t element = (uint64_t)(first + i), four = element / 4;
        if (i == 0 || element % 4 == 0) {
            const uint32_t counter[4] = {(uint32_t)four, (uint32_t)(four >> 32), d->counter_high[0],
                                         d->counter_high[1]};
            mmbal_philox4x32(counter, d->key, words);
        }
        mask[i] = (double)(words[element % 4] >> 8) * 0x1p-24 >= d->probability ? d->scale : 0;
    }
}

#endif
