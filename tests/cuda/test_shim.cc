// The shim reports what it is there to find, and nothing about kernels that are right.
#include <algorithm>
#include <functional>
#include <numeric>

#include "device.h"
#include "planted.h"

namespace mmbal_test {
namespace {

constexpr int COUNT = 64;

std::vector<int> ascending(int64_t count) {
    std::vector<int> values(count);
    std::iota(values.begin(), values.end(), 0);
    return values;
}

// What the shim reports of a run with a bug, and with none.
std::string reports_of(const std::function<void()> &run) {
    cuda_shim::options = {};
    run();
    return joined(cuda_shim::take_reports());
}

#define NEEDS_ACCESS_CHECKS()                                                                                          \
    if (!cuda_shim::checks_accesses()) GTEST_SKIP() << "AddressSanitizer checks bounds alone"

#ifdef __SANITIZE_ADDRESS__
constexpr bool UNDER_ADDRESS_SANITIZER = true;
#else
constexpr bool UNDER_ADDRESS_SANITIZER = false;
#endif

std::vector<int> reversed(Bug bug) {
    DeviceArray<int> values("values", ascending(COUNT)), out("out", COUNT);
    planted_reverse(values.data(), out.data(), bug);
    return std::vector<int>(out.data(), out.data() + COUNT);
}

std::vector<int> reversed_by_copies(Bug bug) {
    DeviceArray<int> values("values", ascending(COUNT)), out("out", COUNT);
    planted_copies(values.data(), out.data(), bug);
    return std::vector<int>(out.data(), out.data() + COUNT);
}

void copied(Bug bug) {
    constexpr int64_t ODD = 100;
    DeviceArray<int> values("values", ascending(ODD)), out("out", ODD);
    planted_copy(values.data(), ODD, out.data(), bug);
    EXPECT_TRUE(std::equal(out.data(), out.data() + ODD, values.data()));
}

void summed(Bug bug) {
    DeviceArray<int> values("values", ascending(COUNT * 3)), out("sum", std::vector<int>{0});
    planted_sum(values.data(), COUNT * 3, out.data(), bug);
    if (bug != Bug::NONE) return;
    EXPECT_EQ(out.values()[0], COUNT * 3 * (COUNT * 3 - 1) / 2);
}

void neighbours_added(Bug bug) {
    DeviceArray<int> values("values", ascending(COUNT)), out("sums", COUNT);
    planted_neighbours(values.data(), out.data(), bug);
    if (bug != Bug::NONE) return;
    for (int t = 0; t < COUNT; t++) EXPECT_EQ(out.values()[t], t + (t ^ 1));
}

TEST(Shim, ReportsNothingAboutKernelsThatAreRight) {
    for_each_schedule([] {
        std::vector<int> expected = ascending(COUNT);
        std::reverse(expected.begin(), expected.end());
        EXPECT_EQ(reversed(Bug::NONE), expected);
        EXPECT_EQ(reversed_by_copies(Bug::NONE), expected);
        copied(Bug::NONE);
        summed(Bug::NONE);
        neighbours_added(Bug::NONE);
    });
}

TEST(Shim, ReportsAMissingBarrier) {
    NEEDS_ACCESS_CHECKS();
    EXPECT_NE(reports_of([] { reversed(Bug::MISSING_BARRIER); }).find("race"), std::string::npos);
}

TEST(Shim, SchedulesShowAMissingBarrierInTheResultToo) {
    std::vector<std::vector<int>> results;
    for (unsigned seed : {0u, 1u, 2u, 3u}) {
        cuda_shim::options = {seed, 0xFF};
        results.push_back(reversed(Bug::MISSING_BARRIER));
    }
    cuda_shim::options = {};
    cuda_shim::take_reports();
    EXPECT_TRUE(std::any_of(results.begin(), results.end(), [&](const auto &r) { return r != results[0]; }));
}

TEST(Shim, ReportsAMissingWarpBarrier) {
    NEEDS_ACCESS_CHECKS();
    EXPECT_NE(reports_of([] { neighbours_added(Bug::MISSING_WARP_BARRIER); }).find("race"), std::string::npos);
}

TEST(Shim, ReportsARaceBetweenBlocks) {
    NEEDS_ACCESS_CHECKS();
    const std::string text = reports_of([] { summed(Bug::RACE); });
    EXPECT_NE(text.find("race"), std::string::npos) << text;
    EXPECT_NE(text.find("of block 1"), std::string::npos) << text;
}

TEST(Shim, ReportsAnUninitialisedReadOfSharedMemory) {
    NEEDS_ACCESS_CHECKS();
    const std::string text = reports_of([] { reversed(Bug::UNINITIALISED_SHARED); });
    EXPECT_NE(text.find("uninitialised read at shared memory, byte 20"), std::string::npos) << text;
}

TEST(Shim, ReportsAReadOfACopyThatNobodyWaitedFor) {
    NEEDS_ACCESS_CHECKS();
    const std::string text = reports_of([] { reversed_by_copies(Bug::MISSING_WAIT); });
    EXPECT_NE(text.find("uninitialised read at shared memory"), std::string::npos) << text;
}

TEST(Shim, PoisonShowsAnUninitialisedReadInTheResultToo) {
    EXPECT_EQ(reversed(Bug::UNINITIALISED_SHARED)[COUNT - 1 - 5], -1);
    cuda_shim::take_reports();
}

TEST(Shim, ReportsATailThatIsOffByOne) {
    if (UNDER_ADDRESS_SANITIZER) {
        EXPECT_DEATH(copied(Bug::TAIL), "heap-buffer-overflow");
    } else {
        const std::string text = reports_of([] { copied(Bug::TAIL); });
        EXPECT_NE(text.find("out of bounds: read of 4 bytes at values, byte 400 of 400"), std::string::npos) << text;
    }
}

TEST(Shim, ReportsAReadBeyondSharedMemory) {
    if (UNDER_ADDRESS_SANITIZER) {
        EXPECT_DEATH(reversed(Bug::BEYOND_SHARED), "heap-buffer-overflow");
    } else {
        const std::string text = reports_of([] { reversed(Bug::BEYOND_SHARED); });
        EXPECT_NE(text.find("out of bounds: read of 4 bytes at shared memory"), std::string::npos) << text;
    }
}

TEST(Shim, ReportsBarriersAtDifferentPlaces) {
    EXPECT_NE(reports_of([] { neighbours_added(Bug::DIVERGENT_BARRIER); }).find("divergent barrier"),
              std::string::npos);
}

TEST(Shim, ReportsWarpPrimitivesAtDifferentPlaces) {
    EXPECT_NE(reports_of([] { neighbours_added(Bug::DIVERGENT_SHUFFLE); }).find("divergent warp primitive"),
              std::string::npos);
}

TEST(Shim, ReportsThreadsThatWaitForever) {
    EXPECT_NE(reports_of([] { neighbours_added(Bug::DEADLOCK); }).find("deadlock"), std::string::npos);
}

} // namespace
} // namespace mmbal_test
