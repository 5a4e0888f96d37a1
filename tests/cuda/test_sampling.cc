// sampling.cu and mask_units.cu against the C core: bitwise.
#include "mmbal/cuda/sampling.h"

#include "device.h"
#include "sampling_reference.h"

namespace mmbal_test {
namespace {

template <typename T>
class CudaSampling : public ::testing::Test {};
using Reals = ::testing::Types<F32, F64>;
TYPED_TEST_SUITE(CudaSampling, Reals, DtypeNames);

struct Shape {
    int64_t S, N;
};
const std::vector<Shape> SHAPES = {{0, 5}, {3, 0}, {1, 1}, {8, 6}, {2, 33}, {1, 1100}};

template <typename Real>
std::vector<Real> weights_of(int64_t count, Random &random) {
    std::vector<Real> weights;
    for (double w : random_energies(count, random)) weights.push_back(static_cast<Real>(w));
    for (int64_t i = 0; i + 3 < count; i += 50) weights[i + 3] = weights[i];
    return weights;
}

TYPED_TEST(CudaSampling, SamplesAreThoseOfTheCore) {
    using Real = typename TypeParam::Real;
    for (const Shape &shape : SHAPES) {
        const int64_t S = shape.S, N = shape.N;
        SCOPED_TRACE(std::to_string(S) + " x " + std::to_string(N));
        Random random(S + N);
        const auto weights = weights_of<Real>(S * N, random);
        const auto seed = static_cast<int64_t>(random.bits()), step = random.below(MMBAL_STEPS);
        std::vector<int64_t> k;
        for (int64_t s = 0; s < S; s++) k.push_back(s == 1 ? N : s == 2 ? 0 : random.below(N + 1));
        std::vector<uint8_t> expected(S * N);
        std::vector<unsigned char> scratch(mmbal_weighted_sample_workspace(N, serial()));
        ASSERT_EQ(mmbal_weighted_sample(TypeParam::dtype, weights.data(), k.data(), S, N, seed, step, expected.data(),
                                        scratch.data(), serial()),
                  MMBAL_OK);
        for_each_schedule([&] {
            DeviceArray<Real> d_weights("weights", weights);
            DeviceArray<int64_t> d_k("k", k);
            DeviceArray<uint8_t> mask("mask", S * N);
            DeviceBytes workspace("workspace", mmbal_weighted_sample_workspace_cuda(S, N));
            ASSERT_EQ(mmbal_weighted_sample_cuda(TypeParam::dtype, d_weights.data(), d_k.data(), S, N, seed, step,
                                                 mask.data(), workspace.data(), nullptr),
                      MMBAL_OK);
            EXPECT_EQ(mask.values(), expected);
        });
    }
}

TYPED_TEST(CudaSampling, ProbabilitiesAndLevelsAreThoseOfTheCore) {
    using Real = typename TypeParam::Real;
    for (const Shape &shape : SHAPES)
        for (double mix : {0.0, 0.3}) {
            const int64_t S = shape.S, N = shape.N;
            SCOPED_TRACE(std::to_string(S) + " x " + std::to_string(N) + ", mix " + std::to_string(mix));
            Random random(S + 2 * N);
            auto weights = weights_of<Real>(S * N, random);
            for (int64_t n = 0; n < N && S > 1; n++) weights[N + n] = 0;
            std::vector<double> kappa;
            for (int64_t s = 0; s < S; s++) {
                int64_t most = mix > 0 ? N : 0;
                for (int64_t n = 0; n < N && mix == 0; n++) most += weights[s * N + n] > 0;
                kappa.push_back(s % 3 == 2 ? static_cast<double>(most) : random.uniform(0, static_cast<double>(most)));
            }
            std::vector<Real> expected(S * N);
            std::vector<double> levels(S);
            std::vector<unsigned char> scratch(mmbal_waterfill_workspace(N, serial()));
            ASSERT_EQ(mmbal_waterfill(TypeParam::dtype, weights.data(), kappa.data(), S, N, mix, expected.data(),
                                      levels.data(), scratch.data(), serial()),
                      MMBAL_OK);
            under_next_schedule([&] {
                DeviceArray<Real> d_weights("weights", weights), probabilities("probabilities", S * N);
                DeviceArray<double> d_kappa("kappa", kappa), c("c", S);
                DeviceBytes workspace("workspace", mmbal_waterfill_workspace_cuda(S, N));
                ASSERT_EQ(mmbal_waterfill_cuda(TypeParam::dtype, d_weights.data(), d_kappa.data(), S, N, mix,
                                               probabilities.data(), c.data(), workspace.data(), nullptr),
                          MMBAL_OK);
                EXPECT_TRUE(same_bits(probabilities.values(), expected));
                EXPECT_TRUE(same_bits(c.values(), levels));
            });
        }
}

TYPED_TEST(CudaSampling, WhatTheCpuRefusesFailsTheLaunch) {
    using Real = typename TypeParam::Real;
    const auto nan = static_cast<Real>(NOT_A_NUMBER), infinite = static_cast<Real>(INFINITE);
    const auto traps = [](const std::vector<Real> &weights, int64_t k, double kappa, double mix) {
        DeviceArray<Real> d_weights("weights", weights), probabilities("probabilities", 3);
        DeviceArray<int64_t> d_k("k", std::vector<int64_t>{k});
        DeviceArray<double> d_kappa("kappa", std::vector<double>{kappa}), c("c", 1);
        DeviceArray<uint8_t> mask("mask", 3);
        DeviceBytes workspace("workspace", 24);
        cuda_shim::take_reports();
        mmbal_weighted_sample_cuda(TypeParam::dtype, d_weights.data(), d_k.data(), 1, 3, 0, 0, mask.data(),
                                   workspace.data(), nullptr);
        const bool samples = joined(cuda_shim::take_reports()).find("__trap") != std::string::npos;
        mmbal_waterfill_cuda(TypeParam::dtype, d_weights.data(), d_kappa.data(), 1, 3, mix, probabilities.data(),
                             c.data(), workspace.data(), nullptr);
        const bool fills = joined(cuda_shim::take_reports()).find("__trap") != std::string::npos;
        return std::pair<bool, bool>(samples, fills);
    };
    using Both = std::pair<bool, bool>;
    EXPECT_EQ(traps({1, 0, 2}, 3, 2, 0), Both(false, false));
    EXPECT_EQ(traps({1, 0, 2}, 3, 3, 0.5), Both(false, false));
    for (Real bad : {nan, infinite, Real{-1}}) EXPECT_EQ(traps({1, bad, 2}, 1, 1, 0), Both(true, true)) << bad;
    for (int64_t k : {-1, 4}) EXPECT_EQ(traps({1, 0, 2}, k, 1, 0), Both(true, false)) << k;
    for (double kappa : {-0.1, 2.1, NOT_A_NUMBER}) EXPECT_EQ(traps({1, 0, 2}, 1, kappa, 0), Both(false, true)) << kappa;
    for (double kappa : {-0.1, 3.1, NOT_A_NUMBER}) EXPECT_EQ(traps({1, 0, 2}, 1, kappa, 1), Both(false, true)) << kappa;
}

// --- mask_units ------------------------------------------------------------------------------------------------------

// Segments of all kinds of length, some of them side by side as the groups of one tensor are.
Masking random_masking(uint64_t number, const std::vector<int64_t> &lengths, const mmbal_mask_options &options) {
    Random random(number);
    Masking m;
    m.options = options, m.rho = {0.37, 1, 0.05, 0.9, 0.5};
    if (!options.unbiased) m.rho.push_back(0);
    m.seed = static_cast<int64_t>(random.bits()), m.step = random.below(MMBAL_STEPS);
    for (int64_t length : lengths) {
        const int64_t groups = random.below(2) + 1, modality = random.below(static_cast<int64_t>(m.rho.size()));
        const int64_t id = random.below(INT64_C(1) << 32), first_unit = random.below(1000);
        for (int64_t group = 0; group < groups; group++) {
            m.segments.push_back(
                {static_cast<int64_t>(m.energy.size()), length, modality, id, first_unit + group * length});
            auto energy = random_energies(length, random, random.below(2) ? 4 : 0.3);
            if (random.below(3) == 0) // ties
                for (double &e : energy) e = e > 0 ? 1 : 0;
            if (random.below(6) == 0) energy.assign(length, 0);
            m.energy.insert(m.energy.end(), energy.begin(), energy.end());
        }
    }
    for (int i = 0; i < 5; i++) m.energy.push_back(7); // of no segment
    return m;
}

void expect_that_of_the_core(Masking &m, const decltype(once) &run = for_each_schedule) {
    ASSERT_NO_FATAL_FAILURE(m.run());
    const auto U = static_cast<int64_t>(m.energy.size()), S = static_cast<int64_t>(m.segments.size());
    const auto M = static_cast<int64_t>(m.rho.size());
    run([&] {
        DeviceArray<double> energy("energy", m.energy), rho("rho", m.rho);
        DeviceArray<double> scale("scale", U), probability("probability", U);
        DeviceBytes workspace("workspace", mmbal_mask_units_workspace_cuda(U, S));
        auto segments = m.segments;
        ASSERT_EQ(mmbal_mask_units_cuda(energy.data(), segments.data(), rho.data(), U, S, M, m.seed, m.step, m.options,
                                        scale.data(), probability.data(), workspace.data(), nullptr),
                  MMBAL_OK);
        EXPECT_TRUE(same_bits(scale.values(), m.scale));
        EXPECT_TRUE(same_bits(probability.values(), m.probability));
    });
}

const std::vector<mmbal_mask_options> ALL_OPTIONS = {
    {MMBAL_BOTTOMK, 0, 0},     {MMBAL_BOTTOMK, 1, 0.5},     {MMBAL_BOTTOMK, 1, 0},     {MMBAL_TOPK, 0, 0},
    {MMBAL_UNIFORM, 0, 0},     {MMBAL_UNIFORM, 1, 0},       {MMBAL_SYSTEMATIC, 0, 0},  {MMBAL_SYSTEMATIC, 1, 0.5},
    {MMBAL_INDEPENDENT, 0, 0}, {MMBAL_INDEPENDENT, 1, 0.4}, {MMBAL_INDEPENDENT, 1, 1}, {MMBAL_SYSTEMATIC, 1, 1}};

TEST(CudaMaskUnits, ScalesAndProbabilitiesAreThoseOfTheCore) {
    uint64_t number = 1;
    for (const mmbal_mask_options &options : ALL_OPTIONS)
        for (const std::vector<int64_t> &lengths : std::vector<std::vector<int64_t>>{{}, {0, 1, 5, 64}, {513}}) {
            SCOPED_TRACE("sampler " + std::to_string(options.sampler) + ", unbiased " +
                         std::to_string(options.unbiased) + ", case " + std::to_string(number));
            Masking m = random_masking(number++, lengths, options);
            ASSERT_NO_FATAL_FAILURE(expect_that_of_the_core(m, under_next_schedule));
        }
}

// More kinds of segments than fit the parameters of one launch.
TEST(CudaMaskUnits, ListsOfAnyLengthAreServed) {
    Masking m = random_masking(99, std::vector<int64_t>(70, 3), {MMBAL_INDEPENDENT, 1, 1});
    expect_that_of_the_core(m, once);
}

// Where all with energy are at 1 the others' 2^-32 each are taken from them.
TEST(CudaMaskUnits, SumsThatRoundingLeavesAreGivenToTheSameUnits) {
    for (int64_t n : {10, 1037})
        for (int64_t positive : {n / 2, n / 5}) {
            Masking m;
            m.options = {MMBAL_SYSTEMATIC, 0, 0}, m.rho = {0.5}, m.segments = {{0, n, 0, 3, 0}};
            for (int64_t u = 0; u < n; u++) m.energy.push_back(u < positive ? 1 + static_cast<double>(u % 3) : 0);
            ASSERT_NO_FATAL_FAILURE(expect_that_of_the_core(m));
        }
}

TEST(CudaMaskUnits, AnEnergyThatIsNoNumberMasksNothing) {
    for (double bad : {NOT_A_NUMBER, INFINITE, -1.0})
        for (mmbal_sampler sampler : {MMBAL_BOTTOMK, MMBAL_SYSTEMATIC}) {
            Masking m = random_masking(5, {40, 600}, {sampler, 0, 0.5});
            m.energy[m.energy.size() / 2] = bad;
            ASSERT_NO_FATAL_FAILURE(expect_that_of_the_core(m));
            EXPECT_EQ(m.kept(), static_cast<int64_t>(m.energy.size()));
        }
}

TEST(CudaMaskUnits, ARatioThatTheCpuRefusesFailsTheLaunch) {
    const mmbal_segment segment = {0, 3, 0, 0, 0};
    const auto traps = [&](double bad, int unbiased) {
        DeviceArray<double> energy("energy", std::vector<double>{1, 2, 3}), rho("rho", std::vector<double>{0.5, bad});
        DeviceArray<double> scale("scale", 3), probability("probability", 3);
        DeviceBytes workspace("workspace", mmbal_mask_units_workspace_cuda(3, 1));
        cuda_shim::take_reports();
        mmbal_mask_units_cuda(energy.data(), &segment, rho.data(), 3, 1, 2, 0, 0, {MMBAL_UNIFORM, unbiased, 0},
                              scale.data(), probability.data(), workspace.data(), nullptr);
        return joined(cuda_shim::take_reports()).find("__trap") != std::string::npos;
    };
    EXPECT_FALSE(traps(0, 0));
    EXPECT_TRUE(traps(0, 1));
    for (double bad : {-0.1, 1.1, NOT_A_NUMBER}) EXPECT_TRUE(traps(bad, 0)) << bad;
}

TEST(CudaMaskUnits, WhatTheHostKnowsIsRefusedBeforeALaunch) {
    const auto status = [](mmbal_segment segment, int64_t step, mmbal_mask_options options) {
        return mmbal_mask_units_cuda(nullptr, &segment, nullptr, 3, 1, 1, 0, step, options, nullptr, nullptr, nullptr,
                                     nullptr);
    };
    const mmbal_mask_options good = {MMBAL_UNIFORM, 0, 0};
    for (mmbal_segment bad : std::vector<mmbal_segment>{
             {0, 4, 0, 0, 0}, {-1, 1, 0, 0, 0}, {0, -1, 0, 0, 0}, {0, 1, 1, 0, 0}, {0, 1, 0, -1, 0}, {0, 1, 0, 0, -1}})
        EXPECT_EQ(status(bad, 0, good), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(status({0, 3, 0, 0, 0}, -1, good), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(status({0, 3, 0, 0, 0}, 0, {MMBAL_TOPK, 1, 0}), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(status({0, 3, 0, 0, 0}, 0, {MMBAL_UNIFORM, 0, 1.5}), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(mmbal_weighted_sample_cuda(MMBAL_BF16, nullptr, nullptr, 1, 1, 0, 0, nullptr, nullptr, nullptr),
              MMBAL_UNSUPPORTED);
    EXPECT_EQ(mmbal_weighted_sample_cuda(MMBAL_F32, nullptr, nullptr, 1, 1, 0, MMBAL_STEPS, nullptr, nullptr, nullptr),
              MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(mmbal_waterfill_cuda(MMBAL_F32, nullptr, nullptr, 1, 1, -0.1, nullptr, nullptr, nullptr, nullptr),
              MMBAL_INVALID_ARGUMENT);
}

} // namespace
} // namespace mmbal_test
