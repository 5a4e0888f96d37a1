// A call of the alignment loss, for its tests on the CPU and of the CUDA kernels.
#ifndef MMBAL_TESTS_ALIGNMENT_CASE_H
#define MMBAL_TESTS_ALIGNMENT_CASE_H

#include "helpers.h"
#include "mmbal/alignment.h"

namespace mmbal_test {

// The embeddings as [A, C], pred and target as [B, D].
template <typename T>
struct AlignmentCase {
    int64_t B, D, A, C, offset = 0;
    std::vector<typename T::Stored> pred, target, source, candidates;
    std::vector<int64_t> groups;
    std::vector<uint8_t> present;
    mmbal_regression regression = MMBAL_REGRESSION_SMOOTH_L1;
    double tau = 0.1, alpha = 0.3, beta = 0.7;
    int symmetric = 1;

    AlignmentCase(Random &random, int64_t rows, int64_t width, int64_t all, int64_t embedding, int64_t first = 0)
        : B(rows), D(width), A(all), C(embedding), offset(first), pred(random.tensor<T>(B * D, 2)),
          target(random.tensor<T>(B * D, 2)), source(random.tensor<T>(A * C, 1)),
          candidates(random.tensor<T>(A * C, 1)) {}

    mmbal_alignment alignment() const {
        mmbal_alignment t{};
        t.pred = pred.data(), t.target = target.data();
        t.source_embedding = source.data(), t.target_embedding = candidates.data();
        t.groups = groups.empty() ? nullptr : groups.data();
        t.present = present.empty() ? nullptr : present.data();
        t.B = B, t.D = D, t.A = A, t.C = C, t.offset = offset, t.dtype = T::dtype;
        t.regression = regression, t.tau = tau, t.alpha = alpha, t.beta = beta, t.symmetric = symmetric;
        return t;
    }
};

} // namespace mmbal_test
#endif
