#include "units.h"

#include "sampler.h"

namespace mmbal {
namespace {

std::tuple<Tensor, Tensor> unit_energy_foreach(std::vector<Tensor> grads, std::vector<int64_t> specs,
                                               std::optional<std::vector<Tensor>> weights, std::string importance) {
    const char *op = "unit_energy_foreach";
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
    TorchPool pool;
    const Workspace workspace(mmbal_unit_energy_workspace(units.data(), T));
    check(mmbal_unit_energy(units.data(), !weights ? nullptr : of_weights.data(), T, kind,
                            static_cast<double *>(energy.mutable_data_ptr()),
                            static_cast<uint8_t *>(nonfinite.mutable_data_ptr()), workspace.data(), pool.get()),
          op);
    return {energy, nonfinite};
}

void scale_units_foreach_(std::vector<Tensor> grads, std::vector<int64_t> specs, Tensor scale,
                          std::optional<Tensor> skip, std::optional<std::vector<Tensor>> bases) {
    const char *op = "scale_units_foreach_";
    check_beside(op, "bases", bases, grads);
    const std::vector<mmbal_units> units = units_of(op, "grads", grads, specs, true);
    const std::vector<mmbal_units> of_bases =
        !bases ? std::vector<mmbal_units>() : units_of(op, "bases", *bases, specs, false);
    int64_t U = 0;
    for (const mmbal_units &of : units) U += of.size[0] * of.size[1];
    check_shape(op, "scale", scale, "[U]", {U});
    check_dtype(op, "scale", scale, ScalarType::Double);
    if (is_set(op, skip)) return;
    scale = in_one_piece(scale);
    const int64_t T = static_cast<int64_t>(units.size());
    TorchPool pool;
    const Workspace workspace(mmbal_scale_units_workspace(T));
    const mmbal_status status =
        mmbal_scale_units(units.data(), !bases ? nullptr : of_bases.data(), T,
                          static_cast<const double *>(scale.const_data_ptr()), workspace.data(), pool.get());
    STD_TORCH_CHECK(status != MMBAL_INVALID_ARGUMENT, op, ": specs must not name an element twice");
    check(status, op);
}

} // namespace
} // namespace mmbal

STABLE_TORCH_LIBRARY_FRAGMENT(mmbal, m) {
    m.def("unit_energy_foreach(Tensor[] grads, int[] specs, Tensor[]? weights=None, str importance=\"gn\") -> "
          "(Tensor, Tensor)");
    m.def("scale_units_foreach_(Tensor(a!)[] grads, int[] specs, Tensor scale, Tensor? skip=None, "
          "Tensor[]? bases=None) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(mmbal, CPU, m) {
    m.impl("unit_energy_foreach", TORCH_BOX(&mmbal::unit_energy_foreach));
    m.impl("scale_units_foreach_", TORCH_BOX(&mmbal::scale_units_foreach_));
}
