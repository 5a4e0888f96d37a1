// Kernels with a planted bug each, and the right one beside them: test_shim.cc expects the shim to tell them apart.
#include "planted.h"

#include "async_copies.cuh"
#include "launch.cuh"

namespace mmbal {
namespace {

constexpr int THREADS = 64;

// reversed[t] = values[THREADS - 1 - t] by way of shared memory
__global__ void reverse(const int *values, int *reversed, Bug bug) {
    int *shared = shared_memory<int>();
    const int t = threadIdx.x;
    if (bug != Bug::UNINITIALISED_SHARED || t != 5) shared[t] = values[t];
    if (bug != Bug::MISSING_BARRIER) __syncthreads();
    reversed[t] = shared[bug == Bug::BEYOND_SHARED && t == 0 ? THREADS : THREADS - 1 - t];
}

__global__ void copy(const int *values, int64_t count, int *copied, Bug bug) {
    const int64_t end = bug == Bug::TAIL ? count + 1 : count;
    for (int64_t i = first_group<1>(); i < end; i += group_count<1>()) copied[i] = values[i];
}

__global__ void add_all(const int *values, int64_t count, int *sum, Bug bug) {
    if (bug == Bug::RACE) { // the first thread of each block adds to the same sum
        for (int64_t i = blockIdx.x; i < count && threadIdx.x == 0; i += gridDim.x) *sum += values[i];
    } else if (first_group<1>() == 0) {
        int total = 0;
        for (int64_t i = 0; i < count; i++) total += values[i];
        *sum = total;
    }
}

__global__ void neighbours(const int *values, int *sums, Bug bug) {
    int *shared = shared_memory<int>();
    const int t = threadIdx.x;
    if (bug == Bug::DIVERGENT_BARRIER) {
        if (t < WARP) {
            shared[t] = values[t];
            __syncthreads();
        } else {
            shared[t] = values[t];
            __syncthreads();
        }
    } else if (bug == Bug::DIVERGENT_SHUFFLE) {
        if (t % 2)
            shared[t] = __shfl_xor_sync(ALL_LANES, values[t], 1);
        else
            shared[t] = __shfl_xor_sync(ALL_LANES, values[t], 1);
    } else if (bug == Bug::DEADLOCK) {
        if (t != 3) __shfl_xor_sync(ALL_LANES, values[t], 1);
        __syncthreads();
    } else {
        shared[t] = values[t];
    }
    if (bug == Bug::MISSING_WARP_BARRIER)
        sums[t] = shared[t] + shared[t ^ 1];
    else {
        __syncwarp();
        sums[t] = shared[t] + shared[t ^ 1];
    }
}

// Two groups of copies, one after the other.
__global__ void copies(const int *values, int *reversed, Bug bug) {
    constexpr int COPIES = THREADS / 4;
    int *shared = shared_memory<int>();
    const int t = threadIdx.x;
    for (int half = 0; half < 2; half++) {
        if (t / (COPIES / 2) == half) copy_async(shared + 4 * t, values + 4 * t);
        end_group_of_copies();
    }
    if (bug == Bug::MISSING_WAIT)
        wait_for_copies<1>();
    else
        wait_for_copies<0>();
    __syncthreads();
    reversed[t] = shared[THREADS - 1 - t];
}

} // namespace
} // namespace mmbal

using namespace mmbal;

void planted_reverse(const int *values, int *reversed, Bug bug) {
    launch(nullptr, 1, THREADS, THREADS * sizeof(int), reverse, values, reversed, bug);
}

void planted_copy(const int *values, int64_t count, int *copied, Bug bug) {
    launch(nullptr, ceil_div(count, THREADS), THREADS, 0, copy, values, count, copied, bug);
}

void planted_sum(const int *values, int64_t count, int *sum, Bug bug) {
    launch(nullptr, 2, THREADS, 0, add_all, values, count, sum, bug);
}

void planted_neighbours(const int *values, int *sums, Bug bug) {
    launch(nullptr, 1, THREADS, THREADS * sizeof(int), neighbours, values, sums, bug);
}

void planted_copies(const int *values, int *reversed, Bug bug) {
    launch(nullptr, 1, THREADS, THREADS * sizeof(int), copies, values, reversed, bug);
}
