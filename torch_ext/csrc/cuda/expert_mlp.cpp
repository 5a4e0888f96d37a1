// expert_mlp on a GPU: products by torch's grouped product where it has tensor cores for them, by our own elsewhere.
// Neither needs the offsets on the host.
#include "../expert_mlp.h"

namespace mmbal {
namespace {

// torch multiplies groups without a loop on the host for bfloat16, on devices of compute capability 9 and 10, with rows
// of whole 16 bytes; it counts rows in int32.
bool torch_multiplies(const Call &call) {
    constexpr int64_t IN_16_BYTES = 8;
    if (call.dtype != MMBAL_BF16 || call.shape.N == 0) return false;
    if (call.shape.D % IN_16_BYTES != 0 || call.shape.F % IN_16_BYTES != 0) return false;
    for (const Tensor *t : {&call.w1, &call.w2})
        if (reinterpret_cast<uintptr_t>(t->const_data_ptr()) % 16 != 0) return false;
    if (call.shape.N > INT32_MAX / call.shape.K) return false;
    const int major = mmbal_cuda_capability_major();
    return major == 9 || major == 10;
}

Tensor grouped_product(const Tensor &a, const Tensor &b, const Tensor &ends) {
    std::array<StableIValue, 5> stack{torch::stable::detail::from(a), torch::stable::detail::from(b),
                                      torch::stable::detail::from(std::optional<Tensor>(ends)),
                                      torch::stable::detail::from(std::nullopt),
                                      torch::stable::detail::from(std::nullopt)};
    const AOTITorchError error = torch_call_dispatcher("aten::_grouped_mm", "", stack.data(), TORCH_ABI_VERSION);
    STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "expert_mlp: torch's grouped product failed");
    return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor turned(const Tensor &t) { return torch::stable::transpose(t, -2, -1); }

// A call whose products are torch's, in the storage dtype.
class TorchProducts {
public:
    TorchProducts(const Call &call, const Executor &executor)
        : call_(call), inputs_(call.inputs()), stream_(executor.get()), R_(call.shape.N * call.shape.K),
          ends_(torch::stable::new_empty(call.offsets, {call.shape.E}, ScalarType::Int)) {
        ok(mmbal_expert_ends_cuda(inputs_.offsets, call.shape.E, static_cast<int32_t *>(ends_.mutable_data_ptr()),
                                  stream_));
    }

    void forward(const Tensor &y, const Tensor *preactivation) const {
        Tensor rows = rows_of(call_.shape.D);
        gather(call_.x, 0, &rows, nullptr);
        Tensor hidden = grouped_product(rows, turned(call_.w1), ends_);
        ok(mmbal_expert_activation_cuda(
            call_.dtype, MMBAL_PRODUCT_STORED, hidden.const_data_ptr(), &inputs_, call_.shape, &call_.options,
            preactivation ? preactivation->mutable_data_ptr() : nullptr, hidden.mutable_data_ptr(), stream_));
        const Tensor out = grouped_product(hidden, turned(call_.w2), ends_);
        combine(out, 0, y);
    }

    void backward(const Tensor &dy, const Tensor &preactivation, const std::vector<bool> &needed,
                  Gradients *gradients) const {
        enum { DX, DW1, DB1, DW2, DB2, DWEIGHTS };
        const auto [N, D, F, E, K] = call_.shape;
        const mmbal_expert_mlp_gradients to = gradients->outputs();
        const bool needs_du = needed[DX] || needed[DW1] || needed[DB1], weighted_needed = needed[DW2] || needed[DB2];
        Tensor g = rows_of(D), weighted = weighted_needed ? rows_of(D) : g;
        gather(dy, 1, &g, weighted_needed ? &weighted : nullptr);
        if (needed[DB2]) sum(weighted, D, to.db2);
        if (!needs_du && !needed[DWEIGHTS] && !needed[DW2]) return;

        std::optional<Tensor> h, activated;
        if (needs_du || needed[DWEIGHTS]) h = grouped_product(g, call_.w2, ends_);
        if (needed[DW2]) activated = rows_of(F);
        ok(mmbal_expert_activation_backward_cuda(
            call_.dtype, MMBAL_PRODUCT_STORED, data_or_null(h), preactivation.const_data_ptr(), g.const_data_ptr(),
            &inputs_, call_.shape, &call_.options, needs_du ? h->mutable_data_ptr() : nullptr,
            activated ? activated->mutable_data_ptr() : nullptr, to.dweights, stream_));
        if (needed[DW2]) weight_gradient(weighted, *activated, D * F, &gradients->of(DW2));
        if (!needs_du) return;
        if (needed[DB1]) sum(*h, F, to.db1);
        if (needed[DW1]) {
            Tensor rows = rows_of(D);
            gather(call_.x, 0, &rows, nullptr);
            weight_gradient(*h, rows, D * F, &gradients->of(DW1));
        }
        if (needed[DX]) combine(grouped_product(*h, call_.w1, ends_), 1, gradients->of(DX));
    }

private:
    void ok(mmbal_status status) const { check(status, call_.op); }

    Tensor rows_of(int64_t columns) const { return torch::stable::new_empty(call_.x, {R_, columns}); }

    void gather(const Tensor &values, int masked, const Tensor *rows, const Tensor *weighted) const {
        ok(mmbal_expert_gather_cuda(call_.dtype, values.const_data_ptr(), &inputs_, call_.shape, &call_.options, masked,
                                    rows->mutable_data_ptr(), weighted ? weighted->mutable_data_ptr() : nullptr,
                                    stream_));
    }

    void combine(const Tensor &product, int plain, const Tensor &y) const {
        ok(mmbal_expert_combine_cuda(call_.dtype, MMBAL_PRODUCT_STORED, product.const_data_ptr(), &inputs_, call_.shape,
                                     &call_.options, plain, y.mutable_data_ptr(), stream_));
    }

    void sum(const Tensor &rows, int64_t columns, void *sums) const {
        const Workspace workspace(mmbal_expert_sums_workspace_cuda(call_.dtype, R_, call_.shape.E, columns), rows);
        ok(mmbal_expert_sums_cuda(call_.dtype, rows.const_data_ptr(), inputs_.offsets, R_, call_.shape.E, columns, sums,
                                  workspace.data(), stream_));
    }

    // gradient[e] = sum_r left[r] right[r]^T
    void weight_gradient(const Tensor &left, const Tensor &right, int64_t size, Tensor *gradient) const {
        *gradient = grouped_product(turned(left), right, ends_);
        ok(mmbal_expert_clear_cuda(call_.dtype, inputs_.offsets, call_.shape.E, size, gradient->mutable_data_ptr(),
                                   stream_));
    }

    const Call &call_;
    const mmbal_expert_mlp_inputs inputs_;
    const mmbal_stream stream_;
    const int64_t R_;
    const Tensor ends_;
};

std::tuple<Tensor, Tensor> expert_mlp_forward(Tensor x, Tensor w1, std::optional<Tensor> b1, Tensor w2,
                                              std::optional<Tensor> b2, Tensor weights, Tensor permutation,
                                              Tensor offsets, Tensor inverse, std::string activation, double dropout,
                                              double output_dropout, int64_t seed, int64_t offset,
                                              bool keep_preactivation, std::optional<Tensor> packed) {
    const Executor executor(x);
    Call call{"expert_mlp", x, w1, w2, weights, permutation, offsets, inverse, b1, b2, packed};
    call.check_shapes();
    call.check_packed();
    call.check_options(activation, dropout, output_dropout, seed, offset);
    call.make_contiguous();
    const auto [N, D, F, E, K] = call.shape;
    Tensor y = torch::stable::new_empty(call.x, {N, D});
    Tensor preactivation = torch::stable::new_empty(call.x, {keep_preactivation ? N * K : 0, F});
    if (torch_multiplies(call)) {
        TorchProducts(call, executor).forward(y, keep_preactivation ? &preactivation : nullptr);
        return {y, preactivation};
    }
    const mmbal_expert_mlp_inputs inputs = call.inputs();
    const Workspace workspace(mmbal_expert_mlp_workspace_cuda(call.dtype, call.shape), call.x);
    call.check_result(mmbal_expert_mlp_cuda(call.dtype, &inputs, call.shape, &call.options, y.mutable_data_ptr(),
                                            keep_preactivation ? preactivation.mutable_data_ptr() : nullptr,
                                            workspace.data(), executor.get()));
    return {y, preactivation};
}

SixTensors expert_mlp_backward(Tensor dy, Tensor x, Tensor w1, Tensor w2, std::optional<Tensor> b2, Tensor weights,
                               Tensor permutation, Tensor offsets, Tensor inverse, Tensor preactivation,
                               std::string activation, double dropout, double output_dropout, int64_t seed,
                               int64_t offset, std::vector<bool> needed) {
    const Executor executor(x);
    Call call{"expert_mlp_backward", x, w1, w2, weights, permutation, offsets, inverse, std::nullopt, b2, std::nullopt};
    call.check_shapes();
    call.check_options(activation, dropout, output_dropout, seed, offset);
    call.check_backward(dy, preactivation, needed);
    call.make_contiguous();
    dy = in_one_piece(dy), preactivation = in_one_piece(preactivation);
    Gradients gradients(call, needed);
    if (torch_multiplies(call)) {
        TorchProducts(call, executor).backward(dy, preactivation, needed, &gradients);
        return gradients.tensors();
    }
    const mmbal_expert_mlp_inputs inputs = call.inputs();
    const Workspace workspace(mmbal_expert_mlp_backward_workspace_cuda(call.dtype, call.shape), call.x);
    const mmbal_expert_mlp_gradients outputs = gradients.outputs();
    call.check_result(mmbal_expert_mlp_backward_cuda(call.dtype, dy.const_data_ptr(), &inputs,
                                                     preactivation.const_data_ptr(), call.shape, &call.options,
                                                     &outputs, workspace.data(), executor.get()));
    return gradients.tensors();
}

} // namespace
} // namespace mmbal

STABLE_TORCH_LIBRARY_IMPL(mmbal, CUDA, m) {
    m.impl("expert_mlp_forward", TORCH_BOX(&mmbal::expert_mlp_forward));
    m.impl("expert_mlp_pack", TORCH_BOX(&mmbal::expert_mlp_pack));
    m.impl("expert_mlp_backward", TORCH_BOX(&mmbal::expert_mlp_backward));
}
