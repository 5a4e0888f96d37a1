// What the tests of the CUDA kernels on a CPU share: arrays of the shim's memory, and the schedules that must not
// matter.
#ifndef MMBAL_TESTS_DEVICE_H
#define MMBAL_TESTS_DEVICE_H

#include <gtest/gtest.h>

#include <cstdint>
#include <cstring>
#include <functional>
#include <string>
#include <vector>

#include "mmbal/pool.h"
#include "shim/fibres.h"
#include "shim/memory.h"

namespace mmbal_test {

// As cudaMalloc gives it: poisoned where the host puts nothing.
template <typename T>
class DeviceArray {
public:
    DeviceArray(const char *name, int64_t count) : count_(count) {
        data_ = static_cast<T *>(cuda_shim::allocate(static_cast<size_t>(count) * sizeof(T), name));
    }
    DeviceArray(const char *name, const std::vector<T> &values)
        : DeviceArray(name, static_cast<int64_t>(values.size())) {
        if (count_) std::memcpy(static_cast<void *>(data_), values.data(), bytes());
        cuda_shim::mark_written(data_, bytes());
    }
    ~DeviceArray() { cuda_shim::release(data_); }
    DeviceArray(const DeviceArray &) = delete;
    DeviceArray &operator=(const DeviceArray &) = delete;

    T *data() { return data_; }
    // What kernels wrote; an element that none wrote is a failure.
    std::vector<T> values() const {
        EXPECT_TRUE(cuda_shim::all_written(data_, bytes()) || !cuda_shim::checks_accesses());
        std::vector<T> copy(count_);
        if (count_) std::memcpy(static_cast<void *>(copy.data()), data_, bytes());
        return copy;
    }

private:
    size_t bytes() const { return static_cast<size_t>(count_) * sizeof(T); }
    T *data_;
    int64_t count_;
};

// Scratch memory of so many bytes.
using DeviceBytes = DeviceArray<unsigned char>;

// For the C core, whose results are the same for any.
inline const mmbal_pool *serial() {
    static const mmbal_pool pool = mmbal_pool_serial();
    return &pool;
}

inline std::string joined(const std::vector<std::string> &lines) {
    std::string text;
    for (const std::string &line : lines) text += line + "\n";
    return text;
}

// Runs body under an order of threads and blocks and a kind of poison; the shim must have nothing to report.
inline void under_schedule(unsigned seed, const std::function<void()> &body) {
    cuda_shim::options = {seed, static_cast<unsigned char>(seed == 1 ? 0x3C : 0xFF)};
    SCOPED_TRACE("seed " + std::to_string(seed));
    body();
    EXPECT_EQ(joined(cuda_shim::take_reports()), "");
    cuda_shim::options = {};
}

constexpr unsigned SCHEDULES = 3;

// Runs body under one of the schedules, each in its turn: for one of many cases.
inline void under_next_schedule(const std::function<void()> &body) {
    static unsigned next = 0;
    under_schedule(next++ % SCHEDULES, body);
}

// AddressSanitizer, which watches single accesses, has them take turns.
inline void for_each_schedule(const std::function<void()> &body) {
#ifdef MMBAL_ONE_SCHEDULE
    under_next_schedule(body);
#else
    for (unsigned seed = 0; seed < SCHEDULES; seed++) under_schedule(seed, body);
#endif
}

// For what takes long and has run under several schedules in a smaller case.
inline void once(const std::function<void()> &body) { under_schedule(0, body); }

} // namespace mmbal_test
#endif
