// Plain, slow versions of what mmbal/sampling.h promises, from the same random words.
#ifndef MMBAL_TESTS_SAMPLING_REFERENCE_H
#define MMBAL_TESTS_SAMPLING_REFERENCE_H

#include <algorithm>
#include <numeric>

#include "helpers.h"
#include "mmbal/sampling.h"

namespace mmbal_test {

constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();
constexpr double INFINITE = std::numeric_limits<double>::infinity();

// The word of one unit, the counter written out.
inline uint32_t word_of(int64_t seed, int64_t step, int64_t id, mmbal_purpose purpose, int64_t unit) {
    const auto block = static_cast<uint64_t>(unit) / 4, at = static_cast<uint64_t>(step);
    const uint64_t second = block / 0x100000000 + purpose * 0x1000u + at / 0x100000000 * 0x10000;
    const uint32_t counter[4] = {static_cast<uint32_t>(block), static_cast<uint32_t>(second), static_cast<uint32_t>(id),
                                 static_cast<uint32_t>(at)};
    const uint32_t key[2] = {static_cast<uint32_t>(seed), static_cast<uint32_t>(static_cast<uint64_t>(seed) >> 32)};
    uint32_t words[4];
    mmbal_philox4x32(counter, key, words);
    return words[unit % 4];
}

inline double exponential(uint32_t word) { return -std::log1p(-(word + 0.5) * 0x1p-32); }

// Which have the k smallest keys, equal ones by their index, of those with weight; k no more than these.
inline std::vector<uint8_t> smallest(const std::vector<double> &keys, const std::vector<double> &weights, int64_t k) {
    std::vector<size_t> order;
    for (size_t n = 0; n < keys.size(); n++)
        if (weights[n] > 0) order.push_back(n);
    std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return keys[a] < keys[b]; });
    std::vector<uint8_t> kept(keys.size());
    for (size_t i = 0; i < order.size() && static_cast<int64_t>(i) < k; i++) kept[order[i]] = 1;
    return kept;
}

inline int64_t units_to_keep(double rho, int64_t units) {
    const auto n = static_cast<double>(units);
    const auto k = static_cast<int64_t>(std::ceil(rho * n - 1e-7 * n));
    return std::min(units, std::max(k, static_cast<int64_t>(rho > 0)));
}

inline int64_t how_many_positive(const std::vector<double> &values) {
    return std::count_if(values.begin(), values.end(), [](double v) { return v > 0; });
}

inline std::vector<long double> mixed(const std::vector<double> &weights, double mix) {
    long double sum = 0;
    for (double w : weights) sum += w;
    std::vector<long double> q;
    for (double w : weights)
        q.push_back((sum > 0 ? (1 - static_cast<long double>(mix)) * w / sum : 0) +
                    static_cast<long double>(mix) / static_cast<long double>(weights.size()));
    return q;
}

// p = min(1, c q) of sum kappa, by bisection of log c
struct Waterfill {
    std::vector<long double> q, p;
    long double c = 0;
    int64_t positive = 0; // of q
    Waterfill(const std::vector<double> &weights, double kappa, double mix) : q(mixed(weights, mix)), p(q.size()) {
        for (long double share : q) positive += share > 0;
        const auto fill = [&](long double level) {
            long double sum = 0;
            for (size_t n = 0; n < q.size(); n++) sum += p[n] = q[n] > 0 ? std::min(1.0L, level * q[n]) : 0;
            return sum;
        };
        c = INFINITE;
        if (kappa >= static_cast<double>(positive)) {
            fill(c);
            return;
        }
        long double low = -16000, high = 16000;
        for (int i = 0; i < 100; i++) {
            const long double middle = (low + high) / 2;
            (fill(std::exp2(middle)) < kappa ? low : high) = middle;
        }
        c = kappa > 0 ? std::exp2(low) : 0;
        fill(c);
    }
};

// One call of mmbal_mask_units and all that is promised of its result.
struct Masking {
    std::vector<double> energy;
    std::vector<mmbal_segment> segments;
    std::vector<double> rho;
    int64_t seed = 1, step = 0;
    mmbal_mask_options options = {MMBAL_BOTTOMK, 0, 0};
    std::vector<double> scale = {}, probability = {};

    mmbal_status run(const mmbal_pool &pool) {
        const auto U = static_cast<int64_t>(energy.size()), S = static_cast<int64_t>(segments.size());
        Guarded<double> of_scale(U), of_probability(U);
        Guarded<unsigned char> workspace(mmbal_mask_units_workspace(segments.data(), S, &pool));
        const mmbal_status status =
            mmbal_mask_units(energy.data(), segments.data(), rho.data(), U, S, static_cast<int64_t>(rho.size()), seed,
                             step, options, of_scale.data(), of_probability.data(), workspace.data(), &pool);
        EXPECT_TRUE(of_scale.intact() && of_probability.intact() && workspace.intact());
        EXPECT_TRUE(status == MMBAL_OK || (of_scale.untouched() && of_probability.untouched()));
        scale = of_scale.values(), probability = of_probability.values();
        return status;
    }
    void run() { ASSERT_EQ(run(mmbal_pool_serial()), MMBAL_OK); }
    int64_t kept() const { return how_many_positive(scale); }

    void check() const {
        for (const mmbal_segment &s : segments) {
            SCOPED_TRACE("segment of " + std::to_string(s.units) + " at " + std::to_string(s.first) + ", rho " +
                         std::to_string(rho[s.modality]) + ", sampler " + std::to_string(options.sampler) +
                         (options.unbiased ? " unbiased" : "") + ", mix " + std::to_string(options.mix));
            ASSERT_NO_FATAL_FAILURE(check(s));
        }
    }

private:
    uint32_t word(const mmbal_segment &s, mmbal_purpose purpose, int64_t u) const {
        return word_of(seed, step, s.id, purpose, s.first_unit + u);
    }

    void check(const mmbal_segment &s) const {
        const std::vector<double> E(energy.begin() + s.first, energy.begin() + s.first + s.units);
        const double ratio = rho[s.modality];
        const double *const got = scale.data() + s.first, *const p = probability.data() + s.first;
        if (how_many_positive(E) == 0 || ratio >= 1) {
            for (int64_t u = 0; u < s.units; u++) ASSERT_TRUE(got[u] == 1 && p[u] == 1) << u;
        } else if (options.sampler == MMBAL_SYSTEMATIC || options.sampler == MMBAL_INDEPENDENT) {
            check_probabilities(s, E, ratio, got, p);
        } else {
            check_count(s, E, ratio, got, p);
        }
    }

    void check_scale(int64_t u, bool kept, double got, double p) const {
        ASSERT_EQ(got != 0, kept) << u;
        const double expected = !kept ? 0 : options.unbiased ? 1 / p : 1;
        ASSERT_NEAR(got, expected, 1e-15 * (expected > 1 ? expected : 0)) << u;
    }

    // Samplers that keep k.
    void check_count(const mmbal_segment &s, const std::vector<double> &E, double ratio, const double *got,
                     const double *p) const {
        const bool uniform = options.sampler == MMBAL_UNIFORM, top = options.sampler == MMBAL_TOPK;
        int64_t k = units_to_keep(ratio, s.units);
        std::vector<double> w = E, keys, sorted;
        if (uniform) w.assign(E.size(), 1);
        if (options.sampler == MMBAL_BOTTOMK && options.unbiased) {
            const auto q = mixed(E, options.mix);
            w.assign(q.begin(), q.end());
        }
        k = std::min(k, how_many_positive(w)); // where unbiased mix gives weight to what has no energy
        for (int64_t u = 0; u < s.units; u++) {
            keys.push_back(top ? -E[u] : exponential(word(s, MMBAL_DRAW_UNIT, u)) / w[u]);
            if (w[u] > 0) sorted.push_back(keys[u]);
        }
        const std::vector<uint8_t> kept = smallest(keys, w, k);
        std::sort(sorted.begin(), sorted.end());
        for (int64_t u = 0; u < s.units; u++) {
            double expected = kept[u];
            if (uniform) expected = static_cast<double>(k) / static_cast<double>(s.units);
            if (options.sampler == MMBAL_BOTTOMK && k > 0) {
                // The k-th of the others: that of all, or the next where u is itself one of the k.
                const size_t at = static_cast<size_t>(k) - 1 + kept[u];
                expected = at < sorted.size() ? -std::expm1(-w[u] * sorted[at]) : 1;
            }
            ASSERT_NEAR(p[u], expected, 1e-9 * expected) << u;
            ASSERT_NO_FATAL_FAILURE(check_scale(u, kept[u], got[u], p[u]));
        }
    }

    // Samplers that have probabilities: these against the plain ones, what is kept against these.
    void check_probabilities(const mmbal_segment &s, const std::vector<double> &E, double ratio, const double *got,
                             const double *p) const {
        const bool systematic = options.sampler == MMBAL_SYSTEMATIC;
        const double kappa = ratio * static_cast<double>(s.units);
        const Waterfill plain(E, kappa, options.mix);
        const auto enough = static_cast<double>(plain.positive) - kappa; // 0 or less: all with energy are kept
        std::vector<int64_t> P;
        int64_t sum = 0, moved = 0;
        double least_moved = 2, most_unmoved = 0;
        for (int64_t u = 0; u < s.units; u++) {
            const double fixed = p[u] * 0x1p32, expected = static_cast<double>(plain.p[u]) * 0x1p32;
            P.push_back(static_cast<int64_t>(fixed)), sum += P[u];
            ASSERT_TRUE(fixed == static_cast<double>(P[u]) && P[u] >= 1 && P[u] <= INT64_C(1) << 32)
                << u << " " << p[u];
            // Where they are exactly as many, the others' 2^-32 each are taken from one of them.
            const double least = enough < 0 || !systematic ? 1 : 1 - static_cast<double>(s.units) * 0x1p-32;
            ASSERT_TRUE(enough > 0 || plain.q[u] == 0 || p[u] >= least) << u << " " << p[u];
            if (enough <= 0 || ratio == 0) continue;
            if (std::fabs(fixed - std::max(expected, 1.0)) <= 0.501 + 1e-12 * expected) {
                if (expected < 0x1p32 - 1) most_unmoved = std::max(most_unmoved, static_cast<double>(plain.p[u]));
            } else { // what is left of the sum
                ASSERT_TRUE(systematic) << u << " " << fixed << " " << expected;
                least_moved = std::min(least_moved, static_cast<double>(plain.p[u])), moved += P[u] < INT64_C(1) << 32;
            }
        }
        EXPECT_TRUE(!systematic || ratio == 0 || sum == std::llround(kappa * 0x1p32)) << sum << " for " << kappa;
        if (systematic && enough > 0 && ratio > 0) {
            EXPECT_LE(moved, 1);
            EXPECT_GE(least_moved, most_unmoved * (1 - 1e-12));
        }
        std::vector<int64_t> order(s.units);
        std::iota(order.begin(), order.end(), 0);
        if (systematic)
            std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) {
                return word(s, MMBAL_DRAW_ORDER, a) < word(s, MMBAL_DRAW_ORDER, b);
            });
        int64_t running = word(s, MMBAL_DRAW_START, 0), count = 0;
        for (int64_t u : order) {
            const int64_t before = running >> 32;
            running += P[u];
            const bool kept = systematic ? running >> 32 > before : word(s, MMBAL_DRAW_UNIT, u) < P[u];
            ASSERT_NO_FATAL_FAILURE(check_scale(u, kept, got[u], p[u]));
            count += kept;
            const double most = options.unbiased ? std::max(1.0, 1 / (options.mix * ratio)) : 1;
            ASSERT_LE(got[u], most * (1 + 1e-6)) << u;
        }
        if (!systematic || ratio == 0) return;
        EXPECT_TRUE(count == std::floor(kappa) || count == std::ceil(kappa)) << count << " of " << kappa;
    }
};

// Energies over many orders of magnitude; a share of them is 0.
inline std::vector<double> random_energies(int64_t count, Random &random, double decades = 4, int64_t zero_in = 9) {
    std::vector<double> energies;
    for (int64_t i = 0; i < count; i++)
        energies.push_back(random.below(zero_in) ? std::pow(10, random.uniform(-decades, decades)) : 0);
    return energies;
}

} // namespace mmbal_test
#endif
