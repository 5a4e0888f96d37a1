// Every instruction set that this machine can run, against loops in double and against the portable kernels.
#include "activations.h"
#include "helpers.h"
#include "mmbal/cpu.h"

extern "C" {
#include "bfloat16.h"
#include "kernels.h"
}

namespace {

using mmbal_test::Random;
using mmbal_test::same_bits;

// The same calls for float and for double. Bounds in half units in the last place of 1: an activation's value errs by
// at most value_error |u|, its slope by slope_error. Measured on x86-64 over [-100, 100]: 2.22 (quick_gelu at u = 1.2,
// gelu_tanh and silu nearly so, gelu 1.68) and 33 (gelu_tanh at u = 5); in float64 2.2 and 86. The others round once.
template <typename Real>
struct Kernels;

template <>
struct Kernels<float> {
    const mmbal_kernels *table;
    int rows() const { return table->tile_rows_f32; }
    int cols() const { return table->tile_cols_f32; }
    void tile(int64_t depth, const float *a, const float *b, float *c, int64_t stride) const {
        table->tile_f32(depth, a, b, c, stride);
    }
    void activate(mmbal_activation which, int64_t n, const float *u, float *value, float *slope) const {
        table->activate_f32(which, n, u, value, slope);
    }
    static constexpr double half_ulp = 0x1p-24, value_error = 2.5, slope_error = 35;
};

template <>
struct Kernels<double> {
    const mmbal_kernels *table;
    int rows() const { return table->tile_rows_f64; }
    int cols() const { return table->tile_cols_f64; }
    void tile(int64_t depth, const double *a, const double *b, double *c, int64_t stride) const {
        table->tile_f64(depth, a, b, c, stride);
    }
    void activate(mmbal_activation which, int64_t n, const double *u, double *value, double *slope) const {
        table->activate_f64(which, n, u, value, slope);
    }
    static constexpr double half_ulp = 0x1p-53, value_error = 5, slope_error = 180; // half of it the reference's own
};

template <typename Real>
std::vector<Real> numbers(Random &random, int64_t count) {
    std::vector<Real> values(count);
    for (auto &value : values) value = static_cast<Real>(random.uniform(-1, 1));
    return values;
}

class EveryIsa : public ::testing::TestWithParam<mmbal_isa> {
protected:
    void SetUp() override {
        if (GetParam() == MMBAL_ISA_AVX2 && !(mmbal_cpu_features() & MMBAL_CPU_AVX2_FMA)) GTEST_SKIP() << "no AVX2";
        if (GetParam() == MMBAL_ISA_AVX512 && !(mmbal_cpu_features() & MMBAL_CPU_AVX512)) GTEST_SKIP() << "no AVX-512";
        ASSERT_NE(mmbal_kernels_of(GetParam()), nullptr);
    }
    const mmbal_kernels *table() const { return mmbal_kernels_of(GetParam()); }
};

// c += a b for one tile, with c inside a larger matrix; a and b exactly as large as promised.
template <typename Real>
void expect_tile_product(Kernels<Real> kernels, int64_t depth, uint64_t seed) {
    Random random(seed);
    const int rows = kernels.rows(), cols = kernels.cols(), stride = cols + 3;
    const auto a = numbers<Real>(random, depth * rows), b = numbers<Real>(random, depth * cols);
    const auto before = numbers<Real>(random, rows * stride);
    auto c = before;
    c.resize((rows - 1) * stride + cols); // nothing behind the last element of the tile
    kernels.tile(depth, a.data(), b.data(), c.data(), stride);
    for (int i = 0; i < rows; i++) {
        for (int j = 0; j < (i + 1 < rows ? stride : cols); j++) {
            double sum = before[i * stride + j], magnitude = std::fabs(sum);
            for (int64_t d = 0; d < depth && j < cols; d++) {
                const double term = static_cast<double>(a[d * rows + i]) * static_cast<double>(b[d * cols + j]);
                sum += term, magnitude += std::fabs(term);
            }
            const double bound = depth == 0 || j >= cols ? 0 : 2 * (depth + 2) * kernels.half_ulp * magnitude;
            ASSERT_LE(std::fabs(c[i * stride + j] - sum), bound) << "depth " << depth << " at " << i << ", " << j;
        }
    }
}

TEST_P(EveryIsa, TileProductIsThatOfThePlainLoopAtEveryDepth) {
    for (int64_t depth = 0; depth <= 70; depth++) {
        expect_tile_product(Kernels<float>{table()}, depth, 100 + depth);
        expect_tile_product(Kernels<double>{table()}, depth, 200 + depth);
    }
    for (int64_t depth : {255, 256, 257, 1000, 4099}) {
        expect_tile_product(Kernels<float>{table()}, depth, depth);
        expect_tile_product(Kernels<double>{table()}, depth, depth);
    }
}

// The product of two matrices, tile by tile; rows and cols are multiples of every tile.
template <typename Real>
std::vector<Real> product(Kernels<Real> kernels, const std::vector<Real> &a, const std::vector<Real> &b, int64_t rows,
                          int64_t cols, int64_t depth) {
    std::vector<Real> c(rows * cols), panel_a(depth * kernels.rows()), panel_b(depth * kernels.cols());
    for (int64_t i = 0; i < rows; i += kernels.rows()) {
        for (int64_t j = 0; j < cols; j += kernels.cols()) {
            for (int64_t d = 0; d < depth; d++) {
                for (int k = 0; k < kernels.rows(); k++) panel_a[d * kernels.rows() + k] = a[(i + k) * depth + d];
                for (int k = 0; k < kernels.cols(); k++) panel_b[d * kernels.cols() + k] = b[(j + k) * depth + d];
            }
            kernels.tile(depth, panel_a.data(), panel_b.data(), c.data() + i * cols + j, cols);
        }
    }
    return c;
}

template <typename Real>
void expect_product_as_portable(Kernels<Real> kernels) {
    const Kernels<Real> portable{mmbal_kernels_of(MMBAL_ISA_PORTABLE)};
    const int64_t rows = 84, cols = 64, depth = 301; // 84: whole tiles of 4, 6 and 14 rows
    ASSERT_EQ(rows % kernels.rows(), 0);
    ASSERT_EQ(cols % kernels.cols(), 0);
    Random random(7);
    const auto a = numbers<Real>(random, rows * depth), b = numbers<Real>(random, cols * depth);
    const auto mine = product(kernels, a, b, rows, cols, depth), plain = product(portable, a, b, rows, cols, depth);
    for (size_t i = 0; i < mine.size(); i++)
        ASSERT_LE(std::fabs(mine[i] - plain[i]), 2 * depth * depth * kernels.half_ulp / 4) << i;
}

TEST_P(EveryIsa, TileProductIsThatOfThePortableKernels) {
    expect_product_as_portable(Kernels<float>{table()});
    expect_product_as_portable(Kernels<double>{table()});
}

template <typename Real>
void expect_split_sum_is_the_whole_sum(Kernels<Real> kernels) {
    Random random(8);
    const int rows = kernels.rows(), cols = kernels.cols();
    const int64_t depth = 100;
    const auto a = numbers<Real>(random, depth * rows), b = numbers<Real>(random, depth * cols);
    std::vector<Real> whole(rows * cols);
    kernels.tile(depth, a.data(), b.data(), whole.data(), cols);
    for (int64_t cut : {0, 1, 37, 64, 99, 100}) {
        std::vector<Real> parts(rows * cols);
        kernels.tile(cut, a.data(), b.data(), parts.data(), cols);
        kernels.tile(depth - cut, a.data() + cut * rows, b.data() + cut * cols, parts.data(), cols);
        EXPECT_TRUE(same_bits(whole, parts)) << cut;
    }
}

TEST_P(EveryIsa, TileSumRunsInTheOrderOfDepth) {
    expect_split_sum_is_the_whole_sum(Kernels<float>{table()});
    expect_split_sum_is_the_whole_sum(Kernels<double>{table()});
}

template <typename Real>
void expect_same_bits_at_any_address(Kernels<Real> kernels) {
    Random random(9);
    const int rows = kernels.rows(), cols = kernels.cols();
    const int64_t depth = 33;
    const auto a = numbers<Real>(random, depth * rows), b = numbers<Real>(random, depth * cols);
    std::vector<Real> first(rows * cols);
    kernels.tile(depth, a.data(), b.data(), first.data(), cols);
    for (int shift = 1; shift < 16; shift++) {
        std::vector<Real> moved_a(shift, NAN), moved_b(shift, NAN), c(shift + rows * cols);
        moved_a.insert(moved_a.end(), a.begin(), a.end());
        moved_b.insert(moved_b.end(), b.begin(), b.end());
        kernels.tile(depth, moved_a.data() + shift, moved_b.data() + shift, c.data() + shift, cols);
        EXPECT_TRUE(same_bits(first, std::vector<Real>(c.begin() + shift, c.end()))) << shift;
    }
}

TEST_P(EveryIsa, TileProductDoesNotDependOnAddresses) {
    expect_same_bits_at_any_address(Kernels<float>{table()});
    expect_same_bits_at_any_address(Kernels<double>{table()});
}

TEST_P(EveryIsa, EqualRowsOfATileGetEqualBits) {
    const Kernels<float> kernels{table()};
    Random random(10);
    const int rows = kernels.rows(), cols = kernels.cols();
    const auto row = numbers<float>(random, 50), b = numbers<float>(random, 50 * cols);
    std::vector<float> a, c(rows * cols);
    for (float value : row) a.insert(a.end(), rows, value);
    kernels.tile(50, a.data(), b.data(), c.data(), cols);
    for (int i = 1; i < rows; i++)
        for (int j = 0; j < cols; j++) ASSERT_EQ(c[i * cols + j], c[j]) << i << ", " << j;
}

TEST_P(EveryIsa, NanAndInfinityOfOneRowStayInItsRow) {
    const Kernels<float> kernels{table()};
    const int rows = kernels.rows(), cols = kernels.cols();
    for (float poison : {NAN, INFINITY}) {
        for (int bad = 0; bad < rows; bad++) {
            std::vector<float> a(3 * rows, 1), b(3 * cols, 1), c(rows * cols);
            a[1 * rows + bad] = poison;
            kernels.tile(3, a.data(), b.data(), c.data(), cols);
            for (int i = 0; i < rows; i++)
                for (int j = 0; j < cols; j++) ASSERT_EQ(std::isfinite(c[i * cols + j]), i != bad) << i << ", " << j;
        }
    }
}

// A grid over [-100, 100] that no power of two divides, and powers of two down to the subnormal numbers.
template <typename Real>
std::vector<Real> activation_grid() {
    std::vector<Real> grid = {0, static_cast<Real>(-0.0)};
    for (double u = -100; u <= 100; u += 1.0009 / 512) grid.push_back(static_cast<Real>(u));
    for (int exponent = -130; exponent < 7; exponent++) {
        for (double fraction : {1.0, 1.17, 1.37, 1.77}) {
            const double u = std::ldexp(fraction, exponent);
            if (u <= 100) grid.push_back(static_cast<Real>(u)), grid.push_back(static_cast<Real>(-u));
        }
    }
    return grid;
}

template <typename Real>
void expect_activations_follow_their_formulas(Kernels<Real> kernels) {
    const auto grid = activation_grid<Real>();
    const double smallest = std::numeric_limits<float>::denorm_min();
    for (mmbal_activation which : mmbal_test::ACTIVATIONS) {
        const bool exact = which == MMBAL_RELU || which == MMBAL_RELU2 || which == MMBAL_IDENTITY;
        std::vector<Real> value(grid.size()), slope(grid.size());
        kernels.activate(which, static_cast<int64_t>(grid.size()), grid.data(), value.data(), slope.data());
        for (size_t i = 0; i < grid.size(); i++) {
            const double u = grid[i], v = mmbal_test::activation_value(which, u);
            const double value_bound = exact ? std::fabs(v) : kernels.value_error * std::fabs(u);
            const double slope_bound = exact ? 0 : kernels.slope_error;
            ASSERT_LE(std::fabs(value[i] - v), kernels.half_ulp * value_bound + smallest) << which << " at " << u;
            ASSERT_LE(std::fabs(slope[i] - mmbal_test::activation_slope(which, u)), kernels.half_ulp * slope_bound)
                << which << " at " << u;
        }
    }
}

TEST_P(EveryIsa, ActivationsFollowTheirFormulas) {
    expect_activations_follow_their_formulas(Kernels<float>{table()});
    expect_activations_follow_their_formulas(Kernels<double>{table()});
}

// For positive u the value has a few units of error; for negative u rounding the argument z of the exponential costs
// some |z| units more.
template <typename Real>
void expect_gated_activations_keep_relative_accuracy(Kernels<Real> kernels, double floor) {
    const auto grid = activation_grid<Real>();
    for (mmbal_activation which : mmbal_test::ACTIVATIONS) {
        if (!mmbal_test::is_gated(which)) continue;
        std::vector<Real> value(grid.size());
        kernels.activate(which, static_cast<int64_t>(grid.size()), grid.data(), value.data(), nullptr);
        for (size_t i = 0; i < grid.size(); i++) {
            const double u = grid[i], v = mmbal_test::activation_value(which, u);
            const double units = u >= 0 ? 5 : 6 + 6 * std::fabs(mmbal_test::gate(which, u));
            const double magnitude = std::max(std::fabs(v), floor);
            if (std::fabs(u) < 80) {
                ASSERT_LE(std::fabs(value[i] - v), units * kernels.half_ulp * magnitude) << which << " at " << u;
            }
        }
    }
}

TEST_P(EveryIsa, GatedActivationsKeepTheirRelativeAccuracyForNegativeArguments) {
    expect_gated_activations_keep_relative_accuracy(Kernels<float>{table()}, 1e-30);
    expect_gated_activations_keep_relative_accuracy(Kernels<double>{table()}, 1e-290);
}

TEST_P(EveryIsa, ActivationsAreThoseOfThePortableKernels) {
    const Kernels<float> mine{table()}, portable{mmbal_kernels_of(MMBAL_ISA_PORTABLE)};
    const auto grid = activation_grid<float>();
    const auto n = static_cast<int64_t>(grid.size());
    for (mmbal_activation which : mmbal_test::ACTIVATIONS) {
        std::vector<float> value(n), slope(n), plain_value(n), plain_slope(n);
        mine.activate(which, n, grid.data(), value.data(), slope.data());
        portable.activate(which, n, grid.data(), plain_value.data(), plain_slope.data());
        for (int64_t i = 0; i < n; i++) {
            ASSERT_LE(std::fabs(value[i] - plain_value[i]), 2 * mine.value_error * mine.half_ulp * std::fabs(grid[i]));
            ASSERT_LE(std::fabs(slope[i] - plain_slope[i]), 2 * mine.slope_error * mine.half_ulp);
        }
    }
}

template <typename Real>
void expect_any_length_and_place(Kernels<Real> kernels) {
    Random random(11);
    for (mmbal_activation which : mmbal_test::ACTIVATIONS) {
        for (int64_t n = 0; n <= 70; n++) {
            std::vector<Real> u(n);
            for (auto &x : u) x = static_cast<Real>(random.uniform(-6, 6));
            mmbal_test::Guarded<Real> value(n), slope(n), alone(n);
            kernels.activate(which, n, u.data(), value.data(), slope.data());
            kernels.activate(which, n, u.data(), alone.data(), nullptr);
            auto in_place = u;
            kernels.activate(which, n, in_place.data(), in_place.data(), nullptr);
            auto in_place_too = u;
            std::vector<Real> in_place_slope(n);
            kernels.activate(which, n, in_place_too.data(), in_place_too.data(), in_place_slope.data());
            EXPECT_TRUE(value.intact() && slope.intact() && alone.intact()) << which << " of " << n;
            EXPECT_TRUE(same_bits(value.values(), alone.values())) << which << " of " << n;
            EXPECT_TRUE(same_bits(value.values(), in_place)) << which << " of " << n;
            EXPECT_TRUE(same_bits(value.values(), in_place_too)) << which << " of " << n;
            EXPECT_TRUE(same_bits(slope.values(), in_place_slope)) << which << " of " << n;
            for (int64_t i = 0; i < n; i++) {
                const double expected = mmbal_test::activation_value(which, u[i]);
                ASSERT_NEAR(value.values()[i], expected, 3 * 36 * kernels.half_ulp)
                    << which << ", " << i << " of " << n;
            }
        }
    }
}

TEST_P(EveryIsa, ActivationsWorkForAnyLengthInPlaceAndWithoutSlope) {
    expect_any_length_and_place(Kernels<float>{table()});
    expect_any_length_and_place(Kernels<double>{table()});
}

template <typename Real>
void expect_special_values(Kernels<Real> kernels) {
    for (mmbal_activation which : mmbal_test::ACTIVATIONS) {
        const Real inf = std::numeric_limits<Real>::infinity(), nan = std::numeric_limits<Real>::quiet_NaN();
        // Many of each, so that vectors and what is left over are both met.
        for (int64_t n : {1, 37}) {
            std::vector<Real> value(n), slope(n);
            kernels.activate(which, n, std::vector<Real>(n, nan).data(), value.data(), slope.data());
            for (Real v : value) ASSERT_TRUE(std::isnan(v)) << which;
            kernels.activate(which, n, std::vector<Real>(n, inf).data(), value.data(), slope.data());
            for (Real v : value) ASSERT_EQ(v, inf) << which;
            kernels.activate(which, n, std::vector<Real>(n, -inf).data(), value.data(), slope.data());
            for (Real v : value) {
                // As torch has it: u times a factor that went to 0 is a NaN; nothing may look like a number.
                if (which == MMBAL_IDENTITY)
                    ASSERT_EQ(v, -inf);
                else
                    ASSERT_TRUE(v == 0 || std::isnan(v)) << which << " " << v;
            }
            for (Real zero : {static_cast<Real>(0), static_cast<Real>(-0.0)}) {
                kernels.activate(which, n, std::vector<Real>(n, zero).data(), value.data(), slope.data());
                for (Real v : value) ASSERT_EQ(v, 0) << which;
            }
        }
    }
}

TEST_P(EveryIsa, ActivationsOfNanInfinityAndZero) {
    expect_special_values(Kernels<float>{table()});
    expect_special_values(Kernels<double>{table()});
}

TEST_P(EveryIsa, ActivationsStayFiniteForLargeFiniteArguments) {
    const Kernels<float> kernels{table()};
    for (mmbal_activation which : mmbal_test::ACTIVATIONS) {
        std::vector<float> u;
        for (float size : {90.0f, 104.0f, 1e3f, 1e10f, 1e18f}) u.push_back(size), u.push_back(-size);
        std::vector<float> value(u.size()), slope(u.size());
        kernels.activate(which, static_cast<int64_t>(u.size()), u.data(), value.data(), slope.data());
        for (size_t i = 0; i < u.size(); i++) {
            const double v = mmbal_test::activation_value(which, u[i]), s = mmbal_test::activation_slope(which, u[i]);
            ASSERT_NEAR(value[i], v, 0x1p-23 * std::fabs(v) + 1e-30) << which << " at " << u[i];
            ASSERT_NEAR(slope[i], s, 0x1p-23 * std::fabs(s) + 1e-30) << which << " at " << u[i];
        }
    }
}

std::vector<mmbal_isa> isas_of_this_build() {
    std::vector<mmbal_isa> isas = {MMBAL_ISA_PORTABLE};
#ifdef MMBAL_X86
    isas.push_back(MMBAL_ISA_AVX2), isas.push_back(MMBAL_ISA_AVX512);
#endif
    return isas;
}

INSTANTIATE_TEST_SUITE_P(Kernels, EveryIsa, ::testing::ValuesIn(isas_of_this_build()),
                         [](const auto &of) { return mmbal_isa_name(of.param); });

TEST(Kernels, IsaWithoutKernelsGivesNull) {
    for (int isa : {static_cast<int>(MMBAL_ISA_AMX), -1, 99}) EXPECT_EQ(mmbal_kernels_of(isa), nullptr) << isa;
}

float float_of_bits(uint32_t bits) {
    float value;
    std::memcpy(&value, &bits, sizeof value);
    return value;
}

TEST(Bfloat16, KnownRoundings) {
    const struct {
        uint32_t bits;
        bfloat16 expected;
        const char *what;
    } cases[] = {
        {0x3F800000, 0x3F80, "1"},
        {0x3F807FFF, 0x3F80, "just below the middle"},
        {0x3F808000, 0x3F80, "tie to the even one below"},
        {0x3F808001, 0x3F81, "just above the middle"},
        {0x3F818000, 0x3F82, "tie to the even one above"},
        {0x3FFFFFFF, 0x4000, "carry into the exponent"},
        {0x7F7FFFFF, 0x7F80, "the largest float32 becomes infinity"},
        {0x7F7F7FFF, 0x7F7F, "just below the middle of the largest and infinity"},
        {0x7F800000, 0x7F80, "infinity"},
        {0xFF800000, 0xFF80, "-infinity"},
        {0x80000000, 0x8000, "-0"},
        {0x00000001, 0x0000, "the smallest subnormal"},
        {0x00008000, 0x0000, "tie between 0 and a subnormal"},
        {0x00018000, 0x0002, "tie between subnormals"},
        {0x007FFFFF, 0x0080, "the largest subnormal becomes normal"},
    };
    for (const auto &c : cases) EXPECT_EQ(bfloat16_of_float(float_of_bits(c.bits)), c.expected) << c.what;
}

TEST(Bfloat16, EveryNumberSurvivesTheRoundTrip) {
    for (uint32_t stored = 0; stored <= 0xFFFF; stored++) {
        const float value = float_of_bfloat16(static_cast<bfloat16>(stored));
        if (std::isnan(value)) continue;
        ASSERT_EQ(bfloat16_of_float(value), stored);
    }
}

TEST(Bfloat16, EveryNanStaysANanOfItsSign) {
    for (uint32_t payload : {0x000001u, 0x007FFFu, 0x008000u, 0x00FFFFu, 0x3FFFFFu, 0x400000u, 0x7F8000u, 0x7FFFFFu}) {
        for (uint32_t sign : {0u, 0x80000000u}) {
            const float back = float_of_bfloat16(bfloat16_of_float(float_of_bits(sign | 0x7F800000u | payload)));
            EXPECT_TRUE(std::isnan(back)) << std::hex << payload;
            EXPECT_EQ(std::signbit(back), sign != 0) << std::hex << payload;
        }
    }
}

// Between each two neighbours: a quarter goes down, three quarters up, the middle to the even one.
TEST(Bfloat16, RoundsToTheNearestBetweenAllNeighbours) {
    for (uint32_t stored = 0; stored < 0x7F80; stored++) {
        for (uint32_t sign : {0u, 0x8000u}) {
            const uint32_t below = sign | stored, bits = below << 16, even = below + (stored & 1);
            ASSERT_EQ(bfloat16_of_float(float_of_bits(bits + 0x4000)), below);
            ASSERT_EQ(bfloat16_of_float(float_of_bits(bits + 0x8000)), even);
            ASSERT_EQ(bfloat16_of_float(float_of_bits(bits + 0xC000)), below + 1);
        }
    }
}

} // namespace
