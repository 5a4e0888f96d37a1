#include "mmbal/cuda/router_loss.h"
#include "softmax.cuh"

namespace mmbal {
namespace {

constexpr int THREADS = 256, FINISH_THREADS = 1024;
constexpr int64_t MOST_PARTS = 4096;

// Sums over tokens are taken in two steps. A warp takes the sums of its part of the tokens, one block those of all
// parts. They are columns of the workspace, [columns, parts], behind their totals [columns] and the scale [1]:
//     e < E: sum of p[n,e]    E: sum of logsumexp^2    E + 1 + e: choices of expert e    2 E + 1: tokens counted
struct Sums {
    double *totals, *scale, *parts;
    int64_t E, count, tokens; // parts, and tokens of each
    __host__ __device__ int64_t columns() const { return 2 * E + 2; }
    __host__ __device__ int64_t z() const { return E; }
    __host__ __device__ int64_t choices(int64_t e) const { return E + 1 + e; }
    __host__ __device__ int64_t counted() const { return 2 * E + 1; }
    __device__ double *part(int64_t column, int64_t i) const { return parts + column * count + i; }
};

Sums lay_out(int64_t N, int64_t E, void *workspace) {
    Sums sums = {};
    sums.E = E, sums.tokens = WARP * ceil_div(ceil_div(N, WARP), MOST_PARTS);
    sums.count = N > 0 ? ceil_div(N, sums.tokens) : 0;
    sums.totals = static_cast<double *>(workspace);
    sums.scale = sums.totals + sums.columns(), sums.parts = sums.scale + 1;
    return sums;
}

// What is asked of the sums.
enum class Wanted { CHOICES, BALANCE, Z };

__device__ __forceinline__ void add_part(const Sums &sums, int64_t column, int64_t i, bool first, double value) {
    const double sum = sum_over_lanes<WARP>(value);
    if (threadIdx.x % WARP == 0) *sums.part(column, i) = first ? sum : *sums.part(column, i) + sum;
}

template <Wanted wanted, typename Stored>
__global__ void __launch_bounds__(THREADS, 1)
    sum_parts(const Stored *__restrict__ logits_all, const int64_t *__restrict__ indices,
              const uint8_t *__restrict__ mask, int64_t N, int64_t K, int64_t counted_choices, Sums sums) {
    const int64_t E = sums.E;
    for (int64_t i = first_group<WARP>(); i < sums.count; i += group_count<WARP>()) {
        for (int64_t step = 0; step < sums.tokens; step += WARP) {
            const int64_t n = i * sums.tokens + step + threadIdx.x % WARP;
            const bool first = step == 0, counts = n < N && !(mask && !mask[n]);
            const Stored *logits = logits_all + n * E;
            const int64_t *chosen = indices + n * K;
            double top = 0, total = 1, inverse = 1;
            if (counts && wanted != Wanted::CHOICES) total = softmax_total<1>(logits, E, 0, &top);
            inverse = inverse_of_total(total);
            if (wanted == Wanted::Z) {
                const double logsumexp = counts ? top + log(total) : 0;
                add_part(sums, sums.z(), i, first, logsumexp * logsumexp);
            } else {
                for (int64_t k = 0; k < K && n < N; k++) require_index(chosen[k], E);
                for (int64_t e = 0; e < E; e++) {
                    int64_t choices = 0;
                    for (int64_t k = 0; k < counted_choices && counts; k++) choices += chosen[k] == e;
                    add_part(sums, sums.choices(e), i, first, static_cast<double>(choices));
                    if (wanted == Wanted::CHOICES) continue;
                    add_part(sums, e, i, first, counts ? exp(static_cast<double>(load(logits[e])) - top) * inverse : 0);
                }
            }
            add_part(sums, sums.counted(), i, first, counts ? 1 : 0);
        }
    }
}

// The totals, and from them the scale: factor / tokens counted, 0 without any. Where choices were counted, the totals
// of the choices become shares F[e]. One block.
template <typename R>
__global__ void __launch_bounds__(FINISH_THREADS) finish_sums(Sums sums, Wanted wanted, double factor, R *loss) {
    const int lane = threadIdx.x % WARP;
    for (int64_t column = first_group<WARP>(); column < sums.columns(); column += group_count<WARP>()) {
        const bool is_choice = column > sums.z() && column < sums.counted();
        const bool summed = column == sums.counted() || (wanted == Wanted::Z         ? column == sums.z()
                                                         : wanted == Wanted::BALANCE ? column != sums.z()
                                                                                     : is_choice);
        if (!summed) continue;
        double sum = 0;
        for (int64_t i = lane; i < sums.count; i += WARP) sum += *sums.part(column, i);
        sum = sum_over_lanes<WARP>(sum);
        if (lane == 0) sums.totals[column] = sum;
    }
    __syncthreads();
    const double tokens = sums.totals[sums.counted()];
    for (int64_t e = threadIdx.x; e < sums.E && wanted != Wanted::Z && tokens > 0; e += FINISH_THREADS)
        sums.totals[sums.choices(e)] /= tokens;
    __syncthreads();
    if (threadIdx.x > 0) return;
    *sums.scale = tokens > 0 ? factor / tokens : 0;
    if (!loss) return;
    double value = wanted == Wanted::Z ? sums.totals[sums.z()] : 0;
    for (int64_t e = 0; e < sums.E && wanted == Wanted::BALANCE; e++)
        value += sums.totals[sums.choices(e)] * sums.totals[e];
    *loss = static_cast<R>(tokens > 0 ? factor / tokens * value : 0);
}

template <int LANES, bool z, typename Stored>
__global__ void __launch_bounds__(THREADS, 1)
    backward(const Real<Stored> *__restrict__ dloss, const Stored *__restrict__ logits_all,
             const uint8_t *__restrict__ mask, int64_t N, Sums sums, Stored *__restrict__ dlogits) {
    const int64_t E = sums.E;
    const int lane = threadIdx.x % LANES;
    const double scale = *sums.scale * static_cast<double>(*dloss);
    const double *share = sums.totals + sums.choices(0);
    for (int64_t n = first_group<LANES>(); n < N; n += group_count<LANES>()) {
        const Stored *logits = logits_all + n * E;
        if (mask && !mask[n]) {
            for (int64_t e = lane; e < E; e += LANES) store(&dlogits[n * E + e], Real<Stored>{0});
            continue;
        }
        double top, mean = 0;
        const double total = softmax_total<LANES>(logits, E, lane, &top), inverse = inverse_of_total(total);
        for (int64_t e = lane; e < E && !z; e += LANES)
            mean += exp(static_cast<double>(load(logits[e])) - top) * inverse * share[e];
        mean = sum_over_lanes<LANES>(mean);
        const double logsumexp = top + log(total);
        for (int64_t e = lane; e < E; e += LANES) {
            const double p = exp(static_cast<double>(load(logits[e])) - top) * inverse;
            const double slope = z ? p * logsumexp : p * (share[e] - mean);
            store(&dlogits[n * E + e], static_cast<Real<Stored>>(scale * slope));
        }
    }
}

struct Arguments {
    const void *dloss, *logits;
    const int64_t *indices; // NULL: router_z_loss
    const uint8_t *mask;
    int64_t N, E, K;
    mmbal_balance balance;
    void *loss, *dlogits; // one of them
    void *workspace;
    mmbal_stream stream;
};

template <typename Stored>
mmbal_status run(const Arguments &a) {
    using R = Real<Stored>;
    const bool z = !a.indices;
    const Sums sums = lay_out(a.N, a.E, a.workspace);
    const Wanted wanted = z ? Wanted::Z : a.loss ? Wanted::BALANCE : Wanted::CHOICES;
    const int64_t counted_choices = a.balance == MMBAL_BALANCE_SWITCH ? 1 : a.K;
    double factor = z ? 1 : static_cast<double>(a.E);
    if (a.balance == MMBAL_BALANCE_MEGATRON) factor /= static_cast<double>(a.K);
    if (z && a.dlogits) factor = 2;
    const Stored *logits = static_cast<const Stored *>(a.logits);
    const Wanted summed = z && a.dlogits ? Wanted::CHOICES : wanted; // its backward needs the tokens alone
    const auto sum = summed == Wanted::Z         ? sum_parts<Wanted::Z, Stored>
                     : summed == Wanted::BALANCE ? sum_parts<Wanted::BALANCE, Stored>
                                                 : sum_parts<Wanted::CHOICES, Stored>;
    MMBAL_RETURN_UNLESS_OK(launch(a.stream, ceil_div(sums.count * WARP, THREADS), THREADS, 0, sum, logits, a.indices,
                                  a.mask, a.N, z ? 0 : a.K, z ? 0 : counted_choices, sums));
    MMBAL_RETURN_UNLESS_OK(
        launch(a.stream, 1, FINISH_THREADS, 0, finish_sums<R>, sums, summed, factor, static_cast<R *>(a.loss)));
    if (!a.dlogits) return MMBAL_OK;
    const bool few = a.E <= FEW_EXPERTS;
    const auto kernel = few ? (z ? backward<1, true, Stored> : backward<1, false, Stored>)
                            : (z ? backward<WARP, true, Stored> : backward<WARP, false, Stored>);
    return launch(a.stream, ceil_div(few ? a.N : a.N * WARP, THREADS), THREADS, 0, kernel,
                  static_cast<const R *>(a.dloss), logits, a.mask, a.N, sums, static_cast<Stored *>(a.dlogits));
}

mmbal_status check_and_run(mmbal_dtype dtype, const Arguments &a) {
    const bool known = a.balance >= MMBAL_BALANCE_MIXTRAL && a.balance <= MMBAL_BALANCE_SWITCH;
    if (a.N < 0 || a.E < 1 || a.K < 1 || !known) return MMBAL_INVALID_ARGUMENT;
    MMBAL_RETURN_FOR_DTYPE(dtype, run, a);
}

} // namespace
} // namespace mmbal

using namespace mmbal;

int64_t mmbal_router_loss_workspace_cuda(int64_t N, int64_t E) {
    const Sums sums = lay_out(N, E, nullptr);
    return static_cast<int64_t>(sizeof(double)) * (sums.columns() + 1 + sums.columns() * sums.count);
}

mmbal_status mmbal_load_balance_loss_cuda(mmbal_dtype dtype, const void *logits, const int64_t *indices,
                                          const uint8_t *token_mask, int64_t N, int64_t E, int64_t K,
                                          mmbal_balance balance, void *loss, void *workspace, mmbal_stream stream) {
    return check_and_run(dtype,
                         {nullptr, logits, indices, token_mask, N, E, K, balance, loss, nullptr, workspace, stream});
}

mmbal_status mmbal_load_balance_loss_backward_cuda(mmbal_dtype dtype, const void *dloss, const void *logits,
                                                   const int64_t *indices, const uint8_t *token_mask, int64_t N,
                                                   int64_t E, int64_t K, mmbal_balance balance, void *dlogits,
                                                   void *workspace, mmbal_stream stream) {
    return check_and_run(dtype,
                         {dloss, logits, indices, token_mask, N, E, K, balance, nullptr, dlogits, workspace, stream});
}

mmbal_status mmbal_router_z_loss_cuda(mmbal_dtype dtype, const void *logits, const uint8_t *token_mask, int64_t N,
                                      int64_t E, void *loss, void *workspace, mmbal_stream stream) {
    return check_and_run(dtype, {nullptr, logits, nullptr, token_mask, N, E, 1, MMBAL_BALANCE_MIXTRAL, loss, nullptr,
                                 workspace, stream});
}

mmbal_status mmbal_router_z_loss_backward_cuda(mmbal_dtype dtype, const void *dloss, const void *logits,
                                               const uint8_t *token_mask, int64_t N, int64_t E, void *dlogits,
                                               void *workspace, mmbal_stream stream) {
    return check_and_run(dtype, {dloss, logits, nullptr, token_mask, N, E, 1, MMBAL_BALANCE_MIXTRAL, nullptr, dlogits,
                                 workspace, stream});
}
