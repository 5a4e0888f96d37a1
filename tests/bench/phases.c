/* Where the time of expert_mlp goes: every pass of a forward and a backward, timed by a pool that hands it on.
 *
 *     phases [N D F E K bfloat16]     one thread; balanced routing */
#define _DEFAULT_SOURCE
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#ifdef __linux__
#include <sys/mman.h>
#endif
#include <time.h>

#include "blocks.h"
#include "mmbal/expert_mlp.h"
#include "mmbal/routing.h"

enum { MOST_PASSES = 4096, ROUNDS = 5 };

typedef struct timing_pool {
    mmbal_pool pool, serial;
    double seconds[MOST_PASSES];
    int passes;
} timing_pool;

static double now(void) {
    struct timespec t;
    clock_gettime(CLOCK_MONOTONIC, &t);
    return (double)t.tv_sec + 1e-9 * (double)t.tv_nsec;
}

static mmbal_status run_timed(void *self, int64_t count, int64_t grain, mmbal_task *task, void *context) {
    timing_pool *timing = self;
    const double begin = now();
    const mmbal_status status = timing->serial.run(timing->serial.self, count, grain, task, context);
    if (timing->passes < MOST_PASSES) timing->seconds[timing->passes++] += now() - begin;
    return status;
}

/* As torch_ext has it: inputs are torch's, outputs and workspace kept memory in large pages. */
static void *memory(size_t bytes, int large_pages) {
    const size_t page = large_pages ? (size_t)2 << 20 : 64, whole = (bytes + page - 1) / page * page;
    void *made = aligned_alloc(page, whole);
    if (!made) exit(1);
#ifdef MADV_HUGEPAGE
    if (large_pages) madvise(made, whole, MADV_HUGEPAGE);
#endif
    return memset(made, 0, whole);
}

static void *numbers(int64_t count, int bfloat16, float scale) {
    float *values = memory(sizeof *values * (size_t)count, 0);
    uint32_t state = 1;
    for (int64_t i = 0; i < count; i++) {
        state = state * 1664525u + 1013904223u;
        values[i] = scale * ((float)(state >> 8) / (float)(1 << 24) - 0.5f);
    }
    if (!bfloat16) return values;
    uint16_t *narrow = memory(sizeof *narrow * (size_t)count, 0);
    for (int64_t i = 0; i < count; i++) {
        uint32_t bits;
        memcpy(&bits, values + i, sizeof bits);
        narrow[i] = (uint16_t)(bits >> 16);
    }
    free(values);
    return narrow;
}

/* The passes of a wave repeat; those after the last wave stand alone. */
static void print(const char *title, const timing_pool *timing, int wave_passes, const char *const *names) {
    double sums[8] = {0}, total = 0;
    const int after = timing->passes % wave_passes;
    for (int i = 0; i < timing->passes; i++) {
        const int in_wave = i < timing->passes - after;
        sums[in_wave ? i % wave_passes : wave_passes + i - (timing->passes - after)] += timing->seconds[i];
        total += timing->seconds[i];
    }
    printf("%s\n", title);
    for (int i = 0; i < wave_passes + after; i++)
        printf("  %-34s %9.2f ms %6.2f %%\n", names[i], 1e3 * sums[i] / ROUNDS, 100 * sums[i] / total);
}

int main(int count, char **arguments) {
    const int64_t given[6] = {4096, 768, 3072, 4, 2, 0};
    int64_t v[6];
    for (int i = 0; i < 6; i++) v[i] = count > i + 1 ? atoll(arguments[i + 1]) : given[i];
    const int64_t N = v[0], D = v[1], F = v[2], E = v[3], K = v[4], R = N * K;
    const int bfloat16 = v[5] != 0;
    const mmbal_dtype dtype = bfloat16 ? MMBAL_BF16 : MMBAL_F32;
    int64_t *indices = malloc(8 * (size_t)R), *permutation = malloc(8 * (size_t)R), *inverse = malloc(8 * (size_t)R);
    int64_t *offsets = malloc(8 * (size_t)(E + 1));
    if (!indices || !permutation || !inverse || !offsets) return 1;
    for (int64_t i = 0; i < R; i++) indices[i] = (i / K + i % K) % E;
    if (mmbal_moe_dispatch(indices, N, K, E, permutation, offsets, inverse) != MMBAL_OK) return 1;
    const mmbal_expert_mlp_inputs in = {.x = numbers(N * D, bfloat16, 1),
                                        .w1 = numbers(E * F * D, bfloat16, 0.1f),
                                        .b1 = numbers(E * F, bfloat16, 0.1f),
                                        .w2 = numbers(E * D * F, bfloat16, 0.1f),
                                        .b2 = numbers(E * D, bfloat16, 0.1f),
                                        .weights = numbers(R, 0, 1),
                                        .permutation = permutation,
                                        .offsets = offsets,
                                        .inverse = inverse};
    const mmbal_expert_mlp_shape shape = {N, D, F, E, K};
    const mmbal_expert_mlp_options options = {.activation = MMBAL_QUICK_GELU};
    const size_t size = bfloat16 ? 2 : 4;
    const mmbal_expert_mlp_gradients out = {memory(size * (size_t)(N * D), 1), memory(size * (size_t)(E * F * D), 1),
                                            memory(size * (size_t)(E * F), 1), memory(size * (size_t)(E * D * F), 1),
                                            memory(size * (size_t)(E * D), 1), memory(4 * (size_t)R, 1)};
    void *y = memory(size * (size_t)(N * D), 1), *u = memory(size * (size_t)(R * F), 1);
    void *dy = numbers(N * D, bfloat16, 1);
    const int64_t forward_bytes = mmbal_expert_mlp_workspace(dtype, shape, offsets, 1);
    const int64_t backward_bytes = mmbal_expert_mlp_backward_workspace(dtype, shape, offsets, 1);
    void *workspace = memory((size_t)(forward_bytes > backward_bytes ? forward_bytes : backward_bytes), 1);
    timing_pool forward = {.pool = {run_timed, 1, &forward}, .serial = mmbal_pool_serial()}, backward = forward;
    backward.pool.self = &backward;
    for (int round = -1; round < ROUNDS; round++) { /* the first round warms up */
        if (round == 0) memset(forward.seconds, 0, sizeof forward.seconds);
        if (round == 0) memset(backward.seconds, 0, sizeof backward.seconds);
        forward.passes = backward.passes = 0;
        if (mmbal_expert_mlp(dtype, &in, shape, &options, y, u, workspace, &forward.pool) != MMBAL_OK ||
            mmbal_expert_mlp_backward(dtype, dy, &in, u, shape, &options, &out, workspace, &backward.pool) != MMBAL_OK)
            return 1;
    }
    static const char *const forward_names[] = {"gather x", "u = x w1, activation", "o = a w2", "combine"};
    static const char *const forward_of_few[] = {"gather x", "x as a right factor", "u = x w1, activation", "o = a w2",
                                                 "combine"};
    static const char *const backward_names[] = {
        "gather and transpose dy, x", "h = g w2, du", "dx = du w1", "dw1, db1", "dw2, db2", "dweights", "combine dx"};
    static const char *const backward_of_many[] = {"gather and transpose dy, x",
                                                   "x as a right factor",
                                                   "h = g w2, du, dw1, db1, dw2",
                                                   "db2",
                                                   "dx = du w1",
                                                   "dweights",
                                                   "combine dx"};
    const int64_t rows = R / E; /* docs/kernels.md: which way experts with so many go */
    const int few_right = few_rows(rows) && forward.passes % 4 == 1; /* a pass more in each wave, and the last */
    print("forward", &forward, few_right ? 4 : 3, few_right ? forward_of_few : forward_names);
    print("backward", &backward, 5, rows > FEW_ROWS ? backward_of_many : backward_names);
    return 0;
}
