#include "mmbal/mutual_info.h"

#include <cmath>

#include "modalities.h"
#ifdef MMBAL_ON_CUDA
#include "mmbal/cuda/mutual_info.h"
#endif

namespace mmbal {
namespace {

Tensor ksg_mutual_info(Tensor x, Tensor y, std::optional<Tensor> present, int64_t neighbors, bool standardize,
                       double jitter, int64_t seed) {
    const char *op = "ksg_mutual_info";
    const Executor executor(x);
    check_shape(op, "x", x, "[N, M]", {-1, -1});
    const mmbal_dtype dtype = storage_dtype(op, "x", x);
    const int64_t N = x.size(0), M = x.size(1);
    STD_TORCH_CHECK(M >= 1, op, ": x must have at least one modality, got ", shape_text(x.sizes()));
    check_like(op, "y", y, "[N]", {N}, x);
    present = check_present(op, present, N, M);
    STD_TORCH_CHECK(neighbors >= 1 && neighbors <= MMBAL_MAX_NEIGHBORS, op, ": neighbors must be from 1 to ",
                    static_cast<int64_t>(MMBAL_MAX_NEIGHBORS), ", got ", neighbors);
    STD_TORCH_CHECK(N > neighbors, op, ": x must have more samples than neighbors = ", neighbors, ", got ", N);
    STD_TORCH_CHECK(N <= INT32_MAX, op, ": x must have fewer than 2^31 samples, got ", N);
    STD_TORCH_CHECK(jitter >= 0 && std::isfinite(jitter), op, ": jitter must be finite and not negative, got ", jitter);
    x = in_one_piece(x), y = in_one_piece(y);
    Tensor mi = torch::stable::new_empty(x, {M}, ScalarType::Double);
#ifdef MMBAL_ON_CUDA
    const Workspace workspace(mmbal_ksg_mutual_info_workspace_cuda(N, M), x);
#else
    const Workspace workspace(mmbal_ksg_mutual_info_workspace(N, M, executor.get()));
#endif
    check(MMBAL_KERNEL(mmbal_ksg_mutual_info)(dtype, x.const_data_ptr(), y.const_data_ptr(), mask_data(present), N, M,
                                              neighbors, standardize, jitter, static_cast<uint64_t>(seed),
                                              static_cast<double *>(mi.mutable_data_ptr()), workspace.data(),
                                              executor.get()),
          op);
    return mi;
}

Tensor discrete_mutual_info(Tensor a, Tensor b, std::optional<Tensor> present, int64_t num_classes) {
    const char *op = "discrete_mutual_info";
    const Executor executor(a);
    check_shape(op, "a", a, "[M, N]", {-1, -1});
    check_dtype(op, "a", a, ScalarType::Long);
    const int64_t M = a.size(0), N = a.size(1);
    STD_TORCH_CHECK(M >= 1, op, ": a must have at least one modality, got ", shape_text(a.sizes()));
    check_like(op, "b", b, "[N]", {N}, a);
    present = check_present(op, present, N, M);
    // A modality's table of as many classes squared is 8 GiB.
    constexpr int64_t most_classes = 32768;
    STD_TORCH_CHECK(num_classes == -1 || (num_classes >= 1 && num_classes <= most_classes), op,
                    ": num_classes must be from 1 to ", most_classes, ", or -1 to find it, got ", num_classes);
    a = in_one_piece(a), b = in_one_piece(b);
#ifdef MMBAL_ON_CUDA // pairs are sorted: there is no table whose size waits for the largest class
    static_assert(MMBAL_MOST_SORTED_CLASSES == most_classes);
    if (num_classes == -1) num_classes = most_classes;
    const Workspace workspace(mmbal_discrete_mutual_info_workspace_cuda(M, N), a);
#else
    if (num_classes == -1) {
        const mmbal_status counted =
            mmbal_count_classes(index_data(a), index_data(b), mask_data(present), M, N, &num_classes);
        STD_TORCH_CHECK(counted == MMBAL_OK, op, ": a and b must be classes from 0 to 2^63 - 2, got another");
        STD_TORCH_CHECK(num_classes <= most_classes, op, ": a and b must be classes below ", most_classes, ", got ",
                        num_classes - 1);
    }
    const Workspace workspace(mmbal_discrete_mutual_info_workspace(M, num_classes));
#endif
    Tensor mi = torch::stable::new_empty(a, {M}, ScalarType::Double);
    const mmbal_status status = MMBAL_KERNEL(mmbal_discrete_mutual_info)(
        index_data(a), index_data(b), mask_data(present), M, N, num_classes,
        static_cast<double *>(mi.mutable_data_ptr()), workspace.data(), executor.get());
    STD_TORCH_CHECK(status != MMBAL_INVALID_INDEX, op,
                    ": a and b must be classes from 0 to num_classes - 1 = ", num_classes - 1);
    check(status, op);
    return mi;
}

} // namespace
} // namespace mmbal

#ifndef MMBAL_ON_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(mmbal, m) {
    m.def("ksg_mutual_info(Tensor x, Tensor y, Tensor? present=None, int neighbors=3, bool standardize=True, "
          "float jitter=0, int seed=0) -> Tensor");
    m.def("discrete_mutual_info(Tensor a, Tensor b, Tensor? present=None, int num_classes=-1) -> Tensor");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(mmbal, MMBAL_DEVICE, m) {
    m.impl("ksg_mutual_info", TORCH_BOX(&mmbal::ksg_mutual_info));
    m.impl("discrete_mutual_info", TORCH_BOX(&mmbal::discrete_mutual_info));
}
