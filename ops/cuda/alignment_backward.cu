// The gradient of the alignment loss. Logits are taken again a stripe of columns at a time; of its gradient g, rows by
// columns, dsource gets g target, added up in the order of the stripes, and the stripe's rows of dtarget are g^T
// source, summed over parts of the rows.
#include "alignment.cuh"

namespace mmbal {
namespace {

constexpr int64_t MOST_PARTS = 8;

// Of candidates as rows and as columns: logsumexps, infinite where they are none of our own; weights of their losses.
template <typename R>
struct LogitWeights {
    R *row_normalizer, *row_weight, *col_normalizer, *col_weight; // [A]
};

template <typename R>
__global__ void __launch_bounds__(ALIGN_THREADS, 1)
    weigh_logits(mmbal_alignment t, const AlignScale *__restrict__ scale, const R *__restrict__ normalizers,
                 LogitWeights<R> to) {
    const double upstream = scale->contrastive;
    for (int64_t a = first_group<1>(); a < t.A; a += group_count<1>()) {
        const bool own = a >= t.offset && a < t.offset + t.B && (!t.present || t.present[a]);
        const bool as_col = own && t.symmetric;
        to.row_normalizer[a] = own ? normalizers[a - t.offset] : static_cast<R>(INFINITY);
        to.col_normalizer[a] = as_col ? normalizers[t.B + a - t.offset] : static_cast<R>(INFINITY);
        to.row_weight[a] = own ? static_cast<R>(t.symmetric ? 0.5 * upstream : upstream) : 0;
        to.col_weight[a] = as_col ? static_cast<R>(0.5 * upstream) : 0;
    }
}

// Rows first ... last by columns col ... col + cols.
struct Stripe {
    int64_t first, last, col, cols;
    __host__ __device__ int64_t rows() const { return last - first; }
};

// Tiles of a product of this block, which takes them by turns.
template <int TILE, typename Body>
__device__ __forceinline__ void for_tiles(int64_t rows, int64_t cols, Body body) {
    const int64_t across = ceil_div(cols, TILE), tiles = ceil_div(rows, TILE) * across;
    for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x)
        body(index / across * TILE, index % across * TILE);
}

// gradient [rows, STRIPE]
template <typename Multiply, typename R>
__global__ void __launch_bounds__(Multiply::THREADS, Multiply::BLOCKS)
    logit_gradient(Similarities<R> c, LogitWeights<R> of, bool symmetric, Stripe s, R *__restrict__ gradient) {
    constexpr int TILE = Multiply::TILE, STRIDE = LOGITS_STRIDE<Multiply>;
    if (!c.scale->contrasted) return;
    for_tiles<TILE>(s.rows(), s.cols, [&](int64_t down, int64_t across) {
        const R *z = logits_of_tile<Multiply>(c, s.first + down, s.col + across);
        const int64_t row = s.first + down, col = s.col + across;
        const int rows = static_cast<int>(at_most(s.last - row, TILE));
        const int j = threadIdx.x % TILE;
        if (across + j < s.cols) {
            const R normalizer = of.col_normalizer[col + j], weight = of.col_weight[col + j];
            for (int i = threadIdx.x / TILE; i < rows; i += Multiply::THREADS / TILE) {
                const R logit = z[i * STRIDE + j], of_row = of.row_weight[row + i];
                R slope = of_row * exp_real(logit - of.row_normalizer[row + i]);
                if (symmetric) slope += weight * exp_real(logit - normalizer);
                if (row + i == col + j) slope -= of_row + weight;
                gradient[(down + i) * STRIPE + across + j] = slope;
            }
        }
        __syncthreads(); // the logits have been read
    });
}

// dsource [A, c.stride] += gradient target. One block a multiprocessor: two would leave it too few registers.
template <typename Multiply, typename R>
__global__ void __launch_bounds__(Multiply::THREADS, 1)
    add_to_source(Similarities<R> c, Stripe s, const R *__restrict__ gradient, R *__restrict__ dsource) {
    constexpr int TILE = Multiply::TILE;
    if (!c.scale->contrasted) return;
    for_tiles<TILE>(s.rows(), c.C, [&](int64_t row, int64_t col) {
        multiply_tile<Multiply, true, false, true>(
            {gradient + row * STRIPE, STRIPE, 1, at_most(s.rows() - row, TILE), s.cols, true},
            {c.target.unit + s.col * c.stride + col, 1, c.stride, at_most(c.C - col, TILE), s.cols, true}, c.stride,
            dsource + (s.first + row) * c.stride + col);
    });
}

// parts [count, STRIPE, c.stride]: gradient^T source over rows_of_part rows each.
template <typename Multiply, typename R>
__global__ void __launch_bounds__(Multiply::THREADS, Multiply::BLOCKS)
    sum_for_target(Similarities<R> c, Stripe s, const R *__restrict__ gradient, int64_t count, int64_t rows_of_part,
                   R *__restrict__ parts) {
    constexpr int TILE = Multiply::TILE;
    if (!c.scale->contrasted) return;
    const int64_t down = ceil_div(s.cols, TILE);
    for_tiles<TILE>(count * down * TILE, c.C, [&](int64_t index, int64_t col) {
        const int64_t part = index / TILE / down, row = index / TILE % down * TILE, from = part * rows_of_part;
        const int64_t depth = at_most(s.rows() - from, rows_of_part);
        multiply_tile<Multiply, false, false>(
            {gradient + from * STRIPE + row, 1, STRIPE, at_most(s.cols - row, TILE), depth, true},
            {c.source.unit + (s.first + from) * c.stride + col, 1, c.stride, at_most(c.C - col, TILE), depth, true},
            c.stride, parts + (part * STRIPE + row) * c.stride + col);
    });
}

template <typename R>
struct Backward {
    AlignScale *scale;
    Similarities<R> c;
    LogitWeights<R> weights;
    R *gradient; // [A, STRIPE]
    R *dsource;  // [A, c.stride]
    R *parts;    // [MOST_PARTS, STRIPE, c.stride]
};

template <typename R>
Backward<R> lay_out(const mmbal_alignment &t, const mmbal_alignment_gradients &to, Pieces *from) {
    Backward<R> b = {};
    b.scale = from->take<AlignScale>(1);
    if (!to.source_embedding && !to.target_embedding) return b;
    b.c = take_similarities<R>(t, from);
    b.c.scale = b.scale;
    LogitWeights<R> &w = b.weights;
    for (R **each : {&w.row_normalizer, &w.row_weight, &w.col_normalizer, &w.col_weight}) *each = from->take<R>(t.A);
    b.gradient = from->take<R>(t.A * STRIPE);
    if (to.source_embedding) b.dsource = from->take<R>(t.A * b.c.stride);
    if (to.target_embedding) b.parts = from->take<R>(MOST_PARTS * STRIPE * b.c.stride);
    return b;
}

// The rows of a stripe that have a gradient: all where own columns pass through it, else the own ones.
Stripe stripe_at(const mmbal_alignment &t, int64_t col) {
    const int64_t cols = STRIPE < t.A - col ? STRIPE : t.A - col, end = t.offset + t.B;
    const bool all = t.symmetric && col < end && col + cols > t.offset;
    return {all ? 0 : t.offset, all ? t.A : end, col, cols};
}

template <typename Stored, typename Multiply>
mmbal_status run_stripes(const mmbal_alignment &t, const Backward<Real<Stored>> &b, const mmbal_alignment_gradients &to,
                         mmbal_stream stream) {
    using R = Real<Stored>;
    constexpr int TILE = Multiply::TILE, THREADS = Multiply::THREADS;
    constexpr size_t SHARED = Stages<Multiply>::SHARED;
    for (int64_t col = 0; col < t.A; col += STRIPE) {
        const Stripe s = stripe_at(t, col);
        const int64_t down = ceil_div(s.rows(), TILE), across = ceil_div(s.cols, TILE), wide = ceil_div(t.C, TILE);
        MMBAL_RETURN_UNLESS_OK(launch(stream, down * across, THREADS, LOGITS_SHARED<Multiply>,
                                      logit_gradient<Multiply, R>, b.c, b.weights, t.symmetric != 0, s, b.gradient));
        if (b.dsource)
            MMBAL_RETURN_UNLESS_OK(launch(stream, down * wide, THREADS, SHARED, add_to_source<Multiply, R>, b.c, s,
                                          b.gradient, b.dsource));
        if (!b.parts) continue;
        const int64_t rows_of_part = ceil_div(down, MOST_PARTS) * TILE, count = ceil_div(s.rows(), rows_of_part);
        MMBAL_RETURN_UNLESS_OK(launch(stream, count * across * wide, THREADS, SHARED, sum_for_target<Multiply, R>, b.c,
                                      s, b.gradient, count, rows_of_part, b.parts));
        MMBAL_RETURN_UNLESS_OK(
            give_unit_gradient<Stored>(b.c, b.c.target, s.col, s.cols, b.parts, count, STRIPE * b.c.stride,
                                       static_cast<Stored *>(to.target_embedding) + s.col * t.C, stream));
    }
    return MMBAL_OK;
}

mmbal_status clear(void *data, int64_t bytes, mmbal_stream stream) {
    if (bytes == 0) return MMBAL_OK;
    const cudaError_t error = cudaMemsetAsync(data, 0, static_cast<size_t>(bytes), static_cast<cudaStream_t>(stream));
    return error == cudaSuccess ? MMBAL_OK : MMBAL_DEVICE_ERROR;
}

template <typename Stored>
mmbal_status run_backward(const mmbal_alignment &t, const void *dloss, const void *dregression,
                          const void *dcontrastive, const void *normalizers, const mmbal_alignment_gradients &to,
                          void *workspace, mmbal_stream stream) {
    using R = Real<Stored>;
    Pieces pieces(workspace);
    const Backward<R> b = lay_out<R>(t, to, &pieces);
    MMBAL_RETURN_UNLESS_OK(weigh_rows<R>(t, static_cast<const R *>(dloss), static_cast<const R *>(dregression),
                                         static_cast<const R *>(dcontrastive), b.scale, stream));
    if (to.pred || to.target)
        MMBAL_RETURN_UNLESS_OK(give_regression_gradient<Stored>(t, b.scale, to.pred, to.target, stream));
    if (!to.source_embedding && !to.target_embedding) return MMBAL_OK;
    if (t.B == 0) { // no row has a gradient
        const int64_t bytes = t.A * t.C * static_cast<int64_t>(sizeof(Stored));
        if (to.source_embedding) MMBAL_RETURN_UNLESS_OK(clear(to.source_embedding, bytes, stream));
        return to.target_embedding ? clear(to.target_embedding, bytes, stream) : MMBAL_OK;
    }
    MMBAL_RETURN_UNLESS_OK(take_units<Stored>(t, b.c, stream));
    MMBAL_RETURN_UNLESS_OK(launch(stream, ceil_div(t.A, ALIGN_THREADS), ALIGN_THREADS, 0, weigh_logits<R>, t, b.scale,
                                  static_cast<const R *>(normalizers), b.weights));
    if (b.dsource) MMBAL_RETURN_UNLESS_OK(clear(b.dsource, t.A * b.c.stride * static_cast<int64_t>(sizeof(R)), stream));
    MMBAL_RETURN_UNLESS_OK((t.A < FEW_CANDIDATES ? run_stripes<Stored, SmallTile<R>>
                                                 : run_stripes<Stored, LargeTile<R>>)(t, b, to, stream));
    if (!b.dsource) return MMBAL_OK;
    return give_unit_gradient<Stored>(b.c, b.c.source, 0, t.A, b.dsource, 1, 0, to.source_embedding, stream);
}

} // namespace
} // namespace mmbal

using namespace mmbal;

int64_t mmbal_align_loss_backward_workspace_cuda(const mmbal_alignment *alignment,
                                                 const mmbal_alignment_gradients *gradients) {
    mmbal_status status = MMBAL_OK;
    if (!alignment_is_served(*alignment, &status)) return 0;
    Pieces pieces(nullptr);
    if (alignment->dtype == MMBAL_F64)
        lay_out<double>(*alignment, *gradients, &pieces);
    else
        lay_out<float>(*alignment, *gradients, &pieces);
    return pieces.bytes();
}

mmbal_status mmbal_align_loss_backward_cuda(const mmbal_alignment *alignment, const void *dloss,
                                            const void *dregression, const void *dcontrastive, const void *normalizers,
                                            const mmbal_alignment_gradients *gradients, void *workspace,
                                            mmbal_stream stream) {
    mmbal_status status = MMBAL_OK;
    if (!alignment_is_served(*alignment, &status)) return status;
    MMBAL_RETURN_FOR_DTYPE(alignment->dtype, run_backward, *alignment, dloss, dregression, dcontrastive, normalizers,
                           *gradients, workspace, stream);
}
