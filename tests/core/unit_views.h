// Tensors seen as units, in all the ways that mmbal/units.h names and in random ones.
#ifndef MMBAL_TESTS_UNIT_VIEWS_H
#define MMBAL_TESTS_UNIT_VIEWS_H

#include <algorithm>
#include <array>
#include <numeric>

#include "any_tensor.h"
#include "mmbal/units.h"

namespace mmbal_test {

using Axes = std::array<int64_t, 4>; // groups, units, outer, inner

struct View {
    Axes size, stride;
    int64_t offset = 0;
    AnyTensor memory = AnyTensor(); // what is not of the view is NaN

    int64_t units() const { return size[0] * size[1]; }
    int64_t per_unit() const { return size[2] * size[3]; }
    // Where element j of unit u lies; both are counted over two axes.
    int64_t at(int64_t u, int64_t j) const {
        return offset + u / size[1] * stride[0] + u % size[1] * stride[1] + j / size[3] * stride[2] +
               j % size[3] * stride[3];
    }
    mmbal_units get() {
        mmbal_units result = {static_cast<unsigned char *>(memory.data()) +
                                  static_cast<size_t>(offset) * AnyTensor::size_of(memory.dtype),
                              memory.dtype,
                              {},
                              {}};
        std::copy(size.begin(), size.end(), result.size);
        std::copy(stride.begin(), stride.end(), result.stride);
        return result;
    }
    void allocate(mmbal_dtype dtype, int64_t gap_behind = 3) {
        int64_t count = units() && per_unit() ? at(units() - 1, per_unit() - 1) + 1 : offset;
        memory = AnyTensor(dtype, count + gap_behind);
    }
    template <typename Value>
    View &fill(mmbal_dtype dtype, const Value &value) {
        allocate(dtype);
        for (int64_t u = 0; u < units(); u++)
            for (int64_t j = 0; j < per_unit(); j++) memory.set(at(u, j), value());
        return *this;
    }
};

constexpr int64_t NO_MATTER = INT64_C(1) << 40; // the stride of an axis of one index

inline std::vector<View> named_views() {
    return {
        {{1, 16, 1, 27}, {NO_MATTER, 27, NO_MATTER, 1}},  // filters of [16, 3, 3, 3]
        {{1, 4, 1, 96}, {0, 96, 0, 1}},                   // heads as rows of [16, 24]
        {{1, 4, 10, 6}, {240, 6, 24, 1}},                 // heads as columns of [10, 24]
        {{7, 5, 1, 1}, {13, 1, NO_MATTER, NO_MATTER}, 4}, // columns 4 to 8 of a head [7, 13]
        {{1, 5, 6, 9}, {0, 9, 45, 1}},                    // [6, 5, 3, 3] of a transposed convolution, by dim 1
        {{1, 300, 1, 1}, {0, 1, 0, 0}},                   // elements
        {{1, 7, 40, 1}, {0, 1, 7, NO_MATTER}},            // columns of [40, 7]
        {{1, 7, 1, 40}, {0, 1, 0, 7}},                    // the same
        {{1, 1, 30, 40}, {0, 0, 1, 30}},                  // a matrix across its rows
        {{1, 6, 5, 8}, {0, 80, 16, 2}, 1},                // every second
        {{3, 4, 5, 6}, {24, 1, 72, 4}},                   // any order of the axes
        {{1, 1, 1, 200001}, {0, 0, 0, 1}},                // one unit of many
        {{1, 5003, 1, 9}, {0, 9, 0, 1}},                  // many of few
        {{1, 3, 1000, 70}, {0, 70, 210, 1}},              // long columns
        {{1, 2, 60001, 1}, {0, 1, 2, 1}},                 //
        {{1, 1, 1, 70000}, {0, 0, 0, 3}},                 //
        {{40, 100, 3, 1}, {310, 3, 1, 1}, 7},             // many groups
        {{0, 3, 2, 2}, {12, 4, 2, 1}},                    // nothing
        {{2, 0, 2, 2}, {4, 4, 2, 1}},                     //
        {{2, 3, 0, 4}, {12, 4, 4, 1}},                    // units of nothing
        {{2, 3, 4, 0}, {0, 0, 0, 0}},                     //
    };
}

// Axes in a random order, with gaps between them
inline View random_view(Random &random) {
    View view{{1 + random.below(4), 1 + random.below(20), 1 + random.below(9), 1 + random.below(40)}, {}};
    std::vector<int> order = {0, 1, 2, 3};
    for (int i = 3; i > 0; i--) std::swap(order[i], order[random.below(i + 1)]);
    int64_t stride = 1 + random.below(2);
    for (int axis : order) {
        view.stride[axis] = stride;
        stride = stride * view.size[axis] + random.below(3);
    }
    view.offset = random.below(5);
    return view;
}

} // namespace mmbal_test
#endif
