// The alignment loss: statistics of logits tile by tile, then logsumexps of own rows and columns, then the means.
#include "alignment.cuh"

namespace mmbal {
namespace {

struct Segments {
    int64_t size, count; // candidates of a segment: whole tiles
};

Segments cut(int64_t A, int64_t tile) {
    const int64_t size = tile * ceil_div(ceil_div(A, tile), MOST_SEGMENTS);
    return {size, ceil_div(A, size)};
}

// The largest logit and the sum of exp(z - largest): of rows by segments of columns, of columns by segments of rows.
template <typename R>
struct Statistics {
    R *row_largest, *row_sum, *col_largest, *col_sum; // [segments.count, A]
    R *diagonal;                                      // [A], own ones
    Segments segments;
    int64_t offset, end; // own rows
    bool symmetric;

    __device__ bool has_own(int64_t first, int64_t count) const { return first < end && first + count > offset; }
};

// Of one row or column of a tile; `next` lies between its logits. A group of LANES threads takes it.
template <int LANES, typename R>
__device__ __forceinline__ void take_statistics(const R *z, int next, int count, bool is_there, bool first, R *largest,
                                                R *sum) {
    const int lane = threadIdx.x % LANES;
    R top = -static_cast<R>(INFINITY), total = 0;
    for (int k = lane; k < count && is_there; k += LANES) top = z[k * next] > top ? z[k * next] : top;
    top = largest_over_lanes<LANES>(top);
    const R shift = top == -static_cast<R>(INFINITY) ? 0 : top;
    for (int k = lane; k < count && is_there; k += LANES) total += exp_real(z[k * next] - shift);
    total = sum_over_lanes<LANES>(total);
    if (lane > 0 || !is_there) return;
    if (!first) {
        const R before = *largest, both = before > top ? before : top;
        const R from = both == -static_cast<R>(INFINITY) ? 0 : both;
        total = *sum * exp_real(before - from) + total * exp_real(top - from);
        top = both;
    }
    *largest = top, *sum = total;
}

// A block takes a segment of rows by one of columns, tile by tile.
template <typename Multiply, typename R>
__global__ void __launch_bounds__(Multiply::THREADS, Multiply::BLOCKS)
    logit_statistics(Similarities<R> c, Statistics<R> to) {
    constexpr int TILE = Multiply::TILE, STRIDE = LOGITS_STRIDE<Multiply>, LANES = Multiply::THREADS / TILE;
    if (!c.scale->contrasted) return;
    const int64_t across = to.segments.count, tiles = to.segments.size / TILE; // of a segment
    for (int64_t index = blockIdx.x; index < across * across; index += gridDim.x)
        for (int64_t tile = 0; tile < tiles * tiles; tile++) {
            const int64_t row = index / across * to.segments.size + tile / tiles * TILE;
            const int64_t col = index % across * to.segments.size + tile % tiles * TILE;
            if (row >= c.A || col >= c.A) continue;
            const int rows = static_cast<int>(at_most(c.A - row, TILE));
            const int cols = static_cast<int>(at_most(c.A - col, TILE));
            const bool own_rows = to.has_own(row, rows), own_cols = to.symmetric && to.has_own(col, cols);
            if (!own_rows && !own_cols) continue; // the same for all threads
            const R *z = logits_of_tile<Multiply>(c, row, col);
            const int line = threadIdx.x / LANES;
            if (own_rows) {
                const int64_t at = index % across * c.A + row + line;
                take_statistics<LANES>(z + line * STRIDE, 1, cols, line < rows, tile % tiles == 0, to.row_largest + at,
                                       to.row_sum + at);
            }
            if (own_cols) {
                const int64_t at = index / across * c.A + col + line;
                take_statistics<LANES>(z + line, STRIDE, rows, line < cols, tile < tiles, to.col_largest + at,
                                       to.col_sum + at);
            }
            const int i = static_cast<int>(threadIdx.x);
            const int64_t j = row + i - col; // on the diagonal
            if (i < rows && j >= 0 && j < cols) to.diagonal[row + i] = z[i * STRIDE + j];
            __syncthreads(); // the logits have been read
        }
}

// logsumexp of parts, `stride` apart, in their order
template <typename R>
__device__ __forceinline__ double logsumexp_of_parts(const R *largest, const R *sums, int64_t parts, int64_t stride) {
    double top = -static_cast<double>(INFINITY), sum = 0;
    for (int64_t p = 0; p < parts; p++) top = largest[p * stride] > top ? largest[p * stride] : top;
    for (int64_t p = 0; p < parts; p++)
        if (sums[p * stride] != 0)
            sum += static_cast<double>(sums[p * stride]) * exp(static_cast<double>(largest[p * stride]) - top);
    return top + log(sum);
}

template <typename R>
__global__ void __launch_bounds__(ALIGN_THREADS, 1)
    combine_rows(Similarities<R> c, Statistics<R> of, R *__restrict__ normalizers, double *__restrict__ losses) {
    const int64_t B = of.end - of.offset, parts = of.segments.count;
    for (int64_t b = first_group<1>(); b < B; b += group_count<1>()) {
        const int64_t a = of.offset + b;
        double of_row = 0, of_col = 0, loss = 0;
        if (c.scale->contrasted && (!c.present || c.present[a])) {
            const double diagonal = of.diagonal[a];
            of_row = logsumexp_of_parts(of.row_largest + a, of.row_sum + a, parts, c.A);
            loss = of_row - diagonal;
            if (of.symmetric) {
                of_col = logsumexp_of_parts(of.col_largest + a, of.col_sum + a, parts, c.A);
                loss = 0.5 * (loss + of_col - diagonal);
            }
        }
        normalizers[b] = static_cast<R>(of_row), normalizers[B + b] = static_cast<R>(of_col);
        losses[b] = loss;
    }
}

// The sum of a block's values, for its first thread.
__device__ __forceinline__ double sum_over_block(double value, double *of_warps) {
    value = sum_over_lanes<WARP>(value);
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = value;
    __syncthreads();
    double sum = 0;
    for (int warp = 0; warp < ALIGN_BLOCK_THREADS / WARP && threadIdx.x == 0; warp++) sum += of_warps[warp];
    __syncthreads();
    return sum;
}

// One block.
template <typename R>
__global__ void __launch_bounds__(ALIGN_BLOCK_THREADS, 1)
    finish_losses(const AlignScale *__restrict__ scale, const double *__restrict__ regressions,
                  const double *__restrict__ contrasts, int64_t B, double alpha, R *loss, R *regression,
                  R *contrastive) {
    double *of_warps = shared_memory<double>(); // [WARP]
    double of_regression = 0, of_contrast = 0;
    for (int64_t b = threadIdx.x; b < B; b += ALIGN_BLOCK_THREADS)
        of_regression += regressions[b], of_contrast += contrasts[b];
    of_regression = sum_over_block(of_regression, of_warps), of_contrast = sum_over_block(of_contrast, of_warps);
    if (threadIdx.x > 0) return;
    of_regression = scale->of_row == 0 ? 0 : of_regression * scale->of_row;
    of_contrast = scale->contrasted ? of_contrast * scale->of_row : 0;
    *regression = static_cast<R>(of_regression), *contrastive = static_cast<R>(of_contrast);
    *loss = static_cast<R>((alpha > 0 ? alpha * of_regression : 0) + (alpha < 1 ? (1 - alpha) * of_contrast : 0));
}

template <typename R>
struct Forward {
    Similarities<R> c;
    Statistics<R> statistics;
    AlignScale *scale;
    double *regressions, *contrasts; // [B]
};

template <typename R>
Forward<R> lay_out(const mmbal_alignment &t, int64_t tile, Pieces *from) {
    Forward<R> f = {};
    f.scale = from->take<AlignScale>(1);
    f.c = take_similarities<R>(t, from);
    f.c.scale = f.scale;
    Statistics<R> &s = f.statistics;
    s.segments = cut(t.A > 0 ? t.A : 1, tile);
    s.offset = t.offset, s.end = t.offset + t.B, s.symmetric = t.symmetric != 0;
    for (R **each : {&s.row_largest, &s.row_sum, &s.col_largest, &s.col_sum})
        *each = from->take<R>(s.segments.count * t.A);
    s.diagonal = from->take<R>(t.A);
    f.regressions = from->take<double>(t.B), f.contrasts = from->take<double>(t.B);
    return f;
}

template <typename Stored, typename Multiply>
mmbal_status run(const mmbal_alignment &t, void *loss, void *regression, void *contrastive, void *normalizers,
                 void *workspace, mmbal_stream stream) {
    using R = Real<Stored>;
    Pieces pieces(workspace);
    const Forward<R> f = lay_out<R>(t, Multiply::TILE, &pieces);
    MMBAL_RETURN_UNLESS_OK(weigh_rows<R>(t, nullptr, nullptr, nullptr, f.scale, stream));
    MMBAL_RETURN_UNLESS_OK(take_regression<Stored>(t, f.regressions, stream));
    if (t.B > 0) {
        MMBAL_RETURN_UNLESS_OK(take_units<Stored>(t, f.c, stream));
        const int64_t segments = f.statistics.segments.count;
        MMBAL_RETURN_UNLESS_OK(launch(stream, segments * segments, Multiply::THREADS, LOGITS_SHARED<Multiply>,
                                      logit_statistics<Multiply, R>, f.c, f.statistics));
    }
    MMBAL_RETURN_UNLESS_OK(launch(stream, ceil_div(t.B, ALIGN_THREADS), ALIGN_THREADS, 0, combine_rows<R>, f.c,
                                  f.statistics, static_cast<R *>(normalizers), f.contrasts));
    return launch(stream, 1, ALIGN_BLOCK_THREADS, WARP * sizeof(double), finish_losses<R>, f.scale, f.regressions,
                  f.contrasts, t.B, t.alpha, static_cast<R *>(loss), static_cast<R *>(regression),
                  static_cast<R *>(contrastive));
}

template <typename Stored>
mmbal_status run_for_size(const mmbal_alignment &t, void *loss, void *regression, void *contrastive, void *normalizers,
                          void *workspace, mmbal_stream stream) {
    using R = Real<Stored>;
    return (t.A < FEW_CANDIDATES ? run<Stored, SmallTile<R>> : run<Stored, LargeTile<R>>)(t, loss, regression,
                                                                                          contrastive, normalizers,
                                                                                          workspace, stream);
}

} // namespace
} // namespace mmbal

using namespace mmbal;

int64_t mmbal_align_loss_workspace_cuda(const mmbal_alignment *alignment) {
    mmbal_status status = MMBAL_OK;
    if (!alignment_is_served(*alignment, &status)) return 0;
    Pieces pieces(nullptr);
    const bool few = alignment->A < FEW_CANDIDATES;
    if (alignment->dtype == MMBAL_F64)
        lay_out<double>(*alignment, few ? SmallTile<double>::TILE : LargeTile<double>::TILE, &pieces);
    else
        lay_out<float>(*alignment, few ? SmallTile<float>::TILE : LargeTile<float>::TILE, &pieces);
    return pieces.bytes();
}

mmbal_status mmbal_align_loss_cuda(const mmbal_alignment *alignment, void *loss, void *regression, void *contrastive,
                                   void *normalizers, void *workspace, mmbal_stream stream) {
    mmbal_status status = MMBAL_OK;
    if (!alignment_is_served(*alignment, &status)) return status;
    MMBAL_RETURN_FOR_DTYPE(alignment->dtype, run_for_size, *alignment, loss, regression, contrastive, normalizers,
                           workspace, stream);
}
