#include "kernels.h"

#include <stddef.h>

#include "mmbal/cpu.h"

const mmbal_kernels *mmbal_kernels_of(int isa) {
    switch (isa) {
    case MMBAL_ISA_PORTABLE: return &mmbal_kernels_portable;
#ifdef MMBAL_X86
    case MMBAL_ISA_AVX2: return &mmbal_kernels_avx2;
    case MMBAL_ISA_AVX512: return &mmbal_kernels_avx512;
#endif
#ifdef MMBAL_HAS_AVX512_BF16
    case MMBAL_ISA_AVX512_BF16: return &mmbal_kernels_avx512_bf16;
#endif
#ifdef MMBAL_HAS_AMX
    case MMBAL_ISA_AMX: return &mmbal_kernels_amx;
#endif
    default: return NULL;
    }
}

const mmbal_kernels *mmbal_kernels_in_use(void) { return mmbal_kernels_of(mmbal_isa_in_use()); }

/* Only the tiles of AVX-512 are so fast that it matters. */
blocking mmbal_blocking_in_use(void) {
    return mmbal_isa_in_use() >= MMBAL_ISA_AVX512 && mmbal_caches_are_large() ? BLOCKING_OF_LARGE_CACHES
                                                                              : BLOCKING_OF_SMALL_CACHES;
}
