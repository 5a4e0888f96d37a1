// A call of mmbal_attribution_linear, and what mmbal/attribution.h promises of it, sample by sample.
#ifndef MMBAL_TESTS_ATTRIBUTION_LINEAR_REFERENCE_H
#define MMBAL_TESTS_ATTRIBUTION_LINEAR_REFERENCE_H

#include <numeric>

#include "attribution_reference.h"

namespace mmbal_test {

struct Way {
    mmbal_attribution_options options = DEFAULT;
    mmbal_score score = MMBAL_SCORE_ODDS;
    bool masked = false, one_target = false, classes = false;
};

template <typename T>
struct Linear {
    using Stored = typename T::Stored;
    using Real = typename T::Real;
    using Reals = RealOf<T>;
    int64_t B, C;
    std::vector<int64_t> d;
    Way way;
    std::vector<std::vector<Stored>> e, W; // [M] of [B, d] and of [C, d]
    std::vector<Stored> logits;
    std::vector<int64_t> classes; // empty: the largest logit's
    std::vector<double> target;
    std::vector<uint8_t> present;
    std::vector<Real> dreg;

    Linear(int64_t b, int64_t c, std::vector<int64_t> sizes, Way w = {}, uint64_t seed = 1, double margin = 0)
        : B(b), C(c), d(std::move(sizes)), way(w) {
        Random random(seed);
        for (int64_t width : d) {
            const double strength = random.uniform(0.3, 1);
            e.push_back(random.tensor<T>(B * width, 2 * strength));
            W.push_back(random.tensor<T>(C * width, 1));
        }
        logits = random.tensor<T>(B * C, 3);
        for (int64_t row = 0; row < B && margin > 0; row++) logits[row * C + random.below(C)] = T::store(3 + margin);
        for (int64_t row = 0; row < B && way.classes; row++) classes.push_back(random.below(C));
        if (way.masked)
            for (int64_t i = 0; i < B * M(); i++) present.push_back(random.below(3) != 0);
        for (int64_t row = 0; way.masked && row < B; row++) present[row * M() + random.below(M())] = 1;
        for (int64_t row = 0; row < B; row++) dreg.push_back(static_cast<Real>(random.uniform(-1, 1)));
        for (bool again = true; again;) {
            target.clear();
            for (int64_t i = 0; i < (way.one_target ? 1 : B) * M(); i++) target.push_back(random.uniform(0.1, 1));
            again = false;
            for (int64_t row = 0; row < B; row++) again = again || sample(row).near_a_jump();
        }
    }
    int64_t M() const { return static_cast<int64_t>(d.size()); }
    double z(int64_t row, int64_t c) const { return T::load(logits[row * C + c]); }
    int64_t chosen(int64_t row) const {
        if (!classes.empty()) return classes[row];
        int64_t best = 0;
        for (int64_t c = 1; c < C; c++)
            if (z(row, c) > z(row, best)) best = c;
        return best;
    }
    // softmax over the other classes
    RoundedRow pi(int64_t row) const {
        RoundedRow p(C);
        const int64_t top = chosen(row);
        if (way.score == MMBAL_SCORE_LOGIT || C == 1) return p;
        double most = -std::numeric_limits<double>::infinity();
        Total total(1);
        for (int64_t c = 0; c < C; c++)
            if (c != top) most = std::max(most, z(row, c));
        for (int64_t c = 0; c < C; c++)
            if (c != top) total.add(p[c] = exponential(Rounded(z(row, c)) - most));
        for (Rounded &value : p) value = value / total.get();
        return p;
    }
    RoundedRow coefficients(int64_t row) const {
        RoundedRow coef = pi(row);
        for (Rounded &value : coef) value.value = -value.value;
        coef[chosen(row)] = way.score == MMBAL_SCORE_ODDS && C == 1 && z(row, 0) < 0 ? -1 : 1;
        return coef;
    }
    Sample sample(int64_t row) const {
        Sample s;
        s.options = way.options;
        const RoundedRow coef = coefficients(row);
        for (int64_t m = 0; m < M(); m++) {
            s.g.emplace_back(), s.e.emplace_back();
            for (int64_t i = 0; i < d[m]; i++) {
                Total g(1);
                for (int64_t c = 0; c < C; c++) g.add(coef[c] * T::load(W[m][c * d[m] + i]));
                s.g[m].push_back(g.get()), s.e[m].push_back(T::load(e[m][row * d[m] + i]));
            }
            s.target.push_back(target[(way.one_target ? 0 : row) * M() + m]);
            s.present.push_back(present.empty() || present[row * M() + m]);
        }
        s.forward();
        return s;
    }

    struct Outputs {
        mmbal_status status;
        std::vector<Real> reg, shares, magnitudes;
        std::vector<std::vector<Stored>> dW;
        std::vector<Stored> db;
        bool same_as(const Outputs &o) const {
            bool same = same_bits(reg, o.reg) && same_bits(shares, o.shares) && same_bits(magnitudes, o.magnitudes);
            for (size_t m = 0; m < dW.size(); m++) same = same && same_bits(dW[m], o.dW[m]);
            return same && same_bits(db, o.db);
        }
    };
    using Change = std::function<void(mmbal_attribution &, mmbal_linear_head &)>;
    // side_by_side: W and dW of all modalities are the columns of one matrix.
    Outputs run(const mmbal_pool &pool = mmbal_pool_serial(), const Change &change = nullptr,
                bool side_by_side = false) const {
        std::vector<mmbal_attributed> all;
        std::vector<const void *> weights;
        std::vector<Guarded<Stored>> dW;
        std::vector<void *> dweights;
        const int64_t width = side_by_side ? std::accumulate(d.begin(), d.end(), int64_t{0}) : 0;
        std::vector<Stored> joined(C * width);
        for (int64_t m = 0; m < M() && !(side_by_side && m); m++) dW.emplace_back(C * (width ? width : d[m]));
        for (int64_t m = 0, from = 0; m < M(); from += d[m++]) {
            all.push_back({nullptr, e[m].data(), d[m], nullptr, nullptr, nullptr, nullptr});
            for (int64_t c = 0; c < C && width; c++)
                std::copy_n(W[m].begin() + c * d[m], d[m], joined.begin() + c * width + from);
            weights.push_back(width ? joined.data() + from : W[m].data());
            dweights.push_back(width ? dW[0].data() + from : dW[m].data());
        }
        mmbal_attribution of = {
            all.data(), target.data(), way.one_target ? 1 : B, present.empty() ? nullptr : present.data(), B, M(),
            T::dtype,   way.options};
        mmbal_linear_head head = {weights.data(), width, logits.data(), classes.empty() ? nullptr : classes.data(), C,
                                  way.score};
        Guarded<unsigned char> workspace(mmbal_attribution_linear_workspace(&of, C, &pool));
        if (change) change(of, head);
        Guarded<Real> reg(B), shares(B * M()), magnitudes(B * M());
        Guarded<Stored> db(C);
        const mmbal_status status =
            mmbal_attribution_linear(&of, &head, dreg.data(), reg.data(), shares.data(), magnitudes.data(),
                                     dweights.data(), db.data(), workspace.data(), &pool);
        EXPECT_TRUE(reg.intact() && shares.intact() && magnitudes.intact() && db.intact() && workspace.intact());
        bool untouched = reg.untouched() && shares.untouched() && magnitudes.untouched() && db.untouched();
        Outputs out = {status, reg.values(), shares.values(), magnitudes.values(), {}, db.values()};
        for (auto &of_one : dW) {
            EXPECT_TRUE(of_one.intact());
            untouched = untouched && of_one.untouched();
            out.dW.push_back(of_one.values());
        }
        EXPECT_TRUE(status == MMBAL_OK || untouched);
        return out;
    }
};

// Fails where an output is further from its formula than rounding moves it.
template <typename T>
void follows_formulas(const Linear<T> &p, const typename Linear<T>::Outputs &got) {
    using Reals = RealOf<T>;
    ASSERT_EQ(got.status, MMBAL_OK);
    const int64_t M = p.M(), C = p.C;
    std::vector<std::vector<Total>> dW;
    std::vector<Total> db(C, Total(1));
    for (int64_t m = 0; m < M; m++) dW.emplace_back(C * p.d[m], Total(1));
    const std::vector<double> none(M);
    for (int64_t row = 0; row < p.B; row++) {
        Sample s = p.sample(row);
        ASSERT_TRUE((near<Reals, Reals>(got.reg[row], {s.R.value, s.R.error + 1}))) << "reg " << row;
        for (int64_t m = 0; m < M; m++) {
            ASSERT_TRUE((near<Reals, Reals>(got.shares[row * M + m], s.p[m]))) << "share " << row << " " << m;
            ASSERT_TRUE((near<Reals, Reals>(got.magnitudes[row * M + m], s.a[m]))) << "magnitude " << row << " " << m;
        }
        s.backward(p.dreg[row], none.data(), none.data());
        const RoundedRow coef = p.coefficients(row), pi = p.pi(row);
        std::vector<Total> along(C, Total(1));
        Total mean(1);
        for (int64_t c = 0; c < C; c++) {
            for (int64_t m = 0; m < M; m++)
                for (int64_t i = 0; i < p.d[m]; i++) along[c].add(s.dgradient(m, i) * T::load(p.W[m][c * p.d[m] + i]));
            mean.add(pi[c] * along[c].get());
        }
        for (int64_t c = 0; c < C; c++) {
            const Rounded zeta = pi[c] * (mean.get() - along[c].get());
            db[c].add(zeta);
            for (int64_t m = 0; m < M; m++)
                for (int64_t i = 0; i < p.d[m]; i++) {
                    dW[m][c * p.d[m] + i].add(coef[c] * s.dgradient(m, i));
                    dW[m][c * p.d[m] + i].add(zeta * s.e[m][i]);
                }
        }
    }
    for (int64_t c = 0; c < C; c++) ASSERT_TRUE((near<T, Reals>(T::load(got.db[c]), db[c].get()))) << "dbias " << c;
    for (int64_t m = 0; m < M; m++)
        for (int64_t i = 0; i < C * p.d[m]; i++)
            ASSERT_TRUE((near<T, Reals>(T::load(got.dW[m][i]), dW[m][i].get()))) << "dweights " << m << " " << i;
}

} // namespace mmbal_test
#endif
