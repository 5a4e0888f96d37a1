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

// The elements between the first and the last of a tensor or view, both counted; 0 of an empty one. More than int64 can
// say: its largest number.
template <typename Sizes, typename Strides>
int64_t reach(const Sizes &sizes, const Strides &strides, size_t dims) {
    int64_t last = 0;
    bool overflows = false;
    for (size_t i = 0; i < dims; i++) {
        if (sizes[i] == 0) return 0;
        int64_t steps;
        overflows |= __builtin_mul_overflow(sizes[i] - 1, strides[i], &steps) || steps > INT64_MAX - 1 - last;
        last = overflows ? 0 : last + steps;
    }
    return overflows ? INT64_MAX : last + 1;
}

// The slices of dimension 0 of a contiguous tensor.
inline void see_slices(const char *op, const char *name, size_t t, const Tensor &tensor, mmbal_units &of) {
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    STD_TORCH_CHECK(sizes.size() >= 1, op, ": ", name, "[", t, "] must have a dimension where specs are empty");
    int64_t inner = 1;
    for (size_t i = sizes.size() - 1; i > 0; inner *= sizes[i--])
        STD_TORCH_CHECK(strides[i] == inner || sizes[i] == 1, op, ": ", name, "[", t,
                        "] must be contiguous where specs are empty, got sizes ", shape_text(sizes), " and strides ",
                        shape_text(strides));
    STD_TORCH_CHECK(strides[0] == inner || sizes[0] == 1 || inner == 0, op, ": ", name, "[", t,
                    "] must be contiguous where specs are empty, got sizes ", shape_text(sizes), " and strides ",
                    shape_text(strides));
    of.size[0] = of.size[2] = 1, of.size[1] = sizes[0], of.size[3] = inner;
    of.stride[0] = of.stride[2] = 0, of.stride[1] = inner, of.stride[3] = 1;
}

// What nine numbers say; returns the bytes before the first element.
inline int64_t see_spec(const char *op, size_t t, const Tensor &tensor, const int64_t *spec, mmbal_units &of) {
    for (int axis = 0; axis < 4; axis++) of.size[axis] = spec[axis], of.stride[axis] = spec[4 + axis];
    const auto sizes = tensor.sizes(), strides = tensor.strides();
    const int64_t offset = spec[8], viewed = reach(of.size, of.stride, 4);
    const int64_t held = reach(sizes, strides, sizes.size());
    STD_TORCH_CHECK(viewed == 0 || (viewed <= held && offset <= held - viewed), op, ": specs[", t,
                    "] must stay within its tensor ", shape_text(sizes), ", got ", viewed, " elements from ", offset,
                    " on");
    int64_t units;
    STD_TORCH_CHECK(!__builtin_mul_overflow(spec[0], spec[1], &units), op, ": specs[", t,
                    "] must have less than 2^63 units, got ", spec[0], " groups of ", spec[1]);
    if (viewed == 0) return 0;
    int64_t elements = units;
    const bool too_many = __builtin_mul_overflow(elements, spec[2], &elements) ||
                          __builtin_mul_overflow(elements, spec[3], &elements) || elements > viewed;
    STD_TORCH_CHECK(!too_many, op, ": specs must not name an element twice, got more than the ", viewed,
                    " elements between the first and the last of specs[", t, "]");
    return offset * static_cast<int64_t>(tensor.element_size());
}

// Tensors seen as specs say; without any, the slices of dimension 0 of contiguous tensors.
inline std::vector<mmbal_units> units_of(const char *op, const char *name, const std::vector<Tensor> &tensors,
                                         const std::vector<int64_t> &specs, bool writes) {
    const size_t T = count_specs(op, specs);
    STD_TORCH_CHECK(T == 0 || tensors.size() == T, op, ": specs must describe each of the ", name, ", ", tensors.size(),
                    ", got ", T);
    std::vector<mmbal_units> units(tensors.size());
    for (size_t t = 0; t < tensors.size(); t++) {
        const Tensor &tensor = tensors[t];
        mmbal_units &of = units[t];
        of.dtype = storage_dtype(op, name, tensor);
        STD_TORCH_CHECK(is_within_reach(tensor), op, ": ", name, "[", t, "] must be ", device_text(),
                        " like the other arguments");
        of.data = writes ? tensor.mutable_data_ptr() : const_cast<void *>(tensor.const_data_ptr());
        if (T == 0) {
            see_slices(op, name, t, tensor, of);
        } else {
            const int64_t before = see_spec(op, t, tensor, specs.data() + SPEC * t, of);
            if (of.data) of.data = static_cast<char *>(of.data) + before;
        }
    }
    return units;
}

} // namespace mmbal
