#include "mmbal/expert_mlp.h"

#include <sstream>
#include <type_traits>

#include "expert_mlp_reference.h"

extern "C" {
#include "blocks.h"
#include "stream.h"
}

namespace {

using namespace mmbal_test;

constexpr int64_t LARGEST_OFFSET = (int64_t{1} << 56) - 1;

template <typename T>
void expect_forward(const Problem<T> &p, const Forward<T> &got) {
    const Spec &s = p.spec;
    ASSERT_EQ(got.status, MMBAL_OK);
    ASSERT_TRUE(got.intact) << "wrote outside an output or the workspace";
    const Reference<T> expected(p, got.preactivation);
    const double sums = static_cast<double>(s.D + s.F + s.K + 16) * 2 * T::real_error;
    expect_near<T>("preactivation", got.preactivation, expected.preactivation, sums + T::stored_error);
    expect_near<T>("y", got.y, expected.y, sums + 2 * T::stored_error); // a and y are stored
}

template <typename T>
void expect_backward(const Problem<T> &p, const std::vector<typename T::Stored> &u, const Backward<T> &got) {
    const Spec &s = p.spec;
    ASSERT_EQ(got.status, MMBAL_OK);
    ASSERT_TRUE(got.intact) << "wrote outside an output or the workspace";
    const Reference<T> expected(p, u);
    // 200: the slopes of the activations, see test_kernels.cc. Stored on the way: g, du or weights a, the gradient.
    const double relative = static_cast<double>(s.N * s.K + s.D + s.F + 200) * T::real_error + 3 * T::stored_error;
    expect_near<T>("dx", got.dx, expected.dx, relative);
    expect_near<T>("dw1", got.dw1, expected.dw1, relative);
    expect_near<T>("db1", got.db1, expected.db1, relative);
    expect_near<T>("dw2", got.dw2, expected.dw2, relative);
    expect_near<T>("db2", got.db2, expected.db2, relative);
    using RealOnly = std::conditional_t<T::dtype == MMBAL_F64, F64, F32>;
    expect_near<RealOnly>("dweights", got.dweights, expected.dweights, relative);
}

template <typename T>
void expect_both(const Spec &spec, uint64_t seed = 1) {
    std::ostringstream name;
    name << spec;
    SCOPED_TRACE(name.str());
    const Problem<T> problem(spec, seed);
    const Forward<T> forward = run_forward(problem);
    expect_forward(problem, forward);
    if (::testing::Test::HasFatalFailure()) return;
    expect_backward(problem, forward.preactivation, run_backward(problem, forward.preactivation));
}

template <typename T>
class ExpertMlp : public ::testing::Test {};
TYPED_TEST_SUITE(ExpertMlp, Dtypes, DtypeNames);

TYPED_TEST(ExpertMlp, FollowsItsFormulasForRandomShapes) {
    Random random(1);
    for (int round = 0; round < 40; round++) {
        Spec s;
        s.N = random.pick<int64_t>({0, 1, 2, 7, 33});
        s.D = random.pick<int64_t>({1, 3, 17, 65, 200, 300}), s.F = random.pick<int64_t>({1, 3, 17, 65, 200, 300});
        s.E = s.D * s.F < 5000 ? random.pick<int64_t>({1, 4, 64}) : random.pick<int64_t>({1, 3, 4});
        s.K = 1 + random.below(std::min<int64_t>(s.E, 3));
        s.activation = ACTIVATIONS[random.below(7)];
        s.b1 = random.below(3) != 0, s.b2 = random.below(3) != 0;
        s.dropout = random.pick<double>({0, 0, 0.1, 0.5}), s.output_dropout = random.pick<double>({0, 0, 0.1, 0.5});
        s.seed = static_cast<int64_t>(random.bits());
        s.offset = static_cast<int64_t>(random.bits() >> 8);
        if (random.below(5) == 0) s.only_expert = random.below(s.E);
        expect_both<TypeParam>(s, 100 + round);
        if (this->HasFatalFailure()) return;
    }
}

TYPED_TEST(ExpertMlp, FollowsItsFormulasForEveryActivation) {
    for (mmbal_activation activation : ACTIVATIONS) expect_both<TypeParam>({.activation = activation});
}

TYPED_TEST(ExpertMlp, FollowsItsFormulasAcrossBlockBorders) {
    // More rows of an expert, columns and depths than one block holds, and one beyond.
    expect_both<TypeParam>({.N = 113, .D = 193, .F = 33, .E = 1, .K = 1});
    expect_both<TypeParam>({.N = 150, .D = 20, .F = 257, .E = 2, .K = 2, .only_expert = 1});
    expect_both<TypeParam>({.N = 270, .D = 9, .F = 385, .E = 1, .K = 1, .dropout = 0.3, .output_dropout = 0.2});
    expect_both<TypeParam>({.N = 3, .D = 600, .F = 5, .E = 3, .K = 2, .dropout = 0.3, .output_dropout = 0.2});
    expect_both<TypeParam>({.N = 573, .D = 5, .F = 9, .E = 1, .K = 1});
    expect_both<TypeParam>({.N = 2, .D = 3, .F = 1100, .E = 1, .K = 1});
    expect_both<TypeParam>({.N = 129, .D = 202, .F = 70, .E = 1, .K = 1}); // too many rows to read weights in place
    expect_both<TypeParam>({.N = 530, .D = 40, .F = 600, .E = 1, .K = 1}); // steps and strips of weight gradients
}

TYPED_TEST(ExpertMlp, FollowsItsFormulasAcrossWavesOfExperts) {
    expect_both<TypeParam>({.N = 800, .D = 6, .F = 11, .E = 5, .K = 2, .dropout = 0.2, .output_dropout = 0.1});
    expect_both<TypeParam>({.N = 1100, .D = 3, .F = 4, .E = 3, .K = 1, .only_expert = 1});
}

TYPED_TEST(ExpertMlp, FollowsItsFormulasWhereManyExpertsHaveVeryFewRowsInWideBlocks) {
    expect_both<TypeParam>({.N = 23, .D = 67, .F = 1931, .E = 10, .K = 2});
    expect_both<TypeParam>({.N = 23, .D = 1931, .F = 67, .E = 10, .K = 2});
}

TYPED_TEST(ExpertMlp, FollowsItsFormulasWhenWeightsAreLargeEnoughToBypassTheCaches) {
    expect_both<TypeParam>({.N = 3, .D = 513, .F = 517, .E = 16, .K = 1});
    // One step of the rows, whole tiles around the caches; most experts have none.
    expect_both<TypeParam>({.N = 140, .D = 64, .F = 800, .E = 44, .K = 1, .only_expert = 3});
    // Two steps of the rows, and rows longer than a strip.
    expect_both<TypeParam>({.N = 530, .D = 300, .F = 200, .E = 75, .K = 1, .only_expert = 3});
}

TYPED_TEST(ExpertMlp, FollowsItsFormulasWhenThePreactivationIsLargeEnoughToBypassTheCaches) {
    const int64_t F = 1001, size = sizeof(typename TypeParam::Stored); // rows that begin anywhere in a line
    expect_both<TypeParam>({.N = STREAMED_BYTES / (F * size) + 1, .D = 2, .F = F, .E = 2, .K = 1});
}

TYPED_TEST(ExpertMlp, PackedWeightsGiveTheSameBits) {
    for (const Spec &s : {Spec{}, Spec{.N = 70, .D = 1, .F = 1}, Spec{.N = 30, .D = 600, .F = 259, .E = 3},
                          Spec{.N = 700, .D = 19, .F = 200, .E = 3, .K = 2},
                          Spec{.N = 200, .D = 1100, .F = 64, .E = 1, .K = 1}, // several steps of many rows
                          Spec{.N = 3, .D = 1100, .F = 1091, .E = 1, .K = 1}, // and of few
                          Spec{.N = 150, .D = 67, .F = 1091, .E = 1, .K = 1}}) {
        Problem<TypeParam> p(s);
        const mmbal_pool pool = mmbal_pool_serial();
        Guarded<unsigned char> packed(mmbal_expert_mlp_packed_bytes(TypeParam::dtype, s.shape()));
        ASSERT_EQ(mmbal_expert_mlp_pack(TypeParam::dtype, p.w1.data(), p.w2.data(), s.shape(), packed.data(), &pool),
                  MMBAL_OK);
        ASSERT_TRUE(packed.intact());
        const auto plain = run_forward(p);
        p.packed = packed.data();
        const int64_t least_right = sizeof p.w1[0] > 2 ? LEAST_RIGHT : LEAST_RIGHT_CONVERTED;
        bool themselves = false; // few rows that are the right factor read the weights themselves
        for (int64_t e = 0; e < s.E; e++) {
            const int64_t rows = p.offsets[e + 1] - p.offsets[e];
            themselves = themselves || (few_rows(rows) && rows >= least_right);
        }
        if (!themselves) { // nothing but the packed weights is read
            std::fill(p.w1.begin(), p.w1.end(), TypeParam::store(NAN));
            std::fill(p.w2.begin(), p.w2.end(), TypeParam::store(NAN));
        }
        for_each_pool([&](const std::string &name, const mmbal_pool &threads) {
            const auto got = run_forward(p, threads);
            EXPECT_EQ(got.status, MMBAL_OK);
            EXPECT_TRUE(same_bits(got.y, plain.y)) << name;
        });
    }
}

TYPED_TEST(ExpertMlp, FollowsItsFormulasWhenAllTokensGoToOneExpert) {
    for (int64_t expert : {0, 2, 4}) expect_both<TypeParam>({.N = 33, .E = 5, .K = 2, .only_expert = expert});
}

TYPED_TEST(ExpertMlp, FollowsItsFormulasForManyTinyExperts) {
    expect_both<TypeParam>({.N = 33, .D = 3, .F = 5, .E = 64, .K = 3});
    expect_both<TypeParam>({.N = 2, .D = 1, .F = 1, .E = 64, .K = 1});
}

TYPED_TEST(ExpertMlp, MasksFollowThePhiloxRuleForAnySeedAndOffset) {
    for (int64_t seed : {int64_t{0}, int64_t{-1}, int64_t{0x123456789abcdef0}, std::numeric_limits<int64_t>::min()}) {
        for (int64_t offset : {int64_t{0}, int64_t{1}, int64_t{1} << 32, (int64_t{1} << 55) + 5, LARGEST_OFFSET}) {
            for (double p : {0x1p-24, 0.25, 0.9}) {
                expect_both<TypeParam>(
                    {.N = 5, .D = 7, .F = 13, .dropout = p, .output_dropout = p, .seed = seed, .offset = offset});
                if (this->HasFatalFailure()) return;
            }
        }
    }
}

TYPED_TEST(ExpertMlp, HiddenMaskIsReadableInTheOutputOfAUnitMlp) {
    // x = w1 = 1 and w2 = unit vectors: y[n, f] is the mask itself, here exactly 0 or 2.
    Spec s = {.N = 40,
              .D = 6,
              .F = 6,
              .E = 1,
              .K = 1,
              .activation = MMBAL_IDENTITY,
              .dropout = 0.5,
              .seed = 77,
              .offset = 3,
              .b1 = false,
              .b2 = false};
    Problem<TypeParam> p(s);
    std::fill(p.x.begin(), p.x.end(), TypeParam::store(0));
    std::fill(p.w1.begin(), p.w1.end(), TypeParam::store(1));
    std::fill(p.w2.begin(), p.w2.end(), TypeParam::store(0));
    std::fill(p.weights.begin(), p.weights.end(), typename TypeParam::Real{1});
    for (int64_t n = 0; n < s.N; n++) p.x[n * s.D] = TypeParam::store(1);
    for (int64_t d = 0; d < s.D; d++) p.w2[d * s.F + d] = TypeParam::store(1);
    const auto got = run_forward(p);
    int64_t kept = 0;
    for (int64_t i = 0; i < s.N * s.F; i++) {
        ASSERT_EQ(TypeParam::load(got.y[i]), mask_of(s, 1, i)) << i;
        kept += TypeParam::load(got.y[i]) != 0;
    }
    EXPECT_GT(kept, 80);
    EXPECT_LT(kept, 160);
}

TYPED_TEST(ExpertMlp, SeedOffsetAndTensorGiveOtherMasks) {
    const Spec base = {.dropout = 0.5, .output_dropout = 0, .seed = 1, .offset = 1};
    const auto y = [](Spec s) { return run_forward(Problem<TypeParam>(s)).y; };
    const auto expected = y(base);
    EXPECT_TRUE(same_bits(expected, y(base)));
    Spec other = base;
    other.seed = 2;
    EXPECT_FALSE(same_bits(expected, y(other)));
    other = base, other.offset = 2;
    EXPECT_FALSE(same_bits(expected, y(other)));
    other = base, std::swap(other.dropout, other.output_dropout);
    EXPECT_FALSE(same_bits(expected, y(other)));
}

// Alone they are passes of their own; together, with many rows an expert, some are taken in one.
TYPED_TEST(ExpertMlp, GradientAskedForAloneEqualsTheOneAskedForWithAllOthers) {
    const Spec few = {.N = 33, .D = 65, .F = 200, .E = 3, .activation = MMBAL_GELU};
    // In one step of the rows (the second time with whole tiles, on cache lines), and in two of them.
    const Spec many = {.N = 400, .D = 33, .F = 800, .E = 2, .K = 1, .activation = MMBAL_GELU};
    const Spec whole = {.N = 400, .D = 64, .F = 800, .E = 2, .K = 1, .activation = MMBAL_GELU};
    const Spec two_steps = {.N = 1157, .D = 33, .F = 800, .E = 1, .K = 1, .activation = MMBAL_GELU};
    for (auto [shape, dropout] :
         {std::pair{few, 0.0}, {few, 0.3}, {many, 0.0}, {many, 0.3}, {whole, 0.0}, {two_steps, 0.0}}) {
        Spec s = shape;
        s.dropout = s.output_dropout = dropout;
        const Problem<TypeParam> p(s);
        const auto u = run_forward(p).preactivation;
        const auto all = run_backward(p, u);
        ASSERT_EQ(all.status, MMBAL_OK);
        for (int wanted : {DX, DW1, DB1, DW2, DB2, DWEIGHTS}) {
            const auto alone = run_backward(p, u, mmbal_pool_serial(), wanted);
            ASSERT_EQ(alone.status, MMBAL_OK);
            EXPECT_TRUE(alone.intact);
            EXPECT_EQ(same_bits(alone.dx, all.dx), wanted == DX);
            EXPECT_EQ(same_bits(alone.dw1, all.dw1), wanted == DW1);
            EXPECT_EQ(same_bits(alone.db1, all.db1), wanted == DB1);
            EXPECT_EQ(same_bits(alone.dw2, all.dw2), wanted == DW2);
            EXPECT_EQ(same_bits(alone.db2, all.db2), wanted == DB2);
            EXPECT_EQ(same_bits(alone.dweights, all.dweights), wanted == DWEIGHTS);
        }
        const auto but_dw2 = run_backward(p, u, mmbal_pool_serial(), ALL_GRADIENTS & ~DW2);
        EXPECT_TRUE(same_bits(but_dw2.dx, all.dx) && same_bits(but_dw2.dweights, all.dweights));
        const auto none = run_backward(p, u, mmbal_pool_serial(), 0);
        EXPECT_EQ(none.status, MMBAL_OK);
        EXPECT_TRUE(none.untouched);
    }
}

template <typename T>
void expect_same(const Backward<T> &a, const Backward<T> &b, const std::string &name) {
    EXPECT_EQ(a.status, b.status) << name;
    EXPECT_TRUE(a.intact && b.intact) << name;
    EXPECT_TRUE(same_bits(a.dx, b.dx)) << name;
    EXPECT_TRUE(same_bits(a.dw1, b.dw1)) << name;
    EXPECT_TRUE(same_bits(a.db1, b.db1)) << name;
    EXPECT_TRUE(same_bits(a.dw2, b.dw2)) << name;
    EXPECT_TRUE(same_bits(a.db2, b.db2)) << name;
    EXPECT_TRUE(same_bits(a.dweights, b.dweights)) << name;
}

TYPED_TEST(ExpertMlp, SameBitsWithAnyPool) {
    const Spec specs[] = {{.N = 40, .D = 65, .F = 300, .E = 3, .dropout = 0.3, .output_dropout = 0.2},
                          {.N = 130, .D = 200, .F = 17, .E = 4, .activation = MMBAL_GELU},
                          {.N = 33, .D = 3, .F = 5, .E = 64, .K = 3},
                          // Few rows in wide blocks, of which every number of workers has others.
                          {.N = 60, .D = 1030, .F = 400, .E = 2, .K = 1},
                          // Other waves of experts with every number of workers.
                          {.N = 1300, .D = 5, .F = 7, .E = 6, .K = 2},
                          // The highest blocks that there are, for one worker and not for five.
                          {.N = 2238, .D = 200, .F = 200, .E = 1, .K = 1},
                          // Waves with many rows an expert alone, and others, by the number of workers.
                          {.N = 2170, .D = 30, .F = 800, .E = 8, .K = 1}};
    for (const Spec &s : specs) {
        Problem<TypeParam> p(s);
        if (s.E == 8) p.route({40, 400, 400, 300, 30, 600, 200, 200});
        const auto forward = run_forward(p);
        const auto backward = run_backward(p, forward.preactivation);
        ASSERT_EQ(forward.status, MMBAL_OK);
        ASSERT_EQ(backward.status, MMBAL_OK);
        for_each_pool([&](const std::string &name, const mmbal_pool &pool) {
            const auto got = run_forward(p, pool);
            EXPECT_EQ(got.status, MMBAL_OK);
            EXPECT_TRUE(got.intact);
            EXPECT_TRUE(same_bits(got.y, forward.y)) << name;
            EXPECT_TRUE(same_bits(got.preactivation, forward.preactivation)) << name;
            expect_same(run_backward(p, forward.preactivation, pool), backward, name);
        });
    }
}

// Few rows take other ways through a product than many; what a token gets must not tell which.
TYPED_TEST(ExpertMlp, TokensHaveTheSameBitsHoweverManyOthersTheirExpertHas) {
    for (double dropout : {0.0, 0.3}) {
        const Spec all = {.N = 300, .D = 66, .F = 1100, .E = 1, .K = 1, .dropout = dropout, .output_dropout = dropout};
        const Problem<TypeParam> many(all);
        const auto forward = run_forward(many);
        const auto backward = run_backward(many, forward.preactivation);
        for (int64_t rows : {1, 8, 9, 16, 17, 32, 33, 64, 127, 128, 129}) {
            Spec s = all;
            s.N = rows;
            Problem<TypeParam> few(s);
            few.w1 = many.w1, few.b1 = many.b1, few.w2 = many.w2, few.b2 = many.b2;
            const auto begin_of = [](const auto &values, int64_t count) {
                return std::decay_t<decltype(values)>(values.begin(), values.begin() + count);
            };
            few.x = begin_of(many.x, rows * s.D), few.dy = begin_of(many.dy, rows * s.D);
            few.weights = begin_of(many.weights, rows);
            const auto got = run_forward(few);
            ASSERT_EQ(got.status, MMBAL_OK);
            EXPECT_TRUE(got.intact) << rows;
            EXPECT_TRUE(same_bits(got.y, begin_of(forward.y, rows * s.D))) << rows;
            EXPECT_TRUE(same_bits(got.preactivation, begin_of(forward.preactivation, rows * s.F))) << rows;
            const auto gradients = run_backward(few, got.preactivation);
            EXPECT_TRUE(gradients.intact) << rows;
            EXPECT_TRUE(same_bits(gradients.dx, begin_of(backward.dx, rows * s.D))) << rows;
            EXPECT_TRUE(same_bits(gradients.dweights, begin_of(backward.dweights, rows))) << rows;
        }
    }
}

TYPED_TEST(ExpertMlp, WorkspaceMayStartAtAnyByte) {
    const Problem<TypeParam> p({.N = 7, .D = 17, .F = 65, .dropout = 0.3, .output_dropout = 0.2});
    const auto forward = run_forward(p);
    const auto backward = run_backward(p, forward.preactivation);
    PthreadPool threads(2);
    for (int64_t misaligned : {1, 2, 7, 31, 63}) {
        const auto got = run_forward(p, threads.pool(), misaligned);
        EXPECT_EQ(got.status, MMBAL_OK);
        EXPECT_TRUE(got.intact) << misaligned;
        EXPECT_TRUE(same_bits(got.y, forward.y)) << misaligned;
        expect_same(run_backward(p, forward.preactivation, threads.pool(), ALL_GRADIENTS, misaligned), backward,
                    std::to_string(misaligned));
    }
}

// One of these places is on a cache line, where whole tiles are stored without a copy, the second shape's around the
// caches.
TYPED_TEST(ExpertMlp, GradientsOfWeightsMayLieAnywhere) {
    for (const Spec &s : {Spec{.N = 9, .D = 64, .F = 96}, Spec{.N = 5, .D = 512, .F = 1056, .E = 4, .K = 1}}) {
        const Problem<TypeParam> p(s);
        const auto forward = run_forward(p);
        const auto first = run_backward(p, forward.preactivation, mmbal_pool_serial(), ALL_GRADIENTS, 0, 8);
        for (int64_t misaligned : {0, 16, 32, 48})
            expect_same(run_backward(p, forward.preactivation, mmbal_pool_serial(), ALL_GRADIENTS, 0, misaligned),
                        first, std::to_string(misaligned));
    }
}

TYPED_TEST(ExpertMlp, ExpertWithoutRowsGetsExactZeroGradients) {
    const Spec s = {.N = 9, .D = 33, .F = 20, .E = 4, .K = 1, .only_expert = 2};
    const Problem<TypeParam> p(s);
    const auto got = run_backward(p, run_forward(p).preactivation);
    const auto of_expert = [&](const std::vector<typename TypeParam::Stored> &gradient, int64_t e) {
        const auto size = static_cast<int64_t>(gradient.size()) / s.E;
        double largest = 0;
        for (int64_t i = e * size; i < (e + 1) * size; i++) {
            const double value = TypeParam::load(gradient[i]);
            if (!(std::fabs(value) <= largest)) largest = std::fabs(value);
        }
        return largest;
    };
    for (const auto *gradient : {&got.dw1, &got.db1, &got.dw2, &got.db2})
        for (int64_t e = 0; e < s.E; e++) EXPECT_EQ(of_expert(*gradient, e) == 0, e != s.only_expert) << e;
}

TYPED_TEST(ExpertMlp, NoTokensGiveZeroGradientsAndNothingElse) {
    const Problem<TypeParam> p({.N = 0, .D = 17, .F = 5, .E = 3, .K = 2, .dropout = 0.1, .output_dropout = 0.1});
    const auto forward = run_forward(p);
    EXPECT_EQ(forward.status, MMBAL_OK);
    EXPECT_TRUE(forward.intact);
    const auto got = run_backward(p, forward.preactivation);
    EXPECT_EQ(got.status, MMBAL_OK);
    EXPECT_TRUE(got.intact);
    for (const auto *gradient : {&got.dw1, &got.db1, &got.dw2, &got.db2}) {
        ASSERT_FALSE(gradient->empty());
        for (auto value : *gradient) ASSERT_EQ(TypeParam::load(value), 0);
    }
}

TYPED_TEST(ExpertMlp, MissingBiasEqualsAZeroBias) {
    Spec s = {.N = 7, .D = 17, .F = 20, .b1 = false, .b2 = false};
    const Problem<TypeParam> without(s);
    s.b1 = s.b2 = true;
    Problem<TypeParam> zero(s);
    std::fill(zero.b1.begin(), zero.b1.end(), TypeParam::store(0));
    std::fill(zero.b2.begin(), zero.b2.end(), TypeParam::store(0));
    const auto a = run_forward(without), b = run_forward(zero);
    for (size_t i = 0; i < a.y.size(); i++) ASSERT_EQ(TypeParam::load(a.y[i]), TypeParam::load(b.y[i])) << i;
    const auto da = run_backward(without, a.preactivation), db = run_backward(zero, a.preactivation);
    EXPECT_EQ(da.dweights, db.dweights);
}

TYPED_TEST(ExpertMlp, BackwardDoesNotNeedTheFirstBias) {
    Spec s = {.N = 7, .D = 17, .F = 20};
    Problem<TypeParam> p(s);
    const auto u = run_forward(p).preactivation;
    const auto with = run_backward(p, u);
    p.spec.b1 = false;
    expect_same(run_backward(p, u), with, "without b1");
}

TYPED_TEST(ExpertMlp, OutputIsTheSameWhenPreactivationIsNotKept) {
    const Problem<TypeParam> p({.N = 33, .D = 17, .F = 65, .dropout = 0.2});
    const auto kept = run_forward(p);
    const mmbal_expert_mlp_inputs inputs = p.inputs();
    const mmbal_expert_mlp_options options = p.spec.options();
    const mmbal_pool pool = mmbal_pool_serial();
    Guarded<typename TypeParam::Stored> y(p.spec.N * p.spec.D);
    Guarded<unsigned char> workspace(
        mmbal_expert_mlp_workspace(TypeParam::dtype, p.spec.shape(), p.offsets.data(), pool.workers));
    ASSERT_EQ(mmbal_expert_mlp(TypeParam::dtype, &inputs, p.spec.shape(), &options, y.data(), nullptr, workspace.data(),
                               &pool),
              MMBAL_OK);
    EXPECT_TRUE(y.intact() && workspace.intact());
    EXPECT_TRUE(same_bits(y.values(), kept.y));
}

TYPED_TEST(ExpertMlp, NanOfOneTokenStaysInItsOutputAndItsInputGradient) {
    const Spec s = {.N = 33, .D = 17, .F = 20};
    Problem<TypeParam> p(s);
    const int64_t bad = 11;
    p.x[bad * s.D + 3] = TypeParam::store(NAN);
    const auto forward = run_forward(p);
    const auto backward = run_backward(p, forward.preactivation, mmbal_pool_serial(), DX);
    for (int64_t n = 0; n < s.N; n++) {
        for (int64_t d = 0; d < s.D; d++) {
            ASSERT_EQ(std::isnan(TypeParam::load(forward.y[n * s.D + d])), n == bad) << n << ", " << d;
            ASSERT_EQ(std::isnan(TypeParam::load(backward.dx[n * s.D + d])), n == bad) << n << ", " << d;
        }
    }
}

TYPED_TEST(ExpertMlp, RowsOfATokenDoNotDependOnTheOtherTokens) {
    // The same token alone and among others: tiles differ, and whether weights are packed; the order of sums does not.
    for (const Spec &s :
         {Spec{.N = 200, .D = 65, .F = 40, .E = 1, .K = 1}, Spec{.N = 200, .D = 200, .F = 300, .E = 1, .K = 1}}) {
        const Problem<TypeParam> many(s);
        const auto all = run_forward(many);
        const auto all_gradients = run_backward(many, all.preactivation);
        for (int64_t n : {0, 5, 199}) {
            Problem<TypeParam> one(s);
            one.spec.N = 1, one.x = {many.x.begin() + n * s.D, many.x.begin() + (n + 1) * s.D};
            one.weights = {many.weights[n]}, one.permutation = {0}, one.inverse = {0}, one.offsets = {0, 1};
            const auto alone = run_forward(one);
            ASSERT_EQ(alone.status, MMBAL_OK);
            EXPECT_TRUE(same_bits(alone.y, {all.y.begin() + n * s.D, all.y.begin() + (n + 1) * s.D})) << n;
            one.dy = {many.dy.begin() + n * s.D, many.dy.begin() + (n + 1) * s.D};
            const auto gradients = run_backward(one, alone.preactivation);
            ASSERT_EQ(gradients.status, MMBAL_OK);
            EXPECT_TRUE(
                same_bits(gradients.dx, {all_gradients.dx.begin() + n * s.D, all_gradients.dx.begin() + (n + 1) * s.D}))
                << n;
        }
    }
}

TEST(ExpertMlpBackward, IsTheDerivativeOfTheForward) {
    for (mmbal_activation activation : {MMBAL_QUICK_GELU, MMBAL_GELU, MMBAL_GELU_TANH, MMBAL_SILU}) {
        const Problem<F64> p({.N = 5,
                              .D = 4,
                              .F = 6,
                              .E = 3,
                              .activation = activation,
                              .dropout = 0.3,
                              .output_dropout = 0.2,
                              .seed = 9});
        const auto loss = [](const Problem<F64> &at) {
            const auto y = run_forward(at).y;
            double sum = 0;
            for (size_t i = 0; i < y.size(); i++) sum += y[i] * at.dy[i];
            return sum;
        };
        const auto gradients = run_backward(p, run_forward(p).preactivation);
        const auto expect_slopes = [&](std::vector<double> Problem<F64>::*input, const std::vector<double> &gradient,
                                       const char *name) {
            ASSERT_EQ(gradient.size(), (p.*input).size());
            const double step = 1e-5;
            for (size_t i = 0; i < gradient.size(); i++) {
                Problem<F64> above = p, below = p;
                (above.*input)[i] += step, (below.*input)[i] -= step;
                ASSERT_NEAR(gradient[i], (loss(above) - loss(below)) / (2 * step), 2e-8) << name << " " << i;
            }
        };
        expect_slopes(&Problem<F64>::x, gradients.dx, "x");
        expect_slopes(&Problem<F64>::w1, gradients.dw1, "w1");
        expect_slopes(&Problem<F64>::b1, gradients.db1, "b1");
        expect_slopes(&Problem<F64>::w2, gradients.dw2, "w2");
        expect_slopes(&Problem<F64>::b2, gradients.db2, "b2");
        expect_slopes(&Problem<F64>::weights, gradients.dweights, "weights");
    }
}

// Status of forward and backward for a problem with something wrong; neither may write anything.
template <typename T>
std::vector<mmbal_status> statuses(const Problem<T> &p, const Spec &spec, int workers = 1) {
    Guarded<typename T::Stored> y(p.spec.N * p.spec.D), dx(p.spec.N * p.spec.D);
    const std::vector<typename T::Stored> u(p.spec.N * p.spec.K * p.spec.F);
    std::vector<unsigned char> workspace(
        mmbal_expert_mlp_backward_workspace(T::dtype, p.spec.shape(), p.offsets.data(), 1));
    const mmbal_expert_mlp_inputs inputs = p.inputs();
    const mmbal_expert_mlp_options options = spec.options();
    const mmbal_expert_mlp_gradients gradients = {dx.data(), nullptr, nullptr, nullptr, nullptr, nullptr};
    mmbal_pool pool = mmbal_pool_serial();
    pool.workers = workers;
    const std::vector<mmbal_status> found = {
        mmbal_expert_mlp(T::dtype, &inputs, spec.shape(), &options, y.data(), nullptr, workspace.data(), &pool),
        mmbal_expert_mlp_backward(T::dtype, p.dy.data(), &inputs, u.data(), spec.shape(), &options, &gradients,
                                  workspace.data(), &pool)};
    EXPECT_TRUE(y.untouched() && dx.untouched()) << "an error is raised before any work";
    return found;
}

TYPED_TEST(ExpertMlp, RefusesShapesAndOptionsOutsideTheContract) {
    const Problem<TypeParam> p({.N = 3, .D = 4, .F = 5});
    const std::vector<mmbal_status> refused(2, MMBAL_INVALID_ARGUMENT);
    const auto with = [&](auto change) {
        Spec spec = p.spec;
        change(spec);
        return statuses(p, spec);
    };
    EXPECT_EQ(with([](Spec &s) { s.N = -1; }), refused);
    EXPECT_EQ(with([](Spec &s) { s.D = 0; }), refused);
    EXPECT_EQ(with([](Spec &s) { s.F = 0; }), refused);
    EXPECT_EQ(with([](Spec &s) { s.E = 0; }), refused);
    EXPECT_EQ(with([](Spec &s) { s.K = 0; }), refused);
    for (double dropout : {1.0, 1.5, -0.1, static_cast<double>(NAN), static_cast<double>(INFINITY)}) {
        EXPECT_EQ(with([=](Spec &s) { s.dropout = dropout; }), refused) << dropout;
        EXPECT_EQ(with([=](Spec &s) { s.output_dropout = dropout; }), refused) << dropout;
    }
    for (int64_t offset : {int64_t{-1}, LARGEST_OFFSET + 1, std::numeric_limits<int64_t>::max()})
        EXPECT_EQ(with([=](Spec &s) { s.offset = offset; }), refused) << offset;
    for (int value : {-1, 7, 99})
        EXPECT_EQ(with([=](Spec &s) { s.activation = enum_of<mmbal_activation>(value); }), refused) << value;
    EXPECT_EQ(statuses(p, p.spec, 0), refused) << "a pool without workers";
}

TYPED_TEST(ExpertMlp, RefusesRoutesThatDoNotBelongTogether) {
    const Problem<TypeParam> good({.N = 6, .D = 4, .F = 5});
    const std::vector<mmbal_status> refused(2, MMBAL_INVALID_INDEX);
    Problem<TypeParam> bad = good;
    bad.permutation[3] = 12;
    EXPECT_EQ(statuses(bad, bad.spec), refused);
    bad = good, bad.permutation[3] = -1;
    EXPECT_EQ(statuses(bad, bad.spec), refused);
    bad = good, std::swap(bad.inverse[0], bad.inverse[5]);
    EXPECT_EQ(statuses(bad, bad.spec), refused);
    bad = good, bad.offsets[0] = 1;
    EXPECT_EQ(statuses(bad, bad.spec), refused);
    bad = good, bad.offsets[4] = 13;
    EXPECT_EQ(statuses(bad, bad.spec), refused);
    bad = good, bad.offsets[2] = 100;
    EXPECT_EQ(statuses(bad, bad.spec), refused);
}

TEST(ExpertMlpStatus, UnknownDtypeIsUnsupportedAndNeedsNoWorkspace) {
    const Problem<F64> p({.N = 2, .D = 3, .F = 4});
    const mmbal_expert_mlp_inputs inputs = p.inputs();
    const mmbal_expert_mlp_options options = p.spec.options();
    const mmbal_pool pool = mmbal_pool_serial();
    const mmbal_expert_mlp_gradients none = {};
    for (int value : {4, -1, 99}) {
        const auto dtype = enum_of<mmbal_dtype>(value);
        Guarded<double> y(6);
        EXPECT_EQ(mmbal_expert_mlp_workspace(dtype, p.spec.shape(), p.offsets.data(), 1), 0);
        EXPECT_EQ(mmbal_expert_mlp_backward_workspace(dtype, p.spec.shape(), p.offsets.data(), 1), 0);
        EXPECT_EQ(mmbal_expert_mlp_packed_bytes(dtype, p.spec.shape()), 0);
        EXPECT_EQ(mmbal_expert_mlp_pack(dtype, p.w1.data(), p.w2.data(), p.spec.shape(), y.data(), &pool),
                  MMBAL_UNSUPPORTED);
        EXPECT_EQ(mmbal_expert_mlp(dtype, &inputs, p.spec.shape(), &options, y.data(), nullptr, nullptr, &pool),
                  MMBAL_UNSUPPORTED);
        EXPECT_EQ(mmbal_expert_mlp_backward(dtype, p.dy.data(), &inputs, p.x.data(), p.spec.shape(), &options, &none,
                                            nullptr, &pool),
                  MMBAL_UNSUPPORTED);
        EXPECT_TRUE(y.untouched());
    }
}

TEST(ExpertMlpStatus, StatusOfEveryRunOfThePoolIsReturned) {
    const Problem<F32> p({.N = 3, .D = 4, .F = 5, .output_dropout = 0.1});
    FailingPool never(-1), never_backward(-1);
    const auto u = run_forward(p, never.pool()).preactivation;
    run_backward(p, u, never_backward.pool());
    ASSERT_GT(never.runs(), 0);
    ASSERT_GT(never_backward.runs(), 0);
    for (int run = 0; run < never.runs(); run++) {
        FailingPool failing(run);
        EXPECT_EQ(run_forward(p, failing.pool()).status, MMBAL_UNSUPPORTED) << run;
        EXPECT_EQ(failing.runs(), run + 1) << "nothing is started after a failure";
    }
    for (int run = 0; run < never_backward.runs(); run++) {
        FailingPool failing(run);
        EXPECT_EQ(run_backward(p, u, failing.pool()).status, MMBAL_UNSUPPORTED) << run;
        EXPECT_EQ(failing.runs(), run + 1) << "nothing is started after a failure";
    }
}

TEST(ActivationFromName, MapsEveryName) {
    const char *const names[] = {"quick_gelu", "gelu", "gelu_tanh", "relu", "relu2", "silu", "identity"};
    for (int i = 0; i < 7; i++) {
        mmbal_activation found = ACTIVATIONS[(i + 1) % 7];
        EXPECT_EQ(mmbal_activation_from_name(names[i], &found), 1) << names[i];
        EXPECT_EQ(found, ACTIVATIONS[i]) << names[i];
    }
}

TEST(ActivationFromName, RefusesOtherNames) {
    for (const char *name : {"", "GELU", "gelu_", "quick", "swish", " relu"}) {
        mmbal_activation found = MMBAL_SILU;
        EXPECT_EQ(mmbal_activation_from_name(name, &found), 0) << name;
    }
}

} // namespace
