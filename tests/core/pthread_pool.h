// Pools for tests. PthreadPool starts its threads anew for every run, with pthreads alone: ThreadSanitizer sees every
// hand-over, which it does not with OpenMP. The other two work alone: one backwards, one fails.
#ifndef MMBAL_TESTS_PTHREAD_POOL_H
#define MMBAL_TESTS_PTHREAD_POOL_H

#include <pthread.h>

#include <algorithm>
#include <cstdint>
#include <vector>

#include "mmbal/pool.h"

namespace mmbal_test {

class PthreadPool {
public:
    explicit PthreadPool(int workers) : workers_(workers) {}
    mmbal_pool pool() { return {run, workers_, this}; }

private:
    struct Seat {
        mmbal_queue *queue;
        int worker;
    };

    static void *work(void *seat) {
        mmbal_queue_drain(static_cast<Seat *>(seat)->queue, static_cast<Seat *>(seat)->worker);
        return nullptr;
    }

    static mmbal_status run(void *self, int64_t count, int64_t grain, mmbal_task *task, void *context) {
        const int workers = static_cast<PthreadPool *>(self)->workers_;
        mmbal_queue queue = {count, grain, task, context, 0, MMBAL_OK};
        std::vector<Seat> seats;
        for (int worker = 0; worker < workers; worker++) seats.push_back({&queue, worker});
        std::vector<pthread_t> threads;
        for (int worker = 1; worker < workers; worker++) {
            pthread_t thread;
            // Without the thread the others do its share: a queue needs no particular worker.
            if (pthread_create(&thread, nullptr, work, &seats[worker]) == 0) threads.push_back(thread);
        }
        work(&seats[0]);
        for (pthread_t thread : threads) pthread_join(thread, nullptr);
        return static_cast<mmbal_status>(queue.status);
    }

    int workers_;
};

// Last piece first, each by the next of `workers` workers. piece = 0: pieces as large as allowed.
class ReversedPool {
public:
    explicit ReversedPool(int workers, int64_t piece = 0) : workers_(workers), piece_(piece) {}
    mmbal_pool pool() { return {run, workers_, this}; }

private:
    static mmbal_status run(void *self, int64_t count, int64_t grain, mmbal_task *task, void *context) {
        const auto *reversed = static_cast<ReversedPool *>(self);
        const int64_t piece = reversed->piece_ ? std::min(reversed->piece_, grain) : grain;
        mmbal_status first = MMBAL_OK;
        for (int64_t i = (count + piece - 1) / piece - 1; i >= 0; i--) {
            const int worker = static_cast<int>(i % reversed->workers_);
            const mmbal_status status = task(context, worker, i * piece, std::min(count, (i + 1) * piece));
            if (first == MMBAL_OK) first = status;
        }
        return first;
    }

    int workers_;
    int64_t piece_;
};

// Serial, but run number `failing` (from 0) does its work and says MMBAL_UNSUPPORTED.
class FailingPool {
public:
    explicit FailingPool(int failing) : failing_(failing) {}
    mmbal_pool pool() { return {run, 1, this}; }
    int runs() const { return runs_; }

private:
    static mmbal_status run(void *self, int64_t count, int64_t grain, mmbal_task *task, void *context) {
        auto *failing = static_cast<FailingPool *>(self);
        const mmbal_pool serial = mmbal_pool_serial();
        const mmbal_status status = serial.run(serial.self, count, grain, task, context);
        return failing->runs_++ == failing->failing_ ? MMBAL_UNSUPPORTED : status;
    }

    int failing_, runs_ = 0;
};

} // namespace mmbal_test
#endif
