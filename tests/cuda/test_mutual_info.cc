// mutual_info.cu against the C core. Digamma functions are added in another order, and so differ in the last places; a
// sample that one of them counts and the other does not would differ by 1 / N^2 at least.
#include "mmbal/cuda/mutual_info.h"

#include "device.h"
#include "helpers.h"

namespace mmbal_test {
namespace {

constexpr double ROUNDING = 1e-11;

struct Options {
    int64_t neighbors = 3;
    int standardize = 1;
    double jitter = 0;
    uint64_t seed = 5;
};

template <typename T>
struct Sampled {
    int64_t N, M;
    std::vector<typename T::Stored> x, y;
    std::vector<uint8_t> present = {};

    const uint8_t *mask() const { return present.empty() ? nullptr : present.data(); }

    std::vector<double> of_core(const Options &o) const {
        std::vector<double> mi(M);
        std::vector<unsigned char> scratch(mmbal_ksg_mutual_info_workspace(N, M, serial()));
        EXPECT_EQ(mmbal_ksg_mutual_info(T::dtype, x.data(), y.data(), mask(), N, M, o.neighbors, o.standardize,
                                        o.jitter, o.seed, mi.data(), scratch.data(), serial()),
                  MMBAL_OK);
        return mi;
    }
    std::vector<double> of_device(const Options &o) const {
        DeviceArray<typename T::Stored> d_x("x", x), d_y("y", y);
        DeviceArray<uint8_t> d_present("present", present);
        DeviceArray<double> mi("mi", M);
        DeviceBytes workspace("workspace", mmbal_ksg_mutual_info_workspace_cuda(N, M));
        EXPECT_EQ(mmbal_ksg_mutual_info_cuda(T::dtype, d_x.data(), d_y.data(), mask() ? d_present.data() : nullptr, N,
                                             M, o.neighbors, o.standardize, o.jitter, o.seed, mi.data(),
                                             workspace.data(), nullptr),
                  MMBAL_OK);
        return mi.values();
    }
    void compare(const Options &o) const { expect_same(of_device(o), of_core(o)); }
    static void expect_same(const std::vector<double> &got, const std::vector<double> &expected) {
        for (size_t m = 0; m < got.size(); m++) {
            if (std::isnan(expected[m]))
                EXPECT_TRUE(std::isnan(got[m])) << m;
            else
                EXPECT_NEAR(got[m], expected[m], ROUNDING) << m;
        }
    }
};

// y = x of modality 0 and noise; modality 1 is noise, modality 2 as 0 with more of it.
template <typename T>
Sampled<T> related(int64_t N, int64_t M, uint64_t seed) {
    Random random(seed);
    Sampled<T> s{N, M, {}, {}};
    for (int64_t n = 0; n < N; n++) {
        const double truth = random.uniform(-2, 2);
        s.y.push_back(T::store(truth + random.uniform(-0.3, 0.3)));
        for (int64_t m = 0; m < M; m++)
            s.x.push_back(T::store(m == 1 ? random.uniform(-1, 5) : truth * truth + random.uniform(0, m + 0.1)));
    }
    return s;
}

template <typename T>
class CudaKsg : public ::testing::Test {};
TYPED_TEST_SUITE(CudaKsg, Dtypes, DtypeNames);

TYPED_TEST(CudaKsg, CountsWhatTheCoreCounts) {
    for (const auto &[N, M] : std::vector<std::pair<int64_t, int64_t>>{{2, 1}, {5, 2}, {33, 1}, {150, 3}}) {
        SCOPED_TRACE(std::to_string(N) + " x " + std::to_string(M));
        const auto samples = related<TypeParam>(N, M, N);
        const std::vector<double> expected = samples.of_core({N == 2 ? 1 : 3, 1, 1e-10});
        for_each_schedule([&] { samples.expect_same(samples.of_device({N == 2 ? 1 : 3, 1, 1e-10}), expected); });
    }
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
}

TYPED_TEST(CudaKsg, LeavesOutWhatTheCoreLeavesOut) {
    auto samples = related<TypeParam>(120, 3, 8);
    Random random(4);
    for (int64_t i = 0; i < 120 * 3; i++) samples.present.push_back(random.below(4) != 0);
    for (int64_t n = 0; n < 120; n++) samples.present[n * 3 + 2] = n < 3; // as many as neighbours: NaN
    samples.x[7] = TypeParam::store(NAN), samples.x[3 * 40] = TypeParam::store(INFINITY);
    samples.y[11] = TypeParam::store(-INFINITY);
    samples.compare({});
    samples.compare({5, 0, 0.01});
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
}

TEST(CudaKsgSamples, ManyAreCutIntoStrips) {
    for (const int64_t neighbors : {1, 3, 64}) {
        SCOPED_TRACE(neighbors);
        related<F64>(1300, 1, 2).compare({neighbors, 0});
    }
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
}

TEST(CudaKsgSamples, ThatTieAreCountedAsTheCoreCountsThem) {
    Random random(9);
    Sampled<F64> grid{300, 3, {}, {}};
    for (int64_t n = 0; n < grid.N; n++) {
        grid.y.push_back(static_cast<double>(random.below(7)) / 3);
        grid.x.push_back(grid.y.back() + static_cast<double>(random.below(3)));
        grid.x.push_back(0.1); // constant
        grid.x.push_back(random.below(2) ? 0.0 : -0.0);
    }
    for (const int standardize : {0, 1}) grid.compare({3, standardize});
    grid.compare({3, 1, 1e-10});
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
}

TEST(CudaKsgSamples, OfAnySizeAreServed) {
    for (const double scale : {1e-308, 1e160, 1e308}) { // squares under- and overflow, and a sum does
        auto samples = related<F64>(60, 2, 12);
        for (auto &value : samples.x) value *= scale / 8;
        samples.compare({});
    }
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
}

TEST(CudaKsgSamples, NoneGiveNaN) {
    Sampled<F32>{0, 2, {}, {}}.compare({});
    Sampled<F32>{3, 1, {1, 2, 3}, {1, 2, 3}}.compare({});
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
}

TEST(CudaKsgErrors, ArgumentsOutsideTheContractAreRefused) {
    const auto ksg = [](mmbal_dtype dtype, int64_t N, int64_t M, int64_t neighbors, double jitter) {
        return mmbal_ksg_mutual_info_cuda(dtype, nullptr, nullptr, nullptr, N, M, neighbors, 1, jitter, 0, nullptr,
                                          nullptr, nullptr);
    };
    EXPECT_EQ(ksg(MMBAL_F32, -1, 1, 3, 0), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(ksg(MMBAL_F32, INT64_C(1) << 31, 1, 3, 0), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(ksg(MMBAL_F32, 9, 0, 3, 0), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(ksg(MMBAL_F32, 9, 1, 65, 0), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(ksg(MMBAL_F32, 9, 1, 3, NAN), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(ksg(enum_of<mmbal_dtype>(9), 9, 1, 3, 0), MMBAL_UNSUPPORTED);
}

std::vector<double> of_labels(const std::vector<int64_t> &a, const std::vector<int64_t> &b,
                              const std::vector<uint8_t> &present, int64_t M, int64_t C) {
    const auto N = static_cast<int64_t>(b.size());
    DeviceArray<int64_t> d_a("a", a), d_b("b", b);
    DeviceArray<uint8_t> d_present("present", present);
    DeviceArray<double> mi("mi", M);
    DeviceBytes workspace("workspace", mmbal_discrete_mutual_info_workspace_cuda(M, N));
    EXPECT_EQ(mmbal_discrete_mutual_info_cuda(d_a.data(), d_b.data(), present.empty() ? nullptr : d_present.data(), M,
                                              N, C, mi.data(), workspace.data(), nullptr),
              MMBAL_OK);
    return cuda_shim::take_reports().empty() ? mi.values() : std::vector<double>();
}

TEST(CudaDiscrete, IsThatOfTheCore) {
    struct Shape {
        int64_t N, M, C;
        bool masked;
    };
    for (const Shape &s : std::vector<Shape>{
             {0, 2, 3, false}, {1, 1, 1, false}, {40, 2, 2, true}, {600, 2, 30, true}, {1100, 1, 5000, false}}) {
        SCOPED_TRACE(std::to_string(s.N) + " x " + std::to_string(s.M) + ", " + std::to_string(s.C));
        Random random(s.N);
        std::vector<int64_t> a(s.M * s.N), b(s.N);
        std::vector<uint8_t> present;
        for (int64_t &c : b) c = std::min(random.below(s.C), random.below(s.C));
        for (int64_t i = 0; i < s.M * s.N; i++) a[i] = random.below(3) ? b[i % s.N] : random.below(s.C);
        for (int64_t i = 0; s.masked && i < s.M * s.N; i++)
            present.push_back(i % s.M == 0 ? random.below(3) != 0 : i < 9);
        for (int64_t i = 0; s.masked && i < s.M * s.N; i++)
            if (!present[i]) a[i % s.M * s.N + i / s.M] = -7; // not looked at
        std::vector<double> expected(s.M);
        std::vector<unsigned char> scratch(mmbal_discrete_mutual_info_workspace(s.M, s.C));
        ASSERT_EQ(mmbal_discrete_mutual_info(a.data(), b.data(), s.masked ? present.data() : nullptr, s.M, s.N, s.C,
                                             expected.data(), scratch.data(), serial()),
                  MMBAL_OK);
        for_each_schedule([&] { Sampled<F32>::expect_same(of_labels(a, b, present, s.M, s.C), expected); });
        const std::vector<double> bounded = of_labels(a, b, present, s.M, s.C),
                                  unbounded = of_labels(a, b, present, s.M, MMBAL_MOST_SORTED_CLASSES);
        EXPECT_TRUE(same_bits(bounded, unbounded)) << "the bound of the classes changes the result";
    }
}

TEST(CudaDiscrete, TheLastClassesAreToldApart) {
    const int64_t last = MMBAL_MOST_SORTED_CLASSES - 1;
    const std::vector<double> mi = of_labels({last, last - 1, last, 0}, {last, last, 0, 0}, {}, 1, last + 1);
    EXPECT_NEAR(mi[0], std::log(4.0) + (-2 * std::log(2.0) - 4 * std::log(2.0) + 2 * std::log(1.0)) / 4, 1e-14);
}

TEST(CudaDiscrete, AClassOutOfRangeFailsTheLaunch) {
    for (const auto &[a, b] : std::vector<std::pair<std::vector<int64_t>, std::vector<int64_t>>>{
             {{0, -1}, {1, 2}}, {{0, 3}, {1, 2}}, {{0, 1}, {1, -5}}, {{0, 1}, {3, 1}}})
        EXPECT_TRUE(of_labels(a, b, {}, 1, 3).empty());
    const auto discrete = [](int64_t M, int64_t N, int64_t C) {
        return mmbal_discrete_mutual_info_cuda(nullptr, nullptr, nullptr, M, N, C, nullptr, nullptr, nullptr);
    };
    EXPECT_EQ(discrete(0, 1, 1), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(discrete(1, -1, 1), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(discrete(1, 1, 0), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(discrete(1, 1, MMBAL_MOST_SORTED_CLASSES + 1), MMBAL_INVALID_ARGUMENT);
}

} // namespace
} // namespace mmbal_test
