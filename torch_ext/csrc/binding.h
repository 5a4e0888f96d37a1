// What every binding shares: where its work runs, the checks of arguments, and a status made an exception.
//
// A binding is compiled for the CPU and, with MMBAL_ON_CUDA, once more for the GPU. What differs has one name in both:
// Executor (torch's threads, or its stream), Workspace, MMBAL_KERNEL and MMBAL_DEVICE.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/util/Exception.h>

#include <algorithm>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "mmbal/dtype.h"
#include "mmbal/pool.h"
#include "mmbal/status.h"

#ifdef MMBAL_ON_CUDA
#include "device_cuda.h"
#else
#include "memory.h"
#define MMBAL_DEVICE CPU
#define MMBAL_KERNEL(function) function
#endif

namespace mmbal {

#ifndef MMBAL_ON_CUDA

// One call's view of torch's threads. Inside another parallel region torch runs it serially, and so do we.
class TorchPool {
public:
    TorchPool() : pool_{run, static_cast<int>(std::max<uint32_t>(1, torch::stable::get_num_threads())), &pool_} {}
    TorchPool(const TorchPool &) = delete;
    TorchPool &operator=(const TorchPool &) = delete;
    const mmbal_pool *get() const { return &pool_; }
    int workers() const { return pool_.workers; }

private:
    static mmbal_status run(void *self, int64_t count, int64_t grain, mmbal_task *task, void *context) {
        mmbal_queue queue{count, grain, task, context, 0, MMBAL_OK};
        const int64_t pieces = (count + grain - 1) / grain;
        const int64_t workers = std::min<int64_t>(static_cast<mmbal_pool *>(self)->workers, pieces);
        torch::stable::parallel_for(0, workers, 1, [&queue](int64_t begin, int64_t end) {
            for (int64_t worker = begin; worker < end; worker++) mmbal_queue_drain(&queue, static_cast<int>(worker));
        });
        return static_cast<mmbal_status>(queue.status);
    }
    mmbal_pool pool_;
};

class Executor : public TorchPool {
public:
    explicit Executor(const Tensor &) {}
};

inline bool is_within_reach(const Tensor &t) { return t.is_cpu(); }

inline std::string device_text() { return "on the CPU"; }

#endif

inline void check(mmbal_status status, const char *op) {
    STD_TORCH_CHECK(status == MMBAL_OK, op, ": ", mmbal_status_string(status));
}

template <typename Sizes>
std::string shape_text(const Sizes &sizes) {
    std::string text = "[";
    for (size_t i = 0; i < sizes.size(); i++) {
        if (i > 0) text += ", ";
        text += sizes[i] == -1 ? "*" : std::to_string(sizes[i]);
    }
    return text + "]";
}

// How an error names one tensor of a list.
inline std::string nth(const char *name, size_t i) { return std::string(name) + "[" + std::to_string(i) + "]"; }

// Numbers in one row of [N, ...].
inline int64_t row_size(const Tensor &t) {
    int64_t size = 1;
    for (int64_t i = 1; i < t.dim(); i++) size *= t.size(i);
    return size;
}

inline const char *dtype_text(ScalarType type) {
    switch (type) {
    case ScalarType::Float: return "float32";
    case ScalarType::Double: return "float64";
    case ScalarType::BFloat16: return "bfloat16";
    case ScalarType::Half: return "float16";
    case ScalarType::Long: return "int64";
    case ScalarType::Int: return "int32";
    case ScalarType::Bool: return "bool";
    default: return "another dtype";
    }
}

// letters: what the dimensions are called, as in "[E, F, D]"; expected: their sizes, -1 where any will do.
inline void check_shape(const char *op, const char *name, const Tensor &t, const char *letters,
                        const std::vector<int64_t> &expected) {
    const auto sizes = t.sizes();
    bool same = sizes.size() == expected.size();
    for (size_t i = 0; same && i < expected.size(); i++) same = expected[i] == -1 || expected[i] == sizes[i];
    STD_TORCH_CHECK(same, op, ": ", name, " must be ", letters, " = ", shape_text(expected), ", got ",
                    shape_text(sizes));
    STD_TORCH_CHECK(is_within_reach(t), op, ": ", name, " must be ", device_text(), " like the other arguments");
}

inline void check_dtype(const char *op, const char *name, const Tensor &t, ScalarType expected) {
    STD_TORCH_CHECK(t.scalar_type() == expected, op, ": ", name, " must be ", dtype_text(expected), ", got ",
                    dtype_text(t.scalar_type()));
}

inline mmbal_dtype storage_dtype(const char *op, const char *name, const Tensor &t) {
    switch (t.scalar_type()) {
    case ScalarType::Float: return MMBAL_F32;
    case ScalarType::BFloat16: return MMBAL_BF16;
    case ScalarType::Half: return MMBAL_F16;
    case ScalarType::Double: return MMBAL_F64;
    default:
        STD_TORCH_CHECK(false, op, ": ", name, " must be float32, bfloat16, float16 or float64, got ",
                        dtype_text(t.scalar_type()));
    }
}

// The dtype that sums, routing weights and losses have.
inline ScalarType real_type(mmbal_dtype dtype) { return dtype == MMBAL_F64 ? ScalarType::Double : ScalarType::Float; }

// The tensor itself where it is contiguous: the way through the dispatcher would take most of a small operator's time.
inline Tensor in_one_piece(const Tensor &t) { return t.is_contiguous() ? t : torch::stable::contiguous(t); }

inline std::optional<Tensor> in_one_piece(const std::optional<Tensor> &t) {
    return t ? std::optional<Tensor>(in_one_piece(*t)) : std::nullopt;
}

inline const void *data_or_null(const std::optional<Tensor> &t) { return t ? t->const_data_ptr() : nullptr; }

inline const int64_t *index_data(const Tensor &t) { return static_cast<const int64_t *>(t.const_data_ptr()); }

} // namespace mmbal
