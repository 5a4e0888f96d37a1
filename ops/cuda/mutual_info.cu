#include "mmbal/cuda/mutual_info.h"

#include <limits.h>
#include <math.h>
#include <string.h>

#include "column_sort.cuh"
#include "dtypes.cuh"
#include "mmbal/philox.h"
#include "pieces.cuh"

namespace mmbal {
namespace {

constexpr int THREADS = 256;
constexpr int SEARCH_THREADS = 64; // each has its nearest distances in shared memory
constexpr int64_t LEAST_STRIP = 16;
constexpr int64_t NO_STRIP = 0xFFFF;               // of samples that are not valid; strips are sqrt(2^31) at most
constexpr uint64_t NO_KEY = ~uint64_t{0};          // likewise; no finite number has this key
constexpr int STRIP_PASSES = 2, NUMBER_PASSES = 8; // bytes of a strip's number and of a key

// The estimator of Kraskov, Stoegbauer and Grassberger, as in ops/cpu/mutual_info.c; that of labels is in
// discrete_mutual_info.cu. Column m is the x of modality m, column M + m the y of its valid samples.

// What column's numbers are divided by (1: nothing), what their normal numbers are multiplied by, and how many there
// are.
struct Scaling {
    double divisor, jitter;
    int64_t n;
};

template <typename Stored>
struct Ksg {
    const Stored *x, *y;
    const uint8_t *present;
    int64_t N, M, neighbors;
    bool standardize;
    double jitter;
    uint32_t key[2];

    __device__ bool is_valid(int64_t m, int64_t sample) const {
        const int64_t i = sample * M + m;
        return isfinite(static_cast<double>(load(y[sample]))) && (!present || present[i]) &&
               isfinite(static_cast<double>(load(x[i])));
    }
    __device__ double number(int64_t column, int64_t sample) const {
        return column < M ? load(x[sample * M + column]) : load(y[sample]);
    }
};

// sum + the lanes' numbers, one after the other as the CPU adds them.
__device__ __forceinline__ double add_in_order(double sum, double of_lane) {
#pragma unroll
    for (int lane = 0; lane < WARP; lane++) sum = __dadd_rn(sum, __shfl_sync(ALL_LANES, of_lane, lane));
    return sum;
}

// A warp takes a column. Nothing is fused, so that the sums are the CPU's to the bit.
template <typename Stored>
__global__ void __launch_bounds__(WARP) measure(const Ksg<Stored> k, Scaling *__restrict__ scalings) {
    const int lane = threadIdx.x;
    for (int64_t column = blockIdx.x; column < 2 * k.M; column += gridDim.x) {
        const int64_t m = column % k.M;
        int64_t n = 0;
        double sum = 0, squares = 0, sizes = 0;
        for (int64_t begin = 0; begin < k.N; begin += WARP) {
            const int64_t sample = begin + lane;
            const bool valid = sample < k.N && k.is_valid(m, sample);
            n += __popc(__ballot_sync(ALL_LANES, valid));
            if (k.standardize) sum = add_in_order(sum, valid ? k.number(column, sample) : 0);
        }
        const double count = static_cast<double>(n), mean = n > 0 ? sum / count : 0;
        for (int64_t begin = 0; k.standardize && begin < k.N; begin += WARP) {
            const int64_t sample = begin + lane;
            const bool valid = sample < k.N && k.is_valid(m, sample);
            const double apart = valid ? k.number(column, sample) - mean : 0;
            squares = add_in_order(squares, valid ? __dmul_rn(apart, apart) : 0);
        }
        const double deviation = n > 0 ? sqrt(squares / count) : 0;
        const double divisor = k.standardize && deviation > 0 && isfinite(deviation) ? deviation : 1;
        for (int64_t begin = 0; k.jitter > 0 && begin < k.N; begin += WARP) {
            const int64_t sample = begin + lane;
            const bool valid = sample < k.N && k.is_valid(m, sample);
            sizes = add_in_order(sizes, valid ? fabs(k.number(column, sample) / divisor) : 0);
        }
        const double size = sizes / count;
        if (lane == 0) scalings[column] = {divisor, k.jitter * (size > 1 ? size : 1), n};
    }
}

#ifdef MMBAL_CUDA_ON_CPU // as the C core has them
inline double cos_of_turns(double turn) { return cos(6.283185307179586 * turn); }
inline double sin_of_turns(double turn) { return sin(6.283185307179586 * turn); }
#else // without the memory that cos needs for large angles
__device__ __forceinline__ double cos_of_turns(double turn) { return cospi(2 * turn); }
__device__ __forceinline__ double sin_of_turns(double turn) { return sinpi(2 * turn); }
#endif

// The normal number of a sample (Box and Muller, 1958); y has one whatever the modality.
__device__ __forceinline__ double normal_number(const uint32_t key[2], int64_t m, int64_t sample) {
    const uint32_t counter[4] = {static_cast<uint32_t>(sample / 4), static_cast<uint32_t>(m), 0, 0};
    uint32_t words[4];
    mmbal_philox4x32(counter, key, words);
    const bool second_pair = sample % 4 >= 2;
    const double above_zero = (static_cast<double>(second_pair ? words[2] : words[0]) + 1) * 0x1p-32;
    const double turn = static_cast<double>(second_pair ? words[3] : words[1]) * 0x1p-32;
    const double radius = sqrt(-2 * log(above_zero));
    return radius * (sample % 2 == 0 ? cos_of_turns(turn) : sin_of_turns(turn));
}

// An unsigned number that orders as the float64 does; -0 as 0.
__device__ __forceinline__ uint64_t sort_key(double value) {
    const double number = value + 0.0;
    uint64_t bits;
    memcpy(&bits, &number, sizeof bits);
    return bits >> 63 ? ~bits : bits | uint64_t{1} << 63;
}
__device__ __forceinline__ double sorted_number(uint64_t key) {
    const uint64_t bits = key >> 63 ? key & ~(uint64_t{1} << 63) : ~key;
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

template <typename Stored>
__global__ void __launch_bounds__(THREADS, 1) make_keys(const Ksg<Stored> k, const Scaling *__restrict__ scalings,
                                                        uint64_t *__restrict__ keys, int32_t *__restrict__ samples) {
    for (int64_t i = first_group<1>(); i < 2 * k.M * k.N; i += group_count<1>()) {
        const int64_t column = i / k.N, sample = i % k.N, m = column % k.M;
        uint64_t key = NO_KEY;
        if (k.is_valid(m, sample)) {
            double value = k.number(column, sample) / scalings[column].divisor;
            if (k.jitter > 0)
                value = __dadd_rn(
                    value, __dmul_rn(scalings[column].jitter, normal_number(k.key, column < k.M ? m : -1, sample)));
            key = sort_key(value);
        }
        keys[i] = key;
        samples[i] = static_cast<int32_t>(sample);
    }
}

// What the search needs, of every modality; places are those in sorted columns.
struct Samples {
    const Scaling *scalings;
    int64_t N, M, neighbors;
    double *sorted;       // [2 M, N]
    int32_t *rank_x;      // [M, N] by sample: place in its sorted x
    double *x, *y;        // [M, N] strip after strip, each in order of y
    int32_t *at_x, *at_y; // [M, N] likewise: place in the sorted x and y
    double *parts;        // [M, parts]: sums over 32 samples

    __device__ int64_t strip_size(int64_t n) const {
        const int64_t size = static_cast<int64_t>(sqrt(static_cast<double>(n) * static_cast<double>(neighbors)));
        return size < LEAST_STRIP ? LEAST_STRIP : size;
    }
};

__global__ void __launch_bounds__(THREADS, 1)
    rank_samples(const Samples s, const uint64_t *__restrict__ keys, const int32_t *__restrict__ samples) {
    for (int64_t i = first_group<1>(); i < 2 * s.M * s.N; i += group_count<1>()) {
        const int64_t column = i / s.N, place = i % s.N;
        if (place >= s.scalings[column].n) continue;
        s.sorted[i] = sorted_number(keys[i]);
        if (column < s.M) s.rank_x[column * s.N + samples[i]] = static_cast<int32_t>(place);
    }
}

// Of the samples in order of y the strips, each of as many neighbours in x.
__global__ void __launch_bounds__(THREADS, 1) find_strips(const Samples s, const int32_t *__restrict__ by_y,
                                                          uint32_t *__restrict__ strips, int32_t *__restrict__ places) {
    for (int64_t i = first_group<1>(); i < s.M * s.N; i += group_count<1>()) {
        const int64_t m = i / s.N, place = i % s.N, n = s.scalings[m].n;
        const bool valid = place < n;
        const int64_t rank = valid ? s.rank_x[m * s.N + by_y[i]] : 0;
        strips[i] = static_cast<uint32_t>(valid ? rank / s.strip_size(n) : NO_STRIP);
        places[i] = static_cast<int32_t>(place);
    }
}

__global__ void __launch_bounds__(THREADS, 1)
    gather_strips(const Samples s, const int32_t *__restrict__ by_y, const int32_t *__restrict__ places) {
    for (int64_t i = first_group<1>(); i < s.M * s.N; i += group_count<1>()) {
        const int64_t m = i / s.N;
        if (i % s.N >= s.scalings[m].n) continue;
        const int32_t at_y = places[i], at_x = s.rank_x[m * s.N + by_y[m * s.N + at_y]];
        s.x[i] = s.sorted[m * s.N + at_x], s.at_x[i] = at_x;
        s.y[i] = s.sorted[(s.M + m) * s.N + at_y], s.at_y[i] = at_y;
    }
}

// The distances to the nearest samples found so far, in ascending order, in every SEARCH_THREADS-th number of shared
// memory. bound: the last.
struct Nearest {
    double *distance;
    int64_t wanted;
    double bound;

    __device__ Nearest(double *shared, int64_t neighbors) : distance(shared), wanted(neighbors), bound(INFINITY) {
        for (int64_t j = 0; j < wanted; j++) distance[j * SEARCH_THREADS] = INFINITY;
    }
    __device__ void offer(double d) {
        if (!(d < bound)) return;
        int64_t i = wanted - 1;
        for (; i > 0 && distance[(i - 1) * SEARCH_THREADS] > d; i--)
            distance[i * SEARCH_THREADS] = distance[(i - 1) * SEARCH_THREADS];
        distance[i * SEARCH_THREADS] = d;
        bound = distance[(wanted - 1) * SEARCH_THREADS];
    }
};

// One modality's samples, strip after strip.
struct Strips {
    const double *x, *y, *sorted_x, *sorted_y;
    int64_t n, size;
};

__device__ __forceinline__ double chebyshev(double dx, double dy) {
    const double across = fabs(dx), along = fabs(dy);
    return across > along ? across : along;
}

// Offers the samples [from, end) of growing distance in y, then those of [begin, down] downwards, until y alone is too
// far.
__device__ __forceinline__ void search_strip(const Strips &s, double x, double y, int64_t begin, int64_t down,
                                             int64_t from, int64_t end, Nearest *found) {
    for (int64_t j = from; j < end && s.y[j] - y < found->bound; j++) found->offer(chebyshev(s.x[j] - x, s.y[j] - y));
    for (int64_t j = down; j >= begin && y - s.y[j] < found->bound; j--)
        found->offer(chebyshev(s.x[j] - x, s.y[j] - y));
}

// A strip that the sample is not in.
__device__ __forceinline__ void search_beside(const Strips &s, int64_t strip, double x, double y, Nearest *found) {
    const int64_t begin = strip * s.size, end = begin + s.size < s.n ? begin + s.size : s.n;
    int64_t low = begin, high = end; // the first whose y is not below
    while (low < high) {
        const int64_t middle = (low + high) / 2;
        if (s.y[middle] < y)
            low = middle + 1;
        else
            high = middle;
    }
    search_strip(s, x, y, begin, low - 1, low, end, found);
}

// The distance from sample i to its k-th nearest other.
__device__ __forceinline__ double neighbor_distance(const Strips &s, int64_t i, Nearest *found) {
    const int64_t strip = i / s.size, strips = ceil_div(s.n, s.size), begin = strip * s.size;
    const int64_t end = begin + s.size < s.n ? begin + s.size : s.n, k = found->wanted;
    const double x = s.x[i], y = s.y[i];
    // First the k on either side, so that the bound is finite before the search goes far.
    const int64_t low = i - k > begin ? i - k : begin, high = i + k < end ? i + k : end - 1;
    for (int64_t j = low; j <= high; j++)
        if (j != i) found->offer(chebyshev(s.x[j] - x, s.y[j] - y));
    search_strip(s, x, y, begin, low - 1, high + 1, end, found);
    for (int64_t b = strip - 1; b >= 0 && x - s.sorted_x[(b + 1) * s.size - 1] < found->bound; b--)
        search_beside(s, b, x, y, found);
    for (int64_t b = strip + 1; b < strips && s.sorted_x[b * s.size] - x < found->bound; b++)
        search_beside(s, b, x, y, found);
    return found->bound;
}

// How many others of sorted [n] are within that distance of sorted[at]: the predicate is that of the distances
// themselves.
__device__ __forceinline__ int64_t count_within(const double *sorted, int64_t n, int64_t at, double most) {
    const double value = sorted[at];
    int64_t first = 0, last = at; // the first within, the last within
    for (int64_t high = at; first < high;) {
        const int64_t middle = (first + high) / 2;
        if (value - sorted[middle] <= most)
            high = middle;
        else
            first = middle + 1;
    }
    for (int64_t high = n - 1; last < high;) {
        const int64_t middle = (last + high + 1) / 2;
        if (sorted[middle] - value <= most)
            last = middle;
        else
            high = middle - 1;
    }
    return last - first;
}

// The largest distance that counts: the number before eps; 0 for eps = 0.
__device__ __forceinline__ double largest_within(double eps) {
    uint64_t bits;
    memcpy(&bits, &eps, sizeof bits);
    bits -= bits > 0;
    memcpy(&eps, &bits, sizeof eps);
    return eps;
}

// The digamma function of a whole number from 1 on: psi(n + 1) = psi(n) + 1 / n up to where its asymptotic series
// (Abramowitz and Stegun 6.3.18) is exact to the rounding.
__device__ __forceinline__ double digamma(int64_t n) {
    double z = static_cast<double>(n), before = 0;
    for (; z < 16; z += 1) before += 1 / z;
    const double inverse = 1 / z, w = inverse * inverse;
    const double series =
        w * (1.0 / 12 - w * (1.0 / 120 - w * (1.0 / 252 - w * (1.0 / 240 - w * (1.0 / 132 - w * (691.0 / 32760))))));
    return log(z) - inverse / 2 - series - before;
}

// A warp takes 32 samples of a modality.
__global__ void __launch_bounds__(SEARCH_THREADS, 1) search(const Samples s) {
    double *distances = shared_memory<double>() + threadIdx.x;
    const int lane = threadIdx.x % WARP;
    const int64_t parts = ceil_div(s.N, WARP);
    for (int64_t job = first_group<WARP>(); job < s.M * parts; job += group_count<WARP>()) {
        const int64_t m = job / parts, i = job % parts * WARP + lane, n = s.scalings[m].n;
        double term = 0;
        if (i < n && n > s.neighbors) {
            const Strips strips = {s.x + m * s.N,  s.y + m * s.N, s.sorted + m * s.N, s.sorted + (s.M + m) * s.N, n,
                                   s.strip_size(n)};
            Nearest found(distances, s.neighbors);
            const double most = largest_within(neighbor_distance(strips, i, &found));
            const int64_t nx = count_within(strips.sorted_x, n, s.at_x[m * s.N + i], most);
            const int64_t ny = count_within(strips.sorted_y, n, s.at_y[m * s.N + i], most);
            term = digamma(nx + 1) + digamma(ny + 1);
        }
        term = sum_over_lanes<WARP>(term);
        if (lane == 0) s.parts[job] = term;
    }
}

// A warp takes a modality.
__global__ void __launch_bounds__(WARP) finish_ksg(const Samples s, double *__restrict__ mi) {
    const int64_t parts = ceil_div(s.N, WARP);
    for (int64_t m = blockIdx.x; m < s.M; m += gridDim.x) {
        const int64_t n = s.scalings[m].n;
        double sum = 0, value = NAN;
        for (int64_t part = threadIdx.x; part < parts; part += WARP) sum += s.parts[m * parts + part];
        sum = sum_over_lanes<WARP>(sum);
        if (n > s.neighbors) value = digamma(n) + digamma(s.neighbors) - sum / static_cast<double>(n);
        if (threadIdx.x == 0) mi[m] = value < 0 ? 0 : value;
    }
}

struct KsgMemory {
    Columns<uint64_t> numbers; // and the samples they are from
    Columns<uint32_t> strips;  // and places in the sorted y
    Scaling *scalings;
    Samples samples;
    int64_t bytes;

    KsgMemory(void *workspace, int64_t N, int64_t M, int64_t neighbors) {
        Pieces pieces(workspace);
        const int64_t all = M * N;
        numbers.columns = 2 * M, numbers.N = N;
        numbers.keys = pieces.take<uint64_t>(2 * all), numbers.spare_keys = pieces.take<uint64_t>(2 * all);
        numbers.values = pieces.take<int32_t>(2 * all), numbers.spare_values = pieces.take<int32_t>(2 * all);
        numbers.places = pieces.take<int64_t>(count_sort_places(2 * M, N));
        scalings = pieces.take<Scaling>(2 * M);
        samples.scalings = scalings, samples.N = N, samples.M = M, samples.neighbors = neighbors;
        samples.rank_x = pieces.take<int32_t>(all);
        samples.x = pieces.take<double>(all), samples.y = pieces.take<double>(all);
        samples.parts = pieces.take<double>(M * ceil_div(N, WARP));
        bytes = pieces.bytes();
        if (!workspace) return;
        // What the first sort does not need after it: spare keys, spare samples, and once they are numbers the keys.
        samples.sorted = reinterpret_cast<double *>(numbers.spare_keys);
        samples.at_x = numbers.spare_values, samples.at_y = numbers.spare_values + all;
        strips.columns = M, strips.N = N, strips.places = numbers.places;
        strips.keys = reinterpret_cast<uint32_t *>(numbers.keys), strips.spare_keys = strips.keys + all;
        strips.values = reinterpret_cast<int32_t *>(strips.keys + 2 * all), strips.spare_values = strips.values + all;
    }
};

struct KsgArguments {
    const void *x, *y;
    const uint8_t *present;
    int64_t N, M, neighbors;
    bool standardize;
    double jitter;
    uint64_t seed;
    double *mi;
    void *workspace;
    mmbal_stream stream;
};

template <typename Stored>
mmbal_status run_ksg(const KsgArguments &a) {
    const Ksg<Stored> k = {static_cast<const Stored *>(a.x),
                           static_cast<const Stored *>(a.y),
                           a.present,
                           a.N,
                           a.M,
                           a.neighbors,
                           a.standardize,
                           a.jitter,
                           {static_cast<uint32_t>(a.seed), static_cast<uint32_t>(a.seed >> 32)}};
    const KsgMemory memory(a.workspace, a.N, a.M, a.neighbors);
    const int64_t blocks = ceil_div(a.M * a.N, THREADS);
    const auto each = [&](int64_t of_samples, auto kernel, auto... given) {
        return launch(a.stream, of_samples * blocks, THREADS, 0, kernel, given...);
    };
    MMBAL_RETURN_UNLESS_OK(launch(a.stream, 2 * a.M, WARP, 0, measure<Stored>, k, memory.scalings));
    MMBAL_RETURN_UNLESS_OK(each(2, make_keys<Stored>, k, memory.scalings, memory.numbers.keys, memory.numbers.values));
    MMBAL_RETURN_UNLESS_OK(sort_columns(memory.numbers, NUMBER_PASSES, a.stream));
    MMBAL_RETURN_UNLESS_OK(each(2, rank_samples, memory.samples, memory.numbers.keys, memory.numbers.values));
    const int32_t *by_y = memory.numbers.values + a.M * a.N;
    MMBAL_RETURN_UNLESS_OK(each(1, find_strips, memory.samples, by_y, memory.strips.keys, memory.strips.values));
    MMBAL_RETURN_UNLESS_OK(sort_columns(memory.strips, STRIP_PASSES, a.stream));
    MMBAL_RETURN_UNLESS_OK(each(1, gather_strips, memory.samples, by_y, memory.strips.values));
    const size_t distances = sizeof(double) * static_cast<size_t>(a.neighbors) * SEARCH_THREADS;
    MMBAL_RETURN_UNLESS_OK(launch(a.stream, ceil_div(a.M * ceil_div(a.N, WARP) * WARP, SEARCH_THREADS), SEARCH_THREADS,
                                  distances, search, memory.samples));
    return launch(a.stream, a.M, WARP, 0, finish_ksg, memory.samples, a.mi);
}

} // namespace
} // namespace mmbal

using namespace mmbal;

int64_t mmbal_ksg_mutual_info_workspace_cuda(int64_t N, int64_t M) { return KsgMemory(nullptr, N, M, 1).bytes; }

mmbal_status mmbal_ksg_mutual_info_cuda(mmbal_dtype dtype, const void *x, const void *y, const uint8_t *present,
                                        int64_t N, int64_t M, int64_t neighbors, int standardize, double jitter,
                                        uint64_t seed, double *mi, void *workspace, mmbal_stream stream) {
    if (N < 0 || N > INT32_MAX || M < 1) return MMBAL_INVALID_ARGUMENT;
    if (neighbors < 1 || neighbors > MMBAL_MAX_NEIGHBORS || !(jitter >= 0 && jitter < INFINITY))
        return MMBAL_INVALID_ARGUMENT;
    const KsgArguments a = {x, y, present, N, M, neighbors, standardize != 0, jitter, seed, mi, workspace, stream};
    MMBAL_RETURN_FOR_DTYPE(dtype, run_ksg, a);
}
