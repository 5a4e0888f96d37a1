#include "mmbal/elements.h"

#include "sampler.h"
#ifdef MMBAL_ON_CUDA
#include "mmbal/cuda/elements.h"
#endif

namespace mmbal {
namespace {

// Whether the elements lie side by side in memory, in whatever order of dimensions.
bool is_dense(const Tensor &t) {
    const auto sizes = t.sizes(), strides = t.strides();
    std::vector<std::pair<int64_t, int64_t>> axes;
    for (size_t i = 0; i < sizes.size(); i++) {
        if (sizes[i] == 0) return true;
        if (sizes[i] > 1) axes.emplace_back(strides[i], sizes[i]);
    }
    std::sort(axes.begin(), axes.end());
    int64_t next = 1;
    for (const auto &[stride, size] : axes) {
        if (stride != next) return false;
        next *= size;
    }
    return true;
}

void mask_elements_foreach_(std::vector<Tensor> grads, std::vector<int64_t> modality, std::vector<int64_t> ids,
                            Tensor rho, int64_t seed, int64_t step, std::string sampler, double lam, bool unbiased,
                            std::string importance, std::optional<std::vector<Tensor>> weights,
                            std::optional<Tensor> skip, std::optional<std::vector<Tensor>> gradients,
                            std::optional<std::vector<Tensor>> bases) {
    const char *op = "mask_elements_foreach_";
    const Executor executor(grads.empty() ? rho : grads[0]);
    const mmbal_mask_options options = mask_options(op, sampler, lam, unbiased);
    const mmbal_importance kind = importance_of(op, importance);
    STD_TORCH_CHECK(options.sampler != MMBAL_SYSTEMATIC, op, ": sampler systematic is for units, not for elements");
    STD_TORCH_CHECK(!(unbiased && options.sampler == MMBAL_BOTTOMK), op,
                    ": sampler bottomk is not unbiased for elements; independent and uniform are");
    STD_TORCH_CHECK((kind == MMBAL_GN_WN) == weights.has_value() || grads.empty(), op,
                    ": weights must be given if, and only if, importance is gn_wn");
    rho = check_rho(op, rho, unbiased);
    STD_TORCH_CHECK(modality.size() == grads.size() && ids.size() == grads.size(), op,
                    ": modality and ids must have one entry for each of the grads, ", grads.size(), ", got ",
                    modality.size(), " and ", ids.size());
    for (size_t t = 0; t < grads.size(); t++) check_tensor_numbers(op, modality[t], ids[t], rho.size(0));
    check_step(op, step);
    check_beside(op, "weights", weights, grads);
    check_beside(op, "gradients", gradients, grads);
    check_beside(op, "bases", bases, grads);
    STD_TORCH_CHECK(!bases || gradients, op, ": bases need gradients: what the importance is taken from");
    std::vector<mmbal_elements> elements;
    for (size_t t = 0; t < grads.size(); t++) {
        const Tensor &g = grads[t];
        const mmbal_dtype dtype = storage_dtype(op, "grads", g);
        STD_TORCH_CHECK(is_within_reach(g), op, ": grads[", t, "] must be ", device_text(),
                        " like the other arguments");
        STD_TORCH_CHECK(is_dense(g), op, ": grads[", t, "] must fill its memory without gaps, got sizes ",
                        shape_text(g.sizes()), " and strides ", shape_text(g.strides()));
        elements.push_back({g.mutable_data_ptr(), !gradients ? nullptr : (*gradients)[t].const_data_ptr(),
                            !weights ? nullptr : (*weights)[t].const_data_ptr(),
                            !bases ? nullptr : (*bases)[t].const_data_ptr(), static_cast<int64_t>(g.numel()), dtype,
                            modality[t], ids[t]});
    }
    const int64_t T = static_cast<int64_t>(elements.size());
    const auto *ratios = static_cast<const double *>(rho.const_data_ptr());
#ifdef MMBAL_ON_CUDA
    const Workspace workspace(mmbal_mask_elements_workspace_cuda(elements.data(), T), rho);
    check(mmbal_mask_elements_cuda(elements.data(), ratios, T, rho.size(0), seed, step, kind, options,
                                   skip_data(op, skip), workspace.data(), executor.get()),
          op);
#else
    if (is_set(op, skip)) return;
    const Workspace workspace(mmbal_mask_elements_workspace(elements.data(), T, executor.get()));
    check(mmbal_mask_elements(elements.data(), ratios, T, rho.size(0), seed, step, kind, options, workspace.data(),
                              executor.get()),
          op);
#endif
}

} // namespace
} // namespace mmbal

#ifndef MMBAL_ON_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(mmbal, m) {
    m.def("mask_elements_foreach_(Tensor(a!)[] grads, int[] modality, int[] ids, Tensor rho, int seed, int step, "
          "str sampler=\"bottomk\", float lam=0.5, bool unbiased=False, str importance=\"gn\", Tensor[]? weights=None, "
          "Tensor? skip=None, Tensor[]? gradients=None, Tensor[]? bases=None) -> ()");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(mmbal, MMBAL_DEVICE, m) {
    m.impl("mask_elements_foreach_", TORCH_BOX(&mmbal::mask_elements_foreach_));
}
