// Names of samplers and importances, and the checks that the operators on units and on elements share.
#pragma once

#include <climits>

#include "binding.h"
#include "mmbal/sampling.h"
#include "mmbal/units.h"

namespace mmbal {

inline mmbal_sampler sampler_of(const char *op, const std::string &name) {
    if (name == "bottomk") return MMBAL_BOTTOMK;
    if (name == "systematic") return MMBAL_SYSTEMATIC;
    if (name == "independent") return MMBAL_INDEPENDENT;
    if (name == "topk") return MMBAL_TOPK;
    if (name == "uniform") return MMBAL_UNIFORM;
    STD_TORCH_CHECK(false, op, ": sampler must be bottomk, systematic, independent, topk or uniform, got ", name);
}

inline mmbal_importance importance_of(const char *op, const std::string &name) {
    if (name == "gn") return MMBAL_GN;
    if (name == "sqrt_gn") return MMBAL_SQRT_GN;
    if (name == "gn_wn") return MMBAL_GN_WN;
    STD_TORCH_CHECK(false, op, ": importance must be gn, sqrt_gn or gn_wn, got ", name);
}

inline void check_step(const char *op, int64_t step) {
    STD_TORCH_CHECK(step >= 0 && step < MMBAL_STEPS, op, ": step must be from 0 to 2^48 - 1, got ", step);
}

inline mmbal_mask_options mask_options(const char *op, const std::string &sampler, double lam, bool unbiased) {
    const mmbal_sampler kind = sampler_of(op, sampler);
    STD_TORCH_CHECK(lam >= 0 && lam <= 1, op, ": lam must be from 0 to 1, got ", lam);
    STD_TORCH_CHECK(!(unbiased && kind == MMBAL_TOPK), op,
                    ": sampler topk has no unbiased form: what is not among the largest is never kept");
    return {kind, unbiased, lam};
}

// rho [M] float64 with what the samplers take. On a GPU the kernel looks: to read rho here would be to wait for it.
inline Tensor check_rho(const char *op, const Tensor &rho, bool unbiased) {
    check_shape(op, "rho", rho, "[M]", {-1});
    check_dtype(op, "rho", rho, ScalarType::Double);
    const Tensor values = in_one_piece(rho);
#ifdef MMBAL_ON_CUDA
    (void)unbiased;
#else
    const auto *data = static_cast<const double *>(values.const_data_ptr());
    for (int64_t m = 0; m < rho.size(0); m++) {
        STD_TORCH_CHECK(data[m] >= 0 && data[m] <= 1, op, ": rho must be from 0 to 1, got ", data[m], " for modality ",
                        m);
        STD_TORCH_CHECK(!unbiased || data[m] > 0, op,
                        ": rho must be greater than 0 where unbiased, got 0 for modality ", m);
    }
#endif
    return values;
}

inline void check_tensor_numbers(const char *op, int64_t modality, int64_t id, int64_t M) {
    STD_TORCH_CHECK(modality >= 0 && modality < M, op, ": modality must be from 0 to M - 1 = ", M - 1, ", got ",
                    modality);
    STD_TORCH_CHECK(id >= 0 && id <= UINT32_MAX, op, ": id must be from 0 to 2^32 - 1, got ", id);
}

// [1], or null where nothing says so.
inline const uint8_t *skip_data(const char *op, const std::optional<Tensor> &skip) {
    if (!skip) return nullptr;
    check_shape(op, "skip", *skip, "[1]", {1});
    check_dtype(op, "skip", *skip, ScalarType::Bool);
    return static_cast<const uint8_t *>(skip->const_data_ptr());
}

#ifndef MMBAL_ON_CUDA // there a kernel looks
inline bool is_set(const char *op, const std::optional<Tensor> &skip) {
    const uint8_t *data = skip_data(op, skip);
    return data && *data;
}
#endif

// A list beside the gradients, or none: the same number of tensors, each of the same dtype and layout.
inline void check_beside(const char *op, const char *name, const std::optional<std::vector<Tensor>> &given,
                         const std::vector<Tensor> &grads) {
    if (!given) return;
    const std::vector<Tensor> &list = *given;
    STD_TORCH_CHECK(list.size() == grads.size(), op, ": ", name, " must have one tensor for each of the grads, ",
                    grads.size(), ", got ", list.size());
    for (size_t t = 0; t < list.size(); t++) {
        const auto sizes = list[t].sizes(), others = grads[t].sizes();
        const auto strides = list[t].strides(), other_strides = grads[t].strides();
        bool same = sizes.size() == others.size();
        for (size_t i = 0; same && i < sizes.size(); i++)
            same = sizes[i] == others[i] && (strides[i] == other_strides[i] || sizes[i] == 1);
        STD_TORCH_CHECK(same, op, ": ", name, "[", t, "] must have sizes and strides of its gradient, ",
                        shape_text(others), " and ", shape_text(other_strides), ", got ", shape_text(sizes), " and ",
                        shape_text(strides));
        STD_TORCH_CHECK(list[t].scalar_type() == grads[t].scalar_type(), op, ": ", name, "[", t, "] must be ",
                        dtype_text(grads[t].scalar_type()), " as its gradient, got ",
                        dtype_text(list[t].scalar_type()));
        STD_TORCH_CHECK(is_within_reach(list[t]), op, ": ", name, "[", t, "] must be ", device_text(),
                        " like the other arguments");
    }
}

} // namespace mmbal
