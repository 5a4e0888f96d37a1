/* A mixture of two-layer MLPs, the experts of CLIP-MoE (DMU: arXiv 2409.19291, section 4).
 *
 * N tokens, D width, F hidden width, E experts, K experts a token, R = N K routed rows. Row r holds the pair
 * permutation[r] = n K + k and belongs to expert e with offsets[e] <= r < offsets[e+1]:
 *
 *     u[r] = w1[e] x[n] + b1[e]                          pre-activation, rounded to the storage dtype
 *     a[r] = activation(u[r]) * hidden_mask              kept with probability 1 - dropout, scaled by 1 / (1 - dropout)
 *     o[r] = (w2[e] a[r] + b2[e]) * output_mask          the same with output_dropout
 *     y[n] = sum_k weights[n,k] o[inverse[n,k]]          real sums in the order of k, rounded once
 *
 * Masks are Philox4x32-10 bits: key = the low and high 32 bits of seed; counter = the low and high 32 bits of
 * element / 4, the low 32 bits of offset, (offset >> 32) << 8 | tensor; word element % 4 decides: kept where
 * (word >> 8) 2^-24 >= p. tensor 1, element (n K + k) F + f for the hidden mask; 2, (n K + k) D + d for the
 * output.
 */
#ifndef MMBAL_EXPERT_MLP_H
#define MMBAL_EXPERT_MLP_H

#include <stdint.h>

#include "mmbal/dtype.h"
#include "mmbal/pool.h"
#include "mmbal/status.h"

#ifdef __cplusplus
extern "C" {
#endif

typedef enum mmbal_activation {
    MMBAL_QUICK_GELU = 0, /* u sigmoid(1.702 u), the activation of OpenAI's CLIP */
    MMBAL_GELU,           /* u Phi(u), exact (arXiv 1606.08415) */
    MMBAL_GELU_TANH,      /* its tanh form */
    MMBAL_RELU,
    MMBAL_RELU2, /* max(u, 0)^2 (arXiv 2109.08668) */
    MMBAL_SILU,
    MMBAL_IDENTITY
} mmbal_activation;

/* 1 and *activation when name is one of quick_gelu, gelu, gelu_tanh, relu, relu2, silu, identity; otherwise 0. */
int mmbal_activation_from_name(const char *name, mmbal_activation *activation);

typedef struct mmbal_expert_mlp_shape {
    int64_t N, D, F, E, K;
} mmbal_expert_mlp_shape;

typedef struct mmbal_expert_mlp_options {
    mmbal_activation activation;
    double dropout, output_dropout; /* in [0, 1) */
    int64_t seed, offset;           /* offset in [0, 2^56) */
} mmbal_expert_mlp_options;

typedef struct mmbal_expert_mlp_inputs {
    const void *x;              /* [N, D] */
    const void *w1;             /* [E, F, D] */
    const void *b1;             /* [E, F] or NULL; the backward never reads it */
    const void *w2;             /* [E, D, F] */
    const void *b2;             /* [E, D] or NULL */
    const void *weights;        /* [N, K] real */
    const int64_t *permutation; /* [R] */
    const int64_t *offsets;     /* [E + 1] */
    const int64_t *inverse;     /* [N, K] */
    const void *packed; /* what mmbal_expert_mlp_pack made of the same w1 and w2, for a faster forward; or NULL */
} mmbal_expert_mlp_inputs;

/* Bytes of the packed weights of E experts; N and K of the shape do not matter, nor does the alignment of the memory. 0
 * for an unknown dtype or a size below 1. */
int64_t mmbal_expert_mlp_packed_bytes(mmbal_dtype dtype, mmbal_expert_mlp_shape shape);

/* Lays the weights out as the products of the forward read them, so that they need not be packed in every call (those
 * of experts with up to 128 rows read w1 and w2 themselves, which is faster). The
 * layout is that of the instruction set in use: it is for this process, not for a file. */
mmbal_status mmbal_expert_mlp_pack(mmbal_dtype dtype, const void *w1, /* [E, F, D] */
                                   const void *w2,                    /* [E, D, F] */
                                   mmbal_expert_mlp_shape shape, void *packed, const mmbal_pool *pool);

/* Bytes of workspace of the forward and of the backward with these offsets [E + 1]; any alignment will do. 0 for what
 * the call itself will refuse. */
int64_t mmbal_expert_mlp_workspace(mmbal_dtype dtype, mmbal_expert_mlp_shape shape, const int64_t *offsets,
                                   int workers);
int64_t mmbal_expert_mlp_backward_workspace(mmbal_dtype dtype, mmbal_expert_mlp_shape shape, const int64_t *offsets,
                                            int workers);

/* MMBAL_INVALID_ARGUMENT without a workspace, MMBAL_INVALID_INDEX when permutation, offsets and inverse do not belong
 * together: outputs are untouched then. They are undefined after a status that came from the pool. */
mmbal_status mmbal_expert_mlp(mmbal_dtype dtype, const mmbal_expert_mlp_inputs *inputs, mmbal_expert_mlp_shape shape,
                              const mmbal_expert_mlp_options *options, void *y, /* [N, D] out */
                              void *preactivation,                              /* [R, F] out, u, or NULL */
                              void *workspace, const mmbal_pool *pool);

/* Any of them may be NULL: what is not asked for is not computed. An expert without rows gets zeros. */
typedef struct mmbal_expert_mlp_gradients {
    void *dx;       /* [N, D] */
    void *dw1;      /* [E, F, D] */
    void *db1;      /* [E, F] */
    void *dw2;      /* [E, D, F] */
    void *db2;      /* [E, D] */
    void *dweights; /* [N, K] real */
} mmbal_expert_mlp_gradients;

/* With g[r] = dy[n] * output_mask and h[r] = (w2[e]^T g[r]) * hidden_mask:
 *     dweights[n,k] = <h[r], activation(u[r])> + <g[r], b2[e]>
 *     du[r] = weights[n,k] h[r] activation'(u[r])
 *     dx[n] = sum_k w1[e]^T du[r]
 *     dw1[e] = sum_r du[r] x[n]^T,  db1[e] = sum_r du[r]
 *     dw2[e] = sum_r weights[n,k] g[r] a[r]^T,  db2[e] = sum_r weights[n,k] g[r]
 */
mmbal_status mmbal_expert_mlp_backward(mmbal_dtype dtype, const void *dy,     /* [N, D] */
                                       const mmbal_expert_mlp_inputs *inputs, /* as given to the forward */
                                       const void *preactivation,             /* [R, F] as returned by the forward */
                                       mmbal_expert_mlp_shape shape, const mmbal_expert_mlp_options *options,
                                       const mmbal_expert_mlp_gradients *gradients, void *workspace,
                                       const mmbal_pool *pool);

#ifdef __cplusplus
}
#endif
#endif
