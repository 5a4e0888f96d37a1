/* mutual_info.h on a GPU; see stream.h. */
#ifndef MMBAL_CUDA_MUTUAL_INFO_H
#define MMBAL_CUDA_MUTUAL_INFO_H

#include "mmbal/cuda/stream.h"
#include "mmbal/mutual_info.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of workspace, aligned to 8: about 100 N M. */
int64_t mmbal_ksg_mutual_info_workspace_cuda(int64_t N, int64_t M);

/* Counts the samples that the CPU counts: samples are scaled by the same deviations, to the bit, and neighbours are
 * exact. Jitter differs in the last bits of a logarithm and a cosine, which x hardly ever shows where jitter is small.
 * Digamma functions are added in an order that N fixes. */
mmbal_status mmbal_ksg_mutual_info_cuda(mmbal_dtype dtype, const void *x, /* [N, M] */
                                        const void *y,                    /* [N] */
                                        const uint8_t *present,           /* [N, M] or NULL: all */
                                        int64_t N, int64_t M, int64_t neighbors, int standardize, double jitter,
                                        uint64_t seed, double *mi, /* [M] out */
                                        void *workspace, mmbal_stream stream);

/* Bytes of workspace, aligned to 8: about 16 N M, whatever C is. */
int64_t mmbal_discrete_mutual_info_workspace_cuda(int64_t M, int64_t N);

/* 1 <= C <= MMBAL_MOST_SORTED_CLASSES. It bounds the classes and nothing else: the largest gives what
 * mmbal_count_classes finds on a CPU. A class outside ends the launch. */
enum { MMBAL_MOST_SORTED_CLASSES = 32768 };
mmbal_status mmbal_discrete_mutual_info_cuda(const int64_t *a,                            /* [M, N] */
                                             const int64_t *b,                            /* [N] */
                                             const uint8_t *present,                      /* [N, M] or NULL: all */
                                             int64_t M, int64_t N, int64_t C, double *mi, /* [M] out */
                                             void *workspace, mmbal_stream stream);

#ifdef __cplusplus
}
#endif
#endif
