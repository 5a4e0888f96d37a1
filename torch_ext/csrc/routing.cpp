#include "mmbal/routing.h"

#include "binding.h"
#ifdef MMBAL_ON_CUDA
#include "mmbal/cuda/routing.h"
#endif

namespace mmbal {
namespace {

std::tuple<Tensor, Tensor> moe_topk(Tensor logits, int64_t k, bool normalize, std::optional<Tensor> selection_bias) {
    const char *op = "moe_topk";
    const Executor executor(logits);
    check_shape(op, "logits", logits, "[N, E]", {-1, -1});
    const mmbal_dtype dtype = storage_dtype(op, "logits", logits);
    const int64_t N = logits.size(0), E = logits.size(1);
    STD_TORCH_CHECK(k >= 1 && k <= E, op, ": k must be from 1 to the number of experts ", E, ", got ", k);
    if (selection_bias) {
        check_shape(op, "selection_bias", *selection_bias, "[E]", {E});
        check_dtype(op, "selection_bias", *selection_bias, real_type(dtype));
    }
    logits = in_one_piece(logits), selection_bias = in_one_piece(selection_bias);
    Tensor weights = torch::stable::new_empty(logits, {N, k}, real_type(dtype));
    Tensor indices = torch::stable::new_empty(logits, {N, k}, ScalarType::Long);
    check(MMBAL_KERNEL(mmbal_moe_topk)(dtype, logits.const_data_ptr(), data_or_null(selection_bias), N, E, k, normalize,
                                       weights.mutable_data_ptr(), static_cast<int64_t *>(indices.mutable_data_ptr()),
                                       executor.get()),
          op);
    return {weights, indices};
}

Tensor moe_topk_backward(Tensor dweights, Tensor logits, Tensor weights, Tensor indices, bool normalize) {
    const char *op = "moe_topk_backward";
    const Executor executor(logits);
    check_shape(op, "logits", logits, "[N, E]", {-1, -1});
    const mmbal_dtype dtype = storage_dtype(op, "logits", logits);
    const int64_t N = logits.size(0), E = logits.size(1);
    check_shape(op, "indices", indices, "[N, K]", {N, -1});
    check_dtype(op, "indices", indices, ScalarType::Long);
    const int64_t K = indices.size(1);
    check_shape(op, "weights", weights, "[N, K]", {N, K});
    check_dtype(op, "weights", weights, real_type(dtype));
    check_shape(op, "dweights", dweights, "[N, K]", {N, K});
    check_dtype(op, "dweights", dweights, real_type(dtype));
    logits = in_one_piece(logits), weights = in_one_piece(weights);
    indices = in_one_piece(indices), dweights = in_one_piece(dweights);
    Tensor dlogits = torch::stable::new_empty(logits, {N, E});
    check(MMBAL_KERNEL(mmbal_moe_topk_backward)(dtype, dweights.const_data_ptr(), logits.const_data_ptr(),
                                                weights.const_data_ptr(), index_data(indices), N, E, K, normalize,
                                                dlogits.mutable_data_ptr(), executor.get()),
          op);
    return dlogits;
}

std::tuple<Tensor, Tensor, Tensor> moe_dispatch(Tensor indices, int64_t num_experts) {
    const char *op = "moe_dispatch";
    const Executor executor(indices);
    check_shape(op, "indices", indices, "[N, K]", {-1, -1});
    check_dtype(op, "indices", indices, ScalarType::Long);
    STD_TORCH_CHECK(num_experts >= 1, op, ": num_experts must be at least 1, got ", num_experts);
    const int64_t N = indices.size(0), K = indices.size(1);
    STD_TORCH_CHECK(K >= 1, op, ": indices must name at least one expert a token, got ", shape_text(indices.sizes()));
    indices = in_one_piece(indices);
    Tensor permutation = torch::stable::new_empty(indices, {N * K});
    Tensor offsets = torch::stable::new_empty(indices, {num_experts + 1});
    Tensor inverse = torch::stable::new_empty(indices, {N, K});
    int64_t *const outputs[] = {static_cast<int64_t *>(permutation.mutable_data_ptr()),
                                static_cast<int64_t *>(offsets.mutable_data_ptr()),
                                static_cast<int64_t *>(inverse.mutable_data_ptr())};
#ifdef MMBAL_ON_CUDA
    const Workspace workspace(mmbal_moe_dispatch_workspace_cuda(N, K, num_experts), indices);
    const mmbal_status status = mmbal_moe_dispatch_cuda(index_data(indices), N, K, num_experts, outputs[0], outputs[1],
                                                        outputs[2], workspace.data(), executor.get());
#else
    const mmbal_status status =
        mmbal_moe_dispatch(index_data(indices), N, K, num_experts, outputs[0], outputs[1], outputs[2]);
#endif
    STD_TORCH_CHECK(status != MMBAL_INVALID_INDEX, op,
                    ": indices must be from 0 to num_experts - 1 = ", num_experts - 1);
    check(status, op);
    return {permutation, offsets, inverse};
}

} // namespace
} // namespace mmbal

#ifndef MMBAL_ON_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(mmbal, m) {
    m.def("moe_topk(Tensor logits, int k, bool normalize=True, Tensor? selection_bias=None) "
          "-> (Tensor weights, Tensor indices)");
    m.def(
        "moe_topk_backward(Tensor dweights, Tensor logits, Tensor weights, Tensor indices, bool normalize) -> Tensor");
    m.def("moe_dispatch(Tensor indices, int num_experts) -> (Tensor permutation, Tensor offsets, Tensor inverse)");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(mmbal, MMBAL_DEVICE, m) {
    m.impl("moe_topk", TORCH_BOX(&mmbal::moe_topk));
    m.impl("moe_topk_backward", TORCH_BOX(&mmbal::moe_topk_backward));
    m.impl("moe_dispatch", TORCH_BOX(&mmbal::moe_dispatch));
}
