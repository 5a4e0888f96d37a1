// A tensor whose dtype is known at run time alone, for operators that take a list of mixed ones.
#ifndef MMBAL_TESTS_ANY_TENSOR_H
#define MMBAL_TESTS_ANY_TENSOR_H

#include <utility>

#include "helpers.h"

namespace mmbal_test {

inline const std::vector<mmbal_dtype> ALL_DTYPES = {MMBAL_F32, MMBAL_BF16, MMBAL_F64, MMBAL_F16};

// Calls body with F32, BF16, F64 or F16.
template <typename Body>
auto with_dtype(mmbal_dtype dtype, const Body &body) {
    switch (dtype) {
    case MMBAL_F32: return body(F32{});
    case MMBAL_BF16: return body(BF16{});
    case MMBAL_F16: return body(F16{});
    default: return body(F64{});
    }
}

class AnyTensor {
public:
    mmbal_dtype dtype;
    std::vector<unsigned char> bytes; // 0xFF at first: NaN

    explicit AnyTensor(mmbal_dtype d = MMBAL_F64, int64_t count = 0)
        : dtype(d), bytes(static_cast<size_t>(count) * size_of(d), 0xFF) {}
    static AnyTensor random(mmbal_dtype d, int64_t count, Random &from, double scale = 2) {
        AnyTensor tensor(d, count);
        for (int64_t i = 0; i < count; i++) tensor.set(i, from.uniform(-scale, scale));
        return tensor;
    }
    static size_t size_of(mmbal_dtype d) {
        return with_dtype(d, [](auto tag) { return sizeof(typename decltype(tag)::Stored); });
    }
    void *data() { return bytes.data(); }
    const void *data() const { return bytes.data(); }
    int64_t count() const { return static_cast<int64_t>(bytes.size() / size_of(dtype)); }
    double get(int64_t i) const {
        return with_dtype(dtype, [&](auto tag) {
            typename decltype(tag)::Stored stored;
            std::memcpy(&stored, bytes.data() + static_cast<size_t>(i) * sizeof stored, sizeof stored);
            return decltype(tag)::load(stored);
        });
    }
    void set(int64_t i, double value) {
        with_dtype(dtype, [&](auto tag) {
            const auto stored = decltype(tag)::store(value);
            std::memcpy(bytes.data() + static_cast<size_t>(i) * sizeof stored, &stored, sizeof stored);
        });
    }
    std::vector<unsigned char> element(int64_t i) const {
        const auto size = static_cast<int64_t>(size_of(dtype));
        return {bytes.begin() + i * size, bytes.begin() + (i + 1) * size};
    }
};

// Half of the distance between the numbers of dtype around value.
inline double half_a_place(mmbal_dtype dtype, double value) {
    const int digits = dtype == MMBAL_F64 ? 53 : dtype == MMBAL_F32 ? 24 : dtype == MMBAL_F16 ? 11 : 8;
    const int least = dtype == MMBAL_F64 ? -1022 : dtype == MMBAL_F16 ? -14 : -126;
    return std::ldexp(1, (value == 0 ? least : std::max(std::ilogb(value), least)) - digits);
}

inline double real_error_of(mmbal_dtype dtype) { return dtype == MMBAL_F64 ? 0x1p-53 : 0x1p-24; }

} // namespace mmbal_test
#endif
