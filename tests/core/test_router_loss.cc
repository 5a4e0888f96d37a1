#include "mmbal/router_loss.h"

#include <algorithm>
#include <type_traits>

#include "helpers.h"

namespace {

using namespace mmbal_test;

constexpr mmbal_balance BALANCES[] = {MMBAL_BALANCE_MIXTRAL, MMBAL_BALANCE_MEGATRON, MMBAL_BALANCE_SWITCH};

template <typename T>
struct Problem {
    using Stored = typename T::Stored;
    using Real = typename T::Real;
    int64_t N, E, K;
    std::vector<Stored> logits;
    std::vector<int64_t> indices;
    std::vector<uint8_t> mask; // empty: none

    Problem(int64_t n, int64_t e, int64_t k, uint64_t seed = 1, bool masked = false) : N(n), E(e), K(k) {
        Random random(seed);
        logits = random.tensor<T>(N * E, 5);
        indices = random.choices(N, K, E);
        for (int64_t i = 0; i < N && masked; i++) mask.push_back(random.below(3) != 0);
    }
    const uint8_t *mask_data() const { return mask.empty() ? nullptr : mask.data(); }
    bool counted(int64_t n) const { return mask.empty() || mask[n]; }
    double tokens() const {
        double total = 0;
        for (int64_t n = 0; n < N; n++) total += counted(n);
        return total;
    }
    std::vector<double> row(int64_t n) const {
        std::vector<double> values;
        for (int64_t e = 0; e < E; e++) values.push_back(T::load(logits[n * E + e]));
        return values;
    }
};

// One loss or its gradient: how to call the operator, and the header's formula in double.
template <typename T>
struct LossOf {
    using Real = typename T::Real;
    bool z;
    mmbal_balance balance;

    mmbal_status value(const Problem<T> &p, const mmbal_pool &pool, std::vector<Real> *loss) const {
        Guarded<Real> out(1);
        Guarded<unsigned char> workspace(mmbal_router_loss_workspace(p.N, p.E));
        const mmbal_status status =
            z ? mmbal_router_z_loss(T::dtype, p.logits.data(), p.mask_data(), p.N, p.E, out.data(), workspace.data(),
                                    &pool)
              : mmbal_load_balance_loss(T::dtype, p.logits.data(), p.indices.data(), p.mask_data(), p.N, p.E, p.K,
                                        balance, out.data(), workspace.data(), &pool);
        EXPECT_TRUE(out.intact() && workspace.intact());
        *loss = out.values();
        return status;
    }

    mmbal_status gradient(const Problem<T> &p, Real dloss, const mmbal_pool &pool,
                          std::vector<typename T::Stored> *dlogits) const {
        Guarded<typename T::Stored> out(p.N * p.E);
        Guarded<unsigned char> workspace(mmbal_router_loss_workspace(p.N, p.E));
        const mmbal_status status =
            z ? mmbal_router_z_loss_backward(T::dtype, &dloss, p.logits.data(), p.mask_data(), p.N, p.E, out.data(),
                                             &pool)
              : mmbal_load_balance_loss_backward(T::dtype, &dloss, p.logits.data(), p.indices.data(), p.mask_data(),
                                                 p.N, p.E, p.K, balance, out.data(), workspace.data(), &pool);
        EXPECT_TRUE(out.intact() && workspace.intact());
        *dlogits = out.values();
        return status;
    }

    double factor(const Problem<T> &p) const {
        return static_cast<double>(p.E) * (balance == MMBAL_BALANCE_MEGATRON ? 1.0 / static_cast<double>(p.K) : 1);
    }

    // F[e]
    std::vector<double> shares(const Problem<T> &p) const {
        std::vector<double> shares(p.E);
        const int64_t choices = balance == MMBAL_BALANCE_SWITCH ? 1 : p.K;
        const double tokens = p.tokens();
        for (int64_t n = 0; n < p.N; n++)
            for (int64_t k = 0; k < choices && p.counted(n); k++) shares[p.indices[n * p.K + k]] += 1 / tokens;
        return shares;
    }

    double plain_value(const Problem<T> &p) const {
        if (p.tokens() == 0) return 0;
        const std::vector<double> F = shares(p);
        const double tokens = p.tokens();
        double loss = 0;
        for (int64_t n = 0; n < p.N; n++) {
            if (!p.counted(n)) continue;
            const Softmax softmax(p.row(n));
            if (z) loss += softmax.logsumexp * softmax.logsumexp / tokens;
            for (int64_t e = 0; e < p.E && !z; e++) loss += factor(p) * F[e] * softmax.p[e] / tokens;
        }
        return loss;
    }

    std::vector<Sum> plain_gradient(const Problem<T> &p, double dloss) const {
        std::vector<Sum> gradient(p.N * p.E);
        const std::vector<double> F = shares(p);
        const double tokens = p.tokens();
        for (int64_t n = 0; n < p.N; n++) {
            if (!p.counted(n)) continue;
            const Softmax softmax(p.row(n));
            double mean = 0;
            for (int64_t e = 0; e < p.E; e++) mean += softmax.p[e] * F[e];
            for (int64_t e = 0; e < p.E; e++) {
                Sum &to = gradient[n * p.E + e];
                const double scale = dloss * softmax.p[e] / tokens;
                if (z) {
                    to.add(2 * scale * softmax.logsumexp);
                } else {
                    to.add(factor(p) * scale * F[e]);
                    to.add(-factor(p) * scale * mean);
                }
            }
        }
        return gradient;
    }
};

template <typename T>
std::vector<LossOf<T>> all_losses() {
    std::vector<LossOf<T>> losses = {{true, MMBAL_BALANCE_MIXTRAL}};
    for (mmbal_balance balance : BALANCES) losses.push_back({false, balance});
    return losses;
}

template <typename T>
std::string name_of(const LossOf<T> &loss) {
    return loss.z ? "z" : "balance " + std::to_string(loss.balance);
}

template <typename T>
void expect_formulas(const Problem<T> &p) {
    using Real = typename T::Real;
    const mmbal_pool pool = mmbal_pool_serial();
    for (const LossOf<T> &loss : all_losses<T>()) {
        SCOPED_TRACE(name_of(loss) + " N=" + std::to_string(p.N) + " E=" + std::to_string(p.E));
        std::vector<Real> value;
        ASSERT_EQ(loss.value(p, pool, &value), MMBAL_OK);
        const double expected = loss.plain_value(p);
        // Sums are in float64 whatever the dtype: only the loss itself is rounded to real.
        ASSERT_NEAR(value[0], expected, (T::real_error + 1e-13) * std::fabs(expected));
        std::vector<typename T::Stored> dlogits;
        const Real dloss = static_cast<Real>(-1.7);
        ASSERT_EQ(loss.gradient(p, dloss, pool, &dlogits), MMBAL_OK);
        expect_near<T>("dlogits", dlogits, loss.plain_gradient(p, dloss), T::stored_error + T::real_error + 1e-12);
    }
}

template <typename T>
class RouterLoss : public ::testing::Test {};
TYPED_TEST_SUITE(RouterLoss, Dtypes, DtypeNames);

TYPED_TEST(RouterLoss, FollowsItsFormulas) {
    uint64_t seed = 0;
    for (int64_t N : {0, 1, 2, 7, 255, 256, 257, 1000})
        for (int64_t E : {1, 2, 5, 64})
            for (int64_t K : {1, 2, 3})
                if (K <= E) expect_formulas(Problem<TypeParam>(N, E, K, seed++));
}

TYPED_TEST(RouterLoss, FollowsItsFormulasUnderAMask) {
    uint64_t seed = 0;
    for (int64_t N : {1, 2, 7, 257, 1000}) expect_formulas(Problem<TypeParam>(N, 5, 2, seed++, true));
}

TYPED_TEST(RouterLoss, BalancedRouterHasTheValueOfTheHeader) {
    Problem<TypeParam> p(6, 3, 2);
    std::fill(p.logits.begin(), p.logits.end(), TypeParam::store(0.5));
    p.indices = {0, 1, 1, 2, 2, 0, 0, 1, 1, 2, 2, 0};
    const mmbal_pool pool = mmbal_pool_serial();
    const double expected[] = {2, 1, 1};
    for (mmbal_balance balance : BALANCES) {
        std::vector<typename TypeParam::Real> loss;
        ASSERT_EQ((LossOf<TypeParam>{false, balance}.value(p, pool, &loss)), MMBAL_OK);
        EXPECT_NEAR(loss[0], expected[balance], 1e-6) << balance;
    }
}

TYPED_TEST(RouterLoss, ZLossOfEqualLogitsIsTheSquareOfTheLogarithm) {
    Problem<TypeParam> p(4, 8, 1);
    std::fill(p.logits.begin(), p.logits.end(), TypeParam::store(0));
    std::vector<typename TypeParam::Real> loss;
    ASSERT_EQ((LossOf<TypeParam>{true, MMBAL_BALANCE_MIXTRAL}.value(p, mmbal_pool_serial(), &loss)), MMBAL_OK);
    EXPECT_NEAR(loss[0], std::log(8.0) * std::log(8.0), 1e-6);
}

TYPED_TEST(RouterLoss, MaskedRowsAreAsIfTheyWereNotThere) {
    Problem<TypeParam> with(300, 5, 2, 3, true), without = with;
    without.logits.clear(), without.indices.clear(), without.mask.clear(), without.N = 0;
    for (int64_t n = 0; n < with.N; n++) {
        if (with.mask[n]) {
            without.N++;
            without.logits.insert(without.logits.end(), &with.logits[n * 5], &with.logits[n * 5] + 5);
            without.indices.insert(without.indices.end(), &with.indices[n * 2], &with.indices[n * 2] + 2);
        } else {
            for (int64_t e = 0; e < 5; e++) with.logits[n * 5 + e] = TypeParam::store(n % 2 ? NAN : INFINITY);
        }
    }
    const mmbal_pool pool = mmbal_pool_serial();
    for (const auto &loss : all_losses<TypeParam>()) {
        std::vector<typename TypeParam::Real> a, b;
        ASSERT_EQ(loss.value(with, pool, &a), MMBAL_OK);
        ASSERT_EQ(loss.value(without, pool, &b), MMBAL_OK);
        EXPECT_NEAR(a[0], b[0], 4 * TypeParam::real_error * std::fabs(b[0])) << name_of(loss);
        std::vector<typename TypeParam::Stored> da, db;
        ASSERT_EQ(loss.gradient(with, 1, pool, &da), MMBAL_OK);
        ASSERT_EQ(loss.gradient(without, 1, pool, &db), MMBAL_OK);
        for (int64_t n = 0, m = 0; n < with.N; n++) {
            for (int64_t e = 0; e < 5; e++) {
                const double expected = with.mask[n] ? TypeParam::load(db[m * 5 + e]) : 0;
                ASSERT_EQ(TypeParam::load(da[n * 5 + e]), expected) << name_of(loss) << " token " << n;
            }
            m += with.mask[n];
        }
    }
}

TYPED_TEST(RouterLoss, NothingCountedGivesZero) {
    const mmbal_pool pool = mmbal_pool_serial();
    Problem<TypeParam> masked(300, 4, 2), empty(0, 4, 2);
    masked.mask.assign(300, 0);
    for (auto &z : masked.logits) z = TypeParam::store(NAN);
    for (const auto &loss : all_losses<TypeParam>()) {
        for (const auto *p : {&masked, &empty}) {
            std::vector<typename TypeParam::Real> value;
            ASSERT_EQ(loss.value(*p, pool, &value), MMBAL_OK);
            EXPECT_EQ(value[0], 0) << name_of(loss);
            std::vector<typename TypeParam::Stored> dlogits;
            ASSERT_EQ(loss.gradient(*p, 3, pool, &dlogits), MMBAL_OK);
            ASSERT_EQ(static_cast<int64_t>(dlogits.size()), p->N * p->E);
            for (auto d : dlogits) ASSERT_EQ(TypeParam::load(d), 0) << name_of(loss);
        }
    }
}

TYPED_TEST(RouterLoss, LargeLogitsDoNotOverflow) {
    Problem<TypeParam> p(2, 2, 1);
    p.logits = {TypeParam::store(1024), TypeParam::store(-1024), TypeParam::store(-1024), TypeParam::store(-1024)};
    p.indices = {0, 1};
    const mmbal_pool pool = mmbal_pool_serial();
    std::vector<typename TypeParam::Real> loss;
    ASSERT_EQ((LossOf<TypeParam>{true, MMBAL_BALANCE_MIXTRAL}.value(p, pool, &loss)), MMBAL_OK);
    const double second = -1024 + std::log(2.0);
    EXPECT_NEAR(loss[0], (1024.0 * 1024 + second * second) / 2, 0.1);
    expect_formulas(p);
}

TYPED_TEST(RouterLoss, MaskedExpertHasNoGradient) {
    Problem<TypeParam> p(9, 4, 2);
    for (int64_t n = 0; n < p.N; n++) p.logits[n * 4 + 1] = TypeParam::store(-INFINITY);
    expect_formulas(p);
    for (const auto &loss : all_losses<TypeParam>()) {
        std::vector<typename TypeParam::Stored> dlogits;
        ASSERT_EQ(loss.gradient(p, 1, mmbal_pool_serial(), &dlogits), MMBAL_OK);
        for (int64_t n = 0; n < p.N; n++) ASSERT_EQ(TypeParam::load(dlogits[n * 4 + 1]), 0) << name_of(loss);
    }
}

TYPED_TEST(RouterLoss, NanOfACountedTokenShowsInTheLoss) {
    Problem<TypeParam> p(300, 4, 2);
    p.logits[7] = TypeParam::store(NAN);
    for (const auto &loss : all_losses<TypeParam>()) {
        std::vector<typename TypeParam::Real> value;
        ASSERT_EQ(loss.value(p, mmbal_pool_serial(), &value), MMBAL_OK);
        EXPECT_TRUE(std::isnan(value[0])) << name_of(loss);
    }
}

TYPED_TEST(RouterLoss, SameBitsWithAnyPool) {
    for (bool masked : {false, true}) {
        const Problem<TypeParam> p(3000, 5, 2, 4, masked);
        for (const auto &loss : all_losses<TypeParam>()) {
            std::vector<typename TypeParam::Real> value;
            std::vector<typename TypeParam::Stored> dlogits;
            ASSERT_EQ(loss.value(p, mmbal_pool_serial(), &value), MMBAL_OK);
            ASSERT_EQ(loss.gradient(p, 1, mmbal_pool_serial(), &dlogits), MMBAL_OK);
            for_each_pool([&](const std::string &name, const mmbal_pool &pool) {
                std::vector<typename TypeParam::Real> other_value;
                std::vector<typename TypeParam::Stored> other_dlogits;
                EXPECT_EQ(loss.value(p, pool, &other_value), MMBAL_OK);
                EXPECT_EQ(loss.gradient(p, 1, pool, &other_dlogits), MMBAL_OK);
                EXPECT_TRUE(same_bits(value, other_value)) << name << ", " << name_of(loss);
                EXPECT_TRUE(same_bits(dlogits, other_dlogits)) << name << ", " << name_of(loss);
            });
        }
    }
}

TEST(RouterLossBackward, IsTheDerivativeOfTheLoss) {
    const Problem<F64> p(7, 5, 2, 5, true);
    const mmbal_pool pool = mmbal_pool_serial();
    for (const auto &loss : all_losses<F64>()) {
        std::vector<double> dlogits;
        ASSERT_EQ(loss.gradient(p, 1, pool, &dlogits), MMBAL_OK);
        for (size_t i = 0; i < p.logits.size(); i++) {
            const double step = 1e-5;
            Problem<F64> above = p, below = p;
            above.logits[i] += step, below.logits[i] -= step;
            std::vector<double> high, low;
            ASSERT_EQ(loss.value(above, pool, &high), MMBAL_OK);
            ASSERT_EQ(loss.value(below, pool, &low), MMBAL_OK);
            EXPECT_NEAR(dlogits[i], (high[0] - low[0]) / (2 * step), 1e-8) << name_of(loss) << " " << i;
        }
    }
}

TYPED_TEST(RouterLoss, RefusesIndicesOutsideTheExperts) {
    for (int64_t bad : {int64_t{-1}, int64_t{4}, std::numeric_limits<int64_t>::max()}) {
        for (size_t place : {size_t{0}, size_t{599}}) {
            Problem<TypeParam> p(300, 4, 2);
            p.indices[place] = bad;
            for (mmbal_balance balance : BALANCES) {
                const LossOf<TypeParam> loss = {false, balance};
                std::vector<typename TypeParam::Real> value;
                std::vector<typename TypeParam::Stored> dlogits;
                EXPECT_EQ(loss.value(p, mmbal_pool_serial(), &value), MMBAL_INVALID_INDEX) << bad;
                EXPECT_EQ(loss.gradient(p, 1, mmbal_pool_serial(), &dlogits), MMBAL_INVALID_INDEX) << bad;
            }
        }
    }
}

TEST(RouterLossStatus, SizesOutsideTheContractAreInvalid) {
    const mmbal_pool pool = mmbal_pool_serial();
    const double logits[4] = {}, one = 1;
    const int64_t indices[2] = {};
    double out[4] = {7, 7, 7, 7}, workspace[64];
    const struct {
        int64_t N, E, K;
    } bad[] = {{-1, 2, 1}, {2, 0, 1}, {2, -1, 1}, {2, 2, 0}, {2, 2, -1}};
    for (const auto &size : bad) {
        EXPECT_EQ(mmbal_load_balance_loss(MMBAL_F64, logits, indices, nullptr, size.N, size.E, size.K,
                                          MMBAL_BALANCE_MIXTRAL, out, workspace, &pool),
                  MMBAL_INVALID_ARGUMENT);
        EXPECT_EQ(mmbal_load_balance_loss_backward(MMBAL_F64, &one, logits, indices, nullptr, size.N, size.E, size.K,
                                                   MMBAL_BALANCE_MIXTRAL, out, workspace, &pool),
                  MMBAL_INVALID_ARGUMENT);
        if (size.N >= 0 && size.E >= 1) continue;
        EXPECT_EQ(mmbal_router_z_loss(MMBAL_F64, logits, nullptr, size.N, size.E, out, workspace, &pool),
                  MMBAL_INVALID_ARGUMENT);
        EXPECT_EQ(mmbal_router_z_loss_backward(MMBAL_F64, &one, logits, nullptr, size.N, size.E, out, &pool),
                  MMBAL_INVALID_ARGUMENT);
    }
    for (double value : out) EXPECT_EQ(value, 7);
}

TEST(RouterLossStatus, UnknownDtypeIsUnsupported) {
    const mmbal_pool pool = mmbal_pool_serial();
    const double logits[4] = {}, one = 1;
    const int64_t indices[2] = {};
    double out[4] = {7, 7, 7, 7}, workspace[64];
    for (int value : {4, -1, 99}) {
        const auto dtype = enum_of<mmbal_dtype>(value);
        EXPECT_EQ(mmbal_load_balance_loss(dtype, logits, indices, nullptr, 2, 2, 1, MMBAL_BALANCE_SWITCH, out,
                                          workspace, &pool),
                  MMBAL_UNSUPPORTED);
        EXPECT_EQ(mmbal_load_balance_loss_backward(dtype, &one, logits, indices, nullptr, 2, 2, 1, MMBAL_BALANCE_SWITCH,
                                                   out, workspace, &pool),
                  MMBAL_UNSUPPORTED);
        EXPECT_EQ(mmbal_router_z_loss(dtype, logits, nullptr, 2, 2, out, workspace, &pool), MMBAL_UNSUPPORTED);
        EXPECT_EQ(mmbal_router_z_loss_backward(dtype, &one, logits, nullptr, 2, 2, out, &pool), MMBAL_UNSUPPORTED);
    }
    for (double value : out) EXPECT_EQ(value, 7);
}

TEST(RouterLossStatus, StatusOfThePoolIsReturned) {
    const Problem<F64> p(5, 3, 2);
    for (const auto &loss : all_losses<F64>()) {
        FailingPool forward(0), backward(0);
        std::vector<double> value, dlogits;
        EXPECT_EQ(loss.value(p, forward.pool(), &value), MMBAL_UNSUPPORTED) << name_of(loss);
        EXPECT_EQ(loss.gradient(p, 1, backward.pool(), &dlogits), MMBAL_UNSUPPORTED) << name_of(loss);
    }
}

} // namespace
