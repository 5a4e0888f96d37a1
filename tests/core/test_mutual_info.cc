#include "mmbal/mutual_info.h"

#include <algorithm>
#include <numeric>

#include "helpers.h"

namespace {

using namespace mmbal_test;

constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();

double psi(int64_t n) {
    double value = -0.57721566490153286;
    for (int64_t i = 1; i < n; i++) value += 1 / static_cast<double>(i);
    return value;
}

// The estimator by comparing every pair; -1 where the mean of psi would be needed of too few samples.
double plain_ksg(const std::vector<double> &x, const std::vector<double> &y, int64_t k) {
    const int64_t n = static_cast<int64_t>(x.size());
    if (n <= k) return NOT_A_NUMBER;
    double sum = 0;
    for (int64_t i = 0; i < n; i++) {
        std::vector<double> distances;
        for (int64_t j = 0; j < n; j++)
            if (j != i) distances.push_back(std::max(std::fabs(x[j] - x[i]), std::fabs(y[j] - y[i])));
        std::nth_element(distances.begin(), distances.begin() + k - 1, distances.end());
        const double eps = distances[k - 1];
        int64_t nx = 0, ny = 0;
        const auto counts = [&](double d) { return std::fabs(d) < eps || (eps == 0 && d == 0); };
        for (int64_t j = 0; j < n; j++)
            if (j != i) nx += counts(x[j] - x[i]), ny += counts(y[j] - y[i]);
        sum += psi(nx + 1) + psi(ny + 1);
    }
    return std::max(0.0, psi(n) + psi(k) - sum / static_cast<double>(n));
}

struct Ksg {
    int64_t N, M, neighbors = 3;
    int standardize = 0;
    double jitter = 0;
    uint64_t seed = 0;
    std::vector<double> x = {}, y = {};
    std::vector<uint8_t> present = {};

    mmbal_status run(const mmbal_pool &pool, std::vector<double> *mi) const {
        Guarded<double> out(M);
        Guarded<unsigned char> workspace(mmbal_ksg_mutual_info_workspace(N, M, &pool));
        const mmbal_status status =
            mmbal_ksg_mutual_info(MMBAL_F64, x.data(), y.data(), present.empty() ? nullptr : present.data(), N, M,
                                  neighbors, standardize, jitter, seed, out.data(), workspace.data(), &pool);
        EXPECT_TRUE(out.intact() && workspace.intact());
        *mi = out.values();
        return status;
    }
    std::vector<double> run() const {
        std::vector<double> mi;
        EXPECT_EQ(run(mmbal_pool_serial(), &mi), MMBAL_OK);
        return mi;
    }
    double plain(int64_t m) const {
        std::vector<double> of_x, of_y;
        for (int64_t n = 0; n < N; n++) {
            if (!present.empty() && !present[n * M + m]) continue;
            if (!std::isfinite(x[n * M + m]) || !std::isfinite(y[n])) continue;
            of_x.push_back(x[n * M + m]), of_y.push_back(y[n]);
        }
        return plain_ksg(of_x, of_y, neighbors);
    }
};

// x of every modality is y with more and more noise; steps > 0 rounds both, so that there are ties.
Ksg dependent(int64_t N, int64_t M, double steps = 0, uint64_t seed = 1) {
    Random random(seed);
    Ksg problem{N, M};
    const auto rounded = [&](double value) { return steps > 0 ? std::round(value * steps) / steps : value; };
    for (int64_t n = 0; n < N; n++) {
        const double y = random.uniform(-1, 1) + random.uniform(-1, 1);
        problem.y.push_back(rounded(y));
        for (int64_t m = 0; m < M; m++)
            problem.x.push_back(rounded(y + random.uniform(-1, 1) * 0.3 * static_cast<double>(m * m)));
    }
    return problem;
}

TEST(KsgMutualInfo, EqualsTheCountOverAllPairs) {
    uint64_t seed = 0;
    for (int64_t N : {4, 5, 17, 200, 1100})
        for (int64_t neighbors : {1, 3, 7})
            for (double steps : {0.0, 1.0, 8.0}) {
                Ksg problem = dependent(N, 3, steps, seed++);
                problem.neighbors = neighbors;
                const std::vector<double> mi = problem.run();
                for (int64_t m = 0; m < 3; m++) {
                    const double expected = problem.plain(m);
                    if (N <= neighbors) {
                        EXPECT_TRUE(std::isnan(mi[m]));
                    } else {
                        EXPECT_NEAR(mi[m], expected, 1e-12) << N << " " << neighbors << " " << steps << " " << m;
                    }
                }
            }
}

TEST(KsgMutualInfo, HasTheGoldenValues) {
    Ksg problem{50, 1};
    for (int i = 0; i < 50; i++)
        problem.x.push_back(std::sin(i)), problem.y.push_back(std::sin(i) + 0.5 * std::cos(3 * i));
    const std::vector<std::pair<int64_t, double>> golden = {
        {1, 0.8832522358763226}, {3, 0.796241801865889}, {5, 0.666342534466621}};
    for (auto [neighbors, expected] : golden) {
        problem.neighbors = neighbors;
        EXPECT_NEAR(problem.run()[0], expected, 1e-13);
    }
    problem.neighbors = 3, problem.standardize = 1;
    EXPECT_NEAR(problem.run()[0], 0.794568280942368, 1e-13);
}

TEST(KsgMutualInfo, LeavesOutWhatIsMissingOrNotFinite) {
    Ksg problem = dependent(300, 3);
    Random random(9);
    for (int64_t i = 0; i < 900; i++) problem.present.push_back(random.below(4) != 0);
    problem.x[5] = NOT_A_NUMBER, problem.x[7] = std::numeric_limits<double>::infinity();
    problem.y[100] = NOT_A_NUMBER;
    const std::vector<double> mi = problem.run();
    for (int64_t m = 0; m < 3; m++) EXPECT_NEAR(mi[m], problem.plain(m), 1e-12) << m;
}

TEST(KsgMutualInfo, IsNaNForAModalityWithTooFewSamplesAlone) {
    Ksg problem = dependent(30, 2);
    problem.present.assign(60, 1);
    for (int64_t n = 3; n < 30; n++) problem.present[n * 2 + 1] = 0;
    EXPECT_FALSE(std::isnan(problem.run()[0]));
    EXPECT_TRUE(std::isnan(problem.run()[1]));
    problem.present[3 * 2 + 1] = 1;
    EXPECT_FALSE(std::isnan(problem.run()[1]));
}

TEST(KsgMutualInfo, OfAConstantIsZeroAndOfACopySaturates) {
    Ksg problem = dependent(200, 2);
    for (int64_t n = 0; n < 200; n++) problem.x[n * 2] = 4, problem.x[n * 2 + 1] = problem.y[n];
    for (int standardize : {0, 1}) {
        problem.standardize = standardize;
        EXPECT_NEAR(problem.run()[0], 0, 1e-14);
        EXPECT_NEAR(problem.run()[1], psi(200) - psi(3), 1e-12); // nx = ny = k - 1
    }
    Ksg all_the_same{50, 1};
    all_the_same.x.assign(50, 1), all_the_same.y.assign(50, 2);
    EXPECT_NEAR(all_the_same.run()[0], 0, 1e-12); // eps = 0: all others are counted
}

TEST(KsgMutualInfo, StandardizesByTheDeviationOverAllSamples) {
    Ksg problem = dependent(150, 2), scaled = problem;
    for (double &value : scaled.x) value = 1000 * value + 5;
    problem.standardize = scaled.standardize = 1;
    const auto mi = problem.run(), other = scaled.run();
    EXPECT_NEAR(mi[1], other[1], 1e-3); // counts may differ by rounding; x[:, 0] is y itself, where all of them do
    double mean = 0, square = 0;
    for (double y : problem.y) mean += y / 150;
    for (double y : problem.y) square += (y - mean) * (y - mean) / 150;
    Ksg by_hand = problem;
    by_hand.standardize = 0;
    for (double &y : by_hand.y) y /= std::sqrt(square);
    for (int m : {0, 1}) {
        mean = square = 0;
        for (int n = 0; n < 150; n++) mean += problem.x[n * 2 + m] / 150;
        for (int n = 0; n < 150; n++) square += std::pow(problem.x[n * 2 + m] - mean, 2) / 150;
        for (int n = 0; n < 150; n++) by_hand.x[n * 2 + m] /= std::sqrt(square);
    }
    for (int m : {0, 1}) EXPECT_NEAR(mi[m], by_hand.run()[m], 1e-12);
}

TEST(KsgMutualInfo, IsTheSameForAnyThreads) {
    Ksg problem = dependent(3000, 4, 50);
    problem.standardize = 1, problem.jitter = 1e-10, problem.seed = 5;
    const std::vector<double> mi = problem.run();
    for_each_pool([&](const std::string &name, const mmbal_pool &pool) {
        std::vector<double> other;
        ASSERT_EQ(problem.run(pool, &other), MMBAL_OK);
        EXPECT_TRUE(same_bits(mi, other)) << name;
    });
}

// Modalities that miss nothing share what is sorted of y; the others have their own.
TEST(KsgMutualInfo, IsTheSameForAnyThreadsWhereSomeModalitiesMissSamples) {
    for (double jitter : {0.0, 1e-10}) {
        Ksg problem = dependent(700, 4, 8);
        problem.jitter = jitter;
        problem.present.assign(700 * 4, 1);
        for (int64_t n = 0; n < 700; n += 3) problem.present[n * 4 + 1] = 0;
        for (int64_t n = 0; n < 300; n++) problem.present[n * 4 + 2] = 0;
        const std::vector<double> expected = problem.run();
        for (int64_t m = 0; m < 4 && jitter == 0; m++) EXPECT_NEAR(expected[m], problem.plain(m), 1e-12) << m;
        for_each_pool([&](const std::string &name, const mmbal_pool &pool) {
            std::vector<double> mi;
            ASSERT_EQ(problem.run(pool, &mi), MMBAL_OK);
            EXPECT_TRUE(same_bits(mi, expected)) << name;
        });
    }
}

TEST(KsgMutualInfo, JitterBreaksTiesBySeedAlone) {
    Ksg problem = dependent(400, 2, 10);
    problem.jitter = 1e-10;
    const auto first = problem.run(), again = problem.run();
    problem.seed = 1;
    const auto other = problem.run();
    EXPECT_TRUE(same_bits(first, again));
    EXPECT_NE(first[0], other[0]);
    EXPECT_NEAR(first[1], other[1], 0.2);
    problem.jitter = 0;
    EXPECT_NE(problem.run()[0], first[0]);
}

TEST(KsgMutualInfo, ReadsEveryDtype) {
    const Ksg problem = dependent(100, 2, 4); // quarters are exact in all of them
    const std::vector<double> mi = problem.run();
    const mmbal_pool pool = mmbal_pool_serial();
    std::vector<char> workspace(mmbal_ksg_mutual_info_workspace(100, 2, &pool));
    const auto check = [&](auto tag) {
        using T = decltype(tag);
        Ksg narrow = problem;
        std::vector<typename T::Stored> x, y;
        for (double &value : narrow.x) x.push_back(T::store(value)), value = T::load(x.back());
        for (double &value : narrow.y) y.push_back(T::store(value)), value = T::load(y.back());
        double got[2];
        ASSERT_EQ(mmbal_ksg_mutual_info(T::dtype, x.data(), y.data(), nullptr, 100, 2, 3, 0, 0, 0, got,
                                        workspace.data(), &pool),
                  MMBAL_OK);
        for (int m : {0, 1}) EXPECT_EQ(got[m], narrow.run()[m]);
    };
    check(F32{}), check(BF16{}), check(F16{});
    EXPECT_FALSE(std::isnan(mi[0]));
}

TEST(KsgMutualInfo, RefusesOptionsOutsideTheContract) {
    const Ksg good = dependent(10, 1);
    std::vector<double> mi;
    const auto status = [&](auto change) {
        Ksg p = good;
        change(p);
        return p.run(mmbal_pool_serial(), &mi);
    };
    EXPECT_EQ(status([](auto &p) { p.neighbors = 0; }), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(status([](auto &p) { p.neighbors = MMBAL_MAX_NEIGHBORS + 1; }), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(status([](auto &p) { p.jitter = -1; }), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(status([](auto &p) { p.jitter = std::numeric_limits<double>::infinity(); }), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(status([](auto &p) { p.jitter = NOT_A_NUMBER; }), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(status([](auto &p) { p.N = 0, p.x.clear(), p.y.clear(); }), MMBAL_OK);
    EXPECT_TRUE(std::isnan(mi[0]));
}

struct Labels {
    int64_t M, N, C;
    std::vector<int64_t> a = {}, b = {};
    std::vector<uint8_t> present = {};

    mmbal_status run(const mmbal_pool &pool, std::vector<double> *mi) const {
        Guarded<double> out(M);
        Guarded<unsigned char> workspace(mmbal_discrete_mutual_info_workspace(M, C));
        const mmbal_status status =
            mmbal_discrete_mutual_info(a.data(), b.data(), present.empty() ? nullptr : present.data(), M, N, C,
                                       out.data(), workspace.data(), &pool);
        EXPECT_TRUE(out.intact() && workspace.intact());
        *mi = out.values();
        return status;
    }
    double plain(int64_t m) const {
        std::vector<double> joint(C * C), of_a(C), of_b(C);
        double n = 0;
        for (int64_t i = 0; i < N; i++) {
            if (!present.empty() && !present[i * M + m]) continue;
            joint[a[m * N + i] * C + b[i]]++, of_a[a[m * N + i]]++, of_b[b[i]]++, n++;
        }
        double mi = 0;
        for (int64_t i = 0; i < C; i++)
            for (int64_t j = 0; j < C; j++)
                if (joint[i * C + j] > 0)
                    mi += joint[i * C + j] / n * std::log(n * joint[i * C + j] / (of_a[i] * of_b[j]));
        return mi;
    }
};

Labels random_labels(int64_t M, int64_t N, int64_t C, bool masked) {
    Random random(static_cast<uint64_t>(N + C));
    Labels labels{M, N, C};
    for (int64_t i = 0; i < N; i++) labels.b.push_back(random.below(C));
    for (int64_t i = 0; i < M * N; i++) labels.a.push_back(random.below(3) ? labels.b[i % N] : random.below(C));
    for (int64_t i = 0; i < M * N && masked; i++) labels.present.push_back(random.below(3) != 0);
    return labels;
}

TEST(DiscreteMutualInfo, FollowsItsFormulaForAnyThreads) {
    for (bool masked : {false, true})
        for (auto [N, C] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {30, 2}, {500, 7}, {2000, 100}}) {
            const Labels labels = random_labels(3, N, C, masked);
            std::vector<double> first;
            for_each_pool([&](const std::string &name, const mmbal_pool &pool) {
                std::vector<double> mi;
                ASSERT_EQ(labels.run(pool, &mi), MMBAL_OK);
                for (int64_t m = 0; m < 3 && N > 1; m++) EXPECT_NEAR(mi[m], labels.plain(m), 1e-12) << name;
                if (first.empty()) first = mi;
                EXPECT_TRUE(same_bits(first, mi)) << name;
            });
        }
}

TEST(DiscreteMutualInfo, HasTheGoldenValue) {
    Labels labels{1, 60, 4};
    for (int64_t c = 0; c < 4; c++)
        for (int64_t i = 0; i < 15; i++) labels.a.push_back(c), labels.b.push_back(i < 12 ? c : (c + 1) % 4);
    std::vector<double> mi;
    ASSERT_EQ(labels.run(mmbal_pool_serial(), &mi), MMBAL_OK);
    EXPECT_NEAR(mi[0], 0.8858919375817027, 1e-14);
}

TEST(DiscreteMutualInfo, IsNaNForAModalityThatIsNeverPresentAndZeroForAConstant) {
    Labels labels = random_labels(2, 20, 3, false);
    labels.present.assign(40, 1);
    for (int64_t n = 0; n < 20; n++) labels.present[n * 2] = 0, labels.a[n] = -7, labels.a[20 + n] = 1;
    std::vector<double> mi;
    ASSERT_EQ(labels.run(mmbal_pool_serial(), &mi), MMBAL_OK);
    EXPECT_TRUE(std::isnan(mi[0]));
    EXPECT_NEAR(mi[1], 0, 1e-14);
}

TEST(DiscreteMutualInfo, RefusesLabelsOutsideItsClasses) {
    const Labels good = random_labels(2, 20, 3, false);
    std::vector<double> mi;
    for (int64_t bad : {-1, 3}) {
        Labels of_a = good, of_b = good;
        of_a.a[25] = bad, of_b.b[4] = bad;
        EXPECT_EQ(of_a.run(mmbal_pool_serial(), &mi), MMBAL_INVALID_INDEX);
        EXPECT_EQ(of_b.run(mmbal_pool_serial(), &mi), MMBAL_INVALID_INDEX);
    }
}

TEST(CountClasses, FindsTheLargestOfWhatIsPresent) {
    const int64_t a[] = {0, 9, 2, 4}, b[] = {1, 3};
    const uint8_t present[] = {1, 1, 0, 1}; // [N, M]: a[0, 1] is missing
    int64_t C;
    EXPECT_EQ(mmbal_count_classes(a, b, nullptr, 2, 2, &C), MMBAL_OK);
    EXPECT_EQ(C, 10);
    EXPECT_EQ(mmbal_count_classes(a, b, present, 2, 2, &C), MMBAL_OK);
    EXPECT_EQ(C, 5);
    EXPECT_EQ(mmbal_count_classes(a, b, nullptr, 2, 0, &C), MMBAL_OK);
    EXPECT_EQ(C, 1);
    const int64_t negative[] = {0, -1};
    EXPECT_EQ(mmbal_count_classes(a, negative, nullptr, 2, 2, &C), MMBAL_INVALID_INDEX);
    const int64_t largest[] = {0, INT64_MAX};
    EXPECT_EQ(mmbal_count_classes(a, largest, nullptr, 2, 2, &C), MMBAL_INVALID_INDEX);
}

} // namespace
