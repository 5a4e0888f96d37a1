/* retrieval.h on a GPU; see stream.h. What recall_at_k answers with MMBAL_INVALID_INDEX on the CPU ends the launch. */
#ifndef MMBAL_CUDA_RETRIEVAL_H
#define MMBAL_CUDA_RETRIEVAL_H

#include "mmbal/cuda/stream.h"
#include "mmbal/retrieval.h"

#ifdef __cplusplus
extern "C" {
#endif

/* Bytes of workspace, aligned to 16; 0 where the sizes are refused. */
int64_t mmbal_topk_search_workspace_cuda(mmbal_dtype bank_dtype, int64_t Q, int64_t n, int64_t D, int64_t k);

mmbal_status mmbal_topk_search_cuda(mmbal_dtype query_dtype, const void *query,               /* [Q, D] */
                                    mmbal_dtype bank_dtype, const void *bank,                 /* [n, D] */
                                    int64_t Q, int64_t n, int64_t D, int64_t k, void *scores, /* [Q, k] real, out */
                                    int64_t *indices,                                         /* [Q, k] out */
                                    void *workspace, mmbal_stream stream);

/* Bytes of workspace, aligned to 8. */
int64_t mmbal_recall_at_k_workspace_cuda(int64_t Q);

mmbal_status mmbal_recall_at_k_cuda(const int64_t *indices,   /* [Q, K] */
                                    const int64_t *positives, /* [P] */
                                    const int64_t *offsets,   /* [Q + 1] */
                                    const int64_t *ks,        /* [count], in the host's memory */
                                    int64_t Q, int64_t K, int64_t P, int64_t count, double *recall, /* [count] out */
                                    void *workspace, mmbal_stream stream);

#ifdef __cplusplus
}
#endif
#endif
