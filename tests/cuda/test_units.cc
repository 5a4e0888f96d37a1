// units.cu against the C core: scaled values bitwise, energies to the rounding of sums in another order.
#include "mmbal/cuda/units.h"

#include <deque>

#include "device.h"
#include "unit_views.h"

namespace mmbal_test {
namespace {

// Views as they lie in the device's memory, `shift` elements behind where an allocation begins.
class DeviceViews {
public:
    explicit DeviceViews(std::vector<View> &views, int64_t shift = 0) {
        for (View &view : views) {
            const size_t before = static_cast<size_t>(shift) * AnyTensor::size_of(view.memory.dtype);
            std::vector<unsigned char> bytes(before, 0xFF);
            bytes.insert(bytes.end(), view.memory.bytes.begin(), view.memory.bytes.end());
            memory_.emplace_back("units", bytes);
            befores_.push_back(before);
            mmbal_units of = view.get();
            of.data = memory_.back().data() + before + static_cast<size_t>(view.offset) * AnyTensor::size_of(of.dtype);
            units.push_back(of);
        }
    }
    std::vector<unsigned char> bytes(size_t t) const {
        std::vector<unsigned char> all = memory_[t].values();
        return {all.begin() + static_cast<int64_t>(befores_[t]), all.end()};
    }
    std::vector<mmbal_units> units;

private:
    std::deque<DeviceBytes> memory_;
    std::vector<size_t> befores_;
};

std::vector<mmbal_units> on_host(std::vector<View> &views) {
    std::vector<mmbal_units> units;
    for (View &view : views) units.push_back(view.get());
    return units;
}

// The small ones of the named views, some of several chunks, and random ones, the dtypes in turn: more than one
// launch's table.
std::vector<View> many_views(Random &random, size_t first_dtype) {
    std::vector<View> views;
    for (const View &view : named_views())
        if (view.units() * view.per_unit() < 3000) views.push_back(view);
    views.push_back({{1, 2, 1, 4500}, {0, 4500, 0, 1}});
    views.push_back({{1, 1, 1, 4101}, {0, 0, 0, 3}});
    views.push_back({{1, 35, 130, 1}, {0, 1, 35, 0}});
    views.push_back({{2, 2, 150, 2}, {2, 1, 4, 600}});
    for (int i = 0; i < 12; i++) views.push_back(random_view(random));
    for (size_t t = 0; t < views.size(); t++)
        views[t].fill(ALL_DTYPES[(first_dtype + t) % ALL_DTYPES.size()], [&] { return random.uniform(-2, 2); });
    return views;
}

int64_t count_units(const std::vector<View> &views) {
    int64_t U = 0;
    for (const View &view : views) U += view.units();
    return U;
}

void expect_energies(const std::vector<double> &got, const std::vector<double> &expected) {
    ASSERT_EQ(got.size(), expected.size());
    for (size_t u = 0; u < got.size(); u++) {
        if (std::isfinite(expected[u]))
            ASSERT_NEAR(got[u], expected[u], 1e-12 * expected[u]) << u;
        else
            ASSERT_EQ(std::isnan(got[u]), std::isnan(expected[u])) << u;
    }
}

class CudaUnits : public ::testing::TestWithParam<int> {};

TEST_P(CudaUnits, EnergiesAreThoseOfTheCore) {
    const int dtype = GetParam();
    Random random(dtype);
    std::vector<View> views = many_views(random, dtype), parameters = views;
    for (size_t t = 0; t < views.size(); t++)
        parameters[t].fill(views[t].memory.dtype, [&] { return random.uniform(-1, 1); });
    const int64_t U = count_units(views), T = static_cast<int64_t>(views.size());
    const std::vector<mmbal_units> host = on_host(views), of_parameters = on_host(parameters);
    std::vector<unsigned char> scratch(mmbal_unit_energy_workspace(host.data(), T));
    std::vector<double> one_order;
    for (const mmbal_importance importance : {MMBAL_GN, MMBAL_SQRT_GN, MMBAL_GN_WN}) {
        const bool weighted = importance == MMBAL_GN_WN;
        std::vector<double> expected(U);
        uint8_t expected_flag = 9;
        ASSERT_EQ(mmbal_unit_energy(host.data(), weighted ? of_parameters.data() : nullptr, T, importance,
                                    expected.data(), &expected_flag, scratch.data(), serial()),
                  MMBAL_OK);
        for_each_schedule([&] {
            for (int64_t shift = 0; shift < (importance == MMBAL_GN ? 2 : 1); shift++) {
                const DeviceViews device(views, shift), weights(parameters, shift);
                const mmbal_units *of_weights = weighted ? weights.units.data() : nullptr;
                DeviceArray<double> energy("energy", U);
                DeviceArray<uint8_t> nonfinite("nonfinite", 1);
                DeviceBytes workspace("workspace",
                                      mmbal_unit_energy_workspace_cuda(device.units.data(), of_weights, T));
                ASSERT_EQ(mmbal_unit_energy_cuda(device.units.data(), of_weights, T, importance, energy.data(),
                                                 nonfinite.data(), workspace.data(), nullptr),
                          MMBAL_OK);
                expect_energies(energy.values(), expected);
                EXPECT_EQ(nonfinite.values()[0], expected_flag);
                if (importance != MMBAL_GN) continue;
                if (one_order.empty()) one_order = energy.values();
                EXPECT_TRUE(same_bits(energy.values(), one_order)) << "the order of a sum depends on an address";
            }
        });
    }
}

TEST_P(CudaUnits, ScaledValuesAreThoseOfTheCoreToTheBit) {
    const int dtype = GetParam();
    Random random(50 + dtype);
    const std::vector<View> views = many_views(random, dtype);
    std::vector<View> bases = views;
    for (size_t t = 0; t < views.size(); t++)
        bases[t].fill(views[t].memory.dtype, [&] { return random.uniform(-1, 1); });
    const int64_t T = static_cast<int64_t>(views.size());
    std::vector<double> scale(count_units(views));
    for (double &s : scale) s = random.pick<double>({0, 1, 1.75, 3.1});
    std::vector<unsigned char> scratch(mmbal_scale_units_workspace(T));
    for (const bool based : {false, true}) {
        std::vector<View> expected = views;
        ASSERT_EQ(mmbal_scale_units(on_host(expected).data(), based ? on_host(bases).data() : nullptr, T, scale.data(),
                                    scratch.data(), serial()),
                  MMBAL_OK);
        for_each_schedule([&] {
            for (const int64_t shift : {0, 3}) {
                std::vector<View> copies = views;
                const DeviceViews device(copies, shift), of_bases(bases, shift);
                DeviceArray<double> d_scale("scale", scale);
                ASSERT_EQ(mmbal_scale_units_cuda(device.units.data(), based ? of_bases.units.data() : nullptr, T,
                                                 d_scale.data(), nullptr, nullptr),
                          MMBAL_OK);
                for (size_t t = 0; t < views.size(); t++)
                    ASSERT_EQ(device.bytes(t), expected[t].memory.bytes) << "tensor " << t << ", based " << based;
            }
        });
    }
}

INSTANTIATE_TEST_SUITE_P(FirstDtypes, CudaUnits, ::testing::Range(0, 4));

struct One {
    View view{{1, 3, 1, 40}, {0, 40, 0, 1}};
    One() {
        view.fill(MMBAL_F32, [] { return 2.0; });
    }
};

TEST(CudaUnitEnergies, OneValueThatIsNotFiniteIsFoundWhereverItLies) {
    for (const double planted : {static_cast<double>(INFINITY), -static_cast<double>(INFINITY), double(NAN)})
        for (const int64_t at : {0, 1299, 5002}) {
            std::vector<View> views = {View{{1, 5003, 1, 3}, {0, 3, 0, 1}}, One().view};
            views[0].fill(MMBAL_BF16, [] { return 1.0; });
            views[0].memory.set(views[0].at(at, 1), planted);
            const DeviceViews device(views);
            DeviceArray<double> energy("energy", 5006);
            DeviceArray<uint8_t> nonfinite("nonfinite", 1);
            DeviceBytes workspace("workspace", mmbal_unit_energy_workspace_cuda(device.units.data(), nullptr, 2));
            mmbal_unit_energy_cuda(device.units.data(), nullptr, 2, MMBAL_GN, energy.data(), nonfinite.data(),
                                   workspace.data(), nullptr);
            EXPECT_EQ(nonfinite.values()[0], 1);
            EXPECT_FALSE(std::isfinite(energy.values()[at]));
            EXPECT_EQ(energy.values()[5004], 160);
        }
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
}

TEST(CudaUnitEnergies, WithoutTensorsNothingIsFound) {
    DeviceArray<uint8_t> nonfinite("nonfinite", 1);
    DeviceBytes workspace("workspace", mmbal_unit_energy_workspace_cuda(nullptr, nullptr, 0));
    ASSERT_EQ(
        mmbal_unit_energy_cuda(nullptr, nullptr, 0, MMBAL_GN, nullptr, nonfinite.data(), workspace.data(), nullptr),
        MMBAL_OK);
    EXPECT_EQ(nonfinite.values()[0], 0);
}

TEST(CudaScaledUnits, SkipLeavesAllAsItIs) {
    for (const uint8_t skip : {0, 1}) {
        std::vector<View> views = {One().view};
        const DeviceViews device(views);
        DeviceArray<double> scale("scale", std::vector<double>{0, 1, 2});
        DeviceArray<uint8_t> d_skip("skip", std::vector<uint8_t>{skip});
        ASSERT_EQ(mmbal_scale_units_cuda(device.units.data(), nullptr, 1, scale.data(), d_skip.data(), nullptr),
                  MMBAL_OK);
        EXPECT_EQ(device.bytes(0) == views[0].memory.bytes, skip == 1);
    }
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
}

TEST(CudaScaledUnits, AScaleOf0Gives0WhateverIsThere) {
    std::vector<View> views = {View{{1, 2, 1, 40}, {0, 40, 0, 1}}, View{{1, 2, 40, 1}, {0, 1, 2, 0}}};
    for (View &view : views) view.fill(MMBAL_F32, [] { return double(NAN); });
    const DeviceViews device(views);
    DeviceArray<double> scale("scale", std::vector<double>{0, 1, 0, 1});
    mmbal_scale_units_cuda(device.units.data(), nullptr, 2, scale.data(), nullptr, nullptr);
    for (size_t t = 0; t < 2; t++) {
        AnyTensor got = views[t].memory;
        got.bytes = device.bytes(t);
        for (int64_t j = 0; j < 40; j++) {
            EXPECT_EQ(got.get(views[t].at(0, j)), 0);
            EXPECT_TRUE(std::isnan(got.get(views[t].at(1, j))));
        }
    }
}

TEST(CudaUnitErrors, ArgumentsOutsideTheContractAreRefused) {
    std::vector<View> views = {One().view};
    mmbal_units twice = views[0].get(), unknown = twice, narrower = twice, other_dtype = twice;
    twice.stride[1] = 39, unknown.dtype = enum_of<mmbal_dtype>(9), narrower.size[3] = 39;
    other_dtype.dtype = MMBAL_BF16;
    const mmbal_units good = views[0].get();
    const auto energy = [](const mmbal_units *units, const mmbal_units *weights, mmbal_importance importance) {
        return mmbal_unit_energy_cuda(units, weights, 1, importance, nullptr, nullptr, nullptr, nullptr);
    };
    EXPECT_EQ(energy(&twice, nullptr, MMBAL_GN), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(energy(&unknown, nullptr, MMBAL_GN), MMBAL_UNSUPPORTED);
    EXPECT_EQ(energy(&good, nullptr, MMBAL_GN_WN), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(energy(&good, &good, MMBAL_GN), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(energy(&good, &narrower, MMBAL_GN_WN), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(energy(&good, nullptr, enum_of<mmbal_importance>(3)), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(mmbal_scale_units_cuda(&twice, nullptr, 1, nullptr, nullptr, nullptr), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(mmbal_scale_units_cuda(&good, &other_dtype, 1, nullptr, nullptr, nullptr), MMBAL_INVALID_ARGUMENT);
}

} // namespace
} // namespace mmbal_test
