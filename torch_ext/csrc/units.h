// Units of tensors as they travel in `int[] specs`: for each tensor sizes and strides of groups, units, outer, inner,
// and the offset of the first element, in elements.
#pragma once

#include "binding.h"
#include "mmbal/units.h"

namespace mmbal {

constexpr size_t SPEC = 9;

// How many tensors specs describe.
inline size_t count_specs(const char *op, const std::vector<int64_t> &specs) {
    STD_TORCH_CHECK(specs.size() % SPEC == 0, op, ": specs must have ", SPEC, " numbers for each tensor, got ",
                    specs.size());
    for (const int64_t number : specs) STD_TORCH_CHECK(number >= 0, op, ": specs must not be negative, got ", number);
    return specs.size() / SPEC;
}

// The elements between the first and the last of a tensor or view, both counted; 0 of an empty one.
template <typename Sizes, typename Strides>
int64_t reach(const Sizes &sizes, const Strides &strides, size_t dims) {
    int64_t last = 0;
    for (size_t i = 0; i < dims; i++) {
        if (sizes[i] == 0) return 0;
        last += (sizes[i] - 1) * strides[i];
    }
    return last + 1;
}

// Tensors seen as specs say.
inline std::vector<mmbal_units> units_of(const char *op, const char *name, const std::vector<Tensor> &tensors,
                                         const std::vector<int64_t> &specs, bool writes) {
    const size_t T = count_specs(op, specs);
    STD_TORCH_CHECK(tensors.size() == T, op, ": specs must describe each of the ", name, ", ", tensors.size(), ", got ",
                    T);
    std::vector<mmbal_units> units(T);
    for (size_t t = 0; t < T; t++) {
        const Tensor &tensor = tensors[t];
        const int64_t *spec = specs.data() + SPEC * t;
        mmbal_units &of = units[t];
        of.dtype = storage_dtype(op, name, tensor);
        STD_TORCH_CHECK(tensor.is_cpu(), op, ": ", name, "[", t, "] must be on the CPU like the other arguments");
        for (int axis = 0; axis < 4; axis++) of.size[axis] = spec[axis], of.stride[axis] = spec[4 + axis];
        const auto sizes = tensor.sizes(), strides = tensor.strides();
        const int64_t offset = spec[8], viewed = reach(of.size, of.stride, 4);
        STD_TORCH_CHECK(viewed == 0 || offset + viewed <= reach(sizes, strides, sizes.size()), op, ": specs[", t,
                        "] must stay within its tensor ", shape_text(sizes), ", and reach ", offset + viewed,
                        " elements");
        of.data = writes ? tensor.mutable_data_ptr() : const_cast<void *>(tensor.const_data_ptr());
        if (of.data) of.data = static_cast<char *>(of.data) + offset * static_cast<int64_t>(tensor.element_size());
    }
    return units;
}

} // namespace mmbal
