#include "mmbal/retrieval.h"

#include <algorithm>

#include "helpers.h"

namespace {

using namespace mmbal_test;

constexpr double INF = std::numeric_limits<double>::infinity();
constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();

template <typename T>
struct Found {
    mmbal_status status;
    std::vector<typename T::Real> scores;
    std::vector<int64_t> indices;
    bool intact, untouched;
};

template <typename T, typename Query = T>
Found<T> search(const std::vector<typename Query::Stored> &query, const std::vector<typename T::Stored> &bank,
                int64_t Q, int64_t n, int64_t D, int64_t k, const mmbal_pool &pool = mmbal_pool_serial()) {
    const int64_t room = std::max<int64_t>(Q * k, 0);
    Guarded<typename T::Real> scores(room);
    Guarded<int64_t> indices(room);
    Guarded<unsigned char> workspace(mmbal_topk_search_workspace(T::dtype, Q, n, D, k, pool.workers));
    const mmbal_status status = mmbal_topk_search(Query::dtype, query.data(), T::dtype, bank.data(), Q, n, D, k,
                                                  scores.data(), indices.data(), workspace.data(), &pool);
    return {status, scores.values(), indices.values(), scores.intact() && indices.intact() && workspace.intact(),
            scores.untouched() && indices.untouched()};
}

template <typename T>
std::vector<typename T::Stored> whole_numbers(int64_t count, Random &random) {
    std::vector<typename T::Stored> values(count);
    for (auto &value : values) value = T::store(static_cast<double>(random.below(7) - 3));
    return values;
}

// Whole numbers, so that every sum is exact.
template <typename T>
void expect_sorted(int64_t Q, int64_t n, int64_t D, int64_t k, Random &random) {
    const auto query = whole_numbers<T>(Q * D, random), bank = whole_numbers<T>(n * D, random);
    const Found<T> got = search<T>(query, bank, Q, n, D, k);
    ASSERT_EQ(got.status, MMBAL_OK);
    ASSERT_TRUE(got.intact);
    for (int64_t q = 0; q < Q; q++) {
        std::vector<double> scores(n);
        std::vector<int64_t> order(n);
        for (int64_t i = 0; i < n; i++) {
            order[i] = i;
            for (int64_t d = 0; d < D; d++) scores[i] += T::load(query[q * D + d]) * T::load(bank[i * D + d]);
        }
        std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
        for (int64_t i = 0; i < k; i++) {
            ASSERT_EQ(got.indices[q * k + i], order[i]) << "query " << q << ", place " << i;
            ASSERT_EQ(static_cast<double>(got.scores[q * k + i]), scores[order[i]]);
        }
    }
}

template <typename T>
class Search : public ::testing::Test {};
TYPED_TEST_SUITE(Search, Dtypes, DtypeNames);

TYPED_TEST(Search, FindsWhatAStableSortFinds) {
    Random random(1);
    for (int round = 0; round < 40; round++) {
        const int64_t Q = random.pick<int64_t>({0, 1, 3, 33, 110}), n = random.pick<int64_t>({1, 2, 17, 279, 700});
        const int64_t k = 1 + random.below(round % 4 ? std::min<int64_t>(n, 12) : n);
        expect_sorted<TypeParam>(Q, n, random.pick<int64_t>({1, 4, 31, 70}), k, random);
    }
    expect_sorted<TypeParam>(1030, 40, 2, 3, random);
    expect_sorted<TypeParam>(2, 300, 1100, 5, random);
}

TYPED_TEST(Search, IsBitwiseTheSameInEveryPool) {
    Random random(2);
    const int64_t Q = 40, n = 1500, D = 37;
    const auto query = random.tensor<TypeParam>(Q * D, 1);
    auto bank = random.tensor<TypeParam>(n * D, 1);
    std::copy_n(bank.begin(), n * D / 2, bank.begin() + n * D / 2); // every row twice
    for (int64_t k : {1, 9, 400}) {
        const Found<TypeParam> expected = search<TypeParam>(query, bank, Q, n, D, k);
        for_each_pool([&](const std::string &name, const mmbal_pool &pool) {
            const Found<TypeParam> got = search<TypeParam>(query, bank, Q, n, D, k, pool);
            EXPECT_TRUE(same_bits(got.scores, expected.scores)) << name;
            EXPECT_EQ(got.indices, expected.indices) << name;
        });
    }
}

TYPED_TEST(Search, NanComesLastAndInfinitiesWhereTheyBelong) {
    const std::vector<double> values = {NOT_A_NUMBER, -INF, 1, NOT_A_NUMBER, INF, -2};
    std::vector<typename TypeParam::Stored> bank;
    for (double v : values) bank.push_back(TypeParam::store(v));
    const std::vector<typename TypeParam::Stored> one = {TypeParam::store(1)}, none = {TypeParam::store(NOT_A_NUMBER)};
    EXPECT_EQ(search<TypeParam>(one, bank, 1, 6, 1, 6).indices, (std::vector<int64_t>{4, 2, 5, 1, 0, 3}));
    EXPECT_EQ(search<TypeParam>(one, bank, 1, 6, 1, 2).indices, (std::vector<int64_t>{4, 2}));
    const Found<TypeParam> lost = search<TypeParam>(none, bank, 1, 6, 1, 4);
    EXPECT_EQ(lost.indices, (std::vector<int64_t>{0, 1, 2, 3}));
    for (auto s : lost.scores) EXPECT_TRUE(std::isnan(s));
}

TEST(SearchHalves, TakeFloat32Queries) {
    Random random(3);
    const auto query = random.tensor<F32>(5 * 40, 1);
    const auto bank = random.tensor<BF16>(90 * 40, 1);
    std::vector<float> wide;
    for (auto b : bank) wide.push_back(static_cast<float>(BF16::load(b)));
    const auto got = search<BF16, F32>(query, bank, 5, 90, 40, 7);
    const auto expected = search<F32>(query, wide, 5, 90, 40, 7);
    EXPECT_TRUE(same_bits(got.scores, expected.scores));
    EXPECT_EQ(got.indices, expected.indices);
}

TEST(SearchArguments, WrongOnesAreRefusedBeforeAnythingIsWritten) {
    const std::vector<double> query(8), bank(12);
    const auto refused = [&](int64_t Q, int64_t n, int64_t D, int64_t k) {
        const Found<F64> got = search<F64>(query, bank, Q, n, D, k);
        EXPECT_EQ(got.status, MMBAL_INVALID_ARGUMENT);
        EXPECT_TRUE(got.untouched);
        EXPECT_EQ(mmbal_topk_search_workspace(MMBAL_F64, Q, n, D, k, 1), 0);
    };
    refused(-1, 3, 4, 1), refused(2, 3, 0, 1), refused(2, 3, 4, 0), refused(2, 3, 4, 4);
    double score;
    int64_t index;
    const mmbal_pool pool = mmbal_pool_serial();
    const auto status = [&](mmbal_dtype of_query, mmbal_dtype of_bank) {
        return mmbal_topk_search(of_query, query.data(), of_bank, bank.data(), 1, 1, 1, 1, &score, &index, nullptr,
                                 &pool);
    };
    EXPECT_EQ(status(MMBAL_F32, MMBAL_F64), MMBAL_UNSUPPORTED);
    EXPECT_EQ(status(MMBAL_BF16, MMBAL_F32), MMBAL_UNSUPPORTED);
    EXPECT_EQ(status(MMBAL_F16, MMBAL_BF16), MMBAL_UNSUPPORTED);
    EXPECT_EQ(status(enum_of<mmbal_dtype>(7), enum_of<mmbal_dtype>(7)), MMBAL_UNSUPPORTED);
}

std::vector<double> recall(const std::vector<int64_t> &indices, const std::vector<int64_t> &positives,
                           const std::vector<int64_t> &offsets, const std::vector<int64_t> &ks, int64_t K,
                           mmbal_status expected = MMBAL_OK, const mmbal_pool &pool = mmbal_pool_serial()) {
    const auto Q = static_cast<int64_t>(offsets.size()) - 1;
    Guarded<double> values(static_cast<int64_t>(ks.size()));
    Guarded<unsigned char> workspace(mmbal_recall_at_k_workspace(Q));
    EXPECT_EQ(mmbal_recall_at_k(indices.data(), positives.data(), offsets.data(), ks.data(), Q, K,
                                static_cast<int64_t>(positives.size()), static_cast<int64_t>(ks.size()), values.data(),
                                workspace.data(), &pool),
              expected);
    EXPECT_TRUE(values.intact() && workspace.intact());
    EXPECT_TRUE(expected == MMBAL_OK || values.untouched());
    return values.values();
}

TEST(Recall, CountsQueriesWithAnyPositiveAmongTheFirst) {
    const std::vector<int64_t> indices = {1, 2, 3, 4, 5, 6, 7, 8, 9};
    EXPECT_EQ(recall(indices, {3, 9, 4}, {0, 2, 3, 3}, {1, 2, 3}, 3), (std::vector<double>{0.5, 0.5, 1}));
    EXPECT_EQ(recall(indices, {8}, {0, 0, 0, 1}, {3, 1}, 3), (std::vector<double>{1, 0}));
    EXPECT_TRUE(std::isnan(recall(indices, {}, {0, 0, 0, 0}, {1}, 3)[0]));
    EXPECT_TRUE(std::isnan(recall({}, {}, {0}, {2}, 3)[0]));
}

TEST(Recall, IsTheSameInEveryPool) {
    Random random(4);
    std::vector<int64_t> indices(700 * 5), positives, offsets = {0};
    for (auto &i : indices) i = random.below(30);
    for (int q = 0; q < 700; q++) {
        for (int64_t p = random.below(4); p > 0; p--) positives.push_back(random.below(30));
        offsets.push_back(static_cast<int64_t>(positives.size()));
    }
    const auto expected = recall(indices, positives, offsets, {1, 3, 5}, 5);
    for_each_pool([&](const std::string &name, const mmbal_pool &pool) {
        EXPECT_EQ(recall(indices, positives, offsets, {1, 3, 5}, 5, MMBAL_OK, pool), expected) << name;
    });
}

TEST(Recall, WrongArgumentsAreRefused) {
    recall({1, 2}, {1}, {0, 1}, {0}, 2, MMBAL_INVALID_ARGUMENT);
    recall({1, 2}, {1}, {0, 1}, {3}, 2, MMBAL_INVALID_ARGUMENT);
    recall({1, 2}, {1}, {0, 2}, {1}, 2, MMBAL_INVALID_INDEX);
    recall({1, 2}, {1}, {1, 1}, {1}, 2, MMBAL_INVALID_INDEX);
    recall({1, 2, 3, 4}, {1}, {0, 2, 1}, {1}, 2, MMBAL_INVALID_INDEX);
    recall({1, 2}, {-1}, {0, 1}, {1}, 2, MMBAL_INVALID_INDEX);
}

} // namespace
