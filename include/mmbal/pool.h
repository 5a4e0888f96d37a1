/* Who runs the pieces of an operator. The core never starts a thread itself: torch lends its own pool, a C program
 * takes mmbal_pool_serial() or mmbal_pool_openmp(), or brings its own. Which worker runs which piece never changes a
 * result: every output element has one owner, and every sum one fixed order. */
#ifndef MMBAL_POOL_H
#define MMBAL_POOL_H

#include <stdint.h>

#include "mmbal/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* One piece of work: indices [begin, end), done by worker 0 <= worker < workers. Must not call the pool again. */
typedef mmbal_status mmbal_task(void *context, int worker, int64_t begin, int64_t end);

typedef struct mmbal_pool {
    /* Runs task over [0, count) in pieces of at most grain indices; returns when all are done, with the first status
     * that was not MMBAL_OK. */
    mmbal_status (*run)(void *self, int64_t count, int64_t grain, mmbal_task *task, void *context);
    int workers; /* >= 1: the most that work at once; workspaces hold a slice for each */
    void *self;
} mmbal_pool;

mmbal_pool mmbal_pool_serial(void);

/* Only in the library mmbal::openmp. workers <= 0: what omp_get_max_threads says. */
mmbal_pool mmbal_pool_openmp(int workers);

/* For those who write a pool: one run's pieces, handed out in order to whoever asks next. Each worker drains it. */
typedef struct mmbal_queue {
    int64_t count, grain;
    mmbal_task *task;
    void *context;
    int64_t next; /* starts at 0 */
    int status;   /* starts at MMBAL_OK */
} mmbal_queue;

void mmbal_queue_drain(mmbal_queue *queue, int worker);

#ifdef __cplusplus
}
#endif
#endif
