/* What this processor offers and which kernels are used on it. Read once; nothing else in the core is global. */
#ifndef MMBAL_CPU_H
#define MMBAL_CPU_H

#ifdef __cplusplus
extern "C" {
#endif

typedef enum mmbal_isa {
    MMBAL_ISA_PORTABLE = 0,
    MMBAL_ISA_AVX2,
    MMBAL_ISA_AVX512,
    MMBAL_ISA_AVX512_BF16, /* the one before with dot products of bfloat16 pairs */
    MMBAL_ISA_AMX          /* the one before with tile products of bfloat16 */
} mmbal_isa;

enum {
    MMBAL_CPU_AVX2_FMA = 1,    /* AVX2 and FMA */
    MMBAL_CPU_AVX512 = 2,      /* F, BW, DQ and VL */
    MMBAL_CPU_AVX512_BF16 = 4, /* dot products of bfloat16 pairs */
    MMBAL_CPU_AMX_BF16 = 8     /* tile products of bfloat16, where the operating system lets a process use them */
};

/* The features found, a sum of MMBAL_CPU_*. */
unsigned mmbal_cpu_features(void);

/* 1 where a dot product of bfloat16 pairs takes as long as four float32 multiply-adds of the same width, so that
 * bfloat16 is multiplied faster as float32: Intel's processors, 87 against 175 GFLOP/s a core (tests/bench/peak.c). */
int mmbal_bfloat16_pairs_are_slow(void);

/* 1 where a core has 48 KiB of first-level and 2 MiB of second-level cache or more, or where the environment variable
 * MMBAL_CACHES=small|large says so, for tests and comparisons. */
int mmbal_caches_are_large(void);

/* The best instruction set that the processor has, this build has kernels for, and the environment variable
 * MMBAL_ISA=portable|avx2|avx512|avx512_bf16|amx allows. avx512_bf16 must be asked for where its products are slow. An
 * unknown value of the variable counts as absent: see mmbal_isa_from_name. */
mmbal_isa mmbal_isa_in_use(void);

const char *mmbal_isa_name(mmbal_isa isa);

/* 1 and *isa when name is one of portable, avx2, avx512, avx512_bf16, amx; otherwise 0. */
int mmbal_isa_from_name(const char *name, mmbal_isa *isa);

#ifdef __cplusplus
}
#endif
#endif
