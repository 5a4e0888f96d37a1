#include "mmbal/cpu.h"

#include <algorithm>
#include <cstdlib>

#include "helpers.h"

extern "C" {
#include "kernels.h"
}

namespace {

mmbal_isa best_of_this_machine() {
    const unsigned features = mmbal_cpu_features();
    const std::vector<std::pair<mmbal_isa, bool>> isas = {
        {MMBAL_ISA_AMX, features & MMBAL_CPU_AMX_BF16},
        {MMBAL_ISA_AVX512_BF16, features & MMBAL_CPU_AVX512_BF16 && !mmbal_bfloat16_pairs_are_slow()},
        {MMBAL_ISA_AVX512, features & MMBAL_CPU_AVX512},
        {MMBAL_ISA_AVX2, features & MMBAL_CPU_AVX2_FMA}};
    for (const auto &[isa, usable] : isas)
        if (usable && mmbal_kernels_of(isa)) return isa;
    return MMBAL_ISA_PORTABLE;
}

// The choice is made once in a process: each of these is made in a new one.
class IsaChoice : public ::testing::Test {
protected:
    void SetUp() override { GTEST_FLAG_SET(death_test_style, "threadsafe"); }
    static void exit_with_isa_in_use() { std::_Exit(40 + static_cast<int>(mmbal_isa_in_use())); }
    static void expect_choice(const char *wanted, mmbal_isa expected) {
        const char *before = std::getenv("MMBAL_ISA");
        const std::string kept = before ? before : "";
        if (wanted)
            setenv("MMBAL_ISA", wanted, 1);
        else
            unsetenv("MMBAL_ISA");
        EXPECT_EXIT(exit_with_isa_in_use(), ::testing::ExitedWithCode(40 + static_cast<int>(expected)), "")
            << (wanted ? wanted : "(not set)");
        if (before)
            setenv("MMBAL_ISA", kept.c_str(), 1);
        else
            unsetenv("MMBAL_ISA");
    }
};

TEST(Cpu, EveryIsaNameGivesTheIsaBack) {
    for (mmbal_isa isa : {MMBAL_ISA_PORTABLE, MMBAL_ISA_AVX2, MMBAL_ISA_AVX512, MMBAL_ISA_AVX512_BF16, MMBAL_ISA_AMX}) {
        mmbal_isa found = isa == MMBAL_ISA_PORTABLE ? MMBAL_ISA_AMX : MMBAL_ISA_PORTABLE;
        EXPECT_EQ(mmbal_isa_from_name(mmbal_isa_name(isa), &found), 1);
        EXPECT_EQ(found, isa);
    }
}

TEST(Cpu, IsaNamesAreThoseOfTheHeader) {
    EXPECT_STREQ(mmbal_isa_name(MMBAL_ISA_PORTABLE), "portable");
    EXPECT_STREQ(mmbal_isa_name(MMBAL_ISA_AVX2), "avx2");
    EXPECT_STREQ(mmbal_isa_name(MMBAL_ISA_AVX512), "avx512");
    EXPECT_STREQ(mmbal_isa_name(MMBAL_ISA_AVX512_BF16), "avx512_bf16");
    EXPECT_STREQ(mmbal_isa_name(MMBAL_ISA_AMX), "amx");
}

TEST(Cpu, UnknownIsaNamesAreRefused) {
    for (const char *name : {"", "AVX2", "avx", "avx5122", "sse"}) {
        mmbal_isa isa = MMBAL_ISA_AVX2;
        EXPECT_EQ(mmbal_isa_from_name(name, &isa), 0) << name;
    }
}

TEST(Cpu, FeaturesAreTheSameAtEveryCall) { EXPECT_EQ(mmbal_cpu_features(), mmbal_cpu_features()); }

TEST(Cpu, FeaturesAreOnlyThoseOfTheHeader) {
    const unsigned all = MMBAL_CPU_AVX2_FMA | MMBAL_CPU_AVX512 | MMBAL_CPU_AVX512_BF16 | MMBAL_CPU_AMX_BF16;
    EXPECT_EQ(mmbal_cpu_features() & ~all, 0u);
#ifndef MMBAL_X86
    EXPECT_EQ(mmbal_cpu_features(), 0u);
#endif
}

TEST(Cpu, IsaInUseHasKernelsAndIsOfThisMachine) {
    const bool asked_for = // where it is not the best, but there
        mmbal_isa_in_use() == MMBAL_ISA_AVX512_BF16 && mmbal_cpu_features() & MMBAL_CPU_AVX512_BF16;
    EXPECT_TRUE(asked_for || mmbal_isa_in_use() <= best_of_this_machine());
    ASSERT_NE(mmbal_kernels_of(mmbal_isa_in_use()), nullptr);
    EXPECT_EQ(mmbal_kernels_in_use(), mmbal_kernels_of(mmbal_isa_in_use()));
}

TEST_F(IsaChoice, WithoutTheVariableIsTheBestOfTheMachine) { expect_choice(nullptr, best_of_this_machine()); }

TEST_F(IsaChoice, IsCappedByTheVariable) {
    expect_choice("portable", MMBAL_ISA_PORTABLE);
    expect_choice("avx2", std::min(MMBAL_ISA_AVX2, best_of_this_machine()));
    expect_choice("avx512", std::min(MMBAL_ISA_AVX512, best_of_this_machine()));
}

// Where its products are slow it is not the best, but there.
TEST_F(IsaChoice, ProductsOfPairsAreUsedWhereTheyAreAskedFor) {
    const bool there = mmbal_cpu_features() & MMBAL_CPU_AVX512_BF16 && mmbal_kernels_of(MMBAL_ISA_AVX512_BF16);
    expect_choice("avx512_bf16", there ? MMBAL_ISA_AVX512_BF16 : std::min(MMBAL_ISA_AVX512, best_of_this_machine()));
}

TEST_F(IsaChoice, AskingForMoreThanThereIsGivesTheBestThereIs) { expect_choice("amx", best_of_this_machine()); }

TEST_F(IsaChoice, IgnoresAnUnknownName) {
    expect_choice("", best_of_this_machine());
    expect_choice("Portable", best_of_this_machine());
}

} // namespace
