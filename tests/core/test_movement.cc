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
    const std::vector<float> a(10, 1), b(10 * cols, 1);
    std::vector<float> c(cols);
    const std::vector<char> lines(5 * 4096);
    fetch ahead = make_fetch(lines.data(), 4096, 5, 3 * CACHE_LINE);
    ahead.pace = 1;
    table()->tile_f32(1, 7, a.data(), 10, b.data(), cols, c.data(), cols, 0, &ahead);
    EXPECT_EQ(ahead.row * ahead.lines + ahead.line, 7);
    table()->tile_f32(1, 10, a.data(), 10, b.data(), cols, c.data(), cols, 0, &ahead);
    EXPECT_EQ(ahead.row, 5);
}

MMBAL_INSTANTIATE_FOR_EVERY_ISA();

TEST(Fetch, PaceCoversEveryLine) {
    const std::vector<char> lines(4096);
    for (int64_t steps : {1, 2, 7, 100, 1000}) {
        fetch ahead = make_fetch(lines.data(), 256, 9, 100);
        set_pace(&ahead, steps);
        EXPECT_GE(ahead.pace * steps, 9 * 2) << steps;
        EXPECT_LT((ahead.pace - 1) * steps, 9 * 2) << steps;
        for (int64_t step = 0; step < steps; step++) fetch_lines(&ahead, ahead.pace);
        EXPECT_EQ(ahead.row, 9) << steps;
    }
}

TEST(Fetch, NothingToFetchHasNoPace) {
    fetch nothing = {};
    set_pace(&nothing, 5);
    EXPECT_EQ(nothing.pace, 0);
    fetch_lines(&nothing, 5); // must not loop
    EXPECT_EQ(nothing.row, 0);
}

} // namespace
