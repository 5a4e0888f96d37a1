// Tests that run once for each instruction set that this build has kernels for and this machine can run.
#ifndef MMBAL_TESTS_EVERY_ISA_H
#define MMBAL_TESTS_EVERY_ISA_H

#include "helpers.h"
#include "mmbal/cpu.h"

extern "C" {
#include "kernels.h"
}

namespace mmbal_test {

class EveryIsa : public ::testing::TestWithParam<mmbal_isa> {
protected:
    void SetUp() override {
        if (GetParam() == MMBAL_ISA_AVX2 && !(mmbal_cpu_features() & MMBAL_CPU_AVX2_FMA)) GTEST_SKIP() << "no AVX2";
        if (GetParam() == MMBAL_ISA_AVX512 && !(mmbal_cpu_features() & MMBAL_CPU_AVX512)) GTEST_SKIP() << "no AVX-512";
        if (GetParam() == MMBAL_ISA_AVX512_BF16 && !(mmbal_cpu_features() & MMBAL_CPU_AVX512_BF16))
            GTEST_SKIP() << "no AVX512-BF16";
        if (GetParam() == MMBAL_ISA_AMX && !(mmbal_cpu_features() & MMBAL_CPU_AMX_BF16)) GTEST_SKIP() << "no AMX";
        ASSERT_NE(mmbal_kernels_of(GetParam()), nullptr);
    }
    const mmbal_kernels *table() const { return mmbal_kernels_of(GetParam()); }
};

inline std::vector<mmbal_isa> isas_of_this_build() {
    std::vector<mmbal_isa> isas;
    for (int isa = MMBAL_ISA_PORTABLE; isa <= MMBAL_ISA_AMX; isa++)
        if (mmbal_kernels_of(isa)) isas.push_back(static_cast<mmbal_isa>(isa));
    return isas;
}

} // namespace mmbal_test

#define MMBAL_INSTANTIATE_FOR_EVERY_ISA()                                                                              \
    INSTANTIATE_TEST_SUITE_P(Kernels, EveryIsa, ::testing::ValuesIn(mmbal_test::isas_of_this_build()),                 \
                             [](const auto &of) { return mmbal_isa_name(of.param); })

#endif
