// Workspaces of several arrays.
#pragma once

#include "launch.cuh"

namespace mmbal {

// Hands out the workspace piece by piece, each aligned to 8; without a workspace it counts the bytes.
class Memory {
public:
    explicit Memory(void *workspace) : begin_(static_cast<unsigned char *>(workspace)) {}
    template <typename T>
    T *take(int64_t count) {
        T *piece = begin_ ? reinterpret_cast<T *>(begin_ + bytes_) : nullptr;
        bytes_ += ceil_div(count * static_cast<int64_t>(sizeof(T)), 8) * 8;
        return piece;
    }
    int64_t bytes() const { return bytes_; }

private:
    unsigned char *begin_;
    int64_t bytes_ = 0;
};

} // namespace mmbal
