// The grouped products of expert_mlp on 16-bit elements: tiles in shared memory, sums by tensor cores in float32.
#include "packs.cuh"
#include "products.cuh"
#include "tensor_cores.cuh"

namespace mmbal {
namespace {

constexpr int THREADS = 256;                   // 2 x 4 warps
constexpr int TILE = 128, DEPTH = 32;          // rows and columns of a block's result, and the depth of a step
constexpr int STAGES = 4;                      // steps in shared memory: one in use, the others on their way
constexpr int DOWN = 4, ACROSS = 4;            // 16 x 8 results of a warp, whose share is 64 x 32
constexpr int PACK = 8;                        // elements in 16 bytes
constexpr int OPERAND = TILE * (DEPTH + PACK); // elements of an operand's stage
constexpr size_t SHARED = 2 * STAGES * OPERAND * sizeof(uint16_t);

// An operand lies in shared memory as it does in global memory: a row for each i where it is contiguous along the
// depth, a row for each k otherwise. A pack apart, so that the 8 rows of a matrix lie in different banks.
template <bool ALONG_DEPTH>
constexpr int STRIDE = (ALONG_DEPTH ? DEPTH : TILE) + PACK;
static_assert(DEPTH * STRIDE<false> <= OPERAND && TILE * STRIDE<true> <= OPERAND);

template <bool ALONG_DEPTH, typename Stored>
__device__ __forceinline__ void fetch(const Operand<Stored> &from, bool aligned, int64_t first_depth, Stored *stage) {
    constexpr int ROW = (ALONG_DEPTH ? DEPTH : TILE) / PACK;
#pragma unroll
    for (int number = 0; number < TILE * DEPTH / PACK / THREADS; number++) {
        const int index = number * THREADS + static_cast<int>(threadIdx.x);
        const int row = index / ROW, column = index % ROW * PACK;
        const int64_t i = ALONG_DEPTH ? row : column, k = first_depth + (ALONG_DEPTH ? column : row);
        const int64_t left = ALONG_DEPTH ? (i < from.rows ? from.depth - k : 0) : (k < from.depth ? from.rows - i : 0);
        const Stored *source = from.data + i * from.row_stride + k * from.depth_stride;
        Stored *to = stage + row * STRIDE<ALONG_DEPTH> + column;
        if (aligned && left >= PACK)
            copy_async(to, source);
        else
            store_pack(to, load_pack(source, left, false), PACK, true);
    }
}

// The four 8 x 8 matrices of rows i ... i + 15 and k ... k + 15: a's registers, or those of two of b's.
template <bool ALONG_DEPTH, bool IS_A, typename Stored>
__device__ __forceinline__ void read(const Stored *stage, int i, int k, uint32_t (&pairs)[4]) {
    const int lane = threadIdx.x % WARP, row = lane % 8, low = lane / 8 % 2 * 8, high = lane / 16 * 8;
    i += IS_A ? low : high, k += IS_A ? high : low;
    load_matrices<!ALONG_DEPTH>(stage + (ALONG_DEPTH ? (i + row) * STRIDE<true> + k : (k + row) * STRIDE<false> + i),
                                pairs);
}

// sums[m][n] += the warp's share of a step.
template <bool A_ALONG_DEPTH, bool B_ALONG_DEPTH, typename Stored>
__device__ __forceinline__ void multiply_step(const Stored *a, const Stored *b, int row, int column,
                                              float (&sums)[DOWN][ACROSS][4]) {
#pragma unroll
    for (int k = 0; k < DEPTH; k += 16) {
        uint32_t of_a[DOWN][4], of_b[ACROSS / 2][4];
#pragma unroll
        for (int m = 0; m < DOWN; m++) read<A_ALONG_DEPTH, true>(a, row + 16 * m, k, of_a[m]);
#pragma unroll
        for (int n = 0; n < ACROSS / 2; n++) read<B_ALONG_DEPTH, false>(b, column + 16 * n, k, of_b[n]);
#pragma unroll
        for (int m = 0; m < DOWN; m++)
#pragma unroll
            for (int n = 0; n < ACROSS; n++)
                multiply_add<Stored>(sums[m][n], of_a[m], of_b[n / 2][n % 2 * 2], of_b[n / 2][n % 2 * 2 + 1]);
    }
}

// out[i, j] = sum over k of a(i, k) b(j, k), in steps of 16 in ascending order.
template <bool A_ALONG_DEPTH, bool B_ALONG_DEPTH, typename Stored, typename To>
__device__ __forceinline__ void multiply_tile(const Operand<Stored> &a, const Operand<Stored> &b, bool a_aligned,
                                              bool b_aligned, int64_t stride, To *out) {
    Stored *memory = shared_memory<Stored>();
    const int lane = threadIdx.x % WARP, warp = threadIdx.x / WARP;
    const int row = warp / 4 * 16 * DOWN, column = warp % 4 * 8 * ACROSS;
    const bool works = row < a.rows && column < b.rows; // the same for a warp's lanes
    float sums[DOWN][ACROSS][4] = {};
    const auto fetch_step = [&](int64_t step) {
        Stored *stage = memory + step % STAGES * 2 * OPERAND;
        if (step * DEPTH < a.depth) {
            fetch<A_ALONG_DEPTH>(a, a_aligned, step * DEPTH, stage);
            fetch<B_ALONG_DEPTH>(b, b_aligned, step * DEPTH, stage + OPERAND);
        }
        end_group_of_copies(); // where it is empty too: they are counted
    };
    for (int step = 0; step < STAGES - 1; step++) fetch_step(step);
    for (int64_t step = 0; step * DEPTH < a.depth; step++) {
        wait_for_copies<STAGES - 2>();
        __syncthreads(); // this step is there, and all have read the one before, whose place is taken now
        fetch_step(step + STAGES - 1);
        const Stored *stage = memory + step % STAGES * 2 * OPERAND;
        if (works) multiply_step<A_ALONG_DEPTH, B_ALONG_DEPTH>(stage, stage + OPERAND, row, column, sums);
    }
    wait_for_copies<0>();
    __syncthreads(); // shared memory is the next tile's
    const bool in_pairs = stride % 2 == 0 && reinterpret_cast<uintptr_t>(out) % sizeof(Pair<To>) == 0;
#pragma unroll
    for (int m = 0; m < DOWN; m++)
#pragma unroll
        for (int n = 0; n < ACROSS; n++)
#pragma unroll
            for (int half = 0; half < 2; half++) {
                const int64_t i = row + 16 * m + lane / 4 + 8 * half, j = column + 8 * n + lane % 4 * 2;
                if (i >= a.rows || j >= b.rows) continue;
                Pair<To> pair;
                store(&pair.of[0], sums[m][n][2 * half]);
                store(&pair.of[1], sums[m][n][2 * half + 1]);
                To *to = out + i * stride + j;
                if (in_pairs && j + 1 < b.rows) {
                    *reinterpret_cast<Pair<To> *>(to) = pair;
                } else {
                    to[0] = pair.of[0];
                    if (j + 1 < b.rows) to[1] = pair.of[1];
                }
            }
}

template <bool TRANSPOSED, typename Stored>
__global__ void __launch_bounds__(THREADS, 2)
    rows_product(const Stored *__restrict__ a, const Stored *__restrict__ w, const int64_t *__restrict__ offsets,
                 int64_t R, int64_t E, int64_t in, int64_t out_size, bool a_aligned, bool w_aligned,
                 float *__restrict__ out) {
    const int64_t across = ceil_div(out_size, TILE), tiles = most_row_tiles(R, E, TILE) * across;
    for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
        const RowTile rows = row_tile(offsets, E, TILE, index / across);
        if (rows.expert < 0) return; // the same for all threads
        const int64_t column = index % across * TILE;
        const Stored *of_expert = w + rows.expert * in * out_size;
        const Operand<Stored> left = {a + rows.first * in, in, 1, rows.last - rows.first, in};
        const Operand<Stored> right =
            TRANSPOSED ? Operand<Stored>{of_expert + column * in, in, 1, at_most(out_size - column, TILE), in}
                       : Operand<Stored>{of_expert + column, 1, out_size, at_most(out_size - column, TILE), in};
        multiply_tile<true, TRANSPOSED>(left, right, a_aligned, w_aligned, out_size,
                                        out + rows.first * out_size + column);
    }
}

template <typename Stored>
__global__ void __launch_bounds__(THREADS, 2)
    weights_product(const Stored *__restrict__ a, const Stored *__restrict__ w, const int64_t *__restrict__ offsets,
                    int64_t E, int64_t in, int64_t out_size, bool a_aligned, bool w_aligned, Stored *__restrict__ out) {
    const int64_t across = ceil_div(in, TILE), down = ceil_div(out_size, TILE);
    for (int64_t index = blockIdx.x; index < E * down * across; index += gridDim.x) {
        const int64_t e = index / (down * across), row = index / across % down * TILE;
        const int64_t column = index % across * TILE, first = offsets[e], depth = offsets[e + 1] - first;
        multiply_tile<false, false>(
            Operand<Stored>{w + first * out_size + row, 1, out_size, at_most(out_size - row, TILE), depth},
            Operand<Stored>{a + first * in + column, 1, in, at_most(in - column, TILE), depth}, w_aligned, a_aligned,
            in, out + (e * out_size + row) * in + column);
    }
}

template <typename Stored>
mmbal_status run(mmbal_expert_product product, const void *a, const void *w, const int64_t *offsets, int64_t R,
                 int64_t E, int64_t in, int64_t out_size, void *out, mmbal_stream stream) {
    const Stored *left = static_cast<const Stored *>(a), *right = static_cast<const Stored *>(w);
    const auto is_aligned = [](const void *data, int64_t columns) {
        return rows_are_aligned(data, columns, sizeof(Stored));
    };
    if (product == MMBAL_ROWS_TRANSPOSED_TIMES_ROWS)
        return launch(stream, E * ceil_div(in, TILE) * ceil_div(out_size, TILE), THREADS, SHARED,
                      weights_product<Stored>, left, right, offsets, E, in, out_size, is_aligned(a, in),
                      is_aligned(w, out_size), static_cast<Stored *>(out));
    const bool transposed = product == MMBAL_ROWS_TIMES_TRANSPOSED;
    return launch(stream, most_row_tiles(R, E, TILE) * ceil_div(out_size, TILE), THREADS, SHARED,
                  transposed ? rows_product<true, Stored> : rows_product<false, Stored>, left, right, offsets, R, E, in,
                  out_size, is_aligned(a, in), is_aligned(w, transposed ? in : out_size), static_cast<float *>(out));
}

} // namespace

mmbal_status tensor_product(mmbal_dtype dtype, mmbal_expert_product product, const void *a, const void *w,
                            const int64_t *offsets, int64_t R, int64_t E, int64_t in, int64_t out_size, void *out,
                            mmbal_stream stream) {
    return (dtype == MMBAL_F16 ? run<F16> : run<BF16>)(product, a, w, offsets, R, E, in, out_size, out, stream);
}

} // namespace mmbal
