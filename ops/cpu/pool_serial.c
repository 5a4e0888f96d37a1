#include "mmbal/pool.h"

void mmbal_queue_drain(mmbal_queue *queue, int worker) {
    const int64_t grain = queue->grain > 0 ? queue->grain : 1;
    for (;;) {
        const int64_t begin = __atomic_fetch_add(&queue->next, grain, __ATOMIC_RELAXED);
        if (begin >= queue->count) return;
        const int64_t end = begin + grain < queue->count ? begin + grain : queue->count;
        const mmbal_status status = queue->task(queue->context, worker, begin, end);
        int none = MMBAL_OK;
        if (status != MMBAL_OK)
            __atomic_compare_exchange_n(&queue->status, &none, (int)status, 0, __ATOMIC_RELAXED, __ATOMIC_RELAXED);
    }
}

static mmbal_status run_serially(void *self, int64_t count, int64_t grain, mmbal_task *task, void *context) {
    (void)self;
    mmbal_queue queue = {.count = count, .grain = grain, .task = task, .context = context, .status = MMBAL_OK};
    mmbal_queue_drain(&queue, 0);
    return (mmbal_status)queue.status;
}

mmbal_pool mmbal_pool_serial(void) { return (mmbal_pool){.run = run_serially, .workers = 1}; }
