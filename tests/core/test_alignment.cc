#include "mmbal/alignment.h"

#include <algorithm>
#include <array>

#include "alignment_case.h"

namespace {

using namespace mmbal_test;

constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();

template <typename T>
struct Aligned {
    mmbal_status status;
    std::vector<typename T::Real> losses, normalizers; // losses: loss, regression, contrastive
    bool intact, untouched;
};

template <typename T>
Aligned<T> align(const AlignmentCase<T> &of, const mmbal_pool &pool = mmbal_pool_serial()) {
    using Real = typename T::Real;
    const mmbal_alignment t = of.alignment();
    Guarded<Real> loss(1), regression(1), contrastive(1), normalizers(2 * std::max<int64_t>(of.B, 0));
    Guarded<unsigned char> workspace(mmbal_align_loss_workspace(&t, pool.workers));
    const mmbal_status status = mmbal_align_loss(&t, loss.data(), regression.data(), contrastive.data(),
                                                 normalizers.data(), workspace.data(), &pool);
    const bool intact = loss.intact() && regression.intact() && contrastive.intact() && normalizers.intact();
    const bool untouched =
        loss.untouched() && regression.untouched() && contrastive.untouched() && normalizers.untouched();
    return {status,
            {loss.values()[0], regression.values()[0], contrastive.values()[0]},
            normalizers.values(),
            intact && workspace.intact(),
            untouched};
}

template <typename T>
using Gradients = std::array<std::vector<typename T::Stored>, 4>;

template <typename T>
Gradients<T> gradients(const AlignmentCase<T> &of, const std::vector<typename T::Real> &normalizers,
                       const std::array<double, 3> &upstream, const mmbal_pool &pool = mmbal_pool_serial(),
                       const std::array<bool, 4> &needed = {true, true, true, true}) {
    using Real = typename T::Real;
    const mmbal_alignment t = of.alignment();
    const std::array<int64_t, 4> sizes = {of.B * of.D, of.B * of.D, of.A * of.C, of.A * of.C};
    std::vector<Guarded<typename T::Stored>> made;
    for (int64_t size : sizes) made.emplace_back(size);
    std::array<void *, 4> data;
    for (size_t i = 0; i < 4; i++) data[i] = needed[i] ? made[i].data() : nullptr;
    const mmbal_alignment_gradients to = {data[0], data[1], data[2], data[3]};
    Guarded<unsigned char> workspace(mmbal_align_loss_backward_workspace(&t, &to, pool.workers));
    const std::array<Real, 3> up = {static_cast<Real>(upstream[0]), static_cast<Real>(upstream[1]),
                                    static_cast<Real>(upstream[2])};
    EXPECT_EQ(mmbal_align_loss_backward(&t, &up[0], &up[1], &up[2], normalizers.data(), &to, workspace.data(), &pool),
              MMBAL_OK);
    EXPECT_TRUE(workspace.intact());
    Gradients<T> values;
    for (size_t i = 0; i < 4; i++) {
        EXPECT_TRUE(made[i].intact());
        EXPECT_TRUE(needed[i] || made[i].untouched());
        values[i] = made[i].values();
    }
    return values;
}

// The losses and their gradients in float64, similarity by similarity.
struct Plain {
    double regression = 0, contrastive = 0;
    std::array<std::vector<double>, 4> gradients;
};

template <typename T>
std::vector<double> loaded(const std::vector<typename T::Stored> &stored) {
    std::vector<double> values;
    for (const auto &s : stored) values.push_back(T::load(s));
    return values;
}

struct Units {
    std::vector<double> unit, inverse;
    Units(const std::vector<double> &x, int64_t rows, int64_t width) : unit(x), inverse(rows) {
        for (int64_t a = 0; a < rows; a++) {
            double squares = 0;
            for (int64_t i = 0; i < width; i++) squares += x[a * width + i] * x[a * width + i];
            const double norm = std::sqrt(squares);
            inverse[a] = norm > 1e-12 ? 1 / norm : 0;
            for (int64_t i = 0; i < width; i++) unit[a * width + i] /= std::max(norm, 1e-12);
        }
    }
    std::vector<double> backward(const std::vector<double> &d, int64_t width) const {
        std::vector<double> dx(d.size());
        for (size_t a = 0; a < inverse.size(); a++) {
            double along = 0;
            for (int64_t i = 0; i < width; i++) along += d[a * width + i] * unit[a * width + i];
            for (int64_t i = 0; i < width; i++)
                dx[a * width + i] = inverse[a] * (d[a * width + i] - along * unit[a * width + i]);
        }
        return dx;
    }
};

template <typename T>
Plain plain(const AlignmentCase<T> &of, const std::array<double, 3> &upstream) {
    const int64_t B = of.B, D = of.D, A = of.A, C = of.C;
    const auto is_present = [&](int64_t a) { return of.present.empty() || of.present[a]; };
    int64_t P = 0;
    for (int64_t a = 0; a < A; a++) P += is_present(a);
    const double weight = P > 0 && B > 0 ? static_cast<double>(A) / static_cast<double>(B * P) : 0;
    const double to_regression = upstream[1] + of.alpha * upstream[0],
                 to_contrastive = upstream[2] + (1 - of.alpha) * upstream[0];
    Plain made;
    const auto pred = loaded<T>(of.pred), target = loaded<T>(of.target);
    made.gradients[0].assign(B * D, 0), made.gradients[1].assign(B * D, 0);
    const Units p(pred, B, D), t(target, B, D);
    for (int64_t b = 0; b < B; b++) {
        if (!is_present(of.offset + b)) continue;
        double sum = 0, cosine = 0;
        for (int64_t i = b * D; i < (b + 1) * D; i++) cosine += p.unit[i] * t.unit[i];
        const double mean = of.regression == MMBAL_REGRESSION_L2 ? 1 : 1 / static_cast<double>(D);
        for (int64_t i = b * D; i < (b + 1) * D; i++) {
            const double d = pred[i] - target[i], size = std::fabs(d);
            double slope = 2 * d;
            if (of.regression == MMBAL_REGRESSION_SMOOTH_L1) {
                sum += size < of.beta ? d * d / (2 * of.beta) : size - of.beta / 2;
                slope = size < of.beta ? d / of.beta : d > 0 ? 1 : -1;
            } else {
                sum += d * d;
            }
            made.gradients[0][i] = to_regression * weight * mean * slope;
            made.gradients[1][i] = -made.gradients[0][i];
            if (of.regression != MMBAL_REGRESSION_COSINE) continue;
            made.gradients[0][i] = -to_regression * weight * p.inverse[b] * (t.unit[i] - cosine * p.unit[i]);
            made.gradients[1][i] = -to_regression * weight * t.inverse[b] * (p.unit[i] - cosine * t.unit[i]);
        }
        made.regression += weight * (of.regression == MMBAL_REGRESSION_COSINE ? 1 - cosine : sum * mean);
    }
    const Units s(loaded<T>(of.source), A, C), c(loaded<T>(of.candidates), A, C);
    std::vector<double> ds(A * C, 0), dc(A * C, 0);
    const auto counts = [&](int64_t i, int64_t j) {
        if (!is_present(i) || !is_present(j)) return false;
        return i == j || of.groups.empty() || of.groups[i] != of.groups[j];
    };
    const auto contrast = [&](int64_t a, bool column, double share) {
        std::vector<double> z(A);
        double top = -INFINITY, total = 0;
        for (int64_t j = 0; j < A; j++) {
            if (!counts(a, j)) continue;
            const int64_t row = column ? j : a, col = column ? a : j;
            for (int64_t i = 0; i < C; i++) z[j] += s.unit[row * C + i] * c.unit[col * C + i] / of.tau;
            top = std::max(top, z[j]);
        }
        for (int64_t j = 0; j < A; j++) total += counts(a, j) ? std::exp(z[j] - top) : 0;
        made.contrastive += share * (top + std::log(total) - z[a]);
        for (int64_t j = 0; j < A; j++) {
            if (!counts(a, j)) continue;
            const int64_t row = column ? j : a, col = column ? a : j;
            const double g = to_contrastive * share / of.tau * (std::exp(z[j] - top) / total - (j == a));
            for (int64_t i = 0; i < C; i++) {
                ds[row * C + i] += g * c.unit[col * C + i];
                dc[col * C + i] += g * s.unit[row * C + i];
            }
        }
    };
    for (int64_t a = of.offset; a < of.offset + B && P > 1; a++) {
        if (!is_present(a)) continue;
        contrast(a, false, of.symmetric ? weight / 2 : weight);
        if (of.symmetric) contrast(a, true, weight / 2);
    }
    made.gradients[2] = s.backward(ds, C), made.gradients[3] = c.backward(dc, C);
    return made;
}

template <typename T>
void expect_plain(const AlignmentCase<T> &of) {
    const std::array<double, 3> upstream = {0.7, -0.4, 1.3};
    const Plain expected = plain(of, upstream);
    const Aligned<T> got = align(of);
    ASSERT_EQ(got.status, MMBAL_OK);
    ASSERT_TRUE(got.intact);
    const double error = T::dtype == MMBAL_F64 ? 1e-11 : 2e-5;
    EXPECT_NEAR(got.losses[1], expected.regression, error * (1 + expected.regression));
    EXPECT_NEAR(got.losses[2], expected.contrastive, error * (1 + expected.contrastive));
    EXPECT_NEAR(got.losses[0], of.alpha * expected.regression + (1 - of.alpha) * expected.contrastive,
                error * (1 + expected.regression + expected.contrastive));
    const Gradients<T> d = gradients(of, got.normalizers, upstream);
    for (size_t i = 0; i < 4; i++) {
        ASSERT_EQ(d[i].size(), expected.gradients[i].size());
        double largest = 0;
        for (double g : expected.gradients[i]) largest = std::max(largest, std::fabs(g));
        for (size_t k = 0; k < d[i].size(); k++)
            ASSERT_NEAR(T::load(d[i][k]), expected.gradients[i][k],
                        (3 * error + T::stored_error) * largest + 1e-2 * error + (T::dtype == MMBAL_F16 ? 0x1p-24 : 0))
                << "gradient " << i << ", element " << k;
    }
}

template <typename T>
class Align : public ::testing::Test {};
TYPED_TEST_SUITE(Align, Dtypes, DtypeNames);

TYPED_TEST(Align, EqualsThePlainFormulas) {
    Random random(1);
    for (int round = 0; round < 30; round++) {
        const int64_t B = random.pick<int64_t>({1, 2, 5, 40}), more = random.pick<int64_t>({0, 0, 3, 50});
        AlignmentCase<TypeParam> of(random, B, random.pick<int64_t>({1, 4, 37}), B + more,
                                    random.pick<int64_t>({1, 3, 33}), random.below(more + 1));
        of.regression = static_cast<mmbal_regression>(random.below(4)),
        of.symmetric = static_cast<int>(random.below(2));
        for (int64_t a = 0; a < of.A && round % 3 == 1; a++) of.groups.push_back(random.below(of.A / 2 + 1));
        for (int64_t a = 0; a < of.A && round % 4 == 2; a++) of.present.push_back(random.below(4) != 0);
        expect_plain(of);
    }
}

TYPED_TEST(Align, EqualsThePlainFormulasOverSeveralBlocks) {
    Random random(2);
    AlignmentCase<TypeParam> of(random, 290, 3, 600, 5, 150);
    for (int64_t a = 0; a < of.A; a++) of.groups.push_back(random.below(200)), of.present.push_back(a % 7 != 3);
    expect_plain(of);
    of.symmetric = 0;
    expect_plain(of);
}

TYPED_TEST(Align, IsBitwiseTheSameInEveryPool) {
    Random random(3);
    AlignmentCase<TypeParam> of(random, 530, 20, 900, 70, 200);
    for (int64_t a = 0; a < of.A; a++) of.groups.push_back(a / 2), of.present.push_back(a % 5 != 0);
    const Aligned<TypeParam> expected = align(of);
    const Gradients<TypeParam> d = gradients(of, expected.normalizers, {1, 2, 3});
    for_each_pool([&](const std::string &name, const mmbal_pool &pool) {
        const Aligned<TypeParam> got = align(of, pool);
        EXPECT_TRUE(same_bits(got.losses, expected.losses)) << name;
        EXPECT_TRUE(same_bits(got.normalizers, expected.normalizers)) << name;
        const Gradients<TypeParam> other = gradients(of, expected.normalizers, {1, 2, 3}, pool);
        for (size_t i = 0; i < 4; i++) EXPECT_TRUE(same_bits(other[i], d[i])) << name << ", gradient " << i;
    });
}

TYPED_TEST(Align, AGradientIsTheSameWhicheverOthersAreAskedFor) {
    Random random(4);
    const AlignmentCase<TypeParam> of(random, 30, 4, 30, 9);
    const Aligned<TypeParam> forward = align(of);
    const Gradients<TypeParam> all = gradients(of, forward.normalizers, {1, 0, 0});
    for (size_t i = 0; i < 4; i++) {
        std::array<bool, 4> needed{};
        needed[i] = true;
        const Gradients<TypeParam> one = gradients(of, forward.normalizers, {1, 0, 0}, mmbal_pool_serial(), needed);
        EXPECT_TRUE(same_bits(one[i], all[i])) << i;
    }
}

TYPED_TEST(Align, AbsentRowsAreNotReadAndHaveNoGradient) {
    Random random(5);
    AlignmentCase<TypeParam> of(random, 8, 3, 8, 4), spoiled = of;
    of.present = spoiled.present = {1, 0, 1, 1, 0, 1, 1, 1};
    for (int64_t b : {1, 4}) {
        std::fill_n(spoiled.pred.begin() + b * 3, 3, TypeParam::store(NOT_A_NUMBER));
        std::fill_n(spoiled.source.begin() + b * 4, 4, TypeParam::store(NOT_A_NUMBER));
        std::fill_n(spoiled.candidates.begin() + b * 4, 4, TypeParam::store(NOT_A_NUMBER));
    }
    const Aligned<TypeParam> expected = align(of), got = align(spoiled);
    EXPECT_TRUE(same_bits(got.losses, expected.losses));
    const Gradients<TypeParam> d = gradients(spoiled, got.normalizers, {1, 1, 1});
    for (size_t i = 0; i < 4; i++) {
        const int64_t width = i < 2 ? 3 : 4;
        for (int64_t b = 0; b < 8; b++)
            for (int64_t k = b * width; k < (b + 1) * width; k++) {
                ASSERT_TRUE(std::isfinite(TypeParam::load(d[i][k]))) << i;
                ASSERT_TRUE(of.present[b] || TypeParam::load(d[i][k]) == 0) << i;
            }
    }
}

TYPED_TEST(Align, OneCandidateHasNothingToContrast) {
    Random random(6);
    for (int64_t B : {0, 1}) {
        const AlignmentCase<TypeParam> of(random, B, 3, 1, 4);
        const Aligned<TypeParam> got = align(of);
        ASSERT_EQ(got.status, MMBAL_OK);
        EXPECT_EQ(got.losses[2], 0);
        for (auto n : got.normalizers) EXPECT_EQ(n, 0);
        const Gradients<TypeParam> d = gradients(of, got.normalizers, {1, 1, 1});
        for (size_t i : {2, 3})
            for (auto g : d[i]) EXPECT_EQ(TypeParam::load(g), 0);
    }
}

TEST(AlignNumbers, TinyVectorsAndTemperaturesStayFinite) {
    Random random(7);
    for (double tau : {1e-30, 1e-3, 1e30}) {
        AlignmentCase<F32> of(random, 6, 2, 6, 3);
        of.tau = tau;
        std::fill_n(of.source.begin(), 3, 0.0f), std::fill_n(of.candidates.begin() + 3, 3, 1e-30f);
        const Aligned<F32> got = align(of);
        EXPECT_TRUE(std::isfinite(got.losses[2])) << tau;
        const Gradients<F32> d = gradients(of, got.normalizers, {0, 0, 1});
        for (size_t i : {2, 3})
            for (float g : d[i]) EXPECT_TRUE(std::isfinite(g)) << tau;
        for (int64_t k = 0; k < 3; k++) EXPECT_TRUE(d[2][k] == 0 && d[3][3 + k] == 0);
    }
}

TEST(AlignArguments, WrongOnesAreRefusedBeforeAnythingIsWritten) {
    Random random(8);
    const AlignmentCase<F64> good(random, 4, 3, 6, 2, 1);
    const auto refused = [&](const std::function<void(mmbal_alignment &)> &spoil, mmbal_status expected) {
        mmbal_alignment t = good.alignment();
        spoil(t);
        Guarded<double> outputs(3), normalizers(8);
        const mmbal_pool pool = mmbal_pool_serial();
        EXPECT_EQ(mmbal_align_loss_workspace(&t, 1), 0);
        EXPECT_EQ(mmbal_align_loss(&t, outputs.data(), outputs.data() + 1, outputs.data() + 2, normalizers.data(),
                                   nullptr, &pool),
                  expected);
        EXPECT_TRUE(outputs.untouched() && normalizers.untouched());
        Guarded<double> d(12);
        const mmbal_alignment_gradients to = {d.data(), nullptr, nullptr, nullptr};
        const double one = 1;
        EXPECT_EQ(mmbal_align_loss_backward(&t, &one, &one, &one, normalizers.data(), &to, nullptr, &pool), expected);
        EXPECT_TRUE(d.untouched());
    };
    const auto bad = [&](const std::function<void(mmbal_alignment &)> &spoil) {
        refused(spoil, MMBAL_INVALID_ARGUMENT);
    };
    bad([](auto &t) { t.B = -1; });
    bad([](auto &t) { t.D = 0; });
    bad([](auto &t) { t.C = 0; });
    bad([](auto &t) { t.A = 3; });
    bad([](auto &t) { t.offset = 3; });
    bad([](auto &t) { t.offset = -1; });
    bad([](auto &t) { t.tau = 0; });
    bad([](auto &t) { t.tau = NOT_A_NUMBER; });
    bad([](auto &t) { t.alpha = 1.1; });
    bad([](auto &t) { t.beta = -1; });
    bad([](auto &t) { t.regression = enum_of<mmbal_regression>(4); });
    refused([](auto &t) { t.dtype = enum_of<mmbal_dtype>(9); }, MMBAL_UNSUPPORTED);
    mmbal_regression regression = MMBAL_REGRESSION_L2;
    EXPECT_TRUE(mmbal_regression_from_name("cosine", &regression));
    EXPECT_EQ(regression, MMBAL_REGRESSION_COSINE);
    EXPECT_FALSE(mmbal_regression_from_name("l1", &regression));
}

} // namespace
