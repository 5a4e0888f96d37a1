// What of a tensor is kept: sums of its weights, the threshold of its keys, the level of its probabilities. Nothing is
// changed. As ops/cpu/elements.c finds it, and with its bits: sums are taken in the same order.
#pragma once

#include "elements.cuh"

namespace mmbal {
namespace {

constexpr int THREADS = 256, WARPS = THREADS / WARP;
constexpr int TILES = CHUNK / TILE, TILES_OF_WARP = 2;              // of a chunk; that a warp sums at a time
constexpr int BINS = 1 << 11;                                       // keys have 31 bits
constexpr int FIRST_DIGIT = 20, SECOND_DIGIT = 10, THIRD_DIGIT = 0; // lowest bits: exponent, mantissa in two parts
constexpr int LEVEL_ROUNDS = 16; // by all blocks; what is then left is done by one a tensor
static_assert(TILE == PARTS * PARTS && TILES_OF_WARP * PARTS == WARP, "a lane has a part");

// --- Sums over a chunk and over a tensor, in the order of elements.c -------------------------------------------------

struct ChunkShared {
    BlockShared<THREADS> block;
    double terms[WARPS][TILES_OF_WARP * TILE];
    double tiles[TILES];
    double sum;
    Bin bin;
    uint32_t bins[BINS];
};

// *sum of the terms of a chunk and *count of what act counts, the same in every thread. act(first, here, w) turns the
// weights of four elements into their terms.
template <typename Act>
__device__ __forceinline__ void sum_chunk(const Pass &pass, const Elements &t, int64_t chunk, ChunkShared &shared,
                                          double *sum, int64_t *count, Act act) {
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    double *terms = shared.terms[warp];
    int64_t counted = 0;
    for (int tile = warp * TILES_OF_WARP; tile < TILES; tile += WARPS * TILES_OF_WARP) {
        const int64_t begin = chunk * CHUNK + static_cast<int64_t>(tile) * TILE;
        if (begin >= t.count) {
            if (lane < TILES_OF_WARP) shared.tiles[tile + lane] = 0;
            continue;
        }
        for (int i = lane * QUAD; i < TILES_OF_WARP * TILE; i += WARP * QUAD) {
            double w[QUAD] = {};
            const int here = elements_here(t, begin + i);
            if (here > 0) {
                weights_of(pass, t, begin + i, here, w);
                counted += act(begin + i, here, w);
            }
#pragma unroll
            for (int j = 0; j < QUAD; j++) terms[i + j] = w[j];
        }
        __syncwarp();
        double part = 0, total = 0;
        const int first = lane / PARTS * TILE + lane % PARTS;
#pragma unroll
        for (int i = 0; i < TILE; i += PARTS) part += terms[first + i];
#pragma unroll
        for (int i = 0; i < PARTS; i++) total += __shfl_sync(ALL_LANES, part, i, PARTS);
        if (lane % PARTS == 0) shared.tiles[tile + lane / PARTS] = total;
        __syncwarp(); // terms are written again
    }
    *count = sum_over_block<THREADS>(counted, shared.block); // and all tiles are there
    if (threadIdx.x == 0) {
        double in_order = 0;
        for (int tile = 0; tile < TILES; tile++) in_order += shared.tiles[tile];
        shared.sum = in_order;
    }
    __syncthreads();
    *sum = shared.sum;
}

// The sums of a tensor's chunks one after the other, and their counts.
__device__ __forceinline__ void sum_tensor(const Pass &pass, const Elements &t, ChunkShared &shared, double *sum,
                                           int64_t *count) {
    const int64_t chunks = ceil_div(t.count, CHUNK);
    const double *sums = pass.sums + t.first_chunk;
    const int64_t *counts = pass.counts + t.first_chunk;
    double *staged = shared.terms[0], in_order = 0;
    int64_t counted = 0;
    for (int64_t first = 0; first < chunks; first += THREADS) {
        const int64_t chunk = first + threadIdx.x;
        __syncthreads(); // what was staged before is read
        staged[threadIdx.x] = chunk < chunks ? sums[chunk] : 0;
        counted += chunk < chunks ? counts[chunk] : 0;
        __syncthreads();
        if (threadIdx.x > 0) continue;
#pragma unroll 8
        for (int i = 0; i < THREADS; i++) in_order += staged[i];
    }
    *count = sum_over_block<THREADS>(counted, shared.block);
    if (threadIdx.x == 0) shared.sum = in_order;
    __syncthreads();
    *sum = shared.sum;
}

// --- Radix select: a digit of the keys a pass, the upper ones first --------------------------------------------------

__device__ __forceinline__ void clear_bins(ChunkShared &shared) {
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS) shared.bins[bin] = 0;
    __syncthreads();
}

// Adds the block's bins to those of a tensor.
__device__ __forceinline__ void add_bins(const ChunkShared &shared, unsigned long long *to) {
    __syncthreads();
    for (int bin = threadIdx.x; bin < BINS; bin += THREADS)
        if (shared.bins[bin] > 0) atomicAdd(&to[bin], static_cast<unsigned long long>(shared.bins[bin]));
    __syncthreads(); // bins are cleared again
}

// Of every chunk the sum of its weights and how many are greater than 0; and of every tensor the first digits.
template <bool COUNTS_KEYS>
__global__ void __launch_bounds__(THREADS, 1) weigh(Pass pass) {
    auto &shared = *shared_memory<ChunkShared>();
    if (pass.is_off()) return;
    for (int64_t item = blockIdx.x; item < pass.chunks; item += gridDim.x) {
        const int64_t at = tensor_of(pass, item);
        const Elements t = pass.tensors[at];
        if (COUNTS_KEYS) clear_bins(shared);
        double sum;
        int64_t count;
        sum_chunk(pass, t, item - t.first_chunk, shared, &sum, &count, [&](int64_t first, int here, double (&w)[QUAD]) {
            int positive = 0;
            uint32_t keys[QUAD];
            if (COUNTS_KEYS) keys_of(pass, t, first, w, keys);
#pragma unroll
            for (int i = 0; i < QUAD; i++) {
                positive += w[i] > 0;
                if (COUNTS_KEYS && i < here) atomicAdd(&shared.bins[keys[i] >> FIRST_DIGIT], 1u);
            }
            return positive;
        });
        if (COUNTS_KEYS) add_bins(shared, pass.bins + at * BINS);
        if (threadIdx.x == 0) pass.sums[item] = sum, pass.counts[item] = count;
    }
}

// Goes on by one digit, which begins at bit `low`; clears the bins for the next.
__device__ __forceinline__ void find_digit(const Pass &pass, int64_t at, int low, Found *found, ChunkShared &shared) {
    unsigned long long *bins = pass.bins + at * BINS;
    const Bin bin = find_bin<THREADS, BINS>(bins, found->place, shared.block, &shared.bin);
    found->below |= static_cast<uint32_t>(bin.number) << low, found->place -= bin.before;
    if (found->place == bin.inside) { // all of them are kept, whatever their other bits
        found->below += uint32_t{1} << low;
        found->state = READY;
    } else if (low == 0) {
        found->has_ties = true, found->ties = found->place;
        found->state = READY;
    }
    for (int i = threadIdx.x; i < BINS; i += THREADS) bins[i] = 0;
}

// After weigh: what a tensor's mask needs, and the first digit of its threshold. A block a tensor.
__global__ void __launch_bounds__(THREADS, 1) decide(Pass pass) {
    auto &shared = *shared_memory<ChunkShared>();
    if (pass.skip && *pass.skip) return;
    for (int64_t at = blockIdx.x; at < pass.T; at += gridDim.x) {
        const Elements t = pass.tensors[at];
        const double rho = pass.rho[t.modality], count = static_cast<double>(t.count), mix = pass.options.mix;
        const bool independent = pass.options.sampler == MMBAL_INDEPENDENT, unbiased = pass.options.unbiased;
        Found found = {};
        sum_tensor(pass, t, shared, &found.sum, &found.positive);
        if (!(found.sum < static_cast<double>(INFINITY))) {
            if (threadIdx.x == 0) atomicExch(pass.stop, 1);
        } else if (found.sum > 0 && rho < 1) {
            const int64_t wanted = count_kept(rho, t.count);
            found.multiplier = 1;
            if (independent) {
                found.scale_of_weight = (1 - mix) / found.sum, found.floor = mix / count;
                found.multiplier = unbiased ? 0 : 1;
                found.kappa = rho * count, found.capped = -1;
                const int64_t most = mix > 0 ? t.count : found.positive;
                const bool all = found.kappa >= static_cast<double>(most);
                found.level = all ? static_cast<double>(INFINITY) : 0;
                found.state = all ? READY : SEARCHING;
            } else {
                if (unbiased) found.multiplier = count / static_cast<double>(wanted);
                const bool uniform = pass.options.sampler == MMBAL_UNIFORM;
                found.place = uniform || wanted < found.positive ? wanted : found.positive;
                found.state = found.place > 0 ? SEARCHING : READY;
                if (found.place > 0) find_digit(pass, at, FIRST_DIGIT, &found, shared);
            }
        }
        if (threadIdx.x == 0) pass.found[at] = found;
    }
}

__global__ void __launch_bounds__(THREADS, 1) count_digits(Pass pass, int high, int low) {
    auto &shared = *shared_memory<ChunkShared>();
    if (pass.is_off()) return;
    for (int64_t item = blockIdx.x; item < pass.chunks; item += gridDim.x) {
        const int64_t at = tensor_of(pass, item);
        if (pass.found[at].state != SEARCHING) continue;
        const Elements t = pass.tensors[at];
        const uint32_t upper = pass.found[at].below >> high, last_digit = (1u << (high - low)) - 1;
        clear_bins(shared);
        const int64_t begin = (item - t.first_chunk) * CHUNK;
        for (int64_t first = begin + threadIdx.x * QUAD; first < begin + CHUNK; first += THREADS * QUAD) {
            const int here = elements_here(t, first);
            if (here == 0) break;
            double w[QUAD];
            uint32_t keys[QUAD];
            weights_of(pass, t, first, here, w);
            keys_of(pass, t, first, w, keys);
#pragma unroll
            for (int i = 0; i < QUAD; i++)
                if (i < here && keys[i] >> high == upper) atomicAdd(&shared.bins[keys[i] >> low & last_digit], 1u);
        }
        add_bins(shared, pass.bins + at * BINS);
    }
}

__global__ void __launch_bounds__(THREADS, 1) find_digits(Pass pass, int low) {
    auto &shared = *shared_memory<ChunkShared>();
    if (pass.is_off()) return;
    for (int64_t at = blockIdx.x; at < pass.T; at += gridDim.x) {
        Found found = pass.found[at];
        if (found.state != SEARCHING) continue;
        find_digit(pass, at, low, &found, shared);
        if (threadIdx.x == 0) pass.found[at] = found; // all have read it: find_digit has barriers
    }
}

// --- The level of independent draws ----------------------------------------------------------------------------------

__device__ __forceinline__ void sum_uncapped(const Pass &pass, const Elements &t, const Found &found, int64_t chunk,
                                             ChunkShared &shared, double *sum, int64_t *capped) {
    sum_chunk(pass, t, chunk, shared, sum, capped, [&](int64_t, int here, double (&w)[QUAD]) {
        int reached = 0;
#pragma unroll
        for (int i = 0; i < QUAD; i++) {
            const double q = found.scale_of_weight * w[i] + found.floor;
            const bool is_capped = found.level * q >= 1;
            reached += i < here && is_capped;
            w[i] = i < here && !is_capped ? q : 0;
        }
        return reached;
    });
}

// What reaches 1 at the present level is capped, until nothing more does; as sampling.c finds it for units.
__device__ __forceinline__ void raise_level(double rest, int64_t now, Found *found) {
    if (now <= found->capped || !(found->kappa > static_cast<double>(now))) {
        found->state = READY;
        return;
    }
    found->capped = now, found->level = (found->kappa - static_cast<double>(now)) / rest;
}

__global__ void __launch_bounds__(THREADS, 1) sum_at_level(Pass pass) {
    auto &shared = *shared_memory<ChunkShared>();
    if (pass.is_off()) return;
    for (int64_t item = blockIdx.x; item < pass.chunks; item += gridDim.x) {
        const int64_t at = tensor_of(pass, item);
        const Found found = pass.found[at];
        if (found.state != SEARCHING) continue;
        const Elements t = pass.tensors[at];
        double rest;
        int64_t now;
        sum_uncapped(pass, t, found, item - t.first_chunk, shared, &rest, &now);
        if (threadIdx.x == 0) pass.sums[item] = rest, pass.counts[item] = now;
    }
}

__global__ void __launch_bounds__(THREADS, 1) raise_levels(Pass pass) {
    auto &shared = *shared_memory<ChunkShared>();
    if (pass.is_off()) return;
    for (int64_t at = blockIdx.x; at < pass.T; at += gridDim.x) {
        Found found = pass.found[at];
        if (found.state != SEARCHING) continue;
        double rest;
        int64_t now;
        sum_tensor(pass, pass.tensors[at], shared, &rest, &now);
        raise_level(rest, now, &found);
        if (threadIdx.x == 0) pass.found[at] = found;
    }
}

// What LEVEL_ROUNDS did not end: a block a tensor, for as many rounds as it takes.
__global__ void __launch_bounds__(THREADS, 1) finish_levels(Pass pass) {
    auto &shared = *shared_memory<ChunkShared>();
    if (pass.is_off()) return;
    for (int64_t at = blockIdx.x; at < pass.T; at += gridDim.x) {
        const Elements t = pass.tensors[at];
        Found found = pass.found[at];
        if (found.state != SEARCHING) continue;
        while (found.state == SEARCHING) {
            double rest = 0;
            int64_t now = 0;
            for (int64_t chunk = 0; chunk * CHUNK < t.count; chunk++) {
                double sum;
                int64_t capped;
                sum_uncapped(pass, t, found, chunk, shared, &sum, &capped);
                rest += sum, now += capped;
            }
            raise_level(rest, now, &found);
        }
        if (threadIdx.x == 0) pass.found[at] = found;
    }
}

} // namespace
} // namespace mmbal
