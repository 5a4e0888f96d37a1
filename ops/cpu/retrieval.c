#include "mmbal/retrieval.h"

#include <math.h>
#include <string.h>

#include "arena.h"
#include "fetch.h"
#include "kernels.h"
#include "rows.h"

enum {
    BANK_ROWS = 280,        /* of a block: with its products it stays in the second-level cache */
    QUERIES_AT_ONCE = 1024, /* their panels are read again for each block of the bank */
    KEPT_BYTES = 64 << 20,  /* fewer queries where k is so large that what all workers keep would need more */
    LEAST_ROOM = 32,        /* entries kept of a query */
    QUERIES_PER_TASK = 16
};

static int64_t bytes_of(mmbal_dtype dtype) { return dtype == MMBAL_F64 ? 8 : dtype == MMBAL_F32 ? 4 : 2; }

/* Blocks of a task: several, as a worker fetches its task's next one early, but not so many that the last tasks keep
 * the others waiting. */
static int64_t blocks_per_task(int64_t blocks, int workers) {
    const int64_t wanted = blocks / (16 * (int64_t)workers);
    return wanted < 1 ? 1 : least(wanted, 16);
}

#define BODY "retrieval_body.h"
#include "each_product.h"

static int sizes_are_ok(int64_t Q, int64_t n, int64_t D, int64_t k) { return Q >= 0 && D >= 1 && k >= 1 && k <= n; }

int64_t mmbal_topk_search_workspace(mmbal_dtype bank_dtype, int64_t Q, int64_t n, int64_t D, int64_t k, int workers) {
    if (!is_dtype(bank_dtype) || !sizes_are_ok(Q, n, D, k) || workers < 1) return 0;
    return (bank_dtype == MMBAL_F64 ? search_bytes_f64 : search_bytes_f32)(bank_dtype, Q, n, D, k, workers);
}

mmbal_status mmbal_topk_search(mmbal_dtype query_dtype, const void *query, mmbal_dtype bank_dtype, const void *bank,
                               int64_t Q, int64_t n, int64_t D, int64_t k, void *scores, int64_t *indices,
                               void *workspace, const mmbal_pool *pool) {
    const int half = bank_dtype == MMBAL_BF16 || bank_dtype == MMBAL_F16;
    if (!is_dtype(bank_dtype) || !(query_dtype == bank_dtype || (half && query_dtype == MMBAL_F32)))
        return MMBAL_UNSUPPORTED;
    if (!sizes_are_ok(Q, n, D, k)) return MMBAL_INVALID_ARGUMENT;
    return (bank_dtype == MMBAL_F64 ? topk_search_f64 : topk_search_f32)(query_dtype, query, bank_dtype, bank, Q, n, D,
                                                                         k, scores, indices, workspace, pool);
}

int64_t mmbal_recall_at_k_workspace(int64_t Q) { return (Q > 0 ? Q : 1) * (int64_t)sizeof(int64_t); }

typedef struct {
    const int64_t *indices, *positives, *offsets;
    int64_t K;
    int64_t *ranks; /* [Q]: of the first positive, from 0; K where there is none, -1 where the query has no positives */
} ranked_queries;

static mmbal_status rank_task(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const ranked_queries *t = context;
    for (int64_t q = begin; q < end; q++) {
        const int64_t first = t->offsets[q], last = t->offsets[q + 1];
        int64_t rank = 0;
        for (; rank < t->K; rank++) {
            int64_t p = first;
            while (p < last && t->positives[p] != t->indices[q * t->K + rank]) p++;
            if (p < last) break;
        }
        t->ranks[q] = first < last ? rank : -1;
    }
    return MMBAL_OK;
}

static mmbal_status check_recall(const int64_t *positives, const int64_t *offsets, const int64_t *ks, int64_t Q,
                                 int64_t K, int64_t P, int64_t count) {
    if (Q < 0 || K < 1 || P < 0 || count < 0) return MMBAL_INVALID_ARGUMENT;
    for (int64_t i = 0; i < count; i++)
        if (ks[i] < 1 || ks[i] > K) return MMBAL_INVALID_ARGUMENT;
    if (offsets[0] != 0 || offsets[Q] != P) return MMBAL_INVALID_INDEX;
    for (int64_t q = 0; q < Q; q++)
        if (offsets[q] > offsets[q + 1]) return MMBAL_INVALID_INDEX;
    for (int64_t p = 0; p < P; p++)
        if (positives[p] < 0) return MMBAL_INVALID_INDEX;
    return MMBAL_OK;
}

mmbal_status mmbal_recall_at_k(const int64_t *indices, const int64_t *positives, const int64_t *offsets,
                               const int64_t *ks, int64_t Q, int64_t K, int64_t P, int64_t count, double *recall,
                               void *workspace, const mmbal_pool *pool) {
    mmbal_status status = check_recall(positives, offsets, ks, Q, K, P, count);
    if (status != MMBAL_OK) return status;
    ranked_queries queries = {indices, positives, offsets, K, workspace};
    status = pool->run(pool->self, Q, 64, rank_task, &queries);
    if (status != MMBAL_OK) return status;
    for (int64_t i = 0; i < count; i++) {
        int64_t counted = 0, found = 0;
        for (int64_t q = 0; q < Q; q++) {
            counted += queries.ranks[q] >= 0;
            found += queries.ranks[q] >= 0 && queries.ranks[q] < ks[i];
        }
        recall[i] = counted ? (double)found / (double)counted : NAN;
    }
    return MMBAL_OK;
}
