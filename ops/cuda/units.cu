#include "mmbal/cuda/units.h"

#include <float.h>
#include <math.h>

#include <utility>

#include "packs.cuh"

namespace mmbal {
namespace {

constexpr int THREADS = 256;
constexpr int MOST_TENSORS = 24;                       // of a launch: their table is a parameter of at most 4 KB
constexpr int64_t CHUNK = 4096, CHUNK_OF_COLUMN = 128; // elements of a warp's sum, and of a thread's
constexpr int64_t MOST_CHUNKS = 4096;
constexpr int64_t FEW = 8; // elements of a unit that a thread takes by itself

struct Layout {
    int64_t group, unit, outer, inner; // strides
};

// A tensor, or one and its base, and how it is cut into pieces, each a warp's. `along`: a piece is a chunk of one
// unit's packs, lanes side by side in it; otherwise a chunk of 32 neighbouring units, a lane each.
struct Tensor {
    void *data;
    const void *base;
    Layout stride, base_stride;
    int64_t units, outer, inner; // of a group; of a unit
    int64_t all_units;
    int64_t first_unit;     // among all tensors'
    int64_t first_piece;    // of the launch
    int64_t length, chunks; // of a chunk, in packs or elements
    double *sums;           // [chunks, groups x units]
    int32_t along, aligned;
};

struct Table {
    Tensor tensors[MOST_TENSORS];
    int count;
    int64_t pieces;
};
static_assert(sizeof(Table) + 64 <= 4096, "the parameters of a launch");

int64_t count_units(const mmbal_units &t) { return t.size[0] * t.size[1]; }
int64_t count_elements(const mmbal_units &t) { return count_units(t) * t.size[2] * t.size[3]; }
Layout layout_of(const mmbal_units &t) { return {t.stride[0], t.stride[1], t.stride[2], t.stride[3]}; }

bool begins_packs(const mmbal_units &of, const Tensor &t, const void *data, const Layout &stride) {
    const auto whole = [&](int64_t size, int64_t step) { return size <= 1 || step * stored_size(of.dtype) % 16 == 0; };
    return stride.inner == 1 && reinterpret_cast<uintptr_t>(data) % 16 == 0 && whole(of.size[0], stride.group) &&
           whole(t.units, stride.unit) && whole(t.outer, stride.outer);
}

// What is not empty, cut. The two axes of a unit are swapped, or made one, where that is the way it lies in memory.
Tensor cut(const mmbal_units &of, const mmbal_units *base) {
    Tensor t = {};
    t.data = of.data, t.stride = layout_of(of);
    if (base) t.base = base->data, t.base_stride = layout_of(*base);
    t.units = of.size[1], t.outer = of.size[2], t.inner = of.size[3], t.all_units = count_units(of);
    if (t.inner == 1 || (t.outer > 1 && t.stride.outer < t.stride.inner)) {
        std::swap(t.outer, t.inner);
        std::swap(t.stride.outer, t.stride.inner);
        std::swap(t.base_stride.outer, t.base_stride.inner);
    }
    const auto follows = [&t](const Layout &stride) { return stride.outer == t.inner * stride.inner; };
    if (t.outer > 1 && follows(t.stride) && (!base || follows(t.base_stride))) t.inner *= t.outer, t.outer = 1;
    const int64_t pack = 16 / stored_size(of.dtype), elements = t.outer * t.inner;
    t.along = t.units == 1 || (elements >= FEW && t.stride.inner <= t.stride.unit);
    t.aligned = begins_packs(of, t, t.data, t.stride) && (!base || begins_packs(of, t, t.base, t.base_stride));
    const int64_t length = t.along ? t.outer * ceil_div(t.inner, pack) : elements;
    const int64_t usual = t.along ? CHUNK / pack : CHUNK_OF_COLUMN, for_most = ceil_div(length, MOST_CHUNKS);
    t.length = usual > for_most ? usual : for_most;
    t.chunks = ceil_div(length, t.length);
    return t;
}

int64_t count_pieces(const mmbal_units &of, const Tensor &t) {
    return of.size[0] * (t.along ? t.units : ceil_div(t.units, WARP)) * t.chunks;
}

// Tensors, by tables of as many as a launch takes.
template <typename Use>
class Tables {
public:
    explicit Tables(Use use) : use_(use) {}
    void add(Tensor t, int64_t pieces) {
        t.first_piece = table_.pieces;
        table_.tensors[table_.count++] = t;
        table_.pieces += pieces;
        if (table_.count == MOST_TENSORS) finish();
    }
    mmbal_status finish() {
        if (table_.count > 0 && status_ == MMBAL_OK) status_ = use_(table_);
        table_.count = 0, table_.pieces = 0;
        return status_;
    }

private:
    Table table_ = {};
    Use use_;
    mmbal_status status_ = MMBAL_OK;
};

__device__ __forceinline__ const Tensor &tensor_of(const Table &table, int64_t piece) {
    int t = 0;
    while (t + 1 < table.count && table.tensors[t + 1].first_piece <= piece) t++;
    return table.tensors[t];
}

// Where a piece lies: its unit (of the first lane, where it has 32), and from which to which pack or element.
struct Piece {
    int64_t group, unit, chunk, first, end;
};

__device__ __forceinline__ Piece piece_of(const Tensor &t, int64_t piece) {
    const int64_t local = piece - t.first_piece, rest = local / t.chunks;
    const int64_t tiles = t.along ? t.units : ceil_div(t.units, WARP);
    Piece p;
    p.chunk = local % t.chunks;
    p.group = rest / tiles;
    p.unit = rest % tiles * (t.along ? 1 : WARP);
    return p;
}

template <int SIZE>
__device__ __forceinline__ void bound_piece(const Tensor &t, Piece *p) {
    const int64_t length = t.outer * ceil_div(t.inner, SIZE);
    p->first = p->chunk * t.length;
    p->end = p->first + t.length < length ? p->first + t.length : length;
}

template <typename Stored>
__device__ __forceinline__ Pack<Stored> load_strided(const Stored *from, int64_t left, int64_t stride, bool aligned) {
    if (stride == 1) return load_pack(from, left, aligned);
    Pack<Stored> pack;
#pragma unroll
    for (int i = 0; i < Pack<Stored>::SIZE; i++) pack.of[i] = i < left ? from[i * stride] : Stored{};
    return pack;
}

template <typename Stored>
__device__ __forceinline__ void store_strided(Stored *to, const Pack<Stored> &pack, int64_t left, int64_t stride,
                                              bool aligned) {
    if (stride == 1) return store_pack(to, pack, left, aligned);
#pragma unroll
    for (int i = 0; i < Pack<Stored>::SIZE; i++)
        if (i < left) to[i * stride] = pack.of[i];
}

// The place (outer, inner) of packs or elements `by` apart, without a division for each.
struct Place {
    int64_t outer, inner, outer_step, inner_step, end;
    __device__ Place(int64_t first, int64_t by, int64_t inner_size)
        : outer(first / inner_size), inner(first % inner_size), outer_step(by / inner_size),
          inner_step(by % inner_size), end(inner_size) {}
    __device__ void step() {
        outer += outer_step, inner += inner_step;
        if (inner >= end) inner -= end, outer++;
    }
};

// sums[chunk, unit] = the squares of a piece. In float64 no square of a float32 over- or underflows.
template <typename Stored>
__global__ void __launch_bounds__(THREADS, 1) sum_squares(const Table table) {
    constexpr int SIZE = Pack<Stored>::SIZE;
    const int lane = threadIdx.x % WARP;
    for (int64_t piece = first_group<WARP>(); piece < table.pieces; piece += group_count<WARP>()) {
        const Tensor &t = tensor_of(table, piece);
        Piece p = piece_of(t, piece);
        const Stored *unit = static_cast<const Stored *>(t.data) + p.group * t.stride.group + p.unit * t.stride.unit;
        const int64_t place = p.chunk * t.all_units + p.group * t.units + p.unit;
        double sum = 0;
        if (t.along) {
            bound_piece<SIZE>(t, &p);
            Place at(p.first + lane, WARP, ceil_div(t.inner, SIZE));
            for (int64_t i = p.first + lane; i < p.end; i += WARP, at.step()) {
                const Pack<Stored> pack =
                    load_strided(unit + at.outer * t.stride.outer + at.inner * SIZE * t.stride.inner,
                                 t.inner - at.inner * SIZE, t.stride.inner, t.aligned);
#pragma unroll
                for (int j = 0; j < SIZE; j++) {
                    const double value = load(pack.of[j]);
                    sum += value * value;
                }
            }
            sum = sum_over_lanes<WARP>(sum);
            if (lane == 0) t.sums[place] = sum;
            continue;
        }
        if (p.unit + lane >= t.units) continue;
        bound_piece<1>(t, &p);
        unit += lane * t.stride.unit;
        Place at(p.first, 1, t.inner);
#pragma unroll 4
        for (int64_t i = p.first; i < p.end; i++, at.step()) {
            const double value = load(unit[at.outer * t.stride.outer + at.inner * t.stride.inner]);
            sum += value * value;
        }
        t.sums[place + lane] = sum;
    }
}

// A warp sums what the chunks of a unit have; here a piece is a unit.
__global__ void __launch_bounds__(THREADS, 1) add_chunks(const Table table, double *__restrict__ energy) {
    const int lane = threadIdx.x % WARP;
    for (int64_t piece = first_group<WARP>(); piece < table.pieces; piece += group_count<WARP>()) {
        const Tensor &t = tensor_of(table, piece);
        const int64_t unit = piece - t.first_piece;
        double sum = 0;
        for (int64_t chunk = lane; chunk < t.chunks; chunk += WARP) sum += t.sums[chunk * t.all_units + unit];
        sum = sum_over_lanes<WARP>(sum);
        if (lane == 0) energy[t.first_unit + unit] = sum;
    }
}

constexpr int64_t UNITS_OF_PART = 16 * WARP;

// Energies from sums of squares; found[part]: whether one of its units has an energy that is not finite.
__global__ void __launch_bounds__(THREADS, 1)
    finish_energies(double *__restrict__ energy, const double *__restrict__ of_weights, int64_t U, int64_t parts,
                    mmbal_importance importance, uint8_t *__restrict__ found) {
    const int lane = threadIdx.x % WARP;
    for (int64_t part = first_group<WARP>(); part < parts; part += group_count<WARP>()) {
        const int64_t first = part * UNITS_OF_PART, end = first + UNITS_OF_PART < U ? first + UNITS_OF_PART : U;
        bool nonfinite = false;
        for (int64_t u = first + lane; u < end; u += WARP) {
            double value = energy[u];
            if (importance == MMBAL_SQRT_GN) value = sqrt(value);
            if (importance == MMBAL_GN_WN) value /= of_weights[u] + static_cast<double>(FLT_MIN);
            nonfinite |= !isfinite(value);
            if (importance != MMBAL_GN) energy[u] = value;
        }
        nonfinite = __any_sync(ALL_LANES, nonfinite);
        if (lane == 0) found[part] = nonfinite;
    }
}

// One warp.
__global__ void __launch_bounds__(WARP)
    any_found(const uint8_t *__restrict__ found, int64_t parts, uint8_t *__restrict__ nonfinite) {
    bool any = false;
    for (int64_t part = threadIdx.x; part < parts; part += WARP) any |= found[part] != 0;
    any = __any_sync(ALL_LANES, any);
    if (threadIdx.x == 0) *nonfinite = any;
}

// A unit's x become scale x, or base + scale (x - base).
template <typename Stored>
__device__ __forceinline__ Stored scaled(Stored x, Stored base, bool based, Real<Stored> scale) {
    const Real<Stored> from = based ? load(base) : 0;
    Stored result;
    store(&result, based ? from + scale * (load(x) - from) : scale * load(x));
    return result;
}

template <typename Stored>
__global__ void __launch_bounds__(THREADS, 1)
    scale_pieces(const Table table, const double *__restrict__ scales, const uint8_t *__restrict__ skip) {
    constexpr int SIZE = Pack<Stored>::SIZE;
    const int lane = threadIdx.x % WARP;
    if (skip && *skip) return;
    for (int64_t piece = first_group<WARP>(); piece < table.pieces; piece += group_count<WARP>()) {
        const Tensor &t = tensor_of(table, piece);
        Piece p = piece_of(t, piece);
        if (!t.along) p.unit += lane;
        if (p.unit >= t.units) continue;
        const double wanted = scales[t.first_unit + p.group * t.units + p.unit];
        if (wanted == 1) continue;
        const Real<Stored> scale = static_cast<Real<Stored>>(wanted);
        const bool based = t.base != nullptr, keeps = scale != 0; // what x holds is not read where it is not kept
        Stored *unit = static_cast<Stored *>(t.data) + p.group * t.stride.group + p.unit * t.stride.unit;
        const Stored *base =
            static_cast<const Stored *>(t.base) + p.group * t.base_stride.group + p.unit * t.base_stride.unit;
        if (!t.along) {
            bound_piece<1>(t, &p);
            Place at(p.first, 1, t.inner);
            for (int64_t i = p.first; i < p.end; i++, at.step()) {
                Stored *x = unit + at.outer * t.stride.outer + at.inner * t.stride.inner;
                const Stored from =
                    based ? base[at.outer * t.base_stride.outer + at.inner * t.base_stride.inner] : Stored{};
                *x = keeps ? scaled(*x, from, based, scale) : from;
            }
            continue;
        }
        bound_piece<SIZE>(t, &p);
        Place at(p.first + lane, WARP, ceil_div(t.inner, SIZE));
        for (int64_t i = p.first + lane; i < p.end; i += WARP, at.step()) {
            const int64_t left = t.inner - at.inner * SIZE;
            Stored *x = unit + at.outer * t.stride.outer + at.inner * SIZE * t.stride.inner;
            Pack<Stored> result = {};
            if (based)
                result = load_strided(base + at.outer * t.base_stride.outer + at.inner * SIZE * t.base_stride.inner,
                                      left, t.base_stride.inner, t.aligned);
            if (keeps) {
                const Pack<Stored> pack = load_strided(x, left, t.stride.inner, t.aligned);
#pragma unroll
                for (int j = 0; j < SIZE; j++) result.of[j] = scaled(pack.of[j], result.of[j], based, scale);
            }
            store_strided(x, result, left, t.stride.inner, t.aligned);
        }
    }
}

template <typename Stored>
mmbal_status launch_squares(const Table &table, mmbal_stream stream) {
    return launch(stream, ceil_div(table.pieces * WARP, THREADS), THREADS, 0, sum_squares<Stored>, table);
}

template <typename Stored>
mmbal_status launch_scale(const Table &table, const double *scale, const uint8_t *skip, mmbal_stream stream) {
    return launch(stream, ceil_div(table.pieces * WARP, THREADS), THREADS, 0, scale_pieces<Stored>, table, scale, skip);
}

mmbal_status squares_of(mmbal_dtype dtype, const Table &table, mmbal_stream stream) {
    MMBAL_RETURN_FOR_DTYPE(dtype, launch_squares, table, stream);
}
mmbal_status scale_of(mmbal_dtype dtype, const Table &table, const double *scale, const uint8_t *skip,
                      mmbal_stream stream) {
    MMBAL_RETURN_FOR_DTYPE(dtype, launch_scale, table, scale, skip, stream);
}

// Calls take(tensor, its description) for each that has elements, with its place among all units.
template <typename Take>
void for_each_tensor(const mmbal_units *tensors, const mmbal_units *bases, int64_t T, Take take) {
    int64_t unit = 0;
    for (int64_t t = 0; t < T; unit += count_units(tensors[t++])) {
        if (count_elements(tensors[t]) == 0) continue;
        Tensor made = cut(tensors[t], bases ? &bases[t] : nullptr);
        made.first_unit = unit;
        take(made, tensors[t]);
    }
}

int64_t count_all_units(const mmbal_units *tensors, int64_t T) {
    int64_t U = 0;
    for (int64_t t = 0; t < T; t++) U += count_units(tensors[t]);
    return U;
}

// Of the sums that tensors of several chunks need.
int64_t count_sums(const mmbal_units *tensors, int64_t T) {
    int64_t count = 0;
    for_each_tensor(tensors, nullptr, T, [&count](const Tensor &t, const mmbal_units &) {
        count += t.chunks > 1 ? t.chunks * t.all_units : 0;
    });
    return count;
}

constexpr mmbal_dtype DTYPES[] = {MMBAL_F32, MMBAL_BF16, MMBAL_F16, MMBAL_F64};

// energy [U] = the sums of squares
mmbal_status sum_all_squares(const mmbal_units *tensors, int64_t T, double *energy, double *sums, mmbal_stream stream) {
    const int64_t U = count_all_units(tensors, T);
    // Units of nothing have no piece.
    if (U > 0 && cudaMemsetAsync(energy, 0, static_cast<size_t>(U) * sizeof *energy,
                                 static_cast<cudaStream_t>(stream)) != cudaSuccess)
        return MMBAL_DEVICE_ERROR;
    for (const mmbal_dtype dtype : DTYPES) {
        Tables pieces([=](const Table &table) { return squares_of(dtype, table, stream); });
        double *next = sums;
        for_each_tensor(tensors, nullptr, T, [&](Tensor t, const mmbal_units &of) {
            t.sums = t.chunks > 1 ? next : energy + t.first_unit;
            next += t.chunks > 1 ? t.chunks * t.all_units : 0;
            if (of.dtype == dtype) pieces.add(t, count_pieces(of, t));
        });
        MMBAL_RETURN_UNLESS_OK(pieces.finish());
    }
    Tables units([=](const Table &table) {
        return launch(stream, ceil_div(table.pieces * WARP, THREADS), THREADS, 0, add_chunks, table, energy);
    });
    for_each_tensor(tensors, nullptr, T, [&](Tensor t, const mmbal_units &) {
        if (t.chunks == 1) return;
        t.sums = sums;
        sums += t.chunks * t.all_units;
        units.add(t, t.all_units);
    });
    return units.finish();
}

} // namespace
} // namespace mmbal

using namespace mmbal;

int64_t mmbal_unit_energy_workspace_cuda(const mmbal_units *tensors, const mmbal_units *weights, int64_t T) {
    const int64_t U = count_all_units(tensors, T), of_tensors = count_sums(tensors, T);
    const int64_t of_weights = weights ? count_sums(weights, T) : 0;
    const int64_t doubles = (of_tensors > of_weights ? of_tensors : of_weights) + (weights ? U : 0);
    return static_cast<int64_t>(sizeof(double)) * doubles + ceil_div(U, UNITS_OF_PART);
}

mmbal_status mmbal_unit_energy_cuda(const mmbal_units *tensors, const mmbal_units *weights, int64_t T,
                                    mmbal_importance importance, double *energy, uint8_t *nonfinite, void *workspace,
                                    mmbal_stream stream) {
    if (importance != MMBAL_GN && importance != MMBAL_SQRT_GN && importance != MMBAL_GN_WN)
        return MMBAL_INVALID_ARGUMENT;
    if ((importance == MMBAL_GN_WN) != (weights != nullptr)) return MMBAL_INVALID_ARGUMENT;
    MMBAL_RETURN_UNLESS_OK(mmbal_check_units(tensors, weights, T));
    const int64_t U = count_all_units(tensors, T), parts = ceil_div(U, UNITS_OF_PART);
    double *of_weights = static_cast<double *>(workspace), *sums = of_weights + (weights ? U : 0);
    const int64_t kept = mmbal_unit_energy_workspace_cuda(tensors, weights, T) - parts;
    uint8_t *found = parts > 1 ? static_cast<uint8_t *>(workspace) + kept : nonfinite;
    MMBAL_RETURN_UNLESS_OK(sum_all_squares(tensors, T, energy, sums, stream));
    if (weights) MMBAL_RETURN_UNLESS_OK(sum_all_squares(weights, T, of_weights, sums, stream));
    MMBAL_RETURN_UNLESS_OK(launch(stream, ceil_div(parts * WARP, THREADS), THREADS, 0, finish_energies, energy,
                                  of_weights, U, parts, importance, found));
    if (parts == 1) return MMBAL_OK;
    return launch(stream, 1, WARP, 0, any_found, found, parts, nonfinite);
}

mmbal_status mmbal_scale_units_cuda(const mmbal_units *tensors, const mmbal_units *bases, int64_t T,
                                    const double *scale, const uint8_t *skip, mmbal_stream stream) {
    MMBAL_RETURN_UNLESS_OK(mmbal_check_units(tensors, bases, T));
    for (int64_t t = 0; bases && t < T; t++)
        if (bases[t].dtype != tensors[t].dtype) return MMBAL_INVALID_ARGUMENT;
    for (const mmbal_dtype dtype : DTYPES) {
        Tables pieces([=](const Table &table) { return scale_of(dtype, table, scale, skip, stream); });
        for_each_tensor(tensors, bases, T, [&](const Tensor &t, const mmbal_units &of) {
            if (of.dtype == dtype) pieces.add(t, count_pieces(of, t));
        });
        MMBAL_RETURN_UNLESS_OK(pieces.finish());
    }
    return MMBAL_OK;
}
