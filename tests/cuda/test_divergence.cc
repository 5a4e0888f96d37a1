// divergence.cu against the C core, whose exponentials and logarithms are its own: in the bounds that both keep.
#include "mmbal/cuda/divergence.h"

#include "device.h"
#include "helpers.h"

namespace mmbal_test {
namespace {

template <typename T>
class CudaDivergence : public ::testing::Test {};
TYPED_TEST_SUITE(CudaDivergence, Dtypes, DtypeNames);

// Each value within its rounding and the errors of sums that are at most `whole` of it or a tenth of the largest. NaN
// where NaN is expected.
template <typename T>
void expect_close(const char *what, const std::vector<typename T::Stored> &got,
                  const std::vector<typename T::Stored> &expected) {
    ASSERT_EQ(got.size(), expected.size()) << what;
    const double sums = T::dtype == MMBAL_F64 ? 4e-12 : 4e-6;
    double largest = 0;
    for (const auto &value : expected)
        if (std::isfinite(T::load(value))) largest = std::max(largest, std::fabs(T::load(value)));
    for (size_t i = 0; i < got.size(); i++) {
        const double a = T::load(got[i]), b = T::load(expected[i]);
        if (std::isnan(b) || std::isinf(b)) {
            ASSERT_TRUE(std::isnan(b) ? std::isnan(a) : a == b) << what << "[" << i << "]: " << a << ", expected " << b;
            continue;
        }
        const double allowed =
            sums * (std::fabs(b) + 0.1 * largest) + 2.1 * T::stored_error * std::fabs(b) + 1e-7 * sums;
        ASSERT_LE(std::fabs(a - b), allowed) << what << "[" << i << "]: " << a << ", expected " << b;
    }
}

template <typename T>
using RealType = std::conditional_t<T::dtype == MMBAL_F64, F64, F32>;

// One missing modality, as NaN whose gradient is 0; one NaN that counts.
template <typename T>
void spoil(std::vector<typename T::Stored> *values, std::vector<typename T::Real> *upstream, size_t missing,
           size_t nan) {
    if (values->size() <= nan) return;
    (*values)[missing] = (*values)[nan] = T::store(NAN);
    (*upstream)[missing] = 0;
}

TYPED_TEST(CudaDivergence, OfNormalsIsThatOfTheCore) {
    using Stored = typename TypeParam::Stored;
    using Real = typename TypeParam::Real;
    const mmbal_dtype dtype = TypeParam::dtype;
    for (const auto &[N, M] : std::vector<std::pair<int64_t, int64_t>>{{0, 3}, {1, 1}, {400, 3}, {90, 17}}) {
        SCOPED_TRACE(std::to_string(N) + " x " + std::to_string(M));
        Random random(N + M);
        auto mu = random.tensor<TypeParam>(N * M, 2);
        const auto log_sigma = random.tensor<TypeParam>(N * M, 1);
        const auto fused_mu = random.tensor<TypeParam>(N, 2), fused_log_sigma = random.tensor<TypeParam>(N, 1),
                   target = random.tensor<TypeParam>(N, 3);
        std::vector<Real> dkl(N * M);
        for (Real &g : dkl) g = static_cast<Real>(random.uniform(-1, 1));
        spoil<TypeParam>(&mu, &dkl, 7, 20);
        for (const bool residual : {false, true}) {
            const double sigma_min = 0.05;
            std::vector<Real> kl(N * M);
            std::vector<Stored> dmu(N * M), dlog_sigma(N * M), dfused_mu(N), dfused_log_sigma(N);
            if (residual) {
                mmbal_residual_kl(dtype, mu.data(), fused_mu.data(), target.data(), N, M, sigma_min, kl.data(),
                                  serial());
                mmbal_residual_kl_backward(dtype, dkl.data(), mu.data(), fused_mu.data(), target.data(), N, M,
                                           sigma_min, dmu.data(), dfused_mu.data(), serial());
            } else {
                mmbal_gaussian_kl(dtype, mu.data(), log_sigma.data(), fused_mu.data(), fused_log_sigma.data(), N, M,
                                  kl.data(), serial());
                mmbal_gaussian_kl_backward(dtype, dkl.data(), mu.data(), log_sigma.data(), fused_mu.data(),
                                           fused_log_sigma.data(), N, M, dmu.data(), dlog_sigma.data(),
                                           dfused_mu.data(), dfused_log_sigma.data(), serial());
            }
            for_each_schedule([&] {
                DeviceArray<Stored> d_mu("mu", mu), d_log_sigma("log_sigma", log_sigma),
                    d_fused_mu("fused_mu", fused_mu), d_fused_log_sigma("fused_log_sigma", fused_log_sigma),
                    d_target("target", target);
                DeviceArray<Real> d_dkl("dkl", dkl), d_kl("kl", N * M);
                DeviceArray<Stored> of_mu("dmu", N * M), of_log_sigma("dlog_sigma", N * M), of_fused_mu("dfused_mu", N),
                    of_fused_log_sigma("dfused_log_sigma", N);
                if (residual) {
                    ASSERT_EQ(mmbal_residual_kl_cuda(dtype, d_mu.data(), d_fused_mu.data(), d_target.data(), N, M,
                                                     sigma_min, d_kl.data(), nullptr),
                              MMBAL_OK);
                    ASSERT_EQ(mmbal_residual_kl_backward_cuda(dtype, d_dkl.data(), d_mu.data(), d_fused_mu.data(),
                                                              d_target.data(), N, M, sigma_min, of_mu.data(),
                                                              of_fused_mu.data(), nullptr),
                              MMBAL_OK);
                } else {
                    ASSERT_EQ(mmbal_gaussian_kl_cuda(dtype, d_mu.data(), d_log_sigma.data(), d_fused_mu.data(),
                                                     d_fused_log_sigma.data(), N, M, d_kl.data(), nullptr),
                              MMBAL_OK);
                    ASSERT_EQ(mmbal_gaussian_kl_backward_cuda(dtype, d_dkl.data(), d_mu.data(), d_log_sigma.data(),
                                                              d_fused_mu.data(), d_fused_log_sigma.data(), N, M,
                                                              of_mu.data(), of_log_sigma.data(), of_fused_mu.data(),
                                                              of_fused_log_sigma.data(), nullptr),
                              MMBAL_OK);
                    expect_close<TypeParam>("dlog_sigma", of_log_sigma.values(), dlog_sigma);
                    expect_close<TypeParam>("dfused_log_sigma", of_fused_log_sigma.values(), dfused_log_sigma);
                }
                expect_close<RealType<TypeParam>>("kl", d_kl.values(), kl);
                expect_close<TypeParam>("dmu", of_mu.values(), dmu);
                expect_close<TypeParam>("dfused_mu", of_fused_mu.values(), dfused_mu);
            });
        }
    }
}

TYPED_TEST(CudaDivergence, OfCategoricalsIsThatOfTheCore) {
    using Stored = typename TypeParam::Stored;
    using Real = typename TypeParam::Real;
    const mmbal_dtype dtype = TypeParam::dtype;
    struct Shape {
        int64_t M, N, C;
    };
    for (const Shape &s : std::vector<Shape>{{2, 0, 4}, {1, 1, 1}, {3, 60, 5}, {2, 9, 100}}) {
        SCOPED_TRACE(std::to_string(s.N) + " x " + std::to_string(s.C));
        Random random(s.N + s.C);
        auto logits = random.tensor<TypeParam>(s.M * s.N * s.C, 3), fused = random.tensor<TypeParam>(s.N * s.C, 3);
        std::vector<Real> dkl(s.N * s.M);
        for (Real &g : dkl) g = static_cast<Real>(random.uniform(-1, 1));
        if (s.N > 8) {
            logits[2 * s.C] = TypeParam::store(NAN), dkl[2 * s.M] = 0; // sample 2 lacks modality 0
            logits[4 * s.C + 1] = TypeParam::store(NAN);
            logits[5 * s.C] = TypeParam::store(-INFINITY); // a class that the modality lacks
            fused[6 * s.C] = TypeParam::store(-INFINITY);
            logits[7 * s.C] = TypeParam::store(-200);
        }
        for (const int reverse : {0, 1}) {
            std::vector<Real> kl(s.N * s.M);
            std::vector<Stored> dlogits(s.M * s.N * s.C), dfused(s.N * s.C);
            std::vector<unsigned char> scratch(mmbal_categorical_kl_workspace(dtype, s.C, serial()));
            mmbal_categorical_kl(dtype, logits.data(), fused.data(), s.M, s.N, s.C, reverse, kl.data(), scratch.data(),
                                 serial());
            mmbal_categorical_kl_backward(dtype, dkl.data(), logits.data(), fused.data(), s.M, s.N, s.C, reverse,
                                          dlogits.data(), dfused.data(), scratch.data(), serial());
            for_each_schedule([&] {
                DeviceArray<Stored> d_logits("logits", logits), d_fused("fused_logits", fused),
                    of_logits("dlogits", s.M * s.N * s.C), of_fused("dfused_logits", s.N * s.C);
                DeviceArray<Real> d_dkl("dkl", dkl), d_kl("kl", s.N * s.M);
                DeviceBytes workspace("workspace", mmbal_categorical_kl_workspace_cuda(dtype, s.M, s.N));
                ASSERT_EQ(mmbal_categorical_kl_cuda(dtype, d_logits.data(), d_fused.data(), s.M, s.N, s.C, reverse,
                                                    d_kl.data(), nullptr),
                          MMBAL_OK);
                ASSERT_EQ(mmbal_categorical_kl_backward_cuda(dtype, d_dkl.data(), d_logits.data(), d_fused.data(), s.M,
                                                             s.N, s.C, reverse, of_logits.data(), of_fused.data(),
                                                             workspace.data(), nullptr),
                          MMBAL_OK);
                expect_close<RealType<TypeParam>>("kl", d_kl.values(), kl);
                expect_close<TypeParam>("dlogits", of_logits.values(), dlogits);
                expect_close<TypeParam>("dfused_logits", of_fused.values(), dfused);
            });
        }
    }
}

TEST(CudaDivergenceSmall, AlmostEqualGaussiansKeepTheirDigits) {
    for (const float delta : {1e-4f, -1e-3f, 0.17f, -0.17f, 0.18f}) {
        const std::vector<float> mu{0}, log_sigma{delta}, zero{0};
        DeviceArray<float> d_mu("mu", mu), d_log_sigma("log_sigma", log_sigma), fused("fused", zero), kl("kl", 1);
        mmbal_gaussian_kl_cuda(MMBAL_F32, d_mu.data(), d_log_sigma.data(), fused.data(), fused.data(), 1, 1, kl.data(),
                               nullptr);
        const double exact = (std::expm1(2.0 * delta) - 2.0 * delta) / 2;
        EXPECT_NEAR(kl.values()[0], exact, 1e-6 * exact) << delta;
    }
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
}

TEST(CudaDivergenceSizes, OutsideTheContractAreRefused) {
    EXPECT_EQ(mmbal_gaussian_kl_cuda(MMBAL_F32, nullptr, nullptr, nullptr, nullptr, 1, 0, nullptr, nullptr),
              MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(mmbal_residual_kl_cuda(MMBAL_F32, nullptr, nullptr, nullptr, 1, 1, 0, nullptr, nullptr),
              MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(mmbal_categorical_kl_cuda(MMBAL_F32, nullptr, nullptr, 1, 1, 0, 0, nullptr, nullptr),
              MMBAL_INVALID_ARGUMENT);
}

} // namespace
} // namespace mmbal_test
