// The grouped products of expert_mlp on float32 and float64: tiles in shared memory, sums in registers.
#include "products.cuh"

namespace mmbal {
namespace {

constexpr int SIDE = 16, THREADS = SIDE * SIDE; // threads of a tile
constexpr int DEPTH = 16;                       // of a step

// A thread sums MICRO x MICRO elements in groups of 4 x 4, the groups apart so that reads of shared memory do not meet.
template <typename R>
struct Tiling {
    static constexpr int MICRO = sizeof(R) == 8 ? 4 : 8, TILE = SIDE * MICRO, GROUPS = MICRO / 4;
    static constexpr int STRIDE = TILE + 4; // of a row [k] of a tile in shared memory
    static constexpr int LOADS = TILE * DEPTH / THREADS;
    static constexpr size_t SHARED = 2 * DEPTH * STRIDE * sizeof(R);
};

// A step's elements of a thread, from global memory to registers: along k where that is contiguous, along i otherwise.
template <bool ALONG_DEPTH, typename Stored>
__device__ __forceinline__ void fetch(const Operand<Stored> &from, int64_t first_depth,
                                      Real<Stored> (&kept)[Tiling<Real<Stored>>::LOADS]) {
    using T = Tiling<Real<Stored>>;
    constexpr int WIDTH = ALONG_DEPTH ? DEPTH : T::TILE;
#pragma unroll
    for (int load_number = 0; load_number < T::LOADS; load_number++) {
        const int index = load_number * THREADS + threadIdx.x;
        const int i = ALONG_DEPTH ? index / WIDTH : index % WIDTH;
        const int64_t k = first_depth + (ALONG_DEPTH ? index % WIDTH : index / WIDTH);
        kept[load_number] =
            i < from.rows && k < from.depth ? load(from.data[i * from.row_stride + k * from.depth_stride]) : 0;
    }
}

template <bool ALONG_DEPTH, typename R>
__device__ __forceinline__ void put(const R (&kept)[Tiling<R>::LOADS], R *tile) {
    using T = Tiling<R>;
    constexpr int WIDTH = ALONG_DEPTH ? DEPTH : T::TILE;
#pragma unroll
    for (int load_number = 0; load_number < T::LOADS; load_number++) {
        const int index = load_number * THREADS + threadIdx.x;
        const int i = ALONG_DEPTH ? index / WIDTH : index % WIDTH, k = ALONG_DEPTH ? index % WIDTH : index / WIDTH;
        tile[k * T::STRIDE + i] = kept[load_number];
    }
}

// sums[m][n] += sum_k a(i_m, k) b(j_n, k), k ascending. Both tiles of a step lie in shared memory while the next step's
// elements are on their way.
template <bool A_ALONG_DEPTH, bool B_ALONG_DEPTH, typename Stored>
__device__ __forceinline__ void
multiply_tile(const Operand<Stored> &a, const Operand<Stored> &b,
              Real<Stored> (&sums)[Tiling<Real<Stored>>::MICRO][Tiling<Real<Stored>>::MICRO]) {
    using R = Real<Stored>;
    using T = Tiling<R>;
    R *tile_a = shared_memory<R>(), *tile_b = tile_a + DEPTH * T::STRIDE;
    const int row = threadIdx.x / SIDE * 4, column = threadIdx.x % SIDE * 4;
    R next_a[T::LOADS], next_b[T::LOADS];
    fetch<A_ALONG_DEPTH>(a, 0, next_a);
    fetch<B_ALONG_DEPTH>(b, 0, next_b);
    for (int64_t first = 0; first < a.depth; first += DEPTH) {
        put<A_ALONG_DEPTH>(next_a, tile_a);
        put<B_ALONG_DEPTH>(next_b, tile_b);
        __syncthreads();
        if (first + DEPTH < a.depth) {
            fetch<A_ALONG_DEPTH>(a, first + DEPTH, next_a);
            fetch<B_ALONG_DEPTH>(b, first + DEPTH, next_b);
        }
#pragma unroll
        for (int k = 0; k < DEPTH; k++) {
            R of_a[T::MICRO], of_b[T::MICRO];
#pragma unroll
            for (int m = 0; m < T::MICRO; m++) {
                const int apart = m / 4 * (T::TILE / T::GROUPS) + m % 4;
                of_a[m] = tile_a[k * T::STRIDE + row + apart];
                of_b[m] = tile_b[k * T::STRIDE + column + apart];
            }
#pragma unroll
            for (int m = 0; m < T::MICRO; m++)
#pragma unroll
                for (int n = 0; n < T::MICRO; n++) sums[m][n] += of_a[m] * of_b[n];
        }
        __syncthreads(); // the tiles are written again
    }
}

template <typename To, typename R>
__device__ __forceinline__ void write_tile(const R (&sums)[Tiling<R>::MICRO][Tiling<R>::MICRO], int64_t rows,
                                           int64_t columns, int64_t stride, To *out) {
    using T = Tiling<R>;
#pragma unroll
    for (int m = 0; m < T::MICRO; m++) {
        const int i = threadIdx.x / SIDE * 4 + m / 4 * (T::TILE / T::GROUPS) + m % 4;
#pragma unroll
        for (int n = 0; n < T::MICRO; n++) {
            const int j = threadIdx.x % SIDE * 4 + n / 4 * (T::TILE / T::GROUPS) + n % 4;
            if (i < rows && j < columns) store(&out[i * stride + j], sums[m][n]);
        }
    }
}

template <bool TRANSPOSED, typename Stored>
__global__ void __launch_bounds__(THREADS, 1)
    rows_product(const Stored *__restrict__ a, const Stored *__restrict__ w, const int64_t *__restrict__ offsets,
                 int64_t R_rows, int64_t E, int64_t in, int64_t out_size, Real<Stored> *__restrict__ out) {
    using R = Real<Stored>;
    using T = Tiling<R>;
    const int64_t across = ceil_div(out_size, T::TILE), tiles = most_row_tiles(R_rows, E, T::TILE) * across;
    for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
        const RowTile rows = row_tile(offsets, E, T::TILE, index / across);
        if (rows.expert < 0) return; // the same for all threads
        const int64_t column = index % across * T::TILE;
        const Stored *of_expert = w + rows.expert * in * out_size;
        R sums[T::MICRO][T::MICRO] = {};
        const Operand<Stored> left = {a + rows.first * in, in, 1, rows.last - rows.first, in};
        if (TRANSPOSED)
            multiply_tile<true, true>(left, Operand<Stored>{of_expert + column * in, in, 1, out_size - column, in},
                                      sums);
        else
            multiply_tile<true, false>(left, Operand<Stored>{of_expert + column, 1, out_size, out_size - column, in},
                                       sums);
        write_tile(sums, rows.last - rows.first, at_most(out_size - column, T::TILE), out_size,
                   out + rows.first * out_size + column);
    }
}

template <typename Stored>
__global__ void __launch_bounds__(THREADS, 1)
    weights_product(const Stored *__restrict__ a, const Stored *__restrict__ w, const int64_t *__restrict__ offsets,
                    int64_t E, int64_t in, int64_t out_size, Stored *__restrict__ out) {
    using R = Real<Stored>;
    using T = Tiling<R>;
    const int64_t across = ceil_div(in, T::TILE), down = ceil_div(out_size, T::TILE);
    for (int64_t index = blockIdx.x; index < E * down * across; index += gridDim.x) {
        const int64_t e = index / (down * across), row = index / across % down * T::TILE;
        const int64_t column = index % across * T::TILE, first = offsets[e], depth = offsets[e + 1] - first;
        R sums[T::MICRO][T::MICRO] = {};
        multiply_tile<false, false>(Operand<Stored>{w + first * out_size + row, 1, out_size, out_size - row, depth},
                                    Operand<Stored>{a + first * in + column, 1, in, in - column, depth}, sums);
        write_tile(sums, at_most(out_size - row, T::TILE), at_most(in - column, T::TILE), in,
                   out + (e * out_size + row) * in + column);
    }
}

template <typename Stored>
mmbal_status run(mmbal_expert_product product, const void *a, const void *w, const int64_t *offsets, int64_t R_rows,
                 int64_t E, int64_t in, int64_t out_size, void *out, mmbal_stream stream) {
    using R = Real<Stored>;
    using T = Tiling<R>;
    const Stored *left = static_cast<const Stored *>(a), *right = static_cast<const Stored *>(w);
    if (product == MMBAL_ROWS_TRANSPOSED_TIMES_ROWS)
        return launch(stream, E * ceil_div(in, T::TILE) * ceil_div(out_size, T::TILE), THREADS, T::SHARED,
                      weights_product<Stored>, left, right, offsets, E, in, out_size, static_cast<Stored *>(out));
    return launch(stream, most_row_tiles(R_rows, E, T::TILE) * ceil_div(out_size, T::TILE), THREADS, T::SHARED,
                  product == MMBAL_ROWS_TIMES_TRANSPOSED ? rows_product<true, Stored> : rows_product<false, Stored>,
                  left, right, offsets, R_rows, E, in, out_size, static_cast<R *>(out));
}

} // namespace
} // namespace mmbal

mmbal_status mmbal_expert_product_cuda(mmbal_dtype dtype, mmbal_expert_product product, const void *a, const void *w,
                                       const int64_t *offsets, int64_t R, int64_t E, int64_t in, int64_t out_size,
                                       void *out, mmbal_stream stream) {
    if (R < 0 || E < 1 || in < 1 || out_size < 1) return MMBAL_INVALID_ARGUMENT;
    if (dtype == MMBAL_BF16 || dtype == MMBAL_F16)
        return mmbal::tensor_product(dtype, product, a, w, offsets, R, E, in, out_size, out, stream);
    return (dtype == MMBAL_F64 ? mmbal::run<double> : mmbal::run<float>)(product, a, w, offsets, R, E, in, out_size,
                                                                         out, stream);
}
