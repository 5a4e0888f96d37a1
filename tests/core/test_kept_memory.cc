// Memory that the operators keep for the next call.
#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <thread>

#include "helpers.h"
#include "kept_memory.h"

namespace {

using mmbal::Block;
using mmbal::KeptMemory;

constexpr int64_t PAGE = KeptMemory::PAGE;

TEST(KeptMemory, WhatIsTakenIsLargeEnoughAndBeginsOnALargePage) {
    KeptMemory memory(100 * PAGE);
    for (int64_t bytes : {int64_t{0}, int64_t{1}, PAGE - 1, PAGE, PAGE + 1, 17 * PAGE + 5}) {
        const Block block = memory.take(bytes);
        ASSERT_NE(block.data, nullptr);
        EXPECT_GE(block.bytes, bytes);
        EXPECT_LE(block.bytes, bytes + bytes / 8 + PAGE);
        EXPECT_EQ(reinterpret_cast<uintptr_t>(block.data) % PAGE, 0u);
        std::memset(block.data, 1, static_cast<size_t>(block.bytes)); // AddressSanitizer watches
        memory.give(block);
    }
}

// What was freed to the heap lies in small pages for good; half a gradient in them made a step half again as long.
TEST(KeptMemory, ANewBlockIsNotWhatTheHeapHasLeft) {
    constexpr size_t PIECE = 64 << 10;
    std::vector<void *> pieces(40 * PAGE / PIECE);
    for (void *&piece : pieces) {
        piece = std::malloc(PIECE);
        ASSERT_NE(piece, nullptr);
        std::memset(piece, 1, PIECE);
    }
    for (size_t i = 0; i + 1 < pieces.size(); i++) std::free(pieces[i]); // the last one keeps the heap from shrinking

    KeptMemory memory(100 * PAGE);
    const Block block = memory.take(10 * PAGE);
    ASSERT_NE(block.data, nullptr);
    const auto *bytes = static_cast<const char *>(block.data);
    EXPECT_EQ(std::count(bytes, bytes + block.bytes, 0), block.bytes);
    memory.give(block);
    std::free(pieces.back());
}

TEST(KeptMemory, WhatIsGivenBackIsTakenAgain) {
    KeptMemory memory(100 * PAGE);
    const Block small = memory.take(2 * PAGE), large = memory.take(9 * PAGE);
    memory.give(small);
    memory.give(large);
    EXPECT_EQ(memory.take(9 * PAGE - 5).data, large.data);
    EXPECT_EQ(memory.take(PAGE + 1).data, small.data);
    memory.give(small), memory.give(large);
}

TEST(KeptMemory, BlocksInUseAreNeverTheSame) {
    KeptMemory memory(100 * PAGE);
    const Block first = memory.take(3 * PAGE);
    memory.give(first);
    const Block a = memory.take(3 * PAGE), b = memory.take(3 * PAGE);
    EXPECT_EQ(a.data, first.data);
    EXPECT_NE(a.data, b.data);
    memory.give(a), memory.give(b);
}

TEST(KeptMemory, ABlockMoreThanTwiceAsLargeIsLeftForOthers) {
    KeptMemory memory(100 * PAGE);
    const Block large = memory.take(9 * PAGE);
    memory.give(large);
    const Block small = memory.take(4 * PAGE);
    EXPECT_NE(small.data, large.data);
    memory.give(small);
}

TEST(KeptMemory, OffersTheOldestBlocksToTheSystemUntilFewBytesAreLeft) {
    KeptMemory memory(100 * PAGE, 5 * PAGE);
    std::vector<Block> blocks;
    for (int i = 0; i < 4; i++) blocks.push_back(memory.take(2 * PAGE));
    memory.give(blocks[0]), memory.give(blocks[1]);
    EXPECT_EQ(memory.not_offered(), 4 * PAGE);
    memory.give(blocks[2]);
    EXPECT_EQ(memory.not_offered(), 4 * PAGE);
    EXPECT_EQ(memory.kept(), 6 * PAGE);
    memory.give(memory.take(2 * PAGE)); // the newest again
    EXPECT_EQ(memory.not_offered(), 4 * PAGE);
    memory.give(memory.take(20 * PAGE)); // too large to be at hand
    EXPECT_LE(memory.not_offered(), 5 * PAGE);
    memory.give(blocks[3]);
    EXPECT_LE(memory.not_offered(), 5 * PAGE);
    EXPECT_EQ(memory.kept(), 28 * PAGE);
}

TEST(KeptMemory, WhatTheSystemMayHaveTakenIsReadableAndWritable) {
    KeptMemory memory(100 * PAGE, 0);
    Block block = memory.take(4 * PAGE);
    std::memset(block.data, 7, static_cast<size_t>(block.bytes));
    memory.give(block);
    block = memory.take(4 * PAGE);
    const auto *bytes = static_cast<const unsigned char *>(block.data);
    for (int64_t i = 0; i < block.bytes; i += 4096) ASSERT_TRUE(bytes[i] == 7 || bytes[i] == 0) << i;
    std::memset(block.data, 9, static_cast<size_t>(block.bytes));
    EXPECT_EQ(bytes[block.bytes - 1], 9);
    memory.give(block);
}

TEST(KeptMemory, BeyondTheLimitTheOldestGoBackToTheSystem) {
    KeptMemory memory(8 * PAGE);
    const Block oldest = memory.take(4 * PAGE), middle = memory.take(4 * PAGE), newest = memory.take(4 * PAGE);
    memory.give(oldest), memory.give(middle), memory.give(newest);
    // AddressSanitizer never gives freed memory out at once, so what is taken now was kept.
    const Block a = memory.take(4 * PAGE), b = memory.take(4 * PAGE);
    EXPECT_TRUE((a.data == middle.data && b.data == newest.data) || (a.data == newest.data && b.data == middle.data));
    memory.give(a), memory.give(b);
}

TEST(KeptMemory, ABlockAboveTheLimitIsFreedAndTheOthersStay) {
    KeptMemory memory(8 * PAGE);
    const Block small = memory.take(2 * PAGE), large = memory.take(9 * PAGE);
    memory.give(small), memory.give(large);
    const Block again = memory.take(2 * PAGE);
    EXPECT_EQ(again.data, small.data);
    memory.give(again);
}

TEST(KeptMemory, ThreadsNeverHoldTheSameBlock) {
    KeptMemory memory(8 * PAGE);
    std::vector<std::thread> threads;
    std::atomic<int> clashes = 0;
    for (int id = 1; id <= 4; id++) {
        threads.emplace_back([&, id] {
            for (int round = 0; round < 200; round++) {
                const Block block = memory.take((1 + round % 3) * PAGE);
                auto *value = static_cast<volatile int *>(block.data);
                *value = id;
                std::this_thread::yield();
                if (*value != id) clashes++;
                memory.give(block);
            }
        });
    }
    for (auto &thread : threads) thread.join();
    EXPECT_EQ(clashes, 0);
}

TEST(KeptMemory, MemoryThatCannotBeHadIsNull) {
    KeptMemory memory(8 * PAGE);
    EXPECT_EQ(memory.take(int64_t{1} << 60).data, nullptr);
}

} // namespace
