// btw.cu against the C core: bitwise, but for exponentials and for sums over samples and over a row of an embedding.
#include "mmbal/cuda/btw.h"

#include "device.h"
#include "helpers.h"

namespace mmbal_test {
namespace {

template <typename T>
class CudaBtw : public ::testing::Test {};
TYPED_TEST_SUITE(CudaBtw, Dtypes, DtypeNames);

// Within `relative` of the value or a hundredth of the largest.
template <typename T>
void expect_close(const char *what, const std::vector<typename T::Stored> &got,
                  const std::vector<typename T::Stored> &expected, double relative) {
    double largest = 0;
    for (const auto &value : expected) largest = std::max(largest, std::fabs(T::load(value)));
    std::vector<Sum> sums(expected.size());
    for (size_t i = 0; i < expected.size(); i++)
        sums[i].add(T::load(expected[i]), std::fabs(T::load(expected[i])) + 0.01 * largest);
    expect_near<T>(what, got, sums, relative);
}

template <typename T>
using RealType = std::conditional_t<T::dtype == MMBAL_F64, F64, F32>;

struct Case {
    int64_t N, M;
    mmbal_btw_mode mode;
    bool masked, mean_one;
};

TYPED_TEST(CudaBtw, WeightsAndGradientsAreThoseOfTheCore) {
    using Stored = typename TypeParam::Stored;
    using Real = typename TypeParam::Real;
    const mmbal_dtype dtype = TypeParam::dtype;
    for (const Case &c : std::vector<Case>{{0, 2, MMBAL_BTW_DIVERGE, false, false},
                                           {1, 1, MMBAL_BTW_AGREE, false, true},
                                           {300, 3, MMBAL_BTW_DIVERGE, true, true},
                                           {90, 20, MMBAL_BTW_DIVERGE, false, false},
                                           {300, 4, MMBAL_BTW_AGREE, true, false}}) {
        SCOPED_TRACE(std::to_string(c.N) + " x " + std::to_string(c.M) + ", mode " + std::to_string(c.mode));
        Random random(c.N + c.M);
        std::vector<Stored> kl;
        std::vector<double> mi;
        std::vector<uint8_t> present;
        std::vector<Real> dweights;
        for (int64_t i = 0; i < c.N * c.M; i++) {
            kl.push_back(TypeParam::store(std::exp(random.uniform(-7, 9))));
            present.push_back(random.below(3) != 0);
            dweights.push_back(static_cast<Real>(random.uniform(-1, 1)));
        }
        for (int64_t m = 0; m < c.M; m++) mi.push_back(m % 4 == 3 ? 0 : random.uniform(0.01, 2));
        if (c.N > 10) kl[5] = TypeParam::store(NAN);
        const mmbal_btw_options options = {1e-5, 1e3, 20, c.mode, c.mean_one};
        const uint8_t *mask = c.masked ? present.data() : nullptr;
        std::vector<Real> weights(c.N * c.M);
        std::vector<Stored> dkl(c.N * c.M);
        std::vector<double> dmi(c.M);
        std::vector<unsigned char> scratch(mmbal_btw_weights_backward_workspace(c.N, c.M));
        ASSERT_EQ(mmbal_btw_weights(dtype, kl.data(), mi.data(), mask, c.N, c.M, options, weights.data(), serial()),
                  MMBAL_OK);
        ASSERT_EQ(mmbal_btw_weights_backward(dtype, dweights.data(), kl.data(), mi.data(), mask, c.N, c.M, options,
                                             dkl.data(), dmi.data(), scratch.data(), serial()),
                  MMBAL_OK);
        for_each_schedule([&] {
            DeviceArray<Stored> d_kl("kl", kl), of_kl("dkl", c.N * c.M);
            DeviceArray<double> d_mi("mi", mi), of_mi("dmi", c.M);
            DeviceArray<uint8_t> d_present("present", present);
            DeviceArray<Real> d_dweights("dweights", dweights), d_weights("weights", c.N * c.M);
            DeviceBytes one("workspace", mmbal_btw_weights_workspace_cuda(c.N, c.M)),
                other("workspace", mmbal_btw_weights_workspace_cuda(c.N, c.M));
            const uint8_t *d_mask = c.masked ? d_present.data() : nullptr;
            ASSERT_EQ(mmbal_btw_weights_cuda(dtype, d_kl.data(), d_mi.data(), d_mask, c.N, c.M, options,
                                             d_weights.data(), one.data(), nullptr),
                      MMBAL_OK);
            ASSERT_EQ(mmbal_btw_weights_backward_cuda(dtype, d_dweights.data(), d_kl.data(), d_mi.data(), d_mask, c.N,
                                                      c.M, options, of_kl.data(), of_mi.data(), other.data(), nullptr),
                      MMBAL_OK);
            if (c.mode == MMBAL_BTW_DIVERGE) {
                EXPECT_TRUE(same_bits(d_weights.values(), weights));
                EXPECT_TRUE(same_bits(of_kl.values(), dkl));
            } else {
                expect_close<RealType<TypeParam>>("weights", d_weights.values(), weights, 40 * TypeParam::real_error);
                expect_close<TypeParam>("dkl", of_kl.values(), dkl,
                                        200 * TypeParam::real_error + 2.1 * TypeParam::stored_error);
            }
            expect_close<F64>("dmi", of_mi.values(), dmi, 200 * TypeParam::real_error);
        });
    }
}

TYPED_TEST(CudaBtw, ScaledEmbeddingsAndTheirGradientAreThoseOfTheCore) {
    using Stored = typename TypeParam::Stored;
    using Real = typename TypeParam::Real;
    const mmbal_dtype dtype = TypeParam::dtype;
    const int64_t M = 3, m = 1;
    for (const auto &[N, d] : std::vector<std::pair<int64_t, int64_t>>{{0, 8}, {5, 0}, {40, 1}, {70, 48}, {9, 331}}) {
        SCOPED_TRACE(std::to_string(N) + " x " + std::to_string(d));
        Random random(N + d);
        auto h = random.tensor<TypeParam>(N * d, 2);
        const auto dscaled = random.tensor<TypeParam>(N * d, 2);
        std::vector<Real> weights(N * M);
        for (Real &w : weights) w = static_cast<Real>(random.uniform(0, 2));
        std::vector<Stored> scaled(N * d);
        std::vector<Real> dweights(N * M);
        mmbal_scale_modality_dweights(dtype, dscaled.data(), h.data(), m, N, M, d, dweights.data(), serial());
        const auto number = h;
        if (N > 2) weights[2 * M + m] = 0;
        for (int64_t i = 0; i < d && N > 2; i++) h[2 * d + i] = TypeParam::store(NAN); // missing
        mmbal_scale_modality(dtype, h.data(), weights.data(), m, N, M, d, scaled.data(), serial());
        for_each_schedule([&] {
            DeviceArray<Stored> d_h("h", h), d_number("h", number), d_dscaled("dscaled", dscaled), out("scaled", N * d);
            DeviceArray<Real> d_weights("weights", weights), of_weights("dweights", std::vector<Real>(N * M, 7));
            ASSERT_EQ(mmbal_scale_modality_cuda(dtype, d_h.data(), d_weights.data(), m, N, M, d, out.data(), nullptr),
                      MMBAL_OK);
            EXPECT_TRUE(same_bits(out.values(), scaled));
            ASSERT_EQ(mmbal_scale_modality_dweights_cuda(dtype, d_dscaled.data(), d_number.data(), m, N, M, d,
                                                         of_weights.data(), nullptr),
                      MMBAL_OK);
            const auto got = of_weights.values();
            for (int64_t i = 0; i < N * M; i++) {
                if (i % M == m)
                    EXPECT_NEAR(got[i], dweights[i], 4.0 * (static_cast<double>(d) + 1) * TypeParam::real_error * 4)
                        << i;
                else
                    EXPECT_EQ(got[i], 7) << "another column was written";
            }
        });
    }
}

TEST(CudaEma, IsThatOfTheCore) {
    const int64_t S = 500, M = 3, N = 200;
    Random random(1);
    std::vector<double> table(S * M), weights(N * M);
    for (double &v : table) v = random.uniform(-1, 1);
    for (double &v : weights) v = random.uniform(-1, 1);
    std::vector<int64_t> index;
    for (int64_t n = 0; n < N; n++) index.push_back((n * 7 + 3) % S);
    for_each_schedule([&] {
        DeviceArray<double> d_table("table", table), d_weights("weights", weights);
        DeviceArray<int64_t> d_index("index", index);
        DeviceBytes workspace("workspace", mmbal_ema_rows_workspace_cuda(S));
        ASSERT_EQ(mmbal_ema_rows_cuda(MMBAL_F64, d_table.data(), d_index.data(), d_weights.data(), S, N, M, 0.3,
                                      workspace.data(), nullptr),
                  MMBAL_OK);
        std::vector<double> expected = table;
        std::vector<unsigned char> scratch(mmbal_ema_rows_workspace(S));
        mmbal_ema_rows(MMBAL_F64, expected.data(), index.data(), weights.data(), S, N, M, 0.3, scratch.data(),
                       serial());
        EXPECT_TRUE(same_bits(d_table.values(), expected));
    });
}

TEST(CudaEma, AnIndexThatIsWrongOrNamedTwiceFailsTheLaunchAndLeavesTheTable) {
    for (const std::vector<int64_t> &wrong : std::vector<std::vector<int64_t>>{{0, 5}, {-1, 2}, {3, 3}}) {
        const std::vector<float> ones(10, 1);
        DeviceArray<float> table("table", ones), weights("weights", std::vector<float>(4, 9));
        DeviceArray<int64_t> index("index", wrong);
        DeviceBytes workspace("workspace", mmbal_ema_rows_workspace_cuda(5));
        cuda_shim::take_reports();
        mmbal_ema_rows_cuda(MMBAL_F32, table.data(), index.data(), weights.data(), 5, 2, 2, 0.5, workspace.data(),
                            nullptr);
        EXPECT_NE(joined(cuda_shim::take_reports()).find("__trap"), std::string::npos);
        EXPECT_EQ(table.values(), ones);
    }
}

TEST(CudaBtwErrors, MutualInformationThatIsNoNumberFailsTheLaunch) {
    DeviceArray<float> kl("kl", std::vector<float>{1, 2}), weights("weights", 2);
    DeviceArray<double> mi("mi", std::vector<double>{1, NAN});
    DeviceBytes workspace("workspace", mmbal_btw_weights_workspace_cuda(1, 2));
    mmbal_btw_weights_cuda(MMBAL_F32, kl.data(), mi.data(), nullptr, 1, 2, {1e-5, 1e6, 1, MMBAL_BTW_DIVERGE, 0},
                           weights.data(), workspace.data(), nullptr);
    EXPECT_NE(joined(cuda_shim::take_reports()).find("__trap"), std::string::npos);
    EXPECT_EQ(mmbal_btw_weights_cuda(MMBAL_F32, nullptr, nullptr, nullptr, 1, 2, {1e-5, 1e-6, 1, MMBAL_BTW_DIVERGE, 0},
                                     nullptr, nullptr, nullptr),
              MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(mmbal_ema_rows_cuda(MMBAL_BF16, nullptr, nullptr, nullptr, 1, 1, 1, 0.5, nullptr, nullptr),
              MMBAL_UNSUPPORTED);
}

} // namespace
} // namespace mmbal_test
