// What moves elements without changing them: transposition, stores around the caches, fetches.
#include "every_isa.h"

extern "C" {
#include "stream.h"
}

namespace {

using mmbal_test::EveryIsa;
using mmbal_test::Guarded;
using mmbal_test::Random;

template <typename Word>
void expect_transposed(mmbal_transpose *transpose, int64_t rows, int64_t cols, int64_t misaligned) {
    Random random(static_cast<uint64_t>(1000 * rows + cols));
    const int64_t from_stride = cols + 3, to_stride = rows + 5;
    std::vector<Word> from(rows * from_stride + 1);
    for (auto &word : from) word = static_cast<Word>(random.bits());
    Guarded<Word> to((cols - 1) * to_stride + rows, misaligned);
    transpose(from.data() + 1, from_stride, rows, cols, to.data(), to_stride);
    ASSERT_TRUE(to.intact()) << rows << " x " << cols;
    const auto got = to.values();
    Word between;
    std::memset(&between, 0xFF, sizeof between);
    for (int64_t j = 0; j < cols; j++) {
        for (int64_t i = 0; i < (j + 1 < cols ? to_stride : rows); i++) {
            const Word expected = i < rows ? from[1 + i * from_stride + j] : between;
            ASSERT_EQ(got[j * to_stride + i], expected) << rows << " x " << cols << " at " << i << ", " << j;
        }
    }
}

TEST_P(EveryIsa, TranspositionPutsEveryElementInItsPlaceAndTouchesNoOther) {
    for (int64_t rows : {1, 2, 3, 4, 5, 15, 16, 17, 31, 32, 33, 50}) {
        for (int64_t cols : {1, 2, 3, 4, 7, 15, 16, 17, 63, 64, 65, 80, 144, 145}) {
            expect_transposed<uint32_t>(table()->transpose_32, rows, cols, 2 * (cols % 2));
            expect_transposed<uint64_t>(table()->transpose_64, rows, cols, 2 * (rows % 2));
            if (HasFatalFailure()) return;
        }
    }
}

TEST_P(EveryIsa, StreamedBytesAreThoseGivenAtAnyAddressAndLength) {
    Random random(2);
    std::vector<unsigned char> from(400);
    for (auto &byte : from) byte = static_cast<unsigned char>(random.bits());
    for (int64_t bytes : {0, 1, 2, 63, 64, 65, 127, 128, 200, 330}) {
        for (int64_t misaligned = 0; misaligned < 64; misaligned++) {
            Guarded<unsigned char> to(bytes, misaligned);
            table()->stream(bytes, from.data() + misaligned, to.data());
            stream_end();
            ASSERT_TRUE(to.intact()) << bytes << " at " << misaligned;
            ASSERT_EQ(to.values(),
                      std::vector<unsigned char>(from.begin() + misaligned, from.begin() + misaligned + bytes))
                << bytes << " at " << misaligned;
        }
    }
}

TEST_P(EveryIsa, TilesFetchAtTheirPaceUntilNothingIsLeft) {
    const int cols = table()->tile_cols_f32;
    const std::vector<float> a(2 * FETCH_STEPS, 1), b(2 * FETCH_STEPS * cols, 1);
    std::vector<float> c(cols);
    const std::vector<char> lines(5 * 4096);
    fetches ahead = {make_fetch(lines.data(), 4096, 5, 3 * CACHE_LINE), make_fetch(lines.data(), 4096, 4, CACHE_LINE)};
    ahead.soon.pace = 4, ahead.later.pace = 1;
    const auto run = [&](int64_t depth) {
        table()->tile_f32(1, depth, a.data(), 10, b.data(), cols, c.data(), cols, TILE_SET, &ahead);
    };
    run(FETCH_STEPS + 1); // a step begun counts
    EXPECT_EQ(lines_left(&ahead.soon), 15 - 2 * 4);
    EXPECT_EQ(lines_left(&ahead.later), 4 - 2);
    run(2 * FETCH_STEPS);
    run(2 * FETCH_STEPS);
    EXPECT_EQ(lines_left(&ahead.soon), 0);
    EXPECT_EQ(lines_left(&ahead.later), 0);
}

MMBAL_INSTANTIATE_FOR_EVERY_ISA();

TEST(Fetch, PaceCoversEveryLine) {
    const std::vector<char> lines(4096);
    for (int64_t steps : {1, 2, 7, 100, 1000}) {
        fetch ahead = make_fetch(lines.data(), 256, 9, 100);
        set_pace(&ahead, steps);
        EXPECT_EQ(lines_left(&ahead), 9 * 2);
        EXPECT_GE(ahead.pace * steps, FETCH_STEPS * 9 * 2) << steps;
        EXPECT_LT((ahead.pace - 1) * steps, FETCH_STEPS * 9 * 2) << steps;
        for (int64_t step = 0; step < steps; step += FETCH_STEPS) fetch_lines(&ahead, ahead.pace);
        EXPECT_EQ(lines_left(&ahead), 0) << steps;
    }
}

TEST(Fetch, NothingToFetchHasNoPace) {
    fetch nothing = {};
    set_pace(&nothing, 5);
    EXPECT_EQ(nothing.pace, 0);
    fetch_lines(&nothing, 5); // must not loop
    EXPECT_EQ(lines_left(&nothing), 0);
}

// Counted: the sets of 64-byte lines in a cache of 2048 sets that rows so far apart begin in.
TEST(Fetch, RowsThatStayFillTheirSetsAlike) {
    for (int64_t stride : {64, 192, 1024, 3072, 3136, 4096, 12288, 16384, 131072, 262144}) {
        std::vector<int> lines(2048);
        const int64_t rows = rows_that_stay(stride);
        for (int64_t row = 0; row < rows; row++) lines[row * stride / 64 % 2048]++;
        for (int count : lines) EXPECT_TRUE(count == 0 || count == 6) << stride;
    }
    EXPECT_EQ(rows_that_stay(4100), rows_that_stay(64)); // neither ends on a line: they spread by themselves
}

TEST(Fetch, LinesAreThoseOfTheRowsInTheirOrder) {
    const std::vector<char> memory(4096);
    fetch ahead = make_fetch(memory.data(), 1000, 3, 130);
    for (int64_t row = 0; row < 3; row++)
        for (int64_t line = 0; line < 3; line++)
            EXPECT_EQ(next_line(&ahead) - memory.data(), 1000 * row + CACHE_LINE * line) << row << ", " << line;
    EXPECT_EQ(lines_left(&ahead), 0);
}

// A line of each of four rows in turn, then the next lines, then the next four rows.
TEST(Fetch, TogetherTakesALineOfFourRowsInTurn) {
    const std::vector<char> memory(12 * 1000);
    fetch ahead = fetch_together(make_fetch(memory.data(), 1000, 11, 130));
    EXPECT_EQ(lines_left(&ahead), 8 * 3);
    for (int64_t group : {0, 4})
        for (int64_t line = 0; line < 3; line++)
            for (int64_t row = group; row < group + 4; row++)
                EXPECT_EQ(next_line(&ahead) - memory.data(), 1000 * row + CACHE_LINE * line) << row << ", " << line;
    EXPECT_EQ(lines_left(&ahead), 0);
}

TEST(Fetch, TogetherTakesRowsWithoutGapsAsPages) {
    const std::vector<char> memory(24 * 1024);
    fetch ahead = fetch_together(make_fetch(memory.data(), 3072, 8, 3072)); // six pages
    EXPECT_EQ(lines_left(&ahead), 4 * 64);
    for (int64_t line = 0; line < 64; line++)
        for (int64_t page = 0; page < 4; page++)
            EXPECT_EQ(next_line(&ahead) - memory.data(), 4096 * page + CACHE_LINE * line) << page << ", " << line;
    EXPECT_EQ(lines_left(&ahead), 0);
}

TEST(Fetch, TogetherLeavesFewerRowsThanAGroupAsTheyWere) {
    const std::vector<char> memory(4096);
    fetch ahead = fetch_together(make_fetch(memory.data(), 1000, 3, 130));
    for (int64_t row = 0; row < 3; row++)
        for (int64_t line = 0; line < 3; line++)
            EXPECT_EQ(next_line(&ahead) - memory.data(), 1000 * row + CACHE_LINE * line) << row << ", " << line;
    EXPECT_EQ(lines_left(&ahead), 0);
    fetch three_pages = fetch_together(make_fetch(memory.data(), 1024, 12, 1024));
    EXPECT_EQ(lines_left(&three_pages), 12 * 16);
    fetch nothing = fetch_together(fetch{});
    EXPECT_EQ(lines_left(&nothing), 0);
}

} // namespace
