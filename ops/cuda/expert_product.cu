// The grouped products of expert_mlp on float32 and float64: sums in registers, one fused multiply-add at a time.
#include "products.cuh"

namespace mmbal {
namespace {

template <typename R>
class Registers {
public:
    using Stored = R;
    using Sum = R;
    static constexpr int SIDE = 16, THREADS = SIDE * SIDE, BLOCKS = 2;
    static constexpr int MICRO = sizeof(R) == 8 ? 4 : 8; // a thread's rows and columns
    static constexpr int TILE = SIDE * MICRO, DEPTH = 16;

    __device__ __forceinline__ Registers(int64_t, int64_t) {}

    template <bool A_ALONG, bool B_ALONG>
    __device__ __forceinline__ void step(const R *a, const R *b) {
        const int down = threadIdx.x / SIDE, across = threadIdx.x % SIDE;
#pragma unroll 2
        for (int k = 0; k < DEPTH; k += 2) {
            R of_a[2][MICRO], of_b[2][MICRO];
            read<A_ALONG>(a, down, k, of_a);
            read<B_ALONG>(b, across, k, of_b);
#pragma unroll
            for (int next = 0; next < 2; next++)
#pragma unroll
                for (int m = 0; m < MICRO; m++)
#pragma unroll
                    for (int n = 0; n < MICRO; n++) sums_[m][n] += of_a[next][m] * of_b[next][n];
        }
    }

    template <bool A_ALONG, bool B_ALONG, typename To>
    __device__ __forceinline__ void write(int64_t rows, int64_t columns, int64_t stride, To *out) const {
#pragma unroll
        for (int m = 0; m < MICRO; m++) {
            const int i = row<A_ALONG>(threadIdx.x / SIDE, m);
#pragma unroll
            for (int n = 0; n < MICRO; n++) {
                const int j = row<B_ALONG>(threadIdx.x % SIDE, n);
                if (i < rows && j < columns) store(&out[i * stride + j], sums_[m][n]);
            }
        }
    }

private:
    static constexpr int PACK = Pack<R>::SIZE;

    // Row number m of the tile's that belong to a thread: those of neighbours are next to each other where rows lie
    // apart in shared memory, and packs are read where they lie together.
    template <bool ALONG_DEPTH>
    static __device__ __forceinline__ int row(int thread, int m) {
        return ALONG_DEPTH ? m * SIDE + thread : m / PACK * SIDE * PACK + thread * PACK + m % PACK;
    }

    template <bool ALONG_DEPTH>
    static __device__ __forceinline__ void read(const R *stage, int thread, int k, R (&values)[2][MICRO]) {
        constexpr int STRIDE = Stage<Registers>::template STRIDE<ALONG_DEPTH>;
        if constexpr (ALONG_DEPTH) {
#pragma unroll
            for (int m = 0; m < MICRO; m++) {
                const Pair<R> pair = *reinterpret_cast<const Pair<R> *>(stage + row<true>(thread, m) * STRIDE + k);
                values[0][m] = pair.of[0], values[1][m] = pair.of[1];
            }
        } else {
#pragma unroll
            for (int next = 0; next < 2; next++)
#pragma unroll
                for (int m = 0; m < MICRO; m += PACK) {
                    const Pack<R> pack =
                        *reinterpret_cast<const Pack<R> *>(stage + (k + next) * STRIDE + row<false>(thread, m));
#pragma unroll
                    for (int i = 0; i < PACK; i++) values[next][m + i] = pack.of[i];
                }
        }
    }

    R sums_[MICRO][MICRO] = {};
};

} // namespace
} // namespace mmbal

using namespace mmbal;

mmbal_status mmbal_expert_product_cuda(mmbal_dtype dtype, mmbal_expert_product product, const void *a, const void *w,
                                       const int64_t *offsets, int64_t R, int64_t E, int64_t in, int64_t out_size,
                                       int64_t w_stride, void *out, mmbal_stream stream) {
    const int64_t columns = product == MMBAL_ROWS_TIMES_TRANSPOSED ? in : out_size;
    if (R < 0 || E < 1 || in < 1 || out_size < 1 || w_stride < columns) return MMBAL_INVALID_ARGUMENT;
    if (product == MMBAL_ROWS_TRANSPOSED_TIMES_ROWS && w_stride != columns) return MMBAL_INVALID_ARGUMENT;
    if (dtype == MMBAL_BF16 || dtype == MMBAL_F16)
        return tensor_product(dtype, product, a, w, offsets, R, E, in, out_size, w_stride, out, stream);
    return (dtype == MMBAL_F64 ? run_product<Registers<double>> : run_product<Registers<float>>)(product, a, w, offsets,
                                                                                                 R, E, in, out_size,
                                                                                                 w_stride, out, stream);
}
