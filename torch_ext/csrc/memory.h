// Scratch memory and tensors from kept memory.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <cstdint>
#include <vector>

#include "kept_memory.h"

// Missing in torch 2.10, which this library runs on too; used where it has been tried, from 2.13 on.
extern "C" __attribute__((weak)) AOTITorchError
torch_from_blob(void *data, int64_t ndim, const int64_t *sizes, const int64_t *strides, int64_t storage_offset,
                int32_t dtype, int32_t device_type, int32_t device_index, AtenTensorHandle *made, int32_t layout,
                const uint8_t *metadata, int64_t metadata_size, void (*deleter)(void *, void *), void *deleter_context);

namespace mmbal {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

// One for the process (`mmbal info` names the limit), never destroyed: the last tensors may outlive every static
// object.
inline KeptMemory &kept_memory() {
    static auto *kept = new KeptMemory(int64_t{4} << 30);
    return *kept;
}

// Scratch memory for one call. Two calls at once get two; there is nothing to wait for.
class Workspace {
public:
    explicit Workspace(int64_t bytes) : block_(kept_memory().take(bytes)) {
        STD_TORCH_CHECK(block_.data, "mmbal: cannot allocate a workspace of ", bytes, " bytes");
    }
    Workspace(int64_t bytes, const Tensor &) : Workspace(bytes) {} // on a GPU the tensor says which
    ~Workspace() { kept_memory().give(block_); }
    Workspace(const Workspace &) = delete;
    Workspace &operator=(const Workspace &) = delete;
    void *data() const { return block_.data; }

private:
    Block block_;
};

inline bool torch_holds_kept_memory() {
    return torch_from_blob && aoti_torch_abi_version() >> 48 >= 0x020d; // major, minor
}

// An uninitialised contiguous CPU tensor of the dtype of `like`. What a page or more holds is kept memory, and kept
// again when the last reference goes; before torch 2.13, and below a page, it is torch's own. Its storage cannot be
// resized.
inline Tensor empty_kept(const Tensor &like, const std::vector<int64_t> &sizes) {
    int64_t bytes = static_cast<int64_t>(like.element_size());
    for (const int64_t size : sizes) bytes *= size;
    if (bytes < KeptMemory::PAGE || !torch_holds_kept_memory()) {
        Tensor made = torch::stable::new_empty(like, sizes);
        ask_for_large_pages(made.mutable_data_ptr(), bytes);
        return made;
    }
    std::vector<int64_t> strides(sizes.size(), 1);
    for (size_t i = sizes.size() - 1; i > 0; i--) strides[i - 1] = strides[i] * sizes[i];

    auto *block = new Block(kept_memory().take(bytes));
    const auto give_back = [](void *, void *context) {
        kept_memory().give(*static_cast<Block *>(context));
        delete static_cast<Block *>(context);
    };
    if (!block->data) {
        delete block;
        STD_TORCH_CHECK(false, "mmbal: cannot allocate a tensor of ", bytes, " bytes");
    }
    int32_t dtype = 0;
    AtenTensorHandle made = nullptr;
    STD_TORCH_CHECK(aoti_torch_get_dtype(like.get(), &dtype) == AOTI_TORCH_SUCCESS, "mmbal: a tensor without a dtype");
    const AOTITorchError error = torch_from_blob(block->data, static_cast<int64_t>(sizes.size()), sizes.data(),
                                                 strides.data(), 0, dtype, aoti_torch_device_type_cpu(), -1, &made,
                                                 aoti_torch_layout_strided(), nullptr, 0, give_back, block);
    // torch may have given the block back already when it fails, so nobody else does.
    STD_TORCH_CHECK(error == AOTI_TORCH_SUCCESS, "mmbal: torch_from_blob failed");
    return Tensor(made);
}

} // namespace mmbal
