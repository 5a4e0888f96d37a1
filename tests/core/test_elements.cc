#include "mmbal/elements.h"

#include "any_tensor.h"
#include "sampling_reference.h"

namespace {

using namespace mmbal_test;

struct Tensor {
    AnyTensor data, gradient, weights, base;
    int64_t modality = 0, id = 0;
    bool has_gradient = true, has_base = false;

    int64_t count() const { return data.count(); }
    const AnyTensor &importance() const { return has_gradient ? gradient : data; }
    double energy(int64_t i, mmbal_importance of) const {
        const double g = importance().get(i), w = weights.get(i);
        return of == MMBAL_GN ? g * g : of == MMBAL_SQRT_GN ? std::sqrt(g * g) : g * g / (w * w + 0x1p-126);
    }
};

struct List {
    std::vector<Tensor> tensors;
    std::vector<double> rho = {0.5, 0.1, 0.9, 1, 0.37};
    int64_t seed = 11, step = 5;
    mmbal_importance importance = MMBAL_GN;
    mmbal_mask_options options = {MMBAL_BOTTOMK, 0, 0};

    // Gradients over some orders of magnitude, a few of them 0; data is nowhere 0, so that 0 shows what was not kept.
    void add(mmbal_dtype dtype, int64_t count, Random &random, double decades = 2) {
        Tensor t = {AnyTensor(dtype, count), AnyTensor(dtype, count), AnyTensor(dtype, count), AnyTensor(dtype, count)};
        for (int64_t i = 0; i < count; i++) {
            const double sign = random.below(2) ? 1 : -1;
            t.data.set(i, sign * random.uniform(0.5, 1.9));
            t.gradient.set(i, random.below(20) ? sign * std::pow(10, random.uniform(-decades, decades)) : 0);
            t.weights.set(i, random.uniform(-1, 1)), t.base.set(i, random.uniform(2.5, 4));
        }
        t.modality = random.below(static_cast<int64_t>(rho.size())), t.id = random.below(INT64_C(1) << 32);
        tensors.push_back(t);
    }
    mmbal_status run(const mmbal_pool &pool = mmbal_pool_serial()) {
        std::vector<mmbal_elements> elements;
        for (Tensor &t : tensors)
            elements.push_back({t.data.data(), t.has_gradient ? t.gradient.data() : nullptr, t.weights.data(),
                                t.has_base ? t.base.data() : nullptr, t.count(), t.data.dtype, t.modality, t.id});
        const auto T = static_cast<int64_t>(tensors.size());
        Guarded<unsigned char> workspace(mmbal_mask_elements_workspace(elements.data(), T, &pool));
        const mmbal_status status =
            mmbal_mask_elements(elements.data(), rho.data(), T, static_cast<int64_t>(rho.size()), seed, step,
                                importance, options, workspace.data(), &pool);
        EXPECT_TRUE(workspace.intact());
        return status;
    }
};

bool same_data(const List &a, const List &b) {
    for (size_t t = 0; t < a.tensors.size(); t++)
        if (a.tensors[t].data.bytes != b.tensors[t].data.bytes) return false;
    return true;
}

// What a tensor must be where the scale of element i is known
void expect_scaled(const Tensor &before, const Tensor &after, int64_t i, double scale) {
    const mmbal_dtype dtype = before.data.dtype;
    if (scale == 1) {
        ASSERT_EQ(after.data.element(i), before.data.element(i)) << i;
    } else if (scale == 0) {
        const std::vector<unsigned char> zero(AnyTensor::size_of(dtype), 0);
        ASSERT_EQ(after.data.element(i), before.has_base ? before.base.element(i) : zero) << i;
    } else {
        const double x = before.data.get(i), base = before.has_base ? before.base.get(i) : 0;
        const double step = scale * (x - base), real = real_error_of(dtype);
        // A probability that is 2^-32 off is allowed: it comes from a sum in another order.
        const double bound = half_a_place(dtype, base + step) + real * (5 * std::fabs(step) + std::fabs(base)) +
                             std::fabs(step) * scale * 0x1.8p-32;
        ASSERT_NEAR(after.data.get(i), base + step, bound) << i << " scale " << scale;
    }
}

// By mmbal_mask_units of units that are single elements.
std::vector<std::vector<double>> scales_by_units(const List &list) {
    Masking masking;
    masking.rho = list.rho, masking.seed = list.seed, masking.step = list.step, masking.options = list.options;
    for (const Tensor &t : list.tensors) {
        masking.segments.push_back({static_cast<int64_t>(masking.energy.size()), t.count(), t.modality, t.id, 0});
        for (int64_t i = 0; i < t.count(); i++) masking.energy.push_back(t.energy(i, list.importance));
    }
    masking.run();
    std::vector<std::vector<double>> scales;
    for (const mmbal_segment &s : masking.segments)
        scales.emplace_back(masking.scale.begin() + s.first, masking.scale.begin() + s.first + s.units);
    return scales;
}

// What has the k smallest keys by their upper 32 bits, as far as keys that are good to 1e-5 can tell.
void check_kept(const List &before, const List &after, size_t at, bool exact = false) {
    const Tensor &t = before.tensors[at];
    const double rho = before.rho[t.modality];
    const mmbal_sampler sampler = before.options.sampler;
    std::vector<double> energy, w, keys, cut;
    for (int64_t i = 0; i < t.count(); i++) energy.push_back(t.energy(i, before.importance));
    const int64_t positive = how_many_positive(energy);
    w = sampler == MMBAL_UNIFORM ? std::vector<double>(energy.size(), 1) : energy;
    int64_t k = units_to_keep(rho, t.count());
    if (sampler != MMBAL_UNIFORM) k = std::min(k, positive);
    if (positive == 0 || rho >= 1) k = t.count(), w.assign(energy.size(), 1);
    for (int64_t i = 0; i < t.count(); i++) {
        const double e = exponential(word_of(before.seed, before.step, t.id, MMBAL_DRAW_UNIT, i));
        keys.push_back(sampler == MMBAL_TOPK ? -energy[i] : e / w[i]);
        uint64_t bits;
        std::memcpy(&bits, &keys[i], sizeof bits);
        bits &= 0xFFFFFFFF00000000;
        cut.push_back(0);
        std::memcpy(&cut[i], &bits, sizeof bits);
    }
    const std::vector<uint8_t> kept = smallest(cut, w, k);
    double threshold = -INFINITE; // the largest key that is kept
    for (int64_t i = 0; i < t.count(); i++)
        if (kept[i]) threshold = std::max(threshold, keys[i]);
    int64_t count = 0, unsure = 0;
    for (int64_t i = 0; i < t.count(); i++) {
        const bool got = after.tensors[at].data.element(i) == t.data.element(i);
        count += got;
        const bool sure = exact || k == t.count() || w[i] == 0 || std::fabs(keys[i] / threshold - 1) > 1e-5;
        unsure += !sure;
        ASSERT_TRUE(got == kept[i] || !sure) << i << " kept " << got << " key " << keys[i] << " of " << threshold;
        expect_scaled(t, after.tensors[at], i, got);
    }
    EXPECT_EQ(count, k);
    EXPECT_LE(unsure, 20 + t.count() / 100 + (sampler == MMBAL_TOPK ? t.count() / 10 : 0));
}

const std::vector<mmbal_mask_options> COUNTING = {{MMBAL_BOTTOMK, 0, 0}, {MMBAL_TOPK, 0, 0}, {MMBAL_UNIFORM, 0, 0}};
const std::vector<mmbal_mask_options> OTHERS = {{MMBAL_INDEPENDENT, 0, 0},   {MMBAL_INDEPENDENT, 0, 0.3},
                                                {MMBAL_INDEPENDENT, 1, 0.5}, {MMBAL_INDEPENDENT, 1, 1},
                                                {MMBAL_INDEPENDENT, 1, 0},   {MMBAL_UNIFORM, 1, 0}};

template <typename T>
class MaskElements : public ::testing::Test {};
TYPED_TEST_SUITE(MaskElements, Dtypes, DtypeNames);

TYPED_TEST(MaskElements, KeepExactlyTheSmallestKeys) {
    Random random(1);
    for (int64_t count : {0, 1, 2, 5, 63, 64, 1000, 4097, 70001})
        for (mmbal_importance importance : {MMBAL_GN, MMBAL_SQRT_GN, MMBAL_GN_WN})
            for (const mmbal_mask_options &options : COUNTING) {
                List list;
                list.importance = importance, list.options = options;
                list.seed = static_cast<int64_t>(random.bits()), list.step = random.below(MMBAL_STEPS);
                list.add(TypeParam::dtype, count, random);
                SCOPED_TRACE(std::to_string(count) + " importance " + std::to_string(importance) + " sampler " +
                             std::to_string(options.sampler) + " modality " + std::to_string(list.tensors[0].modality));
                list.tensors[0].has_base = random.below(2);
                List after = list;
                ASSERT_EQ(after.run(), MMBAL_OK);
                ASSERT_NO_FATAL_FAILURE(check_kept(list, after, 0));
            }
}

// Few different energies, whose squares the upper 32 bits hold: of equal ones the lower elements are kept.
TYPED_TEST(MaskElements, GiveEqualEnergiesToTheLower) {
    Random random(2);
    for (int64_t count : {10, 1000, 100000})
        for (int64_t distinct : {1, 3, 40}) {
            List list;
            list.options = {MMBAL_TOPK, 0, 0};
            list.add(TypeParam::dtype, count, random);
            for (int64_t i = 0; i < count; i++)
                list.tensors[0].gradient.set(i, static_cast<double>(1 + random.below(distinct)) / 16);
            for (int64_t modality : {0, 1, 2, 4}) {
                list.tensors[0].modality = modality;
                List after = list;
                ASSERT_EQ(after.run(), MMBAL_OK);
                ASSERT_NO_FATAL_FAILURE(check_kept(list, after, 0, true));
            }
        }
}

TYPED_TEST(MaskElements, OfProbabilitiesAreThoseOfUnits) {
    Random random(3);
    for (int64_t count : {0, 1, 2, 5, 64, 1000, 4097, 70001})
        for (mmbal_importance importance : {MMBAL_GN, MMBAL_SQRT_GN, MMBAL_GN_WN})
            for (const mmbal_mask_options &options : OTHERS) {
                List list;
                list.importance = importance, list.options = options;
                list.seed = static_cast<int64_t>(random.bits()), list.step = random.below(MMBAL_STEPS);
                list.add(TypeParam::dtype, count, random);
                if (options.sampler == MMBAL_UNIFORM && count > 64) continue; // its keys are compared by fewer bits
                SCOPED_TRACE(std::to_string(count) + " importance " + std::to_string(importance) + " sampler " +
                             std::to_string(options.sampler) + " mix " + std::to_string(options.mix));
                list.tensors[0].has_base = random.below(2);
                List after = list;
                ASSERT_EQ(after.run(), MMBAL_OK);
                const auto scales = scales_by_units(list);
                for (int64_t i = 0; i < count; i++)
                    ASSERT_NO_FATAL_FAILURE(expect_scaled(list.tensors[0], after.tensors[0], i, scales[0][i]));
            }
}

TYPED_TEST(MaskElements, TakeTheGradientFromTheDataWhereNoneIsGiven) {
    Random random(4);
    for (const std::vector<mmbal_mask_options> &all : {COUNTING, OTHERS})
        for (const mmbal_mask_options &options : all) {
            List list;
            list.options = options;
            list.add(TypeParam::dtype, 5000, random);
            list.tensors[0].gradient = list.tensors[0].data;
            List with = list, without = list;
            without.tensors[0].has_gradient = false;
            ASSERT_EQ(with.run(), MMBAL_OK);
            ASSERT_EQ(without.run(), MMBAL_OK);
            EXPECT_TRUE(same_data(with, without)) << options.sampler;
        }
}

List mixed_list(Random &random, mmbal_mask_options options, int64_t longest) {
    List list;
    list.options = options;
    if (!options.unbiased) list.rho.push_back(0);
    for (int64_t count : std::vector<int64_t>{3000, 0, 1, 7, 35000, 64, longest, 5, 0, 12345})
        list.add(ALL_DTYPES[list.tensors.size() % 4], count, random);
    for (Tensor &t : list.tensors) t.has_base = random.below(3) == 0;
    for (int64_t i = 0; i < 64; i++) list.tensors[5].gradient.set(i, i % 2 ? -0.0 : 0); // without energy
    return list;
}

TEST(MaskElementsOfLists, AreTheSameForAnyThreadsAndWhateverElseIsInTheList) {
    Random random(5);
    for (const std::vector<mmbal_mask_options> &all : {COUNTING, OTHERS})
        for (const mmbal_mask_options &options : all) {
            const List list = mixed_list(random, options, 300001);
            List first = list;
            ASSERT_EQ(first.run(), MMBAL_OK);
            for_each_pool([&](const std::string &name, const mmbal_pool &pool) {
                List other = list;
                ASSERT_EQ(other.run(pool), MMBAL_OK);
                EXPECT_TRUE(same_data(first, other)) << name << " sampler " << options.sampler;
            });
            for (size_t t = 0; t < list.tensors.size(); t++) {
                List alone = list;
                alone.tensors = {list.tensors[t]};
                ASSERT_EQ(alone.run(), MMBAL_OK);
                EXPECT_EQ(alone.tensors[0].data.bytes, first.tensors[t].data.bytes) << t;
                EXPECT_EQ(first.tensors[t].gradient.bytes, list.tensors[t].gradient.bytes);
                if (options.sampler == MMBAL_INDEPENDENT || options.unbiased) continue;
                ASSERT_NO_FATAL_FAILURE(check_kept(list, first, t)) << t;
            }
            EXPECT_TRUE(first.tensors[5].data.bytes == list.tensors[5].data.bytes) << "no energy: as it was";
        }
}

TEST(MaskElementsOfLists, ChangeNothingWhereAnyGradientIsNotFinite) {
    Random random(6);
    for (const std::vector<mmbal_mask_options> &all : {COUNTING, OTHERS})
        for (const mmbal_mask_options &options : all) {
            List good = mixed_list(random, options, 66000);
            for (int64_t i = 0; i < 3000; i += 7) good.tensors[0].data.set(i, NOT_A_NUMBER); // not of its gradient
            List fine = good;
            ASSERT_EQ(fine.run(), MMBAL_OK);
            EXPECT_FALSE(same_data(fine, good));
            for (double bad : {NOT_A_NUMBER, -NOT_A_NUMBER, INFINITE, -INFINITE})
                for (auto [t, i] : std::vector<std::pair<int, int64_t>>{{0, 0}, {2, 0}, {6, 65999}, {9, 12344}}) {
                    List list = good;
                    list.tensors[t].gradient.set(i, bad);
                    const List before = list;
                    ASSERT_EQ(list.run(), MMBAL_OK);
                    EXPECT_TRUE(same_data(list, before)) << bad << " in " << t;
                }
        }
}

TEST(MaskElementsOfLists, FindProbabilitiesWhereSomeJustReachOne) {
    Random random(11);
    for (int round = 0; round < 3000; round++) {
        List list;
        list.importance = MMBAL_SQRT_GN, list.options = {MMBAL_INDEPENDENT, 1, 0};
        const int64_t n = 3 + random.below(4);
        list.add(MMBAL_F32, n, random), list.tensors[0].modality = 0;
        list.rho = {static_cast<double>(1 + random.below(n - 1)) / static_cast<double>(n)};
        for (int64_t i = 0; i < n; i++) list.tensors[0].gradient.set(i, static_cast<double>(1 + random.below(60)));
        List after = list;
        ASSERT_EQ(after.run(), MMBAL_OK);
        const auto scales = scales_by_units(list);
        for (int64_t i = 0; i < n; i++)
            ASSERT_NO_FATAL_FAILURE(expect_scaled(list.tensors[0], after.tensors[0], i, scales[0][i]));
    }
}

TEST(MaskElementsOfLists, OverwriteWhatIsNotANumberWhereItIsNotKept) {
    Random random(7);
    List list;
    list.options = {MMBAL_TOPK, 0, 0};
    list.add(MMBAL_F32, 1000, random), list.tensors[0].modality = 1;
    for (int64_t i = 0; i < 1000; i++)
        list.tensors[0].gradient.set(i, i < 100 ? 2 : 1), list.tensors[0].data.set(i, i % 2 ? NOT_A_NUMBER : INFINITE);
    List after = list;
    ASSERT_EQ(after.run(), MMBAL_OK);
    for (int64_t i = 0; i < 1000; i++) expect_scaled(list.tensors[0], after.tensors[0], i, i < 100);
}

TEST(MaskElementsOfLists, DrawAnewForEverySeedStepAndTensor) {
    Random random(8);
    for (mmbal_sampler sampler : {MMBAL_BOTTOMK, MMBAL_INDEPENDENT, MMBAL_UNIFORM}) {
        List list;
        list.options = {sampler, 0, 0.5};
        list.add(MMBAL_F32, 2000, random), list.tensors[0].modality = 0;
        const auto masked = [&](auto change) {
            List other = list;
            change(other);
            EXPECT_EQ(other.run(), MMBAL_OK);
            return other.tensors[0].data.bytes;
        };
        const auto first = masked([](auto &) {});
        EXPECT_NE(first, masked([](auto &l) { l.seed += INT64_C(1) << 32; }));
        EXPECT_NE(first, masked([](auto &l) { l.step += INT64_C(1) << 32; }));
        EXPECT_NE(first, masked([](auto &l) { l.tensors[0].id ^= 1; }));
    }
}

// Squares of the smallest numbers of float32 are energies too, and of float64 those that are not 0.
TEST(MaskElementsOfLists, CountTheSmallestNumbersAsEnergy) {
    for (const mmbal_mask_options &options : COUNTING) {
        List tiny;
        tiny.options = options;
        Random none(1);
        tiny.add(MMBAL_F64, 1000, none), tiny.tensors[0].modality = 0;
        for (int64_t i = 0; i < 1000; i++) tiny.tensors[0].gradient.set(i, i % 4 == 3 ? 1e-158 : 0);
        List masked = tiny;
        ASSERT_EQ(masked.run(), MMBAL_OK);
        for (int64_t i = 0; i < 1000 && options.sampler != MMBAL_UNIFORM; i++)
            ASSERT_NO_FATAL_FAILURE(expect_scaled(tiny.tensors[0], masked.tensors[0], i, i % 4 == 3)) << i;
        Random random(9);
        List list;
        list.options = options;
        list.add(MMBAL_F32, 5000, random), list.tensors[0].modality = 0;
        for (int64_t i = 0; i < 5000; i++)
            list.tensors[0].gradient.set(i, i % 5 == 0 ? 1.5e-45 : i % 5 == 1 ? 1e-25 : i % 5 == 2 ? 3e38 : 0);
        List after = list;
        ASSERT_EQ(after.run(), MMBAL_OK);
        ASSERT_NO_FATAL_FAILURE(check_kept(list, after, 0, options.sampler == MMBAL_TOPK));
    }
}

TEST(MaskElementsOfLists, RefuseWhatIsOutsideTheContract) {
    Random random(10);
    List good;
    good.add(MMBAL_F32, 300, random), good.add(MMBAL_BF16, 200, random);
    for (Tensor &t : good.tensors) t.modality = 0;
    const auto status = [&](auto change) {
        List list = good;
        change(list);
        const List before = list;
        const mmbal_status result = list.run();
        EXPECT_TRUE(result == MMBAL_OK || same_data(list, before));
        return result;
    };
    EXPECT_EQ(status([](auto &) {}), MMBAL_OK);
    for (double bad : {-0.1, 1.1, NOT_A_NUMBER})
        EXPECT_EQ(status([=](auto &l) { l.rho[0] = bad; }), MMBAL_INVALID_ARGUMENT) << bad;
    for (mmbal_mask_options bad : std::vector<mmbal_mask_options>{{MMBAL_TOPK, 1, 0},
                                                                  {MMBAL_INDEPENDENT, 0, -0.1},
                                                                  {MMBAL_INDEPENDENT, 0, 1.1},
                                                                  {MMBAL_INDEPENDENT, 1, NOT_A_NUMBER},
                                                                  {enum_of<mmbal_sampler>(5), 0, 0}})
        EXPECT_EQ(status([=](auto &l) { l.options = bad; }), MMBAL_INVALID_ARGUMENT) << bad.sampler << bad.mix;
    for (mmbal_mask_options other : {mmbal_mask_options{MMBAL_SYSTEMATIC, 0, 0}, {MMBAL_BOTTOMK, 1, 0.5}})
        EXPECT_NE(status([=](auto &l) { l.options = other; }), MMBAL_OK) << other.sampler; // of units alone
    for (mmbal_sampler sampler : {MMBAL_INDEPENDENT, MMBAL_UNIFORM})
        EXPECT_EQ(status([=](auto &l) { l.options = {sampler, 1, 0.5}, l.rho[0] = 0; }), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(status([](auto &l) { l.importance = enum_of<mmbal_importance>(3); }), MMBAL_INVALID_ARGUMENT);
    for (int64_t bad : {int64_t{-1}, MMBAL_STEPS})
        EXPECT_EQ(status([=](auto &l) { l.step = bad; }), MMBAL_INVALID_ARGUMENT) << bad;
    for (int64_t bad : {int64_t{-1}, INT64_C(1) << 32})
        EXPECT_NE(status([=](auto &l) { l.tensors[1].id = bad; }), MMBAL_OK) << bad;
    for (int64_t bad : {-1, 5}) EXPECT_NE(status([=](auto &l) { l.tensors[1].modality = bad; }), MMBAL_OK) << bad;
    float x[4] = {1, 2, 3, 4};
    const double rho = 0.5;
    const mmbal_pool pool = mmbal_pool_serial();
    const auto call = [&](mmbal_elements e, int64_t T, mmbal_importance importance) {
        std::vector<char> workspace(1 << 20);
        return mmbal_mask_elements(&e, &rho, T, 1, 0, 0, importance, {MMBAL_BOTTOMK, 0, 0}, workspace.data(), &pool);
    };
    EXPECT_EQ(call({x, nullptr, nullptr, nullptr, 4, MMBAL_F32, 0, 0}, 1, MMBAL_GN_WN), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(call({x, nullptr, nullptr, nullptr, -1, MMBAL_F32, 0, 0}, 1, MMBAL_GN), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(call({x, nullptr, nullptr, nullptr, 4, MMBAL_F32, 0, 0}, -1, MMBAL_GN), MMBAL_INVALID_ARGUMENT);
    EXPECT_NE(call({x, nullptr, nullptr, nullptr, 4, enum_of<mmbal_dtype>(4), 0, 0}, 1, MMBAL_GN), MMBAL_OK);
    EXPECT_EQ(call({x, nullptr, nullptr, nullptr, 4, MMBAL_F32, 0, 0}, 0, MMBAL_GN), MMBAL_OK);
    EXPECT_TRUE(x[0] == 1 && x[1] == 2 && x[2] == 3 && x[3] == 4);
}

} // namespace
