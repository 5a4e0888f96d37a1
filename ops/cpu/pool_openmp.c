#include <omp.h>

#include "mmbal/pool.h"

static mmbal_status run_with_openmp(void *self, int64_t count, int64_t grain, mmbal_task *task, void *context) {
    mmbal_queue queue = {.count = count, .grain = grain, .task = task, .context = context, .status = MMBAL_OK};
    const int workers = (int)(intptr_t)self;
#pragma omp parallel num_threads(workers)
    mmbal_queue_drain(&queue, omp_get_thread_num());
    return (mmbal_status)queue.status;
}

mmbal_pool mmbal_pool_openmp(int workers) {
    if (workers <= 0) workers = omp_get_max_threads();
    return (mmbal_pool){.run = run_with_openmp, .workers = workers, .self = (void *)(intptr_t)workers};
}
