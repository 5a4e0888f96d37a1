/* What one sample's magnitudes make of its shares and of what is upstream, in float64; see mmbal/attribution.h. */
#ifndef MMBAL_CPU_ATTRIBUTION_SAMPLE_H
#define MMBAL_CPU_ATTRIBUTION_SAMPLE_H

#include <math.h>

#include "attribution_penalty.h"
#include "mmbal/attribution.h"

/* A float32 probability below it counts as 0: its sums are below any rounding, and its products would soon be subnormal
 * numbers, which take a hundred times as long. */
static const double negligible = 0x1p-64;

/* One sample. Modalities that are not present have a, p and q 0. */
typedef struct {
    double a[MMBAL_MAX_MODALITIES], p[MMBAL_MAX_MODALITIES], q[MMBAL_MAX_MODALITIES];
    double sum;  /* of a */
    int decided; /* 0: p = q, and no gradient */
} attributed_sample;

static inline int is_present(const mmbal_attribution *t, int64_t b, int64_t m) {
    return !t->present || t->present[b * t->M + m];
}

/* Fills what follows from a[M]. */
static inline void find_shares(const mmbal_attribution *t, int64_t b, attributed_sample *s) {
    const double *target = t->target + (t->target_rows == 1 ? 0 : b * t->M);
    double asked = 0;
    int64_t present = 0;
    s->sum = 0;
    for (int64_t m = 0; m < t->M; m++) {
        present += is_present(t, b, m);
        asked += is_present(t, b, m) ? target[m] : 0;
        s->sum += s->a[m];
    }
    s->decided = present >= 2 && s->sum != 0;
    for (int64_t m = 0; m < t->M; m++) {
        s->q[m] = is_present(t, b, m) && present > 0 ? target[m] / asked : 0;
        s->p[m] = s->decided ? s->a[m] / s->sum : s->q[m];
    }
}

static inline double regulariser_of(const mmbal_attribution *t, int64_t b, const attributed_sample *s) {
    double reg = 0;
    for (int64_t m = 0; m < t->M && s->decided; m++)
        if (is_present(t, b, m)) reg += penalty_of(t->options.penalty, s->p[m] - s->q[m]);
    return reg;
}

/* What is upstream of one sample's outputs; shares and magnitudes [M]. */
typedef struct {
    double reg, shares[MMBAL_MAX_MODALITIES], magnitudes[MMBAL_MAX_MODALITIES];
} upstream;

/* a_m n_m, what A_m is divided by; 0 where there is no gradient. */
static inline double root_scale(const mmbal_attribution *t, int64_t b, const attributed_sample *s, int64_t m) {
    const double n = t->options.pool == MMBAL_POOL_RMS ? (double)t->modalities[m].d : 1;
    const int moves = s->decided && is_present(t, b, m) && !(s->p[m] <= t->options.eps) && s->a[m] != 0;
    return moves ? s->a[m] * n : 0;
}

/* y_m and its mean under p. */
static inline double find_slopes(const mmbal_attribution *t, int64_t b, const attributed_sample *s, const upstream *up,
                                 double *y) {
    double mean = 0;
    for (int64_t m = 0; m < t->M; m++) {
        const double u = penalty_slope(t->options.penalty, s->p[m] - s->q[m]);
        y[m] = is_present(t, b, m) ? up->reg * u + up->shares[m] : 0;
        mean += s->p[m] * y[m];
    }
    return mean;
}

/* c[M] of mmbal_attribution_reg_backward. */
static inline void find_factors(const mmbal_attribution *t, int64_t b, const attributed_sample *s, const upstream *up,
                                double *c) {
    double y[MMBAL_MAX_MODALITIES];
    const double mean = find_slopes(t, b, s, up, y);
    for (int64_t m = 0; m < t->M; m++) {
        const double scale = root_scale(t, b, s, m);
        c[m] = scale == 0 ? 0 : ((y[m] - mean) / s->sum + up->magnitudes[m]) / scale;
    }
}

/* Of sum_m c_m beta_m the derivatives for what is upstream, in `down`, and k[m], those for a_m over a_m n_m: then
 * d/dg = c d beta/dg + k alpha e. With gamma_m = beta_m / (a_m n_m), Gamma their sum, y' the slopes' own derivative:
 *   d/da_i = sum_j gamma_j dA_j/da_i - A_i gamma_i / a_i. */
static inline void find_second(const mmbal_attribution *t, int64_t b, const attributed_sample *s, const upstream *up,
                               const double *beta, double *c, double *k, upstream *down) {
    double y[MMBAL_MAX_MODALITIES], gamma[MMBAL_MAX_MODALITIES], bend[MMBAL_MAX_MODALITIES];
    double all = 0, slopes = 0, bends = 0, own = 0, pull = 0, pulls = 0;
    const double mean = find_slopes(t, b, s, up, y);
    find_factors(t, b, s, up, c);
    for (int64_t m = 0; m < t->M; m++) {
        const double scale = root_scale(t, b, s, m), x = s->p[m] - s->q[m];
        const int counts = is_present(t, b, m);
        gamma[m] = scale == 0 ? 0 : beta[m] / scale;
        bend[m] = counts ? up->reg * penalty_curvature(t->options.penalty, x) : 0;
        all += gamma[m], slopes += gamma[m] * (y[m] - mean);
        bends += gamma[m] * bend[m] * s->p[m], own += bend[m] * s->p[m] * s->p[m];
        pull += counts ? gamma[m] * penalty_slope(t->options.penalty, x) : 0;
        pulls += counts ? s->p[m] * penalty_slope(t->options.penalty, x) : 0;
    }
    down->reg = s->decided ? (pull - all * pulls) / s->sum : 0;
    for (int64_t m = 0; m < t->M; m++) {
        const double scale = root_scale(t, b, s, m);
        down->shares[m] = s->decided && is_present(t, b, m) ? (gamma[m] - s->p[m] * all) / s->sum : 0;
        down->magnitudes[m] = gamma[m];
        const double bent = gamma[m] * bend[m] - bends - all * (bend[m] * s->p[m] - own);
        const double slope = (bent - slopes - all * (y[m] - mean)) / (s->sum * s->sum);
        k[m] = scale == 0 ? 0 : (slope - c[m] * scale * gamma[m] / s->a[m]) / scale;
    }
}

#endif
