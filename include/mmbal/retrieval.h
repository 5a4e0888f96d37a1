/* Exact search in a bank of vectors, and what share of the queries finds one of its own. */
#ifndef MMBAL_RETRIEVAL_H
#define MMBAL_RETRIEVAL_H

#include <stdint.h>

#include "mmbal/dtype.h"
#include "mmbal/pool.h"
#include "mmbal/status.h"

#ifdef __cplusplus
extern "C" {
#endif

int64_t mmbal_topk_search_workspace(mmbal_dtype bank_dtype, int64_t Q, int64_t n, int64_t D, int64_t k, int workers);

/* The k rows of the bank with the largest inner products <query_q, bank_i>, in descending order, ties to the lower
 * index. The products are taken in blocks: [Q, n] is never there. Products that are NaN come after all numbers, in the
 * order of their indices. 1 <= k <= n, D >= 1. A product is one sum in the order of D, in real, which is float64 for a
 * bank of MMBAL_F64 and else float32: its bits depend on the two vectors alone. */
mmbal_status mmbal_topk_search(mmbal_dtype query_dtype, /* that of the bank, or MMBAL_F32 for bfloat16 */
                               const void *query,       /* [Q, D]              and float16 banks */
                               mmbal_dtype bank_dtype, const void *bank,                 /* [n, D] */
                               int64_t Q, int64_t n, int64_t D, int64_t k, void *scores, /* [Q, k] real, out */
                               int64_t *indices,                                         /* [Q, k] out */
                               void *workspace, const mmbal_pool *pool);

int64_t mmbal_recall_at_k_workspace(int64_t Q);

/* recall[i] = the share of the queries that have a positive and one of theirs among their first ks[i] indices. The
 * positives of query q are positives[offsets[q] .. offsets[q + 1]], each >= 0; queries without one are left out, and
 * where all are the recall is NaN. 1 <= ks[i] <= K. MMBAL_INVALID_INDEX where offsets do not ascend from 0 to P, or a
 * positive is negative (an index of -1 stands for nothing found). */
mmbal_status mmbal_recall_at_k(const int64_t *indices,                                         /* [Q, K] */
                               const int64_t *positives,                                       /* [P] */
                               const int64_t *offsets,                                         /* [Q + 1] */
                               const int64_t *ks,                                              /* [count] */
                               int64_t Q, int64_t K, int64_t P, int64_t count, double *recall, /* [count] out */
                               void *workspace, const mmbal_pool *pool);

#ifdef __cplusplus
}
#endif
#endif
