// Every instruction set that this machine can run, against loops in double and against the portable kernels.
#include "activations.h"
#include "every_isa.h"

extern "C" {
#include "bfloat16.h"
#include "float16.h"
#include "stream.h"
}

namespace {

using mmbal_test::EveryIsa;
using mmbal_test::Random;
using mmbal_test::same_bits;

// The same calls for float and for double. Bounds in half units in the last place of 1: an activation's value errs by
// at most value_error |u|, its slope by slope_error. Measured on x86-64 over [-100, 100]: 2.80 (gelu at u = 0.06, the
// others up to 2.4) and 33 (gelu_tanh at u = 5); in float64 2.2 and 86.
template <typename Real>
struct Kernels;

template <>
struct Kernels<float> {
    const mmbal_kernels *table;
    bool half = false; // the tile of half as many columns
    int rows() const { return table->tile_rows_f32; }
    int cols() const { return table->tile_cols_f32 / (half ? 2 : 1); }
    void tile(int n, int64_t depth, const float *a, int64_t a_stride, const float *b, int64_t b_stride, float *c,
              int64_t stride, tile_result result) const {
        fetches ahead = {};
        (half ? table->half_tile_f32 : table->tile_f32)(n, depth, a, a_stride, b, b_stride, c, stride, result, &ahead);
    }
    void activate(mmbal_activation which, int64_t n, const float *u, float *value, float *slope) const {
        table->activate_f32(which, n, u, value, slope);
    }
    void gradient_row(mmbal_activation which, int64_t n, const float *u, const float *h, float weight, float *value,
                      float *du, float *dot) const {
        table->gradient_row_f32(which, n, u, h, weight, value, du, dot);
    }
    void add(int64_t n, const float *addend, float *sum) const { table->add_f32(n, addend, sum); }
    float sum(int64_t n, const float *a) const { return table->sum_f32(n, a); }
    static constexpr double half_ulp = 0x1p-24, value_error = 3, slope_error = 35;
};

template <>
struct Kernels<double> {
    const mmbal_kernels *table;
    bool half = false; // the tile of half as many columns
    int rows() const { return table->tile_rows_f64; }
    int cols() const { return table->tile_cols_f64 / (half ? 2 : 1); }
    void tile(int n, int64_t depth, const double *a, int64_t a_stride, const double *b, int64_t b_stride, double *c,
              int64_t stride, tile_result result) const {
        fetches ahead = {};
        (half ? table->half_tile_f64 : table->tile_f64)(n, depth, a, a_stride, b, b_stride, c, stride, result, &ahead);
    }
    void activate(mmbal_activation which, int64_t n, const double *u, double *value, double *slope) const {
        table->activate_f64(which, n, u, value, slope);
    }
    void gradient_row(mmbal_activation which, int64_t n, const double *u, const double *h, double weight, double *value,
                      double *du, double *dot) const {
        table->gradient_row_f64(which, n, u, h, weight, value, du, dot);
    }
    void add(int64_t n, const double *addend, double *sum) const { table->add_f64(n, addend, sum); }
    double sum(int64_t n, const double *a) const { return table->sum_f64(n, a); }
    static constexpr double half_ulp = 0x1p-53, value_error = 5, slope_error = 180; // half of it the reference's own
};

template <typename Real>
std::vector<Real> numbers(Random &random, int64_t count) {
    std::vector<Real> values(count);
    for (auto &value : values) value = static_cast<Real>(random.uniform(-1, 1));
    return values;
}

// One tile of every number of rows, with c inside a larger matrix; a and b exactly as large as promised.
template <typename Real>
void expect_tile_product(Kernels<Real> kernels, int rows, int64_t depth, tile_result result, uint64_t seed) {
    Random random(seed);
    const int cols = kernels.cols(), stride = cols + 3;
    const int64_t a_stride = depth + 5;
    const int64_t b_stride = cols + depth % 3; // packed, or rows of a wider matrix
    const auto a = numbers<Real>(random, (rows - 1) * a_stride + depth);
    const auto b = numbers<Real>(random, depth > 0 ? (depth - 1) * b_stride + cols : 0);
    const auto before = numbers<Real>(random, (rows - 1) * stride + cols); // nothing behind the tile's last element
    auto c = before;
    kernels.tile(rows, depth, a.data(), a_stride, b.data(), b_stride, c.data(), stride, result);
    for (int i = 0; i < rows; i++) {
        for (int j = 0; j < (i + 1 < rows ? stride : cols); j++) {
            double sum = result == TILE_ADD || j >= cols ? before[i * stride + j] : 0, magnitude = std::fabs(sum);
            for (int64_t d = 0; d < depth && j < cols; d++) {
                const double term = static_cast<double>(a[i * a_stride + d]) * static_cast<double>(b[d * b_stride + j]);
                sum += term, magnitude += std::fabs(term);
            }
            const double bound = depth == 0 || j >= cols ? 0 : 2 * (depth + 2) * kernels.half_ulp * magnitude;
            ASSERT_LE(std::fabs(c[i * stride + j] - sum), bound)
                << rows << " rows, depth " << depth << " at " << i << ", " << j;
        }
    }
}

TEST_P(EveryIsa, TileProductIsThatOfThePlainLoopForEveryNumberOfRows) {
    for (int64_t depth : {0, 1, 2, 3, 15, 16, 17, 70, 256, 257, 1000}) {
        for (tile_result result : {TILE_SET, TILE_ADD}) {
            for (bool half : {false, true}) {
                for (int rows = 1; rows <= Kernels<float>{table()}.rows(); rows++)
                    expect_tile_product(Kernels<float>{table(), half}, rows, depth, result, 100 + depth);
                for (int rows = 1; rows <= Kernels<double>{table()}.rows(); rows++)
                    expect_tile_product(Kernels<double>{table(), half}, rows, depth, result, 200 + depth);
            }
        }
    }
}

template <typename Real>
void expect_half_tiles_to_have_the_bits_of_whole_ones(mmbal_test::Random random, Kernels<Real> whole,
                                                      Kernels<Real> half) {
    const int cols = whole.cols();
    const int64_t depth = 37;
    for (int rows = 1; rows <= whole.rows(); rows++) {
        const auto a = numbers<Real>(random, rows * depth), b = numbers<Real>(random, depth * cols);
        std::vector<Real> c(rows * cols), halves(rows * cols);
        whole.tile(rows, depth, a.data(), depth, b.data(), cols, c.data(), cols, TILE_SET);
        for (int first : {0, cols / 2})
            half.tile(rows, depth, a.data(), depth, b.data() + first, cols, halves.data() + first, cols, TILE_SET);
        EXPECT_TRUE(same_bits(c, halves)) << rows;
    }
}

TEST_P(EveryIsa, HalfTilesHaveTheBitsOfWholeOnes) {
    expect_half_tiles_to_have_the_bits_of_whole_ones(Random(41), Kernels<float>{table()},
                                                     Kernels<float>{table(), true});
    expect_half_tiles_to_have_the_bits_of_whole_ones(Random(42), Kernels<double>{table()},
                                                     Kernels<double>{table(), true});
}

// Around the caches into a matrix whose rows begin on cache lines.
template <typename Real>
void expect_streamed_tiles_have_the_same_bits(Kernels<Real> kernels) {
    const int cols = kernels.cols();
    const int64_t depth = 19, line = CACHE_LINE / sizeof(Real), stride = (cols / line + 3) * line;
    for (int rows = 1; rows <= kernels.rows(); rows++) {
        Random random(40 + rows);
        const auto a = numbers<Real>(random, rows * depth), b = numbers<Real>(random, depth * cols);
        std::vector<Real> memory(rows * stride + line, 7), expected(rows * stride, 7);
        Real *c = memory.data();
        while (reinterpret_cast<uintptr_t>(c) % CACHE_LINE != 0) c++;
        kernels.tile(rows, depth, a.data(), depth, b.data(), cols, expected.data(), stride, TILE_SET);
        kernels.tile(rows, depth, a.data(), depth, b.data(), cols, c, stride, TILE_STREAM);
        stream_end();
        EXPECT_TRUE(same_bits(expected, {c, c + rows * stride})) << rows;
    }
}

TEST_P(EveryIsa, StreamedTilesHaveTheBitsOfOthers) {
    expect_streamed_tiles_have_the_same_bits(Kernels<float>{table()});
    expect_streamed_tiles_have_the_same_bits(Kernels<double>{table()});
}

// The product of two matrices, tile by tile; cols is a multiple of every tile's.
template <typename Real>
std::vector<Real> product(Kernels<Real> kernels, const std::vector<Real> &a, const std::vector<Real> &b, int64_t rows,
                          int64_t cols, int64_t depth) {
    std::vector<Real> c(rows * cols), panel(depth * kernels.cols());
    for (int64_t j = 0; j < cols; j += kernels.cols()) {
        for (int64_t d = 0; d < depth; d++)
            for (int k = 0; k < kernels.cols(); k++) panel[d * kernels.cols() + k] = b[(j + k) * depth + d];
        for (int64_t i = 0; i < rows; i += kernels.rows()) {
            const int here = static_cast<int>(std::min<int64_t>(kernels.rows(), rows - i));
            kernels.tile(here, depth, a.data() + i * depth, depth, panel.data(), kernels.cols(),
                         c.data() + i * cols + j, cols, TILE_SET);
        }
    }
    return c;
}

template <typename Real>
void expect_product_as_portable(Kernels<Real> kernels) {
    const Kernels<Real> portable{mmbal_kernels_of(MMBAL_ISA_PORTABLE)};
    const int64_t rows = 85, cols = 64, depth = 301;
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
    std::vector<Real> whole(rows * cols, 7);
    kernels.tile(rows, depth, a.data(), depth, b.data(), cols, whole.data(), cols, TILE_SET);
    for (int64_t cut : {0, 1, 37, 64, 99, 100}) {
        std::vector<Real> parts(rows * cols, 7);
        kernels.tile(rows, cut, a.data(), depth, b.data(), cols, parts.data(), cols, TILE_SET);
        kernels.tile(rows, depth - cut, a.data() + cut, depth, b.data() + cut * cols, cols, parts.data(), cols,
                     TILE_ADD);
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
    kernels.tile(rows, depth, a.data(), depth, b.data(), cols, first.data(), cols, TILE_SET);
    for (int shift = 1; shift < 16; shift++) {
        std::vector<Real> moved_a(shift, NAN), moved_b(shift, NAN), c(shift + rows * cols);
        moved_a.insert(moved_a.end(), a.begin(), a.end());
        moved_b.insert(moved_b.end(), b.begin(), b.end());
        kernels.tile(rows, depth, moved_a.data() + shift, depth, moved_b.data() + shift, cols, c.data() + shift, cols,
                     TILE_SET);
        EXPECT_TRUE(same_bits(first, std::vector<Real>(c.begin() + shift, c.end()))) << shift;
    }
}

TEST_P(EveryIsa, TileProductDoesNotDependOnAddresses) {
    expect_same_bits_at_any_address(Kernels<float>{table()});
    expect_same_bits_at_any_address(Kernels<double>{table()});
}

// A row's bits must not depend on which rows share its tile: then they do not depend on how a product is cut.
template <typename Real>
void expect_equal_rows_get_equal_bits(Kernels<Real> kernels) {
    Random random(10);
    const int cols = kernels.cols();
    const auto row = numbers<Real>(random, 50), b = numbers<Real>(random, 50 * cols);
    std::vector<Real> alone(cols);
    kernels.tile(1, 50, row.data(), 50, b.data(), cols, alone.data(), cols, TILE_SET);
    for (int rows = 1; rows <= kernels.rows(); rows++) {
        std::vector<Real> c(rows * cols);
        kernels.tile(rows, 50, row.data(), 0, b.data(), cols, c.data(), cols, TILE_SET);
        for (int i = 0; i < rows; i++)
            for (int j = 0; j < cols; j++) ASSERT_EQ(c[i * cols + j], alone[j]) << i << " of " << rows << ", " << j;
    }
}

TEST_P(EveryIsa, EqualRowsOfTilesGetEqualBits) {
    expect_equal_rows_get_equal_bits(Kernels<float>{table()});
    expect_equal_rows_get_equal_bits(Kernels<double>{table()});
}

TEST_P(EveryIsa, NanAndInfinityOfOneRowStayInItsRow) {
    const Kernels<float> kernels{table()};
    const int rows = kernels.rows(), cols = kernels.cols();
    for (float poison : {NAN, INFINITY}) {
        for (int bad = 0; bad < rows; bad++) {
            std::vector<float> a(3 * rows, 1), b(3 * cols, 1), c(rows * cols);
            a[bad * 3 + 1] = poison;
            kernels.tile(rows, 3, a.data(), 3, b.data(), cols, c.data(), cols, TILE_SET);
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

// For positive u the value has up to 5.3 units of error; for negative u rounding the argument z of the exponential
// costs some |z| units more.
template <typename Real>
void expect_gated_activations_keep_relative_accuracy(Kernels<Real> kernels, double floor) {
    const auto grid = activation_grid<Real>();
    for (mmbal_activation which : mmbal_test::ACTIVATIONS) {
        if (!mmbal_test::is_gated(which)) continue;
        std::vector<Real> value(grid.size());
        kernels.activate(which, static_cast<int64_t>(grid.size()), grid.data(), value.data(), nullptr);
        for (size_t i = 0; i < grid.size(); i++) {
            const double u = grid[i], v = mmbal_test::activation_value(which, u);
            const double units = u >= 0 ? 6 : 6 + 6 * std::fabs(mmbal_test::gate(which, u));
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

// Of any length, nothing beside it touched; value and slope are those of activate.
template <typename Real>
void expect_gradient_row(Kernels<Real> kernels) {
    Random random(12);
    for (mmbal_activation which : mmbal_test::ACTIVATIONS) {
        for (int64_t n = 0; n <= 200; n = n < 70 ? n + 1 : n + 65) {
            auto u = numbers<Real>(random, n), h = numbers<Real>(random, n);
            const auto weight = static_cast<Real>(random.uniform(-2, 2));
            std::vector<Real> value(n), slope(n);
            kernels.activate(which, n, u.data(), value.data(), slope.data());
            mmbal_test::Guarded<Real> row_value(n), du(n);
            Real dot = NAN;
            kernels.gradient_row(which, n, u.data(), h.data(), weight, row_value.data(), du.data(), &dot);
            EXPECT_TRUE(row_value.intact() && du.intact()) << which << " of " << n;
            EXPECT_TRUE(same_bits(row_value.values(), value)) << which << " of " << n;
            double sum = 0;
            for (int64_t i = 0; i < n; i++) {
                const double expected = static_cast<double>(weight) * h[i] * slope[i];
                ASSERT_NEAR(du.values()[i], expected, 4 * kernels.half_ulp * std::fabs(expected)) << which << ", " << i;
                sum += static_cast<double>(h[i]) * value[i];
            }
            ASSERT_NEAR(dot, sum, 2 * (n + 1) * kernels.half_ulp) << which << " of " << n;
        }
    }
}

TEST_P(EveryIsa, GradientRowsFollowTheirFormulasForAnyLength) {
    expect_gradient_row(Kernels<float>{table()});
    expect_gradient_row(Kernels<double>{table()});
}

template <typename Real>
void expect_sums_and_additions(Kernels<Real> kernels) {
    Random random(13);
    for (int64_t n = 0; n <= 200; n = n < 70 ? n + 1 : n + 65) {
        const auto a = numbers<Real>(random, n), b = numbers<Real>(random, n);
        double sum = 0;
        for (Real x : a) sum += x;
        EXPECT_NEAR(kernels.sum(n, a.data()), sum, 2 * (n + 1) * kernels.half_ulp * n) << n;
        mmbal_test::Guarded<Real> both(n);
        std::copy(a.begin(), a.end(), both.data());
        kernels.add(n, b.data(), both.data());
        EXPECT_TRUE(both.intact()) << n;
        for (int64_t i = 0; i < n; i++) ASSERT_EQ(both.values()[i], static_cast<Real>(a[i] + b[i])) << i << " of " << n;
    }
}

TEST_P(EveryIsa, SumsAndAdditionsOfRowsAreThoseOfTheirElements) {
    expect_sums_and_additions(Kernels<float>{table()});
    expect_sums_and_additions(Kernels<double>{table()});
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

// Vectors of them, as the operators use them, against the one number of bfloat16.h and float16.h.
TEST_P(EveryIsa, ConversionsOfRowsAreThoseOfNumbers) {
    std::vector<uint16_t> patterns(65536);
    for (size_t i = 0; i < patterns.size(); i++) patterns[i] = static_cast<uint16_t>(i);
    std::vector<float> wide(patterns.size());
    table()->widen_bf16(65536, patterns.data(), wide.data());
    for (size_t i = 0; i < wide.size(); i++) {
        const float expected = float_of_bfloat16(patterns[i]);
        ASSERT_EQ(std::memcmp(&wide[i], &expected, sizeof expected), 0) << "bfloat16 " << i;
    }
    table()->widen_f16(65536, patterns.data(), wide.data());
    for (size_t i = 0; i < wide.size(); i++) {
        const float expected = float_of_float16(patterns[i]);
        ASSERT_EQ(std::memcmp(&wide[i], &expected, sizeof expected), 0) << "float16 " << i;
    }
    std::vector<float> numbers(1 << 20);
    for (uint32_t i = 0; i < numbers.size(); i++) { // every exponent, both signs, ties and their neighbours, NaN
        const uint32_t bits = i * 4099u;
        std::memcpy(&numbers[i], &bits, sizeof bits);
    }
    for (uint32_t i = 0; i < 65536; i++) {
        const uint32_t tie = i << 16 | 0x8000u;
        std::memcpy(&numbers[i], &tie, sizeof tie);
    }
    std::vector<uint16_t> narrow(numbers.size());
    const auto count = static_cast<int64_t>(numbers.size());
    table()->narrow_bf16(count, numbers.data(), narrow.data());
    for (size_t i = 0; i < narrow.size(); i++) ASSERT_EQ(narrow[i], bfloat16_of_float(numbers[i])) << "bfloat16 " << i;
    table()->narrow_f16(count, numbers.data(), narrow.data());
    for (size_t i = 0; i < narrow.size(); i++) ASSERT_EQ(narrow[i], float16_of_float(numbers[i])) << "float16 " << i;
}

TEST_P(EveryIsa, RowsOfAnyLengthAreConvertedAndInterleaved) {
    Random random(12);
    for (int64_t n = 0; n <= 70; n++) {
        const auto first = random.tensor<mmbal_test::BF16>(n, 1), second = random.tensor<mmbal_test::BF16>(n, 1);
        mmbal_test::Guarded<uint16_t> pairs(2 * n), back(n);
        mmbal_test::Guarded<float> wide(n);
        table()->interleave(n, first.data(), second.data(), pairs.data());
        table()->widen_bf16(n, first.data(), wide.data());
        table()->narrow_bf16(n, wide.data(), back.data());
        ASSERT_TRUE(pairs.intact() && wide.intact() && back.intact()) << n;
        EXPECT_EQ(back.values(), first) << n;
        for (int64_t i = 0; i < n; i++) {
            ASSERT_EQ(pairs.values()[2 * i], first[i]) << i << " of " << n;
            ASSERT_EQ(pairs.values()[2 * i + 1], second[i]) << i << " of " << n;
        }
    }
}

MMBAL_INSTANTIATE_FOR_EVERY_ISA();

TEST(Kernels, PortableKernelsAreInEveryBuild) { EXPECT_NE(mmbal_kernels_of(MMBAL_ISA_PORTABLE), nullptr); }

TEST(Kernels, IsaWithoutKernelsGivesNull) {
    for (int isa : {-1, 99}) EXPECT_EQ(mmbal_kernels_of(isa), nullptr) << isa;
}

} // namespace
