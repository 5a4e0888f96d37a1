// The activation of expert_mlp and its derivative. See mmbal/cuda/expert_mlp.h.
#include "expert_rows.cuh"

namespace mmbal {
namespace {

// product, preactivation and activated may be the same memory: a thread reads an element before it writes it.
template <typename Stored, typename From>
__global__ void __launch_bounds__(ROW_THREADS, 1)
    activation(const From *product, Rows<Stored> c, bool aligned, Stored *preactivation, Stored *activated) {
    using R = Real<Stored>;
    constexpr int SIZE = Pack<Stored>::SIZE;
    for (int64_t r = first_group<WARP>(); r < c.R; r += group_count<WARP>()) {
        const int64_t pair = c.pair(r);
        const Stored *b1 = c.b1 ? c.b1 + expert_of(c.offsets, c.E, r) * c.F : nullptr;
        MMBAL_FOR_PACKS(f, c.F) {
            const int64_t left = c.F - f;
            const Loaded<SIZE, From> sums = load_some<SIZE>(product + r * c.F + f, left, aligned);
            Pack<Stored> bias = {}, u, a;
            if (b1) bias = load_pack(b1 + f, left, aligned);
            const unsigned kept = c.drops_hidden ? kept_bits<SIZE>(c.hidden, pair * c.F + f) : ~0u;
            const R scale = c.drops_hidden ? static_cast<R>(c.hidden.scale) : 1;
#pragma unroll
            for (int i = 0; i < SIZE; i++) {
                store(&u.of[i], sums.of[i] + (b1 ? load(bias.of[i]) : 0));
                const R value = activate(c.activation, load(u.of[i])).value;
                store(&a.of[i], kept >> i & 1 ? value * scale : 0);
            }
            if (preactivation) store_pack(preactivation + r * c.F + f, u, left, aligned);
            store_pack(activated + r * c.F + f, a, left, aligned);
        }
    }
}

// product and du may be the same memory. Without a product only `activated` is asked for.
template <typename Stored, typename From>
__global__ void __launch_bounds__(ROW_THREADS, 1)
    activation_backward(const From *product, const Stored *__restrict__ preactivation, const Stored *__restrict__ g,
                        Rows<Stored> c, bool aligned, Stored *du, Stored *__restrict__ activated,
                        Real<Stored> *__restrict__ dweights) {
    using R = Real<Stored>;
    constexpr int SIZE = Pack<Stored>::SIZE;
    for (int64_t r = first_group<WARP>(); r < c.R; r += group_count<WARP>()) {
        const int64_t pair = c.pair(r);
        const R weight = c.weights[pair];
        R dot = 0;
        MMBAL_FOR_PACKS(f, c.F) {
            const int64_t left = c.F - f;
            Loaded<SIZE, From> h = {};
            if (product) h = load_some<SIZE>(product + r * c.F + f, left, aligned);
            const Pack<Stored> u = load_pack(preactivation + r * c.F + f, left, aligned);
            const unsigned kept = c.drops_hidden ? kept_bits<SIZE>(c.hidden, pair * c.F + f) : ~0u;
            const R scale = c.drops_hidden ? static_cast<R>(c.hidden.scale) : 1;
            Pack<Stored> slopes, a;
#pragma unroll
            for (int i = 0; i < SIZE; i++) {
                const Activated<R> of_u = activate(c.activation, load(u.of[i]));
                const R slope = kept >> i & 1 ? h.of[i] * scale : 0;
                if (i < left) dot += slope * of_u.value;
                store(&slopes.of[i], weight * slope * of_u.slope);
                store(&a.of[i], kept >> i & 1 ? of_u.value * scale : 0);
            }
            if (du) store_pack(du + r * c.F + f, slopes, left, aligned);
            if (activated) store_pack(activated + r * c.F + f, a, left, aligned);
        }
        if (!dweights) continue; // the same for all lanes
        if (c.b2) {
            const Stored *b2 = c.b2 + expert_of(c.offsets, c.E, r) * c.D;
            MMBAL_FOR_PACKS(d, c.D) {
                const int64_t left = c.D - d;
                const Pack<Stored> bias = load_pack(b2 + d, left, aligned);
                const Pack<Stored> of_g = load_pack(g + r * c.D + d, left, aligned);
#pragma unroll
                for (int i = 0; i < SIZE; i++) dot += load(bias.of[i]) * load(of_g.of[i]);
            }
        }
        dot = sum_over_lanes<WARP>(dot);
        if (threadIdx.x % WARP == 0) dweights[pair] = dot;
    }
}

template <typename Stored, typename From>
mmbal_status run_activation_from(const void *product, const mmbal_expert_mlp_inputs *inputs,
                                 mmbal_expert_mlp_shape shape, const mmbal_expert_mlp_options *options,
                                 void *preactivation, void *activated, mmbal_stream stream) {
    const Rows<Stored> c = rows_of<Stored>(inputs, shape, options);
    const auto is_aligned = [&](const void *data) { return rows_are_aligned(data, c.F, sizeof(Stored)); };
    return launch(stream, blocks_for_rows(c.R), ROW_THREADS, 0, activation<Stored, From>,
                  static_cast<const From *>(product), c,
                  is_aligned(product) && is_aligned(c.b1) && is_aligned(preactivation) && is_aligned(activated),
                  static_cast<Stored *>(preactivation), static_cast<Stored *>(activated));
}

template <typename Stored>
mmbal_status run_activation(mmbal_product_type type, const void *product, const mmbal_expert_mlp_inputs *inputs,
                            mmbal_expert_mlp_shape shape, const mmbal_expert_mlp_options *options, void *preactivation,
                            void *activated, mmbal_stream stream) {
    return (type == MMBAL_PRODUCT_REAL ? run_activation_from<Stored, Real<Stored>>
                                       : run_activation_from<Stored, Stored>)(product, inputs, shape, options,
                                                                              preactivation, activated, stream);
}

template <typename Stored, typename From>
mmbal_status run_activation_backward_from(const void *product, const void *preactivation, const void *g,
                                          const mmbal_expert_mlp_inputs *inputs, mmbal_expert_mlp_shape shape,
                                          const mmbal_expert_mlp_options *options, void *du, void *activated,
                                          void *dweights, mmbal_stream stream) {
    const Rows<Stored> c = rows_of<Stored>(inputs, shape, options);
    const auto is_aligned = [&](const void *data, int64_t columns) {
        return rows_are_aligned(data, columns, sizeof(Stored));
    };
    const bool aligned = is_aligned(product, c.F) && is_aligned(preactivation, c.F) && is_aligned(du, c.F) &&
                         is_aligned(activated, c.F) && is_aligned(g, c.D) && is_aligned(c.b2, c.D);
    return launch(stream, blocks_for_rows(c.R), ROW_THREADS, 0, activation_backward<Stored, From>,
                  static_cast<const From *>(product), static_cast<const Stored *>(preactivation),
                  static_cast<const Stored *>(g), c, aligned, static_cast<Stored *>(du),
                  static_cast<Stored *>(activated), static_cast<Real<Stored> *>(dweights));
}

template <typename Stored>
mmbal_status run_activation_backward(mmbal_product_type type, const void *product, const void *preactivation,
                                     const void *g, const mmbal_expert_mlp_inputs *inputs, mmbal_expert_mlp_shape shape,
                                     const mmbal_expert_mlp_options *options, void *du, void *activated, void *dweights,
                                     mmbal_stream stream) {
    return (type == MMBAL_PRODUCT_REAL ? run_activation_backward_from<Stored, Real<Stored>>
                                       : run_activation_backward_from<Stored, Stored>)(product, preactivation, g,
                                                                                       inputs, shape, options, du,
                                                                                       activated, dweights, stream);
}

} // namespace
} // namespace mmbal

using namespace mmbal;

mmbal_status mmbal_expert_activation_cuda(mmbal_dtype dtype, mmbal_product_type type, const void *product,
                                          const mmbal_expert_mlp_inputs *inputs, mmbal_expert_mlp_shape shape,
                                          const mmbal_expert_mlp_options *options, void *preactivation, void *activated,
                                          mmbal_stream stream) {
    if (!is_served(shape, options)) return MMBAL_INVALID_ARGUMENT;
    MMBAL_RETURN_FOR_DTYPE(dtype, run_activation, type, product, inputs, shape, options, preactivation, activated,
                           stream);
}

mmbal_status mmbal_expert_activation_backward_cuda(mmbal_dtype dtype, mmbal_product_type type, const void *product,
                                                   const void *preactivation, const void *g,
                                                   const mmbal_expert_mlp_inputs *inputs, mmbal_expert_mlp_shape shape,
                                                   const mmbal_expert_mlp_options *options, void *du, void *activated,
                                                   void *dweights, mmbal_stream stream) {
    if (!is_served(shape, options)) return MMBAL_INVALID_ARGUMENT;
    MMBAL_RETURN_FOR_DTYPE(dtype, run_activation_backward, type, product, preactivation, g, inputs, shape, options, du,
                           activated, dweights, stream);
}
