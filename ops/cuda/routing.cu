#include <limits.h>
#include <math.h>

#include "dtypes.cuh"
#include "launch.cuh"
#include "mmbal/cuda/routing.h"
#include "softmax.cuh"

namespace mmbal {
namespace {

constexpr int THREADS = 256;

template <int LANES>
__device__ __forceinline__ bool any_lane(bool value) {
    return LANES == 1 ? value : __any_sync(ALL_LANES, value) != 0;
}

// A score and whose it is; -1: nobody's.
template <typename R>
struct Choice {
    R score;
    int64_t expert;
};

template <typename R>
__device__ __forceinline__ bool comes_before(const Choice<R> &a, const Choice<R> &b) {
    if (a.expert < 0 || b.expert < 0) return a.expert >= 0;
    return a.score > b.score || (a.score == b.score && a.expert < b.expert);
}

template <int LANES, typename R>
__device__ __forceinline__ Choice<R> first_over_lanes(Choice<R> mine) {
#pragma unroll
    for (int step = LANES / 2; step > 0; step /= 2) {
        const Choice<R> other = {__shfl_xor_sync(ALL_LANES, mine.score, step),
                                 __shfl_xor_sync(ALL_LANES, mine.expert, step)};
        if (comes_before(other, mine)) mine = other;
    }
    return mine;
}

// Each choice is the first of those that come after the one before: K passes over a row, and no memory for it.
template <int LANES, typename Stored>
__global__ void __launch_bounds__(THREADS, 1)
    topk(const Stored *__restrict__ logits_all, const Real<Stored> *__restrict__ selection_bias, int64_t N, int64_t E,
         int64_t K, int normalize, Real<Stored> *__restrict__ weights, int64_t *__restrict__ indices) {
    using R = Real<Stored>;
    const int lane = threadIdx.x % LANES;
    for (int64_t n = first_group<LANES>(); n < N; n += group_count<LANES>()) {
        const Stored *logits = logits_all + n * E;
        R *w = weights + n * K;
        int64_t *index = indices + n * K;
        bool unordered = false;
        for (int64_t e = lane; e < E; e += LANES) {
            const R score = load(logits[e]) + (selection_bias ? selection_bias[e] : 0);
            unordered |= score != score;
        }
        if (any_lane<LANES>(unordered)) {
            for (int64_t k = lane; k < K; k += LANES) w[k] = static_cast<R>(NAN), index[k] = k;
            continue;
        }
        Choice<R> last = {0, -1};
        R top_kept = -static_cast<R>(INFINITY);
        for (int64_t k = 0; k < K; k++) {
            Choice<R> best = {0, -1};
            for (int64_t e = lane; e < E; e += LANES) {
                const Choice<R> candidate = {load(logits[e]) + (selection_bias ? selection_bias[e] : 0), e};
                if ((last.expert < 0 || comes_before(last, candidate)) && comes_before(candidate, best))
                    best = candidate;
            }
            last = first_over_lanes<LANES>(best);
            const R logit = load(logits[last.expert]); // what was compared is the biased score
            top_kept = logit > top_kept ? logit : top_kept;
            if (lane == 0) w[k] = logit, index[k] = last.expert;
        }
        R top = top_kept, total = 0;
        if (!normalize) total = softmax_total<LANES, R>(logits, E, lane, &top);
        if (lane > 0) continue;
        for (int64_t k = 0; k < K; k++) {
            w[k] = exp_real(w[k] - top);
            if (normalize) total += w[k];
        }
        for (int64_t k = 0; k < K; k++)
            w[k] = top_kept == -static_cast<R>(INFINITY) ? static_cast<R>(NAN) : w[k] / total;
    }
}

template <int LANES, typename Stored>
__global__ void __launch_bounds__(THREADS, 1)
    topk_backward(const Real<Stored> *__restrict__ dweights, const Stored *__restrict__ logits_all,
                  const Real<Stored> *__restrict__ weights, const int64_t *__restrict__ indices, int64_t N, int64_t E,
                  int64_t K, int normalize, Stored *__restrict__ dlogits) {
    using R = Real<Stored>;
    const int lane = threadIdx.x % LANES;
    for (int64_t n = first_group<LANES>(); n < N; n += group_count<LANES>()) {
        const Stored *logits = logits_all + n * E;
        const R *w = weights + n * K, *dw = dweights + n * K;
        const int64_t *index = indices + n * K;
        R mean = 0, top = 0, total = 0;
        for (int64_t k = 0; k < K; k++) {
            require_index(index[k], E);
            mean += w[k] * dw[k];
        }
        if (!normalize) total = softmax_total<LANES, R>(logits, E, lane, &top);
        for (int64_t e = lane; e < E; e += LANES) {
            R slope = normalize ? 0 : -exp_real(load(logits[e]) - top) / total * mean;
            for (int64_t k = 0; k < K; k++)
                if (index[k] == e) slope = w[k] * (dw[k] - mean);
            store(&dlogits[n * E + e], slope);
        }
    }
}

template <typename Stored>
mmbal_status run_topk(const void *logits, const void *selection_bias, int64_t N, int64_t E, int64_t K, int normalize,
                      void *weights, int64_t *indices, mmbal_stream stream) {
    const bool few = E <= FEW_EXPERTS;
    return launch(stream, ceil_div(few ? N : N * WARP, THREADS), THREADS, 0, few ? topk<1, Stored> : topk<WARP, Stored>,
                  static_cast<const Stored *>(logits), static_cast<const Real<Stored> *>(selection_bias), N, E, K,
                  normalize, static_cast<Real<Stored> *>(weights), indices);
}

template <typename Stored>
mmbal_status run_topk_backward(const void *dweights, const void *logits, const void *weights, const int64_t *indices,
                               int64_t N, int64_t E, int64_t K, int normalize, void *dlogits, mmbal_stream stream) {
    const bool few = E <= FEW_EXPERTS;
    return launch(stream, ceil_div(few ? N : N * WARP, THREADS), THREADS, 0,
                  few ? topk_backward<1, Stored> : topk_backward<WARP, Stored>,
                  static_cast<const Real<Stored> *>(dweights), static_cast<const Stored *>(logits),
                  static_cast<const Real<Stored> *>(weights), indices, N, E, K, normalize,
                  static_cast<Stored *>(dlogits));
}

// Counting sort. A warp owns a chunk of pairs: it counts their experts; one block turns the counts, expert by expert
// and chunk by chunk, into first places; each warp then places its pairs, 32 at a time and in their order.
constexpr int64_t LEAST_CHUNK = 256, MOST_CHUNKS = 4096;
constexpr int SCAN_THREADS = 1024;

int64_t chunk_size(int64_t R) {
    const int64_t for_most = ceil_div(ceil_div(R, MOST_CHUNKS), WARP) * WARP;
    return for_most > LEAST_CHUNK ? for_most : LEAST_CHUNK;
}

// Places (or counts) a chunk. place[e] is where the chunk's next pair of expert e goes.
template <bool COUNT_ONLY>
__device__ __forceinline__ void sort_chunk(const int64_t *__restrict__ indices, int64_t E, int64_t first, int64_t last,
                                           int64_t *place, int64_t *__restrict__ permutation,
                                           int64_t *__restrict__ inverse) {
    const int lane = threadIdx.x;
    for (int64_t begin = first; begin < last; begin += WARP) {
        const int64_t pair = begin + lane;
        const bool mine = pair < last;
        int expert = -1;
        if (mine) {
            require_index(indices[pair], E);
            expert = static_cast<int>(indices[pair]);
        }
        const unsigned same = __match_any_sync(ALL_LANES, expert);
        const int64_t start = mine ? place[expert] : 0;
        const unsigned before = same & ((1u << lane) - 1);
        __syncwarp(); // all have read where their expert's pairs go
        if (mine && before == 0) place[expert] = start + __popc(same);
        if (mine && !COUNT_ONLY) {
            const int64_t r = start + __popc(before);
            permutation[r] = pair;
            inverse[pair] = r;
        }
        __syncwarp();
    }
}

__global__ void __launch_bounds__(WARP)
    count_pairs(const int64_t *__restrict__ indices, int64_t R, int64_t E, int64_t chunk, int64_t *counts) {
    for (int64_t c = blockIdx.x; c * chunk < R; c += gridDim.x) {
        int64_t *mine = counts + c * E;
        for (int64_t e = threadIdx.x; e < E; e += WARP) mine[e] = 0;
        __syncwarp();
        sort_chunk<true>(indices, E, c * chunk, c * chunk + chunk < R ? c * chunk + chunk : R, mine, nullptr, nullptr);
    }
}

// counts [chunks, E] become first places, and offsets [E + 1] follow. One block.
__global__ void __launch_bounds__(SCAN_THREADS)
    scan_counts(int64_t *__restrict__ counts, int64_t chunks, int64_t E, int64_t R, int64_t *__restrict__ offsets) {
    int64_t *of_warps = shared_memory<int64_t>(); // [WARP + 1]
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    int64_t so_far = 0;
    for (int64_t begin = 0; begin < chunks * E; begin += SCAN_THREADS) {
        const int64_t i = begin + threadIdx.x, e = i / chunks, c = i % chunks;
        const int64_t count = i < chunks * E ? counts[c * E + e] : 0;
        int64_t sum = count; // of the warp's threads up to this one
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            const int64_t other = __shfl_up_sync(ALL_LANES, sum, step);
            if (lane >= step) sum += other;
        }
        if (lane == WARP - 1) of_warps[warp] = sum;
        __syncthreads();
        if (warp == 0) {
            const int64_t of_warp = of_warps[lane];
            int64_t up_to = of_warp;
#pragma unroll
            for (int step = 1; step < WARP; step *= 2) {
                const int64_t other = __shfl_up_sync(ALL_LANES, up_to, step);
                if (lane >= step) up_to += other;
            }
            of_warps[lane] = up_to - of_warp;
            if (lane == WARP - 1) of_warps[WARP] = up_to;
        }
        __syncthreads();
        const int64_t start = so_far + of_warps[warp] + sum - count;
        so_far += of_warps[WARP];
        if (i < chunks * E) {
            counts[c * E + e] = start;
            if (c == 0) offsets[e] = start;
        }
        __syncthreads(); // of_warps is written again
    }
    if (threadIdx.x == 0) offsets[E] = R;
}

__global__ void __launch_bounds__(WARP)
    place_pairs(const int64_t *__restrict__ indices, int64_t R, int64_t E, int64_t chunk, int64_t *places,
                int64_t *__restrict__ permutation, int64_t *__restrict__ inverse) {
    for (int64_t c = blockIdx.x; c * chunk < R; c += gridDim.x)
        sort_chunk<false>(indices, E, c * chunk, c * chunk + chunk < R ? c * chunk + chunk : R, places + c * E,
                          permutation, inverse);
}

} // namespace
} // namespace mmbal

using namespace mmbal;

mmbal_status mmbal_moe_topk_cuda(mmbal_dtype dtype, const void *logits, const void *selection_bias, int64_t N,
                                 int64_t E, int64_t K, int normalize, void *weights, int64_t *indices,
                                 mmbal_stream stream) {
    if (N < 0 || K < 1 || K > E) return MMBAL_INVALID_ARGUMENT;
    MMBAL_RETURN_FOR_DTYPE(dtype, run_topk, logits, selection_bias, N, E, K, normalize, weights, indices, stream);
}

mmbal_status mmbal_moe_topk_backward_cuda(mmbal_dtype dtype, const void *dweights, const void *logits,
                                          const void *weights, const int64_t *indices, int64_t N, int64_t E, int64_t K,
                                          int normalize, void *dlogits, mmbal_stream stream) {
    if (N < 0 || K < 1 || K > E) return MMBAL_INVALID_ARGUMENT;
    MMBAL_RETURN_FOR_DTYPE(dtype, run_topk_backward, dweights, logits, weights, indices, N, E, K, normalize, dlogits,
                           stream);
}

int64_t mmbal_moe_dispatch_workspace_cuda(int64_t N, int64_t K, int64_t E) {
    const int64_t chunks = ceil_div(N * K, chunk_size(N * K));
    return static_cast<int64_t>(sizeof(int64_t)) * chunks * E;
}

mmbal_status mmbal_moe_dispatch_cuda(const int64_t *indices, int64_t N, int64_t K, int64_t E, int64_t *permutation,
                                     int64_t *offsets, int64_t *inverse, void *workspace, mmbal_stream stream) {
    if (N < 0 || K < 1 || E < 1 || E > INT_MAX) return MMBAL_INVALID_ARGUMENT;
    const int64_t R = N * K, chunk = chunk_size(R), chunks = ceil_div(R, chunk);
    int64_t *places = static_cast<int64_t *>(workspace);
    MMBAL_RETURN_UNLESS_OK(launch(stream, chunks, WARP, 0, count_pairs, indices, R, E, chunk, places));
    if (R == 0) { // offsets alone
        const cudaError_t error =
            cudaMemsetAsync(offsets, 0, sizeof(int64_t) * (E + 1), static_cast<cudaStream_t>(stream));
        return error == cudaSuccess ? MMBAL_OK : MMBAL_DEVICE_ERROR;
    }
    MMBAL_RETURN_UNLESS_OK(
        launch(stream, 1, SCAN_THREADS, sizeof(int64_t) * (WARP + 1), scan_counts, places, chunks, E, R, offsets));
    return launch(stream, chunks, WARP, 0, place_pairs, indices, R, E, chunk, places, permutation, inverse);
}
