#include "mmbal/routing.h"

enum { ROWS_PER_TASK = 512 }; /* a few microseconds of work for four experts: enough to pay for handing it out */

#define BODY "routing_body.h"
#include "each_dtype.h"

mmbal_status mmbal_moe_topk(mmbal_dtype dtype, const void *logits, const void *selection_bias, int64_t N, int64_t E,
                            int64_t K, int normalize, void *weights, int64_t *indices, const mmbal_pool *pool) {
    if (N < 0 || K < 1 || K > E) return MMBAL_INVALID_ARGUMENT;
    RETURN_FOR_DTYPE(dtype, topk, logits, selection_bias, N, E, K, normalize, weights, indices, pool);
}

mmbal_status mmbal_moe_topk_backward(mmbal_dtype dtype, const void *dweights, const void *logits, const void *weights,
                                     const int64_t *indices, int64_t N, int64_t E, int64_t K, int normalize,
                                     void *dlogits, const mmbal_pool *pool) {
    if (N < 0 || K < 1 || K > E) return MMBAL_INVALID_ARGUMENT;
    for (int64_t i = 0; i < N * K; i++)
        if (indices[i] < 0 || indices[i] >= E) return MMBAL_INVALID_INDEX;
    RETURN_FOR_DTYPE(dtype, topk_backward, dweights, logits, weights, indices, N, E, K, normalize, dlogits, pool);
}

mmbal_status mmbal_moe_dispatch(const int64_t *indices, int64_t N, int64_t K, int64_t E, int64_t *permutation,
                                int64_t *offsets, int64_t *inverse) {
    if (N < 0 || K < 1 || E < 1) return MMBAL_INVALID_ARGUMENT;
    const int64_t R = N * K;
    for (int64_t e = 0; e <= E; e++) offsets[e] = 0;
    for (int64_t pair = 0; pair < R; pair++) {
        const int64_t e = indices[pair];
        if (e < 0 || e >= E) return MMBAL_INVALID_INDEX;
        if (e + 2 <= E) offsets[e + 2]++;
    }
    for (int64_t e = 2; e <= E; e++) offsets[e] += offsets[e - 1];
    /* offsets[e + 1] now holds where expert e starts; placing its pairs moves it to where expert e ends. */
    for (int64_t pair = 0; pair < R; pair++) {
        const int64_t r = offsets[indices[pair] + 1]++;
        permutation[r] = pair;
        inverse[pair] = r;
    }
    return MMBAL_OK;
}

mmbal_status mmbal_moe_check_offsets(const int64_t *offsets, int64_t R, int64_t E) {
    if (offsets[0] != 0 || offsets[E] != R) return MMBAL_INVALID_INDEX;
    for (int64_t e = 0; e < E; e++)
        if (offsets[e] > offsets[e + 1]) return MMBAL_INVALID_INDEX;
    return MMBAL_OK;
}

mmbal_status mmbal_moe_check_dispatch(const int64_t *permutation, const int64_t *offsets, const int64_t *inverse,
                                      int64_t R, int64_t E) {
    const mmbal_status status = mmbal_moe_check_offsets(offsets, R, E);
    if (status != MMBAL_OK) return status;
    for (int64_t r = 0; r < R; r++) {
        const int64_t pair = permutation[r];
        if (pair < 0 || pair >= R || inverse[pair] != r) return MMBAL_INVALID_INDEX;
    }
    return MMBAL_OK;
}
