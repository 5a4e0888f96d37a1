// significance.cu against the C core, whose exponentials and logarithms are its own: in the bounds that both keep.
// Counts are the same.
#include "mmbal/cuda/significance.h"

#include <deque>

#include "any_tensor.h"
#include "device.h"

namespace mmbal_test {
namespace {

struct Batch {
    int64_t M, B, C, ignore = -100;
    std::vector<AnyTensor> logits = {}, features = {};
    std::vector<int64_t> D = {}, targets = {};

    // Modality m has features of the (m + first)th dtype, and D + m of them.
    Batch(mmbal_dtype dtype, int64_t m_count, int64_t b_count, int64_t c_count, int64_t d)
        : M(m_count), B(b_count), C(c_count) {
        Random random(B + C);
        for (int64_t m = 0; m < M; m++) {
            D.push_back(d + m);
            logits.push_back(AnyTensor::random(dtype, B * C, random, 4));
            features.push_back(
                AnyTensor::random(ALL_DTYPES[(static_cast<size_t>(dtype) + m) % 4], B * D[m], random, 3));
        }
        for (int64_t b = 0; b < B; b++) targets.push_back(random.below(5) ? random.below(C) : ignore);
    }
};

struct Stats {
    std::vector<double> ce, entropy, histogram, rows;
};

Stats of_core(const Batch &batch) {
    std::vector<mmbal_modality> modalities;
    for (int64_t m = 0; m < batch.M; m++)
        modalities.push_back({batch.logits[m].data(), batch.features[m].data(), batch.D[m], batch.logits[m].dtype,
                              batch.features[m].dtype});
    Stats stats{std::vector<double>(batch.M), std::vector<double>(batch.M), std::vector<double>(batch.C), {0}};
    std::vector<unsigned char> scratch(mmbal_modal_stats_workspace(batch.B, batch.M));
    EXPECT_EQ(mmbal_modal_stats(modalities.data(), batch.targets.data(), batch.M, batch.B, batch.C, batch.ignore,
                                stats.ce.data(), stats.entropy.data(), stats.histogram.data(), stats.rows.data(),
                                scratch.data(), serial()),
              MMBAL_OK);
    return stats;
}

Stats of_device(const Batch &batch) {
    std::deque<DeviceBytes> memory;
    std::vector<mmbal_modality> modalities;
    for (int64_t m = 0; m < batch.M; m++) {
        const void *logits = memory.emplace_back("logits", batch.logits[m].bytes).data();
        const void *features = memory.emplace_back("features", batch.features[m].bytes).data();
        modalities.push_back({logits, features, batch.D[m], batch.logits[m].dtype, batch.features[m].dtype});
    }
    DeviceArray<int64_t> targets("targets", batch.targets);
    DeviceArray<double> ce("ce_sum", batch.M), entropy("entropy_sum", batch.M), histogram("histogram", batch.C),
        rows("rows", 1);
    DeviceBytes workspace("workspace", mmbal_modal_stats_workspace_cuda(batch.B, batch.M, batch.C));
    EXPECT_EQ(mmbal_modal_stats_cuda(modalities.data(), targets.data(), batch.M, batch.B, batch.C, batch.ignore,
                                     ce.data(), entropy.data(), histogram.data(), rows.data(), workspace.data(),
                                     nullptr),
              MMBAL_OK);
    return {ce.values(), entropy.values(), histogram.values(), rows.values()};
}

// A value of a sample is off by at most 40 places and what its sums add; then the samples are added.
void expect_sums(const std::vector<double> &got, const std::vector<double> &expected,
                 const std::vector<AnyTensor> &tensors, const std::vector<int64_t> &widths, double rows) {
    for (size_t m = 0; m < got.size(); m++) {
        if (std::isnan(expected[m])) {
            EXPECT_TRUE(std::isnan(got[m])) << m;
            continue;
        }
        const double allowed = real_error_of(tensors[m].dtype) * rows * (80 + static_cast<double>(widths[m]) / 8) +
                               0x1p-53 * rows * std::fabs(expected[m]);
        EXPECT_NEAR(got[m], expected[m], allowed) << m;
    }
}

class CudaModalStats : public ::testing::TestWithParam<mmbal_dtype> {};

TEST_P(CudaModalStats, AreThoseOfTheCore) {
    struct Shape {
        int64_t M, B, C, D;
    };
    for (const Shape &s :
         std::vector<Shape>{{1, 0, 3, 4}, {1, 1, 1, 1}, {3, 70, 33, 31}, {2, 9, 600, 64}, {1, 1100, 3, 2}}) {
        SCOPED_TRACE(std::to_string(s.M) + " x " + std::to_string(s.B) + " C " + std::to_string(s.C));
        Batch batch(GetParam(), s.M, s.B, s.C, s.D);
        if (s.M == 3) batch.features[1].set(5 * batch.D[1], NAN), batch.logits[2].set(0, -INFINITY);
        const Stats expected = of_core(batch);
        for_each_schedule([&] {
            const Stats got = of_device(batch);
            EXPECT_EQ(got.histogram, expected.histogram);
            EXPECT_EQ(got.rows, expected.rows);
            const std::vector<int64_t> classes(s.M, s.C);
            expect_sums(got.ce, expected.ce, batch.logits, classes, expected.rows[0]);
            expect_sums(got.entropy, expected.entropy, batch.features, batch.D, expected.rows[0]);
        });
    }
}

TEST(CudaModalStatsTables, OfMoreModalitiesThanALaunchTakesAreThoseOfTheCore) {
    const Batch batch(MMBAL_F32, 100, 2, 4, 1);
    const Stats expected = of_core(batch), got = of_device(batch);
    expect_sums(got.ce, expected.ce, batch.logits, std::vector<int64_t>(batch.M, batch.C), expected.rows[0]);
    expect_sums(got.entropy, expected.entropy, batch.features, batch.D, expected.rows[0]);
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
}

INSTANTIATE_TEST_SUITE_P(Dtypes, CudaModalStats, ::testing::ValuesIn(ALL_DTYPES));

TEST(CudaModalStatsNumbers, WhatIsNoNumberMakesItsOwnSumNaN) {
    for (const double planted : {static_cast<double>(NAN), static_cast<double>(INFINITY)})
        for (const int64_t width : {4, 70}) {
            Batch batch(MMBAL_F32, 2, 8, width, width);
            batch.targets = {0, 1, 2, 3, -100, 1, 2, 3};
            batch.logits[0].set(2 * width + 3, planted);
            batch.features[1].set(3 * (width + 1) + 3, planted);
            batch.logits[1].set(4 * width, planted); // of an ignored sample
            const Stats got = of_device(batch);
            EXPECT_TRUE(std::isnan(got.ce[0]) && std::isfinite(got.ce[1]));
            EXPECT_TRUE(std::isfinite(got.entropy[0]) && std::isnan(got.entropy[1]));
        }
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
}

TEST(CudaModalStatsErrors, ATargetOutOfRangeFailsTheLaunch) {
    for (const int64_t wrong : {-1, 3}) {
        Batch batch(MMBAL_F32, 1, 4, 3, 2);
        batch.targets[2] = wrong;
        cuda_shim::take_reports();
        std::deque<DeviceBytes> memory;
        const void *logits = memory.emplace_back("logits", batch.logits[0].bytes).data();
        const void *features = memory.emplace_back("features", batch.features[0].bytes).data();
        const mmbal_modality modality = {logits, features, 2, MMBAL_F32, batch.features[0].dtype};
        DeviceArray<int64_t> targets("targets", batch.targets);
        DeviceArray<double> sums("sums", 6);
        DeviceBytes workspace("workspace", mmbal_modal_stats_workspace_cuda(4, 1, 3));
        mmbal_modal_stats_cuda(&modality, targets.data(), 1, 4, 3, -100, sums.data(), sums.data() + 1, sums.data() + 2,
                               sums.data() + 5, workspace.data(), nullptr);
        EXPECT_NE(joined(cuda_shim::take_reports()).find("__trap"), std::string::npos);
    }
}

struct Sums {
    std::vector<double> ce, entropy, histogram, rows;
    std::vector<int64_t> dims;
};

TEST(CudaUpdateRatio, IsThatOfTheCore) {
    Random random(3);
    std::vector<Sums> cases;
    for (const auto &[M, C] : std::vector<std::pair<int64_t, int64_t>>{{1, 2}, {2, 10}, {3, 700}, {256, 5}}) {
        Sums sums;
        double rows = 0;
        for (int64_t c = 0; c < C; c++) sums.histogram.push_back(static_cast<double>(random.below(30)));
        for (double count : sums.histogram) rows += count;
        sums.rows = {rows};
        for (int64_t m = 0; m < M; m++) {
            sums.dims.push_back(m % 5 == 1 ? 1 : 2 + random.below(600));
            sums.ce.push_back(rows * random.uniform(0, 2));
            sums.entropy.push_back(rows * random.uniform(0, std::log(static_cast<double>(sums.dims[m]))));
        }
        cases.push_back(sums);
    }
    cases.push_back({{0, 0}, {0, 0}, {0, 0, 0}, {0}, {4, 4}});    // no rows
    cases.push_back({{NAN, 30}, {5, 5}, {10, 10}, {20}, {4, 4}}); // a modality without a number
    cases.push_back({{2, 3}, {NAN, 5}, {10, 10}, {20}, {1, 4}});  //
    cases.push_back({{200, 3}, {5, 5}, {10, 10}, {20}, {7, 4}});  // worse than chance: the guard
    for (const Sums &s : cases)
        for (const mmbal_significance kind : {MMBAL_RATE, MMBAL_RATE_UNNORMALISED, MMBAL_MI})
            for (const int official : {0, 1}) {
                const int64_t M = static_cast<int64_t>(s.dims.size()), C = static_cast<int64_t>(s.histogram.size());
                const mmbal_ratio_options options = {kind, 0.7, 0.25, 0.1, 0.9, 0.05, 0.05, official};
                std::vector<double> rate(M), rho(M), of_rates(M);
                ASSERT_EQ(mmbal_update_ratio(s.ce.data(), s.entropy.data(), s.histogram.data(), s.rows.data(),
                                             s.dims.data(), M, C, options, rate.data(), rho.data()),
                          MMBAL_OK);
                mmbal_ratio_of_rates(rate.data(), M, options, of_rates.data());
                for_each_schedule([&] {
                    DeviceArray<double> ce("ce_sum", s.ce), entropy("entropy_sum", s.entropy),
                        histogram("histogram", s.histogram), rows("rows", s.rows), d_rate("rate", M), d_rho("rho", M),
                        given("rate", rate), d_of_rates("rho", M);
                    ASSERT_EQ(mmbal_update_ratio_cuda(ce.data(), entropy.data(), histogram.data(), rows.data(),
                                                      s.dims.data(), M, C, options, d_rate.data(), d_rho.data(),
                                                      nullptr),
                              MMBAL_OK);
                    ASSERT_EQ(mmbal_ratio_of_rates_cuda(given.data(), M, options, d_of_rates.data(), nullptr),
                              MMBAL_OK);
                    for (int64_t m = 0; m < M; m++) {
                        if (std::isnan(rate[m]))
                            EXPECT_TRUE(std::isnan(d_rate.values()[m]));
                        else
                            EXPECT_NEAR(d_rate.values()[m], rate[m], 1e-12 * (1 + std::fabs(rate[m])));
                        EXPECT_NEAR(d_rho.values()[m], rho[m], 1e-12);
                        EXPECT_NEAR(d_of_rates.values()[m], of_rates[m], 1e-14);
                    }
                });
            }
}

TEST(CudaSignificanceErrors, ArgumentsOutsideTheContractAreRefused) {
    const mmbal_modality good = {nullptr, nullptr, 2, MMBAL_F32, MMBAL_F32};
    mmbal_modality narrow = good, unknown = good;
    narrow.D = 0, unknown.features_dtype = enum_of<mmbal_dtype>(9);
    const auto stats = [](const mmbal_modality &of, int64_t M, int64_t B, int64_t C) {
        return mmbal_modal_stats_cuda(&of, nullptr, M, B, C, -100, nullptr, nullptr, nullptr, nullptr, nullptr,
                                      nullptr);
    };
    EXPECT_EQ(stats(good, 0, 1, 1), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(stats(good, 1, -1, 1), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(stats(good, 1, 1, 0), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(stats(narrow, 1, 1, 1), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(stats(unknown, 1, 1, 1), MMBAL_UNSUPPORTED);
    const mmbal_ratio_options right = {MMBAL_RATE, 1, 0, 0.1, 0.9, 0, 0.05, 0};
    std::vector<mmbal_ratio_options> wrong(6, right);
    wrong[0].temperature = 0, wrong[1].least = 0.95, wrong[2].most = 1.5, wrong[3].bias = NAN;
    wrong[4].least_entropy = 0, wrong[5].significance = enum_of<mmbal_significance>(3);
    for (const mmbal_ratio_options &options : wrong)
        EXPECT_EQ(mmbal_ratio_of_rates_cuda(nullptr, 2, options, nullptr, nullptr), MMBAL_INVALID_ARGUMENT);
    const int64_t dims[] = {4, 0};
    EXPECT_EQ(mmbal_update_ratio_cuda(nullptr, nullptr, nullptr, nullptr, dims, 2, 3, right, nullptr, nullptr, nullptr),
              MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(mmbal_ratio_of_rates_cuda(nullptr, 257, right, nullptr, nullptr), MMBAL_INVALID_ARGUMENT);
}

} // namespace
} // namespace mmbal_test
