// What the files of topk_search share; see mmbal/retrieval.h.
#pragma once

#include <string.h>

#include "dtypes.cuh"
#include "launch.cuh"

namespace mmbal {

// A score as a whole number of the same order: 0 is nobody's, 1 is a NaN's.
template <typename R>
struct OrderOf {
    using Key = uint32_t;
};
template <>
struct OrderOf<double> {
    using Key = uint64_t;
};
template <typename R>
using Key = typename OrderOf<R>::Key;

template <typename R>
__device__ __forceinline__ Key<R> key_of(R score) {
    constexpr Key<R> SIGN = Key<R>{1} << (8 * sizeof(R) - 1);
    if (score != score) return 1;
    if (score == 0) return SIGN; // -0 too
    Key<R> bits;
    memcpy(&bits, &score, sizeof bits);
    return bits & SIGN ? ~bits : bits | SIGN;
}

// Lists of scores, one of `count` for each query, `stride` apart. indices NULL: first_index and those that follow.
template <typename R>
struct Found {
    R *scores;
    int64_t *indices;
    int64_t stride, count, first_index;
};

// A list is cut into segments of this many; of each the first k are kept.
struct SelectionSizes {
    int64_t segment, k;
    // How many are kept of so many.
    __host__ __device__ int64_t kept_of(int64_t count) const {
        const int64_t rest = count % segment;
        return count / segment * k + (rest < k ? rest : k);
    }
};
SelectionSizes selection_sizes(int64_t k);

// The first k of each segment of the lists, in the order in which they are there, to `to` from its element to_first on.
template <typename R>
mmbal_status select_of_segments(int64_t queries, const Found<R> &from, const SelectionSizes &sizes, const Found<R> &to,
                                int64_t to_first, mmbal_stream stream);

// Lists of k in their order, into scores and indices [queries, k], by way of `other` [queries, k].
template <typename R>
mmbal_status sort_found(int64_t queries, int64_t k, const Found<R> &from, const Found<R> &other, R *scores,
                        int64_t *indices, mmbal_stream stream);

} // namespace mmbal
