// What one sample's magnitudes make of its shares and of what is upstream, by one thread: ops/cpu/attribution_sample.h
// without arrays, which would lie in local memory. Formulas are there.
#pragma once

#include <math.h>

#include "../cpu/attribution_penalty.h"
#include "launch.cuh"

namespace mmbal {

// The samples of a call. widths: of the modalities.
struct Samples {
    const double *target;   // [target_rows, M]
    const uint8_t *present; // [B, M] or NULL
    double *magnitudes;     // [B, M]: a
    int64_t target_rows, B, M;
    mmbal_attribution_options options;
    int64_t widths[MMBAL_MAX_MODALITIES];
};

// What is upstream of the outputs; shares and magnitudes may be NULL: 0.
template <typename R>
struct Upstream {
    const R *reg, *shares, *magnitudes; // [B], [B, M], [B, M]
};

class Sample {
public:
    // A target that the CPU refuses ends the launch.
    __device__ __forceinline__ Sample(const Samples &all, int64_t b)
        : all_(all), first_(b * all.M), target_(all.target + (all.target_rows == 1 ? 0 : b * all.M)) {
        int64_t present = 0;
        for (int64_t m = 0; m < all.M; m++) {
            if (!(target_[m] >= 0 && isfinite(target_[m]))) __trap();
            present += has(m);
            asked_ += has(m) ? target_[m] : 0;
            sum_ += a(m);
        }
        if (present > 0 && !(asked_ > 0 && isfinite(asked_))) __trap();
        decided_ = present >= 2 && sum_ != 0;
    }
    __device__ __forceinline__ bool has(int64_t m) const { return !all_.present || all_.present[first_ + m]; }
    __device__ __forceinline__ bool decided() const { return decided_; }
    __device__ __forceinline__ double sum() const { return sum_; }
    __device__ __forceinline__ double a(int64_t m) const { return all_.magnitudes[first_ + m]; }
    __device__ __forceinline__ double q(int64_t m) const { return has(m) ? target_[m] / asked_ : 0; }
    __device__ __forceinline__ double p(int64_t m) const { return decided_ ? a(m) / sum_ : q(m); }
    // p - q
    __device__ __forceinline__ double off(int64_t m) const { return p(m) - q(m); }

    __device__ __forceinline__ double regulariser() const {
        double reg = 0;
        for (int64_t m = 0; m < all_.M && decided_; m++)
            if (has(m)) reg += penalty_of(all_.options.penalty, off(m));
        return reg;
    }

    // a_m n_m; 0 where there is no gradient
    __device__ __forceinline__ double root_scale(int64_t m) const {
        const double n = all_.options.pool == MMBAL_POOL_RMS ? static_cast<double>(all_.widths[m]) : 1;
        const bool moves = decided_ && has(m) && !(p(m) <= all_.options.eps) && a(m) != 0;
        return moves ? a(m) * n : 0;
    }

    // y_m
    template <typename R>
    __device__ __forceinline__ double slope(const Upstream<R> &up, double reg, int64_t m) const {
        if (!has(m)) return 0;
        return reg * penalty_slope(all_.options.penalty, off(m)) +
               (up.shares ? static_cast<double>(up.shares[first_ + m]) : 0);
    }
    // The mean of y under p.
    template <typename R>
    __device__ __forceinline__ double mean_slope(const Upstream<R> &up, double reg) const {
        double mean = 0;
        for (int64_t m = 0; m < all_.M; m++) mean += p(m) * slope(up, reg, m);
        return mean;
    }
    // c_m
    template <typename R>
    __device__ __forceinline__ double factor(const Upstream<R> &up, double reg, double mean, int64_t m) const {
        const double scale = root_scale(m);
        const double own = up.magnitudes ? static_cast<double>(up.magnitudes[first_ + m]) : 0;
        return scale == 0 ? 0 : ((slope(up, reg, m) - mean) / sum_ + own) / scale;
    }

private:
    const Samples &all_;
    const int64_t first_;
    const double *const target_;
    double sum_ = 0, asked_ = 0;
    bool decided_ = false;
};

} // namespace mmbal
