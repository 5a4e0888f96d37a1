// attribution_linear.cu against the formulas, within what rounding moves them.
#include "attribution_linear_reference.h"
#include "device.h"
#include "mmbal/cuda/attribution.h"

namespace mmbal_test {
namespace {

// Arrays behind one another in one, each from a multiple of 16 bytes and `shift` elements on.
template <typename T>
class Arrays {
public:
    Arrays(const char *name, const std::vector<int64_t> &sizes, int64_t shift) : sizes_(sizes) {
        constexpr int64_t LINE = 16 / sizeof(T);
        int64_t end = 0;
        for (int64_t size : sizes) first_.push_back(end + shift), end += (size + shift + LINE) / LINE * LINE;
        array_ = std::make_unique<DeviceArray<T>>(name, end);
    }
    Arrays(const char *name, const std::vector<std::vector<T>> &values, int64_t shift)
        : Arrays(name, sizes_of(values), shift) {
        for (size_t i = 0; i < values.size(); i++) {
            if (!values[i].empty())
                std::memcpy(static_cast<void *>(at(i)), values[i].data(), values[i].size() * sizeof(T));
            cuda_shim::mark_written(at(i), values[i].size() * sizeof(T));
        }
    }
    T *at(size_t i) { return array_->data() + first_[i]; }
    // What kernels wrote there; one that they left is a failure.
    std::vector<T> values(size_t i) {
        EXPECT_TRUE(cuda_shim::all_written(at(i), sizes_[i] * sizeof(T)) || !cuda_shim::checks_accesses());
        return std::vector<T>(at(i), at(i) + sizes_[i]);
    }

private:
    static std::vector<int64_t> sizes_of(const std::vector<std::vector<T>> &values) {
        std::vector<int64_t> sizes;
        for (const auto &each : values) sizes.push_back(static_cast<int64_t>(each.size()));
        return sizes;
    }
    std::vector<int64_t> sizes_, first_;
    std::unique_ptr<DeviceArray<T>> array_;
};

struct Call {
    bool side_by_side = false; // W of all modalities is one matrix
    int64_t shift = 0;
    bool fails = false; // nothing is read then
};

template <typename T>
typename Linear<T>::Outputs run(const Linear<T> &p, const Call &call = {}) {
    using Stored = typename T::Stored;
    using Real = typename T::Real;
    const int64_t B = p.B, C = p.C, M = p.M();
    const int64_t width = std::accumulate(p.d.begin(), p.d.end(), int64_t{0});
    auto all_weights = p.W;
    if (call.side_by_side) {
        all_weights = {std::vector<Stored>(C * width)};
        for (int64_t m = 0, from = 0; m < M; from += p.d[m++])
            for (int64_t c = 0; c < C; c++)
                std::copy_n(p.W[m].begin() + c * p.d[m], p.d[m], all_weights[0].begin() + c * width + from);
    }
    std::vector<int64_t> sizes;
    for (const auto &each : all_weights) sizes.push_back(static_cast<int64_t>(each.size()));
    Arrays<Stored> embeddings("embeddings", p.e, call.shift), W("weights", all_weights, call.shift);
    Arrays<Stored> dW("dweights", sizes, call.shift);
    DeviceArray<Stored> logits("logits", p.logits), db("dbias", C);
    DeviceArray<int64_t> classes("classes", p.classes);
    DeviceArray<double> target("target", p.target);
    DeviceArray<uint8_t> present("present", p.present);
    DeviceArray<Real> dreg("dreg", p.dreg), reg("reg", B), shares("shares", B * M), magnitudes("magnitudes", B * M);
    std::vector<mmbal_attributed> all;
    std::vector<const void *> weights;
    std::vector<void *> dweights;
    for (int64_t m = 0, from = 0; m < M; from += p.d[m++]) {
        all.push_back({nullptr, embeddings.at(m), p.d[m], nullptr, nullptr, nullptr, nullptr});
        weights.push_back(call.side_by_side ? W.at(0) + from : W.at(m));
        dweights.push_back(call.side_by_side ? dW.at(0) + from : dW.at(m));
    }
    const mmbal_attribution of = {
        all.data(), target.data(), p.way.one_target ? 1 : B, p.present.empty() ? nullptr : present.data(), B, M,
        T::dtype,   p.way.options};
    const mmbal_linear_head head = {
        weights.data(), call.side_by_side ? width : 0, logits.data(), p.classes.empty() ? nullptr : classes.data(), C,
        p.way.score};
    DeviceBytes workspace("workspace", mmbal_attribution_linear_workspace_cuda(&of, &head, dweights.data()));
    typename Linear<T>::Outputs out = {MMBAL_OK, {}, {}, {}, {}, {}};
    out.status = mmbal_attribution_linear_cuda(&of, &head, dreg.data(), reg.data(), shares.data(), magnitudes.data(),
                                               dweights.data(), db.data(), workspace.data(), nullptr);
    if (call.fails) return out;
    out.reg = reg.values(), out.shares = shares.values(), out.magnitudes = magnitudes.values(), out.db = db.values();
    if (!call.side_by_side) {
        for (int64_t m = 0; m < M; m++) out.dW.push_back(dW.values(m));
        return out;
    }
    const auto joined = dW.values(0);
    for (int64_t m = 0, from = 0; m < M; from += p.d[m++]) {
        out.dW.emplace_back();
        for (int64_t c = 0; c < C; c++)
            out.dW.back().insert(out.dW.back().end(), joined.begin() + c * width + from,
                                 joined.begin() + c * width + from + p.d[m]);
    }
    return out;
}

// Weights apart and side by side, at multiples of 16 bytes and between them, under two schedules: the same bits in all.
template <typename T>
void check(const Linear<T> &p) {
    typename Linear<T>::Outputs first = {MMBAL_OK, {}, {}, {}, {}, {}};
    under_next_schedule([&] {
        first = run(p);
        ASSERT_NO_FATAL_FAILURE(follows_formulas(p, first));
    });
    for (const Call &call : {Call{true, 0}, Call{false, 1}, Call{true, 1}}) EXPECT_TRUE(run(p, call).same_as(first));
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
}

template <typename T>
class CudaAttributionLinear : public ::testing::Test {};
TYPED_TEST_SUITE(CudaAttributionLinear, Dtypes, DtypeNames);

TYPED_TEST(CudaAttributionLinear, FollowsItsFormulas) {
    struct Shape {
        int64_t B, C;
        std::vector<int64_t> d;
    };
    const std::vector<Shape> shapes = {{0, 3, {4, 5}},   {1, 1, {3, 4}},   {5, 1, {7, 8}},       {6, 2, {5, 1, 9}},
                                       {2, 4, {5}},      {9, 10, {33, 6}}, {4, 101, {5, 7}},     {70, 5, {3, 20}},
                                       {1, 6, {70, 20}}, {8, 8, {16, 8}},  {3, 17, {64, 65, 31}}};
    uint64_t seed = 0;
    for (const Shape &shape : shapes)
        for (mmbal_score score : {MMBAL_SCORE_ODDS, MMBAL_SCORE_LOGIT}) {
            const auto options = all_options()[seed % 6];
            const Way way = {options, score, seed % 3 == 1, seed % 2 == 1, seed % 3 == 2};
            SCOPED_TRACE(std::to_string(shape.B) + " x " + std::to_string(shape.C) + " score " + std::to_string(score) +
                         " " + words(options));
            ASSERT_NO_FATAL_FAILURE(check(Linear<TypeParam>(shape.B, shape.C, shape.d, way, ++seed)));
        }
}

TYPED_TEST(CudaAttributionLinear, FollowsItsFormulasForEveryPoolAndPenalty) {
    for (double eps : {1e-12, 0.3})
        for (const auto &options : all_options(eps))
            ASSERT_NO_FATAL_FAILURE(check(Linear<TypeParam>(6, 4, {9, 12, 6}, {options, MMBAL_SCORE_ODDS, true}, 3)))
                << words(options);
}

TYPED_TEST(CudaAttributionLinear, NeverSaturates) {
    for (double margin : {20, 120, 1000})
        for (int64_t C : {1, 2, 10})
            ASSERT_NO_FATAL_FAILURE(check(Linear<TypeParam>(7, C, {20, 9}, {}, 5, margin))) << margin << " " << C;
}

TYPED_TEST(CudaAttributionLinear, OfEqualLogitsTakesTheFirst) {
    for (int64_t C : {3, 40, 300}) {
        Linear<TypeParam> p(3, C, {20, 9}, {}, 7);
        const int64_t first[] = {0, C / 2, 0}, second[] = {C - 1, C - 1, 1};
        for (int64_t row = 0; row < 3; row++)
            p.logits[row * C + first[row]] = p.logits[row * C + second[row]] = TypeParam::store(3.5);
        auto given = p;
        given.classes.assign(first, first + 3);
        EXPECT_TRUE(run(p).same_as(run(given))) << C;
        given.classes.assign(second, second + 3);
        EXPECT_FALSE(run(p).same_as(run(given))) << C;
        EXPECT_EQ(joined(cuda_shim::take_reports()), "");
    }
}

// Which class is the largest where some are no numbers is what a loop from the first finds.
TYPED_TEST(CudaAttributionLinear, OfLogitsThatAreNoNumbersAnswersAsTheCore) {
    const double nan = NAN, infinite = INFINITY;
    const std::vector<std::vector<double>> rows = {{nan, 1, 2, 3},
                                                   {1, nan, 3, 2},
                                                   {nan, nan, nan, nan},
                                                   {1, -infinite, -infinite, -infinite},
                                                   {infinite, 1, 2, 3}};
    Linear<TypeParam> p(5, 4, {6, 5}, {}, 3);
    for (size_t row = 0; row < rows.size(); row++)
        for (size_t c = 0; c < 4; c++) p.logits[row * 4 + c] = TypeParam::store(rows[row][c]);
    const auto expected = p.run(), got = run(p);
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
    for (size_t row = 0; row < rows.size(); row++)
        for (int m = 0; m < 2; m++) {
            const double e = expected.shares[row * 2 + m], g = got.shares[row * 2 + m];
            EXPECT_TRUE(std::isnan(e) ? std::isnan(g) : std::fabs(e - g) < 1e-5) << row << ": " << g << ", not " << e;
        }
}

TYPED_TEST(CudaAttributionLinear, TakesAsManyModalitiesAsThereMayBe) {
    std::vector<int64_t> d(MMBAL_MAX_MODALITIES);
    for (size_t m = 0; m < d.size(); m++) d[m] = 1 + static_cast<int64_t>(m) % 3;
    const Linear<TypeParam> p(1, 3, d, {{MMBAL_POOL_L2, MMBAL_SQUARED, 1e-12}}, 2);
    ASSERT_NO_FATAL_FAILURE(follows_formulas(p, run(p)));
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
}

// Large tiles: a result of 128 of them.
TEST(CudaAttributionLinearTiles, GiveTheSameSumsInAnySize) {
    const int64_t B = 1, C = 900;
    const Linear<F32> p(B, C, {1000, 925}, {{MMBAL_POOL_L2, MMBAL_SQUARED, 1e-12}, MMBAL_SCORE_LOGIT}, 2);
    const auto expected = p.run();
    cuda_shim::options = {1, 0x3C};
    const auto got = run(p, {true, 0});
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
    cuda_shim::options = {};
    for (int m = 0; m < 2; m++)
        for (size_t i = 0; i < got.dW[m].size(); i++)
            ASSERT_NEAR(got.dW[m][i], expected.dW[m][i], 1e-5 * std::fabs(expected.dW[m][i]) + 1e-9) << i;
}

TEST(CudaAttributionLinearErrors, AClassThatIsNoneFailsTheLaunch) {
    for (int64_t bad : {-1, 4}) {
        Linear<F32> p(3, 4, {4, 5});
        p.classes = {0, 3, bad};
        cuda_shim::take_reports();
        run(p, {false, 0, true});
        EXPECT_NE(joined(cuda_shim::take_reports()).find("__trap"), std::string::npos) << bad;
    }
}

TEST(CudaAttributionLinearErrors, RefuseWhatIsOutsideTheContract) {
    const mmbal_attributed two[] = {{nullptr, nullptr, 4, nullptr, nullptr, nullptr, nullptr},
                                    {nullptr, nullptr, 5, nullptr, nullptr, nullptr, nullptr}};
    const void *weights[] = {nullptr, nullptr};
    void *dweights[] = {nullptr, nullptr};
    const auto expect = [&](mmbal_status expected,
                            const std::function<void(mmbal_attribution &, mmbal_linear_head &)> &change) {
        mmbal_attribution of = {two, nullptr, 1, nullptr, 3, 2, MMBAL_F32, DEFAULT};
        mmbal_linear_head head = {weights, 0, nullptr, nullptr, 4, MMBAL_SCORE_ODDS};
        change(of, head);
        EXPECT_EQ(mmbal_attribution_linear_cuda(&of, &head, nullptr, nullptr, nullptr, nullptr, dweights, nullptr,
                                                nullptr, nullptr),
                  expected);
    };
    expect(MMBAL_INVALID_ARGUMENT, [](auto &, auto &head) { head.C = 0; });
    expect(MMBAL_INVALID_ARGUMENT, [](auto &, auto &head) { head.row_stride = 4; });
    expect(MMBAL_INVALID_ARGUMENT, [](auto &of, auto &) { of.B = -1; });
    expect(MMBAL_INVALID_ARGUMENT, [](auto &of, auto &) { of.M = MMBAL_MAX_MODALITIES + 1; });
}

} // namespace
} // namespace mmbal_test
