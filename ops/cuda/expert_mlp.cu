// Everything of expert_mlp in the order of its steps. See mmbal/cuda/expert_mlp.h.
#include "expert_rows.cuh"
#include "pieces.cuh"

namespace mmbal {
namespace {

struct ForwardMemory {
    void *rows, *activated, *product; // [R, D], [R, F], [R, max(D, F)] real
    ForwardMemory(mmbal_dtype dtype, mmbal_expert_mlp_shape s, Pieces *from) {
        const int64_t R = s.N * s.K, stored = stored_size(dtype);
        rows = from->take<unsigned char>(R * s.D * stored);
        activated = from->take<unsigned char>(R * s.F * stored);
        product = from->take<unsigned char>(R * (s.D > s.F ? s.D : s.F) * real_size(dtype));
    }
};

struct BackwardMemory {
    void *rows, *g, *weighted, *activated, *du, *product, *parts;
    BackwardMemory(mmbal_dtype dtype, mmbal_expert_mlp_shape s, Pieces *from) {
        const int64_t R = s.N * s.K, stored = stored_size(dtype), wide = s.D > s.F ? s.D : s.F;
        rows = from->take<unsigned char>(R * s.D * stored);
        g = from->take<unsigned char>(R * s.D * stored);
        weighted = from->take<unsigned char>(R * s.D * stored);
        activated = from->take<unsigned char>(R * s.F * stored);
        du = from->take<unsigned char>(R * s.F * stored);
        product = from->take<unsigned char>(R * wide * real_size(dtype));
        parts = from->take<unsigned char>(mmbal_expert_sums_workspace_cuda(dtype, R, s.E, wide));
    }
};

// A row's elements, filled up to whole 16 bytes.
int64_t packed_row(mmbal_dtype dtype, int64_t columns) {
    const int64_t pack = 16 / stored_size(dtype);
    return ceil_div(columns, pack) * pack;
}

struct Weights {
    const void *w1, *w2;
    int64_t w1_stride, w2_stride;
};

Weights packed_weights(mmbal_dtype dtype, mmbal_expert_mlp_shape s, const void *packed) {
    const int64_t w1_stride = packed_row(dtype, s.D), w2_stride = packed_row(dtype, s.F);
    const void *w2 = static_cast<const unsigned char *>(packed) + s.E * s.F * w1_stride * stored_size(dtype);
    return {packed, w2, w1_stride, w2_stride};
}

bool is_aligned(const void *data) { return reinterpret_cast<uintptr_t>(data) % 16 == 0; }

// A thread writes 16 bytes at a time.
template <typename Stored>
__global__ void __launch_bounds__(256, 1)
    fill_up_rows(const Stored *__restrict__ rows, int64_t count, int64_t columns, Stored *__restrict__ filled) {
    constexpr int SIZE = Pack<Stored>::SIZE;
    const int64_t packs = ceil_div(columns, SIZE);
    for (int64_t i = first_group<1>(); i < count * packs; i += group_count<1>()) {
        const int64_t column = i % packs * SIZE;
        const Pack<Stored> pack = load_pack(rows + i / packs * columns + column, columns - column, false);
        store_pack(filled + i * SIZE, pack, SIZE, true);
    }
}

template <typename Stored>
mmbal_status pack_weights(const void *w1, const void *w2, mmbal_expert_mlp_shape s, const Weights &to,
                          mmbal_stream stream) {
    const auto fill_up = [&](const void *rows, int64_t count, int64_t columns, const void *filled) {
        const int64_t packs = count * ceil_div(columns, Pack<Stored>::SIZE);
        return launch(stream, ceil_div(packs, 256), 256, 0, fill_up_rows<Stored>, static_cast<const Stored *>(rows),
                      count, columns, static_cast<Stored *>(const_cast<void *>(filled)));
    };
    MMBAL_RETURN_UNLESS_OK(fill_up(w1, s.E * s.F, s.D, to.w1));
    return fill_up(w2, s.E * s.D, s.F, to.w2);
}

} // namespace
} // namespace mmbal

using namespace mmbal;

int64_t mmbal_expert_mlp_workspace_cuda(mmbal_dtype dtype, mmbal_expert_mlp_shape shape) {
    Pieces pieces(nullptr);
    ForwardMemory(dtype, shape, &pieces);
    return pieces.bytes();
}

int64_t mmbal_expert_mlp_backward_workspace_cuda(mmbal_dtype dtype, mmbal_expert_mlp_shape shape) {
    Pieces pieces(nullptr);
    BackwardMemory(dtype, shape, &pieces);
    return pieces.bytes();
}

mmbal_status mmbal_expert_mlp_cuda(mmbal_dtype dtype, const mmbal_expert_mlp_inputs *in, mmbal_expert_mlp_shape s,
                                   const mmbal_expert_mlp_options *options, void *y, void *preactivation,
                                   void *workspace, mmbal_stream stream) {
    if (!is_served(s, options) || (in->packed && !is_aligned(in->packed))) return MMBAL_INVALID_ARGUMENT;
    Pieces pieces(workspace);
    const ForwardMemory memory(dtype, s, &pieces);
    const int64_t R = s.N * s.K;
    const Weights weights = in->packed ? packed_weights(dtype, s, in->packed) : Weights{in->w1, in->w2, s.D, s.F};
    MMBAL_RETURN_UNLESS_OK(mmbal_expert_gather_cuda(dtype, in->x, in, s, options, 0, memory.rows, nullptr, stream));
    MMBAL_RETURN_UNLESS_OK(mmbal_expert_product_cuda(dtype, MMBAL_ROWS_TIMES_TRANSPOSED, memory.rows, weights.w1,
                                                     in->offsets, R, s.E, s.D, s.F, weights.w1_stride, memory.product,
                                                     stream));
    MMBAL_RETURN_UNLESS_OK(mmbal_expert_activation_cuda(dtype, MMBAL_PRODUCT_REAL, memory.product, in, s, options,
                                                        preactivation, memory.activated, stream));
    MMBAL_RETURN_UNLESS_OK(mmbal_expert_product_cuda(dtype, MMBAL_ROWS_TIMES_TRANSPOSED, memory.activated, weights.w2,
                                                     in->offsets, R, s.E, s.F, s.D, weights.w2_stride, memory.product,
                                                     stream));
    return mmbal_expert_combine_cuda(dtype, MMBAL_PRODUCT_REAL, memory.product, in, s, options, 0, y, stream);
}

mmbal_status mmbal_expert_mlp_backward_cuda(mmbal_dtype dtype, const void *dy, const mmbal_expert_mlp_inputs *in,
                                            const void *preactivation, mmbal_expert_mlp_shape s,
                                            const mmbal_expert_mlp_options *options,
                                            const mmbal_expert_mlp_gradients *to, void *workspace,
                                            mmbal_stream stream) {
    if (!is_served(s, options)) return MMBAL_INVALID_ARGUMENT;
    Pieces pieces(workspace);
    const BackwardMemory memory(dtype, s, &pieces);
    const int64_t R = s.N * s.K;
    const bool du = to->dx || to->dw1 || to->db1, weighted = to->dw2 || to->db2;
    MMBAL_RETURN_UNLESS_OK(
        mmbal_expert_gather_cuda(dtype, dy, in, s, options, 1, memory.g, weighted ? memory.weighted : nullptr, stream));
    if (to->db2)
        MMBAL_RETURN_UNLESS_OK(
            mmbal_expert_sums_cuda(dtype, memory.weighted, in->offsets, R, s.E, s.D, to->db2, memory.parts, stream));
    if (du || to->dweights || to->dw2) {
        if (du || to->dweights)
            MMBAL_RETURN_UNLESS_OK(mmbal_expert_product_cuda(dtype, MMBAL_ROWS_TIMES_MATRIX, memory.g, in->w2,
                                                             in->offsets, R, s.E, s.D, s.F, s.F, memory.product,
                                                             stream));
        MMBAL_RETURN_UNLESS_OK(mmbal_expert_activation_backward_cuda(
            dtype, MMBAL_PRODUCT_REAL, du || to->dweights ? memory.product : nullptr, preactivation, memory.g, in, s,
            options, du ? memory.du : nullptr, to->dw2 ? memory.activated : nullptr, to->dweights, stream));
    }
    if (to->dw2)
        MMBAL_RETURN_UNLESS_OK(mmbal_expert_product_cuda(dtype, MMBAL_ROWS_TRANSPOSED_TIMES_ROWS, memory.activated,
                                                         memory.weighted, in->offsets, R, s.E, s.F, s.D, s.D, to->dw2,
                                                         stream));
    if (to->db1)
        MMBAL_RETURN_UNLESS_OK(
            mmbal_expert_sums_cuda(dtype, memory.du, in->offsets, R, s.E, s.F, to->db1, memory.parts, stream));
    if (to->dw1) {
        MMBAL_RETURN_UNLESS_OK(mmbal_expert_gather_cuda(dtype, in->x, in, s, options, 0, memory.rows, nullptr, stream));
        MMBAL_RETURN_UNLESS_OK(mmbal_expert_product_cuda(dtype, MMBAL_ROWS_TRANSPOSED_TIMES_ROWS, memory.rows,
                                                         memory.du, in->offsets, R, s.E, s.D, s.F, s.F, to->dw1,
                                                         stream));
    }
    if (!to->dx) return MMBAL_OK;
    MMBAL_RETURN_UNLESS_OK(mmbal_expert_product_cuda(dtype, MMBAL_ROWS_TIMES_MATRIX, memory.du, in->w1, in->offsets, R,
                                                     s.E, s.F, s.D, s.D, memory.product, stream));
    return mmbal_expert_combine_cuda(dtype, MMBAL_PRODUCT_REAL, memory.product, in, s, options, 1, to->dx, stream);
}

int64_t mmbal_expert_mlp_packed_bytes_cuda(mmbal_dtype dtype, mmbal_expert_mlp_shape s) {
    return s.E * (s.F * packed_row(dtype, s.D) + s.D * packed_row(dtype, s.F)) * stored_size(dtype);
}

mmbal_status mmbal_expert_mlp_pack_cuda(mmbal_dtype dtype, const void *w1, const void *w2, mmbal_expert_mlp_shape s,
                                        void *packed, mmbal_stream stream) {
    if (s.D < 1 || s.F < 1 || s.E < 1 || !is_aligned(packed)) return MMBAL_INVALID_ARGUMENT;
    const Weights to = packed_weights(dtype, s, packed);
    MMBAL_RETURN_FOR_DTYPE(dtype, pack_weights, w1, w2, s, to, stream);
}
