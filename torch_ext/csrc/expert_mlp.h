// The arguments of expert_mlp, checked: what its bindings for the CPU and for CUDA share.
#pragma once

#include "binding.h"
#include "mmbal/expert_mlp.h"
#ifdef MMBAL_ON_CUDA
#include "mmbal/cuda/expert_mlp.h"
#endif

namespace mmbal {

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

    void check_backward(const Tensor &dy, const Tensor &preactivation, const std::vector<bool> &needed) const {
        const auto [N, D, F, E, K] = shape;
        check_shape(op, "dy", dy, "[N, D]", {N, D});
        check_dtype(op, "dy", dy, x.scalar_type());
        check_shape(op, "preactivation", preactivation, "[R, F]", {N * K, F});
        check_dtype(op, "preactivation", preactivation, x.scalar_type());
        STD_TORCH_CHECK(needed.size() == 6, op, ": needed must have 6 entries, got ", needed.size());
    }

    void make_contiguous() {
        for (Tensor *t : {&x, &w1, &w2, &weights, &permutation, &offsets, &inverse}) *t = in_one_piece(*t);
        b1 = in_one_piece(b1), b2 = in_one_piece(b2);
    }

    void check_packed() const {
        if (!packed) return;
        check_dtype(op, "packed", *packed, ScalarType::Byte);
        check_shape(op, "packed", *packed, "[bytes], as expert_mlp_pack returns it for these weights,",
                    {MMBAL_KERNEL(mmbal_expert_mlp_packed_bytes)(dtype, shape)});
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

using SixTensors = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// dx, dw1, db1, dw2, db2, dweights. One that is not needed comes back with shape [0], and is NULL to the kernels.
class Gradients {
public:
    Gradients(const Call &call, const std::vector<bool> &needed) {
        const auto [N, D, F, E, K] = call.shape;
        const std::vector<std::vector<int64_t>> sizes = {{N, D}, {E, F, D}, {E, F}, {E, D, F}, {E, D}, {N, K}};
        const std::vector<int64_t> none = {0};
        for (size_t i = 0; i < sizes.size(); i++) {
            tensors_.push_back(empty_kept(i == 5 ? call.weights : call.x, needed[i] ? sizes[i] : none));
            data_.push_back(needed[i] ? tensors_[i].mutable_data_ptr() : nullptr);
        }
    }
    mmbal_expert_mlp_gradients outputs() const { return {data_[0], data_[1], data_[2], data_[3], data_[4], data_[5]}; }
    Tensor &of(size_t i) { return tensors_[i]; }
    SixTensors tensors() const {
        return {tensors_[0], tensors_[1], tensors_[2], tensors_[3], tensors_[4], tensors_[5]};
    }

private:
    std::vector<Tensor> tensors_;
    std::vector<void *> data_;
};

inline Tensor expert_mlp_pack(Tensor w1, Tensor w2) {
    const char *op = "expert_mlp_pack";
    const Executor executor(w1);
    check_shape(op, "w1", w1, "[E, F, D]", {-1, -1, -1});
    const mmbal_dtype dtype = storage_dtype(op, "w1", w1);
    const int64_t E = w1.size(0), F = w1.size(1), D = w1.size(2);
    STD_TORCH_CHECK(E >= 1 && F >= 1 && D >= 1, op, ": w1 must be [E, F, D] with no size 0, got ",
                    shape_text(w1.sizes()));
    check_shape(op, "w2", w2, "[E, D, F]", {E, D, F});
    check_dtype(op, "w2", w2, w1.scalar_type());
    w1 = in_one_piece(w1), w2 = in_one_piece(w2);
    const mmbal_expert_mlp_shape shape = {0, D, F, E, 1};
    Tensor packed =
        torch::stable::new_empty(w1, {MMBAL_KERNEL(mmbal_expert_mlp_packed_bytes)(dtype, shape)}, ScalarType::Byte);
    check(MMBAL_KERNEL(mmbal_expert_mlp_pack)(dtype, w1.const_data_ptr(), w2.const_data_ptr(), shape,
                                              packed.mutable_data_ptr(), executor.get()),
          op);
    return packed;
}

} // namespace mmbal
