/* Products a second of a loop that never leaves the registers: what a kernel can at most reach on this core right now.
 */
#define _POSIX_C_SOURCE 199309L
#include <stdint.h>
#include <time.h>

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

#if defined __AVX512F__
#define IN_REGISTER "+v"
enum { LANES = 16, SUMS = 24 };
#elif defined __AVX2__
#define IN_REGISTER "+x"
enum { LANES = 8, SUMS = 12 };
#else
#define IN_REGISTER "+x"
enum { LANES = 4, SUMS = 12 };
#endif
typedef float vector __attribute__((vector_size(LANES * sizeof(float))));

volatile float sink;

/* Sums that do not wait for each other: at least as many as an instruction has cycles of latency times ports. */
double peak_float32(double seconds) {
    vector sum[SUMS], a = {0}, b = {0};
    for (int i = 0; i < LANES; i++) a[i] = 1.0f / (float)(i + 3), b[i] = 1e-3f;
#pragma GCC unroll 32
    for (int i = 0; i < SUMS; i++) sum[i] = a * (float)i;
    const double begin = now();
    double elapsed, products = 0;
    do {
        for (int round = 0; round < 20000; round++) {
#pragma GCC unroll 32
            for (int i = 0; i < SUMS; i++) {
                sum[i] = sum[i] * a + b;
                __asm__ volatile("" : IN_REGISTER(sum[i])); /* each is really computed */
            }
        }
        products += 20000.0 * SUMS * LANES;
        elapsed = now() - begin;
    } while (elapsed < seconds);
#pragma GCC unroll 32
    for (int i = 0; i < SUMS; i++) sink += sum[i][0];
    return products / elapsed;
}

#ifdef __AVX512BF16__
#include <immintrin.h>
double peak_bfloat16(double seconds) {
    __m512 sum[SUMS];
    const __m512bh a = (__m512bh)_mm512_set1_epi16(0x3e80), b = (__m512bh)_mm512_set1_epi16(0x3c00);
#pragma GCC unroll 32
    for (int i = 0; i < SUMS; i++) sum[i] = _mm512_set1_ps((float)i);
    const double begin = now();
    double elapsed, products = 0;
    do {
        for (int round = 0; round < 20000; round++) {
#pragma GCC unroll 32
            for (int i = 0; i < SUMS; i++) {
                sum[i] = _mm512_dpbf16_ps(sum[i], a, b);
                __asm__ volatile("" : IN_REGISTER(sum[i]));
            }
        }
        products += 20000.0 * SUMS * LANES * 2;
        elapsed = now() - begin;
    } while (elapsed < seconds);
#pragma GCC unroll 32
    for (int i = 0; i < SUMS; i++) sink += _mm512_reduce_add_ps(sum[i]);
    return products / elapsed;
}
#else
double peak_bfloat16(double seconds) {
    (void)seconds;
    return 0;
}
#endif
