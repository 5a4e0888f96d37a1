#include "mmbal/significance.h"

#include <cmath>

#include "modalities.h"
#ifdef MMBAL_ON_CUDA
#include "mmbal/cuda/significance.h"
#endif

namespace mmbal {
namespace {

double *doubles(const Tensor &t) { return static_cast<double *>(t.mutable_data_ptr()); }

std::tuple<Tensor, Tensor, Tensor, Tensor> modal_stats(std::vector<Tensor> logits, std::vector<Tensor> features,
                                                       Tensor targets, int64_t ignore_index) {
    const char *op = "modal_stats";
    const Executor executor(targets);
    const int64_t M = static_cast<int64_t>(logits.size());
    check_modalities(op, "logits", M);
    STD_TORCH_CHECK(features.size() == logits.size(), op, ": features must have one tensor for each of the logits, ", M,
                    ", got ", features.size());
    check_shape(op, "targets", targets, "[B]", {-1});
    check_dtype(op, "targets", targets, ScalarType::Long);
    const int64_t B = targets.size(0);
    targets = in_one_piece(targets);
    std::vector<mmbal_modality> modalities;
    int64_t C = -1;
    for (size_t m = 0; m < logits.size(); m++) {
        const std::string of_logits = nth("logits", m), of_features = nth("features", m);
        check_shape(op, of_logits.c_str(), logits[m], "[B, C]", {B, C});
        check_shape(op, of_features.c_str(), features[m], "[B, D]", {B, -1});
        C = logits[m].size(1);
        STD_TORCH_CHECK(C >= 1, op, ": ", of_logits, " must have at least one class");
        STD_TORCH_CHECK(features[m].size(1) >= 1, op, ": ", of_features, " must have at least one column");
        const mmbal_dtype logits_dtype = storage_dtype(op, of_logits.c_str(), logits[m]);
        const mmbal_dtype features_dtype = storage_dtype(op, of_features.c_str(), features[m]);
        logits[m] = in_one_piece(logits[m]), features[m] = in_one_piece(features[m]);
        modalities.push_back({logits[m].const_data_ptr(), features[m].const_data_ptr(), features[m].size(1),
                              logits_dtype, features_dtype});
    }
    const auto sums = [&](int64_t size) { return torch::stable::new_empty(targets, {size}, ScalarType::Double); };
    Tensor ce_sum = sums(M), entropy_sum = sums(M), histogram = sums(C), rows = sums(1);
#ifdef MMBAL_ON_CUDA
    const Workspace workspace(mmbal_modal_stats_workspace_cuda(B, M, C), targets);
#else
    const Workspace workspace(mmbal_modal_stats_workspace(B, M));
#endif
    const mmbal_status status = MMBAL_KERNEL(mmbal_modal_stats)(
        modalities.data(), index_data(targets), M, B, C, ignore_index, doubles(ce_sum), doubles(entropy_sum),
        doubles(histogram), doubles(rows), workspace.data(), executor.get());
    STD_TORCH_CHECK(status != MMBAL_INVALID_INDEX, op, ": targets must be from 0 to C - 1 = ", C - 1,
                    " or ignore_index = ", ignore_index);
    check(status, op);
    return {ce_sum, entropy_sum, histogram, rows};
}

struct RatioOptions {
    const char *op;
    mmbal_ratio_options options{};

    void prepare(double tau, double offset, double lo, double hi, const std::string &mode, double bias,
                 double least_entropy, const std::string &guard) {
        STD_TORCH_CHECK(mode == "rate" || mode == "rate_unnormalised" || mode == "mi", op,
                        ": mode must be rate, rate_unnormalised or mi, got ", mode);
        STD_TORCH_CHECK(guard == "clamp" || guard == "official", op, ": guard must be clamp or official, got ", guard);
        STD_TORCH_CHECK(tau > 0 && std::isfinite(tau), op, ": tau must be finite and greater than 0, got ", tau);
        STD_TORCH_CHECK(least_entropy > 0 && std::isfinite(least_entropy), op,
                        ": least_entropy must be finite and greater than 0, got ", least_entropy);
        STD_TORCH_CHECK(std::isfinite(offset), op, ": offset must be finite, got ", offset);
        STD_TORCH_CHECK(std::isfinite(bias), op, ": bias must be finite, got ", bias);
        STD_TORCH_CHECK(lo >= 0 && lo <= hi && hi <= 1, op, ": lo and hi must be 0 <= lo <= hi <= 1, got ", lo, " and ",
                        hi);
        const mmbal_significance kind = mode == "rate" ? MMBAL_RATE : mode == "mi" ? MMBAL_MI : MMBAL_RATE_UNNORMALISED;
        options = {kind, tau, offset, lo, hi, bias, least_entropy, guard == "official"};
    }
};

void check_sums(const char *op, const char *name, const Tensor &t, const char *letters, int64_t size) {
    check_shape(op, name, t, letters, {size});
    check_dtype(op, name, t, ScalarType::Double);
}

std::tuple<Tensor, Tensor> update_ratio(Tensor ce_sum, Tensor entropy_sum, Tensor histogram, Tensor rows,
                                        std::vector<int64_t> dims, double tau, double offset, double lo, double hi,
                                        std::string mode, double bias, double least_entropy, std::string guard) {
    const char *op = "update_ratio";
    const Executor executor(ce_sum);
    const int64_t M = static_cast<int64_t>(dims.size());
    check_modalities(op, "dims", M);
    for (const int64_t D : dims) STD_TORCH_CHECK(D >= 1, op, ": dims must be at least 1 each, got ", D);
    check_sums(op, "ce_sum", ce_sum, "[M]", M);
    check_sums(op, "entropy_sum", entropy_sum, "[M]", M);
    check_sums(op, "histogram", histogram, "[C]", -1);
    check_sums(op, "rows", rows, "[1]", 1);
    STD_TORCH_CHECK(histogram.size(0) >= 1, op, ": histogram must have at least one class");
    RatioOptions in{op};
    in.prepare(tau, offset, lo, hi, mode, bias, least_entropy, guard);
    ce_sum = in_one_piece(ce_sum), entropy_sum = in_one_piece(entropy_sum);
    histogram = in_one_piece(histogram);
    Tensor rate = torch::stable::new_empty(ce_sum, {M}), rho = torch::stable::new_empty(ce_sum, {M});
#ifdef MMBAL_ON_CUDA
    check(mmbal_update_ratio_cuda(doubles(ce_sum), doubles(entropy_sum), doubles(histogram), doubles(rows), dims.data(),
                                  M, histogram.size(0), in.options, doubles(rate), doubles(rho), executor.get()),
          op);
#else
    check(mmbal_update_ratio(doubles(ce_sum), doubles(entropy_sum), doubles(histogram), doubles(rows), dims.data(), M,
                             histogram.size(0), in.options, doubles(rate), doubles(rho)),
          op);
#endif
    return {rate, rho};
}

Tensor ratio_of_rates(Tensor rate, double tau, double lo, double hi, double bias) {
    const char *op = "ratio_of_rates";
    const Executor executor(rate);
    check_sums(op, "rate", rate, "[M]", -1);
    check_modalities(op, "rate", rate.size(0));
    RatioOptions in{op};
    in.prepare(tau, 0, lo, hi, "mi", bias, 1, "clamp");
    rate = in_one_piece(rate);
    Tensor rho = torch::stable::new_empty(rate, {rate.size(0)});
#ifdef MMBAL_ON_CUDA
    check(mmbal_ratio_of_rates_cuda(doubles(rate), rate.size(0), in.options, doubles(rho), executor.get()), op);
#else
    check(mmbal_ratio_of_rates(doubles(rate), rate.size(0), in.options, doubles(rho)), op);
#endif
    return rho;
}

} // namespace
} // namespace mmbal

#ifndef MMBAL_ON_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(mmbal, m) {
    m.def("modal_stats(Tensor[] logits, Tensor[] features, Tensor targets, int ignore_index=-100) -> "
          "(Tensor, Tensor, Tensor, Tensor)");
    m.def("update_ratio(Tensor ce_sum, Tensor entropy_sum, Tensor histogram, Tensor rows, int[] dims, float tau, "
          "float offset=0.5, float lo=0.1, float hi=0.9, str mode=\"rate\", float bias=0.0, "
          "float least_entropy=0.05, str guard=\"clamp\") -> (Tensor, Tensor)");
    m.def("ratio_of_rates(Tensor rate, float tau, float lo=0.1, float hi=0.9, float bias=0.0) -> Tensor");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(mmbal, MMBAL_DEVICE, m) {
    m.impl("modal_stats", TORCH_BOX(&mmbal::modal_stats));
    m.impl("update_ratio", TORCH_BOX(&mmbal::update_ratio));
    m.impl("ratio_of_rates", TORCH_BOX(&mmbal::ratio_of_rates));
}
