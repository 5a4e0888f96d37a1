#include "mmbal/attribution.h"

#include "modalities.h"
#ifdef MMBAL_ON_CUDA
#include "mmbal/cuda/attribution.h"
#endif

namespace mmbal {
namespace {

using Tensors = std::vector<Tensor>;

// Samples and what is asked of them, contiguous and as the core takes them.
struct AttributionInputs {
    const char *op;
    Tensors grads, embeddings;
    Tensor target;
    std::optional<Tensor> present;
    std::vector<mmbal_attributed> modalities{};
    mmbal_attribution attribution{};

    // grads may be empty: they are not read.
    void prepare(const std::string &pool, const std::string &penalty, double eps) {
        const int64_t M = static_cast<int64_t>(embeddings.size());
        check_modalities(op, "embeddings", M);
        STD_TORCH_CHECK(grads.empty() || grads.size() == embeddings.size(), op,
                        ": grads must have one tensor for each of the embeddings, ", M, ", got ", grads.size());
        STD_TORCH_CHECK(embeddings[0].dim() >= 1, op, ": embeddings[0] must be [B, ...], got []");
        const int64_t B = embeddings[0].size(0);
        const ScalarType type = embeddings[0].scalar_type();
        for (size_t m = 0; m < embeddings.size(); m++) {
            const std::string of_embedding = nth("embeddings", m), of_gradient = nth("grads", m);
            const Tensor &e = embeddings[m];
            STD_TORCH_CHECK(e.dim() >= 1 && e.size(0) == B && row_size(e) >= 1, op, ": ", of_embedding,
                            " must be [B, ...] = [", B, ", ...] with at least one number a sample, got ",
                            shape_text(e.sizes()));
            STD_TORCH_CHECK(is_within_reach(e), op, ": ", of_embedding, " must be ", device_text(),
                            " like the other arguments");
            storage_dtype(op, of_embedding.c_str(), e);
            check_dtype(op, of_embedding.c_str(), e, type);
            if (!grads.empty()) {
                const std::vector<int64_t> sizes(e.sizes().begin(), e.sizes().end());
                check_like(op, of_gradient.c_str(), grads[m], "as its embedding", sizes, e);
                grads[m] = in_one_piece(grads[m]);
            }
            embeddings[m] = in_one_piece(e);
        }
        const bool each = target.dim() == 2;
        check_shape(op, "target_shares", target, each ? "[B, M]" : "[M]",
                    each ? std::vector<int64_t>{B, M} : std::vector<int64_t>{M});
        storage_dtype(op, "target_shares", target);
        target = in_one_piece(torch::stable::to(target, ScalarType::Double));
        present = check_present(op, present, B, M);
        STD_TORCH_CHECK(pool == "l2" || pool == "rms", op, ": pool must be l2 or rms, got ", pool);
        STD_TORCH_CHECK(penalty == "l1" || penalty == "squared" || penalty == "huber", op,
                        ": penalty must be l1, squared or huber, got ", penalty);
        STD_TORCH_CHECK(eps >= 0 && eps < 1, op, ": eps must be from 0 to below 1, got ", eps);
        for (size_t m = 0; m < embeddings.size(); m++)
            modalities.push_back({grads.empty() ? nullptr : grads[m].const_data_ptr(), embeddings[m].const_data_ptr(),
                                  row_size(embeddings[m]), nullptr, nullptr, nullptr, nullptr});
        attribution = {modalities.data(),
                       static_cast<const double *>(target.const_data_ptr()),
                       each ? B : 1,
                       mask_data(present),
                       B,
                       M,
                       storage_dtype(op, "embeddings", embeddings[0]),
                       {pool == "rms" ? MMBAL_POOL_RMS : MMBAL_POOL_L2,
                        penalty == "l1"        ? MMBAL_L1
                        : penalty == "squared" ? MMBAL_SQUARED
                                               : MMBAL_HUBER,
                        eps}};
    }

    Tensor real(std::vector<int64_t> sizes) const {
        return torch::stable::new_empty(embeddings[0], sizes, real_type(attribution.dtype));
    }

    // An input in the dtype of reg and shares, contiguous.
    Tensor real_input(const char *name, const Tensor &t, const char *letters, std::vector<int64_t> sizes) const {
        check_shape(op, name, t, letters, sizes);
        check_dtype(op, name, t, real_type(attribution.dtype));
        return in_one_piece(t);
    }

    // New tensors like the embeddings, one for each.
    Tensors outputs() const {
        Tensors made;
        for (const Tensor &e : embeddings)
            made.push_back(empty_kept(e, std::vector<int64_t>(e.sizes().begin(), e.sizes().end())));
        return made;
    }

    void check_status(mmbal_status status) const {
        STD_TORCH_CHECK(status != MMBAL_INVALID_ARGUMENT, op,
                        ": target_shares must be finite and not negative, with a sum above 0 over the present "
                        "modalities of every sample");
        check(status, op);
    }
};

// What says the device; a check refuses a call without embeddings.
const Tensor &first_of(const Tensors &embeddings, const Tensor &otherwise) {
    return embeddings.empty() ? otherwise : embeddings[0];
}

// The core's function, or that for the GPU, which takes a workspace too.
template <typename Function, typename... Given>
void run(const AttributionInputs &in, const Executor &executor, Function *function, Given... given) {
#ifdef MMBAL_ON_CUDA
    const Workspace workspace(mmbal_attribution_reg_workspace_cuda(in.attribution.B, in.attribution.M),
                              in.embeddings[0]);
    in.check_status(function(&in.attribution, given..., workspace.data(), executor.get()));
#else
    in.check_status(function(&in.attribution, given..., executor.get()));
#endif
}

std::tuple<Tensor, Tensor, Tensor> attribution_reg(Tensors grads, Tensors embeddings, Tensor target_shares,
                                                   std::optional<Tensor> present, std::string pool, std::string penalty,
                                                   double eps) {
    const Executor executor(first_of(embeddings, target_shares));
    AttributionInputs in{"attribution_reg", grads, embeddings, target_shares, present};
    STD_TORCH_CHECK(grads.size() == embeddings.size(), in.op,
                    ": grads must have one tensor for each of the embeddings, ", embeddings.size(), ", got ",
                    grads.size());
    in.prepare(pool, penalty, eps);
    const int64_t B = in.attribution.B, M = in.attribution.M;
    Tensor reg = in.real({B}), shares = in.real({B, M}), magnitudes = in.real({B, M});
    run(in, executor, MMBAL_KERNEL(mmbal_attribution_reg), reg.mutable_data_ptr(), shares.mutable_data_ptr(),
        magnitudes.mutable_data_ptr());
    return {reg, shares, magnitudes};
}

// What is upstream of the three outputs, and the magnitudes.
struct Upstream {
    Tensor dreg, dshares, dmagnitudes, magnitudes;
    void prepare(const AttributionInputs &in) {
        const int64_t B = in.attribution.B, M = in.attribution.M;
        dreg = in.real_input("dreg", dreg, "[B]", {B});
        dshares = in.real_input("dshares", dshares, "[B, M]", {B, M});
        dmagnitudes = in.real_input("dmagnitudes", dmagnitudes, "[B, M]", {B, M});
        magnitudes = in.real_input("magnitudes", magnitudes, "[B, M]", {B, M});
    }
};

std::tuple<Tensors, Tensors> attribution_reg_backward(Tensor dreg, Tensor dshares, Tensor dmagnitudes, Tensors grads,
                                                      Tensors embeddings, Tensor target_shares,
                                                      std::optional<Tensor> present, Tensor magnitudes,
                                                      std::string pool, std::string penalty, double eps,
                                                      bool need_grads, bool need_embeddings) {
    const Executor executor(first_of(embeddings, target_shares));
    AttributionInputs in{"attribution_reg_backward", grads, embeddings, target_shares, present};
    in.prepare(pool, penalty, eps);
    Upstream up{dreg, dshares, dmagnitudes, magnitudes};
    up.prepare(in);
    const Tensors dgrads = need_grads ? in.outputs() : Tensors(),
                  dembeddings = need_embeddings ? in.outputs() : Tensors();
    for (size_t m = 0; m < in.modalities.size(); m++) {
        in.modalities[m].dgradient = need_grads ? dgrads[m].mutable_data_ptr() : nullptr;
        in.modalities[m].dembedding = need_embeddings ? dembeddings[m].mutable_data_ptr() : nullptr;
    }
    run(in, executor, MMBAL_KERNEL(mmbal_attribution_reg_backward), up.dreg.const_data_ptr(),
        up.dshares.const_data_ptr(), up.dmagnitudes.const_data_ptr(), up.magnitudes.const_data_ptr());
    return {dgrads, dembeddings};
}

std::tuple<Tensor, Tensor, Tensor, Tensors, Tensors>
attribution_reg_backward_backward(Tensors ddgrads, Tensors ddembeddings, Tensor dreg, Tensor dshares,
                                  Tensor dmagnitudes, Tensors grads, Tensors embeddings, Tensor target_shares,
                                  std::optional<Tensor> present, Tensor magnitudes, std::string pool,
                                  std::string penalty, double eps) {
    const Executor executor(first_of(embeddings, target_shares));
    AttributionInputs in{"attribution_reg_backward_backward", grads, embeddings, target_shares, present};
    in.prepare(pool, penalty, eps);
    Upstream up{dreg, dshares, dmagnitudes, magnitudes};
    up.prepare(in);
    STD_TORCH_CHECK(ddgrads.size() == in.embeddings.size() && ddembeddings.size() == in.embeddings.size(), in.op,
                    ": ddgrads and ddembeddings must have one tensor for each of the embeddings, ",
                    in.embeddings.size(), ", got ", ddgrads.size(), " and ", ddembeddings.size());
    const int64_t B = in.attribution.B, M = in.attribution.M;
    Tensor ddreg = in.real({B}), ddshares = in.real({B, M}), ddmagnitudes = in.real({B, M});
    Tensors to_grads = in.outputs(), to_embeddings = in.outputs();
    for (size_t m = 0; m < in.modalities.size(); m++) {
        const std::vector<int64_t> sizes(in.embeddings[m].sizes().begin(), in.embeddings[m].sizes().end());
        check_like(in.op, "ddgrads", ddgrads[m], "as its embedding", sizes, in.embeddings[m]);
        check_like(in.op, "ddembeddings", ddembeddings[m], "as its embedding", sizes, in.embeddings[m]);
        ddgrads[m] = in_one_piece(ddgrads[m]), ddembeddings[m] = in_one_piece(ddembeddings[m]);
        mmbal_attributed &of = in.modalities[m];
        of.ddgradient = ddgrads[m].const_data_ptr(), of.ddembedding = ddembeddings[m].const_data_ptr();
        of.dgradient = to_grads[m].mutable_data_ptr(), of.dembedding = to_embeddings[m].mutable_data_ptr();
    }
    run(in, executor, MMBAL_KERNEL(mmbal_attribution_reg_backward_backward), up.dreg.const_data_ptr(),
        up.dshares.const_data_ptr(), up.dmagnitudes.const_data_ptr(), up.magnitudes.const_data_ptr(),
        ddreg.mutable_data_ptr(), ddshares.mutable_data_ptr(), ddmagnitudes.mutable_data_ptr());
    return {ddreg, ddshares, ddmagnitudes, to_grads, to_embeddings};
}

std::tuple<Tensor, Tensor, Tensor, Tensors, Tensor>
attribution_linear(Tensors embeddings, Tensors weights, Tensor logits, Tensor target_shares, Tensor dreg,
                   std::optional<Tensor> present, std::optional<Tensor> classes, std::string score, std::string pool,
                   std::string penalty, double eps) {
    const Executor executor(first_of(embeddings, target_shares));
    AttributionInputs in{"attribution_linear", {}, embeddings, target_shares, present};
    in.prepare(pool, penalty, eps);
    const int64_t B = in.attribution.B, M = in.attribution.M;
    check_like(in.op, "logits", logits, "[B, C]", {B, -1}, in.embeddings[0]);
    const int64_t C = logits.size(1);
    STD_TORCH_CHECK(C >= 1, in.op, ": logits must have at least one class, got [", B, ", ", C, "]");
    const bool joined = weights.size() == 1;
    STD_TORCH_CHECK(joined || static_cast<int64_t>(weights.size()) == M, in.op,
                    ": weights must have one tensor for each of the embeddings, ", M, ", or one for all, got ",
                    weights.size());
    STD_TORCH_CHECK(score == "odds" || score == "logit", in.op, ": score must be odds or logit, got ", score);
    int64_t width = 0; // of all modalities side by side
    for (const mmbal_attributed &of : in.modalities) width += of.d;
    Tensors dweights;
    for (size_t m = 0; m < weights.size(); m++) {
        const int64_t columns = joined ? width : in.modalities[m].d;
        check_like(in.op, nth("weights", m).c_str(), weights[m], joined ? "[C, sum of d]" : "[C, d]", {C, columns},
                   in.embeddings[0]);
        weights[m] = in_one_piece(weights[m]);
        dweights.push_back(empty_kept(weights[m], {C, columns}));
    }
    std::vector<const void *> weight_data;
    std::vector<void *> dweight_data;
    int64_t first = 0; // byte of a modality's columns
    for (size_t m = 0; m < in.modalities.size(); m++) {
        const size_t of = joined ? 0 : m;
        weight_data.push_back(static_cast<const char *>(weights[of].const_data_ptr()) + first);
        dweight_data.push_back(static_cast<char *>(dweights[of].mutable_data_ptr()) + first);
        first += joined ? in.modalities[m].d * static_cast<int64_t>(weights[of].element_size()) : 0;
    }
    logits = in_one_piece(logits);
    if (classes) {
        check_shape(in.op, "classes", *classes, "[B]", {B});
        check_dtype(in.op, "classes", *classes, ScalarType::Long);
        classes = in_one_piece(*classes);
    }
    dreg = in.real_input("dreg", dreg, "[B]", {B});
    Tensor reg = in.real({B}), shares = in.real({B, M}), magnitudes = in.real({B, M});
    Tensor dbias = torch::stable::new_empty(logits, {C});
    const mmbal_linear_head head{weight_data.data(),
                                 joined ? width : 0,
                                 logits.const_data_ptr(),
                                 classes ? index_data(*classes) : nullptr,
                                 C,
                                 score == "logit" ? MMBAL_SCORE_LOGIT : MMBAL_SCORE_ODDS};
#ifdef MMBAL_ON_CUDA
    const Workspace workspace(mmbal_attribution_linear_workspace_cuda(&in.attribution, &head, dweight_data.data()),
                              logits);
#else
    const Workspace workspace(mmbal_attribution_linear_workspace(&in.attribution, C, executor.get()));
#endif
    const mmbal_status status = MMBAL_KERNEL(mmbal_attribution_linear)(
        &in.attribution, &head, dreg.const_data_ptr(), reg.mutable_data_ptr(), shares.mutable_data_ptr(),
        magnitudes.mutable_data_ptr(), dweight_data.data(), dbias.mutable_data_ptr(), workspace.data(), executor.get());
    STD_TORCH_CHECK(status != MMBAL_INVALID_INDEX, in.op, ": classes must be from 0 to C - 1 = ", C - 1);
    in.check_status(status);
    return {reg, shares, magnitudes, dweights, dbias};
}

} // namespace
} // namespace mmbal

#ifndef MMBAL_ON_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(mmbal, m) {
    m.def("attribution_reg(Tensor[] grads, Tensor[] embeddings, Tensor target_shares, Tensor? present=None, "
          "str pool=\"l2\", str penalty=\"l1\", float eps=1e-12) -> (Tensor, Tensor, Tensor)");
    m.def("attribution_reg_backward(Tensor dreg, Tensor dshares, Tensor dmagnitudes, Tensor[] grads, "
          "Tensor[] embeddings, Tensor target_shares, Tensor? present, Tensor magnitudes, str pool, str penalty, "
          "float eps, bool need_grads=True, bool need_embeddings=True) -> (Tensor[], Tensor[])");
    m.def("attribution_reg_backward_backward(Tensor[] ddgrads, Tensor[] ddembeddings, Tensor dreg, Tensor dshares, "
          "Tensor dmagnitudes, Tensor[] grads, Tensor[] embeddings, Tensor target_shares, Tensor? present, "
          "Tensor magnitudes, str pool, str penalty, float eps) -> (Tensor, Tensor, Tensor, Tensor[], Tensor[])");
    m.def("attribution_linear(Tensor[] embeddings, Tensor[] weights, Tensor logits, Tensor target_shares, Tensor dreg, "
          "Tensor? present=None, Tensor? classes=None, str score=\"odds\", str pool=\"l2\", str penalty=\"l1\", "
          "float eps=1e-12) -> (Tensor, Tensor, Tensor, Tensor[], Tensor)");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(mmbal, MMBAL_DEVICE, m) {
    m.impl("attribution_reg", TORCH_BOX(&mmbal::attribution_reg));
    m.impl("attribution_reg_backward", TORCH_BOX(&mmbal::attribution_reg_backward));
    m.impl("attribution_reg_backward_backward", TORCH_BOX(&mmbal::attribution_reg_backward_backward));
    m.impl("attribution_linear", TORCH_BOX(&mmbal::attribution_linear));
}
