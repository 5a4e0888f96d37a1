// expert_mlp.cu and expert_product.cu against the formulas of the header, in the bounds of the C core's own tests.
#include "mmbal/cuda/expert_mlp.h"

#include <sstream>
#include <type_traits>

#include "device.h"
#include "expert_mlp_reference.h"

namespace mmbal_test {
namespace {

template <typename T>
class CudaExpertMlp : public ::testing::Test {};
TYPED_TEST_SUITE(CudaExpertMlp, Dtypes, DtypeNames);

// A problem's arrays in the shim's memory.
template <typename T>
struct DeviceProblem {
    using Stored = typename T::Stored;
    DeviceArray<Stored> x, w1, b1, w2, b2, dy;
    DeviceArray<typename T::Real> weights;
    DeviceArray<int64_t> permutation, offsets, inverse;
    Spec spec;
    explicit DeviceProblem(const Problem<T> &p)
        : x("x", p.x), w1("w1", p.w1), b1("b1", p.b1), w2("w2", p.w2), b2("b2", p.b2), dy("dy", p.dy),
          weights("weights", p.weights), permutation("permutation", p.permutation), offsets("offsets", p.offsets),
          inverse("inverse", p.inverse), spec(p.spec) {}
    mmbal_expert_mlp_inputs inputs() {
        return {x.data(),
                w1.data(),
                spec.b1 ? b1.data() : nullptr,
                w2.data(),
                spec.b2 ? b2.data() : nullptr,
                weights.data(),
                permutation.data(),
                offsets.data(),
                inverse.data(),
                nullptr};
    }
};

template <typename T>
void expect_both(const Spec &s, int wanted = ALL_GRADIENTS) {
    using Stored = typename T::Stored;
    using Real = typename T::Real;
    std::ostringstream name;
    name << s;
    SCOPED_TRACE(name.str());
    const Problem<T> p(s);
    DeviceProblem<T> on_device(p);
    const mmbal_expert_mlp_inputs inputs = on_device.inputs();
    const mmbal_expert_mlp_options options = s.options();
    DeviceArray<Stored> y("y", s.N * s.D), u("preactivation", s.N * s.K * s.F);
    {
        DeviceBytes workspace("workspace", mmbal_expert_mlp_workspace_cuda(T::dtype, s.shape()));
        ASSERT_EQ(mmbal_expert_mlp_cuda(T::dtype, &inputs, s.shape(), &options, y.data(), u.data(), workspace.data(),
                                        nullptr),
                  MMBAL_OK);
    }
    const Reference<T> expected(p, u.values());
    const double sums = static_cast<double>(s.D + s.F + s.K + 16) * 2 * T::real_error;
    expect_near<T>("preactivation", u.values(), expected.preactivation, sums + T::stored_error);
    expect_near<T>("y", y.values(), expected.y, sums + 2 * T::stored_error); // a and y are stored

    DeviceArray<Stored> dx("dx", s.N * s.D), dw1("dw1", s.E * s.F * s.D), db1("db1", s.E * s.F),
        dw2("dw2", s.E * s.D * s.F), db2("db2", s.E * s.D);
    DeviceArray<Real> dweights("dweights", s.N * s.K);
    DeviceBytes workspace("workspace", mmbal_expert_mlp_backward_workspace_cuda(T::dtype, s.shape()));
    const mmbal_expert_mlp_gradients gradients = {
        wanted & DX ? dx.data() : nullptr,   wanted & DW1 ? dw1.data() : nullptr,
        wanted & DB1 ? db1.data() : nullptr, wanted & DW2 ? dw2.data() : nullptr,
        wanted & DB2 ? db2.data() : nullptr, wanted & DWEIGHTS ? dweights.data() : nullptr};
    ASSERT_EQ(mmbal_expert_mlp_backward_cuda(T::dtype, on_device.dy.data(), &inputs, u.data(), s.shape(), &options,
                                             &gradients, workspace.data(), nullptr),
              MMBAL_OK);
    // As in the core's test: the slopes of the activations, and what is stored on the way.
    const double relative = static_cast<double>(s.N * s.K + s.D + s.F + 200) * T::real_error + 3 * T::stored_error;
    using RealOnly = std::conditional_t<T::dtype == MMBAL_F64, F64, F32>;
    if (wanted & DX) expect_near<T>("dx", dx.values(), expected.dx, relative);
    if (wanted & DW1) expect_near<T>("dw1", dw1.values(), expected.dw1, relative);
    if (wanted & DB1) expect_near<T>("db1", db1.values(), expected.db1, relative);
    if (wanted & DW2) expect_near<T>("dw2", dw2.values(), expected.dw2, relative);
    if (wanted & DB2) expect_near<T>("db2", db2.values(), expected.db2, relative);
    if (wanted & DWEIGHTS) expect_near<RealOnly>("dweights", dweights.values(), expected.dweights, relative);
}

TYPED_TEST(CudaExpertMlp, FollowsTheFormulas) {
    Spec odd, aligned, dropped;
    aligned.D = 16, aligned.F = 32, aligned.b1 = false, aligned.activation = MMBAL_GELU;
    dropped.D = 12, dropped.F = 20, dropped.dropout = 0.3, dropped.output_dropout = 0.2, dropped.seed = -5;
    dropped.offset = (int64_t{1} << 40) + 3, dropped.activation = MMBAL_SILU;
    for_each_schedule([&] {
        expect_both<TypeParam>(odd);
        expect_both<TypeParam>(aligned);
        expect_both<TypeParam>(dropped);
    });
}

// Rows of odd width begin at each of the four words of a Philox block.
TYPED_TEST(CudaExpertMlp, DropsTheSameElementsWhateverWordARowBeginsWith) {
    Spec s;
    s.N = 10, s.D = 17, s.F = 13, s.activation = MMBAL_GELU, s.dropout = 0.25, s.output_dropout = 0.1;
    s.seed = 11, s.offset = 5;
    expect_both<TypeParam>(s);
    s.D = 3, s.F = 5;
    expect_both<TypeParam>(s);
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
}

TYPED_TEST(CudaExpertMlp, ServesNoTokensAndExpertsWithoutRows) {
    Spec none, one_expert;
    none.N = 0, none.D = 5, none.F = 9;
    one_expert.D = 6, one_expert.F = 10, one_expert.K = 1, one_expert.only_expert = 2, one_expert.output_dropout = 0.5;
    expect_both<TypeParam>(none);
    expect_both<TypeParam>(one_expert);
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
}

TYPED_TEST(CudaExpertMlp, ComputesWhatIsAskedFor) {
    Spec s;
    s.D = 8, s.F = 11, s.E = 2;
    for (int wanted : {static_cast<int>(DX), static_cast<int>(DW2), static_cast<int>(DB2), static_cast<int>(DWEIGHTS),
                       static_cast<int>(DW1 | DB1), 0})
        expect_both<TypeParam>(s, wanted);
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
}

TEST(CudaExpertMlpActivations, AreThoseOfTheHeader) {
    for (const mmbal_activation activation : ACTIVATIONS) {
        Spec s;
        s.N = 3, s.D = 9, s.F = 14, s.E = 2, s.activation = activation;
        expect_both<F64>(s);
        expect_both<F32>(s);
    }
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
}

TEST(CudaExpertMlpTiles, RowsAndColumnsBeyondOneTile) {
    Spec s;
    s.N = 150, s.K = 1, s.D = 70, s.F = 131, s.E = 2, s.only_expert = 1; // 64 or 128 rows and columns a tile
    expect_both<F32>(s);
    expect_both<F64>(s);
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
}

// More rows, columns and steps than a tile of the tensor cores has, with rows of 16 bytes and without.
TEST(CudaExpertMlpTiles, OfTensorCores) {
    Spec s;
    s.N = 140, s.K = 1, s.D = 136, s.F = 168, s.E = 2, s.only_expert = 1;
    expect_both<F16>(s);
    s.D = 37, s.F = 131, s.only_expert = -1;
    expect_both<BF16>(s);
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
}

// The steps on products in the storage dtype, in place, as the binding takes them from torch: the same call.
TEST(CudaExpertMlpSteps, OnStoredProductsAreTheWhole) {
    Spec s;
    s.D = 16, s.F = 24, s.dropout = 0.25;
    const Problem<F32> p(s);
    DeviceProblem<F32> on_device(p);
    const mmbal_expert_mlp_inputs inputs = on_device.inputs();
    const mmbal_expert_mlp_options options = s.options();
    const int64_t R = s.N * s.K;
    DeviceArray<float> whole("y", s.N * s.D), y("y", s.N * s.D), rows("rows", R * s.D), hidden("hidden", R * s.F),
        out("out", R * s.D);
    DeviceBytes workspace("workspace", mmbal_expert_mlp_workspace_cuda(MMBAL_F32, s.shape()));
    ASSERT_EQ(mmbal_expert_mlp_cuda(MMBAL_F32, &inputs, s.shape(), &options, whole.data(), nullptr, workspace.data(),
                                    nullptr),
              MMBAL_OK);
    mmbal_expert_gather_cuda(MMBAL_F32, on_device.x.data(), &inputs, s.shape(), &options, 0, rows.data(), nullptr,
                             nullptr);
    mmbal_expert_product_cuda(MMBAL_F32, MMBAL_ROWS_TIMES_TRANSPOSED, rows.data(), on_device.w1.data(),
                              on_device.offsets.data(), R, s.E, s.D, s.F, s.D, hidden.data(), nullptr);
    mmbal_expert_activation_cuda(MMBAL_F32, MMBAL_PRODUCT_STORED, hidden.data(), &inputs, s.shape(), &options, nullptr,
                                 hidden.data(), nullptr);
    mmbal_expert_product_cuda(MMBAL_F32, MMBAL_ROWS_TIMES_TRANSPOSED, hidden.data(), on_device.w2.data(),
                              on_device.offsets.data(), R, s.E, s.F, s.D, s.F, out.data(), nullptr);
    mmbal_expert_combine_cuda(MMBAL_F32, MMBAL_PRODUCT_STORED, out.data(), &inputs, s.shape(), &options, 0, y.data(),
                              nullptr);
    EXPECT_TRUE(same_bits(y.values(), whole.values()));

    DeviceArray<int32_t> ends("ends", s.E);
    ASSERT_EQ(mmbal_expert_ends_cuda(on_device.offsets.data(), s.E, ends.data(), nullptr), MMBAL_OK);
    for (int64_t e = 0; e < s.E; e++) EXPECT_EQ(ends.values()[e], p.offsets[e + 1]);
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
}

// Rows of whole 16 bytes and others; zeros fill them up.
TYPED_TEST(CudaExpertMlp, PackedWeightsGiveTheSameBits) {
    using Stored = typename TypeParam::Stored;
    for (const auto &[D, F] : {std::pair<int64_t, int64_t>{7, 13}, {16, 24}, {1, 1}, {33, 132}}) {
        Spec s;
        s.D = D, s.F = F;
        const Problem<TypeParam> p(s);
        DeviceProblem<TypeParam> on_device(p);
        mmbal_expert_mlp_inputs inputs = on_device.inputs();
        const mmbal_expert_mlp_options options = s.options();
        const int64_t bytes = mmbal_expert_mlp_packed_bytes_cuda(TypeParam::dtype, s.shape());
        ASSERT_EQ(bytes % 16, 0);
        DeviceArray<Stored> packed("packed", bytes / static_cast<int64_t>(sizeof(Stored)));
        ASSERT_EQ(mmbal_expert_mlp_pack_cuda(TypeParam::dtype, on_device.w1.data(), on_device.w2.data(), s.shape(),
                                             packed.data(), nullptr),
                  MMBAL_OK);
        const auto values = packed.values();
        const int64_t pack = 16 / static_cast<int64_t>(sizeof(Stored)), row = (D + pack - 1) / pack * pack;
        for (int64_t i = 0; i < s.E * F * row; i++) {
            const bool filling = i % row >= D;
            const Stored expected = filling ? Stored{} : p.w1[i / row * D + i % row];
            ASSERT_EQ(std::memcmp(&values[i], &expected, sizeof(Stored)), 0) << i;
        }
        DeviceArray<Stored> y("y", s.N * s.D), from_packed("y", s.N * s.D);
        DeviceBytes workspace("workspace", mmbal_expert_mlp_workspace_cuda(TypeParam::dtype, s.shape()));
        for (Stored *to : {y.data(), from_packed.data()}) {
            ASSERT_EQ(mmbal_expert_mlp_cuda(TypeParam::dtype, &inputs, s.shape(), &options, to, nullptr,
                                            workspace.data(), nullptr),
                      MMBAL_OK);
            inputs.packed = packed.data();
        }
        EXPECT_TRUE(same_bits(y.values(), from_packed.values()));
    }
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
}

TEST(CudaExpertMlpSteps, ClearTouchesExpertsWithoutRowsAlone) {
    DeviceArray<int64_t> offsets("offsets", std::vector<int64_t>{0, 3, 3, 5, 5});
    const int64_t size = 5000;
    DeviceArray<float> gradient("gradient", std::vector<float>(4 * size, 7));
    ASSERT_EQ(mmbal_expert_clear_cuda(MMBAL_F32, offsets.data(), 4, size, gradient.data(), nullptr), MMBAL_OK);
    const auto values = gradient.values();
    for (int64_t i = 0; i < 4 * size; i++) ASSERT_EQ(values[i], i / size % 2 ? 0 : 7) << i;
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
}

TEST(CudaExpertMlpRouting, APermutationOutOfRangeFailsTheLaunch) {
    Spec s;
    Problem<F32> p(s);
    p.permutation[3] = s.N * s.K;
    DeviceProblem<F32> on_device(p);
    const mmbal_expert_mlp_inputs inputs = on_device.inputs();
    const mmbal_expert_mlp_options options = s.options();
    DeviceArray<float> rows("rows", s.N * s.K * s.D);
    mmbal_expert_gather_cuda(MMBAL_F32, on_device.x.data(), &inputs, s.shape(), &options, 0, rows.data(), nullptr,
                             nullptr);
    EXPECT_NE(joined(cuda_shim::take_reports()).find("__trap"), std::string::npos);
}

} // namespace
} // namespace mmbal_test
