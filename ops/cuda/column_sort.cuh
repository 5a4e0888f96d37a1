// A stable radix sort of many columns at once: keys [columns, N] with values, or without.
//
// A digit at a time: a warp counts the digits of its chunk, a block turns a column's counts into first places, digit by
// digit and chunk by chunk, and each warp places its chunk's keys in their order, 32 at a time.
#pragma once

#include "launch.cuh"

namespace mmbal {

constexpr int DIGIT_BITS = 8, DIGITS = 1 << DIGIT_BITS;
constexpr int SORT_WARPS = 4, SORT_THREADS = SORT_WARPS * WARP;
constexpr int64_t LEAST_SORT_CHUNK = 512, MOST_SORT_CHUNKS = 512;

template <typename Key>
struct Columns {
    Key *keys, *spare_keys;         // [columns, N]
    int32_t *values, *spare_values; // [columns, N], or NULL
    int64_t *places;                // [columns, chunks, DIGITS]
    int64_t columns, N;
};

inline int64_t sort_chunk_size(int64_t N) {
    const int64_t for_most = ceil_div(ceil_div(N, MOST_SORT_CHUNKS), WARP) * WARP;
    return for_most > LEAST_SORT_CHUNK ? for_most : LEAST_SORT_CHUNK;
}
inline int64_t count_sort_chunks(int64_t N) { return ceil_div(N, sort_chunk_size(N)); }
inline int64_t count_sort_places(int64_t columns, int64_t N) { return columns * count_sort_chunks(N) * DIGITS; }

// Places (or counts) a chunk [first, last) of a column; place [DIGITS]: where its next key of a digit goes.
template <bool COUNT_ONLY, typename Key>
__device__ __forceinline__ void deal_keys(const Columns<Key> &c, int64_t column, int64_t first, int64_t last, int shift,
                                          int64_t *place) {
    const int lane = threadIdx.x % WARP;
    const int64_t start_of_column = column * c.N;
    for (int64_t begin = first; begin < last; begin += WARP) {
        const bool mine = begin + lane < last;
        const int64_t from = start_of_column + begin + lane;
        const Key key = mine ? c.keys[from] : 0;
        const int digit = mine ? static_cast<int>(key >> shift & (DIGITS - 1)) : -1;
        const unsigned same = __match_any_sync(ALL_LANES, digit), before = same & ((1u << lane) - 1);
        const int64_t start = mine ? place[digit] : 0;
        __syncwarp(); // all have read where their digit's keys go
        if (mine && before == 0) place[digit] = start + __popc(same);
        if (mine && !COUNT_ONLY) {
            const int64_t to = start_of_column + start + __popc(before);
            c.spare_keys[to] = key;
            if (c.values) c.spare_values[to] = c.values[from];
        }
        __syncwarp();
    }
}

// One of its launches counts (places [columns, chunks, DIGITS] are written), the other places.
template <bool COUNT_ONLY, typename Key>
__global__ void __launch_bounds__(SORT_THREADS, 1)
    sort_digit(Columns<Key> c, int64_t chunk, int64_t chunks, int shift) {
    const int lane = threadIdx.x % WARP;
    int64_t *place = shared_memory<int64_t>() + threadIdx.x / WARP * DIGITS;
    for (int64_t job = first_group<WARP>(); job < c.columns * chunks; job += group_count<WARP>()) {
        const int64_t first = job % chunks * chunk, last = first + chunk < c.N ? first + chunk : c.N;
        int64_t *kept = c.places + job * DIGITS;
        for (int d = lane; d < DIGITS; d += WARP) place[d] = COUNT_ONLY ? 0 : kept[d];
        __syncwarp();
        deal_keys<COUNT_ONLY>(c, job / chunks, first, last, shift, place);
        for (int d = lane; COUNT_ONLY && d < DIGITS; d += WARP) kept[d] = place[d];
        __syncwarp();
    }
}

// A block takes a column, a thread a digit: its counts become first places.
static __global__ void __launch_bounds__(DIGITS, 1)
    place_digits(int64_t *__restrict__ places, int64_t columns, int64_t chunks) {
    int64_t *of_warps = shared_memory<int64_t>(); // [DIGITS / WARP]
    const int digit = threadIdx.x, lane = digit % WARP, warp = digit / WARP;
    for (int64_t column = blockIdx.x; column < columns; column += gridDim.x) {
        int64_t *of_digit = places + column * chunks * DIGITS + digit, total = 0;
#pragma unroll 8
        for (int64_t c = 0; c < chunks; c++) total += of_digit[c * DIGITS];
        int64_t up_to = total;
#pragma unroll
        for (int step = 1; step < WARP; step *= 2) {
            const int64_t other = __shfl_up_sync(ALL_LANES, up_to, step);
            if (lane >= step) up_to += other;
        }
        __syncthreads(); // those of the column before are read
        if (lane == WARP - 1) of_warps[warp] = up_to;
        __syncthreads();
        int64_t place = up_to - total;
        for (int w = 0; w < warp; w++) place += of_warps[w];
#pragma unroll 8
        for (int64_t c = 0; c < chunks; c++) {
            const int64_t count = of_digit[c * DIGITS];
            of_digit[c * DIGITS] = place;
            place += count;
        }
    }
}

// By the lowest `passes` digits of the keys. passes is even, so that what is sorted lies in keys and values.
template <typename Key>
mmbal_status sort_columns(Columns<Key> c, int passes, mmbal_stream stream) {
    const int64_t chunk = sort_chunk_size(c.N), chunks = count_sort_chunks(c.N);
    const int64_t blocks = ceil_div(c.columns * chunks, SORT_WARPS);
    const size_t shared = sizeof(int64_t) * SORT_WARPS * DIGITS;
    for (int pass = 0; pass < passes; pass++) {
        const int shift = pass * DIGIT_BITS;
        MMBAL_RETURN_UNLESS_OK(
            launch(stream, blocks, SORT_THREADS, shared, sort_digit<true, Key>, c, chunk, chunks, shift));
        MMBAL_RETURN_UNLESS_OK(launch(stream, c.columns, DIGITS, sizeof(int64_t) * (DIGITS / WARP), place_digits,
                                      c.places, c.columns, chunks));
        MMBAL_RETURN_UNLESS_OK(
            launch(stream, blocks, SORT_THREADS, shared, sort_digit<false, Key>, c, chunk, chunks, shift));
        std::swap(c.keys, c.spare_keys);
        std::swap(c.values, c.spare_values);
    }
    return MMBAL_OK;
}

} // namespace mmbal
