#include "mmbal/router_loss.h"

enum { TOKENS_PER_CHUNK = 256 }; /* fixed, so that the order of a sum does not depend on the number of workers */

#define BODY "router_loss_body.h"
#include "each_dtype.h"

/* share [E] first, then a row of sums for every chunk */
int64_t mmbal_router_loss_workspace(int64_t N, int64_t E) {
    return (int64_t)sizeof(double) * (E + (N + TOKENS_PER_CHUNK - 1) / TOKENS_PER_CHUNK * (E + 1));
}

static int64_t count_tokens(const uint8_t *mask, int64_t N) {
    if (!mask) return N;
    int64_t counted = 0;
    for (int64_t n = 0; n < N; n++) counted += mask[n] != 0;
    return counted;
}

/* share[e] = F[e]; *scale = c E / M, what multiplies sum_e F[e] sum_n p[n,e]: 0 when no token counts */
static mmbal_status expert_shares(const int64_t *indices, const uint8_t *mask, int64_t N, int64_t E, int64_t K,
                                  mmbal_balance balance, double *share, double *scale) {
    const int known = balance >= MMBAL_BALANCE_MIXTRAL && balance <= MMBAL_BALANCE_SWITCH;
    if (N < 0 || E < 1 || K < 1 || !known) return MMBAL_INVALID_ARGUMENT;
    const double tokens = (double)count_tokens(mask, N);
    const int64_t counted_choices = balance == MMBAL_BALANCE_SWITCH ? 1 : K;
    for (int64_t e = 0; e < E; e++) share[e] = 0;
    for (int64_t n = 0; n < N; n++) {
        for (int64_t k = 0; k < K; k++) {
            const int64_t e = indices[n * K + k];
            if (e < 0 || e >= E) return MMBAL_INVALID_INDEX;
            if (k < counted_choices && !(mask && !mask[n])) share[e] += 1;
        }
    }
    for (int64_t e = 0; e < E && tokens > 0; e++) share[e] /= tokens;
    *scale = tokens > 0 ? (double)E / tokens : 0;
    if (balance == MMBAL_BALANCE_MEGATRON) *scale /= (double)K;
    return MMBAL_OK;
}

static double z_scale(const uint8_t *mask, int64_t N) {
    const double tokens = (double)count_tokens(mask, N);
    return tokens > 0 ? 1 / tokens : 0;
}

mmbal_status mmbal_load_balance_loss(mmbal_dtype dtype, const void *logits, const int64_t *indices,
                                     const uint8_t *token_mask, int64_t N, int64_t E, int64_t K, mmbal_balance balance,
                                     void *loss, void *workspace, const mmbal_pool *pool) {
    double *share = workspace, *sums = share + E, scale = 0;
    const mmbal_status status = expert_shares(indices, token_mask, N, E, K, balance, share, &scale);
    if (status != MMBAL_OK) return status;
    RETURN_FOR_DTYPE(dtype, loss_value, logits, token_mask, N, E, 0, share, scale, sums, loss, pool);
}

mmbal_status mmbal_load_balance_loss_backward(mmbal_dtype dtype, const void *dloss, const void *logits,
                                              const int64_t *indices, const uint8_t *token_mask, int64_t N, int64_t E,
                                              int64_t K, mmbal_balance balance, void *dlogits, void *workspace,
                                              const mmbal_pool *pool) {
    double *share = workspace, scale = 0;
    const mmbal_status status = expert_shares(indices, token_mask, N, E, K, balance, share, &scale);
    if (status != MMBAL_OK) return status;
    RETURN_FOR_DTYPE(dtype, loss_gradient, dloss, logits, token_mask, N, E, 0, share, scale, dlogits, pool);
}

mmbal_status mmbal_router_z_loss(mmbal_dtype dtype, const void *logits, const uint8_t *token_mask, int64_t N, int64_t E,
                                 void *loss, void *workspace, const mmbal_pool *pool) {
    if (N < 0 || E < 1) return MMBAL_INVALID_ARGUMENT;
    RETURN_FOR_DTYPE(dtype, loss_value, logits, token_mask, N, E, 1, NULL, z_scale(token_mask, N),
                     (double *)workspace + E, loss, pool);
}

mmbal_status mmbal_router_z_loss_backward(mmbal_dtype dtype, const void *dloss, const void *logits,
                                          const uint8_t *token_mask, int64_t N, int64_t E, void *dlogits,
                                          const mmbal_pool *pool) {
    if (N < 0 || E < 1) return MMBAL_INVALID_ARGUMENT;
    RETURN_FOR_DTYPE(dtype, loss_gradient, dloss, logits, token_mask, N, E, 1, NULL, 2 * z_scale(token_mask, N),
                     dlogits, pool);
}
