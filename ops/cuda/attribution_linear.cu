// The attributions of a linear head and the gradients of their regulariser, as four products over matrices in which the
// modalities lie side by side: g = coef W, then v in its place; m = v W^T; dW = coef^T v + zeta^T e.
#include "attribution.cuh"
#include "register_tile.cuh"
#include "softmax.cuh"

namespace mmbal {
namespace {

constexpr int THREADS = 256;

// Columns of a matrix to columns of another one, of another dtype perhaps.
template <typename From, typename To>
struct Columns {
    const From *from;
    To *to;
    int64_t from_stride, to_stride, columns;
    bool aligned; // all rows of both are
};

template <typename From, typename To>
struct ColumnsTable {
    static constexpr int64_t SIZE = 64;
    Columns<From, To> of[SIZE];
    int64_t first, count;
};

template <typename From, typename To>
__global__ void __launch_bounds__(THREADS, 1) copy_columns(ColumnsTable<From, To> t, int64_t rows) {
    constexpr int SIZE = Pack<From>::SIZE > Pack<To>::SIZE ? Pack<From>::SIZE : Pack<To>::SIZE;
    for (int64_t row = first_group<WARP>(); row < rows * t.count; row += group_count<WARP>()) {
        const Columns<From, To> &of = t.of[row / rows];
        const From *from = of.from + row % rows * of.from_stride;
        To *to = of.to + row % rows * of.to_stride;
        MMBAL_FOR_PACKS(column, of.columns) {
            const int64_t left = of.columns - column;
            const Loaded<SIZE, From> loaded = load_some<SIZE>(from + column, left, of.aligned);
#pragma unroll
            for (int first = 0; first < SIZE; first += Pack<To>::SIZE) {
                Pack<To> pack;
#pragma unroll
                for (int i = 0; i < Pack<To>::SIZE; i++) store(&pack.of[i], loaded.of[first + i]);
                store_pack(to + column + first, pack, left - first, of.aligned);
            }
        }
    }
}

// The first of the largest logits of a row, as a loop from its beginning finds it where some are no numbers.
template <typename Stored>
__device__ __forceinline__ int64_t largest_logit(const Stored *logits, int64_t C, int lane) {
    Real<Stored> largest = load(logits[0]);
    int64_t chosen = 0;
    for (int64_t c = lane; c < C; c += WARP) {
        const Real<Stored> logit = load(logits[c]);
        if (logit > largest) largest = logit, chosen = c;
    }
#pragma unroll
    for (int step = WARP / 2; step > 0; step /= 2) {
        const Real<Stored> other = __shfl_xor_sync(ALL_LANES, largest, step);
        const int64_t its = __shfl_xor_sync(ALL_LANES, chosen, step);
        if (other > largest || (other == largest && its < chosen)) largest = other, chosen = its;
    }
    return chosen;
}

// What of two is larger, or no number.
template <typename R>
__device__ __forceinline__ R larger(R a, R b) {
    return a != a || a > b ? a : b;
}

// Coefficients of the weights' rows in the score's gradient, [B, C] rows `stride` apart. A warp takes a sample.
template <typename Stored>
__global__ void __launch_bounds__(THREADS, 1)
    find_coefficients(const Stored *__restrict__ logits, const int64_t *__restrict__ classes, int64_t B, int64_t C,
                      int64_t stride, bool odds, Real<Stored> *__restrict__ coefficients) {
    using R = Real<Stored>;
    // A float32 probability below it counts as 0; see ops/cpu/attribution_sample.h.
    constexpr R NEGLIGIBLE = sizeof(R) == 4 ? static_cast<R>(0x1p-64) : 0;
    const int lane = threadIdx.x % WARP;
    for (int64_t b = first_group<WARP>(); b < B; b += group_count<WARP>()) {
        const Stored *z = logits + b * C;
        R *coefficient = coefficients + b * stride;
        const int64_t chosen = classes ? classes[b] : largest_logit(z, C, lane);
        require_index(chosen, C);
        R largest = -static_cast<R>(INFINITY), sum = 0;
        for (int64_t c = lane; c < C; c += WARP)
            if (c != chosen) largest = larger(static_cast<R>(load(z[c])), largest);
#pragma unroll
        for (int step = WARP / 2; step > 0; step /= 2)
            largest = larger(largest, __shfl_xor_sync(ALL_LANES, largest, step));
        // Where no other class is left the odds are the logit, but for a constant.
        const bool has_others = odds && largest != -static_cast<R>(INFINITY);
        for (int64_t c = lane; c < C; c += WARP) {
            const R value = !has_others || c == chosen ? 0 : exp_nonpositive(load(z[c]) - largest);
            coefficient[c] = value;
            sum += value;
        }
        sum = sum_over_lanes<WARP>(sum);
        for (int64_t c = lane; c < C; c += WARP) {
            const R value = coefficient[c];
            if (sum != 0) coefficient[c] = value < NEGLIGIBLE * sum ? 0 : -value / sum;
            if (c == chosen) coefficient[c] = C == 1 && odds && load(z[0]) < 0 ? -1 : 1;
        }
    }
}

// products [B, C] of v with the rows of W become zeta. A warp takes a sample.
template <typename R>
__global__ void __launch_bounds__(THREADS, 1)
    find_zeta(const R *__restrict__ coefficients, int64_t B, int64_t C, int64_t stride, R *__restrict__ products) {
    const int lane = threadIdx.x % WARP;
    for (int64_t b = first_group<WARP>(); b < B; b += group_count<WARP>()) {
        const R *coefficient = coefficients + b * stride;
        R *row = products + b * stride, mean = 0;
        for (int64_t c = lane; c < C; c += WARP) mean -= coefficient[c] < 0 ? coefficient[c] * row[c] : 0;
        mean = sum_over_lanes<WARP>(mean);
        for (int64_t c = lane; c < C; c += WARP) row[c] = coefficient[c] < 0 ? coefficient[c] * (row[c] - mean) : 0;
    }
}

// sums [C] of the columns of rows [B, C], or 0 without rows. A block takes as many columns as a warp has lanes, its
// warps parts of the rows.
template <typename Stored>
__global__ void __launch_bounds__(THREADS, 1) sum_columns(const Real<Stored> *__restrict__ rows, int64_t B, int64_t C,
                                                          int64_t stride, Stored *__restrict__ sums) {
    constexpr int PARTS = THREADS / WARP;
    double *parts = shared_memory<double>(); // [PARTS, WARP]
    const int lane = threadIdx.x % WARP, part = threadIdx.x / WARP;
    for (int64_t block = blockIdx.x; block * WARP < C; block += gridDim.x) {
        const int64_t c = block * WARP + lane;
        double sum = 0;
        for (int64_t b = part; b < B && c < C; b += PARTS) sum += static_cast<double>(rows[b * stride + c]);
        parts[part * WARP + lane] = sum;
        __syncthreads();
        if (part == 0 && c < C) {
            sum = 0;
            for (int i = 0; i < PARTS; i++) sum += parts[i * WARP + lane];
            store(&sums[c], static_cast<Real<Stored>>(sum));
        }
        __syncthreads(); // the parts are the next columns'
    }
}

// out [a.rows, b.rows], rows `stride` apart: sum over k of a(i, k) b(j, k).
template <typename Multiply, bool A_ALONG, bool B_ALONG>
__global__ void __launch_bounds__(Multiply::THREADS, Multiply::BLOCKS)
    product(Operand<typename Multiply::Left> a, Operand<typename Multiply::Right> b, int64_t stride,
            typename Multiply::Sum *__restrict__ out) {
    constexpr int TILE = Multiply::TILE;
    const int64_t across = ceil_div(b.rows, TILE), tiles = ceil_div(a.rows, TILE) * across;
    for (int64_t index = blockIdx.x; index < tiles; index += gridDim.x) {
        const int64_t row = index / across * TILE, column = index % across * TILE;
        Operand<typename Multiply::Left> left = a;
        left.data += row * a.row_stride, left.rows = at_most(a.rows - row, TILE);
        Operand<typename Multiply::Right> right = b;
        right.data += column * b.row_stride, right.rows = at_most(b.rows - column, TILE);
        multiply_tile<Multiply, A_ALONG, B_ALONG>(left, right, stride, out + row * stride + column);
    }
}

// A matrix whose rows lie apart, and its transpose as an operand.
template <typename R>
struct Matrix {
    const R *data;
    int64_t rows, columns, stride;
    Operand<R> by_rows() const { return {data, stride, 1, rows, columns, aligned()}; }
    Operand<R> by_columns() const { return {data, 1, stride, columns, rows, aligned()}; }
    bool aligned() const { return rows_are_aligned(data, stride, sizeof(R)); }
};

template <bool A_ALONG, bool B_ALONG, typename R>
mmbal_status multiply(Operand<R> a, Operand<R> b, int64_t stride, R *out, mmbal_stream stream) {
    // Large tiles where they are enough for the processors of a large GPU; an element's sum is the same in both.
    constexpr int64_t MANY = 128;
    using Large = Registers<R>;
    using Small = Registers<R, R, Pack<R>::SIZE>;
    const auto tiles = [&](int64_t tile) { return ceil_div(a.rows, tile) * ceil_div(b.rows, tile); };
    const auto launch_kernel = [&](auto *kernel, int64_t blocks, size_t shared) {
        return launch(stream, blocks, Large::THREADS, shared, kernel, a, b, stride, out);
    };
    static_assert(Large::THREADS == Small::THREADS);
    if (tiles(Large::TILE) >= MANY)
        return launch_kernel(product<Large, A_ALONG, B_ALONG>, tiles(Large::TILE), Stages<Large>::SHARED);
    return launch_kernel(product<Small, A_ALONG, B_ALONG>, tiles(Small::TILE), Stages<Small>::SHARED);
}

// Where a call's matrices lie in the workspace; all of real. Rows of [B, width] are `columns` apart, those of [B, C]
// `classes`; so begin packs. zeta follows the coefficients, and the embeddings the gradients: both factors of dW.
struct Layout {
    int64_t width, columns, classes;
    bool weights_in_place, dweights_in_place;
    int64_t coefficients, zeta, gradients, embeddings, weights, dweights, scratch, bytes; // first bytes
};

// Whether all modalities' columns lie side by side in one matrix of real.
template <typename Pointer>
bool are_side_by_side(const mmbal_attribution &t, const mmbal_linear_head &head, const Pointer *weights) {
    if (t.dtype != MMBAL_F32 && t.dtype != MMBAL_F64) return false;
    const int64_t size = t.dtype == MMBAL_F64 ? sizeof(double) : sizeof(float);
    int64_t first = 0;
    for (int64_t m = 0; m < t.M; first += t.modalities[m++].d)
        if (static_cast<const char *>(weights[m]) != static_cast<const char *>(weights[0]) + first * size) return false;
    return head.row_stride >= first || (t.M == 1 && head.row_stride == 0);
}

Layout lay_out(const mmbal_attribution &t, const mmbal_linear_head &head, void *const *dweights) {
    const int64_t size = t.dtype == MMBAL_F64 ? sizeof(double) : sizeof(float), pack = 16 / size;
    Layout at = {};
    for (int64_t m = 0; m < t.M; m++) at.width += t.modalities[m].d;
    at.columns = ceil_div(at.width, pack) * pack, at.classes = ceil_div(head.C, pack) * pack;
    const int64_t stride = head.row_stride > 0 ? head.row_stride : at.width;
    at.weights_in_place = are_side_by_side(t, head, head.weights) && rows_are_aligned(head.weights[0], stride, size);
    at.dweights_in_place = are_side_by_side(t, head, dweights);
    const auto take = [&](int64_t bytes) {
        const int64_t first = at.bytes;
        at.bytes += ceil_div(bytes, 16) * 16;
        return first;
    };
    at.coefficients = take(t.B * at.classes * size), at.zeta = take(t.B * at.classes * size);
    at.gradients = take(t.B * at.columns * size), at.embeddings = take(t.B * at.columns * size);
    at.weights = take(at.weights_in_place ? 0 : head.C * at.columns * size);
    at.dweights = take(at.dweights_in_place ? 0 : head.C * at.columns * size);
    at.scratch = take(2 * static_cast<int64_t>(sizeof(double)) * t.B * t.M);
    return at;
}

// from(m), to(m): a modality's columns in both matrices; strides of their rows, 0: d.
template <typename From, typename To, typename FromOf, typename ToOf>
mmbal_status copy_modalities(const mmbal_attribution &t, int64_t rows, FromOf from, int64_t from_stride, ToOf to,
                             int64_t to_stride, mmbal_stream stream) {
    int64_t first = 0;
    return in_tables<ColumnsTable<From, To>>(
        t.M,
        [&](Columns<From, To> *of, int64_t m) {
            const int64_t d = t.modalities[m].d;
            *of = {from(m, first), to(m, first), from_stride > 0 ? from_stride : d, to_stride > 0 ? to_stride : d, d,
                   false};
            of->aligned = rows_are_aligned(of->from, of->from_stride, sizeof(From)) &&
                          rows_are_aligned(of->to, of->to_stride, sizeof(To));
            first += d;
        },
        [&](const ColumnsTable<From, To> &table) {
            return launch(stream, ceil_div(rows * table.count * WARP, THREADS), THREADS, 0, copy_columns<From, To>,
                          table, rows);
        });
}

struct Arguments {
    const mmbal_attribution *attribution;
    const mmbal_linear_head *head;
    const void *dreg;
    void *reg, *shares, *magnitudes;
    void *const *dweights;
    void *dbias, *workspace;
    mmbal_stream stream;
};

template <typename Stored>
mmbal_status run(const Arguments &a) {
    using R = Real<Stored>;
    const mmbal_attribution &t = *a.attribution;
    const mmbal_linear_head &head = *a.head;
    const int64_t B = t.B, C = head.C;
    const bool odds = head.score == MMBAL_SCORE_ODDS, has_zeta = odds && C > 1;
    const Layout at = lay_out(t, head, a.dweights);
    const auto place = [&](int64_t offset) { return reinterpret_cast<R *>(static_cast<char *>(a.workspace) + offset); };
    R *coefficients = place(at.coefficients), *zeta = place(at.zeta), *gradients = place(at.gradients);
    R *embeddings = place(at.embeddings), *dweights = place(at.dweights);
    Matrix<R> weights = {place(at.weights), C, at.width, at.columns};
    const int64_t stride = head.row_stride;

    MMBAL_RETURN_UNLESS_OK((copy_modalities<Stored, R>(
        t, B, [&](int64_t m, int64_t) { return static_cast<const Stored *>(t.modalities[m].embedding); }, 0,
        [&](int64_t, int64_t first) { return embeddings + first; }, at.columns, a.stream)));
    if (at.weights_in_place) {
        weights.data = static_cast<const R *>(head.weights[0]), weights.stride = stride > 0 ? stride : at.width;
    } else {
        MMBAL_RETURN_UNLESS_OK((copy_modalities<Stored, R>(
            t, C, [&](int64_t m, int64_t) { return static_cast<const Stored *>(head.weights[m]); }, stride,
            [&](int64_t, int64_t first) { return place(at.weights) + first; }, at.columns, a.stream)));
    }
    MMBAL_RETURN_UNLESS_OK(launch(a.stream, ceil_div(B * WARP, THREADS), THREADS, 0, find_coefficients<Stored>,
                                  static_cast<const Stored *>(head.logits), head.classes, B, C, at.classes, odds,
                                  coefficients));

    const Matrix<R> of_coefficients = {coefficients, B, C, at.classes};
    const Matrix<R> of_gradients = {gradients, B, at.width, at.columns};
    MMBAL_RETURN_UNLESS_OK(
        (multiply<true, false>(of_coefficients.by_rows(), weights.by_columns(), at.columns, gradients, a.stream)));
    mmbal_attributed modalities[MMBAL_MAX_MODALITIES] = {};
    int64_t first = 0;
    for (int64_t m = 0; m < t.M; first += t.modalities[m++].d)
        modalities[m] = {
            gradients + first, embeddings + first, t.modalities[m].d, gradients + first, nullptr, nullptr, nullptr};
    mmbal_attribution real = t;
    real.modalities = modalities, real.dtype = sizeof(R) == 8 ? MMBAL_F64 : MMBAL_F32;
    MMBAL_RETURN_UNLESS_OK(regularise_in_place(real, at.columns, a.dreg, a.reg, a.shares, a.magnitudes,
                                               reinterpret_cast<double *>(place(at.scratch)), a.stream));
    if (has_zeta) {
        MMBAL_RETURN_UNLESS_OK(
            (multiply<true, true>(of_gradients.by_rows(), weights.by_rows(), at.classes, zeta, a.stream)));
        MMBAL_RETURN_UNLESS_OK(launch(a.stream, ceil_div(B * WARP, THREADS), THREADS, 0, find_zeta<R>, coefficients, B,
                                      C, at.classes, zeta));
    }
    MMBAL_RETURN_UNLESS_OK(launch(a.stream, ceil_div(C, WARP), THREADS, THREADS * sizeof(double), sum_columns<Stored>,
                                  zeta, has_zeta ? B : 0, C, at.classes, static_cast<Stored *>(a.dbias)));
    const int64_t depth = has_zeta ? 2 * B : B, own_stride = stride > 0 ? stride : at.width;
    const Matrix<R> left = {coefficients, depth, C, at.classes}, right = {gradients, depth, at.width, at.columns};
    MMBAL_RETURN_UNLESS_OK(
        (multiply<false, false>(left.by_columns(), right.by_columns(), at.dweights_in_place ? own_stride : at.columns,
                                at.dweights_in_place ? static_cast<R *>(a.dweights[0]) : dweights, a.stream)));
    if (at.dweights_in_place) return MMBAL_OK;
    return copy_modalities<R, Stored>(
        t, C, [&](int64_t, int64_t from) { return static_cast<const R *>(dweights + from); }, at.columns,
        [&](int64_t m, int64_t) { return static_cast<Stored *>(a.dweights[m]); }, stride, a.stream);
}

bool head_is_served(const mmbal_attribution &t, const mmbal_linear_head &head) {
    bool served = head.C >= 1 && (head.score == MMBAL_SCORE_ODDS || head.score == MMBAL_SCORE_LOGIT);
    for (int64_t m = 0; served && m < t.M; m++) served = head.row_stride == 0 || head.row_stride >= t.modalities[m].d;
    return served;
}

} // namespace
} // namespace mmbal

using namespace mmbal;

int64_t mmbal_attribution_linear_workspace_cuda(const mmbal_attribution *attribution, const mmbal_linear_head *head,
                                                void *const *dweights) {
    if (!attribution_is_served(*attribution) || !head_is_served(*attribution, *head)) return 0;
    return lay_out(*attribution, *head, dweights).bytes;
}

mmbal_status mmbal_attribution_linear_cuda(const mmbal_attribution *attribution, const mmbal_linear_head *head,
                                           const void *dreg, void *reg, void *shares, void *magnitudes,
                                           void *const *dweights, void *dbias, void *workspace, mmbal_stream stream) {
    if (!attribution_is_served(*attribution) || !head_is_served(*attribution, *head)) return MMBAL_INVALID_ARGUMENT;
    const Arguments a = {attribution, head, dreg, reg, shares, magnitudes, dweights, dbias, workspace, stream};
    MMBAL_RETURN_FOR_DTYPE(attribution->dtype, run, a);
}
