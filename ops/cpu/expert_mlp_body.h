/* The kernels of expert_mlp.c for one dtype; see each_dtype.h. */
#include "gemm_body.h"

/* Everything that the tasks of one call share. */
typedef struct {
    const mmbal_kernels *kernels;
    int tile_rows;
    mmbal_activation activation;
    dropout hidden_dropout, output_dropout;
    int64_t N, D, F, E, K, R;
    int64_t most_rows; /* of a block of routed rows */
    const STORED *x, *w1, *b1, *w2, *b2, *dy, *preactivation;
    const REAL *weights;
    const int64_t *permutation, *offsets, *inverse;
    STORED *y, *kept_preactivation, *dx, *dw1, *db1, *dw2, *db2; /* outputs, NULL where not asked for */
    REAL *dweights;
    /* workspace; rows of OPERANDs have row_stride(width) */
    OPERAND *input;          /* [R, D] x of each routed row */
    OPERAND *hidden;         /* [R, F] a */
    OPERAND *dhidden;        /* [R, F] du */
    OPERAND *g;              /* [R, D] dy of each routed row, under its output mask */
    OPERAND *dhidden_turned; /* [F, turned rows] du once more, transposed: its sums over the rows make dw1 */
    OPERAND *g_turned;       /* [D, turned rows] weights g, transposed: the same for dw2 */
    int64_t *turned;         /* [E] where the rows of an expert begin in a turned row: on a cache line */
    REAL *rows;              /* [R, D] o; in the backward dx of the routed row */
    REAL *dot_parts;         /* [R, 1 + blocks across F] <g, b2> and parts of <h, a> */
    NAME(scratch) * scratch; /* [workers] */
} NAME(call);

static NAME(call) NAME(begin_call)(const mmbal_expert_mlp_inputs *in, mmbal_expert_mlp_shape s,
                                   const mmbal_expert_mlp_options *options, int workers) {
    const mmbal_kernels *kernels = mmbal_kernels_in_use();
    NAME(call) c = {.kernels = kernels, .N = s.N, .D = s.D, .F = s.F, .E = s.E, .K = s.K, .R = s.N * s.K};
    c.tile_rows = kernels->OF_OPERAND(tile_rows);
    c.most_rows = rows_for_balance(s, workers);
    c.activation = options->activation;
    c.hidden_dropout = make_dropout(options, HIDDEN_TENSOR), c.output_dropout = make_dropout(options, OUTPUT_TENSOR);
    c.x = in->x, c.w1 = in->w1, c.b1 = in->b1, c.w2 = in->w2, c.b2 = in->b2, c.weights = in->weights;
    c.permutation = in->permutation, c.offsets = in->offsets, c.inverse = in->inverse;
    return c;
}

static int64_t NAME(operand_bytes)(int64_t rows, int64_t width) {
    return rows * NAME(row_stride)(width) * (int64_t)sizeof(OPERAND);
}

/* Between two rows of a turned matrix. */
static int64_t NAME(turned_stride)(int64_t R, int64_t E) { return NAME(row_stride)(R + E * (NAME(LINE) - 1)); }

static int64_t NAME(row_blocks)(const NAME(call) * c, int64_t cols) {
    return count_row_blocks(c->offsets, c->E, c->most_rows, c->tile_rows, cols);
}

static block NAME(row_block)(const NAME(call) * c, int64_t cols, int64_t index) {
    return find_row_block(c->offsets, c->most_rows, c->tile_rows, cols, index);
}

/* Multiplies the n values by the dropout mask of elements first .. first + n. */
static void NAME(mask)(const dropout *d, int64_t first, int64_t n, REAL *values) {
    double mask[BLOCK_COLS];
    if (d->probability == 0) return;
    for (int64_t from = 0; from < n; from += BLOCK_COLS) {
        const int64_t here = least(BLOCK_COLS, n - from);
        fill_mask(d, first + from, here, mask);
        for (int64_t i = 0; i < here; i++) values[from + i] *= (REAL)mask[i];
    }
}

/* Eight sums side by side: in one alone every addition waits for the one before it. */
enum { NAME(SIDE_BY_SIDE) = 8 };

static REAL NAME(sum_of)(const REAL *side) {
    return ((side[0] + side[4]) + (side[2] + side[6])) + ((side[1] + side[5]) + (side[3] + side[7]));
}

static REAL NAME(dot)(int64_t n, const REAL *a, const REAL *b) {
    REAL side[NAME(SIDE_BY_SIDE)] = {0};
    int64_t i = 0;
    for (; i + NAME(SIDE_BY_SIDE) <= n; i += NAME(SIDE_BY_SIDE))
        for (int64_t k = 0; k < NAME(SIDE_BY_SIDE); k++) side[k] += a[i + k] * b[i + k];
    for (int64_t k = 0; i < n; i++, k++) side[k] += a[i] * b[i];
    return NAME(sum_of)(side);
}

static REAL NAME(sum)(int64_t n, const OPERAND *a) {
    REAL side[NAME(SIDE_BY_SIDE)] = {0};
    int64_t i = 0;
    for (; i + NAME(SIDE_BY_SIDE) <= n; i += NAME(SIDE_BY_SIDE))
        for (int64_t k = 0; k < NAME(SIDE_BY_SIDE); k++) side[k] += FROM_OPERAND(a[i + k]);
    for (int64_t k = 0; i < n; i++, k++) side[k] += FROM_OPERAND(a[i]);
    return NAME(sum_of)(side);
}

/* Zeros from the end of row r to the end of its line: a product by pairs may read one element more than there are. */
static void NAME(end_row)(OPERAND *rows, int64_t r, int64_t width) {
    OPERAND *row = rows + r * NAME(row_stride)(width);
    for (int64_t i = width; i < NAME(whole_lines)(width); i++) row[i] = 0;
}

/* to[r] = from of row r's token */
static void NAME(gather_row)(const NAME(call) * c, const STORED *from, int64_t r, OPERAND *to) {
    const STORED *source = from + c->permutation[r] / c->K * c->D;
    OPERAND *row = to + r * NAME(row_stride)(c->D);
    for (int64_t d = 0; d < c->D; d++) row[d] = TO_OPERAND(LOAD(source[d]));
    NAME(end_row)(to, r, c->D);
}

/* to[n] = sum_k factor[n,k] rows[inverse[n,k]] in the order of k; factor NULL: 1 */
static void NAME(combine)(const NAME(call) * c, const REAL *factor, int64_t begin, int64_t end, STORED *to) {
    for (int64_t n = begin; n < end; n++) {
        for (int64_t d = 0; d < c->D; d++) {
            REAL sum = 0;
            for (int64_t pair = n * c->K; pair < (n + 1) * c->K; pair++)
                sum += (factor ? factor[pair] : 1) * c->rows[c->inverse[pair] * c->D + d];
            to[n * c->D + d] = STORE(sum);
        }
    }
}

#include "expert_mlp_backward_body.h"
#include "expert_mlp_forward_body.h"
