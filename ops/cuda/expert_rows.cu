// Rows of tokens to rows of experts and back. See mmbal/cuda/expert_mlp.h.
#include "expert_rows.cuh"

namespace mmbal {
namespace {

template <typename Stored>
__global__ void __launch_bounds__(ROW_THREADS, 1)
    gather(const Stored *__restrict__ values, Rows<Stored> c, bool masked, bool aligned, Stored *__restrict__ rows,
           Stored *__restrict__ weighted) {
    using R = Real<Stored>;
    constexpr int SIZE = Pack<Stored>::SIZE;
    for (int64_t r = first_group<WARP>(); r < c.R; r += group_count<WARP>()) {
        const int64_t pair = c.pair(r), n = pair / c.K;
        const R weight = weighted ? c.weights[pair] : 0;
        MMBAL_FOR_PACKS(d, c.D) {
            const int64_t left = c.D - d;
            Pack<Stored> pack = load_pack(values + n * c.D + d, left, aligned), times_weight;
            const unsigned kept = masked ? kept_bits<SIZE>(c.output, pair * c.D + d) : ~0u;
            const R scale = masked ? static_cast<R>(c.output.scale) : 1;
#pragma unroll
            for (int i = 0; i < SIZE; i++) {
                const R value = kept >> i & 1 ? load(pack.of[i]) * scale : 0;
                if (masked) store(&pack.of[i], value);
                store(&times_weight.of[i], value * weight);
            }
            if (rows) store_pack(rows + r * c.D + d, pack, left, aligned);
            if (weighted) store_pack(weighted + r * c.D + d, times_weight, left, aligned);
        }
    }
}

template <typename Stored, typename From>
__global__ void __launch_bounds__(ROW_THREADS, 1)
    combine(const From *__restrict__ product, Rows<Stored> c, bool plain, bool aligned, Stored *__restrict__ y) {
    using R = Real<Stored>;
    constexpr int SIZE = Pack<Stored>::SIZE;
    const bool masked = c.drops_output && !plain;
    for (int64_t n = first_group<WARP>(); n < c.N; n += group_count<WARP>()) {
        MMBAL_FOR_PACKS(d, c.D) {
            const int64_t left = c.D - d;
            R sums[SIZE] = {};
            for (int64_t k = 0; k < c.K; k++) {
                const int64_t pair = n * c.K + k, r = c.inverse[pair];
                require_index(r, c.R);
                const R weight = plain ? 1 : c.weights[pair];
                const Loaded<SIZE, From> o = load_some<SIZE>(product + r * c.D + d, left, aligned);
                Pack<Stored> bias = {};
                const bool biased = c.b2 && !plain;
                if (biased) bias = load_pack(c.b2 + expert_of(c.offsets, c.E, r) * c.D + d, left, aligned);
                const unsigned kept = masked ? kept_bits<SIZE>(c.output, pair * c.D + d) : ~0u;
                const R scale = masked ? static_cast<R>(c.output.scale) : 1;
#pragma unroll
                for (int i = 0; i < SIZE; i++) {
                    const R value = o.of[i] + (biased ? load(bias.of[i]) : 0);
                    sums[i] += kept >> i & 1 ? weight * (value * scale) : 0;
                }
            }
            Pack<Stored> rounded;
#pragma unroll
            for (int i = 0; i < SIZE; i++) store(&rounded.of[i], sums[i]);
            store_pack(y + n * c.D + d, rounded, left, aligned);
        }
    }
}

template <typename Stored>
mmbal_status run_gather(const void *values, const mmbal_expert_mlp_inputs *inputs, mmbal_expert_mlp_shape shape,
                        const mmbal_expert_mlp_options *options, int masked, void *rows, void *weighted,
                        mmbal_stream stream) {
    const Rows<Stored> c = rows_of<Stored>(inputs, shape, options);
    const auto is_aligned = [&](const void *data) { return rows_are_aligned(data, c.D, sizeof(Stored)); };
    return launch(stream, blocks_for_rows(c.R), ROW_THREADS, 0, gather<Stored>, static_cast<const Stored *>(values), c,
                  masked && c.drops_output, is_aligned(values) && is_aligned(rows) && is_aligned(weighted),
                  static_cast<Stored *>(rows), static_cast<Stored *>(weighted));
}

template <typename Stored, typename From>
mmbal_status run_combine_from(const void *product, const mmbal_expert_mlp_inputs *inputs, mmbal_expert_mlp_shape shape,
                              const mmbal_expert_mlp_options *options, int plain, void *y, mmbal_stream stream) {
    const Rows<Stored> c = rows_of<Stored>(inputs, shape, options);
    const auto is_aligned = [&](const void *data) { return rows_are_aligned(data, c.D, sizeof(Stored)); };
    return launch(stream, blocks_for_rows(c.N), ROW_THREADS, 0, combine<Stored, From>,
                  static_cast<const From *>(product), c, plain != 0,
                  is_aligned(product) && is_aligned(c.b2) && is_aligned(y), static_cast<Stored *>(y));
}

template <typename Stored>
mmbal_status run_combine(mmbal_product_type type, const void *product, const mmbal_expert_mlp_inputs *inputs,
                         mmbal_expert_mlp_shape shape, const mmbal_expert_mlp_options *options, int plain, void *y,
                         mmbal_stream stream) {
    return (type == MMBAL_PRODUCT_REAL
                ? run_combine_from<Stored, Real<Stored>>
                : run_combine_from<Stored, Stored>)(product, inputs, shape, options, plain, y, stream);
}

} // namespace
} // namespace mmbal

using namespace mmbal;

mmbal_status mmbal_expert_gather_cuda(mmbal_dtype dtype, const void *values, const mmbal_expert_mlp_inputs *inputs,
                                      mmbal_expert_mlp_shape shape, const mmbal_expert_mlp_options *options, int masked,
                                      void *rows, void *weighted, mmbal_stream stream) {
    if (!is_served(shape, options)) return MMBAL_INVALID_ARGUMENT;
    MMBAL_RETURN_FOR_DTYPE(dtype, run_gather, values, inputs, shape, options, masked, rows, weighted, stream);
}

mmbal_status mmbal_expert_combine_cuda(mmbal_dtype dtype, mmbal_product_type type, const void *product,
                                       const mmbal_expert_mlp_inputs *inputs, mmbal_expert_mlp_shape shape,
                                       const mmbal_expert_mlp_options *options, int plain, void *y,
                                       mmbal_stream stream) {
    if (!is_served(shape, options)) return MMBAL_INVALID_ARGUMENT;
    MMBAL_RETURN_FOR_DTYPE(dtype, run_combine, type, product, inputs, shape, options, plain, y, stream);
}
