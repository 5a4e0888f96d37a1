#include "mmbal/router_loss.h"

#include "binding.h"
#ifdef MMBAL_ON_CUDA
#include "mmbal/cuda/router_loss.h"
#endif

namespace mmbal {
namespace {

// Arguments of a loss after the checks.
struct LossInputs {
    mmbal_dtype dtype;
    int64_t N, E;
    Tensor logits;
    std::optional<Tensor> mask;
    const uint8_t *mask_data() const { return static_cast<const uint8_t *>(data_or_null(mask)); }
};

LossInputs check_inputs(const char *op, const Tensor &logits, const std::optional<Tensor> &token_mask) {
    check_shape(op, "logits", logits, "[N, E]", {-1, -1});
    const mmbal_dtype dtype = storage_dtype(op, "logits", logits);
    const int64_t N = logits.size(0), E = logits.size(1);
    STD_TORCH_CHECK(E >= 1, op, ": logits must have at least one expert, got ", shape_text(logits.sizes()));
    if (token_mask) {
        check_shape(op, "token_mask", *token_mask, "[N]", {N});
        check_dtype(op, "token_mask", *token_mask, ScalarType::Bool);
    }
    return {dtype, N, E, in_one_piece(logits), in_one_piece(token_mask)};
}

Tensor check_indices(const char *op, const Tensor &indices, int64_t N) {
    check_shape(op, "indices", indices, "[N, K]", {N, -1});
    check_dtype(op, "indices", indices, ScalarType::Long);
    STD_TORCH_CHECK(indices.size(1) >= 1, op, ": indices must name at least one expert a token");
    return in_one_piece(indices);
}

void check_loss_gradient(const char *op, const Tensor &dloss, mmbal_dtype dtype) {
    check_shape(op, "dloss", dloss, "[]", {});
    check_dtype(op, "dloss", dloss, real_type(dtype));
}

mmbal_balance check_normalize(const char *op, const std::string &normalize) {
    if (normalize == "mixtral") return MMBAL_BALANCE_MIXTRAL;
    if (normalize == "megatron") return MMBAL_BALANCE_MEGATRON;
    if (normalize == "switch") return MMBAL_BALANCE_SWITCH;
    STD_TORCH_CHECK(false, op, ": normalize must be mixtral, megatron or switch, got ", normalize);
}

void check_balance(mmbal_status status, const char *op, int64_t E) {
    STD_TORCH_CHECK(status != MMBAL_INVALID_INDEX, op, ": indices must be from 0 to the last expert ", E - 1);
    check(status, op);
}

Tensor load_balance_loss(Tensor logits, Tensor indices, std::optional<Tensor> token_mask, std::string normalize) {
    const char *op = "load_balance_loss";
    const Executor executor(logits);
    const LossInputs in = check_inputs(op, logits, token_mask);
    indices = check_indices(op, indices, in.N);
    const mmbal_balance balance = check_normalize(op, normalize);
    Tensor loss = torch::stable::new_empty(in.logits, {}, real_type(in.dtype));
    const Workspace workspace(MMBAL_KERNEL(mmbal_router_loss_workspace)(in.N, in.E), in.logits);
    check_balance(MMBAL_KERNEL(mmbal_load_balance_loss)(in.dtype, in.logits.const_data_ptr(), index_data(indices),
                                                        in.mask_data(), in.N, in.E, indices.size(1), balance,
                                                        loss.mutable_data_ptr(), workspace.data(), executor.get()),
                  op, in.E);
    return loss;
}

Tensor load_balance_loss_backward(Tensor dloss, Tensor logits, Tensor indices, std::optional<Tensor> token_mask,
                                  std::string normalize) {
    const char *op = "load_balance_loss_backward";
    const Executor executor(logits);
    const LossInputs in = check_inputs(op, logits, token_mask);
    indices = check_indices(op, indices, in.N);
    const mmbal_balance balance = check_normalize(op, normalize);
    check_loss_gradient(op, dloss, in.dtype);
    Tensor dlogits = torch::stable::new_empty(in.logits, {in.N, in.E});
    const Workspace workspace(MMBAL_KERNEL(mmbal_router_loss_workspace)(in.N, in.E), in.logits);
    check_balance(MMBAL_KERNEL(mmbal_load_balance_loss_backward)(
                      in.dtype, dloss.const_data_ptr(), in.logits.const_data_ptr(), index_data(indices), in.mask_data(),
                      in.N, in.E, indices.size(1), balance, dlogits.mutable_data_ptr(), workspace.data(),
                      executor.get()),
                  op, in.E);
    return dlogits;
}

Tensor router_z_loss(Tensor logits, std::optional<Tensor> token_mask) {
    const char *op = "router_z_loss";
    const Executor executor(logits);
    const LossInputs in = check_inputs(op, logits, token_mask);
    Tensor loss = torch::stable::new_empty(in.logits, {}, real_type(in.dtype));
    const Workspace workspace(MMBAL_KERNEL(mmbal_router_loss_workspace)(in.N, in.E), in.logits);
    check(MMBAL_KERNEL(mmbal_router_z_loss)(in.dtype, in.logits.const_data_ptr(), in.mask_data(), in.N, in.E,
                                            loss.mutable_data_ptr(), workspace.data(), executor.get()),
          op);
    return loss;
}

Tensor router_z_loss_backward(Tensor dloss, Tensor logits, std::optional<Tensor> token_mask) {
    const char *op = "router_z_loss_backward";
    const Executor executor(logits);
    const LossInputs in = check_inputs(op, logits, token_mask);
    check_loss_gradient(op, dloss, in.dtype);
    Tensor dlogits = torch::stable::new_empty(in.logits, {in.N, in.E});
#ifdef MMBAL_ON_CUDA
    const Workspace workspace(mmbal_router_loss_workspace_cuda(in.N, in.E), in.logits);
    check(mmbal_router_z_loss_backward_cuda(in.dtype, dloss.const_data_ptr(), in.logits.const_data_ptr(),
                                            in.mask_data(), in.N, in.E, dlogits.mutable_data_ptr(), workspace.data(),
                                            executor.get()),
          op);
#else
    check(mmbal_router_z_loss_backward(in.dtype, dloss.const_data_ptr(), in.logits.const_data_ptr(), in.mask_data(),
                                       in.N, in.E, dlogits.mutable_data_ptr(), executor.get()),
          op);
#endif
    return dlogits;
}

} // namespace
} // namespace mmbal

#ifndef MMBAL_ON_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(mmbal, m) {
    m.def("load_balance_loss(Tensor logits, Tensor indices, Tensor? token_mask=None, str normalize=\"mixtral\") "
          "-> Tensor");
    m.def("load_balance_loss_backward(Tensor dloss, Tensor logits, Tensor indices, Tensor? token_mask, str normalize) "
          "-> Tensor");
    m.def("router_z_loss(Tensor logits, Tensor? token_mask=None) -> Tensor");
    m.def("router_z_loss_backward(Tensor dloss, Tensor logits, Tensor? token_mask) -> Tensor");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(mmbal, MMBAL_DEVICE, m) {
    m.impl("load_balance_loss", TORCH_BOX(&mmbal::load_balance_loss));
    m.impl("load_balance_loss_backward", TORCH_BOX(&mmbal::load_balance_loss_backward));
    m.impl("router_z_loss", TORCH_BOX(&mmbal::router_z_loss));
    m.impl("router_z_loss_backward", TORCH_BOX(&mmbal::router_z_loss_backward));
}
