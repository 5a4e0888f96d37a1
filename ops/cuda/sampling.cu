#include "mmbal/cuda/sampling.h"

#include "draws.cuh"
#include "dtypes.cuh"
#include "radix_select.cuh"
#include "water.cuh"

// No multiply-add is fused here that is not spelt out (cmake/MmbalCuda.cmake), as in the C core.
namespace mmbal {
namespace {

// A block takes a row at a time, and so many have memory of their own.
constexpr int64_t ROWS_AT_ONCE = 2048;
int64_t count_blocks(int64_t S) { return S < ROWS_AT_ONCE ? S : ROWS_AT_ONCE; }

__device__ __forceinline__ double checked(double weight) {
    if (!(weight >= 0 && weight < static_cast<double>(INFINITY))) __trap();
    return weight;
}

template <typename R>
__global__ void __launch_bounds__(UNIT_THREADS, 1)
    sample_rows(const R *__restrict__ weights, const int64_t *__restrict__ k_of, int64_t S, int64_t N, int64_t seed,
                int64_t step, uint8_t *__restrict__ mask, uint64_t *all_keys) {
    auto &shared = *shared_memory<SelectShared<UNIT_THREADS>>();
    uint64_t *keys = all_keys + blockIdx.x * N;
    for (int64_t s = blockIdx.x; s < S; s += gridDim.x) {
        if (k_of[s] < 0 || k_of[s] > N) __trap();
        int64_t positive = 0;
        for (int64_t n = threadIdx.x; n < N; n += UNIT_THREADS) {
            const double w = checked(weights[s * N + n]);
            const uint32_t word = word_of(seed, step, 0, MMBAL_DRAW_UNIT, s * N + n);
            keys[n] = w > 0 ? bits_of(exponential(word) / w) : NEVER;
            positive += w > 0;
        }
        positive = sum_over_block<UNIT_THREADS>(positive, shared.block);
        const int64_t k = k_of[s] < positive ? k_of[s] : positive;
        const Smallest found = find_smallest<UNIT_THREADS>(keys, N, k, shared);
        take_smallest<UNIT_THREADS>(keys, N, k, found, shared,
                                    [&](int64_t n, bool kept) { mask[s * N + n] = kept ? 1 : 0; });
    }
}

template <typename R>
__global__ void __launch_bounds__(UNIT_THREADS, 1)
    fill_rows(const R *__restrict__ weights, const double *__restrict__ kappa_of, int64_t S, int64_t N, double mix,
              R *__restrict__ probabilities, double *__restrict__ level, double *all_q) {
    auto &shared = *shared_memory<BlockShared<UNIT_THREADS>>();
    double *q = all_q + blockIdx.x * N;
    for (int64_t s = blockIdx.x; s < S; s += gridDim.x) {
        int64_t above_0 = 0;
        for (int64_t n = threadIdx.x; n < N; n += UNIT_THREADS) {
            q[n] = checked(weights[s * N + n]);
            above_0 += q[n] > 0;
        }
        const double kappa = kappa_of[s];
        const int64_t most = mix > 0 ? N : sum_over_block<UNIT_THREADS>(above_0, shared);
        if (!(kappa >= 0 && kappa <= static_cast<double>(most))) __trap();
        const int64_t positive = mix_weights(q, N, mix, shared);
        const double c = water_level(q, N, positive, kappa, shared);
        for (int64_t n = threadIdx.x; n < N; n += UNIT_THREADS)
            probabilities[s * N + n] = static_cast<R>(capped_probability(c, q[n]));
        if (threadIdx.x == 0) level[s] = c;
    }
}

mmbal_status check_rows(mmbal_dtype dtype, int64_t S, int64_t N) {
    if (dtype != MMBAL_F32 && dtype != MMBAL_F64) return MMBAL_UNSUPPORTED;
    return S < 0 || N < 0 || N > UINT32_MAX ? MMBAL_INVALID_ARGUMENT : MMBAL_OK;
}

template <typename R>
mmbal_status run_sample(const void *weights, const int64_t *k, int64_t S, int64_t N, int64_t seed, int64_t step,
                        uint8_t *mask, void *workspace, mmbal_stream stream) {
    return launch(stream, count_blocks(S), UNIT_THREADS, sizeof(SelectShared<UNIT_THREADS>), sample_rows<R>,
                  static_cast<const R *>(weights), k, S, N, seed, step, mask, static_cast<uint64_t *>(workspace));
}

template <typename R>
mmbal_status run_fill(const void *weights, const double *kappa, int64_t S, int64_t N, double mix, void *probabilities,
                      double *c, void *workspace, mmbal_stream stream) {
    return launch(stream, count_blocks(S), UNIT_THREADS, sizeof(BlockShared<UNIT_THREADS>), fill_rows<R>,
                  static_cast<const R *>(weights), kappa, S, N, mix, static_cast<R *>(probabilities), c,
                  static_cast<double *>(workspace));
}

} // namespace
} // namespace mmbal

using namespace mmbal;

int64_t mmbal_weighted_sample_workspace_cuda(int64_t S, int64_t N) {
    return count_blocks(S) * N * static_cast<int64_t>(sizeof(uint64_t));
}

mmbal_status mmbal_weighted_sample_cuda(mmbal_dtype dtype, const void *weights, const int64_t *k, int64_t S, int64_t N,
                                        int64_t seed, int64_t step, uint8_t *mask, void *workspace,
                                        mmbal_stream stream) {
    const mmbal_status status = is_step(step) ? check_rows(dtype, S, N) : MMBAL_INVALID_ARGUMENT;
    if (status != MMBAL_OK) return status;
    return (dtype == MMBAL_F64 ? run_sample<double> : run_sample<float>)(weights, k, S, N, seed, step, mask, workspace,
                                                                         stream);
}

int64_t mmbal_waterfill_workspace_cuda(int64_t S, int64_t N) {
    return count_blocks(S) * N * static_cast<int64_t>(sizeof(double));
}

mmbal_status mmbal_waterfill_cuda(mmbal_dtype dtype, const void *weights, const double *kappa, int64_t S, int64_t N,
                                  double mix, void *probabilities, double *c, void *workspace, mmbal_stream stream) {
    const mmbal_status status = check_rows(dtype, S, N);
    if (status != MMBAL_OK) return status;
    if (!(mix >= 0 && mix <= 1)) return MMBAL_INVALID_ARGUMENT;
    return (dtype == MMBAL_F64 ? run_fill<double> : run_fill<float>)(weights, kappa, S, N, mix, probabilities, c,
                                                                     workspace, stream);
}
