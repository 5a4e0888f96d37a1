// What attribution.cu and attribution_linear.cu share: tables of modalities for a launch, and the regulariser where
// gradients become the backward's in place.
#pragma once

#include "launch.cuh"
#include "mmbal/cuda/attribution.h"

namespace mmbal {

inline bool attribution_is_served(const mmbal_attribution &t) {
    const mmbal_attribution_options o = t.options;
    const bool pool = o.pool == MMBAL_POOL_L2 || o.pool == MMBAL_POOL_RMS;
    const bool penalty = o.penalty == MMBAL_L1 || o.penalty == MMBAL_SQUARED || o.penalty == MMBAL_HUBER;
    bool served = t.B >= 0 && t.M >= 1 && t.M <= MMBAL_MAX_MODALITIES && (t.target_rows == 1 || t.target_rows == t.B) &&
                  pool && penalty && o.eps >= 0 && o.eps < 1;
    for (int64_t m = 0; served && m < t.M; m++) served = t.modalities[m].d >= 1;
    return served;
}

// mmbal_attribution_reg_cuda of real modalities whose rows lie `stride` elements apart, and what dreg makes of their
// gradients, in place. magnitudes and factors: [B, M], scratch.
mmbal_status regularise_in_place(const mmbal_attribution &real, int64_t stride, const void *dreg, void *reg,
                                 void *shares, void *magnitudes, double *scratch, mmbal_stream stream);

// Launches for all modalities, `Table::SIZE` of them at a time, for as many fit a launch's arguments.
template <typename Table, typename Fill, typename Run>
mmbal_status in_tables(int64_t count, Fill fill, Run run) {
    for (int64_t first = 0; first < count; first += Table::SIZE) {
        Table table = {};
        table.first = first;
        table.count = count - first < Table::SIZE ? count - first : Table::SIZE;
        for (int64_t i = 0; i < table.count; i++) fill(&table.of[i], first + i);
        MMBAL_RETURN_UNLESS_OK(run(table));
    }
    return MMBAL_OK;
}

} // namespace mmbal
