// Workspaces of several arrays.
#pragma once

#include "launch.cuh"

namespace mmbal {

// Memory of a workspace in pieces that begin at multiples of 16 bytes; from NULL, their sum.
class Pieces {
public:
    explicit Pieces(void *memory) : memory_(static_cast<unsigned char *>(memory)) {}
    template <typename T>
    T *take(int64_t count) {
        T *piece = memory_ ? reinterpret_cast<T *>(memory_ + bytes_) : nullptr;
        bytes_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 16) * 16;
        return piece;
    }
    int64_t bytes() const { return bytes_; }

private:
    unsigned char *memory_;
    int64_t bytes_ = 0;
};

} // namespace mmbal
