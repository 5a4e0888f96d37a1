// The numbers of bfloat16.h and float16.h, one by one.
#include "helpers.h"

extern "C" {
#include "bfloat16.h"
#include "float16.h"
}

namespace {

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

TEST(Float16, KnownRoundings) {
    const struct {
        float value;
        float16 expected;
        const char *what;
    } cases[] = {
        {1.0f, 0x3C00, "1"},
        {-2.0f, 0xC000, "-2"},
        {65504.0f, 0x7BFF, "the largest"},
        {65519.996f, 0x7BFF, "just below the middle of the largest and infinity"},
        {65520.0f, 0x7C00, "the middle becomes infinity"},
        {1e30f, 0x7C00, "beyond"},
        {INFINITY, 0x7C00, "infinity"},
        {-0.0f, 0x8000, "-0"},
        {0x1p-24f, 0x0001, "the smallest subnormal"},
        {0x1p-25f, 0x0000, "tie between 0 and a subnormal"},
        {0x1.8p-24f, 0x0002, "tie between subnormals"},
        {0x1.ffcp-15f, 0x0400, "tie of the largest subnormal becomes normal"},
        {0x1p-40f, 0x0000, "far below"},
    };
    for (const auto &c : cases) EXPECT_EQ(float16_of_float(c.value), c.expected) << c.what;
}

TEST(Float16, EveryNumberIsThatOfItsBitsAndSurvivesTheRoundTrip) {
    for (uint32_t stored = 0; stored <= 0xFFFF; stored++) {
        const float value = float_of_float16(static_cast<float16>(stored));
        const double expected = mmbal_test::F16::load({static_cast<uint16_t>(stored)});
        ASSERT_EQ(std::isnan(value), std::isnan(expected)) << stored;
        if (std::isnan(value)) {
            ASSERT_TRUE(std::isnan(float_of_float16(float16_of_float(value))));
            continue;
        }
        ASSERT_EQ(value, expected) << stored;
        ASSERT_EQ(float16_of_float(value), stored);
    }
}

TEST(Float16, RoundsToTheNearestBetweenAllNeighbours) {
    for (uint32_t stored = 0; stored < 0x7BFF; stored++) {
        const float below = float_of_float16(static_cast<float16>(stored));
        const float above = float_of_float16(static_cast<float16>(stored + 1)), step = above - below;
        ASSERT_EQ(float16_of_float(below + step / 4), stored);
        ASSERT_EQ(float16_of_float(below + step / 2), stored + (stored & 1));
        ASSERT_EQ(float16_of_float(below + step * 3 / 4), stored + 1);
    }
}

} // namespace
