/* sampling.h on a GPU; see stream.h. The results are those of the CPU to the bit. What the CPU answers with
 * MMBAL_INVALID_ARGUMENT for values on the device - weights, k, kappa, rho - ends the launch, as an index outside its
 * range does. N < 2^32. */
#ifndef MMBAL_CUDA_SAMPLING_H
#define MMBAL_CUDA_SAMPLING_H

#include "mmbal/cuda/stream.h"
#include "mmbal/sampling.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of workspace, aligned to 8, as all here. */
int64_t mmbal_weighted_sample_workspace_cuda(int64_t S, int64_t N);

mmbal_status mmbal_weighted_sample_cuda(mmbal_dtype dtype, const void *weights, /* [S, N] */
                                        const int64_t *k,                       /* [S] */
                                        int64_t S, int64_t N, int64_t seed, int64_t step,
                                        uint8_t *mask, /* [S, N] out */
                                        void *workspace, mmbal_stream stream);

int64_t mmbal_waterfill_workspace_cuda(int64_t S, int64_t N);

mmbal_status mmbal_waterfill_cuda(mmbal_dtype dtype, const void *weights,                /* [S, N] */
                                  const double *kappa,                                   /* [S] */
                                  int64_t S, int64_t N, double mix, void *probabilities, /* [S, N] out */
                                  double *c,                                             /* [S] out */
                                  void *workspace, mmbal_stream stream);

int64_t mmbal_mask_units_workspace_cuda(int64_t U, int64_t S);

/* segments are in the host's memory and not needed any more when it returns. No two segments share a unit. */
mmbal_status mmbal_mask_units_cuda(const double *energy,          /* [U] */
                                   const mmbal_segment *segments, /* [S], on the host */
                                   const double *rho,             /* [M] */
                                   int64_t U, int64_t S, int64_t M, int64_t seed, int64_t step,
                                   mmbal_mask_options options, double *scale, /* [U] out */
                                   double *probability,                       /* [U] out */
                                   void *workspace, mmbal_stream stream);

#ifdef __cplusplus
}
#endif
#endif
