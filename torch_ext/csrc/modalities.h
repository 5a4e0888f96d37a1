// What the operators on [N, M] share: checks of their arguments, and outputs that are not always wanted.
#pragma once

#include "binding.h"
#include "mmbal/modalities.h"

namespace mmbal {

inline void check_modalities(const char *op, const char *name, int64_t M) {
    STD_TORCH_CHECK(M >= 1 && M <= MMBAL_MAX_MODALITIES, op, ": ", name, " must have from 1 to ",
                    static_cast<int64_t>(MMBAL_MAX_MODALITIES), " modalities, got ", M);
}

inline void check_like(const char *op, const char *name, const Tensor &t, const char *letters,
                       const std::vector<int64_t> &sizes, const Tensor &like) {
    check_shape(op, name, t, letters, sizes);
    check_dtype(op, name, t, like.scalar_type());
}

inline std::optional<Tensor> check_present(const char *op, const std::optional<Tensor> &present, int64_t N, int64_t M) {
    if (!present) return std::nullopt;
    check_shape(op, "present", *present, "[N, M]", {N, M});
    check_dtype(op, "present", *present, ScalarType::Bool);
    return in_one_piece(present);
}

inline const uint8_t *mask_data(const std::optional<Tensor> &mask) {
    return static_cast<const uint8_t *>(data_or_null(mask));
}

// An output in the dtype that sums are taken in.
inline Tensor empty_real(const Tensor &like, mmbal_dtype dtype, const std::vector<int64_t> &sizes) {
    if (like.scalar_type() == real_type(dtype)) return empty_kept(like, sizes);
    return torch::stable::new_empty(like, sizes, real_type(dtype));
}

// A gradient that is not needed comes back with shape [0], and is NULL to the core.
struct Gradient {
    Gradient(bool needed, const Tensor &like, const std::vector<int64_t> &sizes)
        : tensor(needed ? empty_kept(like, sizes) : torch::stable::new_empty(like, {0})),
          data(needed ? tensor.mutable_data_ptr() : nullptr) {}
    Tensor tensor;
    void *data;
};

inline void check_needed(const char *op, const std::vector<bool> &needed, size_t count) {
    STD_TORCH_CHECK(needed.size() == count, op, ": needed must have ", count, " entries, got ", needed.size());
}

} // namespace mmbal
