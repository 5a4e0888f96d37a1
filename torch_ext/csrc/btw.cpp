#include "mmbal/btw.h"

#include <cmath>

#include "modalities.h"
#ifdef MMBAL_ON_CUDA
#include "mmbal/cuda/btw.h"
#endif

namespace mmbal {
namespace {

struct WeightInputs {
    const char *op;
    Tensor kl, mi;
    std::optional<Tensor> present;
    mmbal_btw_options options{};
    mmbal_dtype dtype{};
    int64_t N = 0, M = 0;

    void prepare(double floor, double ceiling, const std::string &mode, double temperature, bool mean_one) {
        check_shape(op, "kl", kl, "[N, M]", {-1, -1});
        dtype = storage_dtype(op, "kl", kl);
        N = kl.size(0), M = kl.size(1);
        check_modalities(op, "kl", M);
        check_shape(op, "mi", mi, "[M]", {M});
        storage_dtype(op, "mi", mi);
        present = check_present(op, present, N, M);
        constexpr double least = MMBAL_BTW_LEAST, most = MMBAL_BTW_MOST;
        STD_TORCH_CHECK(floor >= least, op, ": floor must be at least ", least, ", got ", floor);
        STD_TORCH_CHECK(ceiling >= floor && ceiling <= most, op, ": ceiling must be from floor = ", floor, " to ", most,
                        ", got ", ceiling);
        STD_TORCH_CHECK(mode == "diverge" || mode == "agree", op, ": mode must be diverge or agree, got ", mode);
        STD_TORCH_CHECK(temperature >= least && temperature <= most, op, ": temperature must be from ", least, " to ",
                        most, ", got ", temperature);
        options = {floor, ceiling, temperature, mode == "agree" ? MMBAL_BTW_AGREE : MMBAL_BTW_DIVERGE, mean_one};
        kl = in_one_piece(kl);
        mi = in_one_piece(torch::stable::to(mi, ScalarType::Double));
#ifndef MMBAL_ON_CUDA // there the kernel looks: to read mi here would be to wait for it
        for (int64_t m = 0; m < M; m++)
            STD_TORCH_CHECK(std::isfinite(mi_data()[m]), op, ": mi must be finite for every modality, got ",
                            mi_data()[m], " for ", m);
#endif
    }
    const double *mi_data() const { return static_cast<const double *>(mi.const_data_ptr()); }
};

Tensor btw_weights(Tensor kl, Tensor mi, std::optional<Tensor> present, double floor, double ceiling, std::string mode,
                   double temperature, bool mean_one) {
    const Executor executor(kl);
    WeightInputs in{"btw_weights", kl, mi, present};
    in.prepare(floor, ceiling, mode, temperature, mean_one);
    Tensor weights = empty_real(in.kl, in.dtype, {in.N, in.M});
#ifdef MMBAL_ON_CUDA
    const Workspace workspace(mmbal_btw_weights_workspace_cuda(in.N, in.M), in.kl);
    check(mmbal_btw_weights_cuda(in.dtype, in.kl.const_data_ptr(), in.mi_data(), mask_data(in.present), in.N, in.M,
                                 in.options, weights.mutable_data_ptr(), workspace.data(), executor.get()),
          in.op);
#else
    check(mmbal_btw_weights(in.dtype, in.kl.const_data_ptr(), in.mi_data(), mask_data(in.present), in.N, in.M,
                            in.options, weights.mutable_data_ptr(), executor.get()),
          in.op);
#endif
    return weights;
}

std::tuple<Tensor, Tensor> btw_weights_backward(Tensor dweights, Tensor kl, Tensor mi, std::optional<Tensor> present,
                                                double floor, double ceiling, std::string mode, double temperature,
                                                bool mean_one, std::vector<bool> needed) {
    const Executor executor(kl);
    WeightInputs in{"btw_weights_backward", kl, mi, present};
    in.prepare(floor, ceiling, mode, temperature, mean_one);
    check_shape(in.op, "dw", dweights, "[N, M]", {in.N, in.M});
    check_dtype(in.op, "dw", dweights, real_type(in.dtype));
    dweights = in_one_piece(dweights);
    check_needed(in.op, needed, 2);
    const Gradient dkl(needed[0], in.kl, {in.N, in.M}), dmi(needed[1], in.mi, {in.M});
#ifdef MMBAL_ON_CUDA
    const Workspace workspace(mmbal_btw_weights_workspace_cuda(in.N, in.M), in.kl);
#else
    const Workspace workspace(mmbal_btw_weights_backward_workspace(in.N, in.M));
#endif
    check(MMBAL_KERNEL(mmbal_btw_weights_backward)(
              in.dtype, dweights.const_data_ptr(), in.kl.const_data_ptr(), in.mi_data(), mask_data(in.present), in.N,
              in.M, in.options, dkl.data, static_cast<double *>(dmi.data), workspace.data(), executor.get()),
          in.op);
    return {dkl.tensor, torch::stable::to(dmi.tensor, mi.scalar_type())};
}

void ema_rows_(Tensor table, Tensor index, Tensor weights, double alpha) {
    const char *op = "ema_rows_";
    const Executor executor(table);
    check_shape(op, "table", table, "[S, M]", {-1, -1});
    const mmbal_dtype dtype = storage_dtype(op, "table", table);
    STD_TORCH_CHECK(dtype == MMBAL_F32 || dtype == MMBAL_F64, op, ": table must be float32 or float64, got ",
                    dtype_text(table.scalar_type()));
    STD_TORCH_CHECK(table.is_contiguous(), op, ": table must be contiguous, since it is written in place");
    const int64_t S = table.size(0), M = table.size(1);
    check_modalities(op, "table", M);
    check_shape(op, "index", index, "[N]", {-1});
    check_dtype(op, "index", index, ScalarType::Long);
    const int64_t N = index.size(0);
    check_like(op, "w", weights, "[N, M]", {N, M}, table);
    STD_TORCH_CHECK(alpha >= 0 && alpha <= 1, op, ": alpha must be from 0 to 1, got ", alpha);
    index = in_one_piece(index), weights = in_one_piece(weights);
    const Workspace workspace(MMBAL_KERNEL(mmbal_ema_rows_workspace)(S), table);
    const mmbal_status status =
        MMBAL_KERNEL(mmbal_ema_rows)(dtype, table.mutable_data_ptr(), index_data(index), weights.const_data_ptr(), S, N,
                                     M, alpha, workspace.data(), executor.get());
    STD_TORCH_CHECK(status != MMBAL_INVALID_INDEX, op, ": index must be from 0 to the last row of the table ", S - 1);
    STD_TORCH_CHECK(status != MMBAL_DUPLICATE_INDEX, op, ": index must not name a row twice");
    check(status, op);
}

// Embeddings [N, ...] that all have weights of one dtype, which is returned.
ScalarType check_embeddings(const char *op, const char *name, const std::vector<Tensor> &embeddings, int64_t N) {
    ScalarType real = ScalarType::Float;
    for (size_t m = 0; m < embeddings.size(); m++) {
        const Tensor &h = embeddings[m];
        const std::string which = nth(name, m);
        STD_TORCH_CHECK(h.dim() >= 1 && h.size(0) == N, op, ": ", which, " must be [N, ...] = [", N, ", ...], got ",
                        shape_text(h.sizes()));
        STD_TORCH_CHECK(is_within_reach(h), op, ": ", which, " must be ", device_text(), " like the other arguments");
        const ScalarType real_of_h = real_type(storage_dtype(op, which.c_str(), h));
        STD_TORCH_CHECK(m == 0 || real_of_h == real, op, ": ", name, " must be all of float64, or none, got ", which,
                        " of ", dtype_text(h.scalar_type()));
        real = real_of_h;
    }
    return real;
}

std::vector<Tensor> scale_modalities(std::vector<Tensor> embeddings, Tensor weights) {
    const char *op = "scale_modalities";
    const Executor executor(weights);
    check_shape(op, "w", weights, "[N, M]", {-1, static_cast<int64_t>(embeddings.size())});
    check_modalities(op, "w", weights.size(1));
    storage_dtype(op, "w", weights);
    const int64_t N = weights.size(0), M = weights.size(1);
    const ScalarType real = check_embeddings(op, "embeddings", embeddings, N);
    weights = in_one_piece(torch::stable::to(weights, real));
    std::vector<Tensor> scaled;
    for (int64_t m = 0; m < M; m++) {
        const Tensor h = in_one_piece(embeddings[m]);
        scaled.push_back(empty_kept(h, std::vector<int64_t>(h.sizes().begin(), h.sizes().end())));
        check(MMBAL_KERNEL(mmbal_scale_modality)(storage_dtype(op, "embeddings", h), h.const_data_ptr(),
                                                 weights.const_data_ptr(), m, N, M, row_size(h),
                                                 scaled.back().mutable_data_ptr(), executor.get()),
              op);
    }
    return scaled;
}

Tensor scale_modalities_dweights(std::vector<Tensor> dscaled, std::vector<Tensor> embeddings) {
    const char *op = "scale_modalities_dweights";
    STD_TORCH_CHECK(!embeddings.empty() && dscaled.size() == embeddings.size(), op,
                    ": dscaled must have one tensor for each of the embeddings, got ", dscaled.size(), " for ",
                    embeddings.size());
    const Executor executor(embeddings[0]);
    const int64_t M = static_cast<int64_t>(embeddings.size());
    check_modalities(op, "embeddings", M);
    STD_TORCH_CHECK(embeddings[0].dim() >= 1, op, ": embeddings[0] must be [N, ...], got []");
    const int64_t N = embeddings[0].size(0);
    const ScalarType real = check_embeddings(op, "embeddings", embeddings, N);
    Tensor dweights = torch::stable::new_empty(embeddings[0], {N, M}, real);
    for (int64_t m = 0; m < M; m++) {
        const std::vector<int64_t> sizes(embeddings[m].sizes().begin(), embeddings[m].sizes().end());
        check_like(op, "dscaled", dscaled[m], "as its embedding", sizes, embeddings[m]);
        const Tensor h = in_one_piece(embeddings[m]), dh = in_one_piece(dscaled[m]);
        check(MMBAL_KERNEL(mmbal_scale_modality_dweights)(storage_dtype(op, "embeddings", h), dh.const_data_ptr(),
                                                          h.const_data_ptr(), m, N, M, row_size(h),
                                                          dweights.mutable_data_ptr(), executor.get()),
              op);
    }
    return dweights;
}

} // namespace
} // namespace mmbal

#ifndef MMBAL_ON_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(mmbal, m) {
    m.def("btw_weights(Tensor kl, Tensor mi, Tensor? present=None, float floor=1e-5, float ceiling=1e6, "
          "str mode=\"diverge\", float temperature=1.0, bool mean_one=False) -> Tensor");
    m.def("btw_weights_backward(Tensor dw, Tensor kl, Tensor mi, Tensor? present, float floor, float ceiling, "
          "str mode, float temperature, bool mean_one, bool[] needed) -> (Tensor, Tensor)");
    m.def("ema_rows_(Tensor(a!) table, Tensor index, Tensor w, float alpha) -> ()");
    m.def("scale_modalities(Tensor[] embeddings, Tensor w) -> Tensor[]");
    m.def("scale_modalities_dweights(Tensor[] dscaled, Tensor[] embeddings) -> Tensor");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(mmbal, MMBAL_DEVICE, m) {
    m.impl("btw_weights", TORCH_BOX(&mmbal::btw_weights));
    m.impl("btw_weights_backward", TORCH_BOX(&mmbal::btw_weights_backward));
    m.impl("ema_rows_", TORCH_BOX(&mmbal::ema_rows_));
    m.impl("scale_modalities", TORCH_BOX(&mmbal::scale_modalities));
    m.impl("scale_modalities_dweights", TORCH_BOX(&mmbal::scale_modalities_dweights));
}
