#include "mmbal/alignment.h"

#include <cmath>

#include "modalities.h"
#ifdef MMBAL_ON_CUDA
#include "mmbal/cuda/alignment.h"
#endif

namespace mmbal {
namespace {

// The arguments that forward and backward share, checked and contiguous.
struct AlignInputs {
    const char *op;
    Tensor pred, target, source, target_embedding;
    std::optional<Tensor> group_ids, present;
    mmbal_alignment alignment{};

    void prepare(int64_t offset, double tau, double alpha, const std::string &regression, double beta, bool symmetric) {
        mmbal_alignment &t = alignment;
        check_shape(op, "pred", pred, "[B, D]", {-1, -1});
        t.dtype = storage_dtype(op, "pred", pred);
        t.B = pred.size(0), t.D = pred.size(1);
        check_like(op, "target", target, "[B, D]", {t.B, t.D}, pred);
        check_like(op, "source_embedding", source, "[A, C]", {-1, -1}, pred);
        t.A = source.size(0), t.C = source.size(1), t.offset = offset;
        check_like(op, "target_embedding", target_embedding, "[A, C]", {t.A, t.C}, pred);
        STD_TORCH_CHECK(t.D >= 1, op, ": pred must have at least one column, got ", shape_text(pred.sizes()));
        STD_TORCH_CHECK(t.C >= 1, op, ": source_embedding must have at least one column, got ",
                        shape_text(source.sizes()));
        STD_TORCH_CHECK(t.A >= t.B, op, ": source_embedding must have a row for each of the ", t.B, " of pred, got ",
                        shape_text(source.sizes()));
        STD_TORCH_CHECK(offset >= 0 && offset <= t.A - t.B, op, ": offset must be from 0 to A - B = ", t.A - t.B,
                        ", got ", offset);
        if (group_ids) {
            check_shape(op, "group_ids", *group_ids, "[A]", {t.A});
            check_dtype(op, "group_ids", *group_ids, ScalarType::Long);
        }
        if (present) {
            check_shape(op, "present", *present, "[A]", {t.A});
            check_dtype(op, "present", *present, ScalarType::Bool);
        }
        STD_TORCH_CHECK(tau >= 1e-30 && tau <= 1e30, op, ": tau must be from 1e-30 to 1e30, got ", tau);
        STD_TORCH_CHECK(alpha >= 0 && alpha <= 1, op, ": alpha must be from 0 to 1, got ", alpha);
        STD_TORCH_CHECK(beta >= 0 && std::isfinite(beta), op, ": beta must be finite and not negative, got ", beta);
        STD_TORCH_CHECK(mmbal_regression_from_name(regression.c_str(), &t.regression), op,
                        ": regression must be smooth_l1, mse, l2 or cosine, got ", regression);
        t.tau = tau, t.alpha = alpha, t.beta = beta, t.symmetric = symmetric;

        pred = in_one_piece(pred), target = in_one_piece(target);
        source = in_one_piece(source), target_embedding = in_one_piece(target_embedding);
        group_ids = in_one_piece(group_ids), present = in_one_piece(present);
        t.pred = pred.const_data_ptr(), t.target = target.const_data_ptr();
        t.source_embedding = source.const_data_ptr(), t.target_embedding = target_embedding.const_data_ptr();
        t.groups = group_ids ? index_data(*group_ids) : nullptr;
        t.present = mask_data(present);
    }

    Tensor real(const std::vector<int64_t> &sizes) const {
        return torch::stable::new_empty(pred, sizes, real_type(alignment.dtype));
    }

    Tensor real_input(const char *name, const Tensor &t, const char *letters, const std::vector<int64_t> &sizes) const {
        check_shape(op, name, t, letters, sizes);
        check_dtype(op, name, t, real_type(alignment.dtype));
        return in_one_piece(t);
    }
};

std::tuple<Tensor, Tensor, Tensor, Tensor> align_loss(Tensor pred, Tensor target, Tensor source_embedding,
                                                      Tensor target_embedding, std::optional<Tensor> group_ids,
                                                      std::optional<Tensor> present, int64_t offset, double tau,
                                                      double alpha, std::string regression, double beta,
                                                      bool symmetric) {
    const Executor executor(pred);
    AlignInputs in{"align_loss", pred, target, source_embedding, target_embedding, group_ids, present};
    in.prepare(offset, tau, alpha, regression, beta, symmetric);
    Tensor loss = in.real({}), of_regression = in.real({}), contrastive = in.real({});
    Tensor normalizers = in.real({2, in.alignment.B});
#ifdef MMBAL_ON_CUDA
    const Workspace workspace(mmbal_align_loss_workspace_cuda(&in.alignment), in.pred);
#else
    const Workspace workspace(mmbal_align_loss_workspace(&in.alignment, executor.workers()));
#endif
    check(MMBAL_KERNEL(mmbal_align_loss)(&in.alignment, loss.mutable_data_ptr(), of_regression.mutable_data_ptr(),
                                         contrastive.mutable_data_ptr(), normalizers.mutable_data_ptr(),
                                         workspace.data(), executor.get()),
          in.op);
    return {loss, of_regression, contrastive, normalizers};
}

// needed: of pred, target, source_embedding and target_embedding.
std::tuple<Tensor, Tensor, Tensor, Tensor>
align_loss_backward(Tensor dloss, Tensor dregression, Tensor dcontrastive, Tensor pred, Tensor target,
                    Tensor source_embedding, Tensor target_embedding, Tensor normalizers,
                    std::optional<Tensor> group_ids, std::optional<Tensor> present, int64_t offset, double tau,
                    double alpha, std::string regression, double beta, bool symmetric, std::vector<bool> needed) {
    const Executor executor(pred);
    AlignInputs in{"align_loss_backward", pred, target, source_embedding, target_embedding, group_ids, present};
    in.prepare(offset, tau, alpha, regression, beta, symmetric);
    const auto &[B, D, A, C] = std::tie(in.alignment.B, in.alignment.D, in.alignment.A, in.alignment.C);
    STD_TORCH_CHECK(needed.size() == 4, in.op, ": needed must have 4 entries, got ", needed.size());
    dloss = in.real_input("dloss", dloss, "[]", {});
    dregression = in.real_input("dregression", dregression, "[]", {});
    dcontrastive = in.real_input("dcontrastive", dcontrastive, "[]", {});
    normalizers = in.real_input("normalizers", normalizers, "[2, B]", {2, B});
    const Gradient dpred(needed[0], in.pred, {B, D}), dtarget(needed[1], in.pred, {B, D});
    const Gradient dsource(needed[2], in.pred, {A, C}), dtarget_embedding(needed[3], in.pred, {A, C});
    const mmbal_alignment_gradients gradients{dpred.data, dtarget.data, dsource.data, dtarget_embedding.data};
#ifdef MMBAL_ON_CUDA
    const Workspace workspace(mmbal_align_loss_backward_workspace_cuda(&in.alignment, &gradients), in.pred);
#else
    const Workspace workspace(mmbal_align_loss_backward_workspace(&in.alignment, &gradients, executor.workers()));
#endif
    check(MMBAL_KERNEL(mmbal_align_loss_backward)(&in.alignment, dloss.const_data_ptr(), dregression.const_data_ptr(),
                                                  dcontrastive.const_data_ptr(), normalizers.const_data_ptr(),
                                                  &gradients, workspace.data(), executor.get()),
          in.op);
    return {dpred.tensor, dtarget.tensor, dsource.tensor, dtarget_embedding.tensor};
}

} // namespace
} // namespace mmbal

#ifndef MMBAL_ON_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(mmbal, m) {
    m.def("align_loss(Tensor pred, Tensor target, Tensor source_embedding, Tensor target_embedding, "
          "Tensor? group_ids=None, Tensor? present=None, int offset=0, float tau=0.03, float alpha=0.5, "
          "str regression=\"smooth_l1\", float beta=1.0, bool symmetric=True) -> (Tensor, Tensor, Tensor, Tensor)");
    m.def("align_loss_backward(Tensor dloss, Tensor dregression, Tensor dcontrastive, Tensor pred, Tensor target, "
          "Tensor source_embedding, Tensor target_embedding, Tensor normalizers, Tensor? group_ids, Tensor? present, "
          "int offset, float tau, float alpha, str regression, float beta, bool symmetric, bool[] needed) "
          "-> (Tensor, Tensor, Tensor, Tensor)");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(mmbal, MMBAL_DEVICE, m) {
    m.impl("align_loss", TORCH_BOX(&mmbal::align_loss));
    m.impl("align_loss_backward", TORCH_BOX(&mmbal::align_loss_backward));
}
