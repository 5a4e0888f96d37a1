// Everything of expert_mlp around its products; a warp takes a row. See mmbal/cuda/expert_mlp.h.
#include "experts.cuh"
#include "mmbal/cuda/expert_mlp.h"
#include "mmbal/cuda/routing.h"

namespace mmbal {
namespace {

constexpr int THREADS = 256;

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

int64_t blocks_for_rows(int64_t rows) { return ceil_div(rows * WARP, THREADS); }

template <typename Stored>
__global__ void __launch_bounds__(THREADS, 1)
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

// product, preactivation and activated may be the same memory: a thread reads an element before it writes it.
template <typename Stored, typename From>
__global__ void __launch_bounds__(THREADS, 1)
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

template <typename Stored, typename From>
__global__ void __launch_bounds__(THREADS, 1)
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

// product and du may be the same memory. Without a product only `activated` is asked for.
template <typename Stored, typename From>
__global__ void __launch_bounds__(THREADS, 1)
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

// Sums over an expert's rows: of parts of PART_ROWS first, then of the parts.
constexpr int64_t PART_ROWS = 128;

template <typename Stored>
__global__ void __launch_bounds__(THREADS, 1)
    sum_parts(const Stored *__restrict__ rows, const int64_t *__restrict__ offsets, int64_t parts, int64_t E,
              int64_t columns, Real<Stored> *__restrict__ sums) {
    const int64_t across = ceil_div(columns, THREADS);
    for (int64_t index = blockIdx.x; index < parts * across; index += gridDim.x) {
        const RowTile tile = row_tile(offsets, E, PART_ROWS, index / across);
        const int64_t column = index % across * THREADS + threadIdx.x;
        if (tile.expert < 0) return;
        if (column >= columns) continue;
        Real<Stored> sum = 0;
        for (int64_t r = tile.first; r < tile.last; r++) sum += load(rows[r * columns + column]);
        sums[index / across * columns + column] = sum;
    }
}

template <typename Stored>
__global__ void __launch_bounds__(THREADS, 1)
    add_parts(const Real<Stored> *__restrict__ parts, const int64_t *__restrict__ offsets, int64_t E, int64_t columns,
              Stored *__restrict__ sums) {
    for (int64_t i = first_group<1>(); i < E * columns; i += group_count<1>()) {
        const int64_t expert = i / columns, column = i % columns;
        int64_t first = 0;
        for (int64_t e = 0; e < expert; e++) first += ceil_div(offsets[e + 1] - offsets[e], PART_ROWS);
        const int64_t count = ceil_div(offsets[expert + 1] - offsets[expert], PART_ROWS);
        Real<Stored> sum = 0;
        for (int64_t part = first; part < first + count; part++) sum += parts[part * columns + column];
        store(&sums[i], sum);
    }
}

__global__ void __launch_bounds__(THREADS, 1)
    write_ends(const int64_t *__restrict__ offsets, int64_t E, int32_t *__restrict__ ends) {
    for (int64_t e = first_group<1>(); e < E; e += group_count<1>()) ends[e] = static_cast<int32_t>(offsets[e + 1]);
}

// A block takes a stretch of an expert's gradient.
constexpr int64_t STRETCH = 16 * THREADS;

template <typename Stored>
__global__ void __launch_bounds__(THREADS, 1)
    clear(const int64_t *__restrict__ offsets, int64_t E, int64_t size, Stored *__restrict__ gradient) {
    const int64_t stretches = ceil_div(size, STRETCH);
    for (int64_t index = blockIdx.x; index < E * stretches; index += gridDim.x) {
        const int64_t e = index / stretches, first = index % stretches * STRETCH;
        if (offsets[e] != offsets[e + 1]) continue;
        for (int64_t i = first + threadIdx.x; i < size && i < first + STRETCH; i += THREADS)
            gradient[e * size + i] = Stored{};
    }
}

bool is_served(mmbal_expert_mlp_shape s, const mmbal_expert_mlp_options *o) {
    return s.N >= 0 && s.D >= 1 && s.F >= 1 && s.E >= 1 && s.K >= 1 && o->activation >= MMBAL_QUICK_GELU &&
           o->activation <= MMBAL_IDENTITY && o->dropout >= 0 && o->dropout < 1 && o->output_dropout >= 0 &&
           o->output_dropout < 1 && o->offset >= 0 && o->offset >> 56 == 0;
}

template <typename Stored>
mmbal_status run_gather(const void *values, const mmbal_expert_mlp_inputs *inputs, mmbal_expert_mlp_shape shape,
                        const mmbal_expert_mlp_options *options, int masked, void *rows, void *weighted,
                        mmbal_stream stream) {
    const Rows<Stored> c = rows_of<Stored>(inputs, shape, options);
    const auto is_aligned = [&](const void *data) { return rows_are_aligned(data, c.D, sizeof(Stored)); };
    return launch(stream, blocks_for_rows(c.R), THREADS, 0, gather<Stored>, static_cast<const Stored *>(values), c,
                  masked && c.drops_output, is_aligned(values) && is_aligned(rows) && is_aligned(weighted),
                  static_cast<Stored *>(rows), static_cast<Stored *>(weighted));
}

template <typename Stored, typename From>
mmbal_status run_activation_from(const void *product, const mmbal_expert_mlp_inputs *inputs,
                                 mmbal_expert_mlp_shape shape, const mmbal_expert_mlp_options *options,
                                 void *preactivation, void *activated, mmbal_stream stream) {
    const Rows<Stored> c = rows_of<Stored>(inputs, shape, options);
    const auto is_aligned = [&](const void *data) { return rows_are_aligned(data, c.F, sizeof(Stored)); };
    return launch(stream, blocks_for_rows(c.R), THREADS, 0, activation<Stored, From>,
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
mmbal_status run_combine_from(const void *product, const mmbal_expert_mlp_inputs *inputs, mmbal_expert_mlp_shape shape,
                              const mmbal_expert_mlp_options *options, int plain, void *y, mmbal_stream stream) {
    const Rows<Stored> c = rows_of<Stored>(inputs, shape, options);
    const auto is_aligned = [&](const void *data) { return rows_are_aligned(data, c.D, sizeof(Stored)); };
    return launch(stream, blocks_for_rows(c.N), THREADS, 0, combine<Stored, From>, static_cast<const From *>(product),
                  c, plain != 0, is_aligned(product) && is_aligned(c.b2) && is_aligned(y), static_cast<Stored *>(y));
}

template <typename Stored>
mmbal_status run_combine(mmbal_product_type type, const void *product, const mmbal_expert_mlp_inputs *inputs,
                         mmbal_expert_mlp_shape shape, const mmbal_expert_mlp_options *options, int plain, void *y,
                         mmbal_stream stream) {
    return (type == MMBAL_PRODUCT_REAL
                ? run_combine_from<Stored, Real<Stored>>
                : run_combine_from<Stored, Stored>)(product, inputs, shape, options, plain, y, stream);
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
    return launch(stream, blocks_for_rows(c.R), THREADS, 0, activation_backward<Stored, From>,
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

template <typename Stored>
mmbal_status run_sums(const void *rows, const int64_t *offsets, int64_t R, int64_t E, int64_t columns, void *sums,
                      void *workspace, mmbal_stream stream) {
    Real<Stored> *parts = static_cast<Real<Stored> *>(workspace);
    const int64_t count = most_row_tiles(R, E, PART_ROWS);
    MMBAL_RETURN_UNLESS_OK(launch(stream, count * ceil_div(columns, THREADS), THREADS, 0, sum_parts<Stored>,
                                  static_cast<const Stored *>(rows), offsets, count, E, columns, parts));
    return launch(stream, ceil_div(E * columns, THREADS), THREADS, 0, add_parts<Stored>, parts, offsets, E, columns,
                  static_cast<Stored *>(sums));
}

template <typename Stored>
mmbal_status run_clear(const int64_t *offsets, int64_t E, int64_t size, void *gradient, mmbal_stream stream) {
    return launch(stream, E * ceil_div(size, STRETCH), THREADS, 0, clear<Stored>, offsets, E, size,
                  static_cast<Stored *>(gradient));
}

// Parts of a workspace, each aligned to 16 bytes.
class Carver {
public:
    explicit Carver(void *memory) : memory_(static_cast<unsigned char *>(memory)) {}
    void *carve(int64_t bytes) {
        const int64_t begin = bytes_;
        bytes_ += ceil_div(bytes, 16) * 16;
        return memory_ ? memory_ + begin : nullptr;
    }
    int64_t bytes() const { return bytes_; }

private:
    unsigned char *memory_;
    int64_t bytes_ = 0;
};

int64_t stored_size(mmbal_dtype dtype) { return dtype == MMBAL_F64 ? 8 : dtype == MMBAL_F32 ? 4 : 2; }
int64_t real_size(mmbal_dtype dtype) { return dtype == MMBAL_F64 ? 8 : 4; }

struct ForwardMemory {
    void *rows, *activated, *product; // [R, D], [R, F], [R, max(D, F)] real
    ForwardMemory(mmbal_dtype dtype, mmbal_expert_mlp_shape s, Carver *from) {
        const int64_t R = s.N * s.K, stored = stored_size(dtype);
        rows = from->carve(R * s.D * stored);
        activated = from->carve(R * s.F * stored);
        product = from->carve(R * (s.D > s.F ? s.D : s.F) * real_size(dtype));
    }
};

struct BackwardMemory {
    void *rows, *g, *weighted, *activated, *du, *product, *parts;
    BackwardMemory(mmbal_dtype dtype, mmbal_expert_mlp_shape s, Carver *from) {
        const int64_t R = s.N * s.K, stored = stored_size(dtype), wide = s.D > s.F ? s.D : s.F;
        rows = from->carve(R * s.D * stored);
        g = from->carve(R * s.D * stored);
        weighted = from->carve(R * s.D * stored);
        activated = from->carve(R * s.F * stored);
        du = from->carve(R * s.F * stored);
        product = from->carve(R * wide * real_size(dtype));
        parts = from->carve(mmbal_expert_sums_workspace_cuda(dtype, R, s.E, wide));
    }
};

} // namespace
} // namespace mmbal

using namespace mmbal;

mmbal_status mmbal_expert_gather_cuda(mmbal_dtype dtype, const void *values, const mmbal_expert_mlp_inputs *inputs,
                                      mmbal_expert_mlp_shape shape, const mmbal_expert_mlp_options *options, int masked,
                                      void *rows, void *weighted, mmbal_stream stream) {
    if (!is_served(shape, options)) return MMBAL_INVALID_ARGUMENT;
    MMBAL_RETURN_FOR_DTYPE(dtype, run_gather, values, inputs, shape, options, masked, rows, weighted, stream);
}

mmbal_status mmbal_expert_activation_cuda(mmbal_dtype dtype, mmbal_product_type type, const void *product,
                                          const mmbal_expert_mlp_inputs *inputs, mmbal_expert_mlp_shape shape,
                                          const mmbal_expert_mlp_options *options, void *preactivation, void *activated,
                                          mmbal_stream stream) {
    if (!is_served(shape, options)) return MMBAL_INVALID_ARGUMENT;
    MMBAL_RETURN_FOR_DTYPE(dtype, run_activation, type, product, inputs, shape, options, preactivation, activated,
                           stream);
}

mmbal_status mmbal_expert_combine_cuda(mmbal_dtype dtype, mmbal_product_type type, const void *product,
                                       const mmbal_expert_mlp_inputs *inputs, mmbal_expert_mlp_shape shape,
                                       const mmbal_expert_mlp_options *options, int plain, void *y,
                                       mmbal_stream stream) {
    if (!is_served(shape, options)) return MMBAL_INVALID_ARGUMENT;
    MMBAL_RETURN_FOR_DTYPE(dtype, run_combine, type, product, inputs, shape, options, plain, y, stream);
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

int64_t mmbal_expert_sums_workspace_cuda(mmbal_dtype dtype, int64_t R, int64_t E, int64_t columns) {
    return most_row_tiles(R, E, PART_ROWS) * columns * real_size(dtype);
}

mmbal_status mmbal_expert_sums_cuda(mmbal_dtype dtype, const void *rows, const int64_t *offsets, int64_t R, int64_t E,
                                    int64_t columns, void *sums, void *workspace, mmbal_stream stream) {
    if (R < 0 || E < 1 || columns < 1) return MMBAL_INVALID_ARGUMENT;
    MMBAL_RETURN_FOR_DTYPE(dtype, run_sums, rows, offsets, R, E, columns, sums, workspace, stream);
}

mmbal_status mmbal_expert_ends_cuda(const int64_t *offsets, int64_t E, int32_t *ends, mmbal_stream stream) {
    if (E < 1) return MMBAL_INVALID_ARGUMENT;
    return launch(stream, ceil_div(E, THREADS), THREADS, 0, write_ends, offsets, E, ends);
}

mmbal_status mmbal_expert_clear_cuda(mmbal_dtype dtype, const int64_t *offsets, int64_t E, int64_t size, void *gradient,
                                     mmbal_stream stream) {
    if (E < 1 || size < 1) return MMBAL_INVALID_ARGUMENT;
    MMBAL_RETURN_FOR_DTYPE(dtype, run_clear, offsets, E, size, gradient, stream);
}

int64_t mmbal_expert_mlp_workspace_cuda(mmbal_dtype dtype, mmbal_expert_mlp_shape shape) {
    Carver carver(nullptr);
    ForwardMemory(dtype, shape, &carver);
    return carver.bytes();
}

int64_t mmbal_expert_mlp_backward_workspace_cuda(mmbal_dtype dtype, mmbal_expert_mlp_shape shape) {
    Carver carver(nullptr);
    BackwardMemory(dtype, shape, &carver);
    return carver.bytes();
}

mmbal_status mmbal_expert_mlp_cuda(mmbal_dtype dtype, const mmbal_expert_mlp_inputs *in, mmbal_expert_mlp_shape s,
                                   const mmbal_expert_mlp_options *options, void *y, void *preactivation,
                                   void *workspace, mmbal_stream stream) {
    if (!is_served(s, options) || in->packed) return MMBAL_INVALID_ARGUMENT;
    Carver carver(workspace);
    const ForwardMemory memory(dtype, s, &carver);
    const int64_t R = s.N * s.K;
    MMBAL_RETURN_UNLESS_OK(mmbal_expert_gather_cuda(dtype, in->x, in, s, options, 0, memory.rows, nullptr, stream));
    MMBAL_RETURN_UNLESS_OK(mmbal_expert_product_cuda(dtype, MMBAL_ROWS_TIMES_TRANSPOSED, memory.rows, in->w1,
                                                     in->offsets, R, s.E, s.D, s.F, memory.product, stream));
    MMBAL_RETURN_UNLESS_OK(mmbal_expert_activation_cuda(dtype, MMBAL_PRODUCT_REAL, memory.product, in, s, options,
                                                        preactivation, memory.activated, stream));
    MMBAL_RETURN_UNLESS_OK(mmbal_expert_product_cuda(dtype, MMBAL_ROWS_TIMES_TRANSPOSED, memory.activated, in->w2,
                                                     in->offsets, R, s.E, s.F, s.D, memory.product, stream));
    return mmbal_expert_combine_cuda(dtype, MMBAL_PRODUCT_REAL, memory.product, in, s, options, 0, y, stream);
}

mmbal_status mmbal_expert_mlp_backward_cuda(mmbal_dtype dtype, const void *dy, const mmbal_expert_mlp_inputs *in,
                                            const void *preactivation, mmbal_expert_mlp_shape s,
                                            const mmbal_expert_mlp_options *options,
                                            const mmbal_expert_mlp_gradients *to, void *workspace,
                                            mmbal_stream stream) {
    if (!is_served(s, options)) return MMBAL_INVALID_ARGUMENT;
    Carver carver(workspace);
    const BackwardMemory memory(dtype, s, &carver);
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
                                                             in->offsets, R, s.E, s.D, s.F, memory.product, stream));
        MMBAL_RETURN_UNLESS_OK(mmbal_expert_activation_backward_cuda(
            dtype, MMBAL_PRODUCT_REAL, du || to->dweights ? memory.product : nullptr, preactivation, memory.g, in, s,
            options, du ? memory.du : nullptr, to->dw2 ? memory.activated : nullptr, to->dweights, stream));
    }
    if (to->dw2)
        MMBAL_RETURN_UNLESS_OK(mmbal_expert_product_cuda(dtype, MMBAL_ROWS_TRANSPOSED_TIMES_ROWS, memory.activated,
                                                         memory.weighted, in->offsets, R, s.E, s.F, s.D, to->dw2,
                                                         stream));
    if (to->db1)
        MMBAL_RETURN_UNLESS_OK(
            mmbal_expert_sums_cuda(dtype, memory.du, in->offsets, R, s.E, s.F, to->db1, memory.parts, stream));
    if (to->dw1) {
        MMBAL_RETURN_UNLESS_OK(mmbal_expert_gather_cuda(dtype, in->x, in, s, options, 0, memory.rows, nullptr, stream));
        MMBAL_RETURN_UNLESS_OK(mmbal_expert_product_cuda(dtype, MMBAL_ROWS_TRANSPOSED_TIMES_ROWS, memory.rows,
                                                         memory.du, in->offsets, R, s.E, s.D, s.F, to->dw1, stream));
    }
    if (!to->dx) return MMBAL_OK;
    MMBAL_RETURN_UNLESS_OK(mmbal_expert_product_cuda(dtype, MMBAL_ROWS_TIMES_MATRIX, memory.du, in->w1, in->offsets, R,
                                                     s.E, s.F, s.D, memory.product, stream));
    return mmbal_expert_combine_cuda(dtype, MMBAL_PRODUCT_REAL, memory.product, in, s, options, 1, to->dx, stream);
}
