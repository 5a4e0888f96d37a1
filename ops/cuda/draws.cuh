// Random words and exponential variables, as the C core makes them.
#pragma once

#include <cuda_runtime.h>

#define MMBAL_FUSES // as the CPUs do that have an instruction for it
#include "../cpu/exponential.h"
#include "../cpu/masks.h"

namespace mmbal {

// Of one unit.
__device__ __forceinline__ uint32_t word_of(int64_t seed, int64_t step, int64_t id, mmbal_purpose purpose,
                                            int64_t unit) {
    uint32_t words[4];
    mmbal_unit_words(seed, step, id, purpose, unit / 4, words);
    const uint32_t low = unit % 2 ? words[1] : words[0], high = unit % 2 ? words[3] : words[2];
    return unit % 4 < 2 ? low : high; // no index that is a variable: registers have none
}

__device__ __forceinline__ uint64_t bits_of(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

__device__ __forceinline__ double double_of(uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

} // namespace mmbal
