// How products are cut into blocks: every element in one block, also where there are more than 2^31 of them.
#include "helpers.h"

extern "C" {
#include "blocks.h"
#include "mmbal/expert_mlp.h"
}

namespace {

using mmbal_test::Random;

TEST(Blocks, RowBlocksCoverEveryRowAndColumnOnce) {
    Random random(1);
    for (int round = 0; round < 60; round++) {
        const int64_t E = 1 + random.below(6), cols = 1 + random.below(500);
        blocking most = round % 2 ? BLOCKING_OF_SMALL_CACHES : BLOCKING_OF_LARGE_CACHES;
        const int64_t highest = most.rows;
        most.rows = random.pick<int64_t>({64, 140, 280, highest});
        const int tile_rows = random.pick<int>({4, 6, 14, 32});
        std::vector<int64_t> offsets = {0};
        for (int64_t e = 0; e < E; e++)
            offsets.push_back(offsets.back() +
                              random.pick<int64_t>({0, 1, 13, 127, 128, 129, 448, 558, 560, 700, 1118, 1120, 2240}));
        std::vector<int> seen(offsets.back() * cols);
        const int64_t count = count_row_blocks(offsets.data(), E, most, tile_rows, cols);
        for (int64_t index = 0; index < count; index++) {
            const block b = find_row_block(offsets.data(), most, tile_rows, cols, index);
            ASSERT_TRUE(b.rows >= 1 && b.cols >= 1 && b.cols <= b.stride && b.stride <= FEW_COLS);
            ASSERT_LE(b.rows * b.stride, BLOCK_ELEMENTS);
            ASSERT_TRUE(!b.few || whole_multiples(32, b.rows) * b.cols <= BLOCK_ELEMENTS); // transposed
            ASSERT_TRUE(!b.few || b.rows <= FEW_ROWS);
            ASSERT_GE(b.row, offsets[b.expert]);
            ASSERT_LE(b.row + b.rows, offsets[b.expert + 1]);
            for (int64_t r = b.row; r < b.row + b.rows; r++)
                for (int64_t j = b.col; j < b.col + b.cols; j++) seen[r * cols + j]++;
        }
        for (int times : seen) ASSERT_EQ(times, 1);
    }
}

TEST(Blocks, ExpertBlocksCoverEveryElementOnce) {
    const int64_t E = 3, rows = 1300, cols = 401;
    for (blocking most : {BLOCKING_OF_SMALL_CACHES, BLOCKING_OF_LARGE_CACHES}) {
        std::vector<int> seen(E * rows * cols);
        for (int64_t index = 0; index < count_expert_blocks(E, most, rows, cols); index++) {
            const block b = find_expert_block(most, rows, cols, index);
            ASSERT_TRUE(b.cols <= b.stride && b.rows * b.stride <= BLOCK_ELEMENTS);
            for (int64_t i = b.row; i < b.row + b.rows; i++)
                for (int64_t j = b.col; j < b.col + b.cols; j++) seen[(b.expert * rows + i) * cols + j]++;
        }
        for (int times : seen) ASSERT_EQ(times, 1);
    }
}

TEST(Blocks, MoreThanTwoToThe31RowsAreCounted) {
    const int64_t many = (int64_t{1} << 33) + 5;
    const std::vector<int64_t> offsets = {0, many, many, 2 * many};
    const blocking most = BLOCKING_OF_SMALL_CACHES;
    const int64_t cols = 1000, across = ceil_div(cols, most.cols);
    const int64_t height = block_height(many, most.rows, 14), down = ceil_div(many, height);
    const int64_t count = count_row_blocks(offsets.data(), 3, most, 14, cols);
    EXPECT_EQ(count, 2 * down * across);
    const block last = find_row_block(offsets.data(), most, 14, cols, count - 1);
    EXPECT_EQ(last.expert, 2);
    EXPECT_EQ(last.row + last.rows, 2 * many);
    EXPECT_EQ(last.col + last.cols, cols);
}

TEST(Blocks, MoreThanTwoToThe31ElementsOfWeightsAreCounted) {
    const int64_t E = 70000, rows = 40000, cols = 50000;
    const blocking most = BLOCKING_OF_LARGE_CACHES;
    const block last = find_expert_block(most, rows, cols, count_expert_blocks(E, most, rows, cols) - 1);
    EXPECT_EQ(last.expert, E - 1);
    EXPECT_EQ(last.row + last.rows, rows);
    EXPECT_EQ(last.col + last.cols, cols);
}

// The workspace of a call that nobody can allocate: its bytes are those of its parts, not what is left of them in 32
// bits.
TEST(Blocks, WorkspaceOfHugeShapesIsCountedIn64Bits) {
    const mmbal_expert_mlp_shape shape = {int64_t{1} << 24, 4096, 16384, 2, 2};
    const int64_t R = shape.N * shape.K;
    const std::vector<int64_t> offsets = {0, R, R};
    const int64_t forward = 4 * R * (2 * shape.D + shape.F);
    for (mmbal_dtype dtype : {MMBAL_F32, MMBAL_BF16}) {
        const int64_t size = dtype == MMBAL_F32 ? 4 : 2; // bfloat16 may lie as float32 too
        const int64_t bytes = mmbal_expert_mlp_workspace(dtype, shape, offsets.data(), 2);
        EXPECT_GE(bytes, size * R * (shape.D + shape.F) + 4 * R * shape.D);
        EXPECT_LE(bytes, forward + forward / 50 + (int64_t{16} << 20));
        EXPECT_GT(mmbal_expert_mlp_backward_workspace(dtype, shape, offsets.data(), 2), bytes);
        EXPECT_GE(mmbal_expert_mlp_packed_bytes(dtype, {0, 1 << 16, 1 << 17, 64, 2}), size * 2 * (int64_t{64} << 33));
    }
}

TEST(Blocks, WorkspaceOfManyExpertsIsThatOfTheirLargestWave) {
    const int64_t E = 8, rows = 2000;
    const mmbal_expert_mlp_shape shape = {E * rows, 768, 3072, E, 1};
    std::vector<int64_t> balanced = {0}, one = {0};
    for (int64_t e = 0; e < E; e++) balanced.push_back((e + 1) * rows), one.push_back(E * rows);
    const int64_t small = mmbal_expert_mlp_backward_workspace(MMBAL_F32, shape, balanced.data(), 2);
    const int64_t large = mmbal_expert_mlp_backward_workspace(MMBAL_F32, shape, one.data(), 2);
    EXPECT_LT(small, large / 4);
}

TEST(Blocks, WorkspaceOfOffsetsThatDoNotFitIsZero) {
    const mmbal_expert_mlp_shape shape = {4, 3, 5, 2, 1};
    for (const std::vector<int64_t> &offsets : {std::vector<int64_t>{0, 5, 4}, {1, 2, 4}, {0, 2, 3}, {0, -1, 4}}) {
        EXPECT_EQ(mmbal_expert_mlp_workspace(MMBAL_F32, shape, offsets.data(), 1), 0);
        EXPECT_EQ(mmbal_expert_mlp_backward_workspace(MMBAL_F32, shape, offsets.data(), 1), 0);
    }
}

} // namespace
