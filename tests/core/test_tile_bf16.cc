// Tiles of bfloat16 pairs: those that this machine can run, and AMX's against a model of its registers.
#include "amx_model.h"
#include "helpers.h"
#include "mmbal/cpu.h"

extern "C" {
#include "bfloat16.h"
#include "blocks.h"
#include "kernels.h"
}

namespace {

#include "tile_amx.h"

using mmbal_test::BF16;
using mmbal_test::Random;
using mmbal_test::same_bits;

struct Tile {
    int rows, cols;
    mmbal_tile_bf16 *tile;
    std::string name;
    // b packed
    void run(int n, int64_t depth, const uint16_t *a, int64_t a_stride, const uint16_t *b, float *c, int64_t stride,
             int add) const {
        fetches nothing = {};
        tile(n, depth, a, a_stride, b, 2 * cols, c, stride, add ? TILE_ADD : TILE_SET, &nothing);
    }
};

// What this machine can run, and the model.
std::vector<Tile> tiles() {
    std::vector<Tile> found = {{TILE_ROWS_BF16, TILE_COLS_BF16, tile_bf16, "amx_model"}};
    for (int isa = MMBAL_ISA_PORTABLE; isa <= MMBAL_ISA_AMX; isa++) {
        const mmbal_kernels *table = mmbal_kernels_of(isa);
        const unsigned needed = isa == MMBAL_ISA_AMX ? MMBAL_CPU_AMX_BF16 : MMBAL_CPU_AVX512_BF16;
        if (table && table->tile_bf16 && mmbal_cpu_features() & needed)
            found.push_back({table->tile_rows_bf16, table->tile_cols_bf16, table->tile_bf16,
                             mmbal_isa_name(static_cast<mmbal_isa>(isa))});
    }
    return found;
}

class TileBf16 : public ::testing::TestWithParam<Tile> {};

TEST_P(TileBf16, IsThePlainLoopForEveryNumberOfRowsAndDepth) {
    const int most_rows = GetParam().rows, cols = GetParam().cols;
    for (int rows = 1; rows <= most_rows; rows++) {
        for (int64_t depth : {0, 2, 4, 30, 32, 34, 62, 64, 66, 256}) {
            for (int add : {0, 1}) {
                Random random(1000 * rows + depth);
                const int64_t a_stride = depth + 6, stride = cols + 3;
                const auto a = random.tensor<BF16>((rows - 1) * a_stride + depth, 1);
                const auto b = random.tensor<BF16>(depth * cols, 1);
                std::vector<float> before((rows - 1) * stride + cols);
                for (auto &value : before) value = static_cast<float>(random.uniform(-1, 1));
                auto c = before;
                GetParam().run(rows, depth, a.data(), a_stride, b.data(), c.data(), stride, add);
                if (HasFatalFailure()) return;
                for (int i = 0; i < rows; i++) {
                    for (int j = 0; j < (i + 1 < rows ? stride : cols); j++) {
                        double sum = add || j >= cols ? before[i * stride + j] : 0, magnitude = std::fabs(sum);
                        for (int64_t d = 0; d < depth && j < cols; d++) {
                            const double term =
                                BF16::load(a[i * a_stride + d]) * BF16::load(b[d / 2 * 2 * cols + 2 * j + d % 2]);
                            sum += term, magnitude += std::fabs(term);
                        }
                        const double bound = depth == 0 || j >= cols ? 0 : 2 * (depth + 2) * 0x1p-24 * magnitude;
                        ASSERT_LE(std::fabs(c[i * stride + j] - sum), bound)
                            << rows << " rows, depth " << depth << " at " << i << ", " << j;
                    }
                }
            }
        }
    }
}

TEST_P(TileBf16, RowsDoNotDependOnTheRowsBesideThem) {
    const int most_rows = GetParam().rows, cols = GetParam().cols;
    Random random(5);
    const auto row = random.tensor<BF16>(70, 1), b = random.tensor<BF16>(70 * cols, 1);
    std::vector<float> alone(cols);
    GetParam().run(1, 70, row.data(), 70, b.data(), alone.data(), cols, 0);
    for (int rows = 1; rows <= most_rows; rows++) {
        std::vector<float> c(rows * cols);
        GetParam().run(rows, 70, row.data(), 0, b.data(), c.data(), cols, 0);
        for (int i = 0; i < rows; i++)
            ASSERT_TRUE(same_bits(alone, {c.begin() + i * cols, c.begin() + (i + 1) * cols})) << i << " of " << rows;
    }
}

// Blocks cut the depth at multiples of 512.
TEST_P(TileBf16, SumCutAtMultiplesOf32IsTheWholeSum) {
    const int most_rows = GetParam().rows, cols = GetParam().cols;
    Random random(6);
    const int64_t depth = 150;
    const auto a = random.tensor<BF16>(most_rows * depth, 1), b = random.tensor<BF16>(depth * cols, 1);
    std::vector<float> whole(most_rows * cols);
    GetParam().run(most_rows, depth, a.data(), depth, b.data(), whole.data(), cols, 0);
    for (int64_t cut : {0, 32, 96, 128}) {
        std::vector<float> parts(most_rows * cols, 7);
        GetParam().run(most_rows, cut, a.data(), depth, b.data(), parts.data(), cols, 0);
        GetParam().run(most_rows, depth - cut, a.data() + cut, depth, b.data() + cut * cols, parts.data(), cols, 1);
        EXPECT_TRUE(same_bits(whole, parts)) << cut;
    }
}

TEST_P(TileBf16, DoesNotDependOnAddresses) {
    const int most_rows = GetParam().rows, cols = GetParam().cols;
    Random random(7);
    const auto a = random.tensor<BF16>(most_rows * 36, 1), b = random.tensor<BF16>(36 * cols, 1);
    std::vector<float> first(most_rows * cols);
    GetParam().run(most_rows, 36, a.data(), 36, b.data(), first.data(), cols, 0);
    for (int shift = 1; shift < 33; shift += 5) {
        std::vector<uint16_t> moved_a(shift), moved_b(shift);
        moved_a.insert(moved_a.end(), a.begin(), a.end()), moved_b.insert(moved_b.end(), b.begin(), b.end());
        std::vector<float> c(shift + most_rows * cols);
        GetParam().run(most_rows, 36, moved_a.data() + shift, 36, moved_b.data() + shift, c.data() + shift, cols, 0);
        EXPECT_TRUE(same_bits(first, {c.begin() + shift, c.end()})) << shift;
    }
}

// Rows of b as they lie in a wider matrix, against the same rows interleaved.
TEST(TileInPlaceBf16, GivesTheBitsOfThePackedPanelForEveryNumberOfRows) {
    const mmbal_kernels *table = mmbal_kernels_of(MMBAL_ISA_AVX512_BF16);
    if (!table || !(mmbal_cpu_features() & MMBAL_CPU_AVX512_BF16)) GTEST_SKIP() << "no AVX512-BF16";
    const int cols = table->tile_cols_bf16, stride = cols + 7;
    for (int rows = 1; rows <= table->tile_rows_bf16; rows++) {
        for (int64_t depth : {0, 2, 6, 64, 130}) {
            for (int add : {0, 1}) {
                Random random(1000 * rows + depth);
                const auto a = random.tensor<BF16>(rows * depth, 1);
                const auto b = random.tensor<BF16>(depth > 0 ? (depth - 1) * stride + cols : 0, 1);
                std::vector<uint16_t> panel(depth * cols);
                for (int64_t d = 0; d < depth; d++)
                    for (int j = 0; j < cols; j++) panel[d / 2 * 2 * cols + 2 * j + d % 2] = b[d * stride + j];
                std::vector<float> packed(rows * stride);
                for (auto &value : packed) value = static_cast<float>(random.uniform(-1, 1));
                auto in_place = packed;
                fetches nothing = {};
                const tile_result result = add ? TILE_ADD : TILE_SET;
                table->tile_bf16(rows, depth, a.data(), depth, panel.data(), 2 * cols, packed.data(), stride, result,
                                 &nothing);
                table->tile_in_place_bf16(rows, depth, a.data(), depth, b.data(), stride, in_place.data(), stride,
                                          result, &nothing);
                ASSERT_TRUE(same_bits(packed, in_place)) << rows << " rows, depth " << depth << ", add " << add;
            }
        }
    }
}

TEST(HalfTileBf16, GivesTheBitsOfTheWholeTileForEveryNumberOfRows) {
    const mmbal_kernels *table = mmbal_kernels_of(MMBAL_ISA_AVX512_BF16);
    if (!table || !(mmbal_cpu_features() & MMBAL_CPU_AVX512_BF16)) GTEST_SKIP() << "no AVX512-BF16";
    const int cols = table->tile_cols_bf16, half = cols / 2;
    for (int rows = 1; rows <= table->tile_rows_bf16; rows++) {
        for (int64_t depth : {0, 2, 6, 64, 130}) {
            for (tile_result result : {TILE_SET, TILE_ADD}) {
                Random random(1000 * rows + depth);
                const auto a = random.tensor<BF16>(rows * depth, 1), b = random.tensor<BF16>(depth * cols, 1);
                std::vector<float> whole(rows * cols);
                for (auto &value : whole) value = static_cast<float>(random.uniform(-1, 1));
                auto halves = whole;
                fetches nothing = {};
                table->tile_bf16(rows, depth, a.data(), depth, b.data(), 2 * cols, whole.data(), cols, result,
                                 &nothing);
                for (int first : {0, half}) /* a row of a panel is [cols, 2] */
                    table->half_tile_bf16(rows, depth, a.data(), depth, b.data() + 2 * first, 2 * cols,
                                          halves.data() + first, cols, result, &nothing);
                ASSERT_TRUE(same_bits(whole, halves)) << rows << " rows, depth " << depth << ", result " << result;
            }
        }
    }
}

INSTANTIATE_TEST_SUITE_P(Kernels, TileBf16, ::testing::ValuesIn(tiles()), [](const auto &of) { return of.param.name; });

} // namespace
