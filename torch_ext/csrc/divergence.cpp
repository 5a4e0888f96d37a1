#include "mmbal/divergence.h"

#include <cmath>

#include "modalities.h"
#ifdef MMBAL_ON_CUDA
#include "mmbal/cuda/divergence.h"
#endif

namespace mmbal {
namespace {

// mu and what belongs to it, checked and contiguous; the Gaussian has standard deviations, the residual KL a target.
struct NormalInputs {
    const char *op;
    Tensor mu, fused_mu;
    std::optional<Tensor> log_sigma, fused_log_sigma, target;
    mmbal_dtype dtype{};
    int64_t N = 0, M = 0;

    void prepare() {
        check_shape(op, "mu", mu, "[N, M]", {-1, -1});
        dtype = storage_dtype(op, "mu", mu);
        N = mu.size(0), M = mu.size(1);
        check_modalities(op, "mu", M);
        if (log_sigma) check_like(op, "log_sigma", *log_sigma, "[N, M]", {N, M}, mu);
        check_like(op, "fused_mu", fused_mu, "[N]", {N}, mu);
        if (fused_log_sigma) check_like(op, "fused_log_sigma", *fused_log_sigma, "[N]", {N}, mu);
        if (target) check_like(op, "target", *target, "[N]", {N}, mu);
        mu = in_one_piece(mu), fused_mu = in_one_piece(fused_mu);
        log_sigma = in_one_piece(log_sigma), fused_log_sigma = in_one_piece(fused_log_sigma),
        target = in_one_piece(target);
    }
    Tensor check_dkl(const Tensor &dkl) const {
        check_shape(op, "dkl", dkl, "[N, M]", {N, M});
        check_dtype(op, "dkl", dkl, real_type(dtype));
        return in_one_piece(dkl);
    }
};

void check_sigma_min(const char *op, double sigma_min) {
    STD_TORCH_CHECK(sigma_min >= MMBAL_LEAST_SIGMA && std::isfinite(sigma_min), op,
                    ": sigma_min must be finite and at least ", MMBAL_LEAST_SIGMA, ", got ", sigma_min);
}

Tensor gaussian_kl(Tensor mu, Tensor log_sigma, Tensor fused_mu, Tensor fused_log_sigma) {
    const Executor executor(mu);
    NormalInputs in{"gaussian_kl", mu, fused_mu, log_sigma, fused_log_sigma, std::nullopt};
    in.prepare();
    Tensor kl = empty_real(in.mu, in.dtype, {in.N, in.M});
    check(MMBAL_KERNEL(mmbal_gaussian_kl)(in.dtype, in.mu.const_data_ptr(), data_or_null(in.log_sigma),
                                          in.fused_mu.const_data_ptr(), data_or_null(in.fused_log_sigma), in.N, in.M,
                                          kl.mutable_data_ptr(), executor.get()),
          in.op);
    return kl;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> gaussian_kl_backward(Tensor dkl, Tensor mu, Tensor log_sigma,
                                                                Tensor fused_mu, Tensor fused_log_sigma,
                                                                std::vector<bool> needed) {
    const Executor executor(mu);
    NormalInputs in{"gaussian_kl_backward", mu, fused_mu, log_sigma, fused_log_sigma, std::nullopt};
    in.prepare();
    dkl = in.check_dkl(dkl);
    check_needed(in.op, needed, 4);
    const Gradient dmu(needed[0], in.mu, {in.N, in.M}), dlog_sigma(needed[1], in.mu, {in.N, in.M});
    const Gradient dfused_mu(needed[2], in.mu, {in.N}), dfused_log_sigma(needed[3], in.mu, {in.N});
    check(MMBAL_KERNEL(mmbal_gaussian_kl_backward)(
              in.dtype, dkl.const_data_ptr(), in.mu.const_data_ptr(), data_or_null(in.log_sigma),
              in.fused_mu.const_data_ptr(), data_or_null(in.fused_log_sigma), in.N, in.M, dmu.data, dlog_sigma.data,
              dfused_mu.data, dfused_log_sigma.data, executor.get()),
          in.op);
    return {dmu.tensor, dlog_sigma.tensor, dfused_mu.tensor, dfused_log_sigma.tensor};
}

Tensor residual_kl(Tensor mu, Tensor fused_mu, Tensor target, double sigma_min) {
    const Executor executor(mu);
    NormalInputs in{"residual_kl", mu, fused_mu, std::nullopt, std::nullopt, target};
    in.prepare();
    check_sigma_min(in.op, sigma_min);
    Tensor kl = empty_real(in.mu, in.dtype, {in.N, in.M});
    check(MMBAL_KERNEL(mmbal_residual_kl)(in.dtype, in.mu.const_data_ptr(), in.fused_mu.const_data_ptr(),
                                          data_or_null(in.target), in.N, in.M, sigma_min, kl.mutable_data_ptr(),
                                          executor.get()),
          in.op);
    return kl;
}

std::tuple<Tensor, Tensor> residual_kl_backward(Tensor dkl, Tensor mu, Tensor fused_mu, Tensor target, double sigma_min,
                                                std::vector<bool> needed) {
    const Executor executor(mu);
    NormalInputs in{"residual_kl_backward", mu, fused_mu, std::nullopt, std::nullopt, target};
    in.prepare();
    check_sigma_min(in.op, sigma_min);
    dkl = in.check_dkl(dkl);
    check_needed(in.op, needed, 2);
    const Gradient dmu(needed[0], in.mu, {in.N, in.M}), dfused_mu(needed[1], in.mu, {in.N});
    check(MMBAL_KERNEL(mmbal_residual_kl_backward)(in.dtype, dkl.const_data_ptr(), in.mu.const_data_ptr(),
                                                   in.fused_mu.const_data_ptr(), data_or_null(in.target), in.N, in.M,
                                                   sigma_min, dmu.data, dfused_mu.data, executor.get()),
          in.op);
    return {dmu.tensor, dfused_mu.tensor};
}

struct CategoricalInputs {
    const char *op;
    Tensor logits, fused_logits;
    mmbal_dtype dtype{};
    int64_t M = 0, N = 0, C = 0;

    void prepare() {
        check_shape(op, "logits", logits, "[M, N, C]", {-1, -1, -1});
        dtype = storage_dtype(op, "logits", logits);
        M = logits.size(0), N = logits.size(1), C = logits.size(2);
        check_modalities(op, "logits", M);
        STD_TORCH_CHECK(C >= 1, op, ": logits must have at least one class, got ", shape_text(logits.sizes()));
        check_like(op, "fused_logits", fused_logits, "[N, C]", {N, C}, logits);
        logits = in_one_piece(logits), fused_logits = in_one_piece(fused_logits);
    }
    Workspace workspace([[maybe_unused]] const Executor &executor) const {
#ifdef MMBAL_ON_CUDA
        return Workspace(mmbal_categorical_kl_workspace_cuda(dtype, M, N), logits);
#else
        return Workspace(mmbal_categorical_kl_workspace(dtype, C, executor.get()));
#endif
    }
};

Tensor categorical_kl(Tensor logits, Tensor fused_logits, bool reverse) {
    const Executor executor(logits);
    CategoricalInputs in{"categorical_kl", logits, fused_logits};
    in.prepare();
    Tensor kl = empty_real(in.logits, in.dtype, {in.N, in.M});
#ifdef MMBAL_ON_CUDA
    check(mmbal_categorical_kl_cuda(in.dtype, in.logits.const_data_ptr(), in.fused_logits.const_data_ptr(), in.M, in.N,
                                    in.C, reverse, kl.mutable_data_ptr(), executor.get()),
          in.op);
#else
    const Workspace workspace = in.workspace(executor);
    check(mmbal_categorical_kl(in.dtype, in.logits.const_data_ptr(), in.fused_logits.const_data_ptr(), in.M, in.N, in.C,
                               reverse, kl.mutable_data_ptr(), workspace.data(), executor.get()),
          in.op);
#endif
    return kl;
}

std::tuple<Tensor, Tensor> categorical_kl_backward(Tensor dkl, Tensor logits, Tensor fused_logits, bool reverse,
                                                   std::vector<bool> needed) {
    const Executor executor(logits);
    CategoricalInputs in{"categorical_kl_backward", logits, fused_logits};
    in.prepare();
    check_shape(in.op, "dkl", dkl, "[N, M]", {in.N, in.M});
    check_dtype(in.op, "dkl", dkl, real_type(in.dtype));
    dkl = in_one_piece(dkl);
    check_needed(in.op, needed, 2);
    const Gradient dlogits(needed[0], in.logits, {in.M, in.N, in.C}), dfused(needed[1], in.logits, {in.N, in.C});
    const Workspace workspace = in.workspace(executor);
    check(MMBAL_KERNEL(mmbal_categorical_kl_backward)(in.dtype, dkl.const_data_ptr(), in.logits.const_data_ptr(),
                                                      in.fused_logits.const_data_ptr(), in.M, in.N, in.C, reverse,
                                                      dlogits.data, dfused.data, workspace.data(), executor.get()),
          in.op);
    return {dlogits.tensor, dfused.tensor};
}

} // namespace
} // namespace mmbal

#ifndef MMBAL_ON_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(mmbal, m) {
    m.def("gaussian_kl(Tensor mu, Tensor log_sigma, Tensor fused_mu, Tensor fused_log_sigma) -> Tensor");
    m.def("gaussian_kl_backward(Tensor dkl, Tensor mu, Tensor log_sigma, Tensor fused_mu, Tensor fused_log_sigma, "
          "bool[] needed) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def("residual_kl(Tensor mu, Tensor fused_mu, Tensor target, float sigma_min) -> Tensor");
    m.def("residual_kl_backward(Tensor dkl, Tensor mu, Tensor fused_mu, Tensor target, float sigma_min, "
          "bool[] needed) -> (Tensor, Tensor)");
    m.def("categorical_kl(Tensor logits, Tensor fused_logits, bool reverse=False) -> Tensor");
    m.def("categorical_kl_backward(Tensor dkl, Tensor logits, Tensor fused_logits, bool reverse, bool[] needed) "
          "-> (Tensor, Tensor)");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(mmbal, MMBAL_DEVICE, m) {
    m.impl("gaussian_kl", TORCH_BOX(&mmbal::gaussian_kl));
    m.impl("gaussian_kl_backward", TORCH_BOX(&mmbal::gaussian_kl_backward));
    m.impl("residual_kl", TORCH_BOX(&mmbal::residual_kl));
    m.impl("residual_kl_backward", TORCH_BOX(&mmbal::residual_kl_backward));
    m.impl("categorical_kl", TORCH_BOX(&mmbal::categorical_kl));
    m.impl("categorical_kl_backward", TORCH_BOX(&mmbal::categorical_kl_backward));
}
