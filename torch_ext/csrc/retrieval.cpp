#include "mmbal/retrieval.h"

#include "binding.h"
#ifdef MMBAL_ON_CUDA
#include "mmbal/cuda/retrieval.h"
#endif

namespace mmbal {
namespace {

std::tuple<Tensor, Tensor> topk_search(Tensor query, Tensor bank, int64_t k) {
    const char *op = "topk_search";
    const Executor executor(query);
    check_shape(op, "query", query, "[Q, D]", {-1, -1});
    const int64_t Q = query.size(0), D = query.size(1);
    STD_TORCH_CHECK(D >= 1, op, ": query must have at least one column, got ", shape_text(query.sizes()));
    check_shape(op, "bank", bank, "[n, D]", {-1, D});
    const int64_t n = bank.size(0);
    const mmbal_dtype query_dtype = storage_dtype(op, "query", query), bank_dtype = storage_dtype(op, "bank", bank);
    const bool widened = query_dtype == MMBAL_F32 && (bank_dtype == MMBAL_BF16 || bank_dtype == MMBAL_F16);
    STD_TORCH_CHECK(query_dtype == bank_dtype || widened, op, ": query must be ", dtype_text(bank.scalar_type()),
                    " as bank is, or float32 with a bfloat16 or float16 bank, got ", dtype_text(query.scalar_type()));
    STD_TORCH_CHECK(k >= 1 && k <= n, op, ": k must be from 1 to the number of rows of the bank ", n, ", got ", k);
    query = in_one_piece(query), bank = in_one_piece(bank);
    Tensor scores = torch::stable::new_empty(query, {Q, k}, real_type(bank_dtype));
    Tensor indices = torch::stable::new_empty(query, {Q, k}, ScalarType::Long);
#ifdef MMBAL_ON_CUDA
    const Workspace workspace(mmbal_topk_search_workspace_cuda(bank_dtype, Q, n, D, k), query);
#else
    const Workspace workspace(mmbal_topk_search_workspace(bank_dtype, Q, n, D, k, executor.workers()));
#endif
    check(MMBAL_KERNEL(mmbal_topk_search)(query_dtype, query.const_data_ptr(), bank_dtype, bank.const_data_ptr(), Q, n,
                                          D, k, scores.mutable_data_ptr(),
                                          static_cast<int64_t *>(indices.mutable_data_ptr()), workspace.data(),
                                          executor.get()),
          op);
    return {scores, indices};
}

Tensor recall_at_k(Tensor indices, Tensor positives, Tensor offsets, std::vector<int64_t> ks) {
    const char *op = "recall_at_k";
    const Executor executor(indices);
    check_shape(op, "indices", indices, "[Q, K]", {-1, -1});
    check_dtype(op, "indices", indices, ScalarType::Long);
    const int64_t Q = indices.size(0), K = indices.size(1);
    STD_TORCH_CHECK(K >= 1, op, ": indices must have at least one column, got ", shape_text(indices.sizes()));
    check_shape(op, "positives", positives, "[P]", {-1});
    check_dtype(op, "positives", positives, ScalarType::Long);
    check_shape(op, "offsets", offsets, "[Q + 1]", {Q + 1});
    check_dtype(op, "offsets", offsets, ScalarType::Long);
    for (const int64_t k : ks)
        STD_TORCH_CHECK(k >= 1 && k <= K, op, ": ks must be from 1 to the columns of indices ", K, ", got ", k);
    indices = in_one_piece(indices), positives = in_one_piece(positives), offsets = in_one_piece(offsets);
    const int64_t P = positives.size(0), count = static_cast<int64_t>(ks.size());
    Tensor recall = torch::stable::new_empty(indices, {count}, ScalarType::Double);
    const Workspace workspace(MMBAL_KERNEL(mmbal_recall_at_k_workspace)(Q), indices);
    const mmbal_status status = MMBAL_KERNEL(mmbal_recall_at_k)(
        index_data(indices), index_data(positives), index_data(offsets), ks.data(), Q, K, P, count,
        static_cast<double *>(recall.mutable_data_ptr()), workspace.data(), executor.get());
    STD_TORCH_CHECK(status != MMBAL_INVALID_INDEX, op, ": offsets must ascend from 0 to the number of positives ", P,
                    ", and positives must not be negative");
    check(status, op);
    return recall;
}

} // namespace
} // namespace mmbal

#ifndef MMBAL_ON_CUDA
STABLE_TORCH_LIBRARY_FRAGMENT(mmbal, m) {
    m.def("topk_search(Tensor query, Tensor bank, int k) -> (Tensor, Tensor)");
    m.def("recall_at_k(Tensor indices, Tensor positives, Tensor offsets, int[] ks) -> Tensor");
}
#endif
STABLE_TORCH_LIBRARY_IMPL(mmbal, MMBAL_DEVICE, m) {
    m.impl("topk_search", TORCH_BOX(&mmbal::topk_search));
    m.impl("recall_at_k", TORCH_BOX(&mmbal::recall_at_k));
}
