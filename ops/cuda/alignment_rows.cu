// Rows of the alignment loss: regressions, unit vectors and their gradients. A warp takes a row; elements are taken in
// float64, where no square of a float32 over- or underflows.

#include "alignment.cuh"

namespace mmbal {
namespace {

constexpr double LEAST_NORM = 1e-12; // as torch.nn.functional.normalize has it

// The sum over elements of term(x, y), a row of two tensors.
template <typename Stored, typename Term>
__device__ __forceinline__ double sum_of_terms(const Stored *x, const Stored *y, int64_t columns, bool aligned,
                                               Term term) {
    constexpr int SIZE = Pack<Stored>::SIZE;
    double sum = 0;
    MMBAL_FOR_PACKS(column, columns) {
        const Pack<Stored> a = load_pack(x + column, columns - column, aligned);
        const Pack<Stored> b = load_pack(y + column, columns - column, aligned);
#pragma unroll
        for (int i = 0; i < SIZE; i++)
            if (column + i < columns)
                sum += term(static_cast<double>(load(a.of[i])), static_cast<double>(load(b.of[i])));
    }
    return sum_over_lanes<WARP>(sum);
}

// to[i] = value(x[i], y[i]) over a row.
template <typename Stored, typename Value>
__device__ __forceinline__ void store_values(const Stored *x, const Stored *y, int64_t columns, bool aligned,
                                             Stored *to, Value value) {
    constexpr int SIZE = Pack<Stored>::SIZE;
    MMBAL_FOR_PACKS(column, columns) {
        const Pack<Stored> a = load_pack(x + column, columns - column, aligned);
        Pack<Stored> b = load_pack(y + column, columns - column, aligned);
#pragma unroll
        for (int i = 0; i < SIZE; i++)
            store(&b.of[i], static_cast<Real<Stored>>(
                                value(static_cast<double>(load(a.of[i])), static_cast<double>(load(b.of[i])))));
        store_pack(to + column, b, columns - column, aligned);
    }
}

template <typename Stored>
__device__ __forceinline__ void store_zeros(int64_t columns, bool aligned, Stored *to) {
    constexpr int SIZE = Pack<Stored>::SIZE;
    Pack<Stored> zeros;
#pragma unroll
    for (int i = 0; i < SIZE; i++) store(&zeros.of[i], Real<Stored>{0});
    MMBAL_FOR_PACKS(column, columns) store_pack(to + column, zeros, columns - column, aligned);
}

template <typename R>
__global__ void __launch_bounds__(ALIGN_BLOCK_THREADS, 1)
    count_present(mmbal_alignment t, const R *dloss, const R *dregression, const R *dcontrastive, AlignScale *scale) {
    int64_t *of_warps = shared_memory<int64_t>(); // [WARP]
    int64_t present = 0;
    for (int64_t a = threadIdx.x; a < t.A && t.present; a += ALIGN_BLOCK_THREADS) present += t.present[a] != 0;
    present = sum_over_lanes<WARP>(present);
    if (threadIdx.x % WARP == 0) of_warps[threadIdx.x / WARP] = present;
    __syncthreads();
    if (threadIdx.x > 0) return;
    present = t.present ? 0 : t.A;
    for (int warp = 0; warp < ALIGN_BLOCK_THREADS / WARP && t.present; warp++) present += of_warps[warp];
    const bool any = present > 0 && t.B > 0;
    AlignScale made = {};
    made.of_row = any ? static_cast<double>(t.A) / (static_cast<double>(t.B) * static_cast<double>(present)) : 0;
    made.contrasted = any && present > 1;
    if (dloss) {
        double of_regression = static_cast<double>(*dregression), of_contrast = static_cast<double>(*dcontrastive);
        if (t.alpha > 0) of_regression += t.alpha * static_cast<double>(*dloss);
        if (t.alpha < 1) of_contrast += (1 - t.alpha) * static_cast<double>(*dloss);
        made.regression = any ? of_regression * made.of_row : 0;
        made.contrastive = made.contrasted && of_contrast != 0 ? of_contrast * made.of_row / t.tau : 0;
        made.contrasted = made.contrasted && of_contrast != 0;
    }
    *scale = made;
}

template <typename Stored>
__global__ void __launch_bounds__(ALIGN_THREADS, 1)
    unit_rows(const Stored *__restrict__ x, bool aligned, Similarities<Real<Stored>> c, UnitRows<Real<Stored>> to) {
    using R = Real<Stored>;
    constexpr int SIZE = Pack<Stored>::SIZE;
    if (!c.scale->contrasted) return;
    for (int64_t a = first_group<WARP>(); a < c.A; a += group_count<WARP>()) {
        const Stored *row = x + a * c.C;
        R *unit = to.unit + a * c.stride;
        const bool counted = !c.present || c.present[a];
        double norm = 0;
        if (counted)
            norm = sqrt(sum_of_terms(row, row, c.C, aligned, [](double value, double) { return value * value; }));
        const double factor = norm <= LEAST_NORM ? 1 / LEAST_NORM : 1 / norm;
        if (threadIdx.x % WARP == 0) to.inverse[a] = norm <= LEAST_NORM ? 0 : factor;
        MMBAL_FOR_PACKS(column, c.C) {
            Pack<Stored> pack = {};
            if (counted) pack = load_pack(row + column, c.C - column, aligned);
#pragma unroll
            for (int i = 0; i < SIZE; i++)
                if (column + i < c.C)
                    unit[column + i] = counted ? static_cast<R>(static_cast<double>(load(pack.of[i])) * factor) : 0;
        }
    }
}

template <typename Stored>
__global__ void __launch_bounds__(ALIGN_THREADS, 1)
    unit_gradient(Similarities<Real<Stored>> c, UnitRows<Real<Stored>> rows, int64_t first, int64_t count,
                  const Real<Stored> *__restrict__ dunit, int64_t parts, int64_t part_size, Stored *__restrict__ dx) {
    using R = Real<Stored>;
    const int lane = threadIdx.x % WARP;
    for (int64_t i = first_group<WARP>(); i < count; i += group_count<WARP>()) {
        Stored *to = dx + i * c.C;
        const double inverse = c.scale->contrasted ? rows.inverse[first + i] : 0;
        if (inverse == 0) { // the same for all lanes
            for (int64_t column = lane; column < c.C; column += WARP) store(&to[column], R{0});
            continue;
        }
        const R *unit = rows.unit + (first + i) * c.stride;
        const auto slope = [&](int64_t column) {
            R sum = dunit[i * c.stride + column];
            for (int64_t part = 1; part < parts; part++) sum += dunit[part * part_size + i * c.stride + column];
            return static_cast<double>(sum);
        };
        double along = 0;
        for (int64_t column = lane; column < c.C; column += WARP)
            along += static_cast<double>(unit[column]) * slope(column);
        along = sum_over_lanes<WARP>(along);
        for (int64_t column = lane; column < c.C; column += WARP)
            store(&to[column], static_cast<R>(inverse * (slope(column) - along * static_cast<double>(unit[column]))));
    }
}

// Lengths and inner product of an own row's two vectors.
struct CosineOfRow {
    double of_pred, of_target, product;
};

template <typename Stored>
__device__ __forceinline__ CosineOfRow cosine_of(const Stored *pred, const Stored *target, int64_t D, bool aligned) {
    return {sqrt(sum_of_terms(pred, target, D, aligned, [](double x, double) { return x * x; })),
            sqrt(sum_of_terms(pred, target, D, aligned, [](double, double y) { return y * y; })),
            sum_of_terms(pred, target, D, aligned, [](double x, double y) { return x * y; })};
}

__device__ __forceinline__ double at_least_norm(double norm) { return norm > LEAST_NORM ? norm : LEAST_NORM; }

template <typename Stored>
__global__ void __launch_bounds__(ALIGN_THREADS, 1)
    regression_rows(mmbal_alignment t, bool aligned, double *__restrict__ losses) {
    const double beta = t.beta, half_inverse = beta > 0 ? 0.5 / beta : 0;
    for (int64_t b = first_group<WARP>(); b < t.B; b += group_count<WARP>()) {
        const Stored *pred = static_cast<const Stored *>(t.pred) + b * t.D;
        const Stored *target = static_cast<const Stored *>(t.target) + b * t.D;
        double loss = 0;
        if (!t.present || t.present[t.offset + b]) {
            if (t.regression == MMBAL_REGRESSION_COSINE) {
                const CosineOfRow row = cosine_of(pred, target, t.D, aligned);
                loss = 1 - row.product / (at_least_norm(row.of_pred) * at_least_norm(row.of_target));
                if (isnan(row.product)) loss = static_cast<double>(NAN); // at_least_norm hides one
            } else if (t.regression == MMBAL_REGRESSION_SMOOTH_L1) {
                loss = sum_of_terms(pred, target, t.D, aligned, [&](double x, double y) {
                    const double d = x - y, size = fabs(d);
                    return size < beta ? d * d * half_inverse : size - 0.5 * beta;
                });
            } else {
                loss = sum_of_terms(pred, target, t.D, aligned, [](double x, double y) { return (x - y) * (x - y); });
            }
            const bool is_mean = t.regression == MMBAL_REGRESSION_SMOOTH_L1 || t.regression == MMBAL_REGRESSION_MSE;
            if (is_mean) loss /= static_cast<double>(t.D);
        }
        if (threadIdx.x % WARP == 0) losses[b] = loss;
    }
}

// d cos(x, y) / dx = (y / |y| - cos x / |x|) / |x|, times scale
template <typename Stored>
__device__ __forceinline__ void cosine_gradient(const Stored *x, const Stored *y, int64_t D, bool aligned,
                                                double norm_of_x, double norm_of_y, double product, double scale,
                                                Stored *dx) {
    const double of_x = at_least_norm(norm_of_x), of_y = at_least_norm(norm_of_y);
    const double to_y = scale / (of_x * of_y), to_x = scale * product / (of_x * of_y) / (of_x * of_x);
    const bool clamped = norm_of_x <= LEAST_NORM;
    store_values(x, y, D, aligned, dx, [&](double xi, double yi) { return clamped ? 0 : to_y * yi - to_x * xi; });
}

template <typename Stored>
__global__ void __launch_bounds__(ALIGN_THREADS, 1)
    regression_backward(mmbal_alignment t, bool aligned, const AlignScale *__restrict__ scale_of_rows,
                        Stored *__restrict__ dpred_all, Stored *__restrict__ dtarget_all) {
    const double upstream = scale_of_rows->regression;
    const double beta = t.beta, inverse = beta > 0 ? 1 / beta : 0;
    const bool squared = t.regression != MMBAL_REGRESSION_SMOOTH_L1;
    const double scale = t.regression == MMBAL_REGRESSION_L2 ? upstream : upstream / static_cast<double>(t.D);
    for (int64_t b = first_group<WARP>(); b < t.B; b += group_count<WARP>()) {
        const Stored *pred = static_cast<const Stored *>(t.pred) + b * t.D;
        const Stored *target = static_cast<const Stored *>(t.target) + b * t.D;
        Stored *dpred = dpred_all ? dpred_all + b * t.D : nullptr;
        Stored *dtarget = dtarget_all ? dtarget_all + b * t.D : nullptr;
        if (upstream == 0 || (t.present && !t.present[t.offset + b])) {
            if (dpred) store_zeros(t.D, aligned, dpred);
            if (dtarget) store_zeros(t.D, aligned, dtarget);
            continue;
        }
        if (t.regression == MMBAL_REGRESSION_COSINE) {
            const CosineOfRow row = cosine_of(pred, target, t.D, aligned);
            if (dpred)
                cosine_gradient(pred, target, t.D, aligned, row.of_pred, row.of_target, row.product, -upstream, dpred);
            if (dtarget)
                cosine_gradient(target, pred, t.D, aligned, row.of_target, row.of_pred, row.product, -upstream,
                                dtarget);
            continue;
        }
        const auto slope = [&](double x, double y) {
            const double d = x - y, size = fabs(d);
            const double sign = d > 0 ? 1 : d < 0 ? -1 : d; // 0 at 0, NaN at NaN
            return scale * (squared ? 2 * d : size < beta ? d * inverse : sign);
        };
        if (dpred) store_values(pred, target, t.D, aligned, dpred, slope);
        if (dtarget)
            store_values(pred, target, t.D, aligned, dtarget, [&](double x, double y) { return -slope(x, y); });
    }
}

// Of pred, target and, where there are some, their gradients.
template <typename Stored>
bool own_rows_are_aligned(const mmbal_alignment &t, const void *dpred, const void *dtarget) {
    bool aligned = true;
    for (const void *data : {t.pred, t.target, dpred, dtarget})
        aligned = aligned && rows_are_aligned(data, t.D, sizeof(Stored));
    return aligned;
}

int64_t blocks_of_rows(int64_t rows) { return ceil_div(rows * WARP, ALIGN_THREADS); }

} // namespace

bool alignment_is_served(const mmbal_alignment &t, mmbal_status *status) {
    const int regression = number_of(t.regression);
    const bool known = regression >= MMBAL_REGRESSION_SMOOTH_L1 && regression <= MMBAL_REGRESSION_COSINE;
    const bool sizes = t.B >= 0 && t.D >= 1 && t.C >= 1 && t.A >= t.B && t.offset >= 0 && t.offset <= t.A - t.B;
    const bool options =
        t.tau >= 1e-30 && t.tau <= 1e30 && t.alpha >= 0 && t.alpha <= 1 && t.beta >= 0 && isfinite(t.beta);
    *status = !is_dtype(t.dtype) ? MMBAL_UNSUPPORTED : known && sizes && options ? MMBAL_OK : MMBAL_INVALID_ARGUMENT;
    return *status == MMBAL_OK;
}

template <typename R>
mmbal_status weigh_rows(const mmbal_alignment &t, const R *dloss, const R *dregression, const R *dcontrastive,
                        AlignScale *scale, mmbal_stream stream) {
    return launch(stream, 1, ALIGN_BLOCK_THREADS, WARP * sizeof(int64_t), count_present<R>, t, dloss, dregression,
                  dcontrastive, scale);
}

template <typename Stored>
mmbal_status take_units(const mmbal_alignment &t, const Similarities<Real<Stored>> &c, mmbal_stream stream) {
    const auto run = [&](const void *x, const UnitRows<Real<Stored>> &to) {
        return launch(stream, blocks_of_rows(c.A), ALIGN_THREADS, 0, unit_rows<Stored>, static_cast<const Stored *>(x),
                      rows_are_aligned(x, c.C, sizeof(Stored)), c, to);
    };
    MMBAL_RETURN_UNLESS_OK(run(t.source_embedding, c.source));
    return run(t.target_embedding, c.target);
}

template <typename Stored>
mmbal_status give_unit_gradient(const Similarities<Real<Stored>> &c, const UnitRows<Real<Stored>> &rows, int64_t first,
                                int64_t count, const Real<Stored> *dunit, int64_t parts, int64_t part_size, void *dx,
                                mmbal_stream stream) {
    return launch(stream, blocks_of_rows(count), ALIGN_THREADS, 0, unit_gradient<Stored>, c, rows, first, count, dunit,
                  parts, part_size, static_cast<Stored *>(dx));
}

template <typename Stored>
mmbal_status take_regression(const mmbal_alignment &t, double *losses, mmbal_stream stream) {
    return launch(stream, blocks_of_rows(t.B), ALIGN_THREADS, 0, regression_rows<Stored>, t,
                  own_rows_are_aligned<Stored>(t, nullptr, nullptr), losses);
}

template <typename Stored>
mmbal_status give_regression_gradient(const mmbal_alignment &t, const AlignScale *scale, void *dpred, void *dtarget,
                                      mmbal_stream stream) {
    return launch(stream, blocks_of_rows(t.B), ALIGN_THREADS, 0, regression_backward<Stored>, t,
                  own_rows_are_aligned<Stored>(t, dpred, dtarget), scale, static_cast<Stored *>(dpred),
                  static_cast<Stored *>(dtarget));
}

#define MMBAL_INSTANTIATE_REAL(R)                                                                                      \
    template mmbal_status weigh_rows<R>(const mmbal_alignment &, const R *, const R *, const R *, AlignScale *,        \
                                        mmbal_stream);
#define MMBAL_INSTANTIATE(Stored)                                                                                      \
    template mmbal_status take_units<Stored>(const mmbal_alignment &, const Similarities<Real<Stored>> &,              \
                                             mmbal_stream);                                                            \
    template mmbal_status give_unit_gradient<Stored>(const Similarities<Real<Stored>> &,                               \
                                                     const UnitRows<Real<Stored>> &, int64_t, int64_t,                 \
                                                     const Real<Stored> *, int64_t, int64_t, void *, mmbal_stream);    \
    template mmbal_status take_regression<Stored>(const mmbal_alignment &, double *, mmbal_stream);                    \
    template mmbal_status give_regression_gradient<Stored>(const mmbal_alignment &, const AlignScale *, void *,        \
                                                           void *, mmbal_stream);
MMBAL_INSTANTIATE_REAL(float)
MMBAL_INSTANTIATE_REAL(double)
MMBAL_INSTANTIATE(float)
MMBAL_INSTANTIATE(BF16)
MMBAL_INSTANTIATE(F16)
MMBAL_INSTANTIATE(double)

} // namespace mmbal
