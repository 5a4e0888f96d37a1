#include "mmbal/expert_mlp.h"

#include "binding.h"

namespace mmbal {
namespace {

// The arguments that forward and backward share, checked and contiguous.
struct Call {
    const char *op;
    Tensor x, w1, w2, weights, permutation, offsets, inverse;
    std::optional<Tensor> b1, b2, packed;
    mmbal_dtype dtype{};
    mmbal_expert_mlp_shape shape{};
    mmbal_expert_mlp_options options{};

    mmbal_expert_mlp_inputs inputs() const {
        return {x.const_data_ptr(),  w1.const_data_ptr(),      data_or_null(b1),        w2.const_data_ptr(),
                data_or_null(b2),    weights.const_data_ptr(), index_data(permutation), index_data(offsets),
                index_data(inverse), data_or_null(packed)};
    }

    void check_shapes() {
        check_shape(op, "x", x, "[N, D]", {-1, -1});
        dtype = storage_dtype(op, "x", x);
        const int64_t N = x.size(0), D = x.size(1);
        check_shape(op, "w1", w1, "[E, F, D]", {-1, -1, D});
        const int64_t E = w1.size(0), F = w1.size(1);
        STD_TORCH_CHECK(D >= 1 && E >= 1 && F >= 1, op, ": w1 must be [E, F, D] with no size 0, got ",
                        shape_text(w1.sizes()));
        check_parameter("w1", w1, "[E, F, D]", {E, F, D});
        check_parameter("w2", w2, "[E, D, F]", {E, D, F});
        if (b1) check_parameter("b1", *b1, "[E, F]", {E, F});
        if (b2) check_parameter("b2", *b2, "[E, D]", {E, D});
        check_shape(op, "weights", weights, "[N, K]", {N, -1});
        check_dtype(op, "weights", weights, real_type(dtype));
        const int64_t K = weights.size(1);
        STD_TORCH_CHECK(K >= 1, op, ": weights must be [N, K] with K >= 1, got ", shape_text(weights.sizes()));
        check_routing("permutation", permutation, "[R]", {N * K});
        check_routing("offsets", offsets, "[E + 1]", {E + 1});
        check_routing("inverse", inverse, "[N, K]", {N, K});
        shape = {N, D, F, E, K};
    }

    void check_options(const std::string &activation, double dropout, double output_dropout, int64_t seed,
                       int64_t offset) {
        STD_TORCH_CHECK(mmbal_activation_from_name(activation.c_str(), &options.activation), op,
                        ": activation must be quick_gelu, gelu, gelu_tanh, relu, relu2, silu or identity, got ",
                        activation);
        STD_TORCH_CHECK(dropout >= 0 && dropout < 1, op, ": dropout must be in [0, 1), got ", dropout);
        STD_TORCH_CHECK(output_dropout >= 0 && output_dropout < 1, op, ": output_dropout must be in [0, 1), got ",
                        output_dropout);
        STD_TORCH_CHECK(offset >= 0 && offset >> 56 == 0, op, ": offset must be in [0, 2^56), got ", offset);
        options.dropout = dropout, options.output_dropout = output_dropout;
        options.seed = seed, options.offset = offset;
    }

    void make_contiguous() {
        for (Tensor *t : {&x, &w1, &w2, &weights, &permutation, &offsets, &inverse}) *t = in_one_piece(*t);
        b1 = in_one_piece(b1), b2 = in_one_piece(b2);
    }

    void check_packed() const {
        if (!packed) return;
        check_dtype(op, "packed", *packed, ScalarType::Byte);
        check_shape(op, "packed", *packed, "[bytes], as expert_mlp_pack returns it for these weights,",
                    {mmbal_expert_mlp_packed_bytes(dtype, shape)});
        STD_TORCH_CHECK(packed->is_contiguous(), op, ": packed must be contiguous");
    }

    void check_result(mmbal_status status) const {
        STD_TORCH_CHECK(status != MMBAL_INVALID_INDEX, op,
                        ": permutation, offsets and inverse do not belong together; take them from one moe_dispatch");
        check(status, op);
    }

private:
    void check_parameter(const char *name, const Tensor &t, const char *letters, const std::vector<int64_t> &sizes) {
        check_shape(op, name, t, letters, sizes);
        check_dtype(op, name, t, x.scalar_type());
    }
    void check_routing(const char *name, const Tensor &t, const char *letters, const std::vector<int64_t> &sizes) {
        check_shape(op, name, t, letters, sizes);
        check_dtype(op, name, t, ScalarType::Long);
    }
};

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

Tensor expert_mlp_pack(Tensor w1, Tensor w2) {
    const char *op = "expert_mlp_pack";
    check_shape(op, "w1", w1, "[E, F, D]", {-1, -1, -1});
    const mmbal_dtype dtype = storage_dtype(op, "w1", w1);
    const int64_t E = w1.size(0), F = w1.size(1), D = w1.size(2);
    STD_TORCH_CHECK(E >= 1 && F >= 1 && D >= 1, op, ": w1 must be [E, F, D] with no size 0, got ",
                    shape_text(w1.sizes()));
    check_shape(op, "w2", w2, "[E, D, F]", {E, D, F});
    check_dtype(op, "w2", w2, w1.scalar_type());
    w1 = in_one_piece(w1), w2 = in_one_piece(w2);
    const mmbal_expert_mlp_shape shape = {0, D, F, E, 1};
    Tensor packed = torch::stable::new_empty(w1, {mmbal_expert_mlp_packed_bytes(dtype, shape)}, ScalarType::Byte);
    TorchPool pool;
    check(mmbal_expert_mlp_pack(dtype, w1.const_data_ptr(), w2.const_data_ptr(), shape, packed.mutable_data_ptr(),
                                pool.get()),
          op);
    return packed;
}

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// A gradient that is not needed comes back with shape [0].
SixTensors expert_mlp_backward(Tensor dy, Tensor x, Tensor w1, Tensor w2, std::optional<Tensor> b2, Tensor weights,
                               Tensor permutation, Tensor offsets, Tensor inverse, Tensor preactivation,
                               std::string activation, double dropout, double output_dropout, int64_t seed,
                               int64_t offset, std::vector<bool> needed) {
    Call call{"expert_mlp_backward", x, w1, w2, weights, permutation, offsets, inverse, std::nullopt, b2, std::nullopt};
    call.check_shapes();
    call.check_options(activation, dropout, output_dropout, seed, offset);
    const auto [N, D, F, E, K] = call.shape;
    check_shape(call.op, "dy", dy, "[N, D]", {N, D});
    check_dtype(call.op, "dy", dy, x.scalar_type());
    check_shape(call.op, "preactivation", preactivation, "[R, F]", {N * K, F});
    check_dtype(call.op, "preactivation", preactivation, x.scalar_type());
    STD_TORCH_CHECK(needed.size() == 6, call.op, ": needed must have 6 entries, got ", needed.size());
    call.make_contiguous();
    dy = in_one_piece(dy), preactivation = in_one_piece(preactivation);

    const std::vector<std::vector<int64_t>> sizes = {{N, D}, {E, F, D}, {E, F}, {E, D, F}, {E, D}, {N, K}};
    std::vector<Tensor> gradients;
    std::vector<void *> data;
    for (size_t i = 0; i < sizes.size(); i++) {
        const Tensor &like = i == 5 ? call.weights : call.x;
        const std::vector<int64_t> none = {0};
        gradients.push_back(empty_kept(like, needed[i] ? sizes[i] : none));
        data.push_back(needed[i] ? gradients[i].mutable_data_ptr() : nullptr);
    }
    TorchPool pool;
    const mmbal_expert_mlp_inputs inputs = call.inputs();
    const Workspace workspace(
        mmbal_expert_mlp_backward_workspace(call.dtype, call.shape, inputs.offsets, pool.workers()));
    const mmbal_expert_mlp_gradients outputs = {data[0], data[1], data[2], data[3], data[4], data[5]};
    call.check_result(mmbal_expert_mlp_backward(call.dtype, dy.const_data_ptr(), &inputs,
                                                preactivation.const_data_ptr(), call.shape, &call.options, &outputs,
                                                workspace.data(), pool.get()));
    return {gradients[0], gradients[1], gradients[2], gradients[3], gradients[4], gradients[5]};
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
