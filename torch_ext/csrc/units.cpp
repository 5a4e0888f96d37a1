#include "units.h"

#include "sampler.h"
#ifdef MMBAL_ON_CUDA
#include "mmbal/cuda/units.h"
#endif

namespace mmbal {
namespace {

std::tuple<Tensor, Tensor> unit_energy_foreach(std::vector<Tensor> grads, std::vector<int64_t> specs,
                                               std::optional<std::vector<Tensor>> weights, std::string importance) {
    const char *op = "unit_energy_foreach";
    const Executor executor(grads[0]);
    const mmbal_importance kind = importance_of(op, importance);
    STD_TORCH_CHECK((kind == MMBAL_GN_WN) == weights.has_value(), op,
                    ": weights must be given if, and only if, importance is gn_wn");
    check_beside(op, "weights", weights, grads);
    const std::vector<mmbal_units> units = units_of(op, "grads", grads, specs, false);
    const std::vector<mmbal_units> of_weights =
        !weights ? std::vector<mmbal_units>() : units_of(op, "weights", *weights, specs, false);
    int64_t U = 0;
    for (const mmbal_units &of : units) U += of.size[0] * of.size[1];
    const int64_t T = static_cast<int64_t>(units.size());
    Tensor energy = torch::stable::new_empty(grads[0], {U}, ScalarType::Double);
    Tensor nonfinite = torch::stable::new_empty(grads[0], {1}, ScalarType::Bool);
    const mmbal_units *weights_data = !weights ? nullptr : of_weights.data();
#ifdef MMBAL_ON_CUDA
    const Workspace workspace(mmbal_unit_energy_workspace_cuda(units.data(), weights_data, T), energy);
#else
    const Workspace workspace(mmbal_unit_energy_workspace(units.data(), T));
#endif
    check(MMBAL_KERNEL(mmbal_unit_energy)(
              units.data(), weights_data, T, kind, static_cast<double *>(energy.mutable_data_ptr()),
              static_cast<uint8_t *>(nonfinite.mutable_data_ptr()), workspace.data(), executor.get()),
          op);
    return {energy, nonfinite};
}

void scale_units_foreach_(std::vector<Tensor> grads, std::vector<int64_t> specs, Tensor scale,
                          std::optional<Tensor> skip, std::optional<std::vector<Tensor>> bases) {
    const char *op = "scale_units_foreach_";
    const Executor executor(scale);
    check_beside(op, "bases", bases, grads);
    const std::vector<mmbal_units> units = units_of(op, "grads", grads, specs, true);
    const std::vector<mmbal_units> of_bases =
        !bases ? std::vector<mmbal_units>() : units_of(op, "bases", *bases, specs, false);
    int64_t U = 0;
    for (const mmbal_units &of : units) U += of.size[0] * of.size[1];
    check_shape(op, "scale", scale, "[U]", {U});
    check_dtype(op, "scale", scale, ScalarType::Double);
    scale = in_one_piece(scale);
    const auto *factors = static_cast<const double *>(scale.const_data_ptr());
    const int64_t T = static_cast<int64_t>(units.size());
    const mmbal_units *bases_data = !bases ? nullptr : of_bases.data();
#ifdef MMBAL_ON_CUDA
    const mmbal_status status =
        mmbal_scale_units_cuda(units.data(), bases_data, T, factors, skip_data(op, skip), executor.get());
#else
    if (is_set(op, skip)) return;
    const Workspace workspace(mmbal_scale_units_workspace(T));
    const mmbal_status status =
        mmbal_scale_units(units.data(), bases_data, T, factors, workspace.data(), executor.get());
#endif
    STD_TORCH_CHECK(status != MMBAL_INVALID_ARGUMENT, op, ": specs must not name an element twice");
    check(status, op);
}

} // namespace
} // namespace mmbal

#ifndef MMBAL_ON_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(mmbal, m) {
    m.def("unit_energy_foreach(Tensor[] grads, int[] specs, Tensor[]? weights=None, str importance=\"gn\") -> "
          "(Tensor, Tensor)");
    m.def("scale_units_foreach_(Tensor(a!)[] grads, int[] specs, Tensor scale, Tensor? skip=None, "
          "Tensor[]? bases=None) -> ()");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(mmbal, MMBAL_DEVICE, m) {
    m.impl("unit_energy_foreach", TORCH_BOX(&mmbal::unit_energy_foreach));
    m.impl("scale_units_foreach_", TORCH_BOX(&mmbal::scale_units_foreach_));
}
