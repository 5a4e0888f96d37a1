// What a binding needs of a GPU, in libmmbal_cuda.so; binding.h has the same names for the CPU.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "mmbal/cuda/stream.h"

// Declared by torch's headers for its own CUDA builds alone; every such torch from 2.10 on has it.
extern "C" AOTITorchError aoti_torch_get_current_cuda_stream(int32_t device_index, void **stream);

#define MMBAL_DEVICE CUDA
#define MMBAL_KERNEL(function) function##_cuda

namespace mmbal {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One call's view of the GPU: its tensors' device is the current one while this lives, and work goes to that device's
// current stream.
class Executor {
public:
    explicit Executor(const Tensor &first) {
        if (first.is_cuda()) guard_.emplace(first.get_device_index()); // otherwise a check will refuse it
        STD_TORCH_CHECK(aoti_torch_get_current_cuda_stream(torch::stable::accelerator::getCurrentDeviceIndex(),
                                                           &stream_) == AOTI_TORCH_SUCCESS,
                        "mmbal: torch has no current CUDA stream");
    }
    Executor(const Executor &) = delete;
    Executor &operator=(const Executor &) = delete;
    mmbal_stream get() const { return stream_; }

private:
    std::optional<torch::stable::accelerator::DeviceGuard> guard_;
    mmbal_stream stream_ = nullptr;
};

// Scratch memory for one call, from torch: what is queued on the stream may go on using it.
class Workspace {
public:
    Workspace(int64_t bytes, const Tensor &like) : memory_(torch::stable::new_empty(like, {bytes}, ScalarType::Byte)) {}
    void *data() const { return memory_.mutable_data_ptr(); }

private:
    Tensor memory_;
};

inline Tensor empty_kept(const Tensor &like, const std::vector<int64_t> &sizes) {
    return torch::stable::new_empty(like, sizes);
}

// Whether a kernel of the Executor's device can read it.
inline bool is_within_reach(const Tensor &t) {
    return t.is_cuda() && t.get_device_index() == torch::stable::accelerator::getCurrentDeviceIndex();
}

inline std::string device_text() {
    return "on CUDA device " + std::to_string(torch::stable::accelerator::getCurrentDeviceIndex());
}

} // namespace mmbal
