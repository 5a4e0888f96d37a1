/* expert_mlp.h on a GPU; see stream.h. The offsets stay on the device: no size that a launch needs depends on them.
 *
 * mmbal_expert_mlp_cuda and its backward are whole. They multiply with mmbal_expert_product_cuda, which serves every
 * dtype and size, on tensor cores where elements have 16 bits. Who has faster products for a shape makes the call of
 * the steps below, as the binding does with torch's grouped product. */
#ifndef MMBAL_CUDA_EXPERT_MLP_H
#define MMBAL_CUDA_EXPERT_MLP_H

#include "mmbal/cuda/stream.h"
#include "mmbal/expert_mlp.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of workspace, aligned to 16. */
int64_t mmbal_expert_mlp_workspace_cuda(mmbal_dtype dtype, mmbal_expert_mlp_shape shape);
int64_t mmbal_expert_mlp_backward_workspace_cuda(mmbal_dtype dtype, mmbal_expert_mlp_shape shape);

/* inputs->packed is what mmbal_expert_mlp_pack_cuda made, aligned to 16, or NULL. */
mmbal_status mmbal_expert_mlp_cuda(mmbal_dtype dtype, const mmbal_expert_mlp_inputs *inputs,
                                   mmbal_expert_mlp_shape shape, const mmbal_expert_mlp_options *options,
                                   void *y,             /* [N, D] out */
                                   void *preactivation, /* [R, F] out, u, or NULL */
                                   void *workspace, mmbal_stream stream);

mmbal_status mmbal_expert_mlp_backward_cuda(mmbal_dtype dtype, const void *dy, /* [N, D] */
                                            const mmbal_expert_mlp_inputs *inputs,
                                            const void *preactivation, /* [R, F] */
                                            mmbal_expert_mlp_shape shape, const mmbal_expert_mlp_options *options,
                                            const mmbal_expert_mlp_gradients *gradients, void *workspace,
                                            mmbal_stream stream);

/* Bytes of the packed weights; N and K of the shape do not matter. */
int64_t mmbal_expert_mlp_packed_bytes_cuda(mmbal_dtype dtype, mmbal_expert_mlp_shape shape);

/* The rows of w1 [E, F] and then those of w2 [E, D], each of whole 16 bytes and filled up with zeros, so that all are
 * read 16 bytes at a time: a gain where D or F elements are not whole 16 bytes. The forward gives the same bits. */
mmbal_status mmbal_expert_mlp_pack_cuda(mmbal_dtype dtype, const void *w1, /* [E, F, D] */
                                        const void *w2,                    /* [E, D, F] */
                                        mmbal_expert_mlp_shape shape, void *packed, mmbal_stream stream);

/* The products of row r of expert e, sums in real in ascending order; of 16-bit elements 16 at a time, in the tensor
 * cores' own order: */
typedef enum mmbal_expert_product {
    MMBAL_ROWS_TIMES_TRANSPOSED = 0, /* out[r,:] = w[e] a[r,:]         a [R, in]  w [E, out, in]  out [R, out] */
    MMBAL_ROWS_TIMES_MATRIX,         /* out[r,:] = w[e]^T a[r,:]       a [R, in]  w [E, in, out]  out [R, out] */
    MMBAL_ROWS_TRANSPOSED_TIMES_ROWS /* out[e] = sum_r w[r,:] a[r,:]^T  a [R, in]  w [R, out]  out [E, out, in] */
} mmbal_expert_product;

/* The rows of w, of its matrices, begin w_stride elements apart; a row has `in` of them for TIMES_TRANSPOSED, `out`
 * for the others, and w_stride is as many for TRANSPOSED_TIMES_ROWS. out is real for rows, in the storage dtype for [E,
 * out, in], where an expert without rows gets zeros. */
mmbal_status mmbal_expert_product_cuda(mmbal_dtype dtype, mmbal_expert_product product, const void *a, const void *w,
                                       const int64_t *offsets, /* [E + 1] */
                                       int64_t R, int64_t E, int64_t in, int64_t out_size, int64_t w_stride, void *out,
                                       mmbal_stream stream);

/* Whether what a product of rows returned is real (ours) or in the storage dtype. */
typedef enum mmbal_product_type { MMBAL_PRODUCT_REAL = 0, MMBAL_PRODUCT_STORED } mmbal_product_type;

/* rows[r] = values[n] of the token of row r, times the output mask where there is output_dropout and `masked`.
 * weighted[r] = weights[pair] times that. Either may be NULL. */
mmbal_status mmbal_expert_gather_cuda(mmbal_dtype dtype, const void *values, /* [N, D] */
                                      const mmbal_expert_mlp_inputs *inputs, mmbal_expert_mlp_shape shape,
                                      const mmbal_expert_mlp_options *options, int masked,
                                      void *rows,     /* [R, D] out or NULL */
                                      void *weighted, /* [R, D] out or NULL */
                                      mmbal_stream stream);

/* u = product + b1, rounded, into preactivation unless that is NULL; activated = activation(u) * mask. preactivation or
 * activated may be the product itself where that has the storage dtype. */
mmbal_status mmbal_expert_activation_cuda(mmbal_dtype dtype, mmbal_product_type type, const void *product, /* [R, F] */
                                          const mmbal_expert_mlp_inputs *inputs, mmbal_expert_mlp_shape shape,
                                          const mmbal_expert_mlp_options *options,
                                          void *preactivation, /* [R, F] out or NULL */
                                          void *activated,     /* [R, F] out */
                                          mmbal_stream stream);

/* y[n] = sum_k weights[n,k] (product[inverse[n,k]] + b2[e]) * mask. plain: the sum of the products alone. */
mmbal_status mmbal_expert_combine_cuda(mmbal_dtype dtype, mmbal_product_type type, const void *product, /* [R, D] */
                                       const mmbal_expert_mlp_inputs *inputs, mmbal_expert_mlp_shape shape,
                                       const mmbal_expert_mlp_options *options, int plain, void *y, /* [N, D] out */
                                       mmbal_stream stream);

/* From product = w2^T g: du, activation(u) * mask, and dweights = <h, activation(u)> + <g, b2>. Each may be NULL; du
 * may be the product itself where that has the storage dtype. product may be NULL where only `activated` is asked for.
 */
mmbal_status mmbal_expert_activation_backward_cuda(mmbal_dtype dtype, mmbal_product_type type,
                                                   const void *product,       /* [R, F] */
                                                   const void *preactivation, /* [R, F] */
                                                   const void *g,             /* [R, D] */
                                                   const mmbal_expert_mlp_inputs *inputs, mmbal_expert_mlp_shape shape,
                                                   const mmbal_expert_mlp_options *options, void *du, /* [R, F] out */
                                                   void *activated,                                   /* [R, F] out */
                                                   void *dweights, /* [N, K] real, out */
                                                   mmbal_stream stream);

/* sums[e] = sum of rows[r] over the rows of expert e. workspace: mmbal_expert_sums_workspace_cuda bytes. */
int64_t mmbal_expert_sums_workspace_cuda(mmbal_dtype dtype, int64_t R, int64_t E, int64_t columns);
mmbal_status mmbal_expert_sums_cuda(mmbal_dtype dtype, const void *rows, /* [R, columns] */
                                    const int64_t *offsets, int64_t R, int64_t E, int64_t columns,
                                    void *sums, /* [E, columns] out */
                                    void *workspace, mmbal_stream stream);

/* int32 ends of the experts' rows, offsets[e + 1], as torch's grouped product wants them. R below 2^31. */
mmbal_status mmbal_expert_ends_cuda(const int64_t *offsets, int64_t E, int32_t *ends, /* [E] out */
                                    mmbal_stream stream);

/* Zeros for the experts without rows, which a grouped product may leave as they are. */
mmbal_status mmbal_expert_clear_cuda(mmbal_dtype dtype, const int64_t *offsets, int64_t E, int64_t size,
                                     void *gradient, /* [E, size] in and out */
                                     mmbal_stream stream);

#ifdef __cplusplus
}
#endif
#endif
