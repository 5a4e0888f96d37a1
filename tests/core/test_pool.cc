#include "mmbal/pool.h"

#include <atomic>
#include <memory>

#include "helpers.h"

namespace {

using mmbal_test::PthreadPool;
using mmbal_test::ReversedPool;

struct Record {
    int workers;
    int64_t count, grain;
    std::vector<std::atomic<int>> visits;
    std::atomic<int> pieces{0}, out_of_bounds{0};
    int64_t failing = -1; // the piece that holds this index fails
    Record(int of_workers, int64_t of_count, int64_t of_grain)
        : workers(of_workers), count(of_count), grain(of_grain), visits(of_count) {}
};

mmbal_status visit(void *context, int worker, int64_t begin, int64_t end) {
    auto *record = static_cast<Record *>(context);
    record->pieces++;
    const int64_t most = record->grain > 0 ? record->grain : 1;
    if (worker < 0 || worker >= record->workers || begin < 0 || end <= begin || end > record->count ||
        end - begin > most) {
        record->out_of_bounds++;
        return MMBAL_OK;
    }
    for (int64_t i = begin; i < end; i++) record->visits[i]++;
    return begin <= record->failing && record->failing < end ? MMBAL_INVALID_INDEX : MMBAL_OK;
}

void expect_every_index_once(const mmbal_pool &pool) {
    ASSERT_GE(pool.workers, 1);
    for (int64_t count : {0, 1, 2, 7, 64, 1000}) {
        for (int64_t grain : {1, 3, 64, 5000}) {
            Record record(pool.workers, count, grain);
            EXPECT_EQ(pool.run(pool.self, count, grain, visit, &record), MMBAL_OK);
            EXPECT_EQ(record.out_of_bounds, 0) << count << " by " << grain;
            EXPECT_GE(record.pieces * grain, count);
            for (int64_t i = 0; i < count; i++)
                ASSERT_EQ(record.visits[i], 1) << i << " of " << count << " by " << grain;
        }
    }
}

void expect_failure_is_returned(const mmbal_pool &pool) {
    for (int64_t failing : {0, 50, 99}) {
        Record record(pool.workers, 100, 7);
        record.failing = failing;
        EXPECT_EQ(pool.run(pool.self, 100, 7, visit, &record), MMBAL_INVALID_INDEX) << failing;
        for (int64_t i = 0; i < 100; i++) ASSERT_EQ(record.visits[i], 1) << "the others are done all the same: " << i;
    }
}

TEST(Pool, SerialVisitsEveryIndexOnce) { expect_every_index_once(mmbal_pool_serial()); }
TEST(Pool, SerialReturnsTheStatusOfAFailingTask) { expect_failure_is_returned(mmbal_pool_serial()); }
TEST(Pool, SerialHasOneWorker) { EXPECT_EQ(mmbal_pool_serial().workers, 1); }

TEST(Pool, QueueSharedByThreadsVisitsEveryIndexOnce) {
    for (int workers : {1, 2, 5}) {
        PthreadPool threads(workers);
        expect_every_index_once(threads.pool());
    }
}

TEST(Pool, QueueSharedByThreadsReturnsTheStatusOfAFailingTask) {
    PthreadPool threads(5);
    expect_failure_is_returned(threads.pool());
}

TEST(Pool, ReversedPoolOfTheTestsKeepsThePromisesOfAPool) {
    ReversedPool whole(3), single(2, 1);
    expect_every_index_once(whole.pool());
    expect_every_index_once(single.pool());
    expect_failure_is_returned(whole.pool());
}

TEST(Pool, QueueHandsOutPiecesInOrder) {
    std::vector<int64_t> begins;
    const auto note = [](void *context, int, int64_t begin, int64_t) {
        static_cast<std::vector<int64_t> *>(context)->push_back(begin);
        return MMBAL_OK;
    };
    mmbal_queue queue = {10, 4, note, &begins, 0, MMBAL_OK};
    mmbal_queue_drain(&queue, 0);
    EXPECT_EQ(begins, (std::vector<int64_t>{0, 4, 8}));
    mmbal_queue_drain(&queue, 0);
    EXPECT_EQ(begins.size(), 3u) << "a drained queue has nothing left";
}

TEST(Pool, QueueKeepsTheFirstFailureAmongSeveral) {
    const auto fail = [](void *, int, int64_t begin, int64_t) {
        return begin == 0 ? MMBAL_OK : begin == 1 ? MMBAL_UNSUPPORTED : MMBAL_INVALID_INDEX;
    };
    mmbal_queue queue = {4, 1, fail, nullptr, 0, MMBAL_OK};
    mmbal_queue_drain(&queue, 0);
    EXPECT_EQ(queue.status, static_cast<int>(MMBAL_UNSUPPORTED));
    const mmbal_pool serial = mmbal_pool_serial();
    EXPECT_EQ(serial.run(serial.self, 4, 1, fail, nullptr), MMBAL_UNSUPPORTED);
}

TEST(Pool, GrainBelowOneCountsAsOne) {
    for (int64_t grain : {0, -3}) {
        Record record(1, 5, grain);
        const mmbal_pool serial = mmbal_pool_serial();
        EXPECT_EQ(serial.run(serial.self, 5, grain, visit, &record), MMBAL_OK);
        EXPECT_EQ(record.pieces, 5);
        EXPECT_EQ(record.out_of_bounds, 0);
    }
}

#ifdef MMBAL_HAS_OPENMP
TEST(Pool, OpenmpVisitsEveryIndexOnce) {
    for (int workers : {1, 2, 5}) {
        const mmbal_pool pool = mmbal_pool_openmp(workers);
        EXPECT_EQ(pool.workers, workers);
        expect_every_index_once(pool);
    }
}

TEST(Pool, OpenmpReturnsTheStatusOfAFailingTask) { expect_failure_is_returned(mmbal_pool_openmp(3)); }

TEST(Pool, OpenmpWithoutANumberHasAtLeastOneWorker) {
    expect_every_index_once(mmbal_pool_openmp(0));
    expect_every_index_once(mmbal_pool_openmp(-1));
}
#endif

} // namespace
