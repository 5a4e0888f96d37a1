#include "mmbal/cuda/significance.h"

#include <math.h>

#include "packs.cuh"
#include "softmax.cuh"

namespace mmbal {
namespace {

constexpr int THREADS = 256;
constexpr int WARPS = THREADS / WARP;
constexpr int64_t LEAST_CHUNK = 1024, MOST_CHUNKS = 64; // of targets whose classes a block counts

// A row of logits gives a cross entropy, a row of features an entropy: result [B], 0 where the target is ignored.
struct RowTable {
    const void *values; // [B, width]
    double *result;
    int64_t width;
    bool of_logits, aligned;
};

constexpr int MOST_TABLES = 120; // of a launch: they are a parameter of at most 4 KB
struct RowTables {
    RowTable tables[MOST_TABLES];
    int count;
};
static_assert(sizeof(RowTables) + 64 <= 4096, "the parameters of a launch");

// Below this a probability is 0, and so is what it adds; see ops/cpu/elementary.h.
template <typename R>
__device__ __forceinline__ R exp_nonpositive(R x) {
    return x < (sizeof(R) == 8 ? -745 : -87) ? 0 : exp_real(x);
}

template <int LANES, typename Stored>
__global__ void __launch_bounds__(THREADS, 1)
    row_statistics(const RowTables tables, const int64_t *__restrict__ targets, int64_t B, int64_t ignore_index) {
    using R = Real<Stored>;
    constexpr int SIZE = Pack<Stored>::SIZE;
    const int lane = threadIdx.x % LANES;
    for (int64_t i = first_group<LANES>(); i < tables.count * B; i += group_count<LANES>()) {
        const RowTable &table = tables.tables[i / B];
        const int64_t b = i % B, target = targets[b], width = table.width;
        if (target == ignore_index) { // the same for all lanes
            if (lane == 0) table.result[b] = 0;
            continue;
        }
        const Stored *row = static_cast<const Stored *>(table.values) + b * width;
        R largest = -static_cast<R>(INFINITY), sum = 0, moment = 0;
        for (int64_t c = lane * SIZE; c < width; c += LANES * SIZE) {
            const Pack<Stored> pack = load_pack(row + c, width - c, table.aligned);
#pragma unroll
            for (int j = 0; j < SIZE; j++) {
                const R x = load(pack.of[j]);
                largest = x > largest && c + j < width ? x : largest;
            }
        }
        largest = largest_over_lanes<LANES>(largest);
        for (int64_t c = lane * SIZE; c < width; c += LANES * SIZE) {
            const Pack<Stored> pack = load_pack(row + c, width - c, table.aligned);
#pragma unroll
            for (int j = 0; j < SIZE; j++) { // d = x - largest: exp(d) and d exp(d)
                const R d = load(pack.of[j]) - largest, e = c + j < width ? exp_nonpositive(d) : 0;
                sum += e;
                moment += e == 0 ? 0 : d * e;
            }
        }
        const double total = sum_over_lanes<LANES>(static_cast<double>(sum));
        const double total_moment = sum_over_lanes<LANES>(static_cast<double>(moment));
        if (lane > 0) continue;
        if (table.of_logits) {
            require_index(target, width);
            table.result[b] = log(total) + (static_cast<double>(largest) - static_cast<double>(load(row[target])));
        } else {
            table.result[b] = log(total) - total_moment / total;
        }
    }
}

// counts [chunks, C]: a thread takes a class and compares every target of a chunk with it, so that nothing is added
// by two threads.
__global__ void __launch_bounds__(THREADS, 1)
    count_targets(const int64_t *__restrict__ targets, int64_t B, int64_t C, int64_t ignore_index, int64_t chunk,
                  int64_t chunks, double *__restrict__ counts) {
    int64_t *some = shared_memory<int64_t>(); // [THREADS]
    const int64_t tiles = ceil_div(C, THREADS);
    for (int64_t job = blockIdx.x; job < tiles * chunks; job += gridDim.x) {
        const int64_t c = job % tiles * THREADS + threadIdx.x, first = job / tiles * chunk;
        const int64_t end = first + chunk < B ? first + chunk : B;
        int64_t count = 0;
        for (int64_t begin = first; begin < end; begin += THREADS) {
            const int64_t b = begin + threadIdx.x, target = b < end ? targets[b] : ignore_index;
            if (target != ignore_index) require_index(target, C);
            __syncthreads(); // the ones before are counted
            some[threadIdx.x] = target == ignore_index ? -1 : target;
            __syncthreads();
            const int staged = end - begin < THREADS ? static_cast<int>(end - begin) : THREADS;
            if (c >= C) continue;
#pragma unroll 8
            for (int i = 0; i < staged; i++) count += some[i] == c;
        }
        if (c < C) counts[job / tiles * C + c] = static_cast<double>(count);
    }
}

// The same in every thread. shared: [WARPS]
__device__ __forceinline__ double sum_over_threads(double value, double *shared) {
    value = sum_over_lanes<WARP>(value);
    __syncthreads(); // what was there is read
    if (threadIdx.x % WARP == 0) shared[threadIdx.x / WARP] = value;
    __syncthreads();
    double sum = 0;
#pragma unroll
    for (int warp = 0; warp < WARPS; warp++) sum += shared[warp];
    return sum;
}

// A block sums a row of results [2 M, B]; one more counts the samples.
__global__ void __launch_bounds__(THREADS, 1)
    sum_samples(const double *__restrict__ results, const int64_t *__restrict__ targets, int64_t M, int64_t B,
                int64_t ignore_index, double *__restrict__ ce_sum, double *__restrict__ entropy_sum,
                double *__restrict__ rows) {
    double *shared = shared_memory<double>();
    for (int64_t job = blockIdx.x; job <= 2 * M; job += gridDim.x) {
        double sum = 0;
        for (int64_t b = threadIdx.x; b < B; b += THREADS)
            sum += job < 2 * M ? results[job * B + b] : targets[b] == ignore_index ? 0 : 1;
        sum = sum_over_threads(sum, shared);
        if (threadIdx.x == 0) *(job < M ? ce_sum + job : job < 2 * M ? entropy_sum + job - M : rows) = sum;
    }
}

__global__ void __launch_bounds__(THREADS, 1)
    add_counts(const double *__restrict__ counts, int64_t C, int64_t chunks, double *__restrict__ histogram) {
    for (int64_t c = first_group<1>(); c < C; c += group_count<1>()) {
        double sum = 0;
        for (int64_t chunk = 0; chunk < chunks; chunk++) sum += counts[chunk * C + c];
        histogram[c] = sum;
    }
}

struct Dims {
    int64_t of[MMBAL_MAX_MODALITIES];
};

__device__ __forceinline__ double bounded(double ratio, const mmbal_ratio_options &options) {
    return fmin(fmax(ratio, options.least), options.most);
}

// rho of this thread's modality.
__device__ __forceinline__ double ratio_of(const double *rate, int64_t m, int64_t M,
                                           const mmbal_ratio_options &options) {
    double largest = -INFINITY, total = 0;
    bool finite = true;
    for (int64_t j = 0; j < M; j++) {
        finite &= isfinite(rate[j]) != 0;
        largest = fmax(largest, rate[j]);
    }
    for (int64_t j = 0; j < M; j++) total += exp((rate[j] - largest) / options.temperature);
    const double share = exp((rate[m] - largest) / options.temperature) / total;
    const double whole = static_cast<double>(M);
    return M == 1 ? 1 : bounded(finite ? 1 - share + options.bias : 1 - 1 / whole, options);
}

// One block; M is at most its threads.
__global__ void __launch_bounds__(THREADS, 1)
    ratios_of_sums(const double *__restrict__ ce_sum, const double *__restrict__ entropy_sum,
                   const double *__restrict__ histogram, const double *__restrict__ rows, const Dims dims, int64_t M,
                   int64_t C, const mmbal_ratio_options options, double *rate, double *__restrict__ rho) {
    double *shared = shared_memory<double>();
    double entropy_of_labels = 0, guarded = 0;
    for (int64_t c = threadIdx.x; c < C; c += THREADS) {
        const double p = histogram[c] / *rows;
        entropy_of_labels -= p > 0 ? p * log(p) : 0;
    }
    entropy_of_labels = sum_over_threads(entropy_of_labels, shared);
    const int64_t m = threadIdx.x;
    if (m < M) {
        const int64_t D = dims.of[m];
        const double information = entropy_of_labels - ce_sum[m] / *rows + options.offset;
        const double largest = log(static_cast<double>(D));
        const double entropy = D > 1 ? fmax(entropy_sum[m] / *rows / largest, options.least_entropy) : 1;
        double value = information > 0 || isnan(information) ? information : 0;
        if (options.significance != MMBAL_MI) value /= isnan(entropy_sum[m]) ? static_cast<double>(NAN) : entropy;
        if (options.significance == MMBAL_RATE_UNNORMALISED && D > 1) value /= largest;
        rate[m] = value;
        guarded = information <= 0 ? 1 : 0;
    }
    guarded = sum_over_threads(guarded, shared); // its barriers show every rate to all
    if (m >= M) return;
    rho[m] = options.official_guard && guarded > 0 && M > 1 ? bounded(0.5, options) : ratio_of(rate, m, M, options);
}

__global__ void __launch_bounds__(MMBAL_MAX_MODALITIES, 1)
    ratios_of_rates(const double *__restrict__ rate, int64_t M, const mmbal_ratio_options options,
                    double *__restrict__ rho) {
    if (threadIdx.x < M) rho[threadIdx.x] = ratio_of(rate, threadIdx.x, M, options);
}

int64_t chunk_of(int64_t B) {
    const int64_t for_most = ceil_div(B, MOST_CHUNKS);
    return for_most > LEAST_CHUNK ? for_most : LEAST_CHUNK;
}
int64_t count_chunks(int64_t B) { return B > 0 ? ceil_div(B, chunk_of(B)) : 1; }

template <typename Stored>
mmbal_status run_rows(const RowTables &tables, bool few, const int64_t *targets, int64_t B, int64_t ignore_index,
                      mmbal_stream stream) {
    const int64_t rows = tables.count * B;
    return launch(stream, ceil_div(few ? rows : rows * WARP, THREADS), THREADS, 0,
                  few ? row_statistics<1, Stored> : row_statistics<WARP, Stored>, tables, targets, B, ignore_index);
}

mmbal_status rows_of(mmbal_dtype dtype, const RowTables &tables, bool few, const int64_t *targets, int64_t B,
                     int64_t ignore_index, mmbal_stream stream) {
    MMBAL_RETURN_FOR_DTYPE(dtype, run_rows, tables, few, targets, B, ignore_index, stream);
}

mmbal_status check_stats(const mmbal_modality *modalities, int64_t M, int64_t B, int64_t C) {
    if (M < 1 || M > MMBAL_MAX_MODALITIES || B < 0 || C < 1) return MMBAL_INVALID_ARGUMENT;
    for (int64_t m = 0; m < M; m++) {
        if (!is_dtype(modalities[m].logits_dtype) || !is_dtype(modalities[m].features_dtype)) return MMBAL_UNSUPPORTED;
        if (modalities[m].D < 1) return MMBAL_INVALID_ARGUMENT;
    }
    return MMBAL_OK;
}

bool options_are_served(int64_t M, const mmbal_ratio_options &o) {
    const bool known =
        o.significance == MMBAL_RATE || o.significance == MMBAL_RATE_UNNORMALISED || o.significance == MMBAL_MI;
    return M >= 1 && M <= MMBAL_MAX_MODALITIES && known && o.temperature > 0 && isfinite(o.temperature) &&
           o.least_entropy > 0 && isfinite(o.least_entropy) && isfinite(o.offset) && isfinite(o.bias) && o.least >= 0 &&
           o.least <= o.most && o.most <= 1;
}

} // namespace
} // namespace mmbal

using namespace mmbal;

int64_t mmbal_modal_stats_workspace_cuda(int64_t B, int64_t M, int64_t C) {
    return static_cast<int64_t>(sizeof(double)) * (2 * M * B + count_chunks(B) * C);
}

mmbal_status mmbal_modal_stats_cuda(const mmbal_modality *modalities, const int64_t *targets, int64_t M, int64_t B,
                                    int64_t C, int64_t ignore_index, double *ce_sum, double *entropy_sum,
                                    double *histogram, double *rows, void *workspace, mmbal_stream stream) {
    MMBAL_RETURN_UNLESS_OK(check_stats(modalities, M, B, C));
    double *results = static_cast<double *>(workspace), *counts = results + 2 * M * B;
    for (const mmbal_dtype dtype : {MMBAL_F32, MMBAL_BF16, MMBAL_F16, MMBAL_F64})
        for (const bool few : {true, false}) {
            RowTables tables = {};
            const auto finish = [&] {
                const mmbal_status status = rows_of(dtype, tables, few, targets, B, ignore_index, stream);
                tables.count = 0;
                return status;
            };
            const auto add = [&](mmbal_dtype of, RowTable table) {
                if (of != dtype || (table.width <= FEW_EXPERTS) != few) return MMBAL_OK;
                table.aligned = rows_are_aligned(table.values, table.width, stored_size(dtype));
                tables.tables[tables.count++] = table;
                return tables.count == MOST_TABLES ? finish() : MMBAL_OK;
            };
            for (int64_t m = 0; m < M; m++) {
                const mmbal_modality &of = modalities[m];
                MMBAL_RETURN_UNLESS_OK(add(of.logits_dtype, {of.logits, results + m * B, C, true, false}));
                MMBAL_RETURN_UNLESS_OK(
                    add(of.features_dtype, {of.features, results + (M + m) * B, of.D, false, false}));
            }
            MMBAL_RETURN_UNLESS_OK(finish());
        }
    const int64_t chunks = count_chunks(B);
    MMBAL_RETURN_UNLESS_OK(launch(stream, ceil_div(C, THREADS) * chunks, THREADS, THREADS * sizeof(int64_t),
                                  count_targets, targets, B, C, ignore_index, chunk_of(B), chunks,
                                  chunks > 1 ? counts : histogram));
    if (chunks > 1)
        MMBAL_RETURN_UNLESS_OK(
            launch(stream, ceil_div(C, THREADS), THREADS, 0, add_counts, counts, C, chunks, histogram));
    return launch(stream, 2 * M + 1, THREADS, WARPS * sizeof(double), sum_samples, results, targets, M, B, ignore_index,
                  ce_sum, entropy_sum, rows);
}

mmbal_status mmbal_update_ratio_cuda(const double *ce_sum, const double *entropy_sum, const double *histogram,
                                     const double *rows, const int64_t *dims, int64_t M, int64_t C,
                                     mmbal_ratio_options options, double *rate, double *rho, mmbal_stream stream) {
    if (!options_are_served(M, options) || C < 1) return MMBAL_INVALID_ARGUMENT;
    Dims of_modalities = {};
    for (int64_t m = 0; m < M; m++) {
        if (dims[m] < 1) return MMBAL_INVALID_ARGUMENT;
        of_modalities.of[m] = dims[m];
    }
    return launch(stream, 1, THREADS, WARPS * sizeof(double), ratios_of_sums, ce_sum, entropy_sum, histogram, rows,
                  of_modalities, M, C, options, rate, rho);
}

mmbal_status mmbal_ratio_of_rates_cuda(const double *rate, int64_t M, mmbal_ratio_options options, double *rho,
                                       mmbal_stream stream) {
    if (!options_are_served(M, options)) return MMBAL_INVALID_ARGUMENT;
    return launch(stream, 1, MMBAL_MAX_MODALITIES, 0, ratios_of_rates, rate, M, options, rho);
}
