// routing.cu against the C core: bitwise, but for sums over a row of many experts.
#include "mmbal/cuda/routing.h"

#include <algorithm>

#include "device.h"
#include "helpers.h"

namespace mmbal_test {
namespace {

template <typename T>
class CudaRouting : public ::testing::Test {};
TYPED_TEST_SUITE(CudaRouting, Dtypes, DtypeNames);

struct Case {
    int64_t N, E, K;
    bool normalize, bias;
};
const std::vector<Case> CASES = {{0, 4, 2, true, false},    {1, 1, 1, false, false},  {300, 4, 2, true, false},
                                 {1500, 8, 2, false, true}, {70, 32, 32, true, true}, {45, 33, 3, true, false},
                                 {45, 100, 7, false, true}, {3, 300, 2, false, false}};

// One softmax over E experts is summed in another order when E is beyond a thread's share.
constexpr int64_t SAME_ORDER = 32;

template <typename Stored>
std::vector<Sum> sums_of(const std::vector<Stored> &values, double (*load)(Stored)) {
    std::vector<Sum> sums;
    for (const Stored &value : values) {
        sums.emplace_back();
        sums.back().add(load(value));
    }
    return sums;
}

template <typename Real>
void expect_same(const char *what, const std::vector<Real> &got, const std::vector<Real> &expected, bool bitwise) {
    if (bitwise) {
        EXPECT_TRUE(same_bits(got, expected)) << what;
    } else if constexpr (std::is_same_v<Real, double>) {
        expect_near<F64>(what, got, sums_of(expected, &F64::load), 1e-14);
    } else {
        expect_near<F32>(what, got, sums_of(expected, &F32::load), 1e-5);
    }
}

TYPED_TEST(CudaRouting, TopkIsThatOfTheCore) {
    using Stored = typename TypeParam::Stored;
    using Real = typename TypeParam::Real;
    for (const Case &c : CASES) {
        SCOPED_TRACE(std::to_string(c.N) + " x " + std::to_string(c.E) + ", " + std::to_string(c.K));
        Random random(7 + c.E);
        auto logits = random.tensor<TypeParam>(c.N * c.E, 3);
        std::vector<Real> bias(c.E);
        for (Real &b : bias) b = static_cast<Real>(random.uniform(-2, 2));
        for (int64_t i = 0; i + 5 < c.N * c.E; i += 97) logits[i + 5] = logits[i]; // ties
        if (c.N > 40) {
            logits[3 * c.E] = TypeParam::store(NAN);
            for (int64_t e = 0; e < c.E; e++) logits[17 * c.E + e] = TypeParam::store(-INFINITY);
            for (int64_t e = 1; e < c.E; e += 2) logits[20 * c.E + e] = TypeParam::store(-INFINITY);
        }
        std::vector<Real> expected(c.N * c.K);
        std::vector<int64_t> expected_indices(c.N * c.K);
        ASSERT_EQ(mmbal_moe_topk(TypeParam::dtype, logits.data(), c.bias ? bias.data() : nullptr, c.N, c.E, c.K,
                                 c.normalize, expected.data(), expected_indices.data(), serial()),
                  MMBAL_OK);
        for_each_schedule([&] {
            DeviceArray<Stored> d_logits("logits", logits);
            DeviceArray<Real> d_bias("bias", bias), weights("weights", c.N * c.K);
            DeviceArray<int64_t> indices("indices", c.N * c.K);
            ASSERT_EQ(mmbal_moe_topk_cuda(TypeParam::dtype, d_logits.data(), c.bias ? d_bias.data() : nullptr, c.N, c.E,
                                          c.K, c.normalize, weights.data(), indices.data(), nullptr),
                      MMBAL_OK);
            EXPECT_EQ(indices.values(), expected_indices);
            auto got = weights.values();
            ASSERT_EQ(got.size(), expected.size());
            for (size_t i = 0; i < got.size(); i++) { // NaN is near NaN here
                ASSERT_EQ(std::isnan(got[i]), std::isnan(expected[i])) << i;
                if (std::isnan(got[i])) got[i] = 0;
            }
            auto numbers = expected;
            for (Real &number : numbers) number = std::isnan(number) ? 0 : number;
            expect_same("weights", got, numbers, c.normalize || c.E <= SAME_ORDER);
        });
    }
}

TYPED_TEST(CudaRouting, TopkBackwardIsThatOfTheCore) {
    using Stored = typename TypeParam::Stored;
    using Real = typename TypeParam::Real;
    for (const Case &c : CASES) {
        SCOPED_TRACE(std::to_string(c.N) + " x " + std::to_string(c.E) + ", " + std::to_string(c.K));
        Random random(70 + c.E);
        const auto logits = random.tensor<TypeParam>(c.N * c.E, 3);
        std::vector<Real> weights(c.N * c.K), dweights(c.N * c.K);
        std::vector<int64_t> indices(c.N * c.K);
        ASSERT_EQ(mmbal_moe_topk(TypeParam::dtype, logits.data(), nullptr, c.N, c.E, c.K, c.normalize, weights.data(),
                                 indices.data(), serial()),
                  MMBAL_OK);
        for (Real &dw : dweights) dw = static_cast<Real>(random.uniform(-1, 1));
        std::vector<Stored> expected(c.N * c.E);
        ASSERT_EQ(mmbal_moe_topk_backward(TypeParam::dtype, dweights.data(), logits.data(), weights.data(),
                                          indices.data(), c.N, c.E, c.K, c.normalize, expected.data(), serial()),
                  MMBAL_OK);
        for_each_schedule([&] {
            DeviceArray<Stored> d_logits("logits", logits), dlogits("dlogits", c.N * c.E);
            DeviceArray<Real> d_weights("weights", weights), d_dweights("dweights", dweights);
            DeviceArray<int64_t> d_indices("indices", indices);
            ASSERT_EQ(mmbal_moe_topk_backward_cuda(TypeParam::dtype, d_dweights.data(), d_logits.data(),
                                                   d_weights.data(), d_indices.data(), c.N, c.E, c.K, c.normalize,
                                                   dlogits.data(), nullptr),
                      MMBAL_OK);
            if (c.normalize || c.E <= SAME_ORDER)
                EXPECT_TRUE(same_bits(dlogits.values(), expected));
            else // the total's rounding, then that of the storage
                expect_near<TypeParam>("dlogits", dlogits.values(), sums_of(expected, &TypeParam::load),
                                       20 * TypeParam::real_error + 2 * TypeParam::stored_error);
        });
    }
}

TEST(CudaDispatch, IsThatOfTheCore) {
    struct Shape {
        int64_t N, K, E;
    };
    for (const Shape &s :
         std::vector<Shape>{{0, 2, 3}, {1, 1, 1}, {50, 2, 4}, {700, 3, 7}, {5000, 1, 300}, {333, 2, 2}}) {
        SCOPED_TRACE(std::to_string(s.N) + " tokens, " + std::to_string(s.E) + " experts");
        Random random(s.N + s.E);
        std::vector<int64_t> indices(s.N * s.K), permutation(s.N * s.K), offsets(s.E + 1), inverse(s.N * s.K);
        for (int64_t &e : indices) e = std::min(random.below(s.E), random.below(s.E)); // not equally often
        ASSERT_EQ(mmbal_moe_dispatch(indices.data(), s.N, s.K, s.E, permutation.data(), offsets.data(), inverse.data()),
                  MMBAL_OK);
        for_each_schedule([&] {
            DeviceArray<int64_t> d_indices("indices", indices), d_permutation("permutation", s.N * s.K),
                d_offsets("offsets", s.E + 1), d_inverse("inverse", s.N * s.K);
            DeviceBytes workspace("workspace", mmbal_moe_dispatch_workspace_cuda(s.N, s.K, s.E));
            ASSERT_EQ(mmbal_moe_dispatch_cuda(d_indices.data(), s.N, s.K, s.E, d_permutation.data(), d_offsets.data(),
                                              d_inverse.data(), workspace.data(), nullptr),
                      MMBAL_OK);
            EXPECT_EQ(d_permutation.values(), permutation);
            EXPECT_EQ(d_inverse.values(), inverse);
            EXPECT_EQ(std::vector<int64_t>(d_offsets.data(), d_offsets.data() + s.E + 1), offsets);
        });
    }
}

TEST(CudaDispatch, AnIndexOutOfRangeFailsTheLaunch) {
    for (int64_t wrong : {-1, 4}) {
        DeviceArray<int64_t> indices("indices", std::vector<int64_t>{0, 1, wrong, 3}), permutation("permutation", 4),
            offsets("offsets", 5), inverse("inverse", 4);
        DeviceBytes workspace("workspace", mmbal_moe_dispatch_workspace_cuda(2, 2, 4));
        mmbal_moe_dispatch_cuda(indices.data(), 2, 2, 4, permutation.data(), offsets.data(), inverse.data(),
                                workspace.data(), nullptr);
        EXPECT_NE(joined(cuda_shim::take_reports()).find("__trap"), std::string::npos);
    }
}

TEST(CudaRoutingSizes, SizesOutsideTheContractAreRefused) {
    EXPECT_EQ(mmbal_moe_topk_cuda(MMBAL_F32, nullptr, nullptr, 1, 2, 3, 1, nullptr, nullptr, nullptr),
              MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(mmbal_moe_topk_cuda(enum_of<mmbal_dtype>(9), nullptr, nullptr, 1, 2, 1, 1, nullptr, nullptr, nullptr),
              MMBAL_UNSUPPORTED);
    EXPECT_EQ(
        mmbal_moe_topk_backward_cuda(MMBAL_F32, nullptr, nullptr, nullptr, nullptr, -1, 2, 1, 1, nullptr, nullptr),
        MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(mmbal_moe_dispatch_cuda(nullptr, 1, 0, 2, nullptr, nullptr, nullptr, nullptr, nullptr),
              MMBAL_INVALID_ARGUMENT);
}

} // namespace
} // namespace mmbal_test
