#include "mmbal/sampling.h"

#include "sampler.h"
#ifdef MMBAL_ON_CUDA
#include "mmbal/cuda/sampling.h"
#endif

namespace mmbal {
namespace {

mmbal_dtype weight_dtype(const char *op, const Tensor &w) {
    check_shape(op, "w", w, "[S, N]", {-1, -1});
    const mmbal_dtype dtype = storage_dtype(op, "w", w);
    STD_TORCH_CHECK(dtype == MMBAL_F32 || dtype == MMBAL_F64, op, ": w must be float32 or float64, got ",
                    dtype_text(w.scalar_type()));
    return dtype;
}

Tensor weighted_sample(Tensor w, Tensor k, int64_t seed, int64_t step) {
    const char *op = "weighted_sample";
    const Executor executor(w);
    const mmbal_dtype dtype = weight_dtype(op, w);
    const int64_t S = w.size(0), N = w.size(1);
    check_shape(op, "k", k, "[S]", {S});
    check_dtype(op, "k", k, ScalarType::Long);
    check_step(op, step);
    w = in_one_piece(w), k = in_one_piece(k);
#ifndef MMBAL_ON_CUDA // there the kernel looks: to read k here would be to wait for it
    for (int64_t s = 0; s < S; s++)
        STD_TORCH_CHECK(index_data(k)[s] >= 0 && index_data(k)[s] <= N, op, ": k must be from 0 to N = ", N, ", got ",
                        index_data(k)[s], " for row ", s);
    const int64_t bytes = mmbal_weighted_sample_workspace(N, executor.get());
#else
    STD_TORCH_CHECK(N <= UINT32_MAX, op, ": w must have less than 2^32 columns on a GPU, got ", N);
    const int64_t bytes = mmbal_weighted_sample_workspace_cuda(S, N);
#endif
    Tensor mask = torch::stable::new_empty(w, {S, N}, ScalarType::Bool);
    const Workspace workspace(bytes, w);
    const mmbal_status status = MMBAL_KERNEL(mmbal_weighted_sample)(
        dtype, w.const_data_ptr(), index_data(k), S, N, seed, step, static_cast<uint8_t *>(mask.mutable_data_ptr()),
        workspace.data(), executor.get());
    STD_TORCH_CHECK(status != MMBAL_INVALID_ARGUMENT, op, ": w must be finite and not negative");
    check(status, op);
    return mask;
}

std::tuple<Tensor, Tensor> waterfill(Tensor w, Tensor kappa, double lam) {
    const char *op = "waterfill";
    const Executor executor(w);
    const mmbal_dtype dtype = weight_dtype(op, w);
    const int64_t S = w.size(0), N = w.size(1);
    check_shape(op, "kappa", kappa, "[S]", {S});
    storage_dtype(op, "kappa", kappa);
    STD_TORCH_CHECK(lam >= 0 && lam <= 1, op, ": lam must be from 0 to 1, got ", lam);
    w = in_one_piece(w);
    kappa = in_one_piece(torch::stable::to(kappa, ScalarType::Double));
    Tensor p = torch::stable::new_empty(w, {S, N}), c = torch::stable::new_empty(w, {S}, ScalarType::Double);
#ifdef MMBAL_ON_CUDA
    STD_TORCH_CHECK(N <= UINT32_MAX, op, ": w must have less than 2^32 columns on a GPU, got ", N);
    const int64_t bytes = mmbal_waterfill_workspace_cuda(S, N);
#else
    const int64_t bytes = mmbal_waterfill_workspace(N, executor.get());
#endif
    const Workspace workspace(bytes, w);
    const mmbal_status status = MMBAL_KERNEL(mmbal_waterfill)(
        dtype, w.const_data_ptr(), static_cast<const double *>(kappa.const_data_ptr()), S, N, lam, p.mutable_data_ptr(),
        static_cast<double *>(c.mutable_data_ptr()), workspace.data(), executor.get());
    STD_TORCH_CHECK(
        status != MMBAL_INVALID_ARGUMENT, op,
        ": w must be finite and not negative, kappa from 0 to the number of weights that can be drawn (N = ", N,
        ", without the zeros where lam = 0)");
    check(status, op);
    return {p, c};
}

std::tuple<Tensor, Tensor> mask_units(Tensor energy, std::vector<int64_t> segments, Tensor rho, int64_t seed,
                                      int64_t step, std::string sampler, double lam, bool unbiased) {
    const char *op = "mask_units";
    const Executor executor(energy);
    const mmbal_mask_options options = mask_options(op, sampler, lam, unbiased);
    rho = check_rho(op, rho, unbiased);
    check_step(op, step);
    constexpr size_t numbers = 4;
    STD_TORCH_CHECK(segments.size() % numbers == 0, op, ": segments must have ", numbers,
                    " numbers for each tensor, groups, units, modality, id; got ", segments.size());
    std::vector<mmbal_segment> groups;
    int64_t U = 0;
    for (size_t t = 0; t < segments.size(); t += numbers) {
        const int64_t *of = segments.data() + t;
        check_tensor_numbers(op, of[2], of[3], rho.size(0));
        STD_TORCH_CHECK(of[0] >= 0 && of[1] >= 0 && of[1] <= INT32_MAX, op,
                        ": segments must have groups and units of at least 0, units below 2^31, got ", of[0], " and ",
                        of[1]);
        for (int64_t group = 0; group < of[0]; group++, U += of[1])
            groups.push_back({U, of[1], of[2], of[3], group * of[1]});
    }
    check_shape(op, "energy", energy, "[U]", {U});
    check_dtype(op, "energy", energy, ScalarType::Double);
    energy = in_one_piece(energy);
    const int64_t S = static_cast<int64_t>(groups.size());
    Tensor scale = torch::stable::new_empty(energy, {U}), probability = torch::stable::new_empty(energy, {U});
#ifdef MMBAL_ON_CUDA
    const int64_t bytes = mmbal_mask_units_workspace_cuda(U, S);
#else
    const int64_t bytes = mmbal_mask_units_workspace(groups.data(), S, executor.get());
#endif
    const Workspace workspace(bytes, energy);
    check(MMBAL_KERNEL(mmbal_mask_units)(static_cast<const double *>(energy.const_data_ptr()), groups.data(),
                                         static_cast<const double *>(rho.const_data_ptr()), U, S, rho.size(0), seed,
                                         step, options, static_cast<double *>(scale.mutable_data_ptr()),
                                         static_cast<double *>(probability.mutable_data_ptr()), workspace.data(),
                                         executor.get()),
          op);
    return {scale, probability};
}

} // namespace
} // namespace mmbal

#ifndef MMBAL_ON_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(mmbal, m) {
    m.def("weighted_sample(Tensor w, Tensor k, int seed, int step) -> Tensor");
    m.def("waterfill(Tensor w, Tensor kappa, float lam) -> (Tensor, Tensor)");
    m.def("mask_units(Tensor energy, int[] segments, Tensor rho, int seed, int step, str sampler=\"bottomk\", float "
          "lam=0.5, bool unbiased=False) -> (Tensor, Tensor)");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(mmbal, MMBAL_DEVICE, m) {
    m.impl("weighted_sample", TORCH_BOX(&mmbal::weighted_sample));
    m.impl("waterfill", TORCH_BOX(&mmbal::waterfill));
    m.impl("mask_units", TORCH_BOX(&mmbal::mask_units));
}
