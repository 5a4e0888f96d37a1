#include "mmbal/cuda/btw.h"

#include <math.h>

#include "packs.cuh"

namespace mmbal {
namespace {

constexpr int THREADS = 256;
constexpr int64_t MOST_PARTS = 4096;

// Names as in ops/cpu/btw_body.h. modality[m] is v[m] / max v, or its logarithm (agree).
template <typename Stored>
struct Weights {
    const Stored *kl;
    const uint8_t *present;
    const Real<Stored> *modality; // [M]
    int64_t N, M;
    Real<Stored> floor, ceiling, inverse_temperature;
    bool agree, mean_one;

    // NaN where a modality does not count
    __device__ Real<Stored> divergence(int64_t i) const {
        return present && !present[i] ? static_cast<Real<Stored>>(NAN) : load(kl[i]);
    }
    // What the weight is proportional to; agree: its logarithm.
    __device__ Real<Stored> term(Real<Stored> divergence, int64_t m) const {
        using R = Real<Stored>;
        const R below = divergence < ceiling ? divergence : ceiling;
        if (agree) {
            const R level = modality[m] - (below > -ceiling ? below : -ceiling) * inverse_temperature;
            return divergence == divergence ? level : -static_cast<R>(INFINITY);
        }
        return divergence == divergence ? (below > floor ? below : floor) * modality[m] : 0;
    }
};

// Of a row: the largest term (agree), 1 / the sum of terms, and what mean_one multiplies by.
template <typename R>
struct RowTotals {
    R top, inverse, scale;
};

template <typename Stored>
__device__ __forceinline__ RowTotals<Real<Stored>> totals_of(const Weights<Stored> &c, int64_t n) {
    using R = Real<Stored>;
    R top = -static_cast<R>(INFINITY), total = 0, counted = 0;
    for (int64_t m = 0; m < c.M; m++) {
        const R kl = c.divergence(n * c.M + m);
        counted += kl == kl ? 1 : 0;
        if (!c.agree) continue;
        const R level = c.term(kl, m);
        top = level > top ? level : top;
    }
    if (top == -static_cast<R>(INFINITY)) top = 0; // nothing counts: exp(-inf)
    if (c.agree) {
        for (int64_t m = 0; m < c.M; m++) total += exp_real(c.term(c.divergence(n * c.M + m), m) - top);
    } else {
        for (int64_t m = 0; m < c.M; m += 2) { // by pairs, as the CPU does
            R pair = c.term(c.divergence(n * c.M + m), m);
            if (m + 1 < c.M) pair += c.term(c.divergence(n * c.M + m + 1), m + 1);
            total += pair;
        }
    }
    return {top, total > 0 ? 1 / total : 0, c.mean_one ? counted : 1};
}

// Before mean_one.
template <typename Stored>
__device__ __forceinline__ Real<Stored> weight_of(const Weights<Stored> &c, const RowTotals<Real<Stored>> &row,
                                                  Real<Stored> divergence, int64_t m) {
    const Real<Stored> term = c.term(divergence, m);
    return (c.agree ? exp_real(term - row.top) : term) * row.inverse;
}

// modality [M] from mi. One block; M is at most its threads.
template <typename R>
__global__ void __launch_bounds__(MMBAL_MAX_MODALITIES, 1)
    weigh_modalities(const double *__restrict__ mi, int64_t M, double floor, bool agree, R *__restrict__ modality) {
    const int64_t m = threadIdx.x;
    if (m >= M) return;
    double largest = floor; // only the ratios of v matter, and these products stay in range
    for (int64_t j = 0; j < M; j++) largest = mi[j] > largest ? mi[j] : largest;
    if (!isfinite(mi[m])) __trap();
    const double v = (mi[m] > floor ? mi[m] : floor) / largest;
    modality[m] = static_cast<R>(agree ? log(v) : v);
}

template <typename Stored>
__global__ void __launch_bounds__(THREADS, 1) weigh(Weights<Stored> c, Real<Stored> *__restrict__ weights) {
    for (int64_t n = first_group<1>(); n < c.N; n += group_count<1>()) {
        const RowTotals<Real<Stored>> row = totals_of(c, n);
        for (int64_t m = 0; m < c.M; m++)
            weights[n * c.M + m] = weight_of(c, row, c.divergence(n * c.M + m), m) * row.scale;
    }
}

// A thread takes a row, a warp a part of the rows: parts [M, count] are its sums of the slopes.
template <typename Stored>
__global__ void __launch_bounds__(THREADS, 1)
    weigh_backward(const Real<Stored> *__restrict__ dweights, Weights<Stored> c, int64_t count, int64_t rows_of_part,
                   Stored *__restrict__ dkl, double *__restrict__ parts) {
    using R = Real<Stored>;
    const int lane = threadIdx.x % WARP;
    for (int64_t part = first_group<WARP>(); part < count; part += group_count<WARP>()) {
        for (int64_t step = 0; step < rows_of_part; step += WARP) {
            const int64_t n = part * rows_of_part + step + lane;
            const bool mine = n < c.N;
            RowTotals<R> row = {};
            R mean = 0;
            if (mine) row = totals_of(c, n);
            for (int64_t m = 0; m < c.M && mine; m++) {
                const R weight = weight_of(c, row, c.divergence(n * c.M + m), m);
                mean += weight == 0 ? 0 : weight * dweights[n * c.M + m];
            }
            for (int64_t m = 0; m < c.M; m++) {
                R slope = 0;
                if (mine) {
                    const int64_t i = n * c.M + m;
                    const R kl = c.divergence(i), weight = weight_of(c, row, kl, m);
                    slope = weight == 0 ? 0 : row.scale * weight * (dweights[i] - mean);
                    const bool moves = kl < c.ceiling && (c.agree || kl > c.floor) && weight != 0;
                    const R of_kl = c.agree ? -slope * c.inverse_temperature : slope / kl;
                    if (dkl) store(&dkl[i], moves ? of_kl : 0);
                }
                if (!parts) continue; // the same for all lanes
                const double sum = sum_over_lanes<WARP>(static_cast<double>(slope));
                if (lane == 0) parts[m * count + part] = step == 0 ? sum : parts[m * count + part] + sum;
            }
        }
    }
}

// A warp takes a modality.
__global__ void __launch_bounds__(THREADS, 1)
    finish_dmi(const double *__restrict__ parts, int64_t count, const double *__restrict__ mi, int64_t M, double floor,
               double *__restrict__ dmi) {
    const int lane = threadIdx.x % WARP;
    for (int64_t m = first_group<WARP>(); m < M; m += group_count<WARP>()) {
        double sum = 0;
        for (int64_t part = lane; part < count; part += WARP) sum += parts[m * count + part];
        sum = sum_over_lanes<WARP>(sum);
        if (lane == 0) dmi[m] = mi[m] > floor ? sum / mi[m] : 0;
    }
}

// Fails where an index is outside the table or named before.
__global__ void __launch_bounds__(THREADS, 1)
    claim_rows(const int64_t *__restrict__ index, int64_t N, int64_t S, int *named) {
    for (int64_t n = first_group<1>(); n < N; n += group_count<1>()) {
        require_index(index[n], S);
        if (atomicExch(&named[index[n]], 1) != 0) __trap();
    }
}

template <typename R>
__global__ void __launch_bounds__(THREADS, 1)
    average_rows(R *__restrict__ table, const int64_t *__restrict__ index, const R *__restrict__ weights, int64_t N,
                 int64_t M, R alpha, R rest) {
    for (int64_t i = first_group<1>(); i < N * M; i += group_count<1>()) {
        R *element = table + index[i / M] * M + i % M;
        *element = alpha * weights[i] + rest * *element;
    }
}

template <typename Stored>
__global__ void __launch_bounds__(THREADS, 1)
    scale_rows(const Stored *__restrict__ h, const Real<Stored> *__restrict__ weights, int64_t m, int64_t N, int64_t M,
               int64_t d, bool aligned, Stored *__restrict__ scaled) {
    constexpr int SIZE = Pack<Stored>::SIZE;
    for (int64_t n = first_group<WARP>(); n < N; n += group_count<WARP>()) {
        const Real<Stored> weight = weights[n * M + m];
        MMBAL_FOR_PACKS(column, d) {
            Pack<Stored> pack = load_pack(h + n * d + column, d - column, aligned);
#pragma unroll
            for (int i = 0; i < SIZE; i++) // a weight of 0 gives 0 whatever h holds
                store(&pack.of[i], weight == 0 ? 0 : weight * load(pack.of[i]));
            store_pack(scaled + n * d + column, pack, d - column, aligned);
        }
    }
}

template <typename Stored>
__global__ void __launch_bounds__(THREADS, 1)
    dot_rows(const Stored *__restrict__ dscaled, const Stored *__restrict__ h, int64_t m, int64_t N, int64_t M,
             int64_t d, bool aligned, Real<Stored> *__restrict__ dweights) {
    constexpr int SIZE = Pack<Stored>::SIZE;
    for (int64_t n = first_group<WARP>(); n < N; n += group_count<WARP>()) {
        Real<Stored> sum = 0;
        MMBAL_FOR_PACKS(column, d) {
            const Pack<Stored> a = load_pack(dscaled + n * d + column, d - column, aligned);
            const Pack<Stored> b = load_pack(h + n * d + column, d - column, aligned);
#pragma unroll
            for (int i = 0; i < SIZE; i++) sum += load(a.of[i]) * load(b.of[i]);
        }
        sum = sum_over_lanes<WARP>(sum);
        if (threadIdx.x % WARP == 0) dweights[n * M + m] = sum;
    }
}

bool weights_are_served(int64_t N, int64_t M, const mmbal_btw_options &o) {
    const bool known = o.mode == MMBAL_BTW_DIVERGE || o.mode == MMBAL_BTW_AGREE;
    return N >= 0 && M >= 1 && M <= MMBAL_MAX_MODALITIES && known && o.floor >= MMBAL_BTW_LEAST &&
           o.ceiling >= o.floor && o.ceiling <= MMBAL_BTW_MOST && o.temperature >= MMBAL_BTW_LEAST &&
           o.temperature <= MMBAL_BTW_MOST;
}

int64_t rows_of_part(int64_t N) { return WARP * ceil_div(ceil_div(N, WARP), MOST_PARTS); }
int64_t count_parts(int64_t N) { return N > 0 ? ceil_div(N, rows_of_part(N)) : 0; }

struct WeightArguments {
    const void *dweights, *kl;
    const double *mi;
    const uint8_t *present;
    int64_t N, M;
    mmbal_btw_options options;
    void *weights, *dkl;
    double *dmi;
    bool backward;
    void *workspace;
    mmbal_stream stream;
};

// workspace: parts [M, count] in float64, then modality [M]
template <typename Stored>
mmbal_status run_weights(const WeightArguments &a) {
    using R = Real<Stored>;
    const int64_t count = count_parts(a.N);
    double *parts = static_cast<double *>(a.workspace);
    R *modality = reinterpret_cast<R *>(parts + a.M * count);
    const bool agree = a.options.mode == MMBAL_BTW_AGREE;
    const Weights<Stored> c = {static_cast<const Stored *>(a.kl),
                               a.present,
                               modality,
                               a.N,
                               a.M,
                               static_cast<R>(a.options.floor),
                               static_cast<R>(a.options.ceiling),
                               static_cast<R>(1 / a.options.temperature),
                               agree,
                               a.options.mean_one != 0};
    MMBAL_RETURN_UNLESS_OK(
        launch(a.stream, 1, MMBAL_MAX_MODALITIES, 0, weigh_modalities<R>, a.mi, a.M, a.options.floor, agree, modality));
    if (!a.backward)
        return launch(a.stream, ceil_div(a.N, THREADS), THREADS, 0, weigh<Stored>, c, static_cast<R *>(a.weights));
    MMBAL_RETURN_UNLESS_OK(launch(a.stream, ceil_div(count * WARP, THREADS), THREADS, 0, weigh_backward<Stored>,
                                  static_cast<const R *>(a.dweights), c, count, count > 0 ? rows_of_part(a.N) : 0,
                                  static_cast<Stored *>(a.dkl), a.dmi ? parts : nullptr));
    if (!a.dmi) return MMBAL_OK;
    return launch(a.stream, ceil_div(a.M * WARP, THREADS), THREADS, 0, finish_dmi, parts, count, a.mi, a.M,
                  a.options.floor, a.dmi);
}

bool column_is_served(int64_t m, int64_t N, int64_t M, int64_t d) {
    return N >= 0 && d >= 0 && m >= 0 && m < M && M <= MMBAL_MAX_MODALITIES;
}

template <typename Stored>
mmbal_status run_scale(const void *h, const void *weights, int64_t m, int64_t N, int64_t M, int64_t d, void *scaled,
                       mmbal_stream stream) {
    const bool aligned = rows_are_aligned(h, d, sizeof(Stored)) && rows_are_aligned(scaled, d, sizeof(Stored));
    return launch(stream, ceil_div(N * WARP, THREADS), THREADS, 0, scale_rows<Stored>, static_cast<const Stored *>(h),
                  static_cast<const Real<Stored> *>(weights), m, N, M, d, aligned, static_cast<Stored *>(scaled));
}

template <typename Stored>
mmbal_status run_dot(const void *dscaled, const void *h, int64_t m, int64_t N, int64_t M, int64_t d, void *dweights,
                     mmbal_stream stream) {
    const bool aligned = rows_are_aligned(h, d, sizeof(Stored)) && rows_are_aligned(dscaled, d, sizeof(Stored));
    return launch(stream, ceil_div(N * WARP, THREADS), THREADS, 0, dot_rows<Stored>,
                  static_cast<const Stored *>(dscaled), static_cast<const Stored *>(h), m, N, M, d, aligned,
                  static_cast<Real<Stored> *>(dweights));
}

template <typename R>
mmbal_status run_average(void *table, const int64_t *index, const void *weights, int64_t N, int64_t M, double alpha,
                         mmbal_stream stream) {
    return launch(stream, ceil_div(N * M, THREADS), THREADS, 0, average_rows<R>, static_cast<R *>(table), index,
                  static_cast<const R *>(weights), N, M, static_cast<R>(alpha), static_cast<R>(1 - alpha));
}

} // namespace
} // namespace mmbal

using namespace mmbal;

int64_t mmbal_btw_weights_workspace_cuda(int64_t N, int64_t M) {
    return static_cast<int64_t>(sizeof(double)) * M * (count_parts(N) + 1);
}

mmbal_status mmbal_btw_weights_cuda(mmbal_dtype dtype, const void *kl, const double *mi, const uint8_t *present,
                                    int64_t N, int64_t M, mmbal_btw_options options, void *weights, void *workspace,
                                    mmbal_stream stream) {
    if (!weights_are_served(N, M, options)) return MMBAL_INVALID_ARGUMENT;
    const WeightArguments a = {nullptr, kl,      mi,      present, N,         M,     options,
                               weights, nullptr, nullptr, false,   workspace, stream};
    MMBAL_RETURN_FOR_DTYPE(dtype, run_weights, a);
}

mmbal_status mmbal_btw_weights_backward_cuda(mmbal_dtype dtype, const void *dweights, const void *kl, const double *mi,
                                             const uint8_t *present, int64_t N, int64_t M, mmbal_btw_options options,
                                             void *dkl, double *dmi, void *workspace, mmbal_stream stream) {
    if (!weights_are_served(N, M, options)) return MMBAL_INVALID_ARGUMENT;
    const WeightArguments a = {dweights, kl, mi, present, N, M, options, nullptr, dkl, dmi, true, workspace, stream};
    MMBAL_RETURN_FOR_DTYPE(dtype, run_weights, a);
}

int64_t mmbal_ema_rows_workspace_cuda(int64_t S) { return static_cast<int64_t>(sizeof(int)) * S; }

mmbal_status mmbal_ema_rows_cuda(mmbal_dtype dtype, void *table, const int64_t *index, const void *weights, int64_t S,
                                 int64_t N, int64_t M, double alpha, void *workspace, mmbal_stream stream) {
    if (S < 0 || N < 0 || M < 1 || !(alpha >= 0 && alpha <= 1)) return MMBAL_INVALID_ARGUMENT;
    if (dtype != MMBAL_F32 && dtype != MMBAL_F64) return MMBAL_UNSUPPORTED;
    if (N == 0) return MMBAL_OK;
    int *named = static_cast<int *>(workspace);
    if (S > 0 && cudaMemsetAsync(named, 0, sizeof(int) * S, static_cast<cudaStream_t>(stream)) != cudaSuccess)
        return MMBAL_DEVICE_ERROR;
    MMBAL_RETURN_UNLESS_OK(launch(stream, ceil_div(N, THREADS), THREADS, 0, claim_rows, index, N, S, named));
    return (dtype == MMBAL_F64 ? run_average<double> : run_average<float>)(table, index, weights, N, M, alpha, stream);
}

mmbal_status mmbal_scale_modality_cuda(mmbal_dtype dtype, const void *h, const void *weights, int64_t m, int64_t N,
                                       int64_t M, int64_t d, void *scaled, mmbal_stream stream) {
    if (!column_is_served(m, N, M, d)) return MMBAL_INVALID_ARGUMENT;
    MMBAL_RETURN_FOR_DTYPE(dtype, run_scale, h, weights, m, N, M, d, scaled, stream);
}

mmbal_status mmbal_scale_modality_dweights_cuda(mmbal_dtype dtype, const void *dscaled, const void *h, int64_t m,
                                                int64_t N, int64_t M, int64_t d, void *dweights, mmbal_stream stream) {
    if (!column_is_served(m, N, M, d)) return MMBAL_INVALID_ARGUMENT;
    MMBAL_RETURN_FOR_DTYPE(dtype, run_dot, dscaled, h, m, N, M, d, dweights, stream);
}
