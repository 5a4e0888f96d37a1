#include "exponential.h"

#include "helpers.h"

namespace {

using namespace mmbal_test;

std::vector<uint32_t> words() {
    std::vector<uint32_t> found = {0, 1, 2, 0x4AFB0CCC, 0x7FFFFFFF, 0x80000000, 0xFFFFFFFE, 0xFFFFFFFF};
    Random random(1);
    for (int i = 0; i < 200000; i++) found.push_back(static_cast<uint32_t>(random.bits() >> (32 + i % 32)));
    return found;
}

TEST(Exponential, IsTheLogarithmOfTheWordToALastPlace) {
    for (uint32_t word : words()) {
        const long double v = (static_cast<long double>(word) + 0.5L) * 0x1p-32L, expected = -std::log1p(-v);
        const auto got = static_cast<long double>(exponential(word));
        ASSERT_LE(std::fabs(got - expected), 0x1p-52L * expected) << word;
        const auto rough = static_cast<long double>(exponential_f32(word));
        ASSERT_LE(std::fabs(rough - expected), 0x1p-22L * expected) << word;
    }
}

TEST(Exponential, GrowsWithTheWord) {
    Random random(2);
    for (int i = 0; i < 100000; i++) {
        const uint32_t word = static_cast<uint32_t>(random.bits() >> (32 + i % 32)) | 1;
        ASSERT_LT(exponential(word - 1), exponential(word)) << word;
    }
}

TEST(BelowExponential, IsThatOfTheCLibraryToALastPlace) {
    Random random(3);
    for (int i = 0; i < 200000; i++) {
        const double x = std::exp2(random.uniform(-60, 7));
        const long double expected = -std::expm1(-static_cast<long double>(x));
        ASSERT_LE(std::fabs(static_cast<long double>(below_exponential(x)) - expected), 0x1p-52L * expected) << x;
    }
    EXPECT_EQ(below_exponential(0), 0);
    EXPECT_EQ(below_exponential(5e-324), 5e-324);
    EXPECT_EQ(below_exponential(1e300), 1);
    EXPECT_EQ(below_exponential(INFINITY), 1);
}

} // namespace
