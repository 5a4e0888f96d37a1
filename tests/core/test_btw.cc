#include "mmbal/btw.h"

#include <algorithm>
#include <numeric>

#include "helpers.h"

namespace {

using namespace mmbal_test;

constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();
constexpr double INFINITE = std::numeric_limits<double>::infinity();
constexpr mmbal_btw_options DEFAULT = {1e-5, 1e6, 1, MMBAL_BTW_DIVERGE, 0};

template <typename T>
struct Problem {
    using Stored = typename T::Stored;
    using Real = typename T::Real;
    int64_t N, M;
    mmbal_btw_options options = DEFAULT;
    std::vector<Stored> kl;
    std::vector<double> mi;
    std::vector<uint8_t> present; // empty: all
    std::vector<Real> dweights;

    // Divergences from 1e-3 to 1e4; some mutual information below the floor.
    Problem(int64_t n, int64_t m, bool masked = false, uint64_t seed = 1) : N(n), M(m) {
        Random random(seed);
        for (int64_t i = 0; i < N * M; i++) kl.push_back(T::store(std::exp(random.uniform(-7, 9))));
        for (int64_t i = 0; i < M; i++) mi.push_back(i % 4 == 3 ? 0 : random.uniform(0.01, 2));
        for (int64_t i = 0; i < N * M && masked; i++) present.push_back(random.below(3) != 0);
        for (int64_t i = 0; i < N * M; i++) dweights.push_back(static_cast<Real>(random.uniform(-1, 1)));
    }
    const uint8_t *mask() const { return present.empty() ? nullptr : present.data(); }
    mmbal_status weights(const mmbal_pool &pool, std::vector<Real> *result) const {
        Guarded<Real> out(N * M);
        const mmbal_status status =
            mmbal_btw_weights(T::dtype, kl.data(), mi.data(), mask(), N, M, options, out.data(), &pool);
        EXPECT_TRUE(out.intact());
        *result = out.values();
        return status;
    }
    std::vector<Real> weights() const {
        std::vector<Real> result;
        EXPECT_EQ(weights(mmbal_pool_serial(), &result), MMBAL_OK);
        return result;
    }
    struct Gradients {
        std::vector<Stored> dkl;
        std::vector<double> dmi;
    };
    Gradients gradients(const mmbal_pool &pool, int without = -1) const {
        Guarded<Stored> dkl(N * M);
        Guarded<double> dmi(M);
        Guarded<unsigned char> workspace(mmbal_btw_weights_backward_workspace(N, M));
        EXPECT_EQ(mmbal_btw_weights_backward(T::dtype, dweights.data(), kl.data(), mi.data(), mask(), N, M, options,
                                             without == 0 ? nullptr : dkl.data(), without == 1 ? nullptr : dmi.data(),
                                             workspace.data(), &pool),
                  MMBAL_OK);
        EXPECT_TRUE(dkl.intact() && dmi.intact() && workspace.intact());
        return {dkl.values(), dmi.values()};
    }

    bool counted(int64_t i) const { return (present.empty() || present[i]) && !std::isnan(T::load(kl[i])); }
    double D(int64_t i) const { return std::min(std::max(T::load(kl[i]), options.floor), options.ceiling); }
    double v(int64_t m) const { return std::max(mi[m], options.floor); }
    int64_t count(int64_t n) const {
        int64_t total = 0;
        for (int64_t m = 0; m < M; m++) total += counted(n * M + m);
        return total;
    }
    // One row's weights that sum to one, by the formula.
    std::vector<double> plain(int64_t n) const {
        std::vector<double> w(M);
        double total = 0, least = INFINITE;
        for (int64_t m = 0; m < M; m++)
            if (counted(n * M + m)) least = std::min(least, std::min(T::load(kl[n * M + m]), options.ceiling));
        for (int64_t m = 0; m < M; m++) {
            if (!counted(n * M + m)) continue;
            const double kept = std::min(T::load(kl[n * M + m]), options.ceiling);
            w[m] = options.mode == MMBAL_BTW_AGREE ? v(m) * std::exp(-(kept - least) / options.temperature)
                                                   : D(n * M + m) * v(m);
            total += w[m];
        }
        for (int64_t m = 0; m < M && total > 0; m++) w[m] /= total;
        return w;
    }
};

std::vector<mmbal_btw_options> all_options() {
    std::vector<mmbal_btw_options> all;
    for (int mean_one : {0, 1}) {
        all.push_back({1e-5, 1e6, 1, MMBAL_BTW_DIVERGE, mean_one});
        all.push_back({0.01, 100, 1, MMBAL_BTW_DIVERGE, mean_one});
        all.push_back({1e-5, 1e6, 0.7, MMBAL_BTW_AGREE, mean_one});
        all.push_back({1e-5, 3, 2.5, MMBAL_BTW_AGREE, mean_one});
    }
    return all;
}

template <typename T>
class BtwWeights : public ::testing::Test {};
TYPED_TEST_SUITE(BtwWeights, Dtypes, DtypeNames);

TYPED_TEST(BtwWeights, FollowTheirFormulaAndItsGradient) {
    const std::vector<std::pair<int64_t, int64_t>> shapes = {{0, 2},   {1, 1},   {1, 3},   {37, 2},   {41, 3},  {29, 4},
                                                             {300, 5}, {40, 17}, {3, 256}, {2100, 3}, {5000, 1}};
    for (auto [N, M] : shapes)
        for (bool masked : {false, true})
            for (const mmbal_btw_options &options : all_options()) {
                SCOPED_TRACE(std::to_string(N) + " x " + std::to_string(M) + (masked ? " masked" : "") + " mode " +
                             std::to_string(options.mode) + (options.mean_one ? " mean one" : ""));
                Problem<TypeParam> p(N, M, masked, static_cast<uint64_t>(N * 300 + M));
                p.options = options;
                const auto weights = p.weights();
                const auto got = p.gradients(mmbal_pool_serial());
                std::vector<Sum> dkl(N * M), dmi(M);
                const double real = TypeParam::real_error;
                for (int64_t n = 0; n < N; n++) {
                    const std::vector<double> w = p.plain(n);
                    const double scale = options.mean_one ? static_cast<double>(p.count(n)) : 1;
                    double mean = 0, size = 0;
                    for (int64_t m = 0; m < M; m++) {
                        // exp of a difference of levels carries their rounding
                        const double levels = options.mode == MMBAL_BTW_AGREE ? 30 + options.ceiling : 0;
                        // and a sum of M terms M roundings
                        const double bound =
                            8 + static_cast<double>(M) + std::min(levels, 30 + 1e4 / options.temperature);
                        ASSERT_NEAR(weights[n * M + m], scale * w[m], bound * real * scale * w[m] + 1e-37) << n << m;
                        mean += w[m] * p.dweights[n * M + m], size += w[m] * std::fabs(p.dweights[n * M + m]);
                    }
                    for (int64_t m = 0; m < M; m++) {
                        const int64_t i = n * M + m;
                        const double kl = TypeParam::load(p.kl[i]), s = scale * w[m] * (p.dweights[i] - mean);
                        const double of_s = scale * w[m] * (std::fabs(p.dweights[i]) + size);
                        const bool agree = options.mode == MMBAL_BTW_AGREE;
                        const bool moves = p.counted(i) && kl < options.ceiling && (agree || kl > options.floor);
                        if (moves && agree) dkl[i].add(-s / options.temperature, of_s / options.temperature);
                        if (moves && !agree) dkl[i].add(s / kl, of_s / kl);
                        if (p.mi[m] > options.floor && p.counted(i)) dmi[m].add(s / p.v(m), of_s / p.v(m));
                    }
                }
                const double error = TypeParam::stored_error + 2e4 * real; // levels up to 1e4 in agree mode
                expect_near<TypeParam>("dkl", got.dkl, dkl,
                                       options.mode == MMBAL_BTW_AGREE ? error : TypeParam::stored_error + 40 * real);
                for (int64_t m = 0; m < M; m++)
                    ASSERT_NEAR(got.dmi[m], dmi[m].value,
                                (options.mode == MMBAL_BTW_AGREE ? 2e4 : 40) * real * dmi[m].magnitude + 1e-37)
                        << "dmi " << m;
            }
}

TYPED_TEST(BtwWeights, AreTheSameForAnyThreadsAndWithoutSomeGradients) {
    for (int64_t M : {1, 2, 3, 4, 5, 8})
        for (const mmbal_btw_options &options : all_options()) {
            Problem<TypeParam> p(150000 / M, M, M == 3);
            p.options = options;
            const auto weights = p.weights();
            const auto gradients = p.gradients(mmbal_pool_serial());
            for_each_pool([&](const std::string &name, const mmbal_pool &pool) {
                std::vector<typename TypeParam::Real> other;
                ASSERT_EQ(p.weights(pool, &other), MMBAL_OK);
                EXPECT_TRUE(same_bits(weights, other)) << name << " M=" << M << " mode " << options.mode;
                const auto others = p.gradients(pool);
                EXPECT_TRUE(same_bits(gradients.dkl, others.dkl)) << name << " M=" << M;
                EXPECT_TRUE(same_bits(gradients.dmi, others.dmi)) << name << " M=" << M;
            });
            EXPECT_TRUE(same_bits(gradients.dmi, p.gradients(mmbal_pool_serial(), 0).dmi));
            EXPECT_TRUE(same_bits(gradients.dkl, p.gradients(mmbal_pool_serial(), 1).dkl));
        }
}

TYPED_TEST(BtwWeights, OfARowSumToOneOrToItsNumberOfModalities) {
    for (const mmbal_btw_options &options : all_options()) {
        Problem<TypeParam> p(200, 3, true);
        p.options = options;
        const auto weights = p.weights();
        for (int64_t n = 0; n < p.N; n++) {
            const double sum = std::accumulate(&weights[n * 3], &weights[n * 3] + 3, 0.0);
            const double expected = options.mean_one ? static_cast<double>(p.count(n)) : p.count(n) > 0;
            EXPECT_NEAR(sum, expected, 1e-5);
            for (int64_t m = 0; m < 3; m++) EXPECT_TRUE(p.counted(n * 3 + m) || weights[n * 3 + m] == 0);
        }
    }
}

// Both with and without a mask, since these are two ways through the code.
TYPED_TEST(BtwWeights, TakeInfinityAsTheCeilingAndNaNAsMissing) {
    for (bool masked : {false, true})
        for (int64_t M : {2, 3, 4, 5}) {
            Problem<TypeParam> p(70, M);
            if (masked) p.present.assign(p.N * M, 1);
            p.options.ceiling = 1000;
            Problem<TypeParam> same = p;
            for (int64_t n = 0; n < p.N; n++) {
                p.kl[n * M] = TypeParam::store(INFINITE), same.kl[n * M] = TypeParam::store(1000);
                p.kl[n * M + 1] = TypeParam::store(NOT_A_NUMBER);
            }
            same.present.assign(p.N * M, 1);
            for (int64_t n = 0; n < p.N; n++) same.present[n * M + 1] = 0;
            for (const mmbal_btw_mode mode : {MMBAL_BTW_DIVERGE, MMBAL_BTW_AGREE}) {
                p.options.mode = same.options.mode = mode;
                p.options.mean_one = same.options.mean_one = 1;
                const auto got = p.weights(), expected = same.weights();
                for (int64_t i = 0; i < p.N * M; i++) EXPECT_NEAR(got[i], expected[i], 1e-6) << i;
                for (auto value : p.gradients(mmbal_pool_serial()).dkl)
                    EXPECT_TRUE(std::isfinite(TypeParam::load(value)));
            }
        }
}

TYPED_TEST(BtwWeights, OfARowWithoutModalitiesAreZeroAndHaveNoGradient) {
    for (const mmbal_btw_options &options : all_options()) {
        Problem<TypeParam> p(3, 2);
        p.options = options;
        p.present = {1, 1, 0, 0, 1, 0};
        const auto weights = p.weights();
        const auto gradients = p.gradients(mmbal_pool_serial());
        EXPECT_EQ(weights[2], 0);
        EXPECT_EQ(weights[3], 0);
        EXPECT_EQ(TypeParam::load(gradients.dkl[2]), 0);
        EXPECT_EQ(TypeParam::load(gradients.dkl[3]), 0);
        EXPECT_NEAR(weights[4], 1, 1e-6);
    }
}

TYPED_TEST(BtwWeights, OfModalitiesThatAllAgreeAreTheirMutualInformation) {
    Problem<TypeParam> p(2, 3);
    std::fill(p.kl.begin(), p.kl.end(), TypeParam::store(0));
    p.mi = {0.6, 0.1, 1e-5};
    const auto weights = p.weights();
    const double expected[] = {0.857131, 0.142855, 0.000014};
    for (int64_t i = 0; i < 6; i++) EXPECT_NEAR(weights[i], expected[i % 3], 1e-6);
}

TEST(BtwWeights64, HaveTheGoldenValues) {
    Problem<F64> p(2, 3);
    p.kl = {2.2638132507239095, 2.0, 18.3905620876, 0.9216419742, 1.6528705803, 2.5751844276};
    p.mi = {1, 1, 1};
    const double kl_only[] = {0.0999283016, 0.0882831669, 0.8117885315, 0.1789701370, 0.3209646288, 0.5000652342};
    const double both[] = {0.8558181814, 0.1440162848, 0.0001655338, 0.7453419379, 0.2546084769, 0.0000495852};
    auto weights = p.weights();
    for (int i = 0; i < 6; i++) EXPECT_NEAR(weights[i], kl_only[i], 1e-10);
    p.mi = {0.42, 0.08, 0};
    weights = p.weights();
    for (int i = 0; i < 6; i++) EXPECT_NEAR(weights[i], both[i], 1e-10);
    std::vector<double> table(6, 1);
    const int64_t index[] = {0, 1};
    const mmbal_pool pool = mmbal_pool_serial();
    std::vector<char> workspace(mmbal_ema_rows_workspace(2));
    ASSERT_EQ(mmbal_ema_rows(MMBAL_F64, table.data(), index, weights.data(), 2, 2, 3, 0.5, workspace.data(), &pool),
              MMBAL_OK);
    const double averaged[] = {0.9279090907, 0.5720081424, 0.5000827669, 0.8726709689, 0.6273042385, 0.5000247926};
    for (int i = 0; i < 6; i++) EXPECT_NEAR(table[i], averaged[i], 1e-10);
}

TEST(BtwWeightsErrors, RefuseOptionsOutsideTheContract) {
    const Problem<F32> good(2, 3);
    std::vector<float> weights;
    const auto status = [&](auto change) {
        Problem<F32> p = good;
        change(p);
        return p.weights(mmbal_pool_serial(), &weights);
    };
    EXPECT_EQ(status([](auto &) {}), MMBAL_OK);
    for (double bad : {0.0, -1.0, NOT_A_NUMBER}) {
        EXPECT_EQ(status([&](auto &p) { p.options.floor = bad; }), MMBAL_INVALID_ARGUMENT) << bad;
        EXPECT_EQ(status([&](auto &p) { p.options.temperature = bad; }), MMBAL_INVALID_ARGUMENT) << bad;
        EXPECT_EQ(status([&](auto &p) { p.options.ceiling = bad; }), MMBAL_INVALID_ARGUMENT) << bad;
    }
    for (double bad : {INFINITE, 1e13}) {
        EXPECT_EQ(status([&](auto &p) { p.options.ceiling = bad; }), MMBAL_INVALID_ARGUMENT) << bad;
        EXPECT_EQ(status([&](auto &p) { p.options.temperature = bad; }), MMBAL_INVALID_ARGUMENT) << bad;
    }
    EXPECT_EQ(status([](auto &p) { p.mi[1] = INFINITE; }), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(status([](auto &p) { p.mi[1] = NOT_A_NUMBER; }), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(status([](auto &p) { p.options.mode = enum_of<mmbal_btw_mode>(2); }), MMBAL_INVALID_ARGUMENT);
    const mmbal_pool pool = mmbal_pool_serial();
    EXPECT_EQ(mmbal_btw_weights(MMBAL_F32, good.kl.data(), good.mi.data(), nullptr, -1, 3, DEFAULT, nullptr, &pool),
              MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(mmbal_btw_weights(MMBAL_F32, good.kl.data(), good.mi.data(), nullptr, 2, 0, DEFAULT, nullptr, &pool),
              MMBAL_INVALID_ARGUMENT);
}

template <typename T>
class EmaRows : public ::testing::Test {};
using Reals = ::testing::Types<F32, F64>;
TYPED_TEST_SUITE(EmaRows, Reals, DtypeNames);

TYPED_TEST(EmaRows, MoveTheNamedRowsAloneAndTheSameForAnyThreads) {
    using Real = typename TypeParam::Real;
    Random random(1);
    const int64_t S = 50000, N = 30000, M = 3;
    const auto before = random.tensor<TypeParam>(S * M, 1), weights = random.tensor<TypeParam>(N * M, 1);
    std::vector<int64_t> index(S);
    std::iota(index.begin(), index.end(), 0);
    for (int64_t i = 0; i < N; i++) std::swap(index[i], index[i + random.below(S - i)]);
    const double alpha = 0.3;
    std::vector<double> expected(before.begin(), before.end());
    for (int64_t n = 0; n < N; n++)
        for (int64_t m = 0; m < M; m++) {
            double &to = expected[index[n] * M + m];
            to = alpha * weights[n * M + m] + (1 - alpha) * to;
        }
    std::vector<Real> first;
    for_each_pool([&](const std::string &name, const mmbal_pool &pool) {
        std::vector<Real> table = before;
        Guarded<unsigned char> workspace(mmbal_ema_rows_workspace(S));
        ASSERT_EQ(mmbal_ema_rows(TypeParam::dtype, table.data(), index.data(), weights.data(), S, N, M, alpha,
                                 workspace.data(), &pool),
                  MMBAL_OK);
        EXPECT_TRUE(workspace.intact());
        for (size_t i = 0; i < table.size(); i++) ASSERT_NEAR(table[i], expected[i], 4 * TypeParam::real_error) << i;
        if (first.empty()) first = table;
        EXPECT_TRUE(same_bits(first, table)) << name;
    });
}

TYPED_TEST(EmaRows, AreUntouchedByABadIndexOrOption) {
    using Real = typename TypeParam::Real;
    std::vector<Real> table(4 * 2, 1), weights(3 * 2, 0);
    std::vector<char> workspace(mmbal_ema_rows_workspace(4));
    const mmbal_pool pool = mmbal_pool_serial();
    const auto status = [&](std::vector<int64_t> index, double alpha = 0.5) {
        return mmbal_ema_rows(TypeParam::dtype, table.data(), index.data(), weights.data(), 4, 3, 2, alpha,
                              workspace.data(), &pool);
    };
    EXPECT_EQ(status({0, 1, 4}), MMBAL_INVALID_INDEX);
    EXPECT_EQ(status({0, -1, 2}), MMBAL_INVALID_INDEX);
    EXPECT_EQ(status({2, 1, 2}), MMBAL_DUPLICATE_INDEX);
    for (double alpha : {-0.1, 1.1, NOT_A_NUMBER}) EXPECT_EQ(status({0, 1, 2}, alpha), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(std::count(table.begin(), table.end(), 1), 8);
    EXPECT_EQ(mmbal_ema_rows(MMBAL_BF16, table.data(), nullptr, weights.data(), 4, 0, 2, 0.5, workspace.data(), &pool),
              MMBAL_UNSUPPORTED);
}

template <typename T>
class ScaleModality : public ::testing::Test {};
TYPED_TEST_SUITE(ScaleModality, Dtypes, DtypeNames);

TYPED_TEST(ScaleModality, FollowsItsFormulasForAnyThreads) {
    using Stored = typename TypeParam::Stored;
    using Real = typename TypeParam::Real;
    const int64_t M = 3, m = 1;
    for (auto [N, d] :
         std::vector<std::pair<int64_t, int64_t>>{{0, 4}, {1, 0}, {3, 1}, {40, 15}, {2000, 33}, {5, 600}}) {
        Random random(7);
        const auto h = random.tensor<TypeParam>(N * d, 2), g = random.tensor<TypeParam>(N * d, 2);
        std::vector<Real> weights;
        for (int64_t i = 0; i < N * M; i++) weights.push_back(static_cast<Real>(random.uniform(0, 3)));
        std::vector<Stored> first;
        std::vector<Real> first_dweights;
        for_each_pool([&](const std::string &name, const mmbal_pool &pool) {
            Guarded<Stored> scaled(N * d);
            Guarded<Real> dweights(N * M);
            ASSERT_EQ(
                mmbal_scale_modality(TypeParam::dtype, h.data(), weights.data(), m, N, M, d, scaled.data(), &pool),
                MMBAL_OK);
            ASSERT_EQ(
                mmbal_scale_modality_dweights(TypeParam::dtype, g.data(), h.data(), m, N, M, d, dweights.data(), &pool),
                MMBAL_OK);
            EXPECT_TRUE(scaled.intact() && dweights.intact());
            const auto values = scaled.values();
            const auto of_weights = dweights.values();
            for (int64_t n = 0; n < N; n++) {
                Sum sum;
                for (int64_t i = n * d; i < (n + 1) * d; i++) {
                    const double exact = weights[n * M + m] * TypeParam::load(h[i]);
                    ASSERT_NEAR(TypeParam::load(values[i]), exact,
                                2.02 * TypeParam::stored_error * std::fabs(exact) +
                                    0x1p-24 * (TypeParam::dtype == MMBAL_F16));
                    sum.add(TypeParam::load(g[i]) * TypeParam::load(h[i]));
                }
                ASSERT_NEAR(of_weights[n * M + m], sum.value, 60 * TypeParam::real_error * sum.magnitude);
                EXPECT_TRUE(std::isnan(of_weights[n * M])) << "another column was written";
            }
            if (first.empty()) first = values, first_dweights = of_weights;
            EXPECT_TRUE(same_bits(first, values) && same_bits(first_dweights, of_weights)) << name;
        });
    }
}

TEST(ScaleModalityErrors, RefuseAColumnThatIsNotThere) {
    float h[4] = {}, weights[4] = {}, out[4];
    const mmbal_pool pool = mmbal_pool_serial();
    for (int64_t m : {-1, 2}) {
        EXPECT_EQ(mmbal_scale_modality(MMBAL_F32, h, weights, m, 2, 2, 2, out, &pool), MMBAL_INVALID_ARGUMENT);
        EXPECT_EQ(mmbal_scale_modality_dweights(MMBAL_F32, h, h, m, 2, 2, 2, out, &pool), MMBAL_INVALID_ARGUMENT);
    }
}

} // namespace
