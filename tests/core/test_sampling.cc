#include "mmbal/sampling.h"

#include <map>

#include "sampling_reference.h"

namespace {

using namespace mmbal_test;

TEST(UnitWords, ComeFromTheCounterThatIsWrittenDown) {
    for (int64_t seed : {int64_t{0}, int64_t{-7}, INT64_MAX})
        for (int64_t step : {int64_t{0}, (INT64_C(5) << 32) + 3, MMBAL_STEPS - 1})
            for (int64_t unit : {int64_t{0}, int64_t{6}, (INT64_C(1) << 46) - 1, (INT64_C(77) << 36) + 41})
                for (mmbal_purpose purpose : {MMBAL_DRAW_UNIT, MMBAL_DRAW_ORDER, MMBAL_DRAW_START}) {
                    uint32_t words[4];
                    mmbal_unit_words(seed, step, 0xFFFFFFFE, purpose, unit / 4, words);
                    EXPECT_EQ(words[unit % 4], word_of(seed, step, 0xFFFFFFFE, purpose, unit));
                }
}

// Weights of which any subset of three is drawn with a known probability, and how often each was.
class Subsets {
public:
    static constexpr double WEIGHTS[] = {1, 2, 3, 5, 8, 13};
    template <typename Mask>
    void add(const Mask *mask) {
        int subset = 0;
        for (int n = 0; n < 6; n++) subset |= (mask[n] != 0) << n;
        count_[subset]++, draws_++;
    }
    // Drawing one by one, in every order
    static std::map<int, double> law() {
        std::map<int, double> law;
        for (int a = 0; a < 6; a++)
            for (int b = 0; b < 6; b++)
                for (int c = 0; c < 6; c++)
                    if (a != b && b != c && a != c)
                        law[1 << a | 1 << b | 1 << c] += WEIGHTS[a] / 32 * WEIGHTS[b] / (32 - WEIGHTS[a]) * WEIGHTS[c] /
                                                         (32 - WEIGHTS[a] - WEIGHTS[b]);
        return law;
    }
    void check() {
        double statistic = 0;
        int64_t seen = 0;
        for (auto [subset, probability] : law()) {
            const double expected = probability * static_cast<double>(draws_);
            statistic += std::pow(static_cast<double>(count_[subset]) - expected, 2) / expected;
            seen += count_[subset];
        }
        EXPECT_EQ(seen, draws_) << "a subset of another size";
        EXPECT_LT(statistic, 50.80) << "19 degrees of freedom, one draw in 10,000";
        const double inclusion[] = {.138116, .266473, .383836, .579785, .751533, .880258};
        for (int n = 0; n < 6; n++) {
            double got = 0;
            for (auto [subset, times] : count_) got += static_cast<double>(times) * (subset >> n & 1);
            const double p = inclusion[n], z = got / static_cast<double>(draws_) - p;
            EXPECT_LT(std::fabs(z), 4.5 * std::sqrt(p * (1 - p) / static_cast<double>(draws_))) << n;
        }
    }

private:
    std::map<int, int64_t> count_;
    int64_t draws_ = 0;
};

TEST(Subsets, HaveTheProbabilitiesOfTheEnumeration) {
    auto law = Subsets::law();
    EXPECT_NEAR(law[0b000111], .001342, 5e-7);
    EXPECT_NEAR(law[0b101010], .057998, 5e-7);
    EXPECT_NEAR(law[0b111000], .310696, 5e-7);
}

template <typename T>
struct Rows {
    using Real = typename T::Real;
    int64_t S, N, seed = 1, step = 0;
    std::vector<Real> weights = {};
    std::vector<int64_t> k = {};

    static Rows random(int64_t S, int64_t N, uint64_t seed) {
        Random random(seed);
        Rows rows{S, N, static_cast<int64_t>(random.bits()), random.below(MMBAL_STEPS)};
        for (double w : random_energies(S * N, random)) rows.weights.push_back(static_cast<Real>(w));
        for (int64_t s = 0; s < S; s++) rows.k.push_back(s == 1 ? N : s == 2 ? 0 : random.below(N + 1));
        return rows;
    }
    mmbal_status run(const mmbal_pool &pool, std::vector<uint8_t> *mask) const {
        Guarded<uint8_t> out(S * N);
        Guarded<unsigned char> workspace(mmbal_weighted_sample_workspace(N, &pool));
        const mmbal_status status = mmbal_weighted_sample(T::dtype, weights.data(), k.data(), S, N, seed, step,
                                                          out.data(), workspace.data(), &pool);
        EXPECT_TRUE(out.intact() && workspace.intact());
        EXPECT_TRUE(status == MMBAL_OK || out.untouched());
        *mask = out.values();
        return status;
    }
    std::vector<uint8_t> run() const {
        std::vector<uint8_t> mask;
        EXPECT_EQ(run(mmbal_pool_serial(), &mask), MMBAL_OK);
        return mask;
    }
    std::vector<uint8_t> plain() const {
        std::vector<uint8_t> mask;
        for (int64_t s = 0; s < S; s++) {
            std::vector<double> keys;
            const std::vector<double> w(weights.begin() + s * N, weights.begin() + (s + 1) * N);
            for (int64_t n = 0; n < N; n++)
                keys.push_back(exponential(word_of(seed, step, 0, MMBAL_DRAW_UNIT, s * N + n)) / w[n]);
            const auto row = smallest(keys, w, k[s]);
            mask.insert(mask.end(), row.begin(), row.end());
        }
        return mask;
    }
};

template <typename T>
class WeightedSample : public ::testing::Test {};
using Reals = ::testing::Types<F32, F64>;
TYPED_TEST_SUITE(WeightedSample, Reals, DtypeNames);

TYPED_TEST(WeightedSample, HasTheSmallestKeysForAnyThreads) {
    for (auto [S, N] : std::vector<std::pair<int64_t, int64_t>>{
             {0, 5}, {3, 0}, {1, 1}, {5, 2}, {4, 7}, {300, 33}, {5, 1000}, {7, 4099}, {1, 70001}, {3, 20000}}) {
        const auto rows = Rows<TypeParam>::random(S, N, static_cast<uint64_t>(S * 7 + N));
        const auto expected = rows.plain();
        for_each_pool([&](const std::string &name, const mmbal_pool &pool) {
            std::vector<uint8_t> mask;
            ASSERT_EQ(rows.run(pool, &mask), MMBAL_OK);
            EXPECT_TRUE(mask == expected) << name << ", " << S << " x " << N;
        });
    }
}

TYPED_TEST(WeightedSample, DrawsSubsetsWithTheLawOfDrawingOneByOne) {
    const std::vector<typename TypeParam::Real> weights(Subsets::WEIGHTS, Subsets::WEIGHTS + 6);
    Subsets by_step, by_seed, by_row;
    Rows<TypeParam> one{1, 6, 3, 0, weights, {3}}, many{20000, 6, 4, 0};
    for (int64_t i = 0; i < 20000; i++) {
        one.seed = 3, one.step = i;
        by_step.add(one.run().data());
        one.seed = i << 20, one.step = 0;
        by_seed.add(one.run().data());
        many.weights.insert(many.weights.end(), weights.begin(), weights.end()), many.k.push_back(3);
    }
    const auto mask = many.run();
    for (int64_t i = 0; i < 20000; i++) by_row.add(&mask[i * 6]);
    for (Subsets *subsets : {&by_step, &by_seed, &by_row}) subsets->check();
}

// Among 200,000 words some are equal; where the k-th and the next have the same key, the lower unit is drawn.
TYPED_TEST(WeightedSample, GivesEqualKeysToTheLowerUnit) {
    const int64_t N = 200000;
    Rows<TypeParam> rows{1, N, 9, 2, std::vector<typename TypeParam::Real>(N, 0.5)};
    std::vector<std::pair<uint32_t, int64_t>> order;
    for (int64_t n = 0; n < N; n++) order.emplace_back(word_of(9, 2, 0, MMBAL_DRAW_UNIT, n), n);
    std::sort(order.begin(), order.end());
    int64_t ties = 0;
    for (int64_t i = 1; i < N; i++) {
        if (order[i - 1].first != order[i].first) continue;
        rows.k = {i};
        const auto mask = rows.run();
        EXPECT_TRUE(mask[order[i - 1].second] && !mask[order[i].second]);
        EXPECT_EQ(std::count(mask.begin(), mask.end(), 1), i);
        ties++;
    }
    EXPECT_GT(ties, 0);
}

TYPED_TEST(WeightedSample, NeverDrawsWeightZeroAndAlwaysAPositiveOne) {
    using Real = typename TypeParam::Real;
    const Real tiny = std::numeric_limits<Real>::denorm_min(), huge = std::numeric_limits<Real>::max();
    Rows<TypeParam> rows{4, 5};
    rows.weights = {0, tiny, -Real{0}, 1,    huge, 0,    tiny, tiny, 0, tiny, //
                    0, 0,    0,        -0.0, 0,    huge, huge, huge, 0, tiny};
    rows.k = {4, 5, 2, 3};
    for (rows.step = 0; rows.step < 200; rows.step++)
        ASSERT_EQ(rows.run(), (std::vector<uint8_t>{0, 1, 0, 1, 1, 0, 1, 1, 0, 1, 0, 0, 0, 0, 0, 1, 1, 1, 0, 0}));
}

TYPED_TEST(WeightedSample, DrawsEachRowByItselfAndAnewForEverySeedAndStep) {
    auto rows = Rows<TypeParam>::random(4, 300, 5);
    rows.k = {100, 100, 100, 100};
    const auto first = rows.run();
    auto other = rows;
    for (int64_t n = 0; n < 300; n++) other.weights[n] = 1, other.weights[600 + n] = 2;
    other.k[2] = 7;
    const auto changed = other.run();
    for (int64_t s : {1, 3})
        EXPECT_TRUE(std::equal(first.begin() + s * 300, first.begin() + (s + 1) * 300, changed.begin() + s * 300));
    EXPECT_NE(first, changed);
    other = rows, other.seed ^= INT64_C(1) << 40;
    EXPECT_NE(first, other.run());
    other = rows, other.step ^= INT64_C(1) << 40;
    EXPECT_NE(first, other.run());
}

TYPED_TEST(WeightedSample, RefusesWhatIsOutsideTheContract) {
    const auto good = Rows<TypeParam>::random(4, 3000, 1);
    std::vector<uint8_t> mask;
    const auto status = [&](auto change) {
        auto rows = good;
        change(rows);
        return rows.run(mmbal_pool_serial(), &mask);
    };
    EXPECT_EQ(status([](auto &) {}), MMBAL_OK);
    for (double bad : {-1e-30, INFINITE, -INFINITE, NOT_A_NUMBER})
        for (int64_t at : {0, 7777, 11999})
            EXPECT_EQ(status([=](auto &r) { r.weights[at] = static_cast<typename TypeParam::Real>(bad); }),
                      MMBAL_INVALID_ARGUMENT)
                << bad << " " << at;
    for (int64_t bad : {-1, 3001}) EXPECT_EQ(status([=](auto &r) { r.k[3] = bad; }), MMBAL_INVALID_ARGUMENT) << bad;
    for (int64_t bad : {int64_t{-1}, MMBAL_STEPS})
        EXPECT_EQ(status([=](auto &r) { r.step = bad; }), MMBAL_INVALID_ARGUMENT) << bad;
    const mmbal_pool pool = mmbal_pool_serial();
    const auto sizes = [&](mmbal_dtype dtype, int64_t S, int64_t N) {
        return mmbal_weighted_sample(dtype, nullptr, nullptr, S, N, 0, 0, nullptr, nullptr, &pool);
    };
    EXPECT_EQ(sizes(TypeParam::dtype, -1, 2), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(sizes(TypeParam::dtype, 2, -1), MMBAL_INVALID_ARGUMENT);
    for (mmbal_dtype dtype : {MMBAL_BF16, MMBAL_F16}) EXPECT_EQ(sizes(dtype, 1, 1), MMBAL_UNSUPPORTED);
}

template <typename T>
class CappedProbabilities : public ::testing::Test {
public:
    using Real = typename T::Real;
    struct Result {
        mmbal_status status;
        std::vector<Real> p;
        std::vector<double> c;
    };
    static Result run(const std::vector<double> &weights, const std::vector<double> &kappa, double mix,
                      const mmbal_pool &pool = mmbal_pool_serial()) {
        const auto S = static_cast<int64_t>(kappa.size()), N = S ? static_cast<int64_t>(weights.size()) / S : 0;
        const std::vector<Real> narrow(weights.begin(), weights.end());
        Guarded<Real> p(S * N);
        Guarded<double> c(S);
        Guarded<unsigned char> workspace(mmbal_waterfill_workspace(N, &pool));
        const mmbal_status status = mmbal_waterfill(T::dtype, narrow.data(), kappa.data(), S, N, mix, p.data(),
                                                    c.data(), workspace.data(), &pool);
        EXPECT_TRUE(p.intact() && c.intact() && workspace.intact());
        EXPECT_TRUE(status == MMBAL_OK || (p.untouched() && c.untouched()));
        return {status, p.values(), c.values()};
    }
    // weights are exact in Real
    static void check(const std::vector<double> &weights, double kappa, double mix) {
        SCOPED_TRACE("N " + std::to_string(weights.size()) + " kappa " + std::to_string(kappa) + " mix " +
                     std::to_string(mix));
        const Waterfill plain(weights, kappa, mix);
        const Result got = run(weights, {kappa}, mix);
        ASSERT_EQ(got.status, MMBAL_OK);
        double sum = 0;
        long double open = 0; // what is not capped: c is as sure as this is large
        for (size_t n = 0; n < weights.size(); n++) {
            const auto p = static_cast<double>(plain.p[n]);
            ASSERT_NEAR(got.p[n], p, 2 * T::real_error * p + 1e-10 * p + 1e-14) << n;
            ASSERT_TRUE(got.p[n] <= 1 && (plain.q[n] > 0 || got.p[n] == 0)) << n;
            sum += got.p[n], open += p < 1 ? p : 0;
            const double c = got.p[n] / static_cast<double>(plain.q[n]);
            ASSERT_TRUE(got.p[n] == 1 || got.p[n] < 1e-10 || std::fabs(c / got.c[0] - 1) < 2 * T::real_error + 1e-10);
        }
        EXPECT_NEAR(sum, kappa, (2 * T::real_error + 1e-12) * kappa);
        const bool all = kappa > 0 && kappa == static_cast<double>(plain.positive);
        EXPECT_TRUE(!all || got.c[0] == INFINITE) << got.c[0];
        EXPECT_TRUE(all || open < 1e-5L || std::fabs(got.c[0] / static_cast<double>(plain.c) - 1) < 1e-9) << got.c[0];
    }
};
TYPED_TEST_SUITE(CappedProbabilities, Reals, DtypeNames);

TYPED_TEST(CappedProbabilities, HaveTheGoldenValues) {
    const auto got = TestFixture::run({1, 2, 3, 5, 8, 13}, {3}, 0);
    ASSERT_EQ(got.status, MMBAL_OK);
    const double expected[] = {2. / 19, 4. / 19, 6. / 19, 10. / 19, 16. / 19, 1};
    for (int n = 0; n < 6; n++) EXPECT_NEAR(got.p[n], expected[n], 2 * TypeParam::real_error);
    EXPECT_NEAR(got.c[0], 64. / 19, 1e-14);
}

TYPED_TEST(CappedProbabilities, EqualTheBisection) {
    std::vector<std::vector<double>> all = {{},
                                            {3},
                                            {0},
                                            {1, 2, 3, 5, 8, 13},
                                            {0, 0, 0, 0},
                                            {0, 0x1p-60, 1, 0},
                                            std::vector<double>(7, 0.5),
                                            std::vector<double>(1000, 3),
                                            {0x1p99, 1, 0x1p-99},
                                            {0x1p99, 0x1p99, 0x1p-99, 0x1p-99, 0x1p-99, 1}};
    for (double factor : {0.5, 0.75, 1 - 0x1p-10}) {
        std::vector<double> geometric = {0x1p99};
        while (geometric.size() < 180) geometric.push_back(static_cast<float>(geometric.back() * factor));
        all.push_back(geometric);
        std::reverse(geometric.begin(), geometric.end());
        all.push_back(geometric);
    }
    Random random(2);
    for (int64_t N : {2, 5, 33, 300, 5000})
        for (double decades : {0.3, 4.0, 30.0}) {
            all.push_back(random_energies(N, random, decades, N % 2 ? 4 : 1000000));
            for (double &w : all.back()) w = static_cast<float>(w);
        }
    for (const auto &weights : all)
        for (double mix : {0.0, 0.5, 1.0, 1e-3}) {
            const auto N = static_cast<double>(weights.size());
            const double most = static_cast<double>(Waterfill(weights, 0, mix).positive);
            for (double kappa : {0.0, 1e-9 * N, 0.1 * N, 0.5 * N, 0.9 * N, 0.999999 * N, N, 1.0, 2.0, most - 1, most})
                if (kappa >= 0 && kappa <= most) { // all that are possible at most: c = infinity
                    ASSERT_NO_FATAL_FAILURE(TestFixture::check(weights, kappa, mix));
                }
        }
}

// Of whole numbers, some reach 1 exactly, or would without rounding.
TYPED_TEST(CappedProbabilities, EqualTheBisectionWhereSomeJustReachOne) {
    ASSERT_NO_FATAL_FAILURE(TestFixture::check({27, 30, 48, 39}, 3, 0));
    Random random(4);
    for (int round = 0; round < 5000; round++) {
        std::vector<double> weights(3 + random.below(4));
        for (double &w : weights) w = static_cast<double>(1 + random.below(60));
        const auto kappa = static_cast<double>(1 + random.below(static_cast<int64_t>(weights.size()) - 1));
        ASSERT_NO_FATAL_FAILURE(TestFixture::check(weights, kappa, round % 3 ? 0 : 0.5));
    }
}

TYPED_TEST(CappedProbabilities, AreTheSameForAnyThreadsAndRowByRow) {
    Random random(3);
    for (auto [S, N] : std::vector<std::pair<int64_t, int64_t>>{{0, 3}, {200, 17}, {3, 30001}, {1, 100000}}) {
        std::vector<double> weights = random_energies(S * N, random, 3), kappa;
        for (double &w : weights) w = static_cast<float>(w);
        for (int64_t s = 0; s < S; s++) kappa.push_back(random.uniform(0, 0.6) * static_cast<double>(N));
        const auto first = TestFixture::run(weights, kappa, 0.25);
        ASSERT_EQ(first.status, MMBAL_OK);
        for_each_pool([&](const std::string &name, const mmbal_pool &pool) {
            const auto other = TestFixture::run(weights, kappa, 0.25, pool);
            EXPECT_TRUE(same_bits(first.p, other.p) && same_bits(first.c, other.c)) << name;
        });
        for (int64_t s = 0; s < std::min<int64_t>(S, 5); s++) {
            const std::vector<double> row(weights.begin() + s * N, weights.begin() + (s + 1) * N);
            EXPECT_NEAR(TestFixture::run(row, {kappa[s]}, 0.25).c[0], first.c[s], 1e-12 * first.c[s]);
            ASSERT_NO_FATAL_FAILURE(TestFixture::check(row, kappa[s], 0.25));
        }
    }
}

TYPED_TEST(CappedProbabilities, RefuseWhatIsOutsideTheContract) {
    const std::vector<double> good = {0, 2, 3, 0, 1};
    const auto status = [&](std::vector<double> weights, double kappa, double mix) {
        return TestFixture::run(weights, {kappa}, mix).status;
    };
    EXPECT_EQ(status(good, 3, 0), MMBAL_OK);
    for (double kappa : {3.01, 4.0}) {
        EXPECT_EQ(status(good, kappa, 0), MMBAL_INVALID_ARGUMENT);
        EXPECT_EQ(status(good, kappa, 0.5), MMBAL_OK);
    }
    EXPECT_EQ(status({0, 0}, 0.1, 0), MMBAL_INVALID_ARGUMENT);
    for (double kappa : {-0.1, 5.01, NOT_A_NUMBER, INFINITE})
        EXPECT_EQ(status(good, kappa, 0.5), MMBAL_INVALID_ARGUMENT) << kappa;
    for (double mix : {-0.1, 1.1, NOT_A_NUMBER}) EXPECT_EQ(status(good, 1, mix), MMBAL_INVALID_ARGUMENT) << mix;
    for (double bad : {-1.0, INFINITE, NOT_A_NUMBER})
        EXPECT_EQ(status({1, 2, 3, bad}, 1, 0.5), MMBAL_INVALID_ARGUMENT) << bad;
    // Any row: nothing of the others is written either.
    EXPECT_EQ(TestFixture::run({1, 2, 3, 4, -1, 1}, {1, 1, 1}, 0.5).status, MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(TestFixture::run({1, 2, 3, 4, 1, 1}, {1, 1, 3}, 0.5).status, MMBAL_INVALID_ARGUMENT);
    const mmbal_pool pool = mmbal_pool_serial();
    for (mmbal_dtype dtype : {MMBAL_BF16, MMBAL_F16})
        EXPECT_EQ(mmbal_waterfill(dtype, nullptr, nullptr, 1, 1, 0, nullptr, nullptr, nullptr, &pool),
                  MMBAL_UNSUPPORTED);
    EXPECT_EQ(mmbal_waterfill(TypeParam::dtype, nullptr, nullptr, -1, 1, 0, nullptr, nullptr, nullptr, &pool),
              MMBAL_INVALID_ARGUMENT);
}

} // namespace
