#include "mmbal/philox.h"

#include <array>
#include <cmath>

#include "helpers.h"

namespace {

using Words = std::array<uint32_t, 4>;

Words philox(const Words &counter, const std::array<uint32_t, 2> &key) {
    Words out;
    mmbal_philox4x32(counter.data(), key.data(), out.data());
    return out;
}

// The known answers of Random123 1.14 (kat_vectors, philox4x32 10).
TEST(Philox, ZerosGiveTheKnownAnswer) {
    EXPECT_EQ(philox({0, 0, 0, 0}, {0, 0}), (Words{0x6627e8d5, 0xe169c58d, 0xbc57ac4c, 0x9b00dbd8}));
}

TEST(Philox, OnesGiveTheKnownAnswer) {
    const uint32_t ones = 0xffffffff;
    EXPECT_EQ(philox({ones, ones, ones, ones}, {ones, ones}), (Words{0x408f276d, 0x41c83b0e, 0xa20bc7c6, 0x6d5451fd}));
}

TEST(Philox, DigitsOfPiGiveTheKnownAnswer) {
    EXPECT_EQ(philox({0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344}, {0xa4093822, 0x299f31d0}),
              (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, OutputMayBeTheCounter) {
    uint32_t words[4] = {0x243f6a88, 0x85a308d3, 0x13198a2e, 0x03707344};
    const uint32_t key[2] = {0xa4093822, 0x299f31d0};
    mmbal_philox4x32(words, key, words);
    EXPECT_EQ((Words{words[0], words[1], words[2], words[3]}), (Words{0xd16cfe09, 0x94fdcceb, 0x5001e420, 0x24126ea1}));
}

TEST(Philox, EachWordOfCounterAndKeyChangesEachWordOfTheOutput) {
    const Words base = philox({1, 2, 3, 4}, {5, 6});
    for (int word = 0; word < 6; word++) {
        Words counter = {1, 2, 3, 4};
        std::array<uint32_t, 2> key = {5, 6};
        (word < 4 ? counter[word] : key[word - 4]) ^= 0x80000000u;
        const Words changed = philox(counter, key);
        for (int lane = 0; lane < 4; lane++) EXPECT_NE(changed[lane], base[lane]) << word << " " << lane;
    }
}

} // namespace
