#include <math.h>

#include "mmbal/cuda/divergence.h"
#include "softmax.cuh"

namespace mmbal {
namespace {

constexpr int THREADS = 256;

__device__ __forceinline__ float expm1_real(float x) { return expm1f(x); }
__device__ __forceinline__ double expm1_real(double x) { return expm1(x); }

// exp(x) - 1 - x without cancellation: near 0 by its series, orders 2 to the one whose next term is below the rounding.
template <typename R>
__device__ __forceinline__ R exp_beyond_linear(R x) {
    constexpr int ORDER = sizeof(R) == 8 ? 14 : 9;
    if (!(x > static_cast<R>(-0.35) && x < static_cast<R>(0.35))) return expm1_real(x) - x;
    R series = 0;
#pragma unroll
    for (int order = ORDER; order >= 2; order--) series = (series * x + 1) * (1 / static_cast<R>(order));
    return series * x * x;
}

// Normal distributions; formulas and names as in ops/cpu/divergence_normal_body.h. With a target the standard
// deviations are residuals.
template <typename Stored>
struct Normals {
    const Stored *mu, *log_sigma, *fused_mu, *fused_log_sigma, *target;
    int64_t N, M;
    Real<Stored> sigma_min;
};

// A residual as a standard deviation; NaN stays.
template <typename R>
__device__ __forceinline__ R bounded(R residual, R sigma_min) {
    const R size = residual < 0 ? -residual : residual;
    return size <= sigma_min ? sigma_min : size;
}

template <typename R>
__device__ __forceinline__ R bounded_slope(R residual, R sigma_min) {
    return residual > sigma_min ? 1 : residual < -sigma_min ? -1 : 0;
}

// 1 / s_q
template <typename Stored>
__device__ __forceinline__ Real<Stored> inverse_of_fused(const Normals<Stored> &c, int64_t n) {
    if (c.target) return 1 / bounded(load(c.target[n]) - load(c.fused_mu[n]), c.sigma_min);
    return exp_real(-load(c.fused_log_sigma[n]));
}

template <typename Stored>
__global__ void __launch_bounds__(THREADS, 1) normal_kl(Normals<Stored> c, Real<Stored> *__restrict__ kl) {
    using R = Real<Stored>;
    constexpr R HALF = static_cast<R>(0.5);
    for (int64_t i = first_group<1>(); i < c.N * c.M; i += group_count<1>()) {
        const int64_t n = i / c.M;
        const R mu = load(c.mu[i]), inverse = inverse_of_fused(c, n);
        R spread;
        if (c.target) {
            const R ratio = bounded(load(c.target[n]) - mu, c.sigma_min) * inverse;
            spread = ratio < static_cast<R>(INFINITY) ? HALF * (ratio - 1) * (ratio + 1) - log_real(ratio) : ratio;
        } else {
            spread = HALF * exp_beyond_linear(2 * (load(c.log_sigma[i]) - load(c.fused_log_sigma[n])));
        }
        const R scaled = (mu - load(c.fused_mu[n])) * inverse, sum = spread + HALF * scaled * scaled;
        kl[i] = sum < 0 ? 0 : sum;
    }
}

// A thread takes a row: its sums over modalities are those of the CPU.
template <typename Stored>
__global__ void __launch_bounds__(THREADS, 1)
    normal_kl_backward(const Real<Stored> *__restrict__ dkl, Normals<Stored> c, Stored *__restrict__ dmu,
                       Stored *__restrict__ dlog_sigma, Stored *__restrict__ dfused_mu,
                       Stored *__restrict__ dfused_log_sigma) {
    using R = Real<Stored>;
    for (int64_t n = first_group<1>(); n < c.N; n += group_count<1>()) {
        const R inverse = inverse_of_fused(c, n), fused_mu = load(c.fused_mu[n]);
        R along_sum = 0, width_sum = 0;
        for (int64_t i = n * c.M; i < (n + 1) * c.M; i++) {
            const R slope = dkl[i], mu = load(c.mu[i]), scaled = (mu - fused_mu) * inverse;
            R excess, turned = 0;
            if (c.target) {
                const R residual = load(c.target[n]) - mu, sigma = bounded(residual, c.sigma_min);
                const R ratio = sigma * inverse;
                excess = (ratio - 1) * (ratio + 1);
                turned = slope * excess / sigma * bounded_slope(residual, c.sigma_min);
            } else {
                const R log_ratio = 2 * (load(c.log_sigma[i]) - load(c.fused_log_sigma[n]));
                excess = exp_beyond_linear(log_ratio) + log_ratio;
            }
            // No gradient passes an entry without one, whatever it holds: a missing modality may hold NaN.
            const bool passes = slope != 0;
            const R along = passes ? slope * scaled * inverse : 0, width = passes ? slope * excess : 0;
            along_sum += along;
            width_sum += passes ? width + slope * scaled * scaled : 0;
            if (dmu) store(&dmu[i], passes ? along - turned : 0);
            if (dlog_sigma) store(&dlog_sigma[i], width);
        }
        if (dfused_mu) {
            const R turned =
                c.target ? width_sum * inverse * bounded_slope(load(c.target[n]) - fused_mu, c.sigma_min) : 0;
            store(&dfused_mu[n], turned - along_sum);
        }
        if (dfused_log_sigma) store(&dfused_log_sigma[n], -width_sum);
    }
}

// What a gradient needs of entry (n, m) beside its logits.
template <typename R>
struct Entry {
    R top, inverse, fused_top, fused_inverse, log_ratio, kl;
};

template <typename Stored>
struct Categoricals {
    const Stored *logits, *fused_logits; // [M, N, C], [N, C]
    int64_t M, N, C;
    bool reverse;
};

// Writes kl, or the entries where a gradient is wanted.
template <int LANES, typename Stored>
__global__ void __launch_bounds__(THREADS, 1)
    categorical_kl(Categoricals<Stored> c, Real<Stored> *__restrict__ kl, Entry<Real<Stored>> *__restrict__ entries) {
    using R = Real<Stored>;
    const int lane = threadIdx.x % LANES;
    for (int64_t i = first_group<LANES>(); i < c.N * c.M; i += group_count<LANES>()) {
        const int64_t n = i / c.M, m = i % c.M;
        const Stored *logits = c.logits + (m * c.N + n) * c.C, *fused = c.fused_logits + n * c.C;
        R top, fused_top, terms = 0;
        const R total = softmax_total<LANES>(logits, c.C, lane, &top);
        const R fused_total = softmax_total<LANES>(fused, c.C, lane, &fused_top);
        for (int64_t k = lane; k < c.C; k += LANES) {
            const R x = load(logits[k]) - top, fused_x = load(fused[k]) - fused_top;
            const R first = c.reverse ? fused_x : x, second = c.reverse ? x : fused_x;
            terms += first < least_exponent<R>() ? 0 : exp_real(first) * (first - second);
        }
        terms = sum_over_lanes<LANES>(terms);
        const R log_ratio = log_real(total / fused_total);
        const R sum = c.reverse ? terms / fused_total + log_ratio : terms / total - log_ratio;
        const R value = sum < 0 ? 0 : sum;
        if (lane > 0) continue;
        if (kl) kl[i] = value;
        if (entries) entries[i] = {top, 1 / total, fused_top, 1 / fused_total, log_ratio, value};
    }
}

// A thread takes a class of a row: the sum over modalities is that of the CPU.
template <typename Stored>
__global__ void __launch_bounds__(THREADS, 1)
    categorical_kl_backward(const Real<Stored> *__restrict__ dkl, Categoricals<Stored> c,
                            const Entry<Real<Stored>> *__restrict__ entries, Stored *__restrict__ dlogits,
                            Stored *__restrict__ dfused) {
    using R = Real<Stored>;
    for (int64_t i = first_group<1>(); i < c.N * c.C; i += group_count<1>()) {
        const int64_t n = i / c.C;
        const R fused = load(c.fused_logits[i]);
        R fused_sum = 0;
        for (int64_t m = 0; m < c.M; m++) {
            const Entry<R> entry = entries[n * c.M + m];
            const R g = dkl[n * c.M + m], x = load(c.logits[m * c.N * c.C + i]) - entry.top;
            const R fused_x = fused - entry.fused_top, log_odds = x - fused_x - entry.log_ratio;
            const R p = exp_nonpositive(x) * entry.inverse, q = exp_nonpositive(fused_x) * entry.fused_inverse;
            const bool lacks = (c.reverse ? fused_x : x) < least_exponent<R>();
            const bool is_number = entry.kl == entry.kl; // of a row that is none, no gradient is
            const R share = c.reverse ? q : p, ahead = c.reverse ? -log_odds : log_odds;
            const R to_first = lacks && is_number ? 0 : g * share * (ahead - entry.kl);
            const R to_second = g * (c.reverse ? p - q : q - p);
            // g = 0 whatever the row holds: a missing modality may hold NaN
            fused_sum += g == 0 ? 0 : c.reverse ? to_first : to_second;
            if (dlogits) store(&dlogits[m * c.N * c.C + i], g == 0 ? 0 : c.reverse ? to_second : to_first);
        }
        if (dfused) store(&dfused[i], fused_sum);
    }
}

bool sizes_are_served(int64_t N, int64_t M) { return N >= 0 && M >= 1 && M <= MMBAL_MAX_MODALITIES; }
bool sigma_is_served(double sigma_min) { return sigma_min >= MMBAL_LEAST_SIGMA && sigma_min < INFINITY; }

struct NormalArguments {
    const void *dkl, *mu, *log_sigma, *fused_mu, *fused_log_sigma, *target;
    int64_t N, M;
    double sigma_min;
    void *kl, *dmu, *dlog_sigma, *dfused_mu, *dfused_log_sigma;
    mmbal_stream stream;
};

template <typename Stored>
mmbal_status run_normals(const NormalArguments &a) {
    using R = Real<Stored>;
    const Normals<Stored> c = {static_cast<const Stored *>(a.mu),
                               static_cast<const Stored *>(a.log_sigma),
                               static_cast<const Stored *>(a.fused_mu),
                               static_cast<const Stored *>(a.fused_log_sigma),
                               static_cast<const Stored *>(a.target),
                               a.N,
                               a.M,
                               static_cast<R>(a.sigma_min)};
    if (!a.dkl)
        return launch(a.stream, ceil_div(a.N * a.M, THREADS), THREADS, 0, normal_kl<Stored>, c, static_cast<R *>(a.kl));
    return launch(a.stream, ceil_div(a.N, THREADS), THREADS, 0, normal_kl_backward<Stored>,
                  static_cast<const R *>(a.dkl), c, static_cast<Stored *>(a.dmu), static_cast<Stored *>(a.dlog_sigma),
                  static_cast<Stored *>(a.dfused_mu), static_cast<Stored *>(a.dfused_log_sigma));
}

template <typename Stored>
mmbal_status run_categorical(const Categoricals<Stored> &c, Real<Stored> *kl, Entry<Real<Stored>> *entries,
                             mmbal_stream stream) {
    const bool few = c.C <= FEW_EXPERTS;
    return launch(stream, ceil_div(c.N * c.M * (few ? 1 : WARP), THREADS), THREADS, 0,
                  few ? categorical_kl<1, Stored> : categorical_kl<WARP, Stored>, c, kl, entries);
}

template <typename Stored>
mmbal_status run_categorical_value(const void *logits, const void *fused_logits, int64_t M, int64_t N, int64_t C,
                                   int reverse, void *kl, mmbal_stream stream) {
    const Categoricals<Stored> c = {
        static_cast<const Stored *>(logits), static_cast<const Stored *>(fused_logits), M, N, C, reverse != 0};
    return run_categorical<Stored>(c, static_cast<Real<Stored> *>(kl), nullptr, stream);
}

template <typename Stored>
mmbal_status run_categorical_backward(const void *dkl, const void *logits, const void *fused_logits, int64_t M,
                                      int64_t N, int64_t C, int reverse, void *dlogits, void *dfused, void *workspace,
                                      mmbal_stream stream) {
    using R = Real<Stored>;
    const Categoricals<Stored> c = {
        static_cast<const Stored *>(logits), static_cast<const Stored *>(fused_logits), M, N, C, reverse != 0};
    Entry<R> *entries = static_cast<Entry<R> *>(workspace);
    MMBAL_RETURN_UNLESS_OK(run_categorical<Stored>(c, nullptr, entries, stream));
    return launch(stream, ceil_div(N * C, THREADS), THREADS, 0, categorical_kl_backward<Stored>,
                  static_cast<const R *>(dkl), c, entries, static_cast<Stored *>(dlogits),
                  static_cast<Stored *>(dfused));
}

} // namespace
} // namespace mmbal

using namespace mmbal;

mmbal_status mmbal_gaussian_kl_cuda(mmbal_dtype dtype, const void *mu, const void *log_sigma, const void *fused_mu,
                                    const void *fused_log_sigma, int64_t N, int64_t M, void *kl, mmbal_stream stream) {
    if (!sizes_are_served(N, M)) return MMBAL_INVALID_ARGUMENT;
    NormalArguments a = {};
    a.mu = mu, a.log_sigma = log_sigma, a.fused_mu = fused_mu, a.fused_log_sigma = fused_log_sigma;
    a.N = N, a.M = M, a.kl = kl, a.stream = stream;
    MMBAL_RETURN_FOR_DTYPE(dtype, run_normals, a);
}

mmbal_status mmbal_gaussian_kl_backward_cuda(mmbal_dtype dtype, const void *dkl, const void *mu, const void *log_sigma,
                                             const void *fused_mu, const void *fused_log_sigma, int64_t N, int64_t M,
                                             void *dmu, void *dlog_sigma, void *dfused_mu, void *dfused_log_sigma,
                                             mmbal_stream stream) {
    if (!sizes_are_served(N, M)) return MMBAL_INVALID_ARGUMENT;
    NormalArguments a = {};
    a.dkl = dkl, a.mu = mu, a.log_sigma = log_sigma, a.fused_mu = fused_mu, a.fused_log_sigma = fused_log_sigma;
    a.N = N, a.M = M, a.dmu = dmu, a.dlog_sigma = dlog_sigma, a.dfused_mu = dfused_mu;
    a.dfused_log_sigma = dfused_log_sigma, a.stream = stream;
    MMBAL_RETURN_FOR_DTYPE(dtype, run_normals, a);
}

mmbal_status mmbal_residual_kl_cuda(mmbal_dtype dtype, const void *mu, const void *fused_mu, const void *target,
                                    int64_t N, int64_t M, double sigma_min, void *kl, mmbal_stream stream) {
    if (!sizes_are_served(N, M) || !sigma_is_served(sigma_min)) return MMBAL_INVALID_ARGUMENT;
    NormalArguments a = {};
    a.mu = mu, a.fused_mu = fused_mu, a.target = target, a.N = N, a.M = M, a.sigma_min = sigma_min;
    a.kl = kl, a.stream = stream;
    MMBAL_RETURN_FOR_DTYPE(dtype, run_normals, a);
}

mmbal_status mmbal_residual_kl_backward_cuda(mmbal_dtype dtype, const void *dkl, const void *mu, const void *fused_mu,
                                             const void *target, int64_t N, int64_t M, double sigma_min, void *dmu,
                                             void *dfused_mu, mmbal_stream stream) {
    if (!sizes_are_served(N, M) || !sigma_is_served(sigma_min)) return MMBAL_INVALID_ARGUMENT;
    NormalArguments a = {};
    a.dkl = dkl, a.mu = mu, a.fused_mu = fused_mu, a.target = target, a.N = N, a.M = M, a.sigma_min = sigma_min;
    a.dmu = dmu, a.dfused_mu = dfused_mu, a.stream = stream;
    MMBAL_RETURN_FOR_DTYPE(dtype, run_normals, a);
}

int64_t mmbal_categorical_kl_workspace_cuda(mmbal_dtype dtype, int64_t M, int64_t N) {
    return static_cast<int64_t>(dtype == MMBAL_F64 ? sizeof(Entry<double>) : sizeof(Entry<float>)) * M * N;
}

mmbal_status mmbal_categorical_kl_cuda(mmbal_dtype dtype, const void *logits, const void *fused_logits, int64_t M,
                                       int64_t N, int64_t C, int reverse, void *kl, mmbal_stream stream) {
    if (!sizes_are_served(N, M) || C < 1) return MMBAL_INVALID_ARGUMENT;
    MMBAL_RETURN_FOR_DTYPE(dtype, run_categorical_value, logits, fused_logits, M, N, C, reverse, kl, stream);
}

mmbal_status mmbal_categorical_kl_backward_cuda(mmbal_dtype dtype, const void *dkl, const void *logits,
                                                const void *fused_logits, int64_t M, int64_t N, int64_t C, int reverse,
                                                void *dlogits, void *dfused_logits, void *workspace,
                                                mmbal_stream stream) {
    if (!sizes_are_served(N, M) || C < 1) return MMBAL_INVALID_ARGUMENT;
    MMBAL_RETURN_FOR_DTYPE(dtype, run_categorical_backward, dkl, logits, fused_logits, M, N, C, reverse, dlogits,
                           dfused_logits, workspace, stream);
}
