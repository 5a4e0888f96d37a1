#include "mmbal/significance.h"

#include <algorithm>
#include <numeric>

#include "any_tensor.h"

namespace {

using namespace mmbal_test;

constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();
constexpr double INFINITE = std::numeric_limits<double>::infinity();

struct Stats {
    std::vector<double> ce, entropy, histogram, rows;
};

// log sum exp, entropy of softmax, largest magnitude and spread of one row
struct Row {
    long double logsumexp = 0, entropy = 0;
    double largest = 0, spread = 0;
    Row(const AnyTensor &tensor, int64_t row, int64_t width) {
        double top = -INFINITE, bottom = INFINITE;
        for (int64_t i = row * width; i < (row + 1) * width; i++) {
            top = std::max(top, tensor.get(i)), bottom = std::min(bottom, tensor.get(i));
            largest = std::max(largest, std::fabs(tensor.get(i)));
        }
        spread = top - bottom;
        long double total = 0, weighted = 0;
        for (int64_t i = row * width; i < (row + 1) * width; i++) {
            const long double below = static_cast<long double>(tensor.get(i)) - top, e = std::exp(below);
            total += e;
            if (e > 0) weighted += e * below;
        }
        logsumexp = top + std::log(total);
        entropy = std::log(total) - weighted / total;
    }
};

struct Batch {
    int64_t M, B, C, ignore = -100;
    std::vector<AnyTensor> logits = {}, features = {};
    std::vector<int64_t> D = {}, targets = {};

    // Modality m has features of the (m + first)th dtype, and D + m of them.
    static Batch random(mmbal_dtype dtype, int64_t M, int64_t B, int64_t C, int64_t D, uint64_t seed = 1) {
        Random random(seed);
        Batch batch{M, B, C};
        for (int64_t m = 0; m < M; m++) {
            const mmbal_dtype of_features = ALL_DTYPES[(static_cast<size_t>(dtype) + m) % 4];
            batch.D.push_back(D + m);
            batch.logits.push_back(AnyTensor::random(dtype, B * C, random, 4));
            batch.features.push_back(AnyTensor::random(of_features, B * (D + m), random, 3));
        }
        for (int64_t b = 0; b < B; b++) batch.targets.push_back(random.below(5) ? random.below(C) : batch.ignore);
        return batch;
    }
    mmbal_status run(const mmbal_pool &pool, Stats *stats) const {
        std::vector<mmbal_modality> modalities;
        for (int64_t m = 0; m < M; m++)
            modalities.push_back({logits[m].data(), features[m].data(), D[m], logits[m].dtype, features[m].dtype});
        Guarded<double> ce(M), entropy(M), histogram(C), rows(1);
        Guarded<unsigned char> workspace(mmbal_modal_stats_workspace(B, M));
        const mmbal_status status =
            mmbal_modal_stats(modalities.data(), targets.data(), M, B, C, ignore, ce.data(), entropy.data(),
                              histogram.data(), rows.data(), workspace.data(), &pool);
        EXPECT_TRUE(ce.intact() && entropy.intact() && histogram.intact() && rows.intact() && workspace.intact());
        EXPECT_TRUE(status == MMBAL_OK ||
                    (ce.untouched() && entropy.untouched() && histogram.untouched() && rows.untouched()));
        *stats = {ce.values(), entropy.values(), histogram.values(), rows.values()};
        return status;
    }
    Stats run() const {
        Stats stats;
        EXPECT_EQ(run(mmbal_pool_serial(), &stats), MMBAL_OK);
        return stats;
    }
    bool counts(int64_t b) const { return targets[b] != ignore; }
    void check(const Stats &stats) const {
        std::vector<double> histogram(C);
        double rows = 0;
        for (int64_t b = 0; b < B; b++)
            if (counts(b)) histogram[targets[b]]++, rows++;
        EXPECT_EQ(stats.histogram, histogram);
        EXPECT_EQ(stats.rows[0], rows);
        for (int64_t m = 0; m < M; m++) {
            long double ce = 0, entropy = 0;
            double of_ce = 0, of_entropy = 0; // what is allowed for rounding, in units of real
            for (int64_t b = 0; b < B; b++) {
                if (!counts(b)) continue;
                const Row o(logits[m], b, C), z(features[m], b, D[m]);
                ce += o.logsumexp - logits[m].get(b * C + targets[b]);
                of_ce += 40 + static_cast<double>(C) / 16 + 4 * o.largest;
                entropy += z.entropy;
                of_entropy += 40 + static_cast<double>(D[m]) / 16 + 4 * z.spread;
            }
            EXPECT_NEAR(stats.ce[m], ce, real_error_of(logits[m].dtype) * of_ce) << m;
            EXPECT_NEAR(stats.entropy[m], entropy, real_error_of(features[m].dtype) * of_entropy) << m;
        }
    }
};

bool same(const Stats &a, const Stats &b) {
    return same_bits(a.ce, b.ce) && same_bits(a.entropy, b.entropy) && same_bits(a.histogram, b.histogram) &&
           same_bits(a.rows, b.rows);
}

template <typename T>
class ModalStats : public ::testing::Test {};
TYPED_TEST_SUITE(ModalStats, Dtypes, DtypeNames);

TYPED_TEST(ModalStats, FollowTheirFormulas) {
    struct Shape {
        int64_t M, B, C, D;
    };
    for (const Shape &s : std::vector<Shape>{{1, 0, 3, 4},
                                             {1, 1, 1, 1},
                                             {2, 1, 2, 1},
                                             {3, 7, 5, 3},
                                             {2, 64, 31, 64},
                                             {5, 130, 17, 33},
                                             {2, 3, 3000, 7},
                                             {1, 5, 4, 5000},
                                             {2, 2100, 3, 2},
                                             {256, 3, 4, 1}})
        for (uint64_t seed : {1, 2}) {
            SCOPED_TRACE(std::to_string(s.M) + " x " + std::to_string(s.B) + " C " + std::to_string(s.C) + " D " +
                         std::to_string(s.D));
            const Batch batch = Batch::random(TypeParam::dtype, s.M, s.B, s.C, s.D, seed);
            batch.check(batch.run());
        }
}

TYPED_TEST(ModalStats, AreTheSameForAnyThreads) {
    for (auto [B, C] : std::vector<std::pair<int64_t, int64_t>>{{5, 700}, {3000, 11}, {257, 64}}) {
        const Batch batch = Batch::random(TypeParam::dtype, 3, B, C, 40);
        const Stats first = batch.run();
        for_each_pool([&](const std::string &name, const mmbal_pool &pool) {
            Stats stats;
            ASSERT_EQ(batch.run(pool, &stats), MMBAL_OK);
            EXPECT_TRUE(same(first, stats)) << name << " B=" << B;
        });
    }
}

TYPED_TEST(ModalStats, OfUniformPerfectAndConstantRows) {
    Batch batch = Batch::random(TypeParam::dtype, 2, 50, 6, 9);
    const double sure = TypeParam::dtype == MMBAL_F16 ? 6e4 : 1e30; // far apart, and far beyond exp
    for (int64_t i = 0; i < 50 * 6; i++) {
        batch.logits[0].set(i, 0.75);
        batch.logits[1].set(i, i % 6 == batch.targets[i / 6] ? sure : -sure);
    }
    for (int64_t i = 0; i < 50 * 9; i++) batch.features[0].set(i, -1.5);
    Stats stats = batch.run();
    const double rows = stats.rows[0], exact = 20 * rows * real_error_of(TypeParam::dtype);
    EXPECT_NEAR(stats.ce[0], rows * std::log(6), 4 * exact);
    EXPECT_EQ(stats.ce[1], 0);
    EXPECT_NEAR(stats.entropy[0], rows * std::log(9), 4 * exact + 80 * rows * real_error_of(batch.features[0].dtype));
    // One sample that is surely wrong costs the distance of its logits.
    const int64_t wrong =
        std::find_if(batch.targets.begin(), batch.targets.end(), [](auto y) { return y >= 0; }) - batch.targets.begin();
    for (int64_t c = 0; c < 6; c++) batch.logits[1].set(wrong * 6 + c, c == batch.targets[wrong] ? -sure : sure);
    const double high = std::fabs(batch.logits[1].get(wrong * 6));
    stats = batch.run();
    EXPECT_NEAR(stats.ce[1] / (2 * high), 1, 1e-4);
    // Features of which one outweighs all others have no entropy.
    for (int64_t i = 0; i < 50 * 9; i++) batch.features[0].set(i, i % 9 == 4 ? 6e4 : -6e4);
    EXPECT_EQ(batch.run().entropy[0], 0);
}

TYPED_TEST(ModalStats, TakeMinusInfinityAsProbabilityZero) {
    Batch batch = Batch::random(TypeParam::dtype, 1, 20, 5, 6), without = Batch::random(TypeParam::dtype, 1, 20, 4, 5);
    without.ignore = batch.ignore;
    for (int64_t b = 0; b < 20; b++) {
        without.targets[b] = batch.targets[b] = b % 4;
        for (int64_t c = 0; c < 4; c++) without.logits[0].set(b * 4 + c, batch.logits[0].get(b * 5 + c));
        for (int64_t d = 0; d < 5; d++) without.features[0].set(b * 5 + d, batch.features[0].get(b * 6 + d));
        batch.logits[0].set(b * 5 + 4, -INFINITE), batch.features[0].set(b * 6 + 5, -INFINITE);
    }
    const Stats got = batch.run(), expected = without.run();
    EXPECT_NEAR(got.ce[0], expected.ce[0], 1e-4);
    EXPECT_NEAR(got.entropy[0], expected.entropy[0], 1e-4);
    batch.targets[3] = 4;
    EXPECT_EQ(batch.run().ce[0], INFINITE);
}

TYPED_TEST(ModalStats, OfAModalityWithNaNOrInfinityAreNaN) {
    for (double bad : {NOT_A_NUMBER, INFINITE}) {
        const Batch good = Batch::random(TypeParam::dtype, 3, 40, 7, 10);
        const Stats expected = good.run();
        const int64_t b = std::find_if(good.targets.begin() + 15, good.targets.end(), [](auto y) { return y >= 0; }) -
                          good.targets.begin();
        for (int64_t at : {0, 3, 6}) {
            Batch batch = good;
            batch.logits[1].set(b * 7 + at, bad);
            batch.features[2].set(b * batch.D[2] + at, bad);
            const Stats stats = batch.run();
            EXPECT_TRUE(std::isnan(stats.ce[1])) << bad << " " << at;
            EXPECT_TRUE(std::isnan(stats.entropy[2])) << bad << " " << at;
            for (int m : {0, 2}) EXPECT_EQ(stats.ce[m], expected.ce[m]);
            for (int m : {0, 1}) EXPECT_EQ(stats.entropy[m], expected.entropy[m]);
            EXPECT_EQ(stats.histogram, expected.histogram);
        }
    }
}

TYPED_TEST(ModalStats, LeaveOutWhatIsIgnored) {
    Batch batch = Batch::random(TypeParam::dtype, 2, 60, 5, 8);
    batch.ignore = 2; // a class can be ignored too
    for (int64_t &y : batch.targets) y = y < 0 ? 3 : y;
    for (int64_t b = 0; b < 60; b++) {
        if (batch.counts(b)) continue;
        for (int64_t c = 0; c < 5; c++) batch.logits[0].set(b * 5 + c, NOT_A_NUMBER);
        for (int64_t d = 0; d < 8; d++) batch.features[0].set(b * 8 + d, INFINITE);
    }
    const Stats stats = batch.run();
    batch.check(stats);
    EXPECT_EQ(stats.histogram[2], 0);
    std::fill(batch.targets.begin(), batch.targets.end(), 2);
    batch.check(batch.run());
    EXPECT_EQ(batch.run().rows[0], 0);
}

TYPED_TEST(ModalStats, AddOverBatches) {
    const Batch all = Batch::random(TypeParam::dtype, 2, 90, 5, 8);
    Batch parts[2] = {all, all};
    for (int64_t b = 0; b < 90; b++) parts[b < 37].targets[b] = all.ignore;
    const Stats whole = all.run(), a = parts[0].run(), b = parts[1].run();
    for (int m : {0, 1}) {
        EXPECT_NEAR(whole.ce[m], a.ce[m] + b.ce[m], 1e-12 * whole.ce[m]);
        EXPECT_NEAR(whole.entropy[m], a.entropy[m] + b.entropy[m], 1e-12 * whole.entropy[m]);
    }
    EXPECT_EQ(whole.rows[0], a.rows[0] + b.rows[0]);
    for (int c = 0; c < 5; c++) EXPECT_EQ(whole.histogram[c], a.histogram[c] + b.histogram[c]);
}

TEST(ModalStatsErrors, RefuseTargetsAndSizesOutsideTheContract) {
    const Batch good = Batch::random(MMBAL_F32, 2, 3000, 5, 8);
    Stats stats;
    const auto status = [&](auto change) {
        Batch batch = good;
        change(batch);
        return batch.run(mmbal_pool_serial(), &stats);
    };
    EXPECT_EQ(status([](auto &) {}), MMBAL_OK);
    for (int64_t at : {0, 1500, 2999})
        for (int64_t bad : {int64_t{-1}, int64_t{5}, INT64_MIN, INT64_MAX})
            EXPECT_EQ(status([=](auto &b) { b.targets[at] = bad; }), MMBAL_INVALID_INDEX) << at << " " << bad;
    EXPECT_EQ(status([](auto &b) { b.D[1] = 0; }), MMBAL_INVALID_ARGUMENT);
    for (mmbal_dtype bad : {enum_of<mmbal_dtype>(4), enum_of<mmbal_dtype>(-1)}) {
        EXPECT_NE(status([=](auto &b) { b.logits[1].dtype = bad; }), MMBAL_OK);
        EXPECT_NE(status([=](auto &b) { b.features[1].dtype = bad; }), MMBAL_OK);
    }
    const mmbal_pool pool = mmbal_pool_serial();
    const auto sizes = [&](int64_t M, int64_t B, int64_t C) {
        return mmbal_modal_stats(nullptr, nullptr, M, B, C, -100, nullptr, nullptr, nullptr, nullptr, nullptr, &pool);
    };
    EXPECT_EQ(sizes(-1, 2, 3), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(sizes(MMBAL_MAX_MODALITIES + 1, 2, 3), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(sizes(2, -1, 3), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(sizes(2, 2, 0), MMBAL_INVALID_ARGUMENT);
}

constexpr mmbal_ratio_options RATIO = {MMBAL_RATE, 1.25, 0.5, 0.1, 0.9, 0, 0.05, 0};

struct Ratios {
    mmbal_ratio_options options = RATIO;
    std::vector<double> ce, entropy, histogram; // sums over `rows` samples
    double rows = 1;
    std::vector<int64_t> dims;
    std::vector<double> rate = {}, rho = {};

    // M modalities with these mean cross entropies and entropies, C classes that are equally frequent
    static Ratios of(std::vector<double> mean_ce, double mean_entropy, int64_t D, int64_t C) {
        Ratios r;
        r.rows = 4 * static_cast<double>(C);
        for (double ce : mean_ce) r.ce.push_back(ce * r.rows);
        r.entropy.assign(mean_ce.size(), mean_entropy * r.rows);
        r.histogram.assign(C, 4);
        r.dims.assign(mean_ce.size(), D);
        return r;
    }
    mmbal_status run() {
        const auto M = static_cast<int64_t>(ce.size());
        Guarded<double> of_rate(M), of_rho(M);
        const mmbal_status status =
            mmbal_update_ratio(ce.data(), entropy.data(), histogram.data(), &rows, dims.data(), M,
                               static_cast<int64_t>(histogram.size()), options, of_rate.data(), of_rho.data());
        EXPECT_TRUE(of_rate.intact() && of_rho.intact());
        EXPECT_TRUE(status == MMBAL_OK || (of_rate.untouched() && of_rho.untouched()));
        rate = of_rate.values(), rho = of_rho.values();
        return status;
    }
    std::vector<double> plain_rates() const {
        double label_entropy = 0;
        for (double count : histogram)
            if (count > 0) label_entropy -= count / rows * std::log(count / rows);
        std::vector<double> rates;
        for (size_t m = 0; m < ce.size(); m++) {
            const double information = std::max(label_entropy - ce[m] / rows + options.offset, 0.0);
            const double most = std::log(static_cast<double>(dims[m]));
            const double h = std::max(dims[m] == 1 ? 1 : entropy[m] / rows / most, options.least_entropy);
            const double over[] = {h, dims[m] == 1 ? h : h * most, 1};
            rates.push_back(information / over[options.significance]);
        }
        return rates;
    }
};

std::vector<double> plain_ratios(const std::vector<double> &rates, const mmbal_ratio_options &options) {
    if (rates.size() == 1) return {1};
    std::vector<double> scaled, rho;
    for (double r : rates) scaled.push_back(r / options.temperature);
    for (double share : Softmax(scaled).p)
        rho.push_back(std::min(std::max(1 - share + options.bias, options.least), options.most));
    return rho;
}

void expect_all_near(const std::vector<double> &got, const std::vector<double> &expected, double bound) {
    ASSERT_EQ(got.size(), expected.size());
    for (size_t i = 0; i < got.size(); i++) EXPECT_NEAR(got[i], expected[i], bound * (1 + std::fabs(expected[i]))) << i;
}

TEST(UpdateRatio, FollowsItsFormula) {
    Random random(3);
    for (int round = 0; round < 600; round++) {
        Ratios r;
        const int64_t M = 1 + random.below(6), C = 1 + random.below(20);
        r.rows = 0;
        for (int64_t c = 0; c < C; c++) r.histogram.push_back(static_cast<double>(random.below(4)));
        r.histogram[0]++;
        for (double count : r.histogram) r.rows += count;
        for (int64_t m = 0; m < M; m++) {
            r.dims.push_back(1 + random.below(random.below(2) ? 600 : 3));
            r.ce.push_back(random.uniform(0, 4) * r.rows);
            r.entropy.push_back(random.uniform(0, 1) * std::log(static_cast<double>(r.dims[m])) * r.rows);
        }
        r.options = {enum_of<mmbal_significance>(round % 3),
                     random.uniform(0.05, 3),
                     random.uniform(-1, 3),
                     0.1,
                     0.9,
                     random.uniform(-0.2, 0.2),
                     0.05,
                     0};
        if (round % 2) r.options.least = 0, r.options.most = 1;
        ASSERT_EQ(r.run(), MMBAL_OK);
        expect_all_near(r.rate, r.plain_rates(), 1e-12);
        expect_all_near(r.rho, plain_ratios(r.plain_rates(), r.options), 1e-11);
    }
}

TEST(UpdateRatio, HasTheTypicalValuesOfTheOfficialCode) {
    struct Golden {
        double strong, weak, rho_strong, rho_weak;
    };
    for (const Golden &g : std::vector<Golden>{{3.4, 3.4, .50, .50},
                                               {2, 3.2, .27, .73},
                                               {1, 2.5, .22, .78},
                                               {.2, 2, .18, .82}}) { // audio-video: H = 6 nats, H(Y) = 3.43
        Ratios r = Ratios::of({g.strong, g.weak}, 6, 512, 31);
        r.options.significance = MMBAL_RATE_UNNORMALISED, r.options.temperature = 0.2;
        ASSERT_EQ(r.run(), MMBAL_OK);
        EXPECT_NEAR(r.rho[0], g.rho_strong, 0.005);
        EXPECT_NEAR(r.rho[1], g.rho_weak, 0.005);
    }
    for (const Golden &g : std::vector<Golden>{{.6, .69, .46, .54}, {.3, .65, .33, .67}, {.1, .6, .27, .73}}) {
        Ratios r = Ratios::of({g.strong, g.weak}, 3, 256, 2); // image-text
        r.options.significance = MMBAL_MI, r.options.temperature = 0.5, r.options.offset = 0;
        ASSERT_EQ(r.run(), MMBAL_OK);
        EXPECT_NEAR(r.rho[0], g.rho_strong, 0.0051);
        EXPECT_NEAR(r.rho[1], g.rho_weak, 0.0051);
    }
    Ratios r = Ratios::of({0, std::log(31.0)}, std::log(512.0), 512, 31); // all that can be known, and nothing
    r.options.offset = 0;
    ASSERT_EQ(r.run(), MMBAL_OK);
    EXPECT_NEAR(r.rate[0], std::log(31.0), 1e-12);
    EXPECT_NEAR(r.rate[1], 0, 1e-12);
}

TEST(UpdateRatio, GivesTheWeakerMoreSumsToOneLessThanMAndKnowsNoOrder) {
    Random random(4);
    for (int64_t M = 2; M <= 7; M++) {
        std::vector<double> ce;
        for (int64_t m = 0; m < M; m++) ce.push_back(random.uniform(0.5, 2.5));
        Ratios r = Ratios::of(ce, 4, 100, 20);
        r.options.least = 0, r.options.most = 1;
        ASSERT_EQ(r.run(), MMBAL_OK);
        EXPECT_NEAR(std::accumulate(r.rho.begin(), r.rho.end(), 0.0), static_cast<double>(M - 1), 1e-12);
        for (int64_t m = 1; m < M; m++) EXPECT_EQ(ce[m] > ce[0], r.rho[m] > r.rho[0]);
        Ratios turned = Ratios::of({ce.rbegin(), ce.rend()}, 4, 100, 20);
        turned.options = r.options;
        ASSERT_EQ(turned.run(), MMBAL_OK);
        expect_all_near({turned.rho.rbegin(), turned.rho.rend()}, r.rho, 1e-14);
    }
}

TEST(UpdateRatio, OfOneModalityIsOneAndStaysInItsBounds) {
    Ratios one = Ratios::of({2}, 3, 64, 8);
    ASSERT_EQ(one.run(), MMBAL_OK);
    EXPECT_EQ(one.rho[0], 1);
    Ratios r = Ratios::of({0, 50, 50}, 0.001, 64, 8); // rates 20 times the information, and 0
    ASSERT_EQ(r.run(), MMBAL_OK);
    EXPECT_EQ(r.rho, (std::vector<double>{0.1, 0.9, 0.9}));
    r.options.bias = 0.25;
    ASSERT_EQ(r.run(), MMBAL_OK);
    EXPECT_NEAR(r.rho[0], 0.25, 1e-9);
    r.options.least = r.options.most = 0.4;
    ASSERT_EQ(r.run(), MMBAL_OK);
    EXPECT_EQ(r.rho, (std::vector<double>{0.4, 0.4, 0.4}));
}

TEST(UpdateRatio, IsAHalfUnderTheOfficialGuard) {
    for (double worst : {2.0, 2.7}) { // H(Y) + offset = ln 8 + 0.5 = 2.58
        Ratios r = Ratios::of({0.4, worst, 1}, 3, 64, 8);
        r.options.official_guard = 1;
        ASSERT_EQ(r.run(), MMBAL_OK);
        if (worst > 2.58)
            EXPECT_EQ(r.rho, (std::vector<double>{0.5, 0.5, 0.5}));
        else
            expect_all_near(r.rho, plain_ratios(r.plain_rates(), r.options), 1e-12);
        r.options.official_guard = 0;
        ASSERT_EQ(r.run(), MMBAL_OK);
        expect_all_near(r.rho, plain_ratios(r.plain_rates(), r.options), 1e-12);
    }
}

TEST(UpdateRatio, IsTheSameForAllWhereARateIsNotFiniteOrNothingWasSeen) {
    const Ratios good = Ratios::of({0.4, 1.7, 1}, 3, 64, 8);
    for (int guard : {0, 1})
        for (int what = 0; what < 4; what++) {
            Ratios r = good;
            r.options.official_guard = guard;
            if (what == 0) r.ce[1] = NOT_A_NUMBER;
            if (what == 1) r.entropy[1] = NOT_A_NUMBER;
            if (what == 2) r.rows = 0, r.ce = r.entropy = {0, 0, 0}, r.histogram.assign(8, 0);
            if (what == 3) r.ce[1] = -INFINITE;
            ASSERT_EQ(r.run(), MMBAL_OK);
            expect_all_near(r.rho, {2. / 3, 2. / 3, 2. / 3}, 1e-15);
            EXPECT_FALSE(what != 2 && std::isfinite(r.rate[1])) << what;
            r.options.most = 0.6;
            ASSERT_EQ(r.run(), MMBAL_OK);
            EXPECT_EQ(r.rho, (std::vector<double>{0.6, 0.6, 0.6}));
        }
    Ratios hopeless = good; // a cross entropy of infinity is no information
    hopeless.ce[1] = INFINITE;
    ASSERT_EQ(hopeless.run(), MMBAL_OK);
    EXPECT_EQ(hopeless.rate[1], 0);
    expect_all_near(hopeless.rho, plain_ratios(hopeless.plain_rates(), hopeless.options), 1e-12);
}

TEST(UpdateRatio, RefusesOptionsOutsideTheContract) {
    const auto status = [](auto change) {
        Ratios r = Ratios::of({0.4, 1.7}, 3, 64, 8);
        change(r);
        const mmbal_status whole = r.run();
        std::vector<double> rho(r.ce.size(), 7);
        const std::vector<double> rate(r.ce.size(), 1);
        const mmbal_status half =
            mmbal_ratio_of_rates(rate.data(), static_cast<int64_t>(rate.size()), r.options, rho.data());
        EXPECT_TRUE(half == MMBAL_OK || rho == std::vector<double>(rho.size(), 7));
        return std::make_pair(whole, half);
    };
    const auto both = [](mmbal_status s) { return std::make_pair(s, s); };
    EXPECT_EQ(status([](auto &) {}), both(MMBAL_OK));
    for (double bad : {0.0, -1.0, NOT_A_NUMBER}) {
        EXPECT_EQ(status([=](auto &r) { r.options.temperature = bad; }), both(MMBAL_INVALID_ARGUMENT)) << bad;
        EXPECT_EQ(status([=](auto &r) { r.options.least_entropy = bad; }).first, MMBAL_INVALID_ARGUMENT) << bad;
    }
    for (auto [least, most] : std::vector<std::pair<double, double>>{
             {-0.1, 0.9}, {0.1, 1.1}, {0.6, 0.5}, {NOT_A_NUMBER, 0.9}, {0.1, NOT_A_NUMBER}})
        EXPECT_EQ(status([=, l = least, m = most](auto &r) { r.options.least = l, r.options.most = m; }),
                  both(MMBAL_INVALID_ARGUMENT))
            << least << " " << most;
    for (double bad : {NOT_A_NUMBER, INFINITE}) {
        EXPECT_EQ(status([=](auto &r) { r.options.bias = bad; }), both(MMBAL_INVALID_ARGUMENT)) << bad;
        EXPECT_EQ(status([=](auto &r) { r.options.offset = bad; }).first, MMBAL_INVALID_ARGUMENT) << bad;
    }
    EXPECT_EQ(status([](auto &r) { r.options.significance = enum_of<mmbal_significance>(3); }).first,
              MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(status([](auto &r) { r.dims[1] = 0; }).first, MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(mmbal_ratio_of_rates(nullptr, -1, RATIO, nullptr), MMBAL_INVALID_ARGUMENT);
}

TEST(RatioOfRates, IsTheSoftmaxHalfAlone) {
    Random random(5);
    const auto run = [](const std::vector<double> &rate, const mmbal_ratio_options &options) {
        Guarded<double> rho(static_cast<int64_t>(rate.size()));
        EXPECT_EQ(mmbal_ratio_of_rates(rate.data(), static_cast<int64_t>(rate.size()), options, rho.data()), MMBAL_OK);
        EXPECT_TRUE(rho.intact());
        return rho.values();
    };
    for (int round = 0; round < 200; round++) {
        std::vector<double> rate;
        for (int64_t m = 0; m < 1 + round % 9; m++) rate.push_back(random.uniform(-2, 2));
        mmbal_ratio_options options = RATIO;
        options.temperature = random.uniform(0.01, 2), options.bias = random.uniform(-0.3, 0.3);
        expect_all_near(run(rate, options), plain_ratios(rate, options), 1e-12);
    }
    expect_all_near(run({1e300, 1e300, -1e300}, RATIO), {0.5, 0.5, 0.9}, 1e-15); // exp of neither
    for (double bad : {NOT_A_NUMBER, INFINITE, -INFINITE}) expect_all_near(run({1, bad}, RATIO), {0.5, 0.5}, 1e-15);
}

} // namespace
