// Sums over experts' rows, and experts without rows. See mmbal/cuda/expert_mlp.h.
#include "expert_rows.cuh"

namespace mmbal {
namespace {

// Sums over an expert's rows: of parts of PART_ROWS first, then of the parts.
constexpr int64_t PART_ROWS = 128;

template <typename Stored>
__global__ void __launch_bounds__(ROW_THREADS, 1)
    sum_parts(const Stored *__restrict__ rows, const int64_t *__restrict__ offsets, int64_t parts, int64_t E,
              int64_t columns, Real<Stored> *__restrict__ sums) {
    const int64_t across = ceil_div(columns, ROW_THREADS);
    for (int64_t index = blockIdx.x; index < parts * across; index += gridDim.x) {
        const RowTile tile = row_tile(offsets, E, PART_ROWS, index / across);
        const int64_t column = index % across * ROW_THREADS + threadIdx.x;
        if (tile.expert < 0) return;
        if (column >= columns) continue;
        Real<Stored> sum = 0;
        for (int64_t r = tile.first; r < tile.last; r++) sum += load(rows[r * columns + column]);
        sums[index / across * columns + column] = sum;
    }
}

template <typename Stored>
__global__ void __launch_bounds__(ROW_THREADS, 1)
    add_parts(const Real<Stored> *__restrict__ parts, const int64_t *__restrict__ offsets, int64_t E, int64_t columns,
              Stored *__restrict__ sums) {
    for (int64_t i = first_group<1>(); i < E * columns; i += group_count<1>()) {
        const int64_t expert = i / columns, column = i % columns;
        int64_t first = 0;
        for (int64_t e = 0; e < expert; e++) first += ceil_div(offsets[e + 1] - offsets[e], PART_ROWS);
        const int64_t count = ceil_div(offsets[expert + 1] - offsets[expert], PART_ROWS);
        Real<Stored> sum = 0;
        for (int64_t part = first; part < first + count; part++) sum += parts[part * columns + column];
        store(&sums[i], sum);
    }
}

__global__ void __launch_bounds__(ROW_THREADS, 1)
    write_ends(const int64_t *__restrict__ offsets, int64_t E, int32_t *__restrict__ ends) {
    for (int64_t e = first_group<1>(); e < E; e += group_count<1>()) ends[e] = static_cast<int32_t>(offsets[e + 1]);
}

// A block takes a stretch of an expert's gradient.
constexpr int64_t STRETCH = 16 * ROW_THREADS;

template <typename Stored>
__global__ void __launch_bounds__(ROW_THREADS, 1)
    clear(const int64_t *__restrict__ offsets, int64_t E, int64_t size, Stored *__restrict__ gradient) {
    const int64_t stretches = ceil_div(size, STRETCH);
    for (int64_t index = blockIdx.x; index < E * stretches; index += gridDim.x) {
        const int64_t e = index / stretches, first = index % stretches * STRETCH;
        if (offsets[e] != offsets[e + 1]) continue;
        for (int64_t i = first + threadIdx.x; i < size && i < first + STRETCH; i += ROW_THREADS)
            gradient[e * size + i] = Stored{};
    }
}

template <typename Stored>
mmbal_status run_sums(const void *rows, const int64_t *offsets, int64_t R, int64_t E, int64_t columns, void *sums,
                      void *workspace, mmbal_stream stream) {
    Real<Stored> *parts = static_cast<Real<Stored> *>(workspace);
    const int64_t count = most_row_tiles(R, E, PART_ROWS);
    MMBAL_RETURN_UNLESS_OK(launch(stream, count * ceil_div(columns, ROW_THREADS), ROW_THREADS, 0, sum_parts<Stored>,
                                  static_cast<const Stored *>(rows), offsets, count, E, columns, parts));
    return launch(stream, ceil_div(E * columns, ROW_THREADS), ROW_THREADS, 0, add_parts<Stored>, parts, offsets, E,
                  columns, static_cast<Stored *>(sums));
}

template <typename Stored>
mmbal_status run_clear(const int64_t *offsets, int64_t E, int64_t size, void *gradient, mmbal_stream stream) {
    return launch(stream, E * ceil_div(size, STRETCH), ROW_THREADS, 0, clear<Stored>, offsets, E, size,
                  static_cast<Stored *>(gradient));
}

} // namespace
} // namespace mmbal

using namespace mmbal;

int64_t mmbal_expert_sums_workspace_cuda(mmbal_dtype dtype, int64_t R, int64_t E, int64_t columns) {
    return most_row_tiles(R, E, PART_ROWS) * columns * real_size(dtype);
}

mmbal_status mmbal_expert_sums_cuda(mmbal_dtype dtype, const void *rows, const int64_t *offsets, int64_t R, int64_t E,
                                    int64_t columns, void *sums, void *workspace, mmbal_stream stream) {
    if (R < 0 || E < 1 || columns < 1) return MMBAL_INVALID_ARGUMENT;
    MMBAL_RETURN_FOR_DTYPE(dtype, run_sums, rows, offsets, R, E, columns, sums, workspace, stream);
}

mmbal_status mmbal_expert_ends_cuda(const int64_t *offsets, int64_t E, int32_t *ends, mmbal_stream stream) {
    if (E < 1) return MMBAL_INVALID_ARGUMENT;
    return launch(stream, ceil_div(E, ROW_THREADS), ROW_THREADS, 0, write_ends, offsets, E, ends);
}

mmbal_status mmbal_expert_clear_cuda(mmbal_dtype dtype, const int64_t *offsets, int64_t E, int64_t size, void *gradient,
                                     mmbal_stream stream) {
    if (E < 1 || size < 1) return MMBAL_INVALID_ARGUMENT;
    MMBAL_RETURN_FOR_DTYPE(dtype, run_clear, offsets, E, size, gradient, stream);
}
