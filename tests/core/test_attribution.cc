#include "attribution_reference.h"

namespace {

using namespace mmbal_test;

constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();
constexpr double INFINITE = std::numeric_limits<double>::infinity();

template <typename T>
void check(const Problem<T> &p, bool also_second = true, bool none_upstream = false, bool reg_alone = false) {
    using P = Problem<T>;
    const auto got = p.forward();
    const typename P::Call call = {mmbal_pool_serial(), -1, none_upstream, reg_alone, {}};
    follows_formulas(p, got, p.run(P::BACKWARD, got.magnitudes, call), p.run(P::SECOND, got.magnitudes, call),
                     also_second, none_upstream, reg_alone);
}

template <typename T>
class Attribution : public ::testing::Test {};
TYPED_TEST_SUITE(Attribution, Dtypes, DtypeNames);

TYPED_TEST(Attribution, FollowsItsFormulasToTheSecondDerivative) {
    const std::vector<std::pair<int64_t, std::vector<int64_t>>> shapes = {
        {0, {3, 4}}, {1, {1}},       {1, {1, 1}},     {6, {7, 5}},          {5, {64, 1, 33}}, {4, {16, 15, 17, 31}},
        {1, {5000}}, {2, {5000, 3}}, {3, {127, 129}}, {2, {1023, 2, 1025}}, {40, {3, 2, 4}},  {3, {8, 9, 10, 11, 12}}};
    uint64_t seed = 0;
    for (const auto &[B, d] : shapes)
        for (const auto &options : all_options())
            for (int way = 0; way < 4; way++) {
                SCOPED_TRACE(std::to_string(B) + " x " + std::to_string(d.size()) + " of " + std::to_string(d[0]) +
                             " way " + std::to_string(way) + " " + words(options));
                const Problem<TypeParam> p(B, d, options, way % 2, way / 2, ++seed);
                ASSERT_NO_FATAL_FAILURE(check(p));
            }
}

TYPED_TEST(Attribution, TakesAsManyModalitiesAsThereMayBe) {
    std::vector<int64_t> d(MMBAL_MAX_MODALITIES);
    for (size_t m = 0; m < d.size(); m++) d[m] = 1 + static_cast<int64_t>(m) % 9;
    for (const auto &options : all_options())
        ASSERT_NO_FATAL_FAILURE(check(Problem<TypeParam>(2, d, options, true, true, 5))) << words(options);
}

TYPED_TEST(Attribution, WithoutRoomForAShareNearZeroHasNoGradientThere) {
    for (double eps : {0.0, 0.05, 0.2, 0.999})
        for (const auto &options : all_options(eps)) {
            Problem<TypeParam> p(30, {9, 30, 4, 17}, options, true, true, 9);
            ASSERT_NO_FATAL_FAILURE(check(p)) << words(options);
            if (eps != 0.2) continue;
            const auto shares = p.forward().shares;
            const auto first = p.backward().first;
            int64_t below = 0;
            for (int64_t i = 0; i < p.B * 4; i++) {
                if (!p.is_present(i) || !(shares[i] < 0.2)) continue;
                below++;
                const int64_t m = i % 4, at = i / 4 * p.d[m];
                for (int64_t j = at; j < at + p.d[m]; j++) ASSERT_EQ(TypeParam::load(first[m][j]), 0);
            }
            ASSERT_GT(below, 0);
        }
}

TYPED_TEST(Attribution, HasNoGradientWhereAShareIsEps) {
    for (double eps : {0.25, 0.25 - 1e-9}) {
        Problem<TypeParam> p(1, {1, 1}, {MMBAL_POOL_L2, MMBAL_L1, eps});
        p.e[0][0] = p.e[1][0] = p.g[0][0] = TypeParam::store(1), p.g[1][0] = TypeParam::store(3);
        const auto got = p.backward();
        EXPECT_EQ(p.forward().shares[0], 0.25);
        EXPECT_EQ(TypeParam::load(got.first[0][0]) == 0, eps == 0.25);
        EXPECT_NE(TypeParam::load(got.first[1][0]), 0);
    }
}

TYPED_TEST(Attribution, OfNothingIsTheTargetAndDoesNotMove) {
    const auto zero = TypeParam::store(0);
    for (const auto &options : all_options()) {
        Problem<TypeParam> p(4, {5, 6, 7}, options);
        p.present.assign(12, 1);
        std::fill_n(p.g[0].begin() + 5, 5, zero), std::fill_n(p.g[1].begin() + 6, 6, zero); // row 1: S = 0
        std::fill_n(p.e[2].begin() + 7, 7, zero);
        p.present[6] = p.present[8] = 0;           // row 2: one is present
        std::fill_n(p.e[1].begin() + 18, 6, zero); // row 3: a modality at 0
        p.target[10] = 0.37 * (p.target[9] + p.target[11]);
        ASSERT_NO_FATAL_FAILURE(check(p)) << words(options);
        const auto got = p.forward(), first = p.backward(), second = p.second();
        const double sum = p.target[3] + p.target[4] + p.target[5];
        for (int m = 0; m < 3; m++) EXPECT_NEAR(got.shares[3 + m], p.target[3 + m] / sum, 1e-7);
        EXPECT_TRUE(got.shares[6] == 0 && got.shares[7] == 1 && got.shares[8] == 0);
        EXPECT_TRUE(got.magnitudes[6] == 0 && got.magnitudes[7] > 0 && got.magnitudes[8] == 0);
        EXPECT_TRUE(got.shares[10] == 0 && got.magnitudes[10] == 0 && got.reg[3] > 0);
        for (int row : {1, 2}) {
            EXPECT_EQ(got.reg[row], 0);
            EXPECT_EQ(second.reg[row], 0);
            for (int m = 0; m < 3; m++) {
                EXPECT_EQ(second.shares[row * 3 + m], 0);
                EXPECT_EQ(second.magnitudes[row * 3 + m], 0);
                for (int64_t i = row * p.d[m]; i < (row + 1) * p.d[m]; i++)
                    for (const auto *of : {&first, &second})
                        EXPECT_TRUE(TypeParam::load(of->first[m][i]) == 0 && TypeParam::load(of->last[m][i]) == 0);
            }
        }
        for (int64_t i = 18; i < 24; i++) EXPECT_EQ(TypeParam::load(first.first[1][i]), 0);
    }
}

TYPED_TEST(Attribution, OfASampleWithoutModalitiesIsZero) {
    Problem<TypeParam> p(3, {5, 6});
    p.present = {1, 1, 0, 0, 1, 1};
    ASSERT_EQ(p.forward().status, MMBAL_OK);
    ASSERT_NO_FATAL_FAILURE(check(p));
}

TYPED_TEST(Attribution, NeverReadsAModalityThatIsNotPresent) {
    for (const auto &options : all_options()) {
        const Problem<TypeParam> p(12, {40, 3, 17}, options, true);
        Problem<TypeParam> bad = p;
        for (int64_t i = 0; i < p.B * 3; i++)
            for (int64_t j = 0; j < p.d[i % 3] && !p.is_present(i); j++)
                for (auto *values : {&bad.g, &bad.e, &bad.G, &bad.E})
                    (*values)[i % 3][i / 3 * p.d[i % 3] + j] = TypeParam::store(j % 2 ? NOT_A_NUMBER : INFINITE);
        EXPECT_TRUE(bad.forward().same_as(p.forward()) || !"forward") << words(options);
        const auto forward = p.forward(), first = p.backward(), of_bad = bad.backward();
        EXPECT_TRUE(bad.second().same_as(p.second())) << words(options);
        EXPECT_TRUE(of_bad.same_as(first)) << words(options);
        for (int64_t i = 0; i < p.B * 3; i++)
            EXPECT_TRUE(p.is_present(i) || (forward.shares[i] == 0 && forward.magnitudes[i] == 0));
    }
}

TYPED_TEST(Attribution, IsTheSameForAnyThreadsAndWithoutSomeOutputs) {
    using P = Problem<TypeParam>;
    for (const auto &options : {DEFAULT, mmbal_attribution_options{MMBAL_POOL_RMS, MMBAL_HUBER, 0.1}}) {
        const P p(300, {70, 1, 513}, options, true);
        const auto forward = p.forward(), first = p.backward(), second = p.second();
        for_each_pool([&](const std::string &name, const mmbal_pool &pool) {
            EXPECT_TRUE(p.run(P::FORWARD, {}, {pool, -1, false, false, {}}).same_as(forward)) << name;
            EXPECT_TRUE(p.run(P::BACKWARD, forward.magnitudes, {pool, -1, false, false, {}}).same_as(first)) << name;
            EXPECT_TRUE(p.run(P::SECOND, forward.magnitudes, {pool, -1, false, false, {}}).same_as(second)) << name;
        });
        for (int64_t without : {1, 2, 4, 8, 16, 32, 21, 42, 62, 63})
            for (auto order : {P::BACKWARD, P::SECOND}) {
                const auto got = p.run(order, forward.magnitudes, {mmbal_pool_serial(), without, false, false, {}});
                const auto &all = order == P::SECOND ? second : first;
                ASSERT_EQ(got.status, MMBAL_OK);
                for (int m = 0; m < 3; m++) {
                    EXPECT_TRUE((without >> (2 * m) & 1) || same_bits(got.first[m], all.first[m])) << without;
                    EXPECT_TRUE((without >> (2 * m + 1) & 1) || same_bits(got.last[m], all.last[m])) << without;
                }
                EXPECT_TRUE(same_bits(got.reg, all.reg) && same_bits(got.shares, all.shares));
            }
        for (auto order : {P::FORWARD, P::BACKWARD, P::SECOND}) {
            FailingPool failing(0);
            Guarded<typename TypeParam::Real> out(900);
            std::vector<mmbal_attributed> all;
            for (int m = 0; m < 3; m++)
                all.push_back({p.g[m].data(), p.e[m].data(), p.d[m], nullptr, nullptr, nullptr, nullptr});
            const mmbal_attribution of = {all.data(), p.target.data(),  300,    p.present.data(), 300,
                                          3,          TypeParam::dtype, options};
            const mmbal_pool pool = failing.pool();
            std::vector<typename TypeParam::Real> reg(300), shares(900), magnitudes = forward.magnitudes;
            EXPECT_EQ(order == P::FORWARD ? mmbal_attribution_reg(&of, reg.data(), shares.data(), out.data(), &pool)
                      : order == P::BACKWARD
                          ? mmbal_attribution_reg_backward(&of, p.dreg.data(), p.dshares.data(), p.dmagnitudes.data(),
                                                           magnitudes.data(), &pool)
                          : mmbal_attribution_reg_backward_backward(&of, p.dreg.data(), p.dshares.data(),
                                                                    p.dmagnitudes.data(), magnitudes.data(), reg.data(),
                                                                    shares.data(), out.data(), &pool),
                      MMBAL_UNSUPPORTED)
                << order;
        }
    }
}

TYPED_TEST(Attribution, TakesNothingUpstreamAsZero) {
    for (const auto &options : all_options()) {
        const Problem<TypeParam> p(3, {5, 20}, options);
        for (bool reg_alone : {false, true}) {
            ASSERT_NO_FATAL_FAILURE(check(p, true, true, reg_alone));
            ASSERT_NO_FATAL_FAILURE(check(p, true, false, reg_alone));
        }
    }
}

TYPED_TEST(Attribution, NeitherOverflowsNorVanishes) {
    std::vector<std::pair<double, double>> scales = {{1e-3, 1e-2}, {3e-2, 1e-3}}; // float16: alpha^2 would be 0
    if (TypeParam::dtype != MMBAL_F16)
        scales = {{1e-25, 1e25}, {1e25, 1e-25}, {1e18, 1e18}, {1e-18, 1e-18}, {1e-25, 1e-10}, {1e-10, 1e25}};
    for (const auto &[g, e] : scales)
        for (const auto &options : all_options()) {
            SCOPED_TRACE(std::to_string(std::log10(g)) + " " + std::to_string(std::log10(e)) + " " + words(options));
            const Problem<TypeParam> p(3, {50, 37, 4}, options, true, false, 3, g, e);
            ASSERT_NO_FATAL_FAILURE(check(p, TypeParam::dtype != MMBAL_F16));
        }
}

// Shares are ratios: they and their gradients stay right where a float32 holds no magnitude.
TYPED_TEST(Attribution, NeedsNoRoomForMagnitudes) {
    if (TypeParam::dtype == MMBAL_F16 || TypeParam::dtype == MMBAL_F64) GTEST_SKIP() << "there is room";
    using P = Problem<TypeParam>;
    for (double scale : {1e-25, 3e-20, 1e25})
        for (const auto &options : all_options()) {
            SCOPED_TRACE(std::to_string(std::log10(scale)) + " " + words(options));
            const P p(4, {50, 37}, options, false, false, 3, scale, scale);
            const typename P::Call reg_alone = {mmbal_pool_serial(), -1, false, true, {}};
            const auto got = p.forward(), first = p.run(P::BACKWARD, got.magnitudes, reg_alone),
                       second = p.run(P::SECOND, got.magnitudes, reg_alone);
            for (int64_t row = 0; row < 4; row++) {
                Sample s = p.sample(row);
                const double zero[] = {0, 0};
                s.backward(p.dreg[row], zero, zero);
                const Sample::Second two = s.second(p.dreg[row], p.rows(p.G, row), p.rows(p.E, row));
                ASSERT_TRUE((near<F32, F32>(got.reg[row], {s.R.value, s.R.error + 1})));
                EXPECT_TRUE((near<F32, F32>(second.reg[row], two.reg))) << "ddreg";
                for (int m = 0; m < 2; m++) {
                    ASSERT_TRUE((near<F32, F32>(got.shares[row * 2 + m], s.p[m])));
                    ASSERT_EQ(got.magnitudes[row * 2 + m], static_cast<float>(s.a[m].value));
                    EXPECT_TRUE((near<F32, F32>(second.shares[row * 2 + m], two.shares[m]))) << "ddshares";
                    for (int64_t i = 0; i < p.d[m]; i++) {
                        const int64_t at = row * p.d[m] + i;
                        const auto of = [&](const auto &values) { return TypeParam::load(values[m][at]); };
                        ASSERT_TRUE((near<TypeParam, F32>(of(first.first), s.dgradient(m, i)))) << "dgradient";
                        ASSERT_TRUE((near<TypeParam, F32>(of(first.last), s.dembedding(m, i)))) << "dembedding";
                        ASSERT_TRUE((near<TypeParam, F32>(of(second.first), two.g[m][i]))) << "second, of g";
                        ASSERT_TRUE((near<TypeParam, F32>(of(second.last), two.e[m][i]))) << "second, of e";
                    }
                }
            }
        }
}

// Both backward passes against central differences of what they are derivatives of.
TEST(AttributionDerivatives, AreThoseOfDifferences) {
    using P = Problem<F64>;
    const auto dot = [](const std::vector<double> &a, const std::vector<double> &b) {
        double sum = 0;
        for (size_t i = 0; i < a.size(); i++) sum += a[i] * b[i];
        return sum;
    };
    const auto of_forward = [&](const P &p) {
        const auto out = p.forward();
        return dot(out.reg, p.dreg) + dot(out.shares, p.dshares) + dot(out.magnitudes, p.dmagnitudes);
    };
    const auto of_backward = [&](const P &p) {
        const auto out = p.backward();
        double sum = 0;
        for (int64_t m = 0; m < p.M(); m++) sum += dot(out.first[m], p.G[m]) + dot(out.last[m], p.E[m]);
        return sum;
    };
    for (double eps : {1e-12, 0.2})
        for (const auto &options : all_options(eps)) {
            P p(3, {3, 1, 4}, options, true, false, 4);
            SCOPED_TRACE(words(options));
            const auto first = p.backward(), second = p.second();
            const auto difference = [&](double &at, const auto &function) {
                const double before = at, h = 1e-6;
                at = before + h;
                const double above = function(p);
                at = before - h;
                const double below = function(p);
                at = before;
                return (above - below) / (2 * h);
            };
            const auto expect = [&](double &at, double got, const auto &function, const char *what) {
                const double expected = difference(at, function);
                EXPECT_NEAR(got, expected, 2e-7 * (1 + std::fabs(expected))) << what;
            };
            for (int64_t m = 0; m < 3; m++)
                for (size_t i = 0; i < p.g[m].size(); i++) {
                    // A share of at most eps has no gradient, though it does depend on these.
                    if (eps == 1e-12) expect(p.g[m][i], first.first[m][i], of_forward, "dgradient");
                    if (eps == 1e-12) expect(p.e[m][i], first.last[m][i], of_forward, "dembedding");
                    if (eps == 1e-12) expect(p.g[m][i], second.first[m][i], of_backward, "second, of g");
                    if (eps == 1e-12) expect(p.e[m][i], second.last[m][i], of_backward, "second, of e");
                }
            for (int64_t i = 0; i < 3; i++) expect(p.dreg[i], second.reg[i], of_backward, "ddreg");
            for (int64_t i = 0; i < 9; i++) expect(p.dshares[i], second.shares[i], of_backward, "ddshares");
            for (int64_t i = 0; i < 9; i++) expect(p.dmagnitudes[i], second.magnitudes[i], of_backward, "ddmagnitudes");
        }
}

TEST(AttributionErrors, RefuseWhatIsOutsideTheContractAndTouchNothing) {
    using P = Problem<F32>;
    using Modalities = std::vector<mmbal_attributed>;
    const P good(3, {4, 5});
    const auto magnitudes = good.forward().magnitudes;
    const auto expect = [&](mmbal_status expected, auto change, auto change_problem) {
        P p = good;
        change_problem(p);
        for (auto order : {P::FORWARD, P::BACKWARD, P::SECOND})
            EXPECT_EQ(p.run(order, magnitudes, {mmbal_pool_serial(), -1, false, false, change}).status, expected)
                << order;
    };
    const auto same = [](P &) {};
    const auto refuse = [&](auto change) { expect(MMBAL_INVALID_ARGUMENT, change, same); };
    expect(MMBAL_OK, [](mmbal_attribution &, Modalities &) {}, same);
    expect(MMBAL_UNSUPPORTED, [](auto &of, Modalities &) { of.dtype = enum_of<mmbal_dtype>(9); }, same);
    refuse([](auto &of, Modalities &) { of.B = -1; });
    refuse([](auto &of, Modalities &) { of.M = 0; });
    refuse([](auto &of, Modalities &) { of.target_rows = 2; });
    refuse([](auto &of, Modalities &) { of.target_rows = 0; });
    refuse([](auto &of, Modalities &) { of.options.pool = enum_of<mmbal_attribution_pool>(2); });
    refuse([](auto &of, Modalities &) { of.options.penalty = enum_of<mmbal_attribution_penalty>(3); });
    refuse([](auto &, Modalities &all) { all[1].d = 0; });
    refuse([](auto &of, Modalities &all) {
        all.resize(MMBAL_MAX_MODALITIES + 1, all[0]);
        of.M = MMBAL_MAX_MODALITIES + 1;
    });
    for (double eps : {-1e-9, 1.0, 2.0, NOT_A_NUMBER, INFINITE})
        refuse([=](auto &of, Modalities &) { of.options.eps = eps; });
    for (double r : {-1e-9, NOT_A_NUMBER, INFINITE})
        expect(MMBAL_INVALID_ARGUMENT, nullptr, [=](P &p) { p.target[5] = r; });
    expect(MMBAL_INVALID_ARGUMENT, nullptr, [](P &p) { p.target[4] = p.target[5] = 0; });
    expect(MMBAL_INVALID_ARGUMENT, nullptr, [](P &p) {
        p.present = {1, 1, 1, 0, 1, 1};
        p.target[2] = 0; // of the one that is present
    });
    expect(MMBAL_OK, nullptr, [](P &p) {
        p.present = {1, 1, 1, 0, 1, 1};
        p.target[3] = 0;
    });
    const P none(0, {4, 5});
    for (int64_t rows : {0, 1})
        for (auto order : {P::FORWARD, P::BACKWARD, P::SECOND})
            EXPECT_EQ(none.run(order, {},
                               {mmbal_pool_serial(), -1, false, false,
                                [=](auto &of, auto &) { of.target_rows = rows, of.target = good.target.data(); }})
                          .status,
                      MMBAL_OK);
}

} // namespace
