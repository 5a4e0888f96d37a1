// alignment*.cu against the C core: the same formulas with other orders of sums, so within stated bounds.
#include "mmbal/cuda/alignment.h"

#include <algorithm>
#include <array>

#include "alignment_case.h"
#include "device.h"

namespace mmbal_test {
namespace {

template <typename T>
class CudaAlign : public ::testing::Test {};
TYPED_TEST_SUITE(CudaAlign, Dtypes, DtypeNames);

using Upstream = std::array<double, 3>;

template <typename T>
struct Results {
    std::vector<typename T::Real> losses, normalizers; // losses: loss, regression, contrastive
    std::array<std::vector<typename T::Stored>, 4> gradients;
};

template <typename T>
Results<T> on_cpu(const AlignmentCase<T> &of, const Upstream &upstream) {
    using Real = typename T::Real;
    const mmbal_alignment t = of.alignment();
    Results<T> made;
    made.losses.resize(3), made.normalizers.resize(2 * of.B);
    std::vector<unsigned char> workspace(mmbal_align_loss_workspace(&t, 1));
    EXPECT_EQ(mmbal_align_loss(&t, &made.losses[0], &made.losses[1], &made.losses[2], made.normalizers.data(),
                               workspace.data(), serial()),
              MMBAL_OK);
    const std::array<Real, 3> up = {static_cast<Real>(upstream[0]), static_cast<Real>(upstream[1]),
                                    static_cast<Real>(upstream[2])};
    for (size_t i = 0; i < 4; i++) made.gradients[i].resize(i < 2 ? of.B * of.D : of.A * of.C);
    auto &g = made.gradients;
    const mmbal_alignment_gradients to = {g[0].data(), g[1].data(), g[2].data(), g[3].data()};
    workspace.assign(mmbal_align_loss_backward_workspace(&t, &to, 1), 0);
    EXPECT_EQ(
        mmbal_align_loss_backward(&t, &up[0], &up[1], &up[2], made.normalizers.data(), &to, workspace.data(), serial()),
        MMBAL_OK);
    return made;
}

// shift: elements between the beginning of an array and its data.
template <typename T>
Results<T> on_device(const AlignmentCase<T> &of, const Upstream &upstream,
                     const std::array<bool, 4> &needed = {true, true, true, true}, int64_t shift = 0) {
    using Real = typename T::Real;
    using Stored = typename T::Stored;
    const auto shifted = [&](const std::vector<Stored> &values) {
        std::vector<Stored> moved(shift, T::store(0));
        moved.insert(moved.end(), values.begin(), values.end());
        return moved;
    };
    DeviceArray<Stored> pred("pred", shifted(of.pred)), target("target", shifted(of.target)),
        source("source", shifted(of.source)), candidates("candidates", shifted(of.candidates));
    DeviceArray<int64_t> groups("groups", of.groups);
    DeviceArray<uint8_t> present("present", of.present);
    mmbal_alignment t = of.alignment();
    t.pred = pred.data() + shift, t.target = target.data() + shift;
    t.source_embedding = source.data() + shift, t.target_embedding = candidates.data() + shift;
    t.groups = of.groups.empty() ? nullptr : groups.data();
    t.present = of.present.empty() ? nullptr : present.data();
    DeviceArray<Real> losses("losses", 3), normalizers("normalizers", 2 * of.B);
    Results<T> made;
    {
        DeviceBytes workspace("workspace", mmbal_align_loss_workspace_cuda(&t));
        EXPECT_EQ(mmbal_align_loss_cuda(&t, losses.data(), losses.data() + 1, losses.data() + 2, normalizers.data(),
                                        workspace.data(), nullptr),
                  MMBAL_OK);
    }
    made.losses = losses.values(), made.normalizers = normalizers.values();
    DeviceArray<Real> up("upstream", std::vector<Real>{static_cast<Real>(upstream[0]), static_cast<Real>(upstream[1]),
                                                       static_cast<Real>(upstream[2])});
    DeviceArray<Stored> dpred("dpred", of.B * of.D), dtarget("dtarget", of.B * of.D), dsource("dsource", of.A * of.C),
        dcandidates("dcandidates", of.A * of.C);
    const std::array<DeviceArray<Stored> *, 4> all = {&dpred, &dtarget, &dsource, &dcandidates};
    std::array<Stored *, 4> data;
    for (size_t i = 0; i < 4; i++) data[i] = needed[i] ? all[i]->data() : nullptr;
    const mmbal_alignment_gradients to = {data[0], data[1], data[2], data[3]};
    DeviceBytes workspace("workspace", mmbal_align_loss_backward_workspace_cuda(&t, &to));
    EXPECT_EQ(mmbal_align_loss_backward_cuda(&t, up.data(), up.data() + 1, up.data() + 2, normalizers.data(), &to,
                                             workspace.data(), nullptr),
              MMBAL_OK);
    for (size_t i = 0; i < 4; i++)
        if (needed[i]) made.gradients[i] = all[i]->values();
    return made;
}

// Rounding of float32 sums on both sides, seen through a temperature of 0.1 or more.
template <typename T>
constexpr double ERROR = T::dtype == MMBAL_F64 ? 2e-11 : 4e-5;

template <typename T>
void expect_same(const Results<T> &got, const Results<T> &expected) {
    for (const auto &[a, b] : {std::pair(got.losses, expected.losses), {got.normalizers, expected.normalizers}}) {
        ASSERT_EQ(a.size(), b.size());
        for (size_t i = 0; i < a.size(); i++) {
            ASSERT_EQ(std::isnan(a[i]), std::isnan(b[i])) << i;
            if (std::isnan(b[i]) || a[i] == b[i]) continue; // inf, too
            ASSERT_NEAR(a[i], b[i], ERROR<T> * (1 + std::fabs(b[i]))) << i;
        }
    }
    for (size_t k = 0; k < 4; k++) {
        const auto &a = got.gradients[k], &b = expected.gradients[k];
        ASSERT_EQ(a.size(), b.size());
        double largest = 0;
        for (const auto &value : b) largest = std::max(largest, std::fabs(T::load(value)));
        for (size_t i = 0; i < a.size(); i++) {
            const double x = T::load(a[i]), y = T::load(b[i]);
            ASSERT_EQ(std::isnan(x), std::isnan(y)) << "gradient " << k << ", element " << i;
            if (std::isnan(y) || x == y) continue;
            const double close = (3 * ERROR<T> + 2 * T::stored_error) * largest + 1e-2 * ERROR<T> +
                                 (T::dtype == MMBAL_F16 ? 0x1p-23 : 0);
            ASSERT_NEAR(x, y, close) << "gradient " << k << ", element " << i;
        }
    }
}

template <typename T>
void expect_that_of_the_core(const AlignmentCase<T> &of, unsigned schedule, int64_t shift = 0) {
    const Upstream upstream = {0.7, -0.4, 1.3};
    const Results<T> expected = on_cpu(of, upstream);
    under_schedule(schedule % SCHEDULES,
                   [&] { expect_same(on_device(of, upstream, {true, true, true, true}, shift), expected); });
}

TYPED_TEST(CudaAlign, LossesAndGradientsAreThoseOfTheCore) {
    Random random(1);
    for (unsigned round = 0; round < 15; round++) {
        const int64_t B = random.pick<int64_t>({0, 1, 2, 5, 40}), more = random.pick<int64_t>({0, 0, 3, 50});
        const std::vector<int64_t> widths = {1, 4, 32, 37};
        AlignmentCase<TypeParam> of(random, B, random.pick(widths), B + more, random.pick(widths),
                                    random.below(more + 1));
        of.regression = static_cast<mmbal_regression>(round % 4), of.symmetric = round % 3 != 0;
        for (int64_t a = 0; a < of.A && round % 3 == 1; a++) of.groups.push_back(random.below(of.A / 2 + 1));
        for (int64_t a = 0; a < of.A && round % 4 == 2; a++) of.present.push_back(random.below(4) != 0);
        SCOPED_TRACE(std::to_string(of.B) + " of " + std::to_string(of.A) + ", round " + std::to_string(round));
        expect_that_of_the_core(of, round, round % 5 == 3);
    }
}

TYPED_TEST(CudaAlign, SeveralTilesStripesAndSegmentsOfCandidates) {
    Random random(2);
    for (const int64_t A : {150, 420}) {
        AlignmentCase<TypeParam> of(random, A / 3, 3, A, A == 150 ? 70 : 5, A / 2);
        for (int64_t a = 0; a < of.A; a++) of.groups.push_back(random.below(A / 3)), of.present.push_back(a % 7 != 3);
        of.symmetric = A == 420;
        expect_that_of_the_core(of, A == 420);
    }
    expect_that_of_the_core(AlignmentCase<TypeParam>(random, 270, 2, 270, 9), 2);
}

TYPED_TEST(CudaAlign, AGradientIsTheSameWhicheverOthersAreAskedFor) {
    Random random(4);
    const AlignmentCase<TypeParam> of(random, 30, 4, 30, 9);
    const Results<TypeParam> all = on_device(of, {1, 0, 0});
    for (size_t i = 0; i < 4; i++) {
        std::array<bool, 4> needed{};
        needed[i] = true;
        EXPECT_TRUE(same_bits(on_device(of, {1, 0, 0}, needed).gradients[i], all.gradients[i])) << i;
    }
}

TYPED_TEST(CudaAlign, AbsentRowsAreNotReadAndHaveNoGradient) {
    Random random(5);
    AlignmentCase<TypeParam> of(random, 8, 3, 8, 4), spoiled = of;
    of.present = spoiled.present = {1, 0, 1, 1, 0, 1, 1, 1};
    for (int64_t b : {1, 4}) {
        std::fill_n(spoiled.pred.begin() + b * 3, 3, TypeParam::store(NAN));
        std::fill_n(spoiled.source.begin() + b * 4, 4, TypeParam::store(NAN));
        std::fill_n(spoiled.candidates.begin() + b * 4, 4, TypeParam::store(NAN));
    }
    const Results<TypeParam> expected = on_device(of, {1, 1, 1}), got = on_device(spoiled, {1, 1, 1});
    EXPECT_TRUE(same_bits(got.losses, expected.losses));
    for (size_t i = 0; i < 4; i++) EXPECT_TRUE(same_bits(got.gradients[i], expected.gradients[i])) << i;
    for (int64_t k = 0; k < 4; k++) EXPECT_EQ(TypeParam::load(got.gradients[2][4 + k]), 0);
}

TYPED_TEST(CudaAlign, WhatIsNoNumberComesThroughAsOnTheCpu) {
    Random random(6);
    AlignmentCase<TypeParam> of(random, 20, 5, 20, 6);
    of.source[3 * 6 + 1] = TypeParam::store(NAN), of.pred[7] = TypeParam::store(INFINITY);
    for (unsigned schedule = 0; schedule < SCHEDULES; schedule++) expect_that_of_the_core(of, schedule);
    of.alpha = 1; // the contrastive part has no weight
    const auto loss = on_device(of, {1, 0, 0}).losses;
    EXPECT_FALSE(std::isnan(loss[0]));
    EXPECT_TRUE(std::isnan(loss[2]));
}

TYPED_TEST(CudaAlign, WithoutTwoCandidatesNothingIsContrasted) {
    Random random(7);
    for (const int64_t there : {0, 1}) {
        AlignmentCase<TypeParam> of(random, 70, 3, 90, 4, 10);
        of.present.assign(90, 0), of.present[20] = there != 0;
        const auto got = on_device(of, {1, 1, 1});
        EXPECT_EQ(got.losses[2], 0);
        EXPECT_EQ(got.losses[1] != 0, there == 1);
        for (auto n : got.normalizers) EXPECT_EQ(n, 0);
        for (size_t i : {2, 3})
            for (auto g : got.gradients[i]) EXPECT_EQ(TypeParam::load(g), 0);
    }
    expect_that_of_the_core(AlignmentCase<TypeParam>(random, 0, 3, 0, 4), 0);
}

TEST(CudaAlignNumbers, TinyVectorsAndTemperaturesStayFinite) {
    Random random(8);
    for (double tau : {1e-30, 1e-3, 1e30}) {
        AlignmentCase<F32> of(random, 6, 2, 6, 3);
        of.tau = tau;
        std::fill_n(of.source.begin(), 3, 0.0f), std::fill_n(of.candidates.begin() + 3, 3, 1e-30f);
        const Results<F32> got = on_device(of, {0, 0, 1});
        EXPECT_TRUE(std::isfinite(got.losses[2])) << tau;
        for (size_t i : {2, 3})
            for (float g : got.gradients[i]) EXPECT_TRUE(std::isfinite(g)) << tau;
        for (size_t k = 0; k < 3; k++) EXPECT_TRUE(got.gradients[2][k] == 0 && got.gradients[3][3 + k] == 0);
    }
}

TEST(CudaAlignArguments, WrongOnesAreRefused) {
    Random random(9);
    const AlignmentCase<F64> good(random, 4, 3, 6, 2, 1);
    const auto refused = [&](const std::function<void(mmbal_alignment &)> &spoil, mmbal_status expected) {
        mmbal_alignment t = good.alignment();
        spoil(t);
        const mmbal_alignment_gradients to = {};
        EXPECT_EQ(mmbal_align_loss_workspace_cuda(&t), 0);
        EXPECT_EQ(mmbal_align_loss_cuda(&t, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr), expected);
        EXPECT_EQ(mmbal_align_loss_backward_workspace_cuda(&t, &to), 0);
        EXPECT_EQ(mmbal_align_loss_backward_cuda(&t, nullptr, nullptr, nullptr, nullptr, &to, nullptr, nullptr),
                  expected);
    };
    refused([](auto &t) { t.B = -1; }, MMBAL_INVALID_ARGUMENT);
    refused([](auto &t) { t.A = 3; }, MMBAL_INVALID_ARGUMENT);
    refused([](auto &t) { t.C = 0; }, MMBAL_INVALID_ARGUMENT);
    refused([](auto &t) { t.offset = 3; }, MMBAL_INVALID_ARGUMENT);
    refused([](auto &t) { t.tau = NAN; }, MMBAL_INVALID_ARGUMENT);
    refused([](auto &t) { t.alpha = 1.1; }, MMBAL_INVALID_ARGUMENT);
    refused([](auto &t) { t.regression = enum_of<mmbal_regression>(4); }, MMBAL_INVALID_ARGUMENT);
    refused([](auto &t) { t.dtype = enum_of<mmbal_dtype>(9); }, MMBAL_UNSUPPORTED);
}

} // namespace
} // namespace mmbal_test
