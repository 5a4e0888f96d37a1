#include "mmbal/expert_mlp.h"

#include <string.h>

#include "arena.h"
#include "blocks.h"
#include "dropout.h"
#include "fetch.h"
#include "kernels.h"
#include "mmbal/routing.h"
#include "stream.h"

/* Of passes over rows of D or F elements: some tens of microseconds. */
enum { ROWS_PER_TASK = 16 };
#define GATHERED ((blocking){64, BLOCK_COLS, 0, 0, 0})

/* Columns of F that a part of <h, a> sums over: a divisor of every block's, so that the sum does not depend on it. */
enum { PART_COLS = 96 };

/* One pass of a call over the pool; all that a pass writes is there before the next begins. */
typedef struct pass {
    int needed;
    int64_t count, grain;
    mmbal_task *task;
} pass;

static mmbal_status run_passes(const pass *passes, size_t count, void *call, const mmbal_pool *pool) {
    mmbal_status status = MMBAL_OK;
    for (size_t i = 0; i < count && status == MMBAL_OK; i++)
        if (passes[i].needed) status = pool->run(pool->self, passes[i].count, passes[i].grain, passes[i].task, call);
    return status;
}

/* Products of few rows: as many blocks, at least, keep the workers equally busy. */
enum { BLOCKS_OF_A_WORKER = 4 };

/* Blocks of a wave's rows: high ones pack the weights seldom, but a few for each worker keep all of them busy. */
static blocking blocking_for_balance(blocking most, mmbal_expert_mlp_shape s, const int64_t *offsets, int64_t wave_rows,
                                     int workers) {
    int64_t few = 0;
    for (int64_t e = 0; e < s.E; e++) few += few_rows(offsets[e + 1] - offsets[e]);
    if (few > 0) most.few_across = ceil_div(BLOCKS_OF_A_WORKER * (int64_t)workers, few);
    const int64_t across = ceil_div(s.D < s.F ? s.D : s.F, most.cols), wanted = 8 * (int64_t)workers;
    enum { LEAST_ROWS = 140 };
    while (most.rows > LEAST_ROWS && ceil_div(wave_rows, most.rows) * across < wanted) most.rows /= 2;
    return most;
}

/* Blocks of a task: a worker fetches the weights of its task's next block early, and the last tasks must not keep the
 * others waiting. */
static int64_t blocks_per_task(int64_t blocks, int workers) {
    const int64_t wanted = blocks / (16 * (int64_t)workers);
    return wanted < 1 ? 1 : least(wanted, 4);
}

/* Experts go through the products together as long as their rows are at most this many for each worker (but two
 * workers' at least): enough blocks to share out, and what lies between the products stays near the caches. */
enum { WAVE_ROWS_OF_A_WORKER = 512 };

/* One past the last expert of the wave that begins with expert `first`. */
static int64_t wave_end(const int64_t *offsets, int64_t E, int64_t first, int workers) {
    const int64_t most = WAVE_ROWS_OF_A_WORKER * (int64_t)(workers < 2 ? 2 : workers);
    int64_t last = first + 1;
    while (last < E && offsets[last + 1] - offsets[first] <= most) last++;
    return last;
}

static int64_t largest_wave(const int64_t *offsets, int64_t E, int workers) {
    int64_t largest = 0;
    for (int64_t first = 0, last; first < E; first = last) {
        last = wave_end(offsets, E, first, workers);
        if (offsets[last] - offsets[first] > largest) largest = offsets[last] - offsets[first];
    }
    return largest;
}

#define BODY "expert_mlp_body.h"
#include "each_product.h"

int mmbal_activation_from_name(const char *name, mmbal_activation *activation) {
    static const char *const names[] = {"quick_gelu", "gelu", "gelu_tanh", "relu", "relu2", "silu", "identity"};
    for (int i = MMBAL_QUICK_GELU; i <= MMBAL_IDENTITY; i++) {
        if (strcmp(name, names[i]) == 0) {
            *activation = (mmbal_activation)i;
            return 1;
        }
    }
    return 0;
}

static int shape_ok(mmbal_expert_mlp_shape s) { return s.N >= 0 && s.D >= 1 && s.F >= 1 && s.E >= 1 && s.K >= 1; }

static mmbal_status check_arguments(const mmbal_expert_mlp_inputs *inputs, mmbal_expert_mlp_shape shape,
                                    const mmbal_expert_mlp_options *options, const mmbal_pool *pool) {
    const int options_ok = options->activation >= MMBAL_QUICK_GELU && options->activation <= MMBAL_IDENTITY &&
                           options->dropout >= 0 && options->dropout < 1 && options->output_dropout >= 0 &&
                           options->output_dropout < 1 && options->offset >= 0 && options->offset >> 56 == 0;
    if (!shape_ok(shape) || !options_ok || pool->workers < 1) return MMBAL_INVALID_ARGUMENT;
    return mmbal_moe_check_dispatch(inputs->permutation, inputs->offsets, inputs->inverse, shape.N * shape.K, shape.E);
}

/* Whether a call of this shape has a workspace. */
static int has_workspace(mmbal_expert_mlp_shape s, const int64_t *offsets, int workers) {
    return shape_ok(s) && workers >= 1 && mmbal_moe_check_offsets(offsets, s.N * s.K, s.E) == MMBAL_OK;
}

static mmbal_status forward_bytes(mmbal_dtype dtype, mmbal_expert_mlp_shape shape, const int64_t *offsets, int workers,
                                  int64_t *bytes) {
    RETURN_FOR_PRODUCT(dtype, forward_bytes, shape, offsets, workers, bytes);
}

static mmbal_status backward_bytes(mmbal_dtype dtype, mmbal_expert_mlp_shape shape, const int64_t *offsets, int workers,
                                   int64_t *bytes) {
    RETURN_FOR_PRODUCT(dtype, backward_bytes, shape, offsets, workers, bytes);
}

int64_t mmbal_expert_mlp_workspace(mmbal_dtype dtype, mmbal_expert_mlp_shape shape, const int64_t *offsets,
                                   int workers) {
    int64_t bytes = 0;
    if (!has_workspace(shape, offsets, workers)) return 0;
    return forward_bytes(dtype, shape, offsets, workers, &bytes) == MMBAL_OK ? bytes : 0;
}

int64_t mmbal_expert_mlp_backward_workspace(mmbal_dtype dtype, mmbal_expert_mlp_shape shape, const int64_t *offsets,
                                            int workers) {
    int64_t bytes = 0;
    if (!has_workspace(shape, offsets, workers)) return 0;
    return backward_bytes(dtype, shape, offsets, workers, &bytes) == MMBAL_OK ? bytes : 0;
}

static mmbal_status packed_bytes(mmbal_dtype dtype, mmbal_expert_mlp_shape shape, int64_t *bytes) {
    RETURN_FOR_PRODUCT(dtype, packed_bytes, shape, bytes);
}

int64_t mmbal_expert_mlp_packed_bytes(mmbal_dtype dtype, mmbal_expert_mlp_shape shape) {
    int64_t bytes = 0;
    if (shape.D < 1 || shape.F < 1 || shape.E < 1) return 0;
    return packed_bytes(dtype, shape, &bytes) == MMBAL_OK ? bytes : 0;
}

mmbal_status mmbal_expert_mlp_pack(mmbal_dtype dtype, const void *w1, const void *w2, mmbal_expert_mlp_shape shape,
                                   void *packed, const mmbal_pool *pool) {
    if (shape.D < 1 || shape.F < 1 || shape.E < 1 || pool->workers < 1) return MMBAL_INVALID_ARGUMENT;
    RETURN_FOR_PRODUCT(dtype, pack, w1, w2, shape, packed, pool);
}

mmbal_status mmbal_expert_mlp(mmbal_dtype dtype, const mmbal_expert_mlp_inputs *inputs, mmbal_expert_mlp_shape shape,
                              const mmbal_expert_mlp_options *options, void *y, void *preactivation, void *workspace,
                              const mmbal_pool *pool) {
    const mmbal_status status = check_arguments(inputs, shape, options, pool);
    if (status != MMBAL_OK) return status;
    RETURN_FOR_PRODUCT(dtype, forward, inputs, shape, options, y, preactivation, workspace, pool);
}

mmbal_status mmbal_expert_mlp_backward(mmbal_dtype dtype, const void *dy, const mmbal_expert_mlp_inputs *inputs,
                                       const void *preactivation, mmbal_expert_mlp_shape shape,
                                       const mmbal_expert_mlp_options *options,
                                       const mmbal_expert_mlp_gradients *gradients, void *workspace,
                                       const mmbal_pool *pool) {
    const mmbal_status status = check_arguments(inputs, shape, options, pool);
    if (status != MMBAL_OK) return status;
    RETURN_FOR_PRODUCT(dtype, backward, dy, inputs, preactivation, shape, options, gradients, workspace, pool);
}
