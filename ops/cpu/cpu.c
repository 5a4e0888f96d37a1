#define _DEFAULT_SOURCE /* syscall */
#include "mmbal/cpu.h"

#include <stdlib.h>
#include <string.h>

#include "kernels.h"

#ifdef MMBAL_X86
#include <cpuid.h>
#endif
#ifdef __linux__
#include <unistd.h>
#endif
#if defined MMBAL_X86 && defined __linux__
#include <sys/syscall.h>
#endif

static const char *const isa_names[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

const char *mmbal_isa_name(mmbal_isa isa) {
    return isa >= MMBAL_ISA_PORTABLE && isa <= MMBAL_ISA_AMX ? isa_names[isa] : "unknown";
}

int mmbal_isa_from_name(const char *name, mmbal_isa *isa) {
    for (int i = MMBAL_ISA_PORTABLE; i <= MMBAL_ISA_AMX; i++) {
        if (strcmp(name, isa_names[i]) == 0) {
            *isa = (mmbal_isa)i;
            return 1;
        }
    }
    return 0;
}

#ifdef MMBAL_X86
/* Linux saves tile registers only for a process that has asked for them: arch_prctl(ARCH_REQ_XCOMP_PERM,
 * XFEATURE_XTILEDATA), Documentation/arch/x86/xstate.rst. A kernel that does not know the request has no tiles. */
static int tiles_permitted(void) {
#ifdef __linux__
    enum { ARCH_REQ_XCOMP_PERM = 0x1023, XFEATURE_XTILEDATA = 18 };
    return syscall(SYS_arch_prctl, ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA) == 0;
#else
    return 0;
#endif
}
#endif

static int find_features(void) {
    int found = 0;
#ifdef MMBAL_X86
    __builtin_cpu_init();
    if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) found |= MMBAL_CPU_AVX2_FMA;
    if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
        found |= MMBAL_CPU_AVX512;
    unsigned eax, ebx, ecx, edx;
    /* Intel SDM vol. 2A, CPUID leaf 7: EAX bit 5 of sub-leaf 1; EDX bits 22 (AMX-BF16) and 24 (AMX-TILE) of 0 */
    if (found & MMBAL_CPU_AVX512 && __get_cpuid_count(7, 1, &eax, &ebx, &ecx, &edx) && (eax & (1u << 5)))
        found |= MMBAL_CPU_AVX512_BF16;
    const unsigned tiles = 1u << 22 | 1u << 24;
    if (found & MMBAL_CPU_AVX512_BF16 && __get_cpuid_count(7, 0, &eax, &ebx, &ecx, &edx) && (edx & tiles) == tiles &&
        tiles_permitted())
        found |= MMBAL_CPU_AMX_BF16;
#endif
    return found;
}

enum { UNREAD = -1 };

/* Every thread that comes first finds the same value, so a race writes it twice at worst. */
static int read_once(int *known, int (*find)(void)) {
    int value = __atomic_load_n(known, __ATOMIC_RELAXED);
    if (value == UNREAD) {
        value = find();
        __atomic_store_n(known, value, __ATOMIC_RELAXED);
    }
    return value;
}

unsigned mmbal_cpu_features(void) {
    static int features = UNREAD;
    return (unsigned)read_once(&features, find_features);
}

int mmbal_bfloat16_pairs_are_slow(void) {
#ifdef MMBAL_X86
    unsigned eax, ebx, ecx, edx;
    /* CPUID leaf 0: the vendor's name in EBX, EDX, ECX */
    return __get_cpuid(0, &eax, &ebx, &ecx, &edx) && ebx == signature_INTEL_ebx && edx == signature_INTEL_edx &&
           ecx == signature_INTEL_ecx;
#else
    return 0;
#endif
}

static int find_large_caches(void) {
    const char *wanted = getenv("MMBAL_CACHES");
    if (wanted && strcmp(wanted, "small") == 0) return 0;
    if (wanted && strcmp(wanted, "large") == 0) return 1;
#if defined _SC_LEVEL1_DCACHE_SIZE && defined _SC_LEVEL2_CACHE_SIZE
    return sysconf(_SC_LEVEL1_DCACHE_SIZE) >= 48 << 10 && sysconf(_SC_LEVEL2_CACHE_SIZE) >= 2 << 20;
#else
    return 0;
#endif
}

int mmbal_caches_are_large(void) {
    static int large = UNREAD;
    return read_once(&large, find_large_caches);
}

static int choose_isa(void) {
    mmbal_isa cap = MMBAL_ISA_AMX, best = MMBAL_ISA_PORTABLE, asked = cap;
    const char *wanted = getenv("MMBAL_ISA");
    if (wanted && mmbal_isa_from_name(wanted, &asked) && asked < cap) cap = asked;
    const unsigned features = mmbal_cpu_features();
    const int pairs = asked == MMBAL_ISA_AVX512_BF16 || !mmbal_bfloat16_pairs_are_slow();
    if (features & MMBAL_CPU_AVX2_FMA) best = MMBAL_ISA_AVX2;
    if (features & MMBAL_CPU_AVX512) best = MMBAL_ISA_AVX512;
    if (features & MMBAL_CPU_AVX512_BF16) best = MMBAL_ISA_AVX512_BF16;
    if (features & MMBAL_CPU_AMX_BF16) best = MMBAL_ISA_AMX;
    if (best > cap) best = cap;
    /* a build without the compiler's support for an instruction set, or one that is no gain here */
    while (!mmbal_kernels_of(best) || (best == MMBAL_ISA_AVX512_BF16 && !pairs)) best--;
    return best;
}

mmbal_isa mmbal_isa_in_use(void) {
    static int isa = UNREAD;
    return (mmbal_isa)read_once(&isa, choose_isa);
}
