#include "attribution.cuh"

#include "attribution_sample.cuh"
#include "packs.cuh"

namespace mmbal {
namespace {

constexpr int THREADS = 256;
constexpr int SAMPLE_THREADS =
    64; // of the kernels where a thread takes a sample: few, so that all processors have some
constexpr int64_t LONG_ROW = 1024; // elements: beyond it a row has a block, else a warp

// One modality of a launch; names as in mmbal/attribution.h.
template <typename Stored>
struct Modality {
    const Stored *gradient, *embedding, *ddgradient, *ddembedding;
    Stored *dgradient, *dembedding;
    int64_t d, stride;
    bool aligned; // all of its rows are
};

template <typename Stored>
struct Modalities {
    static constexpr int64_t SIZE = 40;
    Modality<Stored> of[SIZE];
    int64_t first, count;
};

// Which rows there are, one of each sample and modality; a modality's follow one another.
struct Rows {
    const uint8_t *present; // [B, M] or NULL
    int64_t B, M;
    __device__ __forceinline__ bool has(int64_t b, int64_t m) const { return !present || present[b * M + m]; }
};

// Columns that this thread takes of a row that LANES threads share, a pack at a time.
#define MMBAL_FOR_PACKS_OF_GROUP(column, columns)                                                                      \
    for (int64_t column = static_cast<int64_t>(threadIdx.x % LANES) * SIZE; column < (columns); column += LANES * SIZE)

// Sum over a warp, or over a block, in one order; the same in all its threads.
template <int LANES>
__device__ __forceinline__ double sum_over_group(double value) {
    value = sum_over_lanes<WARP>(value);
    if constexpr (LANES == WARP) return value;
    double *parts = shared_memory<double>();
    __syncthreads(); // all have read those of the row before
    if (threadIdx.x % WARP == 0) parts[threadIdx.x / WARP] = value;
    __syncthreads();
    double sum = 0;
    for (int part = 0; part < LANES / WARP; part++) sum += parts[part];
    return sum;
}

template <int LANES, typename Stored>
__device__ __forceinline__ double sum_of_squares(const Modality<Stored> &of, int64_t b) {
    constexpr int SIZE = Pack<Stored>::SIZE;
    const Stored *gradient = of.gradient + b * of.stride, *embedding = of.embedding + b * of.stride;
    double sum = 0;
    MMBAL_FOR_PACKS_OF_GROUP(column, of.d) {
        const Pack<Stored> g = load_pack(gradient + column, of.d - column, of.aligned);
        const Pack<Stored> e = load_pack(embedding + column, of.d - column, of.aligned);
#pragma unroll
        for (int i = 0; i < SIZE; i++) { // in float64: no square of a float32 over- or underflows there
            const double alpha = static_cast<double>(load(g.of[i])) * static_cast<double>(load(e.of[i]));
            sum += alpha * alpha;
        }
    }
    return sum_over_group<LANES>(sum);
}

// a [B, M]; of magnitudes that are given the rounded ones, but where a float32 has no room for these.
template <int LANES, typename Stored>
__global__ void __launch_bounds__(THREADS, 1)
    find_magnitudes(Modalities<Stored> t, Rows rows, bool rms, const Real<Stored> *__restrict__ given,
                    double *__restrict__ magnitudes) {
    for (int64_t row = first_group<LANES>(); row < rows.B * t.count; row += group_count<LANES>()) {
        const int64_t b = row % rows.B, which = row / rows.B, at = b * rows.M + t.first + which;
        double value = 0, sum = LEAST_SUM;
        if (given) {
            value = static_cast<double>(given[at]), sum = 0;
            for (int64_t m = threadIdx.x % WARP; m < rows.M; m += WARP) sum += given[b * rows.M + m];
            sum = sum_over_lanes<WARP>(sum);
        }
        if (!given || !(sum >= LEAST_SUM && isfinite(sum))) {
            value = 0;
            if (rows.has(b, t.first + which)) {
                const double squares = sum_of_squares<LANES>(t.of[which], b);
                value = sqrt(rms ? squares / static_cast<double>(t.of[which].d) : squares);
            }
        }
        if (threadIdx.x % LANES == 0) magnitudes[at] = value;
    }
}

// beta [B, M]
template <int LANES, typename Stored>
__global__ void __launch_bounds__(THREADS, 1) find_betas(Modalities<Stored> t, Rows rows, double *__restrict__ betas) {
    constexpr int SIZE = Pack<Stored>::SIZE;
    for (int64_t row = first_group<LANES>(); row < rows.B * t.count; row += group_count<LANES>()) {
        const int64_t b = row % rows.B, which = row / rows.B, m = t.first + which;
        const Modality<Stored> &of = t.of[which];
        double sum = 0;
        if (rows.has(b, m)) {
            const int64_t first = b * of.stride;
            MMBAL_FOR_PACKS_OF_GROUP(column, of.d) {
                const int64_t at = first + column, left = of.d - column;
                const Pack<Stored> g = load_pack(of.gradient + at, left, of.aligned);
                const Pack<Stored> e = load_pack(of.embedding + at, left, of.aligned);
                Pack<Stored> up_g = {}, up_e = {};
                if (of.ddgradient) up_g = load_pack(of.ddgradient + at, left, of.aligned);
                if (of.ddembedding) up_e = load_pack(of.ddembedding + at, left, of.aligned);
#pragma unroll
                for (int i = 0; i < SIZE; i++) {
                    const double gradient = load(g.of[i]), embedding = load(e.of[i]);
                    const double along = load(up_g.of[i]) * embedding + load(up_e.of[i]) * gradient;
                    sum += gradient * embedding * along;
                }
            }
            sum = sum_over_group<LANES>(sum);
        }
        if (threadIdx.x % LANES == 0) betas[b * rows.M + m] = sum;
    }
}

// Gradients may be written where they were read.
template <int LANES, typename Stored>
__global__ void __launch_bounds__(THREADS, 1)
    write_gradients(Modalities<Stored> t, Rows rows, const double *__restrict__ factors) {
    constexpr int SIZE = Pack<Stored>::SIZE;
    using R = Real<Stored>;
    for (int64_t row = first_group<LANES>(); row < rows.B * t.count; row += group_count<LANES>()) {
        const int64_t b = row % rows.B, which = row / rows.B;
        const Modality<Stored> &of = t.of[which];
        const double c = factors[b * rows.M + t.first + which];
        MMBAL_FOR_PACKS_OF_GROUP(column, of.d) {
            const int64_t at = b * of.stride + column, left = of.d - column;
            Pack<Stored> dg = {}, de = {};
            if (c != 0) { // else 0, whatever the row holds
                const Pack<Stored> g = load_pack(of.gradient + at, left, of.aligned);
                const Pack<Stored> e = load_pack(of.embedding + at, left, of.aligned);
#pragma unroll
                for (int i = 0; i < SIZE; i++) {
                    const double gradient = load(g.of[i]), embedding = load(e.of[i]);
                    store(&dg.of[i], static_cast<R>(c * gradient * embedding * embedding));
                    store(&de.of[i], static_cast<R>(c * gradient * gradient * embedding));
                }
            }
            if (of.dgradient) store_pack(of.dgradient + at, dg, left, of.aligned);
            if (of.dembedding) store_pack(of.dembedding + at, de, left, of.aligned);
        }
    }
}

// Of the second backward.
template <int LANES, typename Stored>
__global__ void __launch_bounds__(THREADS, 1)
    write_second(Modalities<Stored> t, Rows rows, const double *__restrict__ factors,
                 const double *__restrict__ pulls) {
    constexpr int SIZE = Pack<Stored>::SIZE;
    using R = Real<Stored>;
    for (int64_t row = first_group<LANES>(); row < rows.B * t.count; row += group_count<LANES>()) {
        const int64_t b = row % rows.B, which = row / rows.B;
        const Modality<Stored> &of = t.of[which];
        const double c = factors[b * rows.M + t.first + which], k = pulls[b * rows.M + t.first + which];
        MMBAL_FOR_PACKS_OF_GROUP(column, of.d) {
            const int64_t at = b * of.stride + column, left = of.d - column;
            Pack<Stored> dg = {}, de = {};
            if (c != 0 || k != 0) {
                const Pack<Stored> g = load_pack(of.gradient + at, left, of.aligned);
                const Pack<Stored> e = load_pack(of.embedding + at, left, of.aligned);
                Pack<Stored> up_g = {}, up_e = {};
                if (of.ddgradient) up_g = load_pack(of.ddgradient + at, left, of.aligned);
                if (of.ddembedding) up_e = load_pack(of.ddembedding + at, left, of.aligned);
#pragma unroll
                for (int i = 0; i < SIZE; i++) {
                    const double gradient = load(g.of[i]), embedding = load(e.of[i]), alpha = gradient * embedding;
                    const double G = load(up_g.of[i]), E = load(up_e.of[i]);
                    const double to_g = c * (G * embedding + 2 * gradient * E) * embedding + k * alpha * embedding;
                    const double to_e = c * (2 * embedding * G + gradient * E) * gradient + k * alpha * gradient;
                    store(&dg.of[i], static_cast<R>(to_g));
                    store(&de.of[i], static_cast<R>(to_e));
                }
            }
            if (of.dgradient) store_pack(of.dgradient + at, dg, left, of.aligned);
            if (of.dembedding) store_pack(of.dembedding + at, de, left, of.aligned);
        }
    }
}

// The outputs and, where factors [B, M] are wanted, c for dreg.
template <typename R>
__global__ void __launch_bounds__(SAMPLE_THREADS, 1)
    find_shares(Samples t, const R *__restrict__ dreg, R *__restrict__ reg, R *__restrict__ shares,
                R *__restrict__ magnitudes, double *__restrict__ factors) {
    for (int64_t b = first_group<1>(); b < t.B; b += group_count<1>()) {
        const Sample sample(t, b);
        reg[b] = static_cast<R>(sample.regulariser());
        for (int64_t m = 0; m < t.M; m++) {
            shares[b * t.M + m] = static_cast<R>(sample.p(m));
            magnitudes[b * t.M + m] = static_cast<R>(sample.a(m));
        }
        if (!factors) continue;
        const Upstream<R> up = {dreg, nullptr, nullptr};
        const double along = dreg[b], mean = sample.mean_slope(up, along);
        for (int64_t m = 0; m < t.M; m++) factors[b * t.M + m] = sample.factor(up, along, mean, m);
    }
}

template <typename R>
__global__ void __launch_bounds__(SAMPLE_THREADS, 1)
    find_factors(Samples t, Upstream<R> up, double *__restrict__ factors) {
    for (int64_t b = first_group<1>(); b < t.B; b += group_count<1>()) {
        const Sample sample(t, b);
        const double along = up.reg[b], mean = sample.mean_slope(up, along);
        for (int64_t m = 0; m < t.M; m++) factors[b * t.M + m] = sample.factor(up, along, mean, m);
    }
}

// find_second of ops/cpu/attribution_sample.h. betas [B, M] become k.
template <typename R>
__global__ void __launch_bounds__(SAMPLE_THREADS, 1)
    find_second(Samples t, Upstream<R> up, double *__restrict__ factors, double *__restrict__ betas,
                R *__restrict__ ddreg, R *__restrict__ ddshares, R *__restrict__ ddmagnitudes) {
    const mmbal_attribution_penalty penalty = t.options.penalty;
    for (int64_t b = first_group<1>(); b < t.B; b += group_count<1>()) {
        const Sample sample(t, b);
        const double along = up.reg[b], mean = sample.mean_slope(up, along);
        double all = 0, slopes = 0, bends = 0, own = 0, pull = 0, pulls = 0;
        for (int64_t m = 0; m < t.M; m++) {
            const double scale = sample.root_scale(m), gamma = scale == 0 ? 0 : betas[b * t.M + m] / scale;
            const double p = sample.p(m), off = sample.off(m), y = sample.slope(up, along, m);
            const bool counts = sample.has(m);
            const double bend = counts ? along * penalty_curvature(penalty, off) : 0;
            all += gamma, slopes += gamma * (y - mean), bends += gamma * bend * p, own += bend * p * p;
            pull += counts ? gamma * penalty_slope(penalty, off) : 0;
            pulls += counts ? p * penalty_slope(penalty, off) : 0;
        }
        const double sum = sample.sum();
        ddreg[b] = static_cast<R>(sample.decided() ? (pull - all * pulls) / sum : 0);
        for (int64_t m = 0; m < t.M; m++) {
            const int64_t i = b * t.M + m;
            const double scale = sample.root_scale(m), gamma = scale == 0 ? 0 : betas[i] / scale;
            const double p = sample.p(m), c = sample.factor(up, along, mean, m);
            const double bend = sample.has(m) ? along * penalty_curvature(penalty, sample.off(m)) : 0;
            const double bent = gamma * bend - bends - all * (bend * p - own);
            const double slope = (bent - slopes - all * (sample.slope(up, along, m) - mean)) / (sum * sum);
            ddshares[i] = static_cast<R>(sample.decided() && sample.has(m) ? (gamma - p * all) / sum : 0);
            ddmagnitudes[i] = static_cast<R>(gamma);
            factors[i] = c;
            betas[i] = scale == 0 ? 0 : (slope - c * scale * gamma / sample.a(m)) / scale;
        }
    }
}

Samples samples_of(const mmbal_attribution &t, double *magnitudes) {
    Samples samples = {t.target, t.present, magnitudes, t.target_rows, t.B, t.M, t.options, {}};
    for (int64_t m = 0; m < t.M; m++) samples.widths[m] = t.modalities[m].d;
    return samples;
}

template <typename Stored>
void fill_modality(const mmbal_attributed &from, int64_t stride, Modality<Stored> *to) {
    to->gradient = static_cast<const Stored *>(from.gradient);
    to->embedding = static_cast<const Stored *>(from.embedding);
    to->ddgradient = static_cast<const Stored *>(from.ddgradient);
    to->ddembedding = static_cast<const Stored *>(from.ddembedding);
    to->dgradient = static_cast<Stored *>(from.dgradient);
    to->dembedding = static_cast<Stored *>(from.dembedding);
    to->d = from.d, to->stride = stride > 0 ? stride : from.d;
    to->aligned = true;
    const void *const data[] = {from.gradient,    from.embedding, from.ddgradient,
                                from.ddembedding, from.dgradient, from.dembedding};
    for (const void *rows : data) to->aligned &= rows_are_aligned(rows, to->stride, sizeof(Stored));
}

// Launches a kernel over all rows: by_warps or by_blocks, whichever suits the longest.
template <typename Stored, typename... Expected, typename... Given>
mmbal_status launch_rows(const mmbal_attribution &t, int64_t stride, mmbal_stream stream,
                         void (*by_warps)(Modalities<Stored>, Rows, Expected...),
                         void (*by_blocks)(Modalities<Stored>, Rows, Expected...), Given... given) {
    int64_t longest = 0;
    for (int64_t m = 0; m < t.M; m++) longest = t.modalities[m].d > longest ? t.modalities[m].d : longest;
    const bool is_long = longest > LONG_ROW;
    return in_tables<Modalities<Stored>>(
        t.M, [&](Modality<Stored> *to, int64_t m) { fill_modality(t.modalities[m], stride, to); },
        [&](const Modalities<Stored> &table) {
            const int64_t rows = t.B * table.count;
            return launch(stream, is_long ? rows : ceil_div(rows * WARP, THREADS), THREADS,
                          is_long ? THREADS / WARP * sizeof(double) : 0, is_long ? by_blocks : by_warps, table,
                          Rows{t.present, t.B, t.M}, given...);
        });
}

template <typename Stored>
mmbal_status run_magnitudes(const mmbal_attribution &t, int64_t stride, const void *given, double *magnitudes,
                            mmbal_stream stream) {
    return launch_rows<Stored>(t, stride, stream, find_magnitudes<WARP, Stored>, find_magnitudes<THREADS, Stored>,
                               t.options.pool == MMBAL_POOL_RMS, static_cast<const Real<Stored> *>(given), magnitudes);
}

// What is upstream, or NULL: the forward; and the outputs of each.
struct Arguments {
    const mmbal_attribution *attribution;
    const void *dreg, *dshares, *dmagnitudes, *magnitudes;
    void *to_reg, *to_shares, *to_magnitudes;
    double *scratch;
    mmbal_stream stream;
};

template <typename R>
Upstream<R> upstream_of(const Arguments &a) {
    return {static_cast<const R *>(a.dreg), static_cast<const R *>(a.dshares), static_cast<const R *>(a.dmagnitudes)};
}

int64_t sample_blocks(int64_t B) { return ceil_div(B, SAMPLE_THREADS); }

template <typename Stored>
mmbal_status run_forward(const Arguments &a) {
    using R = Real<Stored>;
    const mmbal_attribution &t = *a.attribution;
    MMBAL_RETURN_UNLESS_OK(run_magnitudes<Stored>(t, 0, nullptr, a.scratch, a.stream));
    return launch(a.stream, sample_blocks(t.B), SAMPLE_THREADS, 0, find_shares<R>, samples_of(t, a.scratch), nullptr,
                  static_cast<R *>(a.to_reg), static_cast<R *>(a.to_shares), static_cast<R *>(a.to_magnitudes),
                  nullptr);
}

template <typename Stored>
mmbal_status run_backward(const Arguments &a) {
    using R = Real<Stored>;
    const mmbal_attribution &t = *a.attribution;
    double *factors = a.scratch + t.B * t.M;
    MMBAL_RETURN_UNLESS_OK(run_magnitudes<Stored>(t, 0, a.magnitudes, a.scratch, a.stream));
    MMBAL_RETURN_UNLESS_OK(launch(a.stream, sample_blocks(t.B), SAMPLE_THREADS, 0, find_factors<R>,
                                  samples_of(t, a.scratch), upstream_of<R>(a), factors));
    return launch_rows<Stored>(t, 0, a.stream, write_gradients<WARP, Stored>, write_gradients<THREADS, Stored>,
                               factors);
}

template <typename Stored>
mmbal_status run_second(const Arguments &a) {
    using R = Real<Stored>;
    const mmbal_attribution &t = *a.attribution;
    double *factors = a.scratch + t.B * t.M, *betas = factors + t.B * t.M;
    MMBAL_RETURN_UNLESS_OK(run_magnitudes<Stored>(t, 0, a.magnitudes, a.scratch, a.stream));
    MMBAL_RETURN_UNLESS_OK(
        launch_rows<Stored>(t, 0, a.stream, find_betas<WARP, Stored>, find_betas<THREADS, Stored>, betas));
    MMBAL_RETURN_UNLESS_OK(launch(
        a.stream, sample_blocks(t.B), SAMPLE_THREADS, 0, find_second<R>, samples_of(t, a.scratch), upstream_of<R>(a),
        factors, betas, static_cast<R *>(a.to_reg), static_cast<R *>(a.to_shares), static_cast<R *>(a.to_magnitudes)));
    return launch_rows<Stored>(t, 0, a.stream, write_second<WARP, Stored>, write_second<THREADS, Stored>, factors,
                               betas);
}

template <typename R>
mmbal_status run_in_place(const Arguments &a, int64_t stride) {
    const mmbal_attribution &t = *a.attribution;
    double *factors = a.scratch + t.B * t.M;
    MMBAL_RETURN_UNLESS_OK(run_magnitudes<R>(t, stride, nullptr, a.scratch, a.stream));
    MMBAL_RETURN_UNLESS_OK(launch(a.stream, sample_blocks(t.B), SAMPLE_THREADS, 0, find_shares<R>,
                                  samples_of(t, a.scratch), static_cast<const R *>(a.dreg), static_cast<R *>(a.to_reg),
                                  static_cast<R *>(a.to_shares), static_cast<R *>(a.to_magnitudes), factors));
    return launch_rows<R>(t, stride, a.stream, write_gradients<WARP, R>, write_gradients<THREADS, R>, factors);
}

} // namespace

mmbal_status regularise_in_place(const mmbal_attribution &real, int64_t stride, const void *dreg, void *reg,
                                 void *shares, void *magnitudes, double *scratch, mmbal_stream stream) {
    const Arguments a = {&real, dreg, nullptr, nullptr, nullptr, reg, shares, magnitudes, scratch, stream};
    return real.dtype == MMBAL_F64 ? run_in_place<double>(a, stride) : run_in_place<float>(a, stride);
}

} // namespace mmbal

using namespace mmbal;

int64_t mmbal_attribution_reg_workspace_cuda(int64_t B, int64_t M) {
    return 3 * static_cast<int64_t>(sizeof(double)) * B * M;
}

mmbal_status mmbal_attribution_reg_cuda(const mmbal_attribution *attribution, void *reg, void *shares, void *magnitudes,
                                        void *workspace, mmbal_stream stream) {
    if (!attribution_is_served(*attribution)) return MMBAL_INVALID_ARGUMENT;
    const Arguments a = {
        attribution, nullptr, nullptr, nullptr, nullptr, reg, shares, magnitudes, static_cast<double *>(workspace),
        stream};
    MMBAL_RETURN_FOR_DTYPE(attribution->dtype, run_forward, a);
}

mmbal_status mmbal_attribution_reg_backward_cuda(const mmbal_attribution *attribution, const void *dreg,
                                                 const void *dshares, const void *dmagnitudes, const void *magnitudes,
                                                 void *workspace, mmbal_stream stream) {
    if (!attribution_is_served(*attribution)) return MMBAL_INVALID_ARGUMENT;
    const Arguments a = {attribution, dreg,       dshares,
                         dmagnitudes, magnitudes, nullptr,
                         nullptr,     nullptr,    static_cast<double *>(workspace),
                         stream};
    MMBAL_RETURN_FOR_DTYPE(attribution->dtype, run_backward, a);
}

mmbal_status mmbal_attribution_reg_backward_backward_cuda(const mmbal_attribution *attribution, const void *dreg,
                                                          const void *dshares, const void *dmagnitudes,
                                                          const void *magnitudes, void *ddreg, void *ddshares,
                                                          void *ddmagnitudes, void *workspace, mmbal_stream stream) {
    if (!attribution_is_served(*attribution)) return MMBAL_INVALID_ARGUMENT;
    const Arguments a = {attribution, dreg,         dshares,
                         dmagnitudes, magnitudes,   ddreg,
                         ddshares,    ddmagnitudes, static_cast<double *>(workspace),
                         stream};
    MMBAL_RETURN_FOR_DTYPE(attribution->dtype, run_second, a);
}
