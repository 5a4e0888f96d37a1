// mask_units of sampling.h: a block draws from a segment.
#include "draws.cuh"
#include "mmbal/cuda/sampling.h"
#include "radix_select.cuh"
#include "radix_sort.cuh"
#include "water.cuh"

// No multiply-add is fused here that is not spelt out (cmake/MmbalCuda.cmake), as in the C core.
namespace mmbal {
namespace {

// Segments that differ by their place alone: they travel by the parameters of a kernel, 4 KiB at a time.
struct Run {
    mmbal_segment first;
    int64_t count;
};
constexpr int MOST_RUNS = 64;
struct Runs {
    Run of[MOST_RUNS];
    int count;
};
static_assert(sizeof(Runs) <= 4000, "fits the parameters of a kernel");

constexpr int TABLE_THREADS = 256;

__global__ void __launch_bounds__(TABLE_THREADS, 1)
    write_segments(const __grid_constant__ Runs runs, mmbal_segment *to) {
    for (int r = 0; r < runs.count; r++) {
        for (int64_t i = threadIdx.x; i < runs.of[r].count; i += TABLE_THREADS) {
            mmbal_segment segment = runs.of[r].first;
            segment.first += i * segment.units, segment.first_unit += i * segment.units;
            to[i] = segment;
        }
        to += runs.of[r].count;
    }
}

mmbal_status write_table(const mmbal_segment *segments, int64_t S, mmbal_segment *to, mmbal_stream stream) {
    Runs runs;
    runs.count = 0;
    int64_t written = 0;
    for (int64_t s = 0; s < S; s++) {
        const mmbal_segment &next = segments[s];
        Run *last = runs.count > 0 ? &runs.of[runs.count - 1] : nullptr;
        const int64_t moved = last ? last->count * last->first.units : 0;
        if (last && next.units == last->first.units && next.modality == last->first.modality &&
            next.id == last->first.id && next.first == last->first.first + moved &&
            next.first_unit == last->first.first_unit + moved) {
            last->count++;
            continue;
        }
        if (runs.count == MOST_RUNS) {
            MMBAL_RETURN_UNLESS_OK(launch(stream, 1, TABLE_THREADS, 0, write_segments, runs, to + written));
            written = s, runs.count = 0;
        }
        runs.of[runs.count++] = {next, 1};
    }
    return launch(stream, runs.count > 0 ? 1 : 0, TABLE_THREADS, 0, write_segments, runs, to + written);
}

struct Masking {
    const double *energy;          // [U]
    const mmbal_segment *segments; // [S]
    const double *rho;             // [M]
    int64_t U, S, M, seed, step;
    mmbal_mask_options options;
    double *scale, *probability; // [U]
    // Workspace
    int *invalid;
    uint64_t *numbers; // [U]
    double *q;         // [U]
    Ordered *entries, *spare;
};

// What is there before anything is drawn. *invalid is 0 at first.
__global__ void __launch_bounds__(TABLE_THREADS, 1) keep_everything(Masking m) {
    for (int64_t i = first_group<1>(); i < m.M; i += group_count<1>())
        if (!(m.rho[i] >= 0 && m.rho[i] <= 1) || (m.options.unbiased && m.rho[i] == 0)) __trap();
    for (int64_t u = first_group<1>(); u < m.U; u += group_count<1>()) {
        m.scale[u] = m.probability[u] = 1;
        if (!(m.energy[u] >= 0 && m.energy[u] < static_cast<double>(INFINITY))) atomicExch(m.invalid, 1);
    }
}

struct Shared {
    BlockShared<UNIT_THREADS> block;
    union {
        SelectShared<UNIT_THREADS> select;
        SortShared<UNIT_THREADS> sort;
    };
};

// A segment, and where its part of the arrays begins.
struct Drawn {
    const Masking &m;
    const mmbal_segment &segment;
    double rho;
    int64_t n, first;

    __device__ __forceinline__ uint32_t word(mmbal_purpose purpose, int64_t u) const {
        return word_of(m.seed, m.step, segment.id, purpose, segment.first_unit + u);
    }
    __device__ __forceinline__ void keep(int64_t u, bool kept, double probability) const {
        m.probability[first + u] = probability;
        m.scale[first + u] = !kept ? 0 : m.options.unbiased ? 1 / probability : 1;
    }
};

// BOTTOMK, TOPK and UNIFORM: the k smallest keys.
__device__ void draw_smallest(const Drawn &d, SelectShared<UNIT_THREADS> &shared) {
    const mmbal_sampler sampler = d.m.options.sampler;
    const bool mixes = sampler == MMBAL_BOTTOMK && d.m.options.unbiased;
    const double *energy = d.m.energy + d.first;
    double *w = d.m.q + d.first;
    uint64_t *keys = d.m.numbers + d.first;
    for (int64_t u = threadIdx.x; u < d.n; u += UNIT_THREADS) w[u] = sampler == MMBAL_UNIFORM ? 1 : energy[u];
    if (mixes) mix_weights(w, d.n, d.m.options.mix, shared.block);
    int64_t positive = 0;
    for (int64_t u = threadIdx.x; u < d.n; u += UNIT_THREADS) {
        if (!(w[u] > 0))
            keys[u] = NEVER;
        else if (sampler == MMBAL_TOPK)
            keys[u] = ~bits_of(w[u]);
        else
            keys[u] = bits_of(exponential(d.word(MMBAL_DRAW_UNIT, u)) / w[u]);
        positive += w[u] > 0;
    }
    positive = sum_over_block<UNIT_THREADS>(positive, shared.block); // and all keys are there
    const int64_t wanted = count_kept(d.rho, d.n), k = wanted < positive ? wanted : positive;
    Smallest found = find_smallest<UNIT_THREADS>(keys, d.n, k, shared);
    if (sampler == MMBAL_BOTTOMK && k > 0) found.next = find_next<UNIT_THREADS>(keys, d.n, found, shared);
    take_smallest<UNIT_THREADS>(keys, d.n, k, found, shared, [&](int64_t u, bool kept) {
        double probability = kept ? 1 : 0;
        if (sampler == MMBAL_UNIFORM) probability = static_cast<double>(k) / static_cast<double>(d.n);
        if (sampler == MMBAL_BOTTOMK && w[u] > 0 && k > 0) { // given the keys of the others
            const uint64_t rival = kept ? found.next : found.last;
            probability = rival == NEVER ? 1 : below_exponential(w[u] * double_of(rival));
        }
        d.keep(u, kept, probability);
    });
}

// P = clamp(round(p 2^32), 1, 2^32) in m.numbers, each thread every UNIT_THREADS-th.
__device__ void fix_probabilities(const Drawn &d, BlockShared<UNIT_THREADS> &shared) {
    double *q = d.m.q + d.first;
    for (int64_t u = threadIdx.x; u < d.n; u += UNIT_THREADS) q[u] = d.m.energy[d.first + u];
    const int64_t positive = mix_weights(q, d.n, d.m.options.mix, shared);
    const double c = water_level(q, d.n, positive, d.rho * static_cast<double>(d.n), shared);
    for (int64_t u = threadIdx.x; u < d.n; u += UNIT_THREADS)
        d.m.numbers[d.first + u] = static_cast<uint64_t>(fixed_point(capped_probability(c, q[u])));
}

constexpr int64_t ONE = int64_t{1} << 32; // of fixed-point probabilities

// Adds what fits between 1 and 2^32; returns what is left.
__device__ __forceinline__ int64_t add_within(uint64_t *p, int64_t amount) {
    const int64_t now = static_cast<int64_t>(*p), sum = now + amount, fitted = sum < 1 ? 1 : sum > ONE ? ONE : sum;
    *p = static_cast<uint64_t>(fitted);
    return sum - fitted;
}

// Makes the sum of P what rho says: the largest below 1 takes what rounding left, then all in their order what fits.
__device__ void fix_sum(const Drawn &d, BlockShared<UNIT_THREADS> &shared) {
    constexpr uint64_t UNITS = uint64_t{1} << 31; // more than a segment has
    uint64_t *P = d.m.numbers + d.first, largest = 0;
    int64_t sum = 0;
    for (int64_t u = threadIdx.x; u < d.n; u += UNIT_THREADS) {
        const uint64_t candidate = P[u] * UNITS + (UNITS - 1 - static_cast<uint64_t>(u)); // of equal ones the first
        sum += static_cast<int64_t>(P[u]);
        if (P[u] < static_cast<uint64_t>(ONE) && candidate > largest) largest = candidate;
    }
    int64_t left = static_cast<int64_t>(rint(d.rho * static_cast<double>(d.n) * 0x1p32)) -
                   sum_over_block<UNIT_THREADS>(sum, shared);
    largest = largest_over_block<UNIT_THREADS>(largest, shared);
    if (largest > 0) {
        const auto u = static_cast<int64_t>(UNITS - 1 - largest % UNITS);
        const bool mine = threadIdx.x == u % UNIT_THREADS;
        left = sum_over_block<UNIT_THREADS>(mine ? add_within(&P[u], left) : int64_t{0}, shared);
    }
    for (int64_t first = 0; first < d.n && left != 0; first += UNIT_THREADS) {
        const int64_t u = first + threadIdx.x;
        int64_t room = 0, rooms; // signed as left is
        if (u < d.n) room = left > 0 ? ONE - static_cast<int64_t>(P[u]) : 1 - static_cast<int64_t>(P[u]);
        const int64_t before = sum_before<UNIT_THREADS>(room, shared, &rooms);
        if (left > 0) {
            if (u < d.n && before < left) add_within(&P[u], left - before);
            left = rooms < left ? left - rooms : 0;
        } else {
            if (u < d.n && before > left) add_within(&P[u], left - before);
            left = rooms > left ? left - rooms : 0;
        }
    }
}

__device__ void draw_systematic(const Drawn &d, Shared &shared) {
    BlockShared<UNIT_THREADS> &block = shared.block;
    const uint64_t *P = d.m.numbers + d.first;
    Ordered *entries = d.m.entries + d.first;
    fix_probabilities(d, block);
    fix_sum(d, block);
    for (int64_t u = threadIdx.x; u < d.n; u += UNIT_THREADS)
        entries[u] = {d.word(MMBAL_DRAW_ORDER, u), static_cast<int32_t>(u)};
    __syncthreads();
    sort_by_word<UNIT_THREADS>(entries, d.m.spare + d.first, d.n, shared.sort, block);
    int64_t sum = d.word(MMBAL_DRAW_START, 0);
    for (int64_t first = 0; first < d.n; first += UNIT_THREADS) {
        const int64_t i = first + threadIdx.x, u = i < d.n ? entries[i].unit : 0;
        const int64_t mine = i < d.n ? static_cast<int64_t>(P[u]) : 0;
        int64_t here;
        const int64_t before = sum + sum_before<UNIT_THREADS>(mine, block, &here);
        if (i < d.n) d.keep(u, (before + mine) >> 32 > before >> 32, static_cast<double>(mine) * 0x1p-32);
        sum += here;
    }
}

__device__ void draw_independent(const Drawn &d, BlockShared<UNIT_THREADS> &shared) {
    fix_probabilities(d, shared);
    for (int64_t u = threadIdx.x; u < d.n; u += UNIT_THREADS) {
        const uint64_t P = d.m.numbers[d.first + u];
        d.keep(u, d.word(MMBAL_DRAW_UNIT, u) < P, static_cast<double>(P) * 0x1p-32);
    }
}

enum class Draw { SMALLEST, SYSTEMATIC, INDEPENDENT }; // each a kernel, which has the registers that it needs

template <Draw DRAW>
__global__ void __launch_bounds__(UNIT_THREADS, 1) draw_segments(Masking m) {
    auto &shared = *shared_memory<Shared>();
    if (*m.invalid) return;
    for (int64_t s = blockIdx.x; s < m.S; s += gridDim.x) {
        const mmbal_segment segment = m.segments[s];
        const Drawn d = {m, segment, m.rho[segment.modality], segment.units, segment.first};
        double largest = 0;
        for (int64_t u = threadIdx.x; u < d.n; u += UNIT_THREADS)
            largest = m.energy[d.first + u] > largest ? m.energy[d.first + u] : largest;
        largest = largest_over_block<UNIT_THREADS>(largest, shared.block);
        if (largest == 0 || d.rho >= 1) continue; // all is kept
        if constexpr (DRAW == Draw::SYSTEMATIC)
            draw_systematic(d, shared);
        else if constexpr (DRAW == Draw::INDEPENDENT)
            draw_independent(d, shared.block);
        else
            draw_smallest(d, shared.select);
    }
}

bool are_segments(const mmbal_segment *segments, int64_t S, int64_t U, int64_t M) {
    for (int64_t s = 0; s < S; s++) {
        const mmbal_segment &of = segments[s];
        if (of.units < 0 || of.units > INT32_MAX || of.first < 0 || of.first > U - of.units) return false;
        if (of.modality < 0 || of.modality >= M || of.id < 0 || of.id > UINT32_MAX) return false;
        if (of.first_unit < 0 || of.first_unit > (int64_t{1} << 46) - of.units) return false;
    }
    return true;
}

constexpr int64_t BYTES_A_UNIT = sizeof(uint64_t) + sizeof(double) + 2 * sizeof(Ordered);

} // namespace
} // namespace mmbal

using namespace mmbal;

int64_t mmbal_mask_units_workspace_cuda(int64_t U, int64_t S) {
    return BYTES_A_UNIT * U + static_cast<int64_t>(sizeof(mmbal_segment)) * S + static_cast<int64_t>(sizeof(int64_t));
}

mmbal_status mmbal_mask_units_cuda(const double *energy, const mmbal_segment *segments, const double *rho, int64_t U,
                                   int64_t S, int64_t M, int64_t seed, int64_t step, mmbal_mask_options options,
                                   double *scale, double *probability, void *workspace, mmbal_stream stream) {
    if (U < 0 || S < 0 || !mask_is_served(nullptr, 0, step, options) || M < 0) return MMBAL_INVALID_ARGUMENT;
    if (!are_segments(segments, S, U, M)) return MMBAL_INVALID_ARGUMENT;
    Masking m = {energy,  nullptr, rho,         U,       S,       M,       seed,    step,
                 options, scale,   probability, nullptr, nullptr, nullptr, nullptr, nullptr};
    m.numbers = static_cast<uint64_t *>(workspace);
    m.q = reinterpret_cast<double *>(m.numbers + U);
    m.entries = reinterpret_cast<Ordered *>(m.q + U), m.spare = m.entries + U;
    mmbal_segment *table = reinterpret_cast<mmbal_segment *>(m.spare + U);
    m.segments = table, m.invalid = reinterpret_cast<int *>(table + S);
    if (cudaMemsetAsync(m.invalid, 0, sizeof(int), static_cast<cudaStream_t>(stream)) != cudaSuccess)
        return MMBAL_DEVICE_ERROR;
    const int64_t most = U > M ? U : M;
    MMBAL_RETURN_UNLESS_OK(launch(stream, ceil_div(most, TABLE_THREADS), TABLE_THREADS, 0, keep_everything, m));
    MMBAL_RETURN_UNLESS_OK(write_table(segments, S, table, stream));
    auto draw = draw_segments<Draw::SMALLEST>;
    if (options.sampler == MMBAL_SYSTEMATIC) draw = draw_segments<Draw::SYSTEMATIC>;
    if (options.sampler == MMBAL_INDEPENDENT) draw = draw_segments<Draw::INDEPENDENT>;
    return launch(stream, S, UNIT_THREADS, sizeof(Shared), draw, m);
}
