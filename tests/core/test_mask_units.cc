#include <map>

#include "sampling_reference.h"

namespace {

using namespace mmbal_test;

const std::vector<mmbal_mask_options> ALL_OPTIONS = {
    {MMBAL_BOTTOMK, 0, 0},       {MMBAL_BOTTOMK, 0, 0.5},   {MMBAL_BOTTOMK, 1, 0},     {MMBAL_BOTTOMK, 1, 0.5},
    {MMBAL_SYSTEMATIC, 0, 0},    {MMBAL_SYSTEMATIC, 0, 1},  {MMBAL_SYSTEMATIC, 1, 0},  {MMBAL_SYSTEMATIC, 1, 0.5},
    {MMBAL_SYSTEMATIC, 1, 1e-3}, {MMBAL_INDEPENDENT, 0, 0}, {MMBAL_INDEPENDENT, 1, 0}, {MMBAL_INDEPENDENT, 1, 0.5},
    {MMBAL_INDEPENDENT, 1, 1},   {MMBAL_TOPK, 0, 0},        {MMBAL_UNIFORM, 0, 0},     {MMBAL_UNIFORM, 1, 0.5}};

// Segments of several modalities and tensors, in another order than their energies, with numbers of units that start
// anywhere; some without energy, some of no units at all.
Masking random_masking(mmbal_mask_options options, uint64_t seed, const std::vector<int64_t> &sizes) {
    Random random(seed);
    Masking masking;
    masking.options = options;
    masking.seed = static_cast<int64_t>(random.bits()), masking.step = random.below(MMBAL_STEPS);
    for (double rho : {0.5, 0.1, 0.9, 1.0, random.uniform(0, 1), 1e-3}) masking.rho.push_back(rho);
    if (!options.unbiased) masking.rho.push_back(0);
    int64_t first = 0;
    for (int64_t units : sizes) {
        const bool empty = random.below(6) == 0, equal = random.below(5) == 0;
        auto energies = random_energies(units, random, random.below(2) ? 1 : 5, random.below(2) ? 3 : 1000000);
        for (double &e : energies) e = empty ? 0 : equal ? 0.25 : e;
        masking.energy.insert(masking.energy.end(), energies.begin(), energies.end());
        masking.segments.push_back({first, units, random.below(static_cast<int64_t>(masking.rho.size())),
                                    random.below(INT64_C(1) << 32), random.below(INT64_C(1) << random.below(45))});
        first += units;
    }
    std::reverse(masking.segments.begin() + masking.segments.size() / 2, masking.segments.end());
    return masking;
}

TEST(MaskUnits, FollowsThePlainVersionOfEverySampler) {
    uint64_t seed = 0;
    for (const mmbal_mask_options &options : ALL_OPTIONS)
        for (int round = 0; round < 12; round++) {
            Masking masking = random_masking(options, seed++, {1, 12, 0, 64, 5, 2, 300, 12, 1, 3, 1001, 7});
            ASSERT_NO_FATAL_FAILURE(masking.run());
            ASSERT_NO_FATAL_FAILURE(masking.check());
        }
}

TEST(MaskUnits, IsTheSameForAnyThreads) {
    uint64_t seed = 100;
    for (const mmbal_mask_options &options : ALL_OPTIONS) {
        std::vector<int64_t> sizes(60, 33);
        sizes[7] = 20011, sizes[40] = 5000, sizes[41] = 2;
        Masking masking = random_masking(options, seed++, sizes);
        ASSERT_NO_FATAL_FAILURE(masking.run());
        ASSERT_NO_FATAL_FAILURE(masking.check());
        for_each_pool([&](const std::string &name, const mmbal_pool &pool) {
            Masking other = masking;
            ASSERT_EQ(other.run(pool), MMBAL_OK);
            EXPECT_TRUE(same_bits(masking.scale, other.scale)) << name << " sampler " << options.sampler;
            EXPECT_TRUE(same_bits(masking.probability, other.probability)) << name << " sampler " << options.sampler;
        });
    }
}

TEST(MaskUnits, OfOneLargeSegment) {
    for (const mmbal_mask_options &options : ALL_OPTIONS) {
        Masking masking = random_masking(options, 8, {150001});
        masking.segments[0].modality = 1;
        ASSERT_NO_FATAL_FAILURE(masking.run());
        ASSERT_NO_FATAL_FAILURE(masking.check());
    }
}

TEST(MaskUnits, KnowsNoOrderOfSegmentsAndNoScaleOfEnergies) {
    for (const mmbal_mask_options &options : ALL_OPTIONS) {
        Masking masking = random_masking(options, 77, {12, 64, 5, 300, 33}), other = masking;
        ASSERT_NO_FATAL_FAILURE(masking.run());
        std::reverse(other.segments.begin(), other.segments.end());
        for (double &e : other.energy) e *= 0x1p-300;
        ASSERT_NO_FATAL_FAILURE(other.run());
        EXPECT_TRUE(same_bits(masking.scale, other.scale)) << options.sampler;
    }
}

// One modality, one segment
Masking simple(std::vector<double> energy, double rho, mmbal_mask_options options) {
    Masking masking;
    masking.segments = {{0, static_cast<int64_t>(energy.size()), 0, 3, 0}};
    masking.energy = std::move(energy), masking.rho = {rho}, masking.options = options;
    return masking;
}

TEST(MaskUnits, KeepsUnbiasedGradientsOnAverage) {
    const std::vector<double> energy = {1, 2, 3, 5, 8, 13, 0.5, 40, 0.1, 7, 7, 7};
    constexpr int64_t T = 20000;
    int64_t tests = 0;
    for (mmbal_sampler sampler : {MMBAL_BOTTOMK, MMBAL_SYSTEMATIC, MMBAL_INDEPENDENT, MMBAL_UNIFORM})
        for (double mix : {0.0, 0.5, 1.0})
            for (double rho : {0.1, 0.3, 0.5, 0.9}) {
                Masking masking = simple(energy, rho, {sampler, 1, mix});
                std::vector<double> sum(12), square(12), kept(12);
                for (masking.step = 0; masking.step < T; masking.step++) {
                    ASSERT_NO_FATAL_FAILURE(masking.run());
                    for (int u = 0; u < 12; u++) {
                        const double s = masking.scale[u];
                        sum[u] += s, square[u] += s * s, kept[u] += s > 0;
                    }
                    if (masking.step < 20) masking.check();
                }
                for (int u = 0; u < 12; u++) {
                    const double mean = sum[u] / T;
                    // Where the probability is always the same its variance is known.
                    double variance = 1 / masking.probability[u] - 1;
                    if (sampler == MMBAL_BOTTOMK) variance = square[u] / T - mean * mean;
                    if (kept[u] < 50) continue; // too few for a normal law
                    EXPECT_LE(std::fabs(mean - 1), 5.3 * std::sqrt(variance / T) + 1e-12)
                        << u << " sampler " << sampler << " mix " << mix << " rho " << rho;
                    tests++;
                }
            }
    EXPECT_GT(tests, 400); // 5.3 deviations: one in 10,000 for the largest of 600
}

TEST(MaskUnits, OfBottomKHasTheLawOfDrawingOneByOne) {
    Masking masking = simple({1, 2, 3, 5, 8, 13}, 0.5, {MMBAL_BOTTOMK, 0, 0.5}); // mix plays no part
    std::map<int, int64_t> count;
    for (masking.step = 0; masking.step < 20000; masking.step++) {
        ASSERT_NO_FATAL_FAILURE(masking.run());
        int subset = 0;
        for (int u = 0; u < 6; u++) subset |= (masking.scale[u] != 0) << u;
        count[subset]++;
    }
    const std::vector<std::pair<int, double>> law = {
        {0b000111, .001342}, {0b001011, .002419}, {0b010011, .004442}, {0b100011, .009778}, {0b001101, .003763},
        {0b010101, .006918}, {0b100101, .015288}, {0b011001, .012527}, {0b101001, .028003}, {0b110001, .053634},
        {0b001110, .007787}, {0b010110, .014320}, {0b100110, .031719}, {0b011010, .025916}, {0b101010, .057998},
        {0b110010, .110750}, {0b011100, .040307}, {0b101100, .090368}, {0b110100, .172023}, {0b111000, .310696}};
    double statistic = 0;
    for (auto [subset, p] : law) {
        statistic += std::pow(static_cast<double>(count[subset]) - 20000 * p, 2) / (20000 * p);
        count.erase(subset);
    }
    EXPECT_LT(statistic, 50.80);
    EXPECT_TRUE(count.empty()) << "a subset of another size";
}

TEST(MaskUnits, KeepsWhatTheRatioSaysWhereItWasRoundedToFloat32) {
    struct Count {
        double rho;
        int64_t units, k;
    };
    for (const Count &c : std::vector<Count>{{0.1f, 10, 1},
                                             {0.1f, 20, 2},
                                             {0.1f, 320, 32},
                                             {0.1, 10, 1},
                                             {0.9f, 10, 9},
                                             {0.9, 10, 9},
                                             {0.9f, 320, 288},
                                             {0.5, 7, 4},
                                             {0.5, 1, 1},
                                             {0.3f, 10, 3},
                                             {0.7f, 10, 7},
                                             {0.1, 11, 2},
                                             {0.01, 12, 1},
                                             {1e-12, 1000, 1},
                                             {0.1f, 100000, 10000},
                                             {0, 50, 0},
                                             {0.99999, 4, 4}})
        for (mmbal_sampler sampler : {MMBAL_BOTTOMK, MMBAL_TOPK, MMBAL_UNIFORM}) {
            Random random(6);
            Masking masking = simple(random_energies(c.units, random, 2, 1000000000), c.rho, {sampler, 0, 0});
            ASSERT_NO_FATAL_FAILURE(masking.run());
            EXPECT_EQ(masking.kept(), c.k) << c.rho << " of " << c.units << " by " << sampler;
            ASSERT_NO_FATAL_FAILURE(masking.check());
        }
}

TEST(MaskUnits, GivesEqualEnergiesToTheLowerUnit) {
    Masking masking = simple({1, 3, 2, 3, 2, 2, 1, 0, 2}, 0.5, {MMBAL_TOPK, 0, 0}); // 5 of 9
    ASSERT_NO_FATAL_FAILURE(masking.run());
    EXPECT_EQ(masking.scale, (std::vector<double>{0, 1, 1, 1, 1, 1, 0, 0, 0}));
    EXPECT_EQ(masking.probability, masking.scale);
}

// Among many units of one energy some have the same word: one of two is kept, and its key is the other's rival.
TEST(MaskUnits, GivesEqualKeysToTheLowerUnit) {
    const int64_t N = 150000;
    std::vector<uint32_t> words;
    for (int64_t u = 0; u < N; u++) words.push_back(word_of(1, 0, 3, MMBAL_DRAW_UNIT, u));
    std::sort(words.begin(), words.end());
    int64_t ties = 0;
    for (int64_t k = 1; k < N; k++) {
        if (words[k - 1] != words[k]) continue;
        for (const mmbal_mask_options &options : {ALL_OPTIONS[0], ALL_OPTIONS[2], {MMBAL_UNIFORM, 0, 0}}) {
            const double rho = (static_cast<double>(k) - 0.5) / static_cast<double>(N);
            Masking masking = simple(std::vector<double>(N, 0.25), rho, options);
            ASSERT_NO_FATAL_FAILURE(masking.run());
            EXPECT_EQ(masking.kept(), k);
            ASSERT_NO_FATAL_FAILURE(masking.check());
        }
        if (++ties == 2) break;
    }
    EXPECT_GT(ties, 0);
}

TEST(MaskUnits, KeepsOnlyWhatHasEnergyButASegmentWithoutAny) {
    for (const mmbal_mask_options &options : ALL_OPTIONS) {
        Masking masking = simple({0, 5, 0, 0, 2, 0, 0, 0}, 0.75, options); // 6 of 8
        ASSERT_NO_FATAL_FAILURE(masking.run());
        ASSERT_NO_FATAL_FAILURE(masking.check());
        const bool mixes = options.unbiased && options.mix > 0;
        if (options.sampler == MMBAL_TOPK || (options.sampler == MMBAL_BOTTOMK && !mixes)) {
            EXPECT_EQ(masking.kept(), 2);
        }
        for (double rho : {0.0, 0.3, 1.0}) {
            if (rho == 0 && options.unbiased) continue;
            masking = simple(std::vector<double>(9, 0), rho, options);
            ASSERT_NO_FATAL_FAILURE(masking.run());
            EXPECT_EQ(masking.scale, std::vector<double>(9, 1));
            EXPECT_EQ(masking.probability, std::vector<double>(9, 1));
        }
    }
}

TEST(MaskUnits, AtRatioOneIsTheIdentityAndAtZeroNothing) {
    for (const mmbal_mask_options &options : ALL_OPTIONS) {
        Masking masking = simple({0, 5, 1e-9, 3}, 1, options);
        ASSERT_NO_FATAL_FAILURE(masking.run());
        EXPECT_EQ(masking.scale, std::vector<double>(4, 1));
        EXPECT_EQ(masking.probability, std::vector<double>(4, 1));
        if (options.unbiased) continue;
        masking.rho = {0};
        ASSERT_NO_FATAL_FAILURE(masking.run());
        EXPECT_EQ(masking.scale, std::vector<double>(4, 0)) << options.sampler;
    }
}

TEST(MaskUnits, MasksNothingWhereAnEnergyIsNotFiniteOrNegative) {
    for (const mmbal_mask_options &options : ALL_OPTIONS)
        for (double bad : {NOT_A_NUMBER, INFINITE, -INFINITE, -1e-30})
            for (int64_t at : {0, 700, 1300}) {
                Masking masking = random_masking(options, 5, {1, 600, 0, 700});
                masking.energy[at] = bad;
                ASSERT_NO_FATAL_FAILURE(masking.run());
                EXPECT_EQ(masking.scale, std::vector<double>(1301, 1)) << bad << " " << at;
                EXPECT_EQ(masking.probability, std::vector<double>(1301, 1)) << bad << " " << at;
            }
}

// Of energies near the ends of float64, whose sums are not of float64 any more
TEST(MaskUnits, TakesEnergiesOfAnySize) {
    for (const mmbal_mask_options &options : ALL_OPTIONS)
        for (double size : {0x1p-1010, 0x1p1021}) {
            Masking small = simple({size, 2 * size, 3 * size, 3 * size, 3 * size, 2 * size}, 0.5, options),
                    usual = small;
            for (double &e : usual.energy) e /= size;
            for (int64_t step = 0; step < 100; step++) {
                small.step = usual.step = step;
                ASSERT_NO_FATAL_FAILURE(small.run());
                ASSERT_NO_FATAL_FAILURE(usual.run());
                for (int u = 0; u < 6; u++)
                    ASSERT_NEAR(small.scale[u], usual.scale[u], 1e-9 * usual.scale[u])
                        << "sampler " << options.sampler << " size " << size << " unit " << u;
            }
        }
}

TEST(MaskUnits, RefusesWhatIsOutsideTheContract) {
    const auto status = [](mmbal_mask_options options, auto change) {
        Masking masking = random_masking(options, 3, {10, 20, 30});
        masking.rho.resize(4);
        for (auto &s : masking.segments) s.modality = 1, s.first_unit = 0;
        change(masking);
        return masking.run(mmbal_pool_serial());
    };
    for (const mmbal_mask_options &options : ALL_OPTIONS) {
        EXPECT_EQ(status(options, [](auto &) {}), MMBAL_OK);
        for (double bad : {-0.1, 1.0000001, NOT_A_NUMBER})
            EXPECT_EQ(status(options, [=](auto &m) { m.rho[1] = bad; }), MMBAL_INVALID_ARGUMENT) << bad;
        EXPECT_EQ(status(options, [](auto &m) { m.rho[1] = 0; }), options.unbiased ? MMBAL_INVALID_ARGUMENT : MMBAL_OK);
        for (double bad : {-0.1, 1.1, NOT_A_NUMBER})
            EXPECT_EQ(status(options, [=](auto &m) { m.options.mix = bad; }), MMBAL_INVALID_ARGUMENT) << bad;
        for (int64_t bad : {int64_t{-1}, MMBAL_STEPS})
            EXPECT_EQ(status(options, [=](auto &m) { m.step = bad; }), MMBAL_INVALID_ARGUMENT) << bad;
        for (int64_t bad : {int64_t{-1}, INT64_C(1) << 32})
            EXPECT_NE(status(options, [=](auto &m) { m.segments[1].id = bad; }), MMBAL_OK) << bad;
        for (int64_t bad : {-1, 4})
            EXPECT_NE(status(options, [=](auto &m) { m.segments[1].modality = bad; }), MMBAL_OK) << bad;
        for (int64_t bad : {int64_t{-1}, INT64_C(1) << 46, INT64_MAX})
            EXPECT_NE(status(options, [=](auto &m) { m.segments[1].first_unit = bad; }), MMBAL_OK) << bad;
        for (int64_t bad : {int64_t{-1}, int64_t{51}, INT64_MAX})
            EXPECT_NE(status(options, [=](auto &m) { m.segments[1].first = bad; }), MMBAL_OK) << bad;
    }
    const mmbal_mask_options top = {MMBAL_TOPK, 1, 0}, other = {enum_of<mmbal_sampler>(5), 0, 0};
    EXPECT_EQ(status(top, [](auto &) {}), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(status(other, [](auto &) {}), MMBAL_INVALID_ARGUMENT);
    const mmbal_pool pool = mmbal_pool_serial();
    const double rho = 0.5;
    const mmbal_segment negative = {0, -1, 0, 0, 0};
    const auto call = [&](int64_t U, int64_t S, int64_t M) {
        return mmbal_mask_units(nullptr, &negative, &rho, U, S, M, 0, 0, ALL_OPTIONS[0], nullptr, nullptr, nullptr,
                                &pool);
    };
    EXPECT_NE(call(0, 1, 1), MMBAL_OK);
    EXPECT_NE(call(-1, 0, 1), MMBAL_OK);
    EXPECT_NE(call(0, -1, 1), MMBAL_OK);
    EXPECT_NE(call(0, 0, -1), MMBAL_OK);
    EXPECT_EQ(call(0, 0, 1), MMBAL_OK);
}

} // namespace
