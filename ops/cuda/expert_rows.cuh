// What the kernels of expert_mlp around its products share. A warp takes a row.
#pragma once

#include "experts.cuh"
#include "mmbal/cuda/expert_mlp.h"

namespace mmbal {

constexpr int ROW_THREADS = 256;

// What the kernels ask of a call.
template <typename Stored>
struct Rows {
    const int64_t *permutation, *offsets, *inverse;
    const Real<Stored> *weights;
    const Stored *b1, *b2;
    int64_t N, D, F, E, K, R;
    mmbal_activation activation;
    bool drops_hidden, drops_output;
    Dropout hidden, output;

    __device__ int64_t pair(int64_t r) const {
        require_index(permutation[r], R);
        return permutation[r];
    }
};

template <typename Stored>
Rows<Stored> rows_of(const mmbal_expert_mlp_inputs *in, mmbal_expert_mlp_shape s,
                     const mmbal_expert_mlp_options *options) {
    return {in->permutation,
            in->offsets,
            in->inverse,
            static_cast<const Real<Stored> *>(in->weights),
            static_cast<const Stored *>(in->b1),
            static_cast<const Stored *>(in->b2),
            s.N,
            s.D,
            s.F,
            s.E,
            s.K,
            s.N * s.K,
            options->activation,
            options->dropout > 0,
            options->output_dropout > 0,
            make_dropout(*options, false),
            make_dropout(*options, true)};
}

inline int64_t blocks_for_rows(int64_t rows) { return ceil_div(rows * WARP, ROW_THREADS); }

inline bool is_served(mmbal_expert_mlp_shape s, const mmbal_expert_mlp_options *o) {
    return s.N >= 0 && s.D >= 1 && s.F >= 1 && s.E >= 1 && s.K >= 1 && o->activation >= MMBAL_QUICK_GELU &&
           o->activation <= MMBAL_IDENTITY && o->dropout >= 0 && o->dropout < 1 && o->output_dropout >= 0 &&
           o->output_dropout < 1 && o->offset >= 0 && o->offset >> 56 == 0;
}

inline int64_t real_size(mmbal_dtype dtype) { return dtype == MMBAL_F64 ? 8 : 4; }

} // namespace mmbal
