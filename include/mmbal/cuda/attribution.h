/* attribution.h on a GPU; see stream.h. The numbers of a call's struct lie on the host, its tensors and those of its
 * modalities on the device; the tables of modalities and of weights on the host.
 *
 * What the CPU answers with MMBAL_INVALID_ARGUMENT for a value of target, and with MMBAL_INVALID_INDEX for a class,
 * ends the launch, as an index outside its range does; without samples no target is looked at.
 *
 * The sum over a row is that of the parts of 32 or 256 threads, in an order that the sizes d fix. */
#ifndef MMBAL_CUDA_ATTRIBUTION_H
#define MMBAL_CUDA_ATTRIBUTION_H

#include "mmbal/attribution.h"
#include "mmbal/cuda/stream.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of workspace of each of the three, aligned to 8. */
int64_t mmbal_attribution_reg_workspace_cuda(int64_t B, int64_t M);

mmbal_status mmbal_attribution_reg_cuda(const mmbal_attribution *attribution, void *reg, /* [B] real, out */
                                        void *shares,                                    /* [B, M] real, out */
                                        void *magnitudes,                                /* [B, M] real, out */
                                        void *workspace, mmbal_stream stream);

mmbal_status mmbal_attribution_reg_backward_cuda(const mmbal_attribution *attribution, const void *dreg, /* [B] real */
                                                 const void *dshares,     /* [B, M] real or NULL: 0 */
                                                 const void *dmagnitudes, /* [B, M] real or NULL: 0 */
                                                 const void *magnitudes,  /* [B, M] real */
                                                 void *workspace, mmbal_stream stream);

mmbal_status mmbal_attribution_reg_backward_backward_cuda(const mmbal_attribution *attribution, const void *dreg,
                                                          const void *dshares, const void *dmagnitudes,
                                                          const void *magnitudes, void *ddreg, /* [B] real, out */
                                                          void *ddshares,                      /* [B, M] real, out */
                                                          void *ddmagnitudes,                  /* [B, M] real, out */
                                                          void *workspace, mmbal_stream stream);

/* Bytes of workspace, aligned to 16. It depends on whether weights and dweights can be used where they lie: those of
 * all modalities side by side, as the columns of one matrix of the real dtype. */
int64_t mmbal_attribution_linear_workspace_cuda(const mmbal_attribution *attribution, const mmbal_linear_head *head,
                                                void *const *dweights);

/* The magnitudes that the gradient goes through are not rounded to real first. */
mmbal_status mmbal_attribution_linear_cuda(const mmbal_attribution *attribution, const mmbal_linear_head *head,
                                           const void *dreg,        /* [B] real */
                                           void *reg, void *shares, /* [B], [B, M] real, out */
                                           void *magnitudes,        /* [B, M] real, out */
                                           void *const *dweights,   /* [M] pointers to [C, d_m] of the dtype, out */
                                           void *dbias,             /* [C] of the dtype, out */
                                           void *workspace, mmbal_stream stream);

#ifdef __cplusplus
}
#endif
#endif
