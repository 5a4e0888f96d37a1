#include "expert_mlp.h"

namespace mmbal {
namespace {

std::tuple<Tensor, Tensor> expert_mlp_forward(Tensor x, Tensor w1, std::optional<Tensor> b1, Tensor w2,
                                              std::optional<Tensor> b2, Tensor weights, Tensor permutation,
                                              Tensor offsets, Tensor inverse, std::string activation, double dropout,
                                              double output_dropout, int64_t seed, int64_t offset,
                                              bool keep_preactivation, std::optional<Tensor> packed) {
    Call call{"expert_mlp", x, w1, w2, weights, permutation, offsets, inverse, b1, b2, packed};
    call.check_shapes();
    call.check_packed();
    call.check_options(activation, dropout, output_dropout, seed, offset);
    call.make_contiguous();
    const auto [N, D, F, E, K] = call.shape;
    Tensor y = torch::stable::new_empty(call.x, {N, D});
    Tensor preactivation =
        keep_preactivation ? empty_kept(call.x, {N * K, F}) : torch::stable::new_empty(call.x, {0, F});
    TorchPool pool;
    const mmbal_expert_mlp_inputs inputs = call.inputs();
    const Workspace workspace(mmbal_expert_mlp_workspace(call.dtype, call.shape, inputs.offsets, pool.workers()));
    call.check_result(mmbal_expert_mlp(call.dtype, &inputs, call.shape, &call.options, y.mutable_data_ptr(),
                                       keep_preactivation ? preactivation.mutable_data_ptr() : nullptr,
                                       workspace.data(), pool.get()));
    return {y, preactivation};
}

// A gradient that is not needed comes back with shape [0].
SixTensors expert_mlp_backward(Tensor dy, Tensor x, Tensor w1, Tensor w2, std::optional<Tensor> b2, Tensor weights,
                               Tensor permutation, Tensor offsets, Tensor inverse, Tensor preactivation,
                               std::string activation, double dropout, double output_dropout, int64_t seed,
                               int64_t offset, std::vector<bool> needed) {
    Call call{"expert_mlp_backward", x, w1, w2, weights, permutation, offsets, inverse, std::nullopt, b2, std::nullopt};
    call.check_shapes();
    call.check_options(activation, dropout, output_dropout, seed, offset);
    call.check_backward(dy, preactivation, needed);
    call.make_contiguous();
    dy = in_one_piece(dy), preactivation = in_one_piece(preactivation);
    Gradients gradients(call, needed);
    TorchPool pool;
    const mmbal_expert_mlp_inputs inputs = call.inputs();
    const Workspace workspace(
        mmbal_expert_mlp_backward_workspace(call.dtype, call.shape, inputs.offsets, pool.workers()));
    const mmbal_expert_mlp_gradients outputs = gradients.outputs();
    call.check_result(mmbal_expert_mlp_backward(call.dtype, dy.const_data_ptr(), &inputs,
                                                preactivation.const_data_ptr(), call.shape, &call.options, &outputs,
                                                workspace.data(), pool.get()));
    return gradients.tensors();
}

} // namespace
} // namespace mmbal

STABLE_TORCH_LIBRARY_FRAGMENT(mmbal, m) {
    // expert_mlp is made of the two others in Python, where it can see whether a gradient will be asked for.
    m.def("expert_mlp(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor weights, Tensor permutation, "
          "Tensor offsets, Tensor inverse, str activation=\"quick_gelu\", float dropout=0.0, float output_dropout=0.0, "
          "SymInt seed=0, SymInt offset=0) -> Tensor");
    m.def("expert_mlp_forward(Tensor x, Tensor w1, Tensor? b1, Tensor w2, Tensor? b2, Tensor weights, "
          "Tensor permutation, Tensor offsets, Tensor inverse, str activation, float dropout, float output_dropout, "
          "SymInt seed, SymInt offset, bool keep_preactivation, Tensor? packed=None) -> (Tensor y, Tensor "
          "preactivation)");
    m.def("expert_mlp_pack(Tensor w1, Tensor w2) -> Tensor packed");
    m.def("expert_mlp_backward(Tensor dy, Tensor x, Tensor w1, Tensor w2, Tensor? b2, Tensor weights, "
          "Tensor permutation, Tensor offsets, Tensor inverse, Tensor preactivation, str activation, float dropout, "
          "float output_dropout, SymInt seed, SymInt offset, bool[] needed) "
          "-> (Tensor dx, Tensor dw1, Tensor db1, Tensor dw2, Tensor db2, Tensor dweights)");
}
STABLE_TORCH_LIBRARY_IMPL(mmbal, CPU, m) {
    m.impl("expert_mlp_forward", TORCH_BOX(&mmbal::expert_mlp_forward));
    m.impl("expert_mlp_pack", TORCH_BOX(&mmbal::expert_mlp_pack));
    m.impl("expert_mlp_backward", TORCH_BOX(&mmbal::expert_mlp_backward));
}
