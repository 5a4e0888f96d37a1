#include "mmbal/units.h"

#include "unit_views.h"

namespace {

using namespace mmbal_test;

constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();
constexpr double INFINITE = std::numeric_limits<double>::infinity();

std::vector<mmbal_units> all_of(std::vector<View> &views) {
    std::vector<mmbal_units> all;
    for (View &view : views) all.push_back(view.get());
    return all;
}

int64_t units_of(const std::vector<View> &views) {
    int64_t units = 0;
    for (const View &view : views) units += view.units();
    return units;
}

struct Energies {
    mmbal_status status;
    std::vector<double> energy;
    std::vector<uint8_t> nonfinite;
};

Energies run(std::vector<View> &tensors, std::vector<View> *weights, mmbal_importance importance,
             const mmbal_pool &pool = mmbal_pool_serial()) {
    const std::vector<mmbal_units> of_tensors = all_of(tensors);
    const std::vector<mmbal_units> of_weights = weights ? all_of(*weights) : std::vector<mmbal_units>();
    const auto T = static_cast<int64_t>(tensors.size());
    Guarded<double> energy(units_of(tensors));
    Guarded<uint8_t> nonfinite(1);
    Guarded<unsigned char> workspace(mmbal_unit_energy_workspace(of_tensors.data(), T));
    const mmbal_status status = mmbal_unit_energy(of_tensors.data(), weights ? of_weights.data() : nullptr, T,
                                                  importance, energy.data(), nonfinite.data(), workspace.data(), &pool);
    EXPECT_TRUE(energy.intact() && nonfinite.intact() && workspace.intact());
    EXPECT_TRUE(status == MMBAL_OK || (energy.untouched() && nonfinite.untouched()));
    return {status, energy.values(), nonfinite.values()};
}

long double sum_of_squares(const View &view, int64_t u) {
    long double sum = 0;
    for (int64_t j = 0; j < view.per_unit(); j++) {
        const long double value = view.memory.get(view.at(u, j));
        sum += value * value;
    }
    return sum;
}

void check(std::vector<View> &tensors, std::vector<View> *weights, mmbal_importance importance) {
    const Energies got = run(tensors, weights, importance);
    ASSERT_EQ(got.status, MMBAL_OK);
    EXPECT_EQ(got.nonfinite[0], 0);
    size_t at = 0;
    for (size_t t = 0; t < tensors.size(); t++)
        for (int64_t u = 0; u < tensors[t].units(); u++, at++) {
            long double expected = sum_of_squares(tensors[t], u);
            if (importance == MMBAL_SQRT_GN) expected = std::sqrt(expected);
            if (importance == MMBAL_GN_WN) expected /= sum_of_squares((*weights)[t], u) + 0x1p-126L;
            ASSERT_NEAR(got.energy[at], expected, static_cast<double>(1e-12L * expected))
                << "tensor " << t << " unit " << u << " importance " << importance;
        }
}

// The parameters lie in their own way: one after the other, and of another dtype.
std::vector<View> parameters_of(const std::vector<View> &tensors, Random &random, size_t first_dtype) {
    std::vector<View> parameters;
    for (const View &tensor : tensors) {
        const Axes &s = tensor.size;
        parameters.push_back({s, {s[1] * s[2] * s[3], s[2] * s[3], s[3], 1}});
        const double scale = random.below(4) ? 1 : 0;
        parameters.back().fill(ALL_DTYPES[first_dtype++ % 4], [&] { return random.uniform(-scale, scale); });
    }
    return parameters;
}

template <typename T>
class UnitEnergy : public ::testing::Test {};
TYPED_TEST_SUITE(UnitEnergy, Dtypes, DtypeNames);

TYPED_TEST(UnitEnergy, IsTheSumOfSquaresOfEveryView) {
    Random random(1);
    std::vector<View> tensors = named_views();
    for (int i = 0; i < 60; i++) tensors.push_back(random_view(random));
    for (View &view : tensors) view.fill(TypeParam::dtype, [&] { return random.uniform(-3, 3); });
    std::vector<View> weights = parameters_of(tensors, random, 0);
    for (size_t t = 0; t < tensors.size(); t++) { // one by one
        std::vector<View> one = {tensors[t]}, of_one = {weights[t]};
        SCOPED_TRACE(t);
        ASSERT_NO_FATAL_FAILURE(check(one, nullptr, MMBAL_GN));
        ASSERT_NO_FATAL_FAILURE(check(one, &of_one, MMBAL_GN_WN));
    }
    ASSERT_NO_FATAL_FAILURE(check(tensors, nullptr, MMBAL_GN)); // and all at once
    ASSERT_NO_FATAL_FAILURE(check(tensors, nullptr, MMBAL_SQRT_GN));
    ASSERT_NO_FATAL_FAILURE(check(tensors, &weights, MMBAL_GN_WN));
}

TYPED_TEST(UnitEnergy, NeitherOverflowsNorVanishes) {
    std::vector<double> sizes = {1e-6, 6e4}; // float16: subnormal
    if (TypeParam::dtype != MMBAL_F16) sizes = {1e-25, 1e25, 1e-42, 1.4e-45, 3e38};
    if (TypeParam::dtype == MMBAL_BF16) sizes = {1e-25, 1e25, 1e-38, 9.3e-41, 3e38};
    if (TypeParam::dtype == MMBAL_F64) sizes = {1e-150, 1e150, 1e-25};
    Random random(2);
    for (double size : sizes) {
        std::vector<View> tensors = {{{1, 9, 1, 37}, {0, 37, 0, 1}},
                                     {{1, 4, 10, 6}, {0, 6, 24, 1}},
                                     {{1, 1, 1, 3000}, {0, 0, 0, 1}},
                                     {{1, 50, 1, 1}, {0, 1, 0, 0}}};
        for (View &view : tensors) view.fill(TypeParam::dtype, [&] { return random.below(2) ? size : -size; });
        std::vector<View> weights = parameters_of(tensors, random, 2);
        ASSERT_NO_FATAL_FAILURE(check(tensors, nullptr, MMBAL_GN)) << size;
        ASSERT_NO_FATAL_FAILURE(check(tensors, nullptr, MMBAL_SQRT_GN)) << size;
        ASSERT_NO_FATAL_FAILURE(check(tensors, &weights, MMBAL_GN_WN)) << size;
        EXPECT_GT(run(tensors, nullptr, MMBAL_GN).energy[0], 0);
    }
}

TYPED_TEST(UnitEnergy, TellsOfOneValueThatIsNotFinite) {
    Random random(3);
    std::vector<View> good = named_views();
    for (View &view : good) view.fill(TypeParam::dtype, [&] { return random.uniform(-1, 1); });
    for (size_t t = 0; t < good.size(); t++) {
        if (good[t].units() * good[t].per_unit() == 0) continue;
        for (double bad : {NOT_A_NUMBER, INFINITE, -INFINITE})
            for (int last : {0, 1, 2}) {
                const int64_t u = last == 1 ? good[t].units() - 1 : 0;
                const int64_t j = last == 1 ? good[t].per_unit() - 1 : last == 2 ? random.below(good[t].per_unit()) : 0;
                std::vector<View> one = {good[t]};
                one[0].memory.set(one[0].at(u, j), bad);
                const Energies got = run(one, nullptr, MMBAL_GN);
                ASSERT_EQ(got.status, MMBAL_OK);
                ASSERT_EQ(got.nonfinite[0], 1) << t << " " << bad << " " << last;
            }
    }
    std::vector<View> tensors = good;
    tensors[3].memory.set(tensors[3].at(20, 0), NOT_A_NUMBER);
    for (mmbal_importance importance : {MMBAL_GN, MMBAL_SQRT_GN, MMBAL_GN_WN}) {
        std::vector<View> weights = good;
        std::vector<View> *const of_weights = importance == MMBAL_GN_WN ? &weights : nullptr;
        EXPECT_EQ(run(good, of_weights, importance).nonfinite[0], 0);
        EXPECT_EQ(run(tensors, of_weights, importance).nonfinite[0], 1);
    }
    if (TypeParam::dtype != MMBAL_F64) return;
    good[2].memory.set(good[2].at(1, 7), 1e200); // its square is infinite
    EXPECT_EQ(run(good, nullptr, MMBAL_GN).nonfinite[0], 1);
}

std::vector<View> mixed_list(Random &random) {
    std::vector<View> tensors = named_views();
    for (int i = 0; i < 40; i++) tensors.push_back(random_view(random));
    for (size_t t = 0; t < tensors.size(); t++)
        tensors[t].fill(ALL_DTYPES[t % 4], [&] { return random.uniform(-3, 3); });
    return tensors;
}

TEST(UnitEnergies, OfMixedDtypesAreTheSameForAnyThreads) {
    Random random(4);
    std::vector<View> tensors = mixed_list(random), weights = parameters_of(tensors, random, 1);
    for (mmbal_importance importance : {MMBAL_GN, MMBAL_SQRT_GN, MMBAL_GN_WN}) {
        std::vector<View> *const of_weights = importance == MMBAL_GN_WN ? &weights : nullptr;
        ASSERT_NO_FATAL_FAILURE(check(tensors, of_weights, importance));
        const Energies first = run(tensors, of_weights, importance);
        for_each_pool([&](const std::string &name, const mmbal_pool &pool) {
            const Energies other = run(tensors, of_weights, importance, pool);
            EXPECT_TRUE(same_bits(first.energy, other.energy)) << name << " importance " << importance;
            EXPECT_EQ(first.nonfinite, other.nonfinite);
        });
    }
    // Nor does it matter what else is in the list.
    const Energies whole = run(tensors, nullptr, MMBAL_GN);
    auto at = whole.energy.begin();
    for (const View &tensor : tensors) {
        std::vector<View> one = {tensor};
        const Energies alone = run(one, nullptr, MMBAL_GN);
        EXPECT_TRUE(std::equal(alone.energy.begin(), alone.energy.end(), at));
        at += tensor.units();
    }
}

TEST(UnitEnergies, OfNothing) {
    std::vector<View> none;
    const Energies got = run(none, nullptr, MMBAL_GN);
    EXPECT_EQ(got.status, MMBAL_OK);
    EXPECT_EQ(got.nonfinite[0], 0);
    const mmbal_units empty[2] = {{nullptr, MMBAL_F32, {1, 0, 1, 1}, {0, 1, 1, 1}},
                                  {nullptr, MMBAL_BF16, {1, 2, 0, 1}, {0, 0, 0, 1}}};
    std::vector<char> workspace(mmbal_unit_energy_workspace(empty, 2));
    double energy[2] = {7, 7};
    uint8_t nonfinite = 7;
    const mmbal_pool pool = mmbal_pool_serial();
    EXPECT_EQ(mmbal_unit_energy(empty, nullptr, 2, MMBAL_GN, energy, &nonfinite, workspace.data(), &pool), MMBAL_OK);
    EXPECT_TRUE(energy[0] == 0 && energy[1] == 0 && nonfinite == 0);
}

TEST(UnitEnergies, RefuseWhatIsOutsideTheContract) {
    Random random(5);
    const auto status = [&](auto change, mmbal_importance importance = MMBAL_GN_WN) {
        std::vector<View> tensors(3, View{{2, 3, 4, 5}, {60, 20, 5, 1}}), weights = tensors;
        for (View &view : tensors) view.fill(MMBAL_F32, [] { return 1; });
        for (View &view : weights) view.fill(MMBAL_F32, [] { return 1; });
        std::vector<mmbal_units> of_tensors = all_of(tensors), of_weights = all_of(weights);
        change(of_tensors, of_weights);
        Guarded<double> energy(18);
        Guarded<uint8_t> nonfinite(1);
        std::vector<char> workspace(mmbal_unit_energy_workspace(all_of(tensors).data(), 3));
        const mmbal_pool pool = mmbal_pool_serial();
        const mmbal_status result =
            mmbal_unit_energy(of_tensors.data(), of_weights.empty() ? nullptr : of_weights.data(), 3, importance,
                              energy.data(), &nonfinite.data()[0], workspace.data(), &pool);
        EXPECT_TRUE(result == MMBAL_OK || (energy.untouched() && nonfinite.untouched()));
        return result;
    };
    EXPECT_EQ(status([](auto &, auto &) {}), MMBAL_OK);
    for (int axis = 0; axis < 4; axis++) {
        EXPECT_EQ(status([=](auto &t, auto &) { t[2].size[axis] = -1; }), MMBAL_INVALID_ARGUMENT) << axis;
        EXPECT_EQ(status([=](auto &t, auto &) { t[2].stride[axis] = -1; }), MMBAL_INVALID_ARGUMENT) << axis;
        EXPECT_EQ(status([=](auto &, auto &w) { w[2].size[axis]--; }), MMBAL_INVALID_ARGUMENT) << axis;
    }
    EXPECT_EQ(status([](auto &, auto &w) { w.clear(); }), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(status([](auto &, auto &w) { w.clear(); }, MMBAL_GN), MMBAL_OK);
    for (mmbal_importance importance : {MMBAL_GN, MMBAL_SQRT_GN})
        EXPECT_EQ(status([](auto &, auto &) {}, importance), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(status([](auto &t, auto &) { t[1].stride[0] = 59; }), MMBAL_INVALID_ARGUMENT); // an element twice
    EXPECT_EQ(status([](auto &, auto &w) { w[1].stride[2] = 0; }), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(status([](auto &, auto &) {}, enum_of<mmbal_importance>(3)), MMBAL_INVALID_ARGUMENT);
    EXPECT_NE(status([](auto &t, auto &) { t[1].dtype = enum_of<mmbal_dtype>(4); }), MMBAL_OK);
    EXPECT_NE(status([](auto &, auto &w) { w[1].dtype = enum_of<mmbal_dtype>(-1); }), MMBAL_OK);
    const mmbal_pool pool = mmbal_pool_serial();
    EXPECT_EQ(mmbal_unit_energy(nullptr, nullptr, -1, MMBAL_GN, nullptr, nullptr, nullptr, &pool),
              MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(mmbal_scale_units(nullptr, nullptr, -1, nullptr, nullptr, &pool), MMBAL_INVALID_ARGUMENT);
}

mmbal_status run_scale(std::vector<View> &tensors, std::vector<View> *bases, const std::vector<double> &scale,
                       const mmbal_pool &pool = mmbal_pool_serial()) {
    const std::vector<mmbal_units> of_tensors = all_of(tensors);
    const std::vector<mmbal_units> of_bases = bases ? all_of(*bases) : std::vector<mmbal_units>();
    const auto T = static_cast<int64_t>(tensors.size());
    Guarded<unsigned char> workspace(mmbal_scale_units_workspace(T));
    const mmbal_status status = mmbal_scale_units(of_tensors.data(), bases ? of_bases.data() : nullptr, T, scale.data(),
                                                  workspace.data(), &pool);
    EXPECT_TRUE(workspace.intact());
    return status;
}

// Half of them 0 and 1; most others float32, so that multiplying rounds once
std::vector<double> random_scales(int64_t count, Random &random) {
    std::vector<double> scales;
    for (int64_t u = 0; u < count; u++)
        scales.push_back(random.pick(std::vector<double>{0, 1, 0, 1, 0.5, 1.0000001192092896, 1 / 0.3f,
                                                         random.uniform(1, 20), random.uniform(0, 1)}));
    return scales;
}

// Everything there is, before and after.
void check_scaled(const std::vector<View> &before, const std::vector<View> &after, const std::vector<View> *bases,
                  const std::vector<double> &scales) {
    size_t at = 0;
    for (size_t t = 0; t < before.size(); t++) {
        const View &view = before[t];
        const mmbal_dtype dtype = view.memory.dtype;
        AnyTensor rest = after[t].memory; // what no unit has must be as it was
        for (int64_t u = 0; u < view.units(); u++, at++)
            for (int64_t j = 0; j < view.per_unit(); j++) {
                const int64_t i = view.at(u, j);
                const auto old = view.memory.element(i), got = rest.element(i);
                const double scale = scales[at], x = view.memory.get(i), result = rest.get(i);
                const double base = bases ? (*bases)[t].memory.get((*bases)[t].at(u, j)) : 0;
                rest.set(i, 0), std::copy(old.begin(), old.end(), rest.bytes.begin() + i * old.size());
                if (scale == 0) {
                    const auto expected = bases ? (*bases)[t].memory.element((*bases)[t].at(u, j))
                                                : std::vector<unsigned char>(old.size(), 0);
                    ASSERT_EQ(got, expected) << t << " unit " << u;
                } else if (scale == 1) {
                    ASSERT_EQ(got, old) << t << " unit " << u;
                } else if (!std::isfinite(x)) {
                    ASSERT_TRUE(std::isnan(x) ? std::isnan(result) : result == x) << t << " unit " << u;
                } else {
                    const double step = scale * (x - base), exact = base + step, real = real_error_of(dtype);
                    double bound = half_a_place(dtype, exact);
                    if (dtype == MMBAL_BF16 || dtype == MMBAL_F16) bound += real * std::fabs(exact);
                    if (bases) bound += real * (3 * std::fabs(step) + std::fabs(exact));
                    if (scale != static_cast<float>(scale)) bound += real * std::fabs(step);
                    ASSERT_NEAR(result, exact, bound) << t << " unit " << u << " scale " << scale << " of " << x;
                }
            }
        ASSERT_TRUE(rest.bytes == view.memory.bytes) << t;
    }
}

TEST(ScaleUnits, MultipliesEveryViewAndNothingElse) {
    Random random(6);
    for (int with_bases : {0, 1})
        for (size_t first_dtype = 0; first_dtype < 4; first_dtype++) {
            std::vector<View> before = named_views(), bases;
            for (int i = 0; i < 40; i++) before.push_back(random_view(random));
            for (size_t t = 0; t < before.size(); t++)
                before[t].fill(ALL_DTYPES[(t + first_dtype) % 4], [&] { return random.uniform(-3, 3); });
            for (View &view : before) { // some bad ones
                const int64_t n = view.units() * view.per_unit();
                for (int64_t i = 0; i < std::min<int64_t>(n / 4, 200); i++)
                    view.memory.set(view.at(random.below(view.units()), random.below(view.per_unit())),
                                    random.pick(std::vector<double>{NOT_A_NUMBER, INFINITE, -INFINITE, 0, -0.0}));
                bases.push_back({view.size, {view.units() * view.per_unit(), view.per_unit(), view.size[3], 1}, 2});
                bases.back().fill(view.memory.dtype, [&] { return random.uniform(-2, 2); });
            }
            const std::vector<double> scales = random_scales(units_of(before), random);
            std::vector<View> *const of_bases = with_bases ? &bases : nullptr, bases_before = bases, first = before;
            ASSERT_EQ(run_scale(first, of_bases, scales), MMBAL_OK);
            ASSERT_NO_FATAL_FAILURE(check_scaled(before, first, of_bases, scales));
            for_each_pool([&](const std::string &name, const mmbal_pool &pool) {
                std::vector<View> other = before;
                ASSERT_EQ(run_scale(other, of_bases, scales, pool), MMBAL_OK);
                for (size_t t = 0; t < before.size(); t++)
                    EXPECT_TRUE(other[t].memory.bytes == first[t].memory.bytes) << name << ", tensor " << t;
            });
            for (size_t t = 0; t < before.size(); t++)
                EXPECT_TRUE(bases[t].memory.bytes == bases_before[t].memory.bytes);
        }
}

TEST(ScaleUnits, RoundsOnceAtTheEndsOfTheRange) {
    for (mmbal_dtype dtype : ALL_DTYPES) {
        const double most = dtype == MMBAL_F64 ? 0x1p1023 : dtype == MMBAL_F16 ? 0x1p15 : 0x1p127;
        const double least = dtype == MMBAL_F64   ? 0x1p-1074
                             : dtype == MMBAL_F16 ? 0x1p-24
                             : dtype == MMBAL_F32 ? 0x1p-149
                                                  : 0x1p-133;
        std::vector<View> view = {{{1, 5, 1, 21}, {0, 21, 0, 1}}};
        view[0].fill(dtype, [=] { return least * 6; });
        for (int64_t j = 0; j < 21; j++) view[0].memory.set(j, most);
        ASSERT_EQ(run_scale(view, nullptr, {2, 0.5, 1, 0.25, 0x1p-20}), MMBAL_OK);
        const double expected[] = {INFINITE, 3 * least, 6 * least, 2 * least, 0}; // 1.5 rounds to 2, the even one
        for (int64_t i = 0; i < 5 * 21; i++) ASSERT_EQ(view[0].memory.get(i), expected[i / 21]) << dtype << " " << i;
    }
}

TEST(ScaleUnits, TakesNothingAndRefusesOtherBases) {
    std::vector<View> none;
    EXPECT_EQ(run_scale(none, nullptr, {}), MMBAL_OK);
    for (int what = 0; what < 5; what++) {
        std::vector<View> tensors(2, View{{1, 3, 2, 5}, {30, 10, 5, 1}}), bases = tensors;
        for (View &view : tensors) view.fill(MMBAL_F32, [] { return 1; });
        for (View &view : bases) view.fill(what == 1 ? MMBAL_F16 : MMBAL_F32, [] { return 3; });
        if (what == 2) bases[1].size = {1, 3, 5, 2};
        if (what == 3) tensors[1].stride[2] = -5;
        if (what == 4) tensors[1].stride[1] = 5;
        const auto before = tensors;
        EXPECT_EQ(run_scale(tensors, &bases, {0, 2, 3, 0, 2, 3}), what ? MMBAL_INVALID_ARGUMENT : MMBAL_OK) << what;
        for (int t : {0, 1}) EXPECT_EQ(tensors[t].memory.bytes == before[t].memory.bytes, what > 0) << what;
    }
}

} // namespace
