// Rows read and written 16 bytes at a time.
#pragma once

#include "dtypes.cuh"
#include "launch.cuh"

namespace mmbal {

// A pack of a row that may end before it; where it does, or rows do not begin at a multiple of 16 bytes, element by
// element.
template <typename Stored>
__device__ __forceinline__ Pack<Stored> load_pack(const Stored *from, int64_t left, bool aligned) {
    if (aligned && left >= Pack<Stored>::SIZE) return *reinterpret_cast<const Pack<Stored> *>(from);
    Pack<Stored> pack;
#pragma unroll
    for (int i = 0; i < Pack<Stored>::SIZE; i++) pack.of[i] = i < left ? from[i] : Stored{};
    return pack;
}

template <typename Stored>
__device__ __forceinline__ void store_pack(Stored *to, const Pack<Stored> &pack, int64_t left, bool aligned) {
    if (aligned && left >= Pack<Stored>::SIZE) {
        *reinterpret_cast<Pack<Stored> *>(to) = pack;
        return;
    }
#pragma unroll
    for (int i = 0; i < Pack<Stored>::SIZE; i++)
        if (i < left) to[i] = pack.of[i];
}

// The same number of elements of another type, in as many loads as they take.
template <int COUNT, typename From>
struct Loaded {
    Real<From> of[COUNT];
};
template <int COUNT, typename From>
__device__ __forceinline__ Loaded<COUNT, From> load_some(const From *from, int64_t left, bool aligned) {
    constexpr int SIZE = Pack<From>::SIZE < COUNT ? Pack<From>::SIZE : COUNT;
    static_assert(SIZE == Pack<From>::SIZE, "a pack of the other type holds as much at least");
    Loaded<COUNT, From> loaded;
#pragma unroll
    for (int first = 0; first < COUNT; first += SIZE) {
        const Pack<From> pack = load_pack(from + first, left - first, aligned);
#pragma unroll
        for (int i = 0; i < SIZE; i++) loaded.of[first + i] = load(pack.of[i]);
    }
    return loaded;
}

inline bool rows_are_aligned(const void *data, int64_t columns, size_t element) {
    return reinterpret_cast<uintptr_t>(data) % 16 == 0 && static_cast<size_t>(columns) * element % 16 == 0;
}

// Columns that this lane of a warp takes of a row, SIZE of them at a time.
#define MMBAL_FOR_PACKS(column, columns)                                                                               \
    for (int64_t column = static_cast<int64_t>(threadIdx.x % WARP) * SIZE; column < (columns); column += WARP * SIZE)

} // namespace mmbal
