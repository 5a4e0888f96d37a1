#include <math.h>

#include "column_sort.cuh"
#include "mmbal/cuda/mutual_info.h"
#include "pieces.cuh"

namespace mmbal {
namespace {

constexpr int THREADS = 256;

// The plug-in estimator of labels. Sorted pairs (a, b) hold each entry of the table of counts side by side, and so its
// sums over b; the classes of b are sorted by themselves. Column m is the pairs of modality m, column M + m its b.

constexpr int CLASS_BITS = 15; // MMBAL_MOST_SORTED_CLASSES is 2 to that
constexpr int PAIR_PASSES = 4; // bytes of a pair
constexpr uint32_t NO_PAIR = ~0u;
constexpr int64_t SAMPLES_OF_PART = 1024;

__global__ void __launch_bounds__(THREADS, 1)
    make_pairs(const int64_t *__restrict__ a, const int64_t *__restrict__ b, const uint8_t *__restrict__ present,
               int64_t M, int64_t N, int64_t C, uint32_t *__restrict__ keys) {
    for (int64_t i = first_group<1>(); i < M * N; i += group_count<1>()) {
        const int64_t m = i / N, sample = i % N;
        require_index(b[sample], C);
        uint32_t pair = NO_PAIR, of_b = NO_PAIR;
        if (!present || present[sample * M + m]) {
            require_index(a[i], C);
            of_b = static_cast<uint32_t>(b[sample]);
            pair = static_cast<uint32_t>(a[i]) << CLASS_BITS | of_b;
        }
        keys[i] = pair;
        keys[M * N + i] = of_b;
    }
}

// The first place in sorted keys [n] whose key is not below this one.
__device__ __forceinline__ int64_t first_not_below(const uint32_t *keys, int64_t n, uint32_t key) {
    int64_t low = 0, high = n;
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (keys[middle] < key)
            low = middle + 1;
        else
            high = middle;
    }
    return low;
}

// n ln n where a run of n keys that agree from bit `shift` on ends at i; 0 elsewhere.
__device__ __forceinline__ double run_term(const uint32_t *keys, int64_t N, int64_t i, int shift) {
    const uint32_t mine = keys[i] >> shift;
    if (keys[i] == NO_PAIR || (i + 1 < N && keys[i + 1] >> shift == mine)) return 0;
    const int64_t first = i > 0 && keys[i - 1] >> shift == mine ? first_not_below(keys, i, mine << shift) : i;
    const double n = static_cast<double>(i + 1 - first);
    return n * log(n);
}

// A warp takes a part of a modality's samples.
__global__ void __launch_bounds__(THREADS, 1)
    add_runs(const uint32_t *__restrict__ keys, int64_t M, int64_t N, int64_t parts, double *__restrict__ sums) {
    for (int64_t job = first_group<WARP>(); job < M * parts; job += group_count<WARP>()) {
        const int64_t m = job / parts, begin = job % parts * SAMPLES_OF_PART;
        const int64_t end = begin + SAMPLES_OF_PART < N ? begin + SAMPLES_OF_PART : N;
        const uint32_t *pairs = keys + m * N, *of_b = keys + (M + m) * N;
        double sum = 0;
        for (int64_t i = begin + threadIdx.x % WARP; i < end; i += WARP)
            sum += run_term(pairs, N, i, 0) - run_term(pairs, N, i, CLASS_BITS) - run_term(of_b, N, i, 0);
        sum = sum_over_lanes<WARP>(sum);
        if (threadIdx.x % WARP == 0) sums[job] = sum;
    }
}

// A warp takes a modality. With counts n: mi = (sum n[i,j] ln n[i,j] - sum n[i,.] ln n[i,.] - sum n[.,j] ln n[.,j]) / n
// + ln n.
__global__ void __launch_bounds__(WARP)
    finish_discrete(const uint32_t *__restrict__ keys, const double *__restrict__ sums, int64_t M, int64_t N,
                    int64_t parts, double *__restrict__ mi) {
    for (int64_t m = blockIdx.x; m < M; m += gridDim.x) {
        double sum = 0;
        for (int64_t part = threadIdx.x; part < parts; part += WARP) sum += sums[m * parts + part];
        sum = sum_over_lanes<WARP>(sum);
        const double n = static_cast<double>(first_not_below(keys + m * N, N, NO_PAIR));
        const double value = n > 0 ? sum / n + log(n) : static_cast<double>(NAN);
        if (threadIdx.x == 0) mi[m] = value < 0 ? 0 : value;
    }
}

struct PairMemory {
    Columns<uint32_t> pairs;
    double *sums;
    int64_t parts, bytes;

    PairMemory(void *workspace, int64_t M, int64_t N) {
        Pieces pieces(workspace);
        pairs = {};
        pairs.columns = 2 * M, pairs.N = N;
        pairs.keys = pieces.take<uint32_t>(2 * M * N), pairs.spare_keys = pieces.take<uint32_t>(2 * M * N);
        pairs.places = pieces.take<int64_t>(count_sort_places(2 * M, N));
        parts = ceil_div(N, SAMPLES_OF_PART);
        sums = pieces.take<double>(M * parts);
        bytes = pieces.bytes();
    }
};

} // namespace
} // namespace mmbal

using namespace mmbal;

int64_t mmbal_discrete_mutual_info_workspace_cuda(int64_t M, int64_t N) { return PairMemory(nullptr, M, N).bytes; }

mmbal_status mmbal_discrete_mutual_info_cuda(const int64_t *a, const int64_t *b, const uint8_t *present, int64_t M,
                                             int64_t N, int64_t C, double *mi, void *workspace, mmbal_stream stream) {
    if (M < 1 || N < 0 || C < 1 || C > MMBAL_MOST_SORTED_CLASSES) return MMBAL_INVALID_ARGUMENT;
    const PairMemory memory(workspace, M, N);
    const uint32_t *keys = memory.pairs.keys;
    MMBAL_RETURN_UNLESS_OK(
        launch(stream, ceil_div(M * N, THREADS), THREADS, 0, make_pairs, a, b, present, M, N, C, memory.pairs.keys));
    MMBAL_RETURN_UNLESS_OK(sort_columns(memory.pairs, PAIR_PASSES, stream));
    MMBAL_RETURN_UNLESS_OK(launch(stream, ceil_div(M * memory.parts * WARP, THREADS), THREADS, 0, add_runs, keys, M, N,
                                  memory.parts, memory.sums));
    return launch(stream, M, WARP, 0, finish_discrete, keys, memory.sums, M, N, memory.parts, mi);
}
