// router_loss.cu against the C core: float64 sums in another order, then rounded.
#include "mmbal/cuda/router_loss.h"

#include "device.h"
#include "helpers.h"

namespace mmbal_test {
namespace {

template <typename T>
class CudaRouterLoss : public ::testing::Test {};
TYPED_TEST_SUITE(CudaRouterLoss, Dtypes, DtypeNames);

struct Case {
    int64_t N, E, K;
    mmbal_balance balance;
    bool mask, z;
};
const std::vector<Case> CASES = {
    {0, 4, 2, MMBAL_BALANCE_MIXTRAL, false, false},  {1, 1, 1, MMBAL_BALANCE_SWITCH, false, false},
    {100, 4, 2, MMBAL_BALANCE_MIXTRAL, true, false}, {270, 4, 3, MMBAL_BALANCE_MEGATRON, false, false},
    {40, 50, 2, MMBAL_BALANCE_SWITCH, true, false},  {0, 4, 1, MMBAL_BALANCE_MIXTRAL, true, true},
    {200, 5, 1, MMBAL_BALANCE_MIXTRAL, false, true}, {70, 70, 1, MMBAL_BALANCE_MIXTRAL, true, true}};

// Rounding of float64 sums in another order, which differences of shares enlarge, then that of the result.
template <typename T>
void expect_close(const char *what, const std::vector<typename T::Stored> &got,
                  const std::vector<typename T::Stored> &expected) {
    double largest = 0;
    for (const auto &value : expected) largest = std::max(largest, std::fabs(T::load(value)));
    std::vector<Sum> sums(expected.size());
    for (size_t i = 0; i < expected.size(); i++)
        sums[i].add(T::load(expected[i]), std::fabs(T::load(expected[i])) + 0.1 * largest);
    expect_near<T>(what, got, sums, 2.1 * T::stored_error + 1e-12);
}

TYPED_TEST(CudaRouterLoss, LossAndGradientAreThoseOfTheCore) {
    using Stored = typename TypeParam::Stored;
    using Real = typename TypeParam::Real;
    using RealType = std::conditional_t<std::is_same_v<Real, double>, F64, F32>;
    for (const Case &c : CASES) {
        SCOPED_TRACE(std::to_string(c.N) + " x " + std::to_string(c.E) + (c.z ? ", z" : ""));
        Random random(c.N + c.E);
        auto logits = random.tensor<TypeParam>(c.N * c.E, 3);
        const auto indices = random.choices(c.N, c.K, c.E);
        std::vector<uint8_t> mask(c.N);
        for (int64_t n = 0; n < c.N; n++) {
            mask[n] = random.below(3) > 0;
            for (int64_t e = 0; e < c.E && c.mask && !mask[n]; e++) logits[n * c.E + e] = TypeParam::store(NAN);
        }
        const uint8_t *counted = c.mask ? mask.data() : nullptr;
        const Real dloss = static_cast<Real>(0.7);
        std::vector<Real> loss(1);
        std::vector<Stored> dlogits(c.N * c.E);
        std::vector<unsigned char> scratch(mmbal_router_loss_workspace(c.N, c.E));
        if (c.z) {
            mmbal_router_z_loss(TypeParam::dtype, logits.data(), counted, c.N, c.E, loss.data(), scratch.data(),
                                serial());
            mmbal_router_z_loss_backward(TypeParam::dtype, &dloss, logits.data(), counted, c.N, c.E, dlogits.data(),
                                         serial());
        } else {
            mmbal_load_balance_loss(TypeParam::dtype, logits.data(), indices.data(), counted, c.N, c.E, c.K, c.balance,
                                    loss.data(), scratch.data(), serial());
            mmbal_load_balance_loss_backward(TypeParam::dtype, &dloss, logits.data(), indices.data(), counted, c.N, c.E,
                                             c.K, c.balance, dlogits.data(), scratch.data(), serial());
        }
        for_each_schedule([&] {
            DeviceArray<Stored> d_logits("logits", logits), d_dlogits("dlogits", c.N * c.E);
            DeviceArray<int64_t> d_indices("indices", indices);
            DeviceArray<uint8_t> d_mask("token_mask", mask);
            DeviceArray<Real> d_loss("loss", 1), d_dloss("dloss", std::vector<Real>{dloss});
            const uint8_t *d_counted = c.mask ? d_mask.data() : nullptr;
            DeviceBytes workspace("workspace", mmbal_router_loss_workspace_cuda(c.N, c.E)),
                other("workspace", mmbal_router_loss_workspace_cuda(c.N, c.E));
            const mmbal_dtype dtype = TypeParam::dtype;
            if (c.z) {
                ASSERT_EQ(mmbal_router_z_loss_cuda(dtype, d_logits.data(), d_counted, c.N, c.E, d_loss.data(),
                                                   workspace.data(), nullptr),
                          MMBAL_OK);
                ASSERT_EQ(mmbal_router_z_loss_backward_cuda(dtype, d_dloss.data(), d_logits.data(), d_counted, c.N, c.E,
                                                            d_dlogits.data(), other.data(), nullptr),
                          MMBAL_OK);
            } else {
                ASSERT_EQ(mmbal_load_balance_loss_cuda(dtype, d_logits.data(), d_indices.data(), d_counted, c.N, c.E,
                                                       c.K, c.balance, d_loss.data(), workspace.data(), nullptr),
                          MMBAL_OK);
                ASSERT_EQ(mmbal_load_balance_loss_backward_cuda(dtype, d_dloss.data(), d_logits.data(),
                                                                d_indices.data(), d_counted, c.N, c.E, c.K, c.balance,
                                                                d_dlogits.data(), other.data(), nullptr),
                          MMBAL_OK);
            }
            expect_close<RealType>("loss", d_loss.values(), loss);
            expect_close<TypeParam>("dlogits", d_dlogits.values(), dlogits);
        });
    }
}

TEST(CudaRouterLossSizes, OutsideTheContractAreRefused) {
    EXPECT_EQ(mmbal_router_z_loss_cuda(MMBAL_F32, nullptr, nullptr, 1, 0, nullptr, nullptr, nullptr),
              MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(mmbal_load_balance_loss_cuda(MMBAL_F32, nullptr, nullptr, nullptr, 1, 2, 1, enum_of<mmbal_balance>(3),
                                           nullptr, nullptr, nullptr),
              MMBAL_INVALID_ARGUMENT);
}

} // namespace
} // namespace mmbal_test
