#include "mmbal/routing.h"

#include <algorithm>
#include <type_traits>
#include <utility>

#include "helpers.h"

namespace {

using namespace mmbal_test;

constexpr double INF = std::numeric_limits<double>::infinity();
constexpr double NOT_A_NUMBER = std::numeric_limits<double>::quiet_NaN();

template <typename T>
struct Routed {
    mmbal_status status;
    std::vector<typename T::Real> weights;
    std::vector<int64_t> indices;
    bool intact, untouched;
};

template <typename T>
Routed<T> topk(const std::vector<typename T::Stored> &logits, const std::vector<typename T::Real> *bias, int64_t N,
               int64_t E, int64_t K, int normalize, const mmbal_pool &pool = mmbal_pool_serial()) {
    const int64_t room = std::max<int64_t>(N * K, 0);
    Guarded<typename T::Real> weights(room);
    Guarded<int64_t> indices(room);
    const mmbal_status status = mmbal_moe_topk(T::dtype, logits.data(), bias ? bias->data() : nullptr, N, E, K,
                                               normalize, weights.data(), indices.data(), &pool);
    return {status, weights.values(), indices.values(), weights.intact() && indices.intact(),
            weights.untouched() && indices.untouched()};
}

// The K largest scores of a row by a stable sort: ties stay in the order of the experts.
template <typename Real>
std::vector<int64_t> sorted_choice(const std::vector<Real> &scores, int64_t K) {
    std::vector<int64_t> order(scores.size());
    for (size_t e = 0; e < order.size(); e++) order[e] = static_cast<int64_t>(e);
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return scores[a] > scores[b]; });
    order.resize(K);
    return order;
}

template <typename T>
std::vector<double> row_of(const std::vector<typename T::Stored> &logits, int64_t n, int64_t E) {
    std::vector<double> row;
    for (int64_t e = 0; e < E; e++) row.push_back(T::load(logits[n * E + e]));
    return row;
}

// The weights of a row by the header's formula, in double.
std::vector<double> plain_weights(const std::vector<double> &logits, const std::vector<int64_t> &chosen,
                                  int normalize) {
    std::vector<double> kept;
    for (int64_t e : chosen) kept.push_back(logits[e]);
    if (normalize) return Softmax(kept).p;
    const std::vector<double> p = Softmax(logits).p;
    for (size_t k = 0; k < kept.size(); k++) kept[k] = p[chosen[k]];
    return kept;
}

template <typename T>
double weight_error() {
    return T::dtype == MMBAL_F64 ? 1e-13 : 1e-5;
}

template <typename T>
void expect_topk(const std::vector<typename T::Stored> &logits, const std::vector<typename T::Real> *bias, int64_t N,
                 int64_t E, int64_t K, int normalize) {
    const Routed<T> got = topk<T>(logits, bias, N, E, K, normalize);
    ASSERT_EQ(got.status, MMBAL_OK);
    ASSERT_TRUE(got.intact);
    for (int64_t n = 0; n < N; n++) {
        const std::vector<double> row = row_of<T>(logits, n, E);
        std::vector<typename T::Real> scores;
        for (int64_t e = 0; e < E; e++)
            scores.push_back(static_cast<typename T::Real>(row[e]) + (bias ? (*bias)[e] : 0));
        const std::vector<int64_t> chosen = sorted_choice(scores, K);
        const std::vector<double> weights = plain_weights(row, chosen, normalize);
        for (int64_t k = 0; k < K; k++) {
            ASSERT_EQ(got.indices[n * K + k], chosen[k]) << "token " << n << ", choice " << k;
            ASSERT_NEAR(got.weights[n * K + k], weights[k], weight_error<T>() * weights[k]) << n << ", " << k;
        }
    }
}

template <typename T>
class Topk : public ::testing::Test {};
TYPED_TEST_SUITE(Topk, Dtypes, DtypeNames);

TYPED_TEST(Topk, ChoosesAndWeighsLikeAStableSortAndASoftmax) {
    Random random(1);
    for (int round = 0; round < 60; round++) {
        const int64_t N = random.pick<int64_t>({1, 2, 7, 33}), E = random.pick<int64_t>({1, 2, 3, 4, 8, 17, 64, 200});
        const int64_t K = 1 + random.below(std::min<int64_t>(E, 9));
        const auto logits = random.tensor<TypeParam>(N * E, 8);
        std::vector<typename TypeParam::Real> bias(E);
        for (auto &b : bias) b = static_cast<typename TypeParam::Real>(random.uniform(-4, 4));
        for (int normalize : {0, 1}) {
            expect_topk<TypeParam>(logits, nullptr, N, E, K, normalize);
            expect_topk<TypeParam>(logits, &bias, N, E, K, normalize);
        }
    }
}

TYPED_TEST(Topk, OneChoiceAndAllChoices) {
    Random random(2);
    for (int64_t E : {1, 2, 5, 64}) {
        const auto logits = random.tensor<TypeParam>(20 * E, 8);
        for (int64_t K : {int64_t{1}, E})
            for (int normalize : {0, 1}) expect_topk<TypeParam>(logits, nullptr, 20, E, K, normalize);
    }
}

TYPED_TEST(Topk, OneNormalizedChoiceWeighsExactlyOne) {
    Random random(3);
    const auto got = topk<TypeParam>(random.tensor<TypeParam>(50 * 6, 30), nullptr, 50, 6, 1, 1);
    for (auto w : got.weights) ASSERT_EQ(w, 1);
}

TYPED_TEST(Topk, FourThousandExperts) {
    Random random(4);
    const int64_t E = 4096;
    const auto logits = random.tensor<TypeParam>(2 * E, 8);
    expect_topk<TypeParam>(logits, nullptr, 2, E, 2, 1);
    expect_topk<TypeParam>(logits, nullptr, 2, E, 300, 0);
    expect_topk<TypeParam>({logits.begin(), logits.begin() + E}, nullptr, 1, E, E, 0);
}

TYPED_TEST(Topk, TiesGoToTheLowerExpert) {
    Random random(5);
    for (int round = 0; round < 40; round++) {
        const int64_t N = 5, E = 12, K = 1 + random.below(E);
        std::vector<typename TypeParam::Stored> logits(N * E);
        for (auto &z : logits) z = TypeParam::store(static_cast<double>(random.below(3)));
        expect_topk<TypeParam>(logits, nullptr, N, E, K, 1);
    }
    const std::vector<typename TypeParam::Stored> equal(4, TypeParam::store(1.5));
    EXPECT_EQ(topk<TypeParam>(equal, nullptr, 1, 4, 3, 1).indices, (std::vector<int64_t>{0, 1, 2}));
}

TYPED_TEST(Topk, MinusZeroAndZeroTie) {
    const std::vector<typename TypeParam::Stored> logits = {TypeParam::store(-0.0), TypeParam::store(0.0)};
    EXPECT_EQ(topk<TypeParam>(logits, nullptr, 1, 2, 2, 1).indices, (std::vector<int64_t>{0, 1}));
}

TYPED_TEST(Topk, BiasChangesTheChoiceAndNotTheWeights) {
    const std::vector<typename TypeParam::Stored> logits = {TypeParam::store(2), TypeParam::store(1),
                                                            TypeParam::store(0)};
    const std::vector<typename TypeParam::Real> bias = {0, 0, 100};
    const auto got = topk<TypeParam>(logits, &bias, 1, 3, 2, 1);
    EXPECT_EQ(got.indices, (std::vector<int64_t>{2, 0}));
    EXPECT_NEAR(got.weights[0], 1 / (1 + std::exp(2.0)), 1e-6);
    EXPECT_NEAR(got.weights[1], 1 / (1 + std::exp(-2.0)), 1e-6);
}

TYPED_TEST(Topk, LargeLogitsDoNotOverflow) {
    const std::vector<typename TypeParam::Stored> logits = {TypeParam::store(30000), TypeParam::store(30000),
                                                            TypeParam::store(-30000)};
    for (int normalize : {0, 1}) {
        const auto got = topk<TypeParam>(logits, nullptr, 1, 3, 3, normalize);
        EXPECT_EQ(got.weights, (std::vector<typename TypeParam::Real>{0.5, 0.5, 0}));
    }
}

TYPED_TEST(Topk, MinusInfinityIsAMask) {
    const auto masked = TypeParam::store(-INF);
    const std::vector<typename TypeParam::Stored> logits = {masked, TypeParam::store(1), masked, TypeParam::store(1)};
    for (int normalize : {0, 1}) {
        const auto got = topk<TypeParam>(logits, nullptr, 1, 4, 4, normalize);
        EXPECT_EQ(got.indices, (std::vector<int64_t>{1, 3, 0, 2}));
        EXPECT_EQ(got.weights, (std::vector<typename TypeParam::Real>{0.5, 0.5, 0, 0}));
    }
}

// Logits of three tokens of which the middle one is to have NaN weights: [3, 4].
template <typename T>
void expect_middle_row_is_nan(const std::vector<double> &middle, const std::vector<int64_t> &indices, int64_t K,
                              const std::vector<typename T::Real> *bias) {
    std::vector<typename T::Stored> logits(12);
    for (int e = 0; e < 4; e++) {
        logits[e] = T::store(e), logits[8 + e] = T::store(e);
        logits[4 + e] = T::store(middle[e]);
    }
    for (int normalize : {0, 1}) {
        const Routed<T> got = topk<T>(logits, bias, 3, 4, K, normalize);
        ASSERT_EQ(got.status, MMBAL_OK);
        for (int64_t k = 0; k < K; k++) {
            EXPECT_TRUE(std::isnan(got.weights[K + k])) << k;
            EXPECT_EQ(got.indices[K + k], indices[k]);
            for (int64_t n : {0, 2}) {
                EXPECT_EQ(got.indices[n * K + k], 3 - k) << "token " << n;
                const double total = normalize ? (1 - std::exp(-static_cast<double>(K))) / (1 - std::exp(-1.0))
                                               : (1 - std::exp(-4.0)) / (1 - std::exp(-1.0));
                EXPECT_NEAR(got.weights[n * K + k], std::exp(-static_cast<double>(k)) / total, 1e-6);
            }
        }
    }
}

TYPED_TEST(Topk, RowWithANanHasTheFirstIndicesAndNanWeights) {
    for (int place = 0; place < 4; place++) {
        std::vector<double> row = {9, 8, 7, 6};
        row[place] = NOT_A_NUMBER;
        for (int64_t K : {1, 2, 4}) expect_middle_row_is_nan<TypeParam>(row, {0, 1, 2, 3}, K, nullptr);
    }
}

TYPED_TEST(Topk, NanInTheBiasMakesEveryRowNan) {
    Random random(6);
    std::vector<typename TypeParam::Real> bias = {0, 0, 0, static_cast<typename TypeParam::Real>(NOT_A_NUMBER)};
    const auto got = topk<TypeParam>(random.tensor<TypeParam>(12, 1), &bias, 3, 4, 2, 1);
    EXPECT_EQ(got.indices, (std::vector<int64_t>{0, 1, 0, 1, 0, 1}));
    for (auto w : got.weights) EXPECT_TRUE(std::isnan(w));
}

TYPED_TEST(Topk, RowWhoseChoicesAreAllMinusInfinityHasNanWeights) {
    expect_middle_row_is_nan<TypeParam>({-INF, -INF, -INF, -INF}, {0, 1, 2, 3}, 3, nullptr);
}

TYPED_TEST(Topk, MaskedChoicesForcedByTheBiasHaveNanWeights) {
    const std::vector<typename TypeParam::Stored> logits = {TypeParam::store(-INF), TypeParam::store(5)};
    // The score -inf + inf would be a NaN of its own: keep the other expert away instead.
    const std::vector<typename TypeParam::Real> bias = {0, static_cast<typename TypeParam::Real>(-INF)};
    for (int normalize : {0, 1}) {
        const auto got = topk<TypeParam>(logits, &bias, 1, 2, 1, normalize);
        EXPECT_EQ(got.indices[0], 0);
        EXPECT_TRUE(std::isnan(got.weights[0]));
    }
}

TYPED_TEST(Topk, NoTokensIsFine) {
    const auto got = topk<TypeParam>({}, nullptr, 0, 4, 2, 1);
    EXPECT_EQ(got.status, MMBAL_OK);
    EXPECT_TRUE(got.intact);
}

TYPED_TEST(Topk, RefusesSizesOutsideTheContractWithoutWriting) {
    const std::vector<typename TypeParam::Stored> logits(8);
    const struct {
        int64_t N, E, K;
    } bad[] = {{-1, 4, 2}, {2, 4, 0}, {2, 4, -1}, {2, 4, 5}, {2, 0, 1}, {2, 0, 0}, {2, -4, 1}};
    for (const auto &size : bad) {
        const auto got = topk<TypeParam>(logits, nullptr, size.N, size.E, size.K, 1);
        EXPECT_EQ(got.status, MMBAL_INVALID_ARGUMENT) << size.N << " " << size.E << " " << size.K;
        EXPECT_TRUE(got.untouched);
    }
}

TYPED_TEST(Topk, SameBitsWithAnyPool) {
    Random random(7);
    const int64_t N = 3000, E = 5, K = 2;
    const auto logits = random.tensor<TypeParam>(N * E, 8);
    const auto dweights = random.tensor<std::conditional_t<TypeParam::dtype == MMBAL_F64, F64, F32>>(N * K, 1);
    for (int normalize : {0, 1}) {
        const auto expected = topk<TypeParam>(logits, nullptr, N, E, K, normalize);
        const auto backward = [&](const mmbal_pool &pool) {
            Guarded<typename TypeParam::Stored> dlogits(N * E);
            EXPECT_EQ(mmbal_moe_topk_backward(TypeParam::dtype, dweights.data(), logits.data(), expected.weights.data(),
                                              expected.indices.data(), N, E, K, normalize, dlogits.data(), &pool),
                      MMBAL_OK);
            EXPECT_TRUE(dlogits.intact());
            return dlogits.values();
        };
        const auto gradient = backward(mmbal_pool_serial());
        for_each_pool([&](const std::string &name, const mmbal_pool &pool) {
            const auto got = topk<TypeParam>(logits, nullptr, N, E, K, normalize, pool);
            EXPECT_TRUE(same_bits(got.weights, expected.weights)) << name;
            EXPECT_EQ(got.indices, expected.indices) << name;
            EXPECT_TRUE(same_bits(backward(pool), gradient)) << name;
        });
    }
}

TYPED_TEST(Topk, BackwardFollowsItsFormula) {
    using Real = typename TypeParam::Real;
    Random random(8);
    for (int round = 0; round < 40; round++) {
        const int64_t N = random.pick<int64_t>({0, 1, 7, 33}), E = random.pick<int64_t>({1, 2, 4, 17});
        const int64_t K = 1 + random.below(std::min<int64_t>(E, 4));
        auto logits = random.tensor<TypeParam>(N * E, 5);
        if (E > K) // a mask in every row, so that a chosen one stays finite
            for (int64_t n = 0; n < N; n++) logits[n * E] = TypeParam::store(-INF);
        std::vector<Real> dweights(N * K);
        for (auto &d : dweights) d = static_cast<Real>(random.uniform(-1, 1));
        for (int normalize : {0, 1}) {
            const auto forward = topk<TypeParam>(logits, nullptr, N, E, K, normalize);
            Guarded<typename TypeParam::Stored> dlogits(N * E);
            const mmbal_pool pool = mmbal_pool_serial();
            ASSERT_EQ(mmbal_moe_topk_backward(TypeParam::dtype, dweights.data(), logits.data(), forward.weights.data(),
                                              forward.indices.data(), N, E, K, normalize, dlogits.data(), &pool),
                      MMBAL_OK);
            ASSERT_TRUE(dlogits.intact());
            std::vector<Sum> expected(N * E);
            for (int64_t n = 0; n < N; n++) {
                const std::vector<double> p = Softmax(row_of<TypeParam>(logits, n, E)).p;
                double mean = 0, size = 0;
                for (int64_t k = n * K; k < (n + 1) * K; k++) {
                    mean += static_cast<double>(forward.weights[k]) * static_cast<double>(dweights[k]);
                    size += std::fabs(forward.weights[k] * dweights[k]);
                }
                for (int64_t e = 0; e < E; e++)
                    if (!normalize) expected[n * E + e].add(-p[e] * mean, p[e] * size);
                for (int64_t k = n * K; k < (n + 1) * K; k++) {
                    const int64_t e = forward.indices[k];
                    const double w = normalize ? forward.weights[k] : p[e];
                    expected[n * E + e].add(w * dweights[k]);
                    if (normalize) expected[n * E + e].add(-w * mean, w * size);
                }
            }
            expect_near<TypeParam>("dlogits", dlogits.values(), expected,
                                   TypeParam::stored_error + 100 * TypeParam::real_error);
        }
    }
}

template <typename Real>
std::vector<Real> alternating(int64_t count) {
    std::vector<Real> values(count);
    for (int64_t i = 0; i < count; i++) values[i] = static_cast<Real>(i % 2 ? -1 : 1);
    return values;
}

TYPED_TEST(Topk, BackwardIsExactlyZeroWhereMaskedOrNotChosen) {
    Random random(9);
    const int64_t N = 9, E = 6, K = 2;
    auto logits = random.tensor<TypeParam>(N * E, 5);
    for (int64_t n = 0; n < N; n++) logits[n * E + 3] = TypeParam::store(-INF);
    const std::vector<typename TypeParam::Real> dweights = alternating<typename TypeParam::Real>(N * K);
    for (int normalize : {0, 1}) {
        const auto forward = topk<TypeParam>(logits, nullptr, N, E, K, normalize);
        Guarded<typename TypeParam::Stored> dlogits(N * E);
        const mmbal_pool pool = mmbal_pool_serial();
        ASSERT_EQ(mmbal_moe_topk_backward(TypeParam::dtype, dweights.data(), logits.data(), forward.weights.data(),
                                          forward.indices.data(), N, E, K, normalize, dlogits.data(), &pool),
                  MMBAL_OK);
        const auto got = dlogits.values();
        for (int64_t n = 0; n < N; n++) {
            EXPECT_EQ(TypeParam::load(got[n * E + 3]), 0);
            const auto chosen = forward.indices.begin() + n * K;
            for (int64_t e = 0; e < E && normalize; e++) {
                const bool is_chosen = std::find(chosen, chosen + K, e) != chosen + K;
                EXPECT_EQ(TypeParam::load(got[n * E + e]) != 0, is_chosen) << n << ", " << e;
            }
        }
    }
}

TYPED_TEST(Topk, BackwardRefusesBadSizesAndIndicesWithoutWriting) {
    const std::vector<typename TypeParam::Stored> logits(8);
    const std::vector<typename TypeParam::Real> reals(4);
    const mmbal_pool pool = mmbal_pool_serial();
    Guarded<typename TypeParam::Stored> dlogits(8);
    const auto backward = [&](const std::vector<int64_t> &indices, int64_t N, int64_t E, int64_t K) {
        return mmbal_moe_topk_backward(TypeParam::dtype, reals.data(), logits.data(), reals.data(), indices.data(), N,
                                       E, K, 1, dlogits.data(), &pool);
    };
    EXPECT_EQ(backward({0, 1, 2, 4}, 2, 4, 2), MMBAL_INVALID_INDEX);
    EXPECT_EQ(backward({-1, 1, 2, 3}, 2, 4, 2), MMBAL_INVALID_INDEX);
    EXPECT_EQ(backward({0, 1, 2, 3}, -1, 4, 2), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(backward({0, 1, 2, 3}, 2, 4, 5), MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(backward({0, 1, 2, 3}, 2, 4, 0), MMBAL_INVALID_ARGUMENT);
    EXPECT_TRUE(dlogits.untouched());
    EXPECT_EQ(backward({0, 1, 2, 3}, 2, 4, 2), MMBAL_OK);
}

TEST(TopkBackward, IsTheDerivativeOfTheForward) {
    Random random(10);
    const int64_t N = 4, E = 5, K = 2;
    const auto dweights = random.tensor<F64>(N * K, 1);
    const mmbal_pool pool = mmbal_pool_serial();
    auto logits = random.tensor<F64>(N * E, 2);
    for (int normalize : {0, 1}) {
        const auto forward = topk<F64>(logits, nullptr, N, E, K, normalize);
        std::vector<double> dlogits(N * E);
        ASSERT_EQ(mmbal_moe_topk_backward(MMBAL_F64, dweights.data(), logits.data(), forward.weights.data(),
                                          forward.indices.data(), N, E, K, normalize, dlogits.data(), &pool),
                  MMBAL_OK);
        const auto loss_at = [&](int64_t i, double value) {
            auto moved = logits;
            moved[i] = value;
            const auto got = topk<F64>(moved, nullptr, N, E, K, normalize);
            EXPECT_EQ(got.indices, forward.indices) << "the step changed a choice";
            double loss = 0;
            for (int64_t r = 0; r < N * K; r++) loss += dweights[r] * got.weights[r];
            return loss;
        };
        const double step = 1e-5;
        for (int64_t i = 0; i < N * E; i++) {
            const double slope = (loss_at(i, logits[i] + step) - loss_at(i, logits[i] - step)) / (2 * step);
            EXPECT_NEAR(dlogits[i], slope, 1e-9) << i;
        }
    }
}

TEST(TopkStatus, UnknownDtypeIsUnsupported) {
    const mmbal_pool pool = mmbal_pool_serial();
    const double logits[2] = {0, 1}, weights[1] = {1};
    double out[2] = {7, 7};
    int64_t indices[1] = {0};
    for (int value : {4, -1, 99}) {
        const auto dtype = enum_of<mmbal_dtype>(value);
        EXPECT_EQ(mmbal_moe_topk(dtype, logits, nullptr, 1, 2, 1, 1, out, indices, &pool), MMBAL_UNSUPPORTED);
        EXPECT_EQ(mmbal_moe_topk_backward(dtype, weights, logits, weights, indices, 1, 2, 1, 1, out, &pool),
                  MMBAL_UNSUPPORTED);
    }
    EXPECT_EQ(out[0], 7);
}

TEST(TopkStatus, StatusOfThePoolIsReturned) {
    FailingPool failing(0), failing_backward(0);
    const mmbal_pool pool = failing.pool(), pool_backward = failing_backward.pool();
    const double logits[2] = {0, 1};
    double weights[1], dlogits[2];
    int64_t indices[1];
    EXPECT_EQ(mmbal_moe_topk(MMBAL_F64, logits, nullptr, 1, 2, 1, 1, weights, indices, &pool), MMBAL_UNSUPPORTED);
    EXPECT_EQ(
        mmbal_moe_topk_backward(MMBAL_F64, weights, logits, weights, indices, 1, 2, 1, 1, dlogits, &pool_backward),
        MMBAL_UNSUPPORTED);
}

struct Dispatched {
    mmbal_status status;
    std::vector<int64_t> permutation, offsets, inverse;
    bool intact;
};

Dispatched dispatch(const std::vector<int64_t> &indices, int64_t N, int64_t K, int64_t E) {
    const int64_t R = static_cast<int64_t>(indices.size());
    Guarded<int64_t> permutation(R), offsets(std::max<int64_t>(E, 0) + 1), inverse(R);
    const mmbal_status status =
        mmbal_moe_dispatch(indices.data(), N, K, E, permutation.data(), offsets.data(), inverse.data());
    return {status, permutation.values(), offsets.values(), inverse.values(),
            permutation.intact() && offsets.intact() && inverse.intact()};
}

void expect_dispatch(const std::vector<int64_t> &indices, int64_t N, int64_t K, int64_t E) {
    const Dispatched got = dispatch(indices, N, K, E);
    ASSERT_EQ(got.status, MMBAL_OK);
    ASSERT_TRUE(got.intact);
    const int64_t R = N * K;
    std::vector<int64_t> order(R), offsets(E + 1), inverse(R);
    for (int64_t pair = 0; pair < R; pair++) order[pair] = pair;
    std::stable_sort(order.begin(), order.end(), [&](int64_t a, int64_t b) { return indices[a] < indices[b]; });
    for (int64_t r = 0; r < R; r++) inverse[order[r]] = r;
    for (int64_t e = 0; e <= E; e++)
        offsets[e] = std::count_if(indices.begin(), indices.end(), [&](int64_t of) { return of < e; });
    EXPECT_EQ(got.permutation, order);
    EXPECT_EQ(got.offsets, offsets);
    EXPECT_EQ(got.inverse, inverse);
    EXPECT_EQ(mmbal_moe_check_dispatch(got.permutation.data(), got.offsets.data(), got.inverse.data(), R, E), MMBAL_OK);
}

TEST(Dispatch, IsAStableSortByExpertWithItsInverse) {
    Random random(11);
    for (int64_t N : {1, 2, 7, 33, 500})
        for (int64_t E : {1, 2, 3, 8, 64, 300})
            for (int64_t K : {1, 2, 3})
                if (K <= E) expect_dispatch(random.choices(N, K, E), N, K, E);
}

TEST(Dispatch, ExpertsWithoutPairsAtEitherEndAndBetween) {
    expect_dispatch({2, 2, 5, 2, 5}, 5, 1, 8);
    expect_dispatch({0, 0, 0}, 3, 1, 4);
    expect_dispatch({3, 3, 3}, 3, 1, 4);
}

TEST(Dispatch, TokenMayChooseAnExpertTwice) { expect_dispatch({1, 1, 0, 0, 1, 0}, 3, 2, 2); }

TEST(Dispatch, NoTokensGiveZeroOffsets) {
    for (int64_t E : {1, 2, 5}) expect_dispatch({}, 0, 2, E);
}

TEST(Dispatch, RefusesIndicesOutsideTheExperts) {
    for (int64_t bad : {int64_t{-1}, int64_t{4}, int64_t{1000}, std::numeric_limits<int64_t>::max(),
                        std::numeric_limits<int64_t>::min()}) {
        for (int place : {0, 2, 5}) {
            std::vector<int64_t> indices = {0, 1, 2, 3, 0, 1};
            indices[place] = bad;
            const Dispatched got = dispatch(indices, 3, 2, 4);
            EXPECT_EQ(got.status, MMBAL_INVALID_INDEX) << bad;
            EXPECT_TRUE(got.intact);
        }
    }
}

TEST(Dispatch, RefusesSizesOutsideTheContract) {
    EXPECT_EQ(dispatch({}, -1, 2, 4).status, MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(dispatch({}, 0, 0, 4).status, MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(dispatch({}, 0, 2, 0).status, MMBAL_INVALID_ARGUMENT);
    EXPECT_EQ(dispatch({}, 0, 2, -1).status, MMBAL_INVALID_ARGUMENT);
}

class CheckDispatch : public ::testing::Test {
protected:
    void SetUp() override {
        const Dispatched made = dispatch({1, 3, 1, 0, 3, 1, 0, 3}, 4, 2, E);
        permutation = made.permutation, offsets = made.offsets, inverse = made.inverse;
        ASSERT_EQ(check(), MMBAL_OK);
    }
    mmbal_status check() const {
        return mmbal_moe_check_dispatch(permutation.data(), offsets.data(), inverse.data(), R, E);
    }
    static constexpr int64_t R = 8, E = 4;
    std::vector<int64_t> permutation, offsets, inverse;
};

TEST_F(CheckDispatch, RefusesEveryOtherEntryOfPermutation) {
    for (int64_t r = 0; r < R; r++) {
        for (int64_t entry : {int64_t{-1}, R, R + 1, int64_t{1} << 62, permutation[(r + 1) % R]}) {
            const int64_t kept = std::exchange(permutation[r], entry);
            EXPECT_EQ(check(), MMBAL_INVALID_INDEX) << entry << " at " << r;
            permutation[r] = kept;
        }
    }
}

TEST_F(CheckDispatch, RefusesEveryOtherEntryOfInverse) {
    for (int64_t pair = 0; pair < R; pair++) {
        for (int64_t entry = -1; entry <= R; entry++) {
            const int64_t kept = std::exchange(inverse[pair], entry);
            EXPECT_EQ(check(), entry == kept ? MMBAL_OK : MMBAL_INVALID_INDEX) << entry << " at " << pair;
            inverse[pair] = kept;
        }
    }
}

TEST_F(CheckDispatch, RefusesSwappedEntriesUnlessInverseFollows) {
    std::swap(permutation[0], permutation[3]);
    EXPECT_EQ(check(), MMBAL_INVALID_INDEX);
}

TEST_F(CheckDispatch, RefusesOffsetsThatDoNotStartAtZero) {
    for (int64_t first : {-1, 1}) {
        offsets[0] = first;
        EXPECT_EQ(check(), MMBAL_INVALID_INDEX) << first;
    }
}

TEST_F(CheckDispatch, RefusesOffsetsThatDoNotEndAtTheRows) {
    for (int64_t last : {R - 1, R + 1, int64_t{0}}) {
        offsets[E] = last;
        EXPECT_EQ(check(), MMBAL_INVALID_INDEX) << last;
    }
}

TEST_F(CheckDispatch, RefusesOffsetsThatDecrease) {
    for (int64_t e = 1; e < E; e++) {
        for (int64_t entry : {int64_t{-1}, R + 1, int64_t{1} << 62}) {
            const int64_t kept = std::exchange(offsets[e], entry);
            EXPECT_EQ(check(), MMBAL_INVALID_INDEX) << entry << " at " << e;
            offsets[e] = kept;
        }
    }
}

TEST_F(CheckDispatch, AcceptsNoRows) {
    const std::vector<int64_t> zeros(5, 0);
    EXPECT_EQ(mmbal_moe_check_dispatch(nullptr, zeros.data(), nullptr, 0, 4), MMBAL_OK);
}

} // namespace
