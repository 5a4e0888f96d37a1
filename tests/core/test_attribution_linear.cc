#include "attribution_linear_reference.h"

namespace {

using namespace mmbal_test;

template <typename T>
void check(const Linear<T> &p) {
    follows_formulas(p, p.run());
}

template <typename T>
class AttributionLinear : public ::testing::Test {};
TYPED_TEST_SUITE(AttributionLinear, Dtypes, DtypeNames);

TYPED_TEST(AttributionLinear, FollowsItsFormulas) {
    struct Shape {
        int64_t B, C;
        std::vector<int64_t> d;
    };
    const std::vector<Shape> shapes = {{0, 3, {4, 5}}, {1, 1, {3, 4}},   {5, 1, {7, 8}},   {6, 2, {5, 1, 9}},
                                       {3, 3, {1, 1}}, {9, 10, {33, 6}}, {4, 101, {5, 7}}, {3, 17, {64, 65, 31}},
                                       {2, 4, {5}},    {35, 5, {3, 2}},  {1, 6, {300, 20}}};
    uint64_t seed = 0;
    for (const Shape &shape : shapes)
        for (const auto &options : all_options())
            for (mmbal_score score : {MMBAL_SCORE_ODDS, MMBAL_SCORE_LOGIT})
                for (int kind = 0; kind < 3; kind++) {
                    SCOPED_TRACE(std::to_string(shape.B) + " x " + std::to_string(shape.C) + " score " +
                                 std::to_string(score) + " kind " + std::to_string(kind) + " " + words(options));
                    const Way way = {options, score, kind == 1, seed % 2 == 1, kind == 2};
                    ASSERT_NO_FATAL_FAILURE(check(Linear<TypeParam>(shape.B, shape.C, shape.d, way, ++seed)));
                }
}

TYPED_TEST(AttributionLinear, WithARoomForSharesFollowsItsFormulas) {
    for (const auto &options : all_options(0.3))
        ASSERT_NO_FATAL_FAILURE(check(Linear<TypeParam>(12, 4, {9, 20, 6}, {options}, 3))) << words(options);
}

TYPED_TEST(AttributionLinear, NeverSaturates) {
    for (double margin : {5, 20, 60, 120, 1000})
        for (int64_t C : {1, 2, 3, 10})
            for (const auto &options : all_options()) {
                SCOPED_TRACE(std::to_string(margin) + " nats, " + std::to_string(C) + " classes");
                Linear<TypeParam> p(7, C, {20, 9}, {options}, 5, margin);
                ASSERT_NO_FATAL_FAILURE(check(p));
                const auto got = p.run();
                for (auto value : got.db) ASSERT_TRUE(std::isfinite(TypeParam::load(value)));
                // The chosen class's own logit is no part of the shares: those of another margin are the same.
                const auto less = p;
                for (int64_t row = 0; row < 7; row++) p.logits[row * C + less.chosen(row)] = TypeParam::store(3.5);
                const auto others = p.run();
                for (size_t i = 0; i < got.shares.size(); i++)
                    EXPECT_NEAR(got.shares[i], others.shares[i], 8 * TypeParam::real_error);
            }
}

TYPED_TEST(AttributionLinear, StaysFiniteWhereTheOthersAreFarApart) {
    Linear<TypeParam> p(6, 5, {20, 9}, {}, 6);
    for (int64_t row = 0; row < 6; row++)
        for (int64_t c = 0; c < 5; c++)
            p.logits[row * 5 + c] =
                TypeParam::store(200.0 * static_cast<double>(c - 3) + 40.0 * static_cast<double>(row));
    ASSERT_NO_FATAL_FAILURE(check(p));
}

TYPED_TEST(AttributionLinear, OfEqualLogitsTakesTheFirst) {
    for (mmbal_score score : {MMBAL_SCORE_ODDS, MMBAL_SCORE_LOGIT})
        for (int64_t C : {2, 3, 40}) {
            Way way;
            way.score = score;
            Linear<TypeParam> p(3, C, {20, 9}, way, 7);
            const int64_t first[] = {0, C / 2, 0}, second[] = {C - 1, C - 1, 1};
            for (int64_t row = 0; row < 3; row++)
                p.logits[row * C + first[row]] = p.logits[row * C + second[row]] = TypeParam::store(3.5);
            Linear<TypeParam> given = p, wrong = p;
            given.classes.assign(first, first + 3), wrong.classes.assign(second, second + 3);
            if (C == 2) given.classes[1] = 1; // C / 2 = C - 1: no tie
            const auto got = p.run();
            EXPECT_TRUE(got.same_as(given.run())) << C;
            EXPECT_FALSE(got.same_as(wrong.run()) && score == MMBAL_SCORE_LOGIT) << C;
        }
}

TYPED_TEST(AttributionLinear, TakesWeightsSideBySide) {
    for (auto [B, C] : std::vector<std::pair<int64_t, int64_t>>{{1, 1}, {9, 7}, {70, 40}}) {
        const Linear<TypeParam> p(B, C, {20, 9, 64}, {}, 9);
        const auto each = p.run(), joined = p.run(mmbal_pool_serial(), nullptr, true);
        for (int64_t m = 0, from = 0; m < 3; from += p.d[m++])
            for (int64_t c = 0; c < C; c++)
                for (int64_t i = 0; i < p.d[m]; i++)
                    ASSERT_EQ(TypeParam::load(each.dW[m][c * p.d[m] + i]),
                              TypeParam::load(joined.dW[0][c * 93 + from + i]));
        EXPECT_TRUE(same_bits(each.reg, joined.reg) && same_bits(each.db, joined.db));
    }
}

TYPED_TEST(AttributionLinear, OfOneOrTwoClassesHasNoGradientOfTheBias) {
    for (int64_t C : {1, 2}) {
        const auto got = Linear<TypeParam>(20, C, {20, 9}).run();
        for (auto value : got.db) EXPECT_EQ(TypeParam::load(value), 0);
        double largest = 0;
        for (auto value : got.dW[0]) largest = std::max(largest, std::fabs(TypeParam::load(value)));
        EXPECT_GT(largest, 0.01);
        // Two classes: what is taken from one is given to the other.
        for (int64_t i = 0; i < 20 && C == 2; i++)
            EXPECT_NEAR(TypeParam::load(got.dW[0][i]), -TypeParam::load(got.dW[0][20 + i]),
                        1e-5 * largest + 2 * TypeParam::stored_error * largest);
    }
}

TYPED_TEST(AttributionLinear, OfNothingIsTheTargetAndDoesNotMove) {
    for (int64_t C : {1, 2, 6})
        for (bool zero : {false, true}) {
            Linear<TypeParam> p(5, C, {20, 9});
            if (!zero) // one of the two is present
                for (int64_t i = 0; i < 10; i++) p.present.push_back(i / 2 % 2 == i % 2);
            for (auto &values : p.e)
                for (auto &value : values) value = zero ? TypeParam::store(0) : value;
            ASSERT_NO_FATAL_FAILURE(check(p));
            const auto got = p.run();
            for (auto value : got.reg) EXPECT_EQ(value, 0);
            for (const auto &of : got.dW)
                for (auto value : of) EXPECT_EQ(TypeParam::load(value), 0);
            for (auto value : got.db) EXPECT_EQ(TypeParam::load(value), 0);
        }
}

TYPED_TEST(AttributionLinear, IsTheSameForAnyThreads) {
    for (mmbal_score score : {MMBAL_SCORE_ODDS, MMBAL_SCORE_LOGIT})
        for (auto [B, C] : std::vector<std::pair<int64_t, int64_t>>{{150, 37}, {700, 3}, {2, 300}}) {
            Way way;
            way.score = score, way.masked = true;
            const Linear<TypeParam> p(B, C, {130, 65, 3}, way, 8);
            const auto serial = p.run();
            ASSERT_EQ(serial.status, MMBAL_OK);
            for_each_pool([&](const std::string &name, const mmbal_pool &pool) {
                EXPECT_TRUE(p.run(pool).same_as(serial)) << name << " " << B << " x " << C;
            });
        }
}

using Line = Linear<F64>;

// z = sum_m W_m e_m + b, b: what there was before
void set_logits(Line &p, const std::vector<double> &bias) {
    for (int64_t row = 0; row < p.B; row++)
        for (int64_t c = 0; c < p.C; c++) {
            double z = bias[c];
            for (int64_t m = 0; m < p.M(); m++)
                for (int64_t i = 0; i < p.d[m]; i++) z += p.W[m][c * p.d[m] + i] * p.e[m][row * p.d[m] + i];
            p.logits[row * p.C + c] = z;
        }
}

// The regulariser of the head's gradients, by the operator for any gradients.
Problem<F64>::Outputs of_gradients(const Line &p, Problem<F64> &problem) {
    problem.target = p.target, problem.target_rows = p.B, problem.options = p.way.options, problem.present = p.present;
    problem.e = p.e, problem.dreg = p.dreg;
    for (double &value : problem.dshares) value = 0;
    for (double &value : problem.dmagnitudes) value = 0;
    for (int64_t row = 0; row < p.B; row++) {
        const Sample s = p.sample(row);
        for (int64_t m = 0; m < p.M(); m++)
            for (int64_t i = 0; i < p.d[m]; i++) problem.g[m][row * p.d[m] + i] = s.g[m][i].value;
    }
    return problem.forward();
}

TEST(AttributionLinearOfAHead, IsTheComposition) {
    for (const auto &options : all_options())
        for (bool masked : {false, true}) {
            Line p(9, 7, {12, 5, 8}, {options, MMBAL_SCORE_ODDS, masked}, 21);
            Problem<F64> problem(9, {12, 5, 8});
            const auto forward = of_gradients(p, problem), v = problem.backward();
            const auto got = p.run();
            for (int64_t row = 0; row < 9; row++) EXPECT_NEAR(got.reg[row], forward.reg[row], 1e-14);
            for (int64_t i = 0; i < 27; i++) EXPECT_NEAR(got.shares[i], forward.shares[i], 1e-14);
            for (int64_t i = 0; i < 27; i++) EXPECT_NEAR(got.magnitudes[i], forward.magnitudes[i], 1e-13);
            std::vector<double> zeta(9 * 7), coef;
            for (int64_t row = 0; row < 9; row++) {
                const RoundedRow pi = p.pi(row), of_row = p.coefficients(row);
                std::vector<double> along(7);
                double mean = 0;
                for (int64_t c = 0; c < 7; c++) {
                    coef.push_back(of_row[c].value);
                    for (int64_t m = 0; m < 3; m++)
                        for (int64_t i = 0; i < p.d[m]; i++)
                            along[c] += p.W[m][c * p.d[m] + i] * v.first[m][row * p.d[m] + i];
                    mean += pi[c].value * along[c];
                }
                for (int64_t c = 0; c < 7; c++) zeta[row * 7 + c] = pi[c].value * (mean - along[c]);
            }
            for (int64_t c = 0; c < 7; c++)
                for (int64_t m = 0; m < 3; m++)
                    for (int64_t i = 0; i < p.d[m]; i++) {
                        double expected = 0;
                        for (int64_t row = 0; row < 9; row++)
                            expected += coef[row * 7 + c] * v.first[m][row * p.d[m] + i] +
                                        zeta[row * 7 + c] * p.e[m][row * p.d[m] + i];
                        EXPECT_NEAR(got.dW[m][c * p.d[m] + i], expected, 1e-12);
                    }
        }
}

// Central differences of the sum of dreg R for every parameter of the head.
TEST(AttributionLinearOfAHead, HasTheGradientsOfDifferences) {
    for (const auto &options : all_options())
        for (mmbal_score score : {MMBAL_SCORE_ODDS, MMBAL_SCORE_LOGIT})
            for (int64_t C : {1, 2, 4})
                for (bool masked : {false, true}) {
                    SCOPED_TRACE(words(options) + " score " + std::to_string(score) + " C " + std::to_string(C));
                    Line p(4, C, {3, 1, 2}, {options, score, masked}, 23);
                    std::vector<double> bias(C);
                    for (int64_t c = 0; c < C; c++) bias[c] = 0.3 * static_cast<double>(c);
                    set_logits(p, bias);
                    Problem<F64> problem(4, {3, 1, 2});
                    const auto total = [&] {
                        set_logits(p, bias);
                        const auto out = of_gradients(p, problem);
                        double sum = 0;
                        for (int64_t row = 0; row < 4; row++) sum += p.dreg[row] * out.reg[row];
                        return sum;
                    };
                    const auto got = p.run();
                    const auto expect = [&](double &at, double gradient) {
                        const double before = at, h = 1e-6;
                        at = before + h;
                        const double above = total();
                        at = before - h;
                        const double below = total();
                        at = before;
                        EXPECT_NEAR(gradient, (above - below) / (2 * h), 2e-7 * (1 + std::fabs(gradient)));
                    };
                    for (int64_t m = 0; m < 3; m++)
                        for (size_t i = 0; i < p.W[m].size(); i++) expect(p.W[m][i], got.dW[m][i]);
                    for (int64_t c = 0; c < C; c++) expect(bias[c], got.db[c]);
                }
}

TEST(AttributionLinearErrors, RefuseWhatIsOutsideTheContractAndTouchNothing) {
    const Linear<F32> good(3, 4, {4, 5});
    const auto refuse = [&](mmbal_status expected, const Linear<F32>::Change &change) {
        EXPECT_EQ(good.run(mmbal_pool_serial(), change).status, expected);
    };
    refuse(MMBAL_OK, nullptr);
    refuse(MMBAL_INVALID_ARGUMENT, [](auto &, auto &head) { head.C = 0; });
    refuse(MMBAL_INVALID_ARGUMENT, [](auto &, auto &head) { head.row_stride = 4; });
    refuse(MMBAL_INVALID_ARGUMENT, [](auto &, auto &head) { head.score = enum_of<mmbal_score>(2); });
    refuse(MMBAL_INVALID_ARGUMENT, [](auto &of, auto &) { of.B = -1; });
    refuse(MMBAL_INVALID_ARGUMENT, [](auto &of, auto &) { of.M = 0; });
    refuse(MMBAL_INVALID_ARGUMENT, [](auto &of, auto &) { of.target_rows = 2; });
    refuse(MMBAL_INVALID_ARGUMENT, [](auto &of, auto &) { of.options.eps = 1; });
    refuse(MMBAL_UNSUPPORTED, [](auto &of, auto &) { of.dtype = enum_of<mmbal_dtype>(9); });
    const mmbal_attributed one = {nullptr, good.e[0].data(), 1, nullptr, nullptr, nullptr, nullptr};
    const std::vector<mmbal_attributed> many(MMBAL_MAX_MODALITIES + 1, one);
    const mmbal_pool serial = mmbal_pool_serial();
    mmbal_attribution of = {many.data(), good.target.data(),       1,         nullptr,
                            3,           MMBAL_MAX_MODALITIES + 1, MMBAL_F32, DEFAULT};
    EXPECT_GE(mmbal_attribution_linear_workspace(&of, 4, &serial), 0); // does not write beyond its own tables
    refuse(MMBAL_INVALID_ARGUMENT, [&](auto &at, auto &) { at = of; });
    for (int64_t bad : {-1, 4}) {
        Linear<F32> p = good;
        p.classes = {0, 3, bad};
        EXPECT_EQ(p.run().status, MMBAL_INVALID_INDEX) << bad;
    }
    for (double bad : {-1.0, std::numeric_limits<double>::infinity(), std::numeric_limits<double>::quiet_NaN()}) {
        Linear<F32> p = good;
        p.target[5] = bad;
        EXPECT_EQ(p.run().status, MMBAL_INVALID_ARGUMENT) << bad;
    }
}

} // namespace
