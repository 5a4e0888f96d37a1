// retrieval*.cu against the C core: the same scores where sums are exact, within rounding elsewhere; the same order.
#include "mmbal/cuda/retrieval.h"

#include <algorithm>

#include "device.h"
#include "helpers.h"

namespace mmbal_test {
namespace {

template <typename T>
class CudaSearch : public ::testing::Test {};
TYPED_TEST_SUITE(CudaSearch, Dtypes, DtypeNames);

template <typename T>
struct Hits {
    std::vector<typename T::Real> scores;
    std::vector<int64_t> indices;
};

template <typename T, typename Query = T>
Hits<T> on_cpu(const std::vector<typename Query::Stored> &query, const std::vector<typename T::Stored> &bank, int64_t Q,
               int64_t n, int64_t D, int64_t k) {
    Hits<T> hits{std::vector<typename T::Real>(Q * k), std::vector<int64_t>(Q * k)};
    std::vector<unsigned char> workspace(mmbal_topk_search_workspace(T::dtype, Q, n, D, k, 1));
    EXPECT_EQ(mmbal_topk_search(Query::dtype, query.data(), T::dtype, bank.data(), Q, n, D, k, hits.scores.data(),
                                hits.indices.data(), workspace.data(), serial()),
              MMBAL_OK);
    return hits;
}

// shift: elements between the beginning of an array and its data.
template <typename T, typename Query = T>
Hits<T> on_device(const std::vector<typename Query::Stored> &query, const std::vector<typename T::Stored> &bank,
                  int64_t Q, int64_t n, int64_t D, int64_t k, int64_t shift = 0) {
    const auto shifted = [&](auto values) {
        values.insert(values.begin(), shift, {});
        return values;
    };
    DeviceArray<typename Query::Stored> d_query("query", shifted(query));
    DeviceArray<typename T::Stored> d_bank("bank", shifted(bank));
    DeviceArray<typename T::Real> scores("scores", Q * k);
    DeviceArray<int64_t> indices("indices", Q * k);
    DeviceBytes workspace("workspace", mmbal_topk_search_workspace_cuda(T::dtype, Q, n, D, k));
    EXPECT_EQ(mmbal_topk_search_cuda(Query::dtype, d_query.data() + shift, T::dtype, d_bank.data() + shift, Q, n, D, k,
                                     scores.data(), indices.data(), workspace.data(), nullptr),
              MMBAL_OK);
    return {scores.values(), indices.values()};
}

// Small whole numbers: every sum is exact, and many are equal.
template <typename T>
std::vector<typename T::Stored> whole_numbers(int64_t count, Random &random) {
    std::vector<typename T::Stored> values(count);
    for (auto &value : values) value = T::store(static_cast<double>(random.below(7) - 3));
    return values;
}

struct Sizes {
    int64_t Q, n, D, k;
};

TYPED_TEST(CudaSearch, ExactSumsAndTiesAreThoseOfTheCore) {
    Random random(1);
    unsigned schedule = 0; // one for each: they take long
    // One list and several, one chunk of the bank and several, few queries and tiles of them, k held and not, runs.
    for (const Sizes &s : std::vector<Sizes>{{0, 5, 3, 2},
                                             {1, 1, 1, 1},
                                             {3, 300, 31, 300},
                                             {1, 9000, 4, 3},
                                             {5, 4500, 2, 40},
                                             {22, 500, 33, 41},
                                             {130, 20, 5, 7},
                                             {1, 1400, 3, 700},
                                             {21, 500, 70, 12}}) {
        SCOPED_TRACE(std::to_string(s.Q) + " in " + std::to_string(s.n) + ", k " + std::to_string(s.k));
        const auto query = whole_numbers<TypeParam>(s.Q * s.D, random),
                   bank = whole_numbers<TypeParam>(s.n * s.D, random);
        const Hits<TypeParam> expected = on_cpu<TypeParam>(query, bank, s.Q, s.n, s.D, s.k);
        under_schedule(schedule++ % SCHEDULES, [&] {
            const Hits<TypeParam> got = on_device<TypeParam>(query, bank, s.Q, s.n, s.D, s.k, s.D % 2);
            EXPECT_EQ(got.indices, expected.indices);
            EXPECT_EQ(got.scores, expected.scores);
        });
    }
}

TYPED_TEST(CudaSearch, RoundedSumsAreNearThoseOfTheCoreAndInOrder) {
    using Stored = typename TypeParam::Stored;
    Random random(2);
    const int64_t Q = 25, n = 400, D = 45, k = 9;
    const auto query = random.tensor<TypeParam>(Q * D, 1), bank = random.tensor<TypeParam>(n * D, 1);
    const Hits<TypeParam> expected = on_cpu<TypeParam>(query, bank, Q, n, D, k);
    const auto got = on_device<TypeParam>(query, bank, Q, n, D, k);
    const double close = 4.0 * D * TypeParam::real_error * D;
    const auto dot = [&](int64_t q, int64_t i) {
        double sum = 0;
        const Stored *a = &query[q * D], *b = &bank[i * D];
        for (int64_t d = 0; d < D; d++) sum += TypeParam::load(a[d]) * TypeParam::load(b[d]);
        return sum;
    };
    for (int64_t i = 0; i < Q * k; i++) {
        EXPECT_NEAR(got.scores[i], expected.scores[i], close) << i;
        EXPECT_NEAR(got.scores[i], dot(i / k, got.indices[i]), close) << i;
        EXPECT_TRUE(i % k == 0 || got.scores[i - 1] >= got.scores[i]) << i;
    }
}

TYPED_TEST(CudaSearch, AScoreDependsOnItsTwoVectorsAlone) {
    Random random(3);
    const int64_t Q = 21, n = 300, D = 50, k = 20;
    const auto query = random.tensor<TypeParam>(Q * D, 1), bank = random.tensor<TypeParam>(n * D, 1);
    const auto all = on_device<TypeParam>(query, bank, Q, n, D, k);
    for (int64_t q : {0, 17, 20}) { // alone they take another kernel
        const std::vector<typename TypeParam::Stored> one(query.begin() + q * D, query.begin() + (q + 1) * D);
        const auto got = on_device<TypeParam>(one, bank, 1, n, D, k);
        EXPECT_TRUE(std::equal(got.scores.begin(), got.scores.end(), all.scores.begin() + q * k));
        EXPECT_TRUE(std::equal(got.indices.begin(), got.indices.end(), all.indices.begin() + q * k));
    }
}

TYPED_TEST(CudaSearch, NanComesLastAndInfinitiesWhereTheyBelong) {
    const double inf = INFINITY, nan = NAN;
    std::vector<typename TypeParam::Stored> bank;
    for (double v : {nan, -inf, 1.0, nan, inf, -2.0}) bank.push_back(TypeParam::store(v));
    const std::vector<typename TypeParam::Stored> one = {TypeParam::store(1)}, none = {TypeParam::store(nan)};
    EXPECT_EQ(on_device<TypeParam>(one, bank, 1, 6, 1, 6).indices, (std::vector<int64_t>{4, 2, 5, 1, 0, 3}));
    EXPECT_EQ(on_device<TypeParam>(one, bank, 1, 6, 1, 2).indices, (std::vector<int64_t>{4, 2}));
    const auto lost = on_device<TypeParam>(none, bank, 1, 6, 1, 4);
    EXPECT_EQ(lost.indices, (std::vector<int64_t>{0, 1, 2, 3}));
    for (auto s : lost.scores) EXPECT_TRUE(std::isnan(s));
}

TEST(CudaSearchHalves, TakeFloat32Queries) {
    Random random(4);
    for (const int64_t Q : {5, 21}) {
        const auto query = random.tensor<F32>(Q * 40, 1);
        const auto bank = random.tensor<BF16>(90 * 40, 1);
        const auto halves = random.tensor<F16>(90 * 40, 1);
        std::vector<float> wide, wide_halves;
        for (auto b : bank) wide.push_back(static_cast<float>(BF16::load(b)));
        for (auto h : halves) wide_halves.push_back(static_cast<float>(F16::load(h)));
        for_each_schedule([&] {
            const auto got = on_device<BF16, F32>(query, bank, Q, 90, 40, 7);
            const auto expected = on_device<F32>(query, wide, Q, 90, 40, 7);
            EXPECT_TRUE(same_bits(got.scores, expected.scores));
            EXPECT_EQ(got.indices, expected.indices);
            const auto of_halves = on_device<F16, F32>(query, halves, Q, 90, 40, 7);
            const auto of_wide = on_device<F32>(query, wide_halves, Q, 90, 40, 7);
            EXPECT_TRUE(same_bits(of_halves.scores, of_wide.scores));
            EXPECT_EQ(of_halves.indices, of_wide.indices);
        });
    }
}

TEST(CudaSearchArguments, WrongOnesAreRefused) {
    const auto status = [](mmbal_dtype query, mmbal_dtype bank, Sizes s) {
        return mmbal_topk_search_cuda(query, nullptr, bank, nullptr, s.Q, s.n, s.D, s.k, nullptr, nullptr, nullptr,
                                      nullptr);
    };
    for (const Sizes &s : std::vector<Sizes>{{-1, 3, 4, 1}, {2, 3, 0, 1}, {2, 3, 4, 0}, {2, 3, 4, 4}}) {
        EXPECT_EQ(mmbal_topk_search_workspace_cuda(MMBAL_F64, s.Q, s.n, s.D, s.k), 0);
        for (mmbal_dtype dtype : {MMBAL_F32, MMBAL_BF16, MMBAL_F16, MMBAL_F64})
            EXPECT_EQ(status(dtype, dtype, s), MMBAL_INVALID_ARGUMENT);
    }
    EXPECT_EQ(status(MMBAL_F32, MMBAL_F64, {1, 1, 1, 1}), MMBAL_UNSUPPORTED);
    EXPECT_EQ(status(MMBAL_BF16, MMBAL_F32, {1, 1, 1, 1}), MMBAL_UNSUPPORTED);
    EXPECT_EQ(status(MMBAL_F16, MMBAL_BF16, {1, 1, 1, 1}), MMBAL_UNSUPPORTED);
    const auto none = enum_of<mmbal_dtype>(7);
    EXPECT_EQ(status(none, none, {1, 1, 1, 1}), MMBAL_UNSUPPORTED);
    EXPECT_EQ(mmbal_topk_search_workspace_cuda(none, 1, 1, 1, 1), 0);
}

struct Recall {
    std::vector<int64_t> indices, positives, offsets;
    int64_t K;
    int64_t Q() const { return static_cast<int64_t>(offsets.size()) - 1; }
    int64_t P() const { return static_cast<int64_t>(positives.size()); }
};

mmbal_status recall_on_device(const Recall &of, const std::vector<int64_t> &ks, std::vector<double> *values) {
    DeviceArray<int64_t> indices("indices", of.indices), positives("positives", of.positives),
        offsets("offsets", of.offsets);
    DeviceArray<double> recall("recall", static_cast<int64_t>(ks.size()));
    DeviceBytes workspace("workspace", mmbal_recall_at_k_workspace_cuda(of.Q()));
    const mmbal_status status =
        mmbal_recall_at_k_cuda(indices.data(), positives.data(), offsets.data(), ks.data(), of.Q(), of.K, of.P(),
                               static_cast<int64_t>(ks.size()), recall.data(), workspace.data(), nullptr);
    if (values) *values = recall.values();
    return status;
}

TEST(CudaRecall, IsThatOfTheCore) {
    Random random(5);
    for (const int64_t Q : {0, 1, 40, 1100}) {
        Recall of = {std::vector<int64_t>(Q * 5), {}, {0}, 5};
        for (auto &i : of.indices) i = random.below(31) - 1;
        for (int64_t q = 0; q < Q; q++) {
            for (int64_t p = q == 7 ? 70 : random.below(4); p > 0; p--) of.positives.push_back(random.below(30));
            of.offsets.push_back(of.P());
        }
        std::vector<int64_t> ks = {1, 3, 5};
        for (int64_t i = 0; i < 127 && Q == 1; i++) ks.push_back(1 + i % 5); // more than a launch takes
        std::vector<double> expected(ks.size()), got;
        std::vector<unsigned char> workspace(mmbal_recall_at_k_workspace(Q));
        ASSERT_EQ(mmbal_recall_at_k(of.indices.data(), of.positives.data(), of.offsets.data(), ks.data(), Q, of.K,
                                    of.P(), static_cast<int64_t>(ks.size()), expected.data(), workspace.data(),
                                    serial()),
                  MMBAL_OK);
        for_each_schedule([&] {
            ASSERT_EQ(recall_on_device(of, ks, &got), MMBAL_OK);
            for (size_t i = 0; i < ks.size(); i++)
                EXPECT_TRUE(got[i] == expected[i] || (std::isnan(got[i]) && std::isnan(expected[i]))) << i;
        });
    }
}

TEST(CudaRecall, WrongOffsetsAndPositivesFailTheLaunch) {
    for (const Recall &wrong : std::vector<Recall>{{{1, 2}, {1}, {0, 2}, 2},
                                                   {{1, 2}, {1}, {1, 1}, 2},
                                                   {{1, 2}, {1, 1}, {0, 1}, 2},
                                                   {{1, 2, 3, 4}, {1}, {0, 2, 1}, 2},
                                                   {{1, 2}, {-1}, {0, 1}, 2}}) {
        cuda_shim::take_reports();
        EXPECT_EQ(recall_on_device(wrong, {1}, nullptr), MMBAL_OK);
        EXPECT_NE(joined(cuda_shim::take_reports()).find("__trap"), std::string::npos);
    }
    EXPECT_EQ(recall_on_device({{1, 2}, {1}, {0, 1}, 2}, {0}, nullptr), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(recall_on_device({{1, 2}, {1}, {0, 1}, 2}, {3}, nullptr), MMBAL_INVALID_ARGUMENT);
}

} // namespace
} // namespace mmbal_test
