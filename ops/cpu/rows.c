#include "rows.h"

#include "mmbal/cpu.h"

const mmbal_row_tasks *mmbal_row_tasks_of(int isa) {
#ifdef MMBAL_X86
    if (isa >= MMBAL_ISA_AVX512) return &mmbal_row_tasks_avx512;
    if (isa >= MMBAL_ISA_AVX2) return &mmbal_row_tasks_avx2;
#endif
    (void)isa;
    return &mmbal_row_tasks_portable;
}

const mmbal_row_tasks *mmbal_row_tasks_in_use(void) { return mmbal_row_tasks_of(mmbal_isa_in_use()); }
