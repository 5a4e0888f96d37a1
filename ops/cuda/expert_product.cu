// The grouped products of expert_mlp on float32 and float64.
#include "products.cuh"
#include "register_tile.cuh"

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
