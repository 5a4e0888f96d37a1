#include "mmbal/status.h"

#include <set>
#include <string>

#include "helpers.h"

namespace {

TEST(Status, OkIsZero) { EXPECT_EQ(static_cast<int>(MMBAL_OK), 0); }

TEST(Status, EveryStatusHasAPhraseOfItsOwn) {
    std::set<std::string> phrases;
    for (mmbal_status status : {MMBAL_OK, MMBAL_INVALID_ARGUMENT, MMBAL_INVALID_INDEX, MMBAL_DUPLICATE_INDEX,
                                MMBAL_UNSUPPORTED, MMBAL_DEVICE_ERROR}) {
        const char *phrase = mmbal_status_string(status);
        ASSERT_NE(phrase, nullptr);
        EXPECT_STRNE(phrase, "");
        phrases.insert(phrase);
    }
    EXPECT_EQ(phrases.size(), 6u);
}

TEST(Status, UnknownStatusHasAPhraseToo) {
    for (int value : {-1, 6, 1000}) EXPECT_NE(mmbal_status_string(mmbal_test::enum_of<mmbal_status>(value)), nullptr);
}

} // namespace
