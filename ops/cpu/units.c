#include "mmbal/units.h"

#include <float.h>
#include <math.h>
#include <stddef.h>

#include "arena.h"
#include "rows.h"

/* About what a piece of work has: enough to pay for handing it out. */
enum { PIECE = 1 << 16 };

/* How one tensor is cut: groups x tiles of units x chunks of rows. It depends on the shape alone, and so does the order
 * of every sum. */
typedef struct {
    int64_t parts, rows;           /* rows of a unit: outer x parts of inner, see unit_block */
    int64_t units_per_tile, tiles; /* of a group */
    int64_t rows_per_chunk, chunks;
    int64_t first_piece, first_unit; /* of all tensors */
    double *sums;                    /* [chunks, groups, units] where chunks > 1 */
} cut;

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t most(int64_t a, int64_t b) { return a > b ? a : b; }
static int64_t up(int64_t a, int64_t b) { return (a + b - 1) / b; }

static int64_t count_units(const mmbal_units *t) { return t->size[0] * t->size[1]; }
static int64_t count_elements(const mmbal_units *t) { return count_units(t) * t->size[2] * t->size[3]; }
static int64_t count_pieces(const mmbal_units *t, const cut *c) { return t->size[0] * c->tiles * c->chunks; }

static cut make_cut(const mmbal_units *t) {
    cut c = {.parts = up(t->size[3], ROW_PART)};
    if (count_elements(t) == 0) return c; /* no pieces */
    const int64_t row = least(t->size[3], ROW_PART);
    c.rows = t->size[2] * c.parts;
    c.units_per_tile = least(t->size[1], most(1, least(MOST_UNITS, PIECE / row)));
    c.tiles = up(t->size[1], c.units_per_tile);
    c.rows_per_chunk = most(1, PIECE / (c.units_per_tile * row));
    c.chunks = up(c.rows, c.rows_per_chunk);
    return c;
}

/* The cuts of all tensors; returns how many pieces there are. */
static int64_t make_cuts(const mmbal_units *tensors, int64_t T, arena *from, cut *cuts) {
    int64_t piece = 0, unit = 0;
    for (int64_t t = 0; t < T; t++) {
        const cut c = make_cut(&tensors[t]);
        double *sums = c.chunks > 1 ? carve(from, c.chunks * count_units(&tensors[t]) * (int64_t)sizeof(double)) : NULL;
        if (cuts) {
            cuts[t] = c;
            cuts[t].first_piece = piece, cuts[t].first_unit = unit, cuts[t].sums = sums;
        }
        piece += count_pieces(&tensors[t], &c);
        unit += count_units(&tensors[t]);
    }
    return piece;
}

typedef struct {
    const mmbal_units *tensors, *bases;
    const cut *cuts;
    int64_t T;
    double *energy;      /* [U], of unit_energy */
    const double *scale; /* [U], of scale_units */
} unit_list;

/* The tensor that a piece belongs to: the last whose first piece is not beyond it. */
static int64_t tensor_of(const unit_list *list, int64_t piece) {
    int64_t low = 0, high = list->T;
    while (high - low > 1) {
        const int64_t middle = (low + high) / 2;
        if (list->cuts[middle].first_piece <= piece)
            low = middle;
        else
            high = middle;
    }
    return low;
}

static int64_t element_size(mmbal_dtype dtype) { return dtype == MMBAL_F64 ? 8 : dtype == MMBAL_F32 ? 4 : 2; }

static void *at(const mmbal_units *t, int64_t group, int64_t unit) {
    return (char *)t->data + (group * t->stride[0] + unit * t->stride[1]) * element_size(t->dtype);
}

/* Block and first unit (within its tensor) of a piece. */
static unit_block block_of(const unit_list *list, int64_t t, int64_t piece, int64_t *chunk, int64_t *first_unit) {
    const mmbal_units *tensor = &list->tensors[t], *base = list->bases ? &list->bases[t] : NULL;
    const cut *c = &list->cuts[t];
    const int64_t local = piece - c->first_piece;
    const int64_t tile = local / c->chunks % c->tiles, group = local / c->chunks / c->tiles;
    const int64_t unit = tile * c->units_per_tile;
    *chunk = local % c->chunks;
    *first_unit = group * tensor->size[1] + unit;
    return (unit_block){.data = at(tensor, group, unit),
                        .base = base ? at(base, group, unit) : NULL,
                        .units = least(c->units_per_tile, tensor->size[1] - unit),
                        .first_row = *chunk * c->rows_per_chunk,
                        .end_row = least((*chunk + 1) * c->rows_per_chunk, c->rows),
                        .parts = c->parts,
                        .inner = tensor->size[3],
                        .unit_stride = tensor->stride[1],
                        .outer_stride = tensor->stride[2],
                        .inner_stride = tensor->stride[3],
                        .base_unit_stride = base ? base->stride[1] : 0,
                        .base_outer_stride = base ? base->stride[2] : 0,
                        .base_inner_stride = base ? base->stride[3] : 0};
}

static mmbal_status square_pieces(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const unit_list *list = context;
    const mmbal_row_tasks *tasks = mmbal_row_tasks_in_use();
    for (int64_t piece = begin; piece < end; piece++) {
        const int64_t t = tensor_of(list, piece);
        const cut *c = &list->cuts[t];
        int64_t chunk, unit;
        const unit_block block = block_of(list, t, piece, &chunk, &unit);
        double *sums = c->sums ? c->sums + chunk * count_units(&list->tensors[t]) : list->energy + c->first_unit;
        tasks->squares[list->tensors[t].dtype](&block, sums + unit);
    }
    return MMBAL_OK;
}

static mmbal_status multiply_pieces(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const unit_list *list = context;
    const mmbal_row_tasks *tasks = mmbal_row_tasks_in_use();
    for (int64_t piece = begin; piece < end; piece++) {
        const int64_t t = tensor_of(list, piece);
        int64_t chunk, unit;
        const unit_block block = block_of(list, t, piece, &chunk, &unit);
        tasks->multiply[list->tensors[t].dtype](&block, list->scale + list->cuts[t].first_unit + unit);
    }
    return MMBAL_OK;
}

/* Whether every axis steps over all that the axes with smaller strides reach, so that no element occurs twice. */
static int axes_nest(const mmbal_units *t) {
    int done[4] = {0};
    int64_t reached = 0; /* the last element of the axes so far */
    if (count_elements(t) == 0) return 1;
    for (int left = 4; left > 0; left--) {
        int next = -1;
        for (int axis = 0; axis < 4; axis++)
            if (!done[axis] && (next < 0 || t->stride[axis] < t->stride[next])) next = axis;
        done[next] = 1;
        if (t->size[next] > 1 && t->stride[next] <= reached) return 0;
        reached += (t->size[next] - 1) * t->stride[next];
    }
    return 1;
}

static mmbal_status check_each(const mmbal_units *tensors, int64_t T) {
    for (int64_t t = 0; t < T; t++) {
        if (!is_dtype(tensors[t].dtype)) return MMBAL_UNSUPPORTED;
        for (int axis = 0; axis < 4; axis++)
            if (tensors[t].size[axis] < 0 || tensors[t].stride[axis] < 0) return MMBAL_INVALID_ARGUMENT;
        if (!axes_nest(&tensors[t])) return MMBAL_INVALID_ARGUMENT;
    }
    return T < 0 ? MMBAL_INVALID_ARGUMENT : MMBAL_OK;
}

mmbal_status mmbal_check_units(const mmbal_units *tensors, const mmbal_units *others, int64_t T) {
    mmbal_status status = check_each(tensors, T);
    if (status == MMBAL_OK && others) status = check_each(others, T);
    for (int64_t t = 0; status == MMBAL_OK && others && t < T; t++)
        for (int axis = 0; axis < 4; axis++)
            if (tensors[t].size[axis] != others[t].size[axis]) return MMBAL_INVALID_ARGUMENT;
    return status;
}

/* energy[U] = the sums of squares */
static mmbal_status sum_squares(const mmbal_units *tensors, int64_t T, double *energy, void *workspace,
                                const mmbal_pool *pool) {
    arena from = {(uintptr_t)workspace};
    cut *cuts = carve(&from, T * (int64_t)sizeof(cut));
    unit_list list = {.tensors = tensors, .cuts = cuts, .T = T, .energy = energy};
    const int64_t pieces = make_cuts(tensors, T, &from, cuts);
    const mmbal_status status = pool->run(pool->self, pieces, 1, square_pieces, &list);
    for (int64_t t = 0; t < T; t++) {
        const int64_t units = count_units(&tensors[t]);
        double *sums = energy + cuts[t].first_unit;
        if (cuts[t].chunks == 1) continue;
        for (int64_t u = 0; u < units; u++) sums[u] = 0;
        for (int64_t chunk = 0; chunk < cuts[t].chunks; chunk++)
            for (int64_t u = 0; u < units; u++) sums[u] += cuts[t].sums[chunk * units + u];
    }
    return status;
}

int64_t mmbal_unit_energy_workspace(const mmbal_units *tensors, int64_t T) {
    arena from = {0};
    int64_t units = 0;
    for (int64_t t = 0; t < T; t++) units += count_units(&tensors[t]);
    carve(&from, units * (int64_t)sizeof(double)); /* the squares of the weights */
    carve(&from, T * (int64_t)sizeof(cut));
    make_cuts(tensors, T, &from, NULL);
    return bytes_carved(&from);
}

mmbal_status mmbal_unit_energy(const mmbal_units *tensors, const mmbal_units *weights, int64_t T,
                               mmbal_importance importance, double *energy, uint8_t *nonfinite, void *workspace,
                               const mmbal_pool *pool) {
    if (importance != MMBAL_GN && importance != MMBAL_SQRT_GN && importance != MMBAL_GN_WN)
        return MMBAL_INVALID_ARGUMENT;
    if ((importance == MMBAL_GN_WN) != (weights != NULL)) return MMBAL_INVALID_ARGUMENT;
    mmbal_status status = mmbal_check_units(tensors, weights, T);
    if (status != MMBAL_OK) return status;
    int64_t U = 0;
    for (int64_t t = 0; t < T; t++) U += count_units(&tensors[t]);
    arena from = {(uintptr_t)workspace};
    double *of_weights = carve(&from, U * (int64_t)sizeof(double));
    status = sum_squares(tensors, T, energy, (void *)from.next, pool);
    if (status == MMBAL_OK && weights) status = sum_squares(weights, T, of_weights, (void *)from.next, pool);
    *nonfinite = 0;
    for (int64_t u = 0; u < U; u++) {
        if (importance == MMBAL_SQRT_GN) energy[u] = sqrt(energy[u]);
        if (importance == MMBAL_GN_WN) energy[u] /= of_weights[u] + (double)FLT_MIN;
        *nonfinite |= !isfinite(energy[u]);
    }
    return status;
}

int64_t mmbal_scale_units_workspace(int64_t T) { return T * (int64_t)sizeof(cut) + CACHE_LINE; }

mmbal_status mmbal_scale_units(const mmbal_units *tensors, const mmbal_units *bases, int64_t T, const double *scale,
                               void *workspace, const mmbal_pool *pool) {
    const mmbal_status status = mmbal_check_units(tensors, bases, T);
    if (status != MMBAL_OK) return status;
    for (int64_t t = 0; t < T && bases; t++)
        if (bases[t].dtype != tensors[t].dtype) return MMBAL_INVALID_ARGUMENT;
    arena from = {(uintptr_t)workspace};
    cut *cuts = carve(&from, T * (int64_t)sizeof(cut));
    arena unused = {0};
    unit_list list = {.tensors = tensors, .bases = bases, .cuts = cuts, .T = T, .scale = scale};
    const int64_t pieces = make_cuts(tensors, T, &unused, cuts);
    return pool->run(pool->self, pieces, 1, multiply_pieces, &list);
}
