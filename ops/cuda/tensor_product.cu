// The grouped products of expert_mlp on 16-bit elements.
#include "products.cuh"
#include "tensor_tile.cuh"

namespace mmbal {

mmbal_status tensor_product(mmbal_dtype dtype, mmbal_expert_product product, const void *a, const void *w,
                            const int64_t *offsets, int64_t R, int64_t E, int64_t in, int64_t out_size,
                            int64_t w_stride, void *out, mmbal_stream stream) {
    return (dtype == MMBAL_F16 ? run_product<TensorCores<F16>> : run_product<TensorCores<BF16>>)(product, a, w, offsets,
                                                                                                 R, E, in, out_size,
                                                                                                 w_stride, out, stream);
}

} // namespace mmbal
