// What mmbal/attribution.h promises for one sample, in plain loops; every number knows how far rounding may move it.
#ifndef MMBAL_TESTS_ATTRIBUTION_REFERENCE_H
#define MMBAL_TESTS_ATTRIBUTION_REFERENCE_H

#include "helpers.h"
#include "mmbal/attribution.h"

namespace mmbal_test {

// A float64 and a bound of its error where everything is rounded to a narrower type, in units of that type's rounding.
struct Rounded {
    double value = 0, error = 0;
    Rounded(double v = 0, double e = 0) : value(v), error(e) {} // NOLINT: a double is one that is exact
};
inline double size(Rounded a) { return std::fabs(a.value); }
inline Rounded rounded(double value, double error) { return {value, error + std::fabs(value)}; }
inline Rounded operator+(Rounded a, Rounded b) { return rounded(a.value + b.value, a.error + b.error); }
inline Rounded operator-(Rounded a, Rounded b) { return rounded(a.value - b.value, a.error + b.error); }
inline Rounded operator*(Rounded a, Rounded b) {
    return rounded(a.value * b.value, a.error * size(b) + size(a) * b.error);
}
inline Rounded operator/(Rounded a, Rounded b) {
    const double quotient = a.value / b.value;
    return rounded(quotient, (a.error + std::fabs(quotient) * b.error) / size(b));
}
inline Rounded root(Rounded a) {
    return a.value > 0 ? rounded(std::sqrt(a.value), a.error / (2 * std::sqrt(a.value))) : 0;
}
inline Rounded exponential(Rounded a) {
    const double value = std::exp(a.value);
    return {value, value * (a.error + 4)};
}

// A sum whose additions are rounded by `rounding` units: 1, or far less where sums are wider than their terms.
class Total {
public:
    explicit Total(double rounding) : rounding_(rounding) {}
    void add(Rounded term) { value_ += term.value, size_ += size(term), error_ += term.error, count_++; }
    Rounded get() const { return {value_, error_ + rounding_ * count_ * size_ + std::fabs(value_)}; }

private:
    double rounding_, value_ = 0, size_ = 0, error_ = 0, count_ = 0;
};

using RoundedRow = std::vector<Rounded>;

struct Sample {
    mmbal_attribution_options options{};
    double sum_rounding = 1;        // of the sums over d
    std::vector<RoundedRow> g, e{}; // [M][d]
    std::vector<double> target;     // [M]
    std::vector<bool> present;      // [M]

    RoundedRow q, p, a, y, A, c;
    Rounded S, R;
    bool moves = false; // whether R can change at all

    size_t M() const { return g.size(); }
    double n(size_t m) const { return options.pool == MMBAL_POOL_RMS ? static_cast<double>(g[m].size()) : 1; }
    Rounded x(size_t m) const { return p[m] - q[m]; }
    Rounded psi(Rounded z) const {
        if (options.penalty == MMBAL_SQUARED) return z * z;
        const Rounded positive = z.value < 0 ? Rounded(-z.value, z.error) : z;
        if (options.penalty == MMBAL_L1) return positive;
        return size(z) > 0.1 ? positive - 0.05 : z * z * 5;
    }
    Rounded slope(Rounded z) const {
        if (options.penalty == MMBAL_SQUARED) return z * 2;
        if (options.penalty == MMBAL_HUBER && size(z) <= 0.1) return z * 10;
        return (z.value > 0) - (z.value < 0);
    }
    double curvature(Rounded z) const {
        return options.penalty == MMBAL_SQUARED ? 2 : options.penalty == MMBAL_HUBER && size(z) <= 0.1 ? 10 : 0;
    }
    bool has_root(size_t m) const { return moves && present[m] && p[m].value > options.eps; }

    void forward() {
        RoundedRow magnitudes(M());
        for (size_t m = 0; m < M(); m++) {
            Total squares(sum_rounding);
            for (size_t i = 0; i < g[m].size() && present[m]; i++)
                squares.add((g[m][i] * e[m][i]) * (g[m][i] * e[m][i]));
            magnitudes[m] = root(squares.get() / n(m));
        }
        set_magnitudes(magnitudes);
        Total penalties(1);
        for (size_t m = 0; m < M(); m++)
            if (present[m] && moves) penalties.add(psi(x(m)));
        R = penalties.get();
    }
    void set_magnitudes(const RoundedRow &magnitudes) {
        Total shares(1), sum(1);
        int count = 0;
        for (size_t m = 0; m < M(); m++)
            if (present[m]) shares.add(target[m]), sum.add(magnitudes[m]), count++;
        a = magnitudes, S = sum.get(), moves = count >= 2 && S.value > 0;
        q.assign(M(), 0), p.assign(M(), 0);
        for (size_t m = 0; m < M(); m++)
            if (present[m]) q[m] = target[m] / shares.get(), p[m] = moves ? a[m] / S : q[m];
    }
    // Where the results, or their derivatives, jump: rounding may take either side.
    bool near_a_jump() const {
        bool near = false;
        for (size_t m = 0; m < M() && moves; m++) {
            if (!present[m]) continue;
            const double off = size(x(m));
            near = near || (options.penalty == MMBAL_L1 && off < 3e-6);
            near = near || (options.penalty == MMBAL_HUBER && std::fabs(off - 0.1) < 3e-6);
            near = near || (p[m].value > 0 && std::fabs(p[m].value / (options.eps + 1e-300) - 1) < 1e-5);
        }
        return near;
    }

    // y, A and c, from the magnitudes
    void backward(double dreg, const double *dshares, const double *dmagnitudes) {
        y.assign(M(), 0), A.assign(M(), 0), c.assign(M(), 0);
        Total mean(1);
        for (size_t m = 0; m < M(); m++)
            if (present[m]) y[m] = slope(x(m)) * dreg + dshares[m], mean.add(y[m] * p[m]);
        for (size_t m = 0; m < M(); m++)
            if (has_root(m)) A[m] = (y[m] - mean.get()) / S + dmagnitudes[m], c[m] = A[m] / (a[m] * n(m));
        ybar = mean.get();
    }
    Rounded dgradient(size_t m, size_t i) const { return c[m] * g[m][i] * e[m][i] * e[m][i]; }
    Rounded dembedding(size_t m, size_t i) const { return c[m] * g[m][i] * g[m][i] * e[m][i]; }

    // The derivatives of sum_m c_m beta_m, after backward.
    struct Second {
        Rounded reg;
        RoundedRow shares, magnitudes;
        std::vector<RoundedRow> g, e;
    };
    Second second(double dreg, const std::vector<RoundedRow> &G, const std::vector<RoundedRow> &E) const {
        Second out{0, RoundedRow(M()), RoundedRow(M()), {}, {}};
        Total all(1), of_reg(1);
        for (size_t m = 0; m < M(); m++) {
            Total beta(sum_rounding);
            for (size_t i = 0; i < g[m].size() && has_root(m); i++)
                beta.add(g[m][i] * e[m][i] * (G[m][i] * e[m][i] + E[m][i] * g[m][i]));
            if (has_root(m)) out.magnitudes[m] = beta.get() / (a[m] * n(m));
            all.add(out.magnitudes[m]);
        }
        const RoundedRow &w = out.magnitudes;
        for (size_t m = 0; m < M(); m++) {
            if (!moves || !present[m]) continue;
            out.shares[m] = (w[m] - p[m] * all.get()) / S;
            of_reg.add(slope(x(m)) * out.shares[m]);
        }
        out.reg = of_reg.get();
        for (size_t k = 0; k < M(); k++) {
            out.g.emplace_back(g[k].size()), out.e.emplace_back(g[k].size());
            if (!has_root(k)) continue;
            RoundedRow dy(M()); // of y for a_k
            Total mean(1), of_a(1);
            for (size_t j = 0; j < M(); j++) {
                if (!present[j]) continue;
                dy[j] = (Rounded(j == k) - p[j]) * dreg * curvature(x(j)) / S;
                mean.add(dy[j] * p[j]);
            }
            for (size_t m = 0; m < M(); m++)
                if (has_root(m))
                    of_a.add(w[m] * ((dy[m] - mean.get() - (y[k] - ybar) / S) / S - (y[m] - ybar) / S / S));
            of_a.add(Rounded(0) - A[k] * w[k] / a[k]);
            const Rounded along = of_a.get() / (a[k] * n(k));
            for (size_t i = 0; i < g[k].size(); i++) {
                const Rounded gi = g[k][i], ei = e[k][i], Gi = G[k][i], Ei = E[k][i];
                out.g[k][i] = c[k] * (Gi * ei * ei + gi * ei * Ei * 2) + along * (gi * ei) * ei;
                out.e[k][i] = c[k] * (gi * ei * Gi * 2 + gi * gi * Ei) + along * (gi * ei) * gi;
            }
        }
        return out;
    }

private:
    Rounded ybar;
};

// got = expected, as T stores it; Real: the type that the operator calculates in.
template <typename T, typename Real>
::testing::AssertionResult near(double got, Rounded expected) {
    const double tiny = T::dtype == MMBAL_F64   ? std::numeric_limits<double>::min()
                        : T::dtype == MMBAL_F16 ? 0x1p-24
                                                : std::numeric_limits<float>::min();
    const double bound = 4 * Real::real_error * expected.error + 1.02 * T::stored_error * size(expected) + tiny;
    if (std::fabs(got - expected.value) <= bound) return ::testing::AssertionSuccess();
    return ::testing::AssertionFailure() << "got " << got << ", expected " << expected.value << " within " << bound;
}

// The type of a T's sums and losses.
template <typename T>
using RealOf = std::conditional_t<T::dtype == MMBAL_F64, F64, F32>;

constexpr mmbal_attribution_options DEFAULT = {MMBAL_POOL_L2, MMBAL_L1, 1e-12};

inline std::vector<mmbal_attribution_options> all_options(double eps = 1e-12) {
    std::vector<mmbal_attribution_options> all;
    for (mmbal_attribution_pool pool : {MMBAL_POOL_L2, MMBAL_POOL_RMS})
        for (mmbal_attribution_penalty penalty : {MMBAL_L1, MMBAL_SQUARED, MMBAL_HUBER})
            all.push_back({pool, penalty, eps});
    return all;
}

inline std::string words(const mmbal_attribution_options &of) {
    return "pool " + std::to_string(of.pool) + " penalty " + std::to_string(of.penalty) + " eps " +
           std::to_string(of.eps);
}

// A call of the three operators. Targets are such that no result jumps within rounding.
template <typename T>
struct Problem {
    using Stored = typename T::Stored;
    using Real = typename T::Real;
    using Reals = RealOf<T>;
    int64_t B;
    std::vector<int64_t> d;
    mmbal_attribution_options options = DEFAULT;
    int64_t target_rows;
    std::vector<std::vector<Stored>> g, e, G, E; // [M] of [B, d]; G, E: upstream of the backward's two
    std::vector<double> target;
    std::vector<uint8_t> present; // empty: all
    std::vector<Real> dreg, dshares, dmagnitudes;

    Problem(int64_t b, std::vector<int64_t> sizes, mmbal_attribution_options o = DEFAULT, bool masked = false,
            bool one_target = false, uint64_t seed = 1, double g_scale = 2, double e_scale = 2)
        : B(b), d(std::move(sizes)), options(o), target_rows(one_target ? 1 : b) {
        Random random(seed);
        for (int64_t width : d) {
            const double strength = random.uniform(0.3, 1);
            g.push_back(random.tensor<T>(B * width, strength * g_scale));
            e.push_back(random.tensor<T>(B * width, e_scale));
            G.push_back(random.tensor<T>(B * width, g_scale)), E.push_back(random.tensor<T>(B * width, e_scale));
        }
        if (masked)
            for (int64_t i = 0; i < B * M(); i++) present.push_back(random.below(3) != 0);
        for (int64_t row = 0; masked && row < B; row++) present[row * M() + random.below(M())] = 1;
        fill(dreg, B, random), fill(dshares, B * M(), random), fill(dmagnitudes, B * M(), random);
        const double unit = 1 / (g_scale * e_scale); // of what is upstream of a
        for (Real &value : dmagnitudes) value = static_cast<Real>(value * unit);
        for (bool again = true; again;) {
            target.clear();
            for (int64_t i = 0; i < target_rows * M(); i++) target.push_back(random.uniform(0.1, 1));
            again = false;
            for (int64_t row = 0; row < B; row++) again = again || sample(row).near_a_jump();
        }
    }
    static void fill(std::vector<Real> &values, int64_t count, Random &random) {
        for (int64_t i = 0; i < count; i++) values.push_back(static_cast<Real>(random.uniform(-1, 1)));
    }
    int64_t M() const { return static_cast<int64_t>(d.size()); }
    bool is_present(int64_t i) const { return present.empty() || present[i]; }
    std::vector<RoundedRow> rows(const std::vector<std::vector<Stored>> &from, int64_t row) const {
        std::vector<RoundedRow> all;
        for (int64_t m = 0; m < M(); m++) {
            all.emplace_back();
            for (int64_t i = 0; i < d[m]; i++) all.back().push_back(T::load(from[m][row * d[m] + i]));
        }
        return all;
    }
    Sample sample(int64_t row) const {
        Sample s;
        s.options = options, s.sum_rounding = T::dtype == MMBAL_F64 ? 1 : 0x1p-29;
        s.g = rows(g, row), s.e = rows(e, row);
        for (int64_t m = 0; m < M(); m++) {
            s.target.push_back(target[(target_rows == B ? row : 0) * M() + m]);
            s.present.push_back(is_present(row * M() + m));
        }
        s.forward();
        return s;
    }

    struct Outputs {
        mmbal_status status;
        std::vector<Real> reg, shares, magnitudes;    // the forward's, or the gradients of the backward's three
        std::vector<std::vector<Stored>> first, last; // [M] of [B, d]: of g and of e
        bool same_as(const Outputs &o) const {
            bool same = same_bits(reg, o.reg) && same_bits(shares, o.shares) && same_bits(magnitudes, o.magnitudes);
            for (size_t m = 0; m < first.size(); m++)
                same = same && same_bits(first[m], o.first[m]) && same_bits(last[m], o.last[m]);
            return same;
        }
    };
    enum Order { FORWARD, BACKWARD, SECOND };
    struct Call {
        mmbal_pool pool = mmbal_pool_serial();
        int64_t without = -1;       // bit 2 m: no output for g of m; bit 2 m + 1: none for e
        bool none_upstream = false; // of the backward's gradients
        bool reg_alone = false;     // nothing upstream of shares and magnitudes
        std::function<void(mmbal_attribution &, std::vector<mmbal_attributed> &)> change;
    };
    Outputs run(Order order, const std::vector<Real> &magnitudes, const Call &call = {}) const {
        std::vector<Guarded<Stored>> dg, de;
        std::vector<mmbal_attributed> all;
        for (int64_t m = 0; m < M(); m++) dg.emplace_back(B * d[m]), de.emplace_back(B * d[m]);
        for (int64_t m = 0; m < M(); m++) {
            const bool no_g = call.without >= 0 && (call.without >> (2 * m) & 1);
            const bool no_e = call.without >= 0 && (call.without >> (2 * m + 1) & 1);
            all.push_back({g[m].data(), e[m].data(), d[m], no_g ? nullptr : dg[m].data(), no_e ? nullptr : de[m].data(),
                           call.none_upstream ? nullptr : G[m].data(), call.none_upstream ? nullptr : E[m].data()});
        }
        mmbal_attribution of = {nullptr, target.data(), target_rows, present.empty() ? nullptr : present.data(),
                                B,       M(),           T::dtype,    options};
        if (call.change) call.change(of, all);
        of.modalities = all.data();
        Guarded<Real> reg(B), shares(B * M()), result(B * M());
        const Real *of_shares = call.reg_alone ? nullptr : dshares.data();
        const Real *of_magnitudes = call.reg_alone ? nullptr : dmagnitudes.data();
        mmbal_status status = MMBAL_OK;
        if (order == FORWARD) status = mmbal_attribution_reg(&of, reg.data(), shares.data(), result.data(), &call.pool);
        if (order == BACKWARD)
            status = mmbal_attribution_reg_backward(&of, dreg.data(), of_shares, of_magnitudes, magnitudes.data(),
                                                    &call.pool);
        if (order == SECOND)
            status =
                mmbal_attribution_reg_backward_backward(&of, dreg.data(), of_shares, of_magnitudes, magnitudes.data(),
                                                        reg.data(), shares.data(), result.data(), &call.pool);
        Outputs out = {status, reg.values(), shares.values(), result.values(), {}, {}};
        bool untouched = reg.untouched() && shares.untouched() && result.untouched();
        bool intact = reg.intact() && shares.intact() && result.intact();
        for (int64_t m = 0; m < M(); m++) {
            untouched = untouched && dg[m].untouched() && de[m].untouched();
            intact = intact && dg[m].intact() && de[m].intact();
            out.first.push_back(dg[m].values()), out.last.push_back(de[m].values());
        }
        EXPECT_TRUE(intact);
        EXPECT_TRUE(status == MMBAL_OK || untouched || B == 0) << "order " << order;
        return out;
    }
    Outputs forward() const { return run(FORWARD, {}); }
    Outputs backward() const { return run(BACKWARD, forward().magnitudes); }
    Outputs second() const { return run(SECOND, forward().magnitudes); }
};

// Fails where a result is further from its formula than rounding moves it: of the forward, the backward and the second
// backward, which had the magnitudes of `got`.
template <typename T>
void follows_formulas(const Problem<T> &p, const typename Problem<T>::Outputs &got,
                      const typename Problem<T>::Outputs &first, const typename Problem<T>::Outputs &second,
                      bool also_second = true, bool none_upstream = false, bool reg_alone = false) {
    using Reals = RealOf<T>;
    ASSERT_TRUE(got.status == MMBAL_OK && first.status == MMBAL_OK && second.status == MMBAL_OK);
    const int64_t M = p.M();
    for (int64_t row = 0; row < p.B; row++) {
        Sample s = p.sample(row);
        ASSERT_TRUE((near<Reals, Reals>(got.reg[row], {s.R.value, s.R.error + 1}))) << "reg " << row;
        RoundedRow magnitudes(M);
        for (int64_t m = 0; m < M; m++) {
            ASSERT_TRUE((near<Reals, Reals>(got.shares[row * M + m], s.p[m]))) << "share " << row << " " << m;
            ASSERT_TRUE((near<Reals, Reals>(got.magnitudes[row * M + m], s.a[m]))) << "magnitude " << row << " " << m;
            magnitudes[m] = {got.magnitudes[row * M + m], std::fabs(got.magnitudes[row * M + m])};
        }
        s.set_magnitudes(magnitudes);
        std::vector<double> dshares(M), dmagnitudes(M);
        for (int64_t m = 0; m < M && !reg_alone; m++)
            dshares[m] = p.dshares[row * M + m], dmagnitudes[m] = p.dmagnitudes[row * M + m];
        s.backward(p.dreg[row], dshares.data(), dmagnitudes.data());
        auto G = p.rows(p.G, row), E = p.rows(p.E, row);
        for (int64_t m = 0; m < M && none_upstream; m++) G[m].assign(p.d[m], 0), E[m].assign(p.d[m], 0);
        const Sample::Second two = s.second(p.dreg[row], G, E);
        ASSERT_TRUE(!also_second || (near<Reals, Reals>(second.reg[row], two.reg))) << "ddreg " << row;
        for (int64_t m = 0; m < M; m++) {
            SCOPED_TRACE("row " + std::to_string(row) + " modality " + std::to_string(m));
            for (int64_t i = 0; i < p.d[m]; i++) {
                const int64_t at = row * p.d[m] + i;
                ASSERT_TRUE((near<T, Reals>(T::load(first.first[m][at]), s.dgradient(m, i)))) << "dgradient " << i;
                ASSERT_TRUE((near<T, Reals>(T::load(first.last[m][at]), s.dembedding(m, i)))) << "dembedding " << i;
                if (!also_second) continue;
                ASSERT_TRUE((near<T, Reals>(T::load(second.first[m][at]), two.g[m][i]))) << "second, of g " << i;
                ASSERT_TRUE((near<T, Reals>(T::load(second.last[m][at]), two.e[m][i]))) << "second, of e " << i;
            }
            if (!also_second) continue;
            ASSERT_TRUE((near<Reals, Reals>(second.shares[row * M + m], two.shares[m]))) << "ddshares";
            ASSERT_TRUE((near<Reals, Reals>(second.magnitudes[row * M + m], two.magnitudes[m]))) << "ddmagnitudes";
        }
    }
}

} // namespace mmbal_test
#endif
