#pragma once

#include <cstdint>

enum class Bug {
    NONE,
    MISSING_BARRIER,
    MISSING_WARP_BARRIER,
    UNINITIALISED_SHARED,
    BEYOND_SHARED,
    TAIL,
    RACE,
    DIVERGENT_BARRIER,
    DIVERGENT_SHUFFLE,
    DEADLOCK,
    MISSING_WAIT
};

void planted_reverse(const int *values /* [64] */, int *reversed /* [64] */, Bug bug);
void planted_copy(const int *values /* [count] */, int64_t count, int *copied /* [count] */, Bug bug);
void planted_sum(const int *values /* [count] */, int64_t count, int *sum /* [] */, Bug bug);
// sums[t] = values[t] + values[t ^ 1]
void planted_neighbours(const int *values /* [64] */, int *sums /* [64] */, Bug bug);
// reversed[t] = values[63 - t] by way of asynchronous copies
void planted_copies(const int *values /* [64] */, int *reversed /* [64] */, Bug bug);
