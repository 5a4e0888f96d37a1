#include "mmbal/divergence.h"

#include <algorithm>
#include <array>

#include "helpers.h"

namespace {

using namespace mmbal_test;

constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();

// Errors of KLs: the spec's bound for float32 sums, and what is left of it in float64.
template <typename T>
double kl_error(double kl) {
    return (std::is_same_v<typename T::Real, double> ? 1e-12 : 1e-6) * (1 + std::fabs(kl));
}

template <typename T>
std::vector<double> loaded(const std::vector<typename T::Stored> &values) {
    std::vector<double> result;
    for (auto value : values) result.push_back(T::load(value));
    return result;
}

template <typename T>
std::vector<typename T::Stored> stored(const std::vector<double> &values) {
    std::vector<typename T::Stored> result;
    for (double value : values) result.push_back(T::store(value));
    return result;
}

template <typename Real>
void expect_kls(const std::vector<Real> &got, const std::vector<double> &expected, double (*error)(double)) {
    ASSERT_EQ(got.size(), expected.size());
    for (size_t i = 0; i < got.size(); i++) {
        ASSERT_NEAR(got[i], expected[i], error(expected[i])) << i;
        ASSERT_GE(got[i], 0) << i;
    }
}

// Gaussian: sigmas given; residual: from a target.
template <typename T>
struct Normal {
    using Stored = typename T::Stored;
    using Real = typename T::Real;
    int64_t N, M;
    bool residual;
    double sigma_min = 0.25;
    std::vector<Stored> mu, log_sigma, fused_mu, fused_log_sigma, target;
    std::vector<Real> dkl;

    Normal(int64_t n, int64_t m, bool of_residual, uint64_t seed = 1) : N(n), M(m), residual(of_residual) {
        Random random(seed);
        mu = random.tensor<T>(N * M, 3), log_sigma = random.tensor<T>(N * M, 2);
        fused_mu = random.tensor<T>(N, 3), fused_log_sigma = random.tensor<T>(N, 2), target = random.tensor<T>(N, 3);
        for (int64_t i = 0; i < N * M; i++) dkl.push_back(static_cast<Real>(random.uniform(-2, 2)));
    }
    mmbal_status value(const mmbal_pool &pool, std::vector<Real> *kl) const {
        Guarded<Real> out(N * M);
        const mmbal_status status = residual ? mmbal_residual_kl(T::dtype, mu.data(), fused_mu.data(), target.data(), N,
                                                                 M, sigma_min, out.data(), &pool)
                                             : mmbal_gaussian_kl(T::dtype, mu.data(), log_sigma.data(), fused_mu.data(),
                                                                 fused_log_sigma.data(), N, M, out.data(), &pool);
        EXPECT_TRUE(out.intact());
        *kl = out.values();
        return status;
    }
    // dmu, dlog_sigma, dfused_mu, dfused_log_sigma; those of `without` are not asked for.
    std::vector<std::vector<Stored>> gradients(const mmbal_pool &pool, int without = -1) const {
        Guarded<Stored> of_mu(N * M), of_log(N * M), of_fused(N), of_fused_log(N);
        const auto data = [&](int which, Guarded<Stored> &out) { return without == which ? nullptr : out.data(); };
        const mmbal_status status =
            residual ? mmbal_residual_kl_backward(T::dtype, dkl.data(), mu.data(), fused_mu.data(), target.data(), N, M,
                                                  sigma_min, data(0, of_mu), data(2, of_fused), &pool)
                     : mmbal_gaussian_kl_backward(T::dtype, dkl.data(), mu.data(), log_sigma.data(), fused_mu.data(),
                                                  fused_log_sigma.data(), N, M, data(0, of_mu), data(1, of_log),
                                                  data(2, of_fused), data(3, of_fused_log), &pool);
        EXPECT_EQ(status, MMBAL_OK);
        EXPECT_TRUE(of_mu.intact() && of_log.intact() && of_fused.intact() && of_fused_log.intact());
        if (residual) return {of_mu.values(), {}, of_fused.values(), {}};
        return {of_mu.values(), of_log.values(), of_fused.values(), of_fused_log.values()};
    }

    // The textbook's form in double.
    double s(double residual_of) const { return std::max(std::fabs(residual_of), sigma_min); }
    double plain(int64_t n, int64_t m) const {
        const double u = T::load(mu[n * M + m]), q = T::load(fused_mu[n]), y = T::load(target[n]);
        const double su = residual ? s(y - u) : std::exp(T::load(log_sigma[n * M + m]));
        const double sq = residual ? s(y - q) : std::exp(T::load(fused_log_sigma[n]));
        return std::log(sq / su) + (su * su + (u - q) * (u - q)) / (2 * sq * sq) - 0.5;
    }
    std::vector<std::vector<Sum>> plain_gradients() const {
        std::vector<std::vector<Sum>> g = {std::vector<Sum>(N * M), std::vector<Sum>(N * M), std::vector<Sum>(N),
                                           std::vector<Sum>(N)};
        const auto slope = [&](double e) { return std::fabs(e) > sigma_min ? (e > 0 ? 1.0 : -1.0) : 0.0; };
        for (int64_t n = 0; n < N; n++)
            for (int64_t m = 0; m < M; m++) {
                const int64_t i = n * M + m;
                const double u = T::load(mu[i]), q = T::load(fused_mu[n]), y = T::load(target[n]), c = dkl[i];
                const double su = residual ? s(y - u) : std::exp(T::load(log_sigma[i]));
                const double sq = residual ? s(y - q) : std::exp(T::load(fused_log_sigma[n]));
                const double d = u - q, r2 = su * su / (sq * sq);
                const double size = std::fabs(c) * (1 + std::fabs(d) / sq) * (1 + std::fabs(d) / sq + r2) *
                                    (1 + 1 / sq + (residual ? 1 / su : 0));
                g[0][i].add(c * d / (sq * sq), size), g[2][n].add(-c * d / (sq * sq), size);
                if (residual) {
                    g[0][i].add(-c * (r2 - 1) / su * slope(y - u), size);
                    g[2][n].add(-c * (1 - r2 - d * d / (sq * sq)) / sq * slope(y - q), size);
                } else {
                    g[1][i].add(c * (r2 - 1), size);
                    g[3][n].add(c * (1 - r2 - d * d / (sq * sq)), size);
                }
            }
        if (residual) g[1].clear(), g[3].clear();
        return g;
    }
};

template <typename T>
class Divergence : public ::testing::Test {};
TYPED_TEST_SUITE(Divergence, Dtypes, DtypeNames);

TYPED_TEST(Divergence, OfNormalsFollowsTheTextbookAndItsGradientTheFormula) {
    const std::vector<std::pair<int64_t, int64_t>> shapes = {{0, 3},  {1, 1},   {1, 4},   {7, 2},    {300, 3},
                                                             {33, 5}, {19, 17}, {5, 256}, {1025, 1}, {520, 4}};
    for (bool residual : {false, true})
        for (auto [N, M] : shapes) {
            SCOPED_TRACE((residual ? "residual " : "Gaussian ") + std::to_string(N) + " x " + std::to_string(M));
            const Normal<TypeParam> p(N, M, residual, static_cast<uint64_t>(N * 1000 + M));
            std::vector<typename TypeParam::Real> kl;
            ASSERT_EQ(p.value(mmbal_pool_serial(), &kl), MMBAL_OK);
            std::vector<double> expected;
            for (int64_t n = 0; n < N; n++)
                for (int64_t m = 0; m < M; m++) expected.push_back(p.plain(n, m));
            expect_kls(kl, expected, kl_error<TypeParam>);
            const auto got = p.gradients(mmbal_pool_serial());
            const auto plain = p.plain_gradients();
            for (int which = 0; which < 4; which++)
                expect_near<TypeParam>("gradient", got[which], plain[which],
                                       TypeParam::stored_error + 16 * TypeParam::real_error);
        }
}

TYPED_TEST(Divergence, OfAModalityThatAgreesIsZero) {
    Normal<TypeParam> p(9, 3, false);
    for (int64_t n = 0; n < 9; n++)
        for (int64_t m = 0; m < 3; m++) p.mu[n * 3 + m] = p.fused_mu[n], p.log_sigma[n * 3 + m] = p.fused_log_sigma[n];
    for (bool residual : {false, true}) {
        p.residual = residual;
        std::vector<typename TypeParam::Real> kl;
        ASSERT_EQ(p.value(mmbal_pool_serial(), &kl), MMBAL_OK);
        EXPECT_EQ(*std::max_element(kl.begin(), kl.end()), 0);
    }
}

TYPED_TEST(Divergence, OfNormalsIsTheSameForAnyThreadsAndWithoutSomeGradients) {
    for (bool residual : {false, true})
        for (int64_t M : {1, 2, 3, 4, 7}) {
            const Normal<TypeParam> p(40000 / M, M, residual);
            std::vector<typename TypeParam::Real> kl;
            ASSERT_EQ(p.value(mmbal_pool_serial(), &kl), MMBAL_OK);
            const auto gradients = p.gradients(mmbal_pool_serial());
            for_each_pool([&](const std::string &name, const mmbal_pool &pool) {
                std::vector<typename TypeParam::Real> other;
                ASSERT_EQ(p.value(pool, &other), MMBAL_OK) << name;
                EXPECT_TRUE(same_bits(kl, other)) << name << " M=" << M;
                const auto others = p.gradients(pool);
                for (int which = 0; which < 4; which++)
                    EXPECT_TRUE(same_bits(gradients[which], others[which])) << name << " " << which << " M=" << M;
            });
            for (int without = 0; without < 4; without++) {
                const auto others = p.gradients(mmbal_pool_serial(), without);
                for (int which = 0; which < 4; which++)
                    EXPECT_TRUE(which == without || same_bits(gradients[which], others[which])) << without << which;
            }
        }
}

TYPED_TEST(Divergence, KeepsANaNInItsEntryAndItsGradientOutWhereNoneCame) {
    for (bool residual : {false, true}) {
        Normal<TypeParam> p(6, 3, residual);
        p.dkl[2 * 3 + 1] = 0;
        const auto before = p.gradients(mmbal_pool_serial());
        p.mu[2 * 3 + 1] = TypeParam::store(NOT_A_NUMBER);
        std::vector<typename TypeParam::Real> kl;
        ASSERT_EQ(p.value(mmbal_pool_serial(), &kl), MMBAL_OK);
        for (size_t i = 0; i < kl.size(); i++) EXPECT_EQ(std::isnan(kl[i]), i == 7) << i;
        const auto after = p.gradients(mmbal_pool_serial());
        for (int which = 0; which < 4; which++) EXPECT_TRUE(same_bits(before[which], after[which])) << which;
    }
}

TEST(Divergence64, HasTheGoldenValuesOfTheGaussian) {
    const double mu = 0.5, log_sigma = std::log(0.8), fused = -0.25, fused_log_sigma = std::log(1.25);
    const mmbal_pool pool = mmbal_pool_serial();
    double kl;
    ASSERT_EQ(mmbal_gaussian_kl(MMBAL_F64, &mu, &log_sigma, &fused, &fused_log_sigma, 1, 1, &kl, &pool), MMBAL_OK);
    EXPECT_NEAR(kl, 0.33108710262841956, 1e-15);
    const double target = 1.2, prediction = 0.9, of_modalities[] = {0.5, 1.5, 1.35};
    double residual[3];
    ASSERT_EQ(mmbal_residual_kl(MMBAL_F64, of_modalities, &prediction, &target, 1, 3, 1e-3, residual, &pool), MMBAL_OK);
    EXPECT_NEAR(residual[0], 2.2638132507239095, 1e-14);
    EXPECT_NEAR(residual[1], 2.0, 1e-14);
    EXPECT_NEAR(residual[2], 1.4431471805599454, 1e-14);
}

TEST(Divergence64, OfResidualsIsAFunctionOfTheirRatio) {
    Random random(3);
    const mmbal_pool pool = mmbal_pool_serial();
    for (int i = 0; i < 1000; i++) {
        const double y = random.uniform(-2, 2), q = y + random.uniform(0.1, 2), u = y + random.uniform(-2, -0.1);
        const double r = (y - u) / (y - q);
        double kl;
        ASSERT_EQ(mmbal_residual_kl(MMBAL_F64, &u, &q, &y, 1, 1, 1e-9, &kl, &pool), MMBAL_OK);
        EXPECT_NEAR(kl, r * r - r - std::log(std::fabs(r)), 1e-12 * (1 + kl));
    }
}

TEST(Divergence64, OfResidualsStaysFiniteWhereAResidualIsZero) {
    const double target = 1, at_target = 1, off = 3;
    const mmbal_pool pool = mmbal_pool_serial();
    double kl;
    ASSERT_EQ(mmbal_residual_kl(MMBAL_F64, &at_target, &at_target, &target, 1, 1, 1e-3, &kl, &pool), MMBAL_OK);
    EXPECT_EQ(kl, 0);
    ASSERT_EQ(mmbal_residual_kl(MMBAL_F64, &off, &at_target, &target, 1, 1, 1e-3, &kl, &pool), MMBAL_OK);
    EXPECT_NEAR(kl, std::log(1e-3 / 2) + (4 + 4) / 2e-6 - 0.5, 1e-6);
    ASSERT_EQ(mmbal_residual_kl(MMBAL_F64, &at_target, &off, &target, 1, 1, 1e-3, &kl, &pool), MMBAL_OK);
    EXPECT_NEAR(kl, std::log(2 / 1e-3) + (1e-6 + 4) / 8 - 0.5, 1e-12);
}

// float32 near agreement, where the textbook's form loses all digits.
TEST(Divergence32, OfAlmostEqualGaussiansKeepsItsDigits) {
    const mmbal_pool pool = mmbal_pool_serial();
    for (float delta : {1e-1f, 1e-2f, 1e-3f, 1e-4f, -1e-3f, -0.17f, 0.18f}) {
        const float zero = 0;
        float kl;
        ASSERT_EQ(mmbal_gaussian_kl(MMBAL_F32, &zero, &delta, &zero, &zero, 1, 1, &kl, &pool), MMBAL_OK);
        const double x = 2 * static_cast<double>(delta), exact = 0.5 * (std::expm1(x) - x);
        EXPECT_NEAR(kl, exact, 2e-6 * exact) << delta;
    }
}

template <typename T>
struct Categorical {
    using Stored = typename T::Stored;
    using Real = typename T::Real;
    int64_t M, N, C;
    std::vector<Stored> logits, fused;
    std::vector<Real> dkl;

    Categorical(int64_t m, int64_t n, int64_t c, double scale = 4, uint64_t seed = 1) : M(m), N(n), C(c) {
        Random random(seed);
        logits = random.tensor<T>(M * N * C, scale), fused = random.tensor<T>(N * C, scale);
        for (int64_t i = 0; i < N * M; i++) dkl.push_back(static_cast<Real>(random.uniform(-2, 2)));
    }
    std::vector<Real> value(int reverse, const mmbal_pool &pool) const {
        Guarded<Real> out(N * M);
        Guarded<unsigned char> workspace(mmbal_categorical_kl_workspace(T::dtype, C, &pool));
        EXPECT_EQ(mmbal_categorical_kl(T::dtype, logits.data(), fused.data(), M, N, C, reverse, out.data(),
                                       workspace.data(), &pool),
                  MMBAL_OK);
        EXPECT_TRUE(out.intact() && workspace.intact());
        return out.values();
    }
    std::vector<std::vector<Stored>> gradients(int reverse, const mmbal_pool &pool, int without = -1) const {
        Guarded<Stored> dlogits(M * N * C), dfused(N * C);
        Guarded<unsigned char> workspace(mmbal_categorical_kl_workspace(T::dtype, C, &pool));
        EXPECT_EQ(mmbal_categorical_kl_backward(T::dtype, dkl.data(), logits.data(), fused.data(), M, N, C, reverse,
                                                without == 0 ? nullptr : dlogits.data(),
                                                without == 1 ? nullptr : dfused.data(), workspace.data(), &pool),
                  MMBAL_OK);
        EXPECT_TRUE(dlogits.intact() && dfused.intact() && workspace.intact());
        return {dlogits.values(), dfused.values()};
    }
    std::vector<double> row(const std::vector<Stored> &of, int64_t at) const {
        return loaded<T>({of.begin() + at * C, of.begin() + (at + 1) * C});
    }
};

// KL(first || second) from logits.
double plain_kl(const std::vector<double> &first, const std::vector<double> &second) {
    const Softmax p(first), q(second);
    double kl = 0;
    for (size_t c = 0; c < first.size(); c++)
        if (p.p[c] > 0) kl += p.p[c] * ((first[c] - p.logsumexp) - (second[c] - q.logsumexp));
    return kl;
}

TYPED_TEST(Divergence, OfCategoricalsFollowsItsFormulas) {
    const std::vector<std::array<int64_t, 3>> shapes = {{1, 0, 3},    {2, 1, 1},   {3, 7, 2},   {4, 600, 2},
                                                        {1, 300, 5},  {2, 90, 24}, {2, 45, 25}, {3, 11, 100},
                                                        {2, 3, 1024}, {1, 2, 2500}};
    for (auto [M, N, C] : shapes)
        for (int reverse : {0, 1}) {
            SCOPED_TRACE(std::to_string(M) + " x " + std::to_string(N) + " x " + std::to_string(C) +
                         (reverse ? " reverse" : ""));
            const Categorical<TypeParam> p(M, N, C);
            std::vector<double> expected(N * M);
            std::vector<Sum> dlogits(M * N * C), dfused(N * C);
            for (int64_t n = 0; n < N; n++)
                for (int64_t m = 0; m < M; m++) {
                    const auto z = p.row(p.logits, m * N + n), zq = p.row(p.fused, n);
                    const double kl = reverse ? plain_kl(zq, z) : plain_kl(z, zq), g = p.dkl[n * M + m];
                    expected[n * M + m] = kl;
                    const Softmax u(z), q(zq);
                    for (int64_t c = 0; c < C; c++) {
                        const double ahead = (z[c] - u.logsumexp) - (zq[c] - q.logsumexp);
                        const double first = reverse ? q.p[c] * (-ahead - kl) : u.p[c] * (ahead - kl);
                        const double second = reverse ? u.p[c] - q.p[c] : q.p[c] - u.p[c];
                        const double size = std::fabs(g) * (u.p[c] + q.p[c]) * (1 + std::fabs(ahead) + kl + 8);
                        dlogits[(m * N + n) * C + c].add(g * (reverse ? second : first), size);
                        dfused[n * C + c].add(g * (reverse ? first : second), size);
                    }
                }
            expect_kls(p.value(reverse, mmbal_pool_serial()), expected, kl_error<TypeParam>);
            const auto got = p.gradients(reverse, mmbal_pool_serial());
            const double error = TypeParam::stored_error + (8 + static_cast<double>(C) / 8) * TypeParam::real_error;
            expect_near<TypeParam>("dlogits", got[0], dlogits, error);
            expect_near<TypeParam>("dfused_logits", got[1], dfused, error);
        }
}

TYPED_TEST(Divergence, OfCategoricalsIsTheSameForAnyThreadsAndWithoutSomeGradients) {
    for (int64_t C : {2, 3, 24, 25, 70})
        for (int reverse : {0, 1}) {
            const Categorical<TypeParam> p(3, 70000 / C, C);
            const auto kl = p.value(reverse, mmbal_pool_serial());
            const auto gradients = p.gradients(reverse, mmbal_pool_serial());
            for_each_pool([&](const std::string &name, const mmbal_pool &pool) {
                EXPECT_TRUE(same_bits(kl, p.value(reverse, pool))) << name << " C=" << C;
                const auto others = p.gradients(reverse, pool);
                for (int which : {0, 1}) EXPECT_TRUE(same_bits(gradients[which], others[which])) << name << " C=" << C;
            });
            for (int without : {0, 1})
                EXPECT_TRUE(
                    same_bits(gradients[1 - without], p.gradients(reverse, mmbal_pool_serial(), without)[1 - without]));
        }
}

TYPED_TEST(Divergence, OfCategoricalsStaysFiniteForHugeLogitsAndKeepsANaNInItsEntry) {
    for (int64_t C : {4, 40}) {
        Categorical<TypeParam> p(2, 5, C, 200);
        p.dkl[1 * 2 + 1] = 0;
        p.logits[(1 * 5 + 1) * C] = TypeParam::store(NOT_A_NUMBER);
        for (int reverse : {0, 1}) {
            const auto kl = p.value(reverse, mmbal_pool_serial());
            for (size_t i = 0; i < kl.size(); i++) EXPECT_EQ(std::isfinite(kl[i]), i != 3) << i;
            for (const auto &gradient : p.gradients(reverse, mmbal_pool_serial()))
                for (auto value : gradient) EXPECT_TRUE(std::isfinite(TypeParam::load(value)));
        }
    }
}

TEST(Divergence64, HasTheGoldenValuesOfTheCategorical) {
    const double z[] = {std::log(0.7), std::log(0.2), std::log(0.1)};
    const double zq[] = {std::log(0.5), std::log(0.25), std::log(0.25)};
    const mmbal_pool pool = mmbal_pool_serial();
    std::vector<char> workspace(mmbal_categorical_kl_workspace(MMBAL_F64, 3, &pool));
    double kl;
    ASSERT_EQ(mmbal_categorical_kl(MMBAL_F64, z, zq, 1, 1, 3, 0, &kl, workspace.data(), &pool), MMBAL_OK);
    EXPECT_NEAR(kl, 0.09927278218459168, 1e-15);
    ASSERT_EQ(mmbal_categorical_kl(MMBAL_F64, z, zq, 1, 1, 3, 1, &kl, workspace.data(), &pool), MMBAL_OK);
    EXPECT_NEAR(kl, 0.11662245248648459, 1e-15);
}

TEST(Divergence64, OfAClassThatOneSideLacksIsNothingOrInfinite) {
    const double infinity = std::numeric_limits<double>::infinity(), z[] = {0, -infinity}, zq[] = {0, 0};
    const mmbal_pool pool = mmbal_pool_serial();
    std::vector<char> workspace(mmbal_categorical_kl_workspace(MMBAL_F64, 2, &pool));
    double kl;
    ASSERT_EQ(mmbal_categorical_kl(MMBAL_F64, z, zq, 1, 1, 2, 0, &kl, workspace.data(), &pool), MMBAL_OK);
    EXPECT_NEAR(kl, std::log(2.0), 1e-15);
    ASSERT_EQ(mmbal_categorical_kl(MMBAL_F64, z, zq, 1, 1, 2, 1, &kl, workspace.data(), &pool), MMBAL_OK);
    EXPECT_EQ(kl, infinity);
    ASSERT_EQ(mmbal_categorical_kl(MMBAL_F64, z, z, 1, 1, 2, 0, &kl, workspace.data(), &pool), MMBAL_OK);
    EXPECT_EQ(kl, 0);
}

// The fused row gives its last class e^-100: 0 in float32, but not to the divergence.
TEST(Divergence32, OfAClassFarBelowTheLargestIsThatOfItsLogit) {
    for (int64_t C : {2, 24, 25, 47, 100}) {
        std::vector<float> z(C, 0), zq(C, 0);
        zq[C - 1] = -100;
        const mmbal_pool pool = mmbal_pool_serial();
        std::vector<char> workspace(mmbal_categorical_kl_workspace(MMBAL_F32, C, &pool));
        float kl;
        const auto run = [&](int reverse) {
            return mmbal_categorical_kl(MMBAL_F32, z.data(), zq.data(), 1, 1, C, reverse, &kl, workspace.data(), &pool);
        };
        const auto classes = static_cast<double>(C), others = classes - 1;
        ASSERT_EQ(run(0), MMBAL_OK);
        EXPECT_NEAR(kl, 100 / classes + std::log(others / classes), 1e-5 * kl) << C;
        ASSERT_EQ(run(1), MMBAL_OK);
        EXPECT_NEAR(kl, std::log(classes / others), 1e-6) << C;
    }
}

// The last class is masked in both rows, as for a class that a sample cannot have.
TEST(Divergence32, OfAMaskedClassHasNoGradient) {
    const float infinity = std::numeric_limits<float>::infinity();
    for (int64_t C : {3, 24, 25, 40, 64}) {
        for (float mask : {-infinity, std::numeric_limits<float>::lowest(), -200.0f}) {
            std::vector<float> z(C, 0), zq(C, 1);
            z[0] = 2, z[C - 1] = mask, zq[C - 1] = mask;
            const mmbal_pool pool = mmbal_pool_serial();
            std::vector<char> workspace(mmbal_categorical_kl_workspace(MMBAL_F32, C, &pool));
            const float dkl = 1;
            for (int reverse : {0, 1}) {
                std::vector<float> dlogits(C, NAN), dfused(C, NAN);
                ASSERT_EQ(mmbal_categorical_kl_backward(MMBAL_F32, &dkl, z.data(), zq.data(), 1, 1, C, reverse,
                                                        dlogits.data(), dfused.data(), workspace.data(), &pool),
                          MMBAL_OK);
                EXPECT_EQ(dlogits[C - 1], 0) << C << " " << mask << " " << reverse;
                EXPECT_EQ(dfused[C - 1], 0) << C << " " << mask << " " << reverse;
                EXPECT_NE(dlogits[0], 0) << C;
                EXPECT_NE(dfused[0], 0) << C;
            }
        }
    }
}

TEST(Divergence32, OfARowThatIsNoNumberIsNoNumberInValueAndGradients) {
    for (int64_t C : {3, 40}) {
        std::vector<float> z(C, 0), zq(C, 0), dlogits(C), dfused(C);
        z[1] = std::numeric_limits<float>::quiet_NaN(), z[0] = -std::numeric_limits<float>::infinity();
        const mmbal_pool pool = mmbal_pool_serial();
        std::vector<char> workspace(mmbal_categorical_kl_workspace(MMBAL_F32, C, &pool));
        const float dkl = 1;
        float kl = 0;
        ASSERT_EQ(mmbal_categorical_kl(MMBAL_F32, z.data(), zq.data(), 1, 1, C, 0, &kl, workspace.data(), &pool),
                  MMBAL_OK);
        EXPECT_TRUE(std::isnan(kl));
        ASSERT_EQ(mmbal_categorical_kl_backward(MMBAL_F32, &dkl, z.data(), zq.data(), 1, 1, C, 0, dlogits.data(),
                                                dfused.data(), workspace.data(), &pool),
                  MMBAL_OK);
        for (float slope : dlogits) EXPECT_TRUE(std::isnan(slope)) << C;
    }
}

TEST(DivergenceErrors, RefuseSizesAndDtypesOutsideTheContract) {
    const Normal<F32> p(2, 3, false);
    const Categorical<F32> c(2, 3, 4);
    const mmbal_pool pool = mmbal_pool_serial();
    std::vector<char> workspace(mmbal_categorical_kl_workspace(MMBAL_F32, 4, &pool));
    Guarded<float> out(6);
    const auto gaussian = [&](mmbal_dtype dtype, int64_t N, int64_t M) {
        return mmbal_gaussian_kl(dtype, p.mu.data(), p.log_sigma.data(), p.fused_mu.data(), p.fused_log_sigma.data(), N,
                                 M, out.data(), &pool);
    };
    const auto residual = [&](int64_t M, double sigma_min) {
        return mmbal_residual_kl(MMBAL_F32, p.mu.data(), p.fused_mu.data(), p.target.data(), 2, M, sigma_min,
                                 out.data(), &pool);
    };
    const auto categorical = [&](int64_t M, int64_t C) {
        return mmbal_categorical_kl(MMBAL_F32, c.logits.data(), c.fused.data(), M, 3, C, 0, out.data(),
                                    workspace.data(), &pool);
    };
    EXPECT_EQ(gaussian(MMBAL_F32, -1, 3), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(gaussian(MMBAL_F32, 2, 0), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(gaussian(MMBAL_F32, 2, MMBAL_MAX_MODALITIES + 1), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(gaussian(enum_of<mmbal_dtype>(9), 2, 3), MMBAL_UNSUPPORTED);
    EXPECT_EQ(residual(0, 1), MMBAL_INVALID_ARGUMENT);
    for (double sigma_min : {0.0, -1.0, NOT_A_NUMBER}) EXPECT_EQ(residual(3, sigma_min), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(categorical(0, 4), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(categorical(2, 0), MMBAL_INVALID_ARGUMENT);
    EXPECT_TRUE(out.untouched());
}

} // namespace
