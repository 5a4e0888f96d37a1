#include "mmbal/expert_mlp.h"

#include <string.h>

#include "arena.h"
#include "blocks.h"
#include "dropout.h"
#include "kernels.h"
#include "mmbal/routing.h"

enum { ROWS_PER_TASK = 16 }; /* of passes over rows of D or F elements: some tens of microseconds */

#define BODY "expert_mlp_body.h"
#include "each_dtype.h"

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

static mmbal_status forward_bytes(mmbal_dtype dtype, mmbal_expert_mlp_shape shape, int workers, int64_t *bytes) {
    RETURN_FOR_DTYPE(dtype, forward_bytes, shape, workers, bytes);
}

static mmbal_status backward_bytes(mmbal_dtype dtype, mmbal_expert_mlp_shape shape, int workers, int64_t *bytes) {
    RETURN_FOR_DTYPE(dtype, backward_bytes, shape, workers, bytes);
}

int64_t mmbal_expert_mlp_workspace(mmbal_dtype dtype, mmbal_expert_mlp_shape shape, int workers) {
    int64_t bytes = 0;
    return forward_bytes(dtype, shape, workers, &bytes) == MMBAL_OK ? bytes : 0;
}

int64_t mmbal_expert_mlp_backward_workspace(mmbal_dtype dtype, mmbal_expert_mlp_shape shape, int workers) {
    int64_t bytes = 0;
    return backward_bytes(dtype, shape, workers, &bytes) == MMBAL_OK ? bytes : 0;
}

mmbal_status mmbal_expert_mlp(mmbal_dtype dtype, const mmbal_expert_mlp_inputs *inputs, mmbal_expert_mlp_shape shape,
                              const mmbal_expert_mlp_options *options, void *y, void *preactivation, void *workspace,
                              const mmbal_pool *pool) {
    const mmbal_status status = check_arguments(inputs, shape, options, pool);
    if (status != MMBAL_OK) return status;
    RETURN_FOR_DTYPE(dtype, forward, inputs, shape, options, y, preactivation, workspace, pool);
}

mmbal_status mmbal_expert_mlp_backward(mmbal_dtype dtype, const void *dy, const mmbal_expert_mlp_inputs *inputs,
                                       const void *preactivation, mmbal_expert_mlp_shape shape,
                                       const mmbal_expert_mlp_options *options,
                                       const mmbal_expert_mlp_gradients *gradients, void *workspace,
                                       const mmbal_pool *pool) {
    const mmbal_status status = check_arguments(inputs, shape, options, pool);
    if (status != MMBAL_OK) return status;
    RETURN_FOR_DTYPE(dtype, backward, dy, inputs, preactivation, shape, options, gradients, workspace, pool);
}
