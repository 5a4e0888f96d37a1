// What the tests of several families share: dtypes, random tensors, guarded memory, the pools that must not matter.
#ifndef MMBAL_TESTS_HELPERS_H
#define MMBAL_TESTS_HELPERS_H

#include <gtest/gtest.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <functional>
#include <limits>
#include <random>
#include <string>
#include <vector>

#include "mmbal/dtype.h"
#include "pthread_pool.h"

namespace mmbal_test {

// A type of its own, so that it is not taken for a bfloat16.
struct Half {
    uint16_t bits;
    bool operator==(const Half &) const = default;
};

// Each: how an element is stored, what sums are taken in, and half a unit in the last place of 1 for both.
struct F32 {
    using Stored = float;
    using Real = float;
    static constexpr mmbal_dtype dtype = MMBAL_F32;
    static constexpr double stored_error = 0x1p-24, real_error = 0x1p-24;
    static double load(Stored s) { return s; }
    static Stored store(double value) { return static_cast<float>(value); }
};

struct BF16 {
    using Stored = uint16_t;
    using Real = float;
    static constexpr mmbal_dtype dtype = MMBAL_BF16;
    static constexpr double stored_error = 0x1p-8, real_error = 0x1p-24;
    static double load(Stored s) {
        const uint32_t bits = static_cast<uint32_t>(s) << 16;
        float value;
        std::memcpy(&value, &bits, sizeof value);
        return value;
    }
    // Cuts instead of rounding: any bfloat16 near value will do for an input.
    static Stored store(double value) {
        const float narrow = static_cast<float>(value);
        uint32_t bits;
        std::memcpy(&bits, &narrow, sizeof bits);
        return static_cast<uint16_t>(bits >> 16);
    }
};

struct F16 {
    using Stored = Half;
    using Real = float;
    static constexpr mmbal_dtype dtype = MMBAL_F16;
    static constexpr double stored_error = 0x1p-11, real_error = 0x1p-24;
    static double load(Stored s) {
        const int exponent = (s.bits >> 10) & 31, fraction = s.bits & 1023;
        const double sign = s.bits >> 15 ? -1 : 1;
        if (exponent == 31) return sign * (fraction ? static_cast<double>(NAN) : static_cast<double>(INFINITY));
        return sign * std::ldexp(exponent ? 1024 + fraction : fraction, std::max(exponent, 1) - 25);
    }
    // Cuts instead of rounding, as above.
    static Stored store(double value) {
        const auto sign = static_cast<uint16_t>(std::signbit(value) ? 0x8000 : 0);
        const double size = std::fabs(value);
        if (std::isnan(value)) return {0x7E00};
        if (size >= 65536) return {static_cast<uint16_t>(sign + 0x7C00)};
        const int exponent = size > 0 ? std::max(std::ilogb(size), -14) : -14;
        const auto units = static_cast<int>(std::ldexp(size, 10 - exponent)); // 1024 to 2047 where it is normal
        return {static_cast<uint16_t>(sign + ((exponent + 14) << 10) + units)};
    }
};

struct F64 {
    using Stored = double;
    using Real = double;
    static constexpr mmbal_dtype dtype = MMBAL_F64;
    static constexpr double stored_error = 0x1p-53, real_error = 0x1p-53;
    static double load(Stored s) { return s; }
    static Stored store(double value) { return value; }
};

using Dtypes = ::testing::Types<F32, BF16, F16, F64>;

struct DtypeNames {
    template <typename T>
    static std::string GetName(int) {
        return T::dtype == MMBAL_F32 ? "f32" : T::dtype == MMBAL_BF16 ? "bf16" : T::dtype == MMBAL_F16 ? "f16" : "f64";
    }
};

// An enum with a value that its type does not name, as a C caller can make it.
template <typename Enum>
Enum enum_of(int value) {
    static_assert(sizeof(Enum) == sizeof(int));
    Enum result;
    std::memcpy(&result, &value, sizeof result);
    return result;
}

class Random {
public:
    explicit Random(uint64_t seed) : engine_(seed) {}
    double uniform(double low, double high) { return std::uniform_real_distribution<double>(low, high)(engine_); }
    int64_t below(int64_t end) { return std::uniform_int_distribution<int64_t>(0, end - 1)(engine_); }
    template <typename T>
    T pick(const std::vector<T> &from) {
        return from[below(static_cast<int64_t>(from.size()))];
    }
    uint64_t bits() { return engine_(); }

    template <typename T>
    std::vector<typename T::Stored> tensor(int64_t count, double scale) {
        std::vector<typename T::Stored> values(count);
        for (auto &value : values) value = T::store(uniform(-scale, scale));
        return values;
    }

    // count / K rows of K different experts each
    std::vector<int64_t> choices(int64_t N, int64_t K, int64_t E) {
        std::vector<int64_t> indices;
        for (int64_t n = 0; n < N; n++) {
            std::vector<int64_t> experts(E);
            for (int64_t e = 0; e < E; e++) experts[e] = e;
            std::shuffle(experts.begin(), experts.end(), engine_);
            indices.insert(indices.end(), experts.begin(), experts.begin() + K);
        }
        return indices;
    }

private:
    std::mt19937_64 engine_;
};

// Memory for an output: starts as bytes 0xFF (a NaN in every dtype, -1 in an integer) between guard bytes.
// AddressSanitizer guards the block itself, and reading too; ours would hide a small step beyond the end from it.
template <typename T>
class Guarded {
public:
    explicit Guarded(int64_t count, int64_t misaligned = 0) : count_(count), front_(GUARD + misaligned) {
        const size_t end_of_front = static_cast<size_t>(front_),
                     end = end_of_front + static_cast<size_t>(count) * sizeof(T);
        bytes_.reserve(end + GUARD); // exactly: AddressSanitizer watches what lies behind it
        bytes_.resize(end_of_front, GUARD_BYTE);
        bytes_.resize(end, 0xFF);
        bytes_.resize(end + GUARD, GUARD_BYTE);
    }
    T *data() { return reinterpret_cast<T *>(bytes_.data() + front_); }
    std::vector<T> values() const {
        std::vector<T> copy(count_);
        if (count_) std::memcpy(copy.data(), bytes_.data() + front_, count_ * sizeof(T));
        return copy;
    }
    bool untouched() const {
        return std::all_of(bytes_.begin() + front_, bytes_.end() - GUARD, [](unsigned char b) { return b == 0xFF; });
    }
    bool intact() const {
        const auto is_guard = [](unsigned char b) { return b == GUARD_BYTE; };
        return std::all_of(bytes_.begin(), bytes_.begin() + front_, is_guard) &&
               std::all_of(bytes_.end() - GUARD, bytes_.end(), is_guard);
    }

private:
#ifdef __SANITIZE_ADDRESS__
    static constexpr int64_t GUARD = 0;
#else
    static constexpr int64_t GUARD = 64;
#endif
    static constexpr unsigned char GUARD_BYTE = 0xA5;
    int64_t count_, front_;
    std::vector<unsigned char> bytes_;
};

template <typename T>
bool same_bits(const std::vector<T> &a, const std::vector<T> &b) {
    return a.size() == b.size() && (a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(T)) == 0);
}

// A sum and the sum of its terms' magnitudes, which is what its rounding error is proportional to.
struct Sum {
    double value = 0, magnitude = 0;
    void add(double term) { add(term, std::fabs(term)); }
    void add(double term, double size) { value += term, magnitude += size; }
};

// got[i] = expected[i] within relative * magnitude; a NaN is never near.
template <typename T>
void expect_near(const char *what, const std::vector<typename T::Stored> &got, const std::vector<Sum> &expected,
                 double relative) {
    ASSERT_EQ(got.size(), expected.size()) << what;
    for (size_t i = 0; i < got.size(); i++) {
        const double error = std::fabs(T::load(got[i]) - expected[i].value);
        // The smallest normal float32, or the spacing of float16 near 0: below it a relative error has no meaning.
        const double tiny = T::dtype == MMBAL_F16 ? 0x1p-24 : std::numeric_limits<float>::min();
        ASSERT_TRUE(error <= relative * expected[i].magnitude + tiny)
            << what << "[" << i << "]: got " << T::load(got[i]) << ", expected " << expected[i].value << " within "
            << relative * expected[i].magnitude;
    }
}

// The pools under which every result must be the same to the bit as with the serial one.
inline void for_each_pool(const std::function<void(const std::string &, const mmbal_pool &)> &body) {
    for (int workers : {1, 2, 5}) {
        PthreadPool threads(workers);
        body(std::to_string(workers) + " threads", threads.pool());
    }
    ReversedPool backwards(3), one_by_one(4, 1);
    body("backwards", backwards.pool());
    body("backwards, index by index", one_by_one.pool());
}

// softmax and logsumexp of one row, plainly
struct Softmax {
    std::vector<double> p;
    double logsumexp = 0;
    explicit Softmax(const std::vector<double> &logits) {
        double top = -std::numeric_limits<double>::infinity(), total = 0;
        for (double z : logits) top = std::max(top, z);
        for (double z : logits) total += std::exp(z - top);
        for (double z : logits) p.push_back(std::exp(z - top) / total);
        logsumexp = top + std::log(total);
    }
};

} // namespace mmbal_test
#endif
