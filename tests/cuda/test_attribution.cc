// attribution.cu against the formulas, within what rounding moves them, and against the C core, bitwise where the sums
// over a row are exact: those alone have another order.
#include "mmbal/cuda/attribution.h"

#include <deque>

#include "attribution_reference.h"
#include "device.h"

namespace mmbal_test {
namespace {

// An array whose first element lies `shift` elements behind a multiple of 16 bytes.
template <typename T>
class Shifted {
public:
    Shifted(const char *name, const std::vector<T> &values, int64_t shift) : Shifted(name, values.size(), shift) {
        if (!values.empty()) std::memcpy(static_cast<void *>(data()), values.data(), values.size() * sizeof(T));
        cuda_shim::mark_written(data(), values.size() * sizeof(T));
    }
    Shifted(const char *name, size_t count, int64_t shift)
        : array_(name, static_cast<int64_t>(count) + shift), shift_(shift) {
        cuda_shim::mark_written(array_.data(), shift * sizeof(T));
    }
    T *data() { return array_.data() + shift_; }
    std::vector<T> values() const {
        const auto all = array_.values();
        return std::vector<T>(all.begin() + shift_, all.end());
    }

private:
    DeviceArray<T> array_;
    int64_t shift_;
};

struct Call {
    bool none_upstream = false, reg_alone = false;
    int64_t shift = 0;
    bool to_gradients = true, to_embeddings = true;
};

template <typename T>
typename Problem<T>::Outputs run(const Problem<T> &p, typename Problem<T>::Order order,
                                 const std::vector<typename T::Real> &magnitudes, const Call &call = {}) {
    using P = Problem<T>;
    using Stored = typename T::Stored;
    using Real = typename T::Real;
    const int64_t B = p.B, M = p.M();
    std::deque<Shifted<Stored>> g, e, G, E, dg, de;
    std::vector<mmbal_attributed> all;
    for (int64_t m = 0; m < M; m++) {
        g.emplace_back("gradient", p.g[m], call.shift), e.emplace_back("embedding", p.e[m], call.shift);
        G.emplace_back("ddgradient", p.G[m], call.shift), E.emplace_back("ddembedding", p.E[m], call.shift);
        dg.emplace_back("dgradient", p.g[m].size(), call.shift);
        de.emplace_back("dembedding", p.e[m].size(), call.shift);
        all.push_back({g[m].data(), e[m].data(), p.d[m], call.to_gradients ? dg[m].data() : nullptr,
                       call.to_embeddings ? de[m].data() : nullptr, call.none_upstream ? nullptr : G[m].data(),
                       call.none_upstream ? nullptr : E[m].data()});
    }
    DeviceArray<double> target("target", p.target);
    DeviceArray<uint8_t> present("present", p.present);
    DeviceArray<Real> dreg("dreg", p.dreg), dshares("dshares", p.dshares), dmagnitudes("dmagnitudes", p.dmagnitudes);
    DeviceArray<Real> given("magnitudes", magnitudes), reg("reg", B), shares("shares", B * M), result("result", B * M);
    DeviceBytes workspace("workspace", mmbal_attribution_reg_workspace_cuda(B, M));
    const mmbal_attribution of = {
        all.data(), target.data(), p.target_rows, p.present.empty() ? nullptr : present.data(), B,
        M,          T::dtype,      p.options};
    const Real *of_shares = call.reg_alone ? nullptr : dshares.data();
    const Real *of_magnitudes = call.reg_alone ? nullptr : dmagnitudes.data();
    typename P::Outputs out = {MMBAL_OK, {}, {}, {}, {}, {}};
    if (order == P::FORWARD)
        out.status =
            mmbal_attribution_reg_cuda(&of, reg.data(), shares.data(), result.data(), workspace.data(), nullptr);
    if (order == P::BACKWARD)
        out.status = mmbal_attribution_reg_backward_cuda(&of, dreg.data(), of_shares, of_magnitudes, given.data(),
                                                         workspace.data(), nullptr);
    if (order == P::SECOND)
        out.status = mmbal_attribution_reg_backward_backward_cuda(&of, dreg.data(), of_shares, of_magnitudes,
                                                                  given.data(), reg.data(), shares.data(),
                                                                  result.data(), workspace.data(), nullptr);
    if (order != P::BACKWARD) out.reg = reg.values(), out.shares = shares.values(), out.magnitudes = result.values();
    for (int64_t m = 0; m < M && order != P::FORWARD; m++) {
        if (call.to_gradients) out.first.push_back(dg[m].values());
        if (call.to_embeddings) out.last.push_back(de[m].values());
    }
    return out;
}

template <typename T>
void check(const Problem<T> &p, const Call &call = {}, bool also_second = true) {
    using P = Problem<T>;
    for_each_schedule([&] {
        const auto got = run(p, P::FORWARD, {}, call);
        follows_formulas(p, got, run(p, P::BACKWARD, got.magnitudes, call), run(p, P::SECOND, got.magnitudes, call),
                         also_second, call.none_upstream, call.reg_alone);
    });
}

template <typename T>
class CudaAttribution : public ::testing::Test {};
TYPED_TEST_SUITE(CudaAttribution, Dtypes, DtypeNames);

TYPED_TEST(CudaAttribution, FollowsItsFormulasToTheSecondDerivative) {
    const std::vector<std::pair<int64_t, std::vector<int64_t>>> shapes = {
        {0, {3, 4}}, {1, {1}}, {6, {7, 5}}, {5, {64, 1, 33}}, {1, {1500, 3}}, {2, {1024, 2, 1025}}, {40, {3, 2, 4}}};
    uint64_t seed = 0;
    for (const auto &[B, d] : shapes)
        for (int64_t shift : {0, 1}) {
            const auto options = all_options()[seed % 6];
            SCOPED_TRACE(std::to_string(B) + " of " + std::to_string(d[0]) + ", shift " + std::to_string(shift) + " " +
                         words(options));
            const Problem<TypeParam> p(B, d, options, seed % 2 == 0, seed % 3 == 0, seed + 1);
            ASSERT_NO_FATAL_FAILURE(check(p, {false, false, shift}));
            seed++;
        }
}

TYPED_TEST(CudaAttribution, FollowsItsFormulasForEveryPoolAndPenalty) {
    for (double eps : {1e-12, 0.2})
        for (const auto &options : all_options(eps))
            ASSERT_NO_FATAL_FAILURE(check(Problem<TypeParam>(9, {9, 30, 4}, options, true, true, 9))) << words(options);
}

TYPED_TEST(CudaAttribution, TakesAsManyModalitiesAsThereMayBe) {
    std::vector<int64_t> d(MMBAL_MAX_MODALITIES);
    for (size_t m = 0; m < d.size(); m++) d[m] = 1 + static_cast<int64_t>(m) % 9;
    ASSERT_NO_FATAL_FAILURE(check(Problem<TypeParam>(1, d, {MMBAL_POOL_RMS, MMBAL_SQUARED, 1e-12}, true, true, 5)));
}

TYPED_TEST(CudaAttribution, TakesNothingUpstreamAsZero) {
    const Problem<TypeParam> p(3, {5, 20}, {MMBAL_POOL_L2, MMBAL_SQUARED, 1e-12});
    ASSERT_NO_FATAL_FAILURE(check(p, {true, true}));
    ASSERT_NO_FATAL_FAILURE(check(p, {false, true}));
    ASSERT_NO_FATAL_FAILURE(check(p, {true, false}));
}

TYPED_TEST(CudaAttribution, NeitherOverflowsNorVanishes) {
    std::vector<std::pair<double, double>> scales = {{1e-3, 1e-2}, {3e-2, 1e-3}}; // float16: alpha^2 would be 0
    if (TypeParam::dtype != MMBAL_F16) scales = {{1e-25, 1e25}, {1e18, 1e18}, {1e-18, 1e-18}, {1e-10, 1e25}};
    for (const auto &[g, e] : scales) {
        const Problem<TypeParam> p(3, {50, 37, 4}, DEFAULT, true, false, 3, g, e);
        ASSERT_NO_FATAL_FAILURE(check(p, {}, TypeParam::dtype != MMBAL_F16)) << g << " " << e;
    }
}

// Where a row's sum is exact everything else is in the core's order.
template <typename T>
Problem<T> exact(int64_t B, std::vector<int64_t> d, mmbal_attribution_options options, bool masked, uint64_t seed) {
    Problem<T> p(B, std::move(d), options, masked, false, seed);
    Random random(seed);
    for (auto *all : {&p.g, &p.e, &p.G, &p.E})
        for (auto &values : *all)
            for (auto &value : values) value = T::store(static_cast<double>(random.below(7) - 3));
    return p;
}

template <typename T>
void expect_the_cores(const Problem<T> &p) {
    using P = Problem<T>;
    const auto forward = p.forward(), first = p.backward(), second = p.second();
    ASSERT_EQ(forward.status, MMBAL_OK);
    for_each_schedule([&] {
        const auto got = run(p, P::FORWARD, {});
        EXPECT_TRUE(same_bits(got.reg, forward.reg) && same_bits(got.shares, forward.shares) &&
                    same_bits(got.magnitudes, forward.magnitudes));
        EXPECT_TRUE(run(p, P::SECOND, forward.magnitudes).same_as(second));
        const auto backward = run(p, P::BACKWARD, forward.magnitudes);
        for (int64_t m = 0; m < p.M(); m++) {
            EXPECT_TRUE(same_bits(backward.first[m], first.first[m])) << m;
            EXPECT_TRUE(same_bits(backward.last[m], first.last[m])) << m;
        }
    });
}

TYPED_TEST(CudaAttribution, OfExactSumsGivesTheBitsOfTheCore) {
    uint64_t seed = 3;
    for (const auto &options : all_options(0.1)) {
        SCOPED_TRACE(words(options));
        ASSERT_NO_FATAL_FAILURE(expect_the_cores(exact<TypeParam>(19, {7, 40, 1, 66}, options, seed % 2 == 0, seed)));
        seed++;
    }
    ASSERT_NO_FATAL_FAILURE(expect_the_cores(exact<TypeParam>(3, {1030, 5}, DEFAULT, true, seed)));
}

TYPED_TEST(CudaAttribution, NeedsNoRoomForMagnitudes) {
    if (TypeParam::dtype == MMBAL_F16 || TypeParam::dtype == MMBAL_F64) GTEST_SKIP() << "there is room";
    for (double scale : {0x1p-80, 0x1p-65, 0x1p80}) {
        auto p = exact<TypeParam>(4, {50, 37}, DEFAULT, false, 3);
        for (auto *all : {&p.g, &p.e})
            for (auto &values : *all)
                for (auto &value : values) value = TypeParam::store(scale * TypeParam::load(value));
        ASSERT_NO_FATAL_FAILURE(expect_the_cores(p)) << std::log2(scale);
    }
}

TYPED_TEST(CudaAttribution, OfNothingOrOfNoNumbersGivesTheBitsOfTheCore) {
    for (const auto &options : all_options()) {
        auto p = exact<TypeParam>(6, {5, 6, 7}, options, false, 4);
        p.present.assign(18, 1);
        for (int m = 0; m < 3; m++) std::fill_n(p.g[m].begin() + p.d[m], p.d[m], TypeParam::store(0)); // row 1: S = 0
        p.present[6] = p.present[8] = 0;                           // row 2: one is present
        p.present[9] = p.present[10] = p.present[11] = 0;          // row 3: none is
        p.e[1][4 * 6 + 2] = p.g[2][4 * 7] = TypeParam::store(NAN); // row 4
        p.present[16] = 0, p.e[1][5 * 6] = TypeParam::store(NAN);  // row 5: in what is missing
        p.g[1][5 * 6 + 1] = TypeParam::store(INFINITY);
        ASSERT_NO_FATAL_FAILURE(expect_the_cores(p)) << words(options);
    }
}

TYPED_TEST(CudaAttribution, WritesWhatIsAskedForAlone) {
    using P = Problem<TypeParam>;
    const P p(5, {20, 3}, DEFAULT, true);
    const auto magnitudes = p.forward().magnitudes;
    for (auto order : {P::BACKWARD, P::SECOND}) {
        const auto both = run(p, order, magnitudes);
        const auto to_g = run(p, order, magnitudes, {false, false, 0, true, false});
        const auto to_e = run(p, order, magnitudes, {false, false, 0, false, true});
        EXPECT_EQ(joined(cuda_shim::take_reports()), "");
        for (int m = 0; m < 2; m++)
            EXPECT_TRUE(same_bits(to_g.first[m], both.first[m]) && same_bits(to_e.last[m], both.last[m]));
    }
}

TEST(CudaAttributionErrors, ATargetThatIsNoneFailsTheLaunch) {
    using P = Problem<F32>;
    const P good(2, {3, 4});
    for (int way = 0; way < 5; way++) {
        P p = good;
        if (way < 3) p.target[2] = std::vector<double>{-1, INFINITY, NAN}[way];
        if (way == 3) p.target[2] = p.target[3] = 0;
        if (way == 4) p.present = {1, 1, 0, 1}, p.target[3] = 0;
        for (auto order : {P::FORWARD, P::BACKWARD, P::SECOND}) {
            cuda_shim::take_reports();
            std::vector<float> magnitudes(4, 1);
            DeviceArray<float> g("g", good.g[0]), e("e", good.e[0]), dreg("dreg", good.dreg), given("a", magnitudes);
            DeviceArray<float> h("h", good.g[1]), f("f", good.e[1]), reg("reg", 2), shares("p", 4), result("a", 4);
            DeviceArray<double> target("target", p.target);
            DeviceArray<uint8_t> present("present", p.present.empty() ? std::vector<uint8_t>(4, 1) : p.present);
            DeviceBytes workspace("workspace", mmbal_attribution_reg_workspace_cuda(2, 2));
            const mmbal_attributed all[] = {{g.data(), e.data(), 3, nullptr, nullptr, nullptr, nullptr},
                                            {h.data(), f.data(), 4, nullptr, nullptr, nullptr, nullptr}};
            const mmbal_attribution of = {all, target.data(), 2, present.data(), 2, 2, MMBAL_F32, DEFAULT};
            if (order == P::FORWARD)
                mmbal_attribution_reg_cuda(&of, reg.data(), shares.data(), result.data(), workspace.data(), nullptr);
            else if (order == P::BACKWARD)
                mmbal_attribution_reg_backward_cuda(&of, dreg.data(), nullptr, nullptr, given.data(), workspace.data(),
                                                    nullptr);
            else
                mmbal_attribution_reg_backward_backward_cuda(&of, dreg.data(), nullptr, nullptr, given.data(),
                                                             reg.data(), shares.data(), result.data(), workspace.data(),
                                                             nullptr);
            EXPECT_NE(joined(cuda_shim::take_reports()).find("__trap"), std::string::npos) << way << " " << order;
        }
    }
}

TEST(CudaAttributionErrors, RefuseWhatIsOutsideTheContract) {
    const mmbal_attributed one = {nullptr, nullptr, 3, nullptr, nullptr, nullptr, nullptr};
    const std::vector<mmbal_attributed> many(MMBAL_MAX_MODALITIES + 1, one);
    const mmbal_attribution good = {many.data(), nullptr, 1, nullptr, 0, 2, MMBAL_F32, DEFAULT};
    const auto expect = [&](mmbal_status expected, const std::function<void(mmbal_attribution &)> &change) {
        mmbal_attribution of = good;
        change(of);
        EXPECT_EQ(mmbal_attribution_reg_cuda(&of, nullptr, nullptr, nullptr, nullptr, nullptr), expected);
        EXPECT_EQ(mmbal_attribution_reg_backward_cuda(&of, nullptr, nullptr, nullptr, nullptr, nullptr, nullptr),
                  expected);
        EXPECT_EQ(mmbal_attribution_reg_backward_backward_cuda(&of, nullptr, nullptr, nullptr, nullptr, nullptr,
                                                               nullptr, nullptr, nullptr, nullptr),
                  expected);
    };
    expect(MMBAL_OK, [](auto &) {});
    expect(MMBAL_INVALID_ARGUMENT, [](auto &of) { of.B = -1; });
    expect(MMBAL_INVALID_ARGUMENT, [](auto &of) { of.M = 0; });
    expect(MMBAL_INVALID_ARGUMENT, [](auto &of) { of.M = MMBAL_MAX_MODALITIES + 1; });
    expect(MMBAL_INVALID_ARGUMENT, [](auto &of) { of.target_rows = 2; });
    expect(MMBAL_INVALID_ARGUMENT, [](auto &of) { of.options.eps = 1; });
    expect(MMBAL_INVALID_ARGUMENT, [](auto &of) { of.options.penalty = enum_of<mmbal_attribution_penalty>(3); });
    mmbal_attributed none = one;
    none.d = 0;
    expect(MMBAL_INVALID_ARGUMENT, [&](auto &of) { of.modalities = &none, of.M = 1; });
}

} // namespace
} // namespace mmbal_test
