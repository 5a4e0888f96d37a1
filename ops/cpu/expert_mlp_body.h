/* The kernels of expert_mlp.c for one way of taking products; see each_product.h. */
#include "row_body.h"

#include "gemm_body.h"

/* Everything that the tasks of one call share. A call goes by waves of experts, so that what lies between its products
 * is small: while a wave is under way, E, offsets, the weights and their gradients are those of its experts. */
typedef struct {
    const mmbal_kernels *kernels;
    int tile_rows;
    int past_caches;      /* the gradients of the weights are so large that they bypass the caches */
    int keep_past_caches; /* so is the preactivation */
    mmbal_activation activation;
    dropout hidden_dropout, output_dropout;
    int64_t N, D, F, E, K, R;
    blocking row_blocking, blocking; /* of products with the routed rows as rows; of the gradients of the weights */
    int64_t first_row, wave_rows;    /* the first row of this wave, the most that a wave has */
    int64_t turned_stride;           /* between two rows of a turned matrix */
    const STORED *x, *w1, *b1, *w2, *b2, *dy, *preactivation;
    const REAL *weights;
    const int64_t *permutation, *offsets, *inverse;
    const OPERAND *packed_w1, *packed_w2;                        /* the panels of all experts, or NULL */
    STORED *y, *kept_preactivation, *dx, *dw1, *db1, *dw2, *db2; /* outputs, NULL where not asked for */
    REAL *dweights;
    /* workspace; rows of OPERANDs have row_stride(width); W: the rows of a wave */
    OPERAND *input;          /* [W, D] x of each routed row */
    OPERAND *hidden;         /* [W, F] a */
    OPERAND *dhidden;        /* [W, F] du */
    OPERAND *g;              /* [W, D] dy of each routed row, under its output mask */
    OPERAND *dhidden_turned; /* [F, turned rows] du once more, transposed: its sums over the rows make dw1 */
    OPERAND *g_turned;       /* [D, turned rows] weights g, transposed: the same for dw2 */
    OPERAND *input_columns, *hidden_columns; /* panels of input and hidden for experts with few rows, or NULL */
    int64_t *columns;                        /* [E + 1] columns of these before those of each expert */
    int64_t *turned;         /* [E] where the rows of an expert begin in a turned row: on a cache line */
    REAL *rows;              /* [R, D] o; in the backward dx of the routed row */
    REAL *dot_parts;         /* [R, 1 + blocks across F] <g, b2> and parts of <h, a> */
    OPERAND *x_panels;       /* x of each routed row as a right factor, where the backward goes jointly */
    char *joint;             /* [workers, joint_bytes] what a worker holds of it */
    NAME(scratch) * scratch; /* [workers] */
} NAME(call);

/* Each expert of a wave may leave most of a line empty. */
static int64_t NAME(turned_stride)(int64_t rows, int64_t E) { return NAME(row_stride)(rows + E * (NAME(LINE) - 1)); }

static NAME(call) NAME(begin_call)(const mmbal_expert_mlp_inputs *in, mmbal_expert_mlp_shape s,
                                   const mmbal_expert_mlp_options *options, int workers) {
    const mmbal_kernels *kernels = mmbal_kernels_in_use();
    NAME(call) c = {.kernels = kernels, .N = s.N, .D = s.D, .F = s.F, .E = s.E, .K = s.K, .R = s.N * s.K};
    c.tile_rows = kernels->OF_OPERAND(tile_rows);
    c.wave_rows = largest_wave(in->offsets, s.E, workers);
    c.blocking = mmbal_blocking_in_use();
    c.row_blocking = blocking_for_balance(c.blocking, s, in->offsets, c.wave_rows, workers);
    c.turned_stride = NAME(turned_stride)(c.wave_rows, s.E);
    c.past_caches = s.E * s.F * s.D * (int64_t)sizeof(STORED) >= STREAMED_BYTES;
    c.activation = options->activation;
    c.hidden_dropout = make_dropout(options, HIDDEN_TENSOR), c.output_dropout = make_dropout(options, OUTPUT_TENSOR);
    c.x = in->x, c.w1 = in->w1, c.b1 = in->b1, c.w2 = in->w2, c.b2 = in->b2, c.weights = in->weights;
    if (in->packed) {
        c.packed_w1 = in->packed;
        c.packed_w2 = c.packed_w1 + c.E * NAME(panel_elements)(kernels, c.F, c.D);
    }
    c.permutation = in->permutation, c.offsets = in->offsets, c.inverse = in->inverse;
    return c;
}

static int64_t NAME(operand_bytes)(int64_t rows, int64_t width) {
    return rows * NAME(row_stride)(width) * (int64_t)sizeof(OPERAND);
}

/* The call of the wave of experts first .. last. */
static NAME(call) NAME(wave)(const NAME(call) * c, int64_t first, int64_t last) {
    NAME(call) wave = *c;
    wave.E = last - first, wave.offsets += first, wave.first_row = c->offsets[first];
    wave.w1 += first * c->F * c->D, wave.w2 += first * c->D * c->F;
    if (c->packed_w1) {
        wave.packed_w1 += first * NAME(panel_elements)(c->kernels, c->F, c->D);
        wave.packed_w2 += first * NAME(panel_elements)(c->kernels, c->D, c->F);
    }
    if (c->b1) wave.b1 += first * c->F;
    if (c->b2) wave.b2 += first * c->D;
    if (c->dw1) wave.dw1 += first * c->F * c->D;
    if (c->dw2) wave.dw2 += first * c->D * c->F;
    if (c->db1) wave.db1 += first * c->F;
    if (c->db2) wave.db2 += first * c->D;
    return wave;
}

static int64_t NAME(row_blocks)(const NAME(call) * c, int64_t cols) {
    return count_row_blocks(c->offsets, c->E, c->row_blocking, c->tile_rows, cols);
}

static block NAME(row_block)(const NAME(call) * c, int64_t cols, int64_t index) {
    return find_row_block(c->offsets, c->row_blocking, c->tile_rows, cols, index);
}

/* Zeros from the end of a row to the end of its line: a product by pairs may read one element more than there are. */
static void NAME(end_row)(OPERAND *row, int64_t width) {
    for (int64_t i = width; i < NAME(whole_lines)(width); i++) row[i] = 0;
}

/* to[r] = from of row r's token */
static void NAME(gather_row)(const NAME(call) * c, const STORED *from, int64_t r, OPERAND *to) {
    const STORED *source = from + c->permutation[r] / c->K * c->D;
    OPERAND *row = to + (r - c->first_row) * NAME(row_stride)(c->D);
    NAME(stored_to_operands)(c->kernels, c->D, source, row);
    NAME(end_row)(row, c->D);
}

/* to[n] = sum_k factor[n,k] rows[inverse[n,k]] in the order of k; factor NULL: 1 */
static void NAME(combine)(const NAME(call) * c, const REAL *factor, int64_t begin, int64_t end, STORED *to) {
    REAL sum[BLOCK_COLS];
    for (int64_t n = begin; n < end; n++) {
        for (int64_t from = 0; from < c->D; from += BLOCK_COLS) {
            const int64_t here = least(BLOCK_COLS, c->D - from);
            for (int64_t d = 0; d < here; d++) sum[d] = 0;
            for (int64_t pair = n * c->K; pair < (n + 1) * c->K; pair++) {
                const REAL *row = c->rows + c->inverse[pair] * c->D + from, weight = factor ? factor[pair] : 1;
                for (int64_t d = 0; d < here; d++) sum[d] += weight * row[d];
            }
            NAME(narrow)(c->kernels, here, sum, to + n * c->D + from);
        }
    }
}

/* Of the depth of a product with many rows. */
static int64_t NAME(depth_step)(const NAME(call) * c) { return c->blocking.depth_bytes / (int64_t)sizeof(OPERAND); }

/* A product of routed rows with the weights of their experts. */
typedef struct {
    NAME(rows) a;
    int64_t depth, cols;
    const STORED *weights; /* [E, cols, depth] if transposed, else [E, depth, cols] */
    int transposed;
    const OPERAND *packed;  /* the panels of all experts, or NULL */
    const OPERAND *columns; /* of a, for experts with few rows, or NULL */
} NAME(product);

static NAME(weights) NAME(weights_of)(const NAME(call) * c, const NAME(product) * p, int64_t expert) {
    const NAME(weights)
        w = {p->weights + expert * p->depth * p->cols, p->transposed ? p->depth : p->cols, p->transposed,
             p->packed ? p->packed + expert * NAME(panel_elements)(c->kernels, p->cols, p->depth) : NULL};
    return w;
}

static NAME(reading) NAME(read_block)(const NAME(call) * c, const NAME(product) * p, int64_t index) {
    const block at = NAME(row_block)(c, p->cols, index);
    return NAME(read_weights)(c->kernels, NAME(weights_of)(c, p, at.expert), at, p->depth, NAME(depth_step)(c),
                              p->columns ? p->columns + c->columns[at.expert] * p->depth : NULL);
}

/* Multiplies block `index` of those before `end` into s->c. */
static block NAME(multiply_block)(const NAME(call) * c, const NAME(product) * p, int64_t index, int64_t end,
                                  NAME(scratch) * s) {
    const NAME(reading) reading = NAME(read_block)(c, p, index);
    NAME(reading) next = {.depth = 0};
    if (index + 1 < end) next = NAME(read_block)(c, p, index + 1);
    NAME(multiply)(c->kernels, p->a, &reading, index + 1 < end ? &next : NULL, s);
    return reading.place;
}

/* Columns of the panels of those of the experts first .. last whose rows are a right factor; before: those before each
 * of them and behind the last, where not NULL. */
static int64_t NAME(count_columns)(const mmbal_kernels *kernels, const int64_t *offsets, int64_t first, int64_t last,
                                   int64_t *before) {
    int64_t count = 0;
    for (int64_t e = first; e < last; e++) {
        const int64_t rows = offsets[e + 1] - offsets[e];
        if (before) before[e - first] = count;
        if (NAME(go_right)(rows)) count += NAME(columns_of)(kernels, rows);
    }
    if (before) before[last - first] = count;
    return count;
}

static int64_t NAME(most_columns)(const int64_t *offsets, int64_t E, int workers) {
    const mmbal_kernels *kernels = mmbal_kernels_in_use();
    int64_t most = 0;
    for (int64_t first = 0, last; first < E; first = last) {
        last = wave_end(offsets, E, first, workers);
        const int64_t columns = NAME(count_columns)(kernels, offsets, first, last, NULL);
        if (columns > most) most = columns;
    }
    return most;
}

/* The rows of an expert into its panels as a right factor, if it has some: `deep` elements of the depth from `from` on.
 * packed: the panels of all experts of the wave. */
static void NAME(pack_few)(const NAME(call) * c, const OPERAND *rows, int64_t stride, int64_t expert, int64_t depth,
                           int64_t from, int64_t deep, OPERAND *packed) {
    const int64_t tile_cols = c->kernels->OF_OPERAND(tile_cols);
    const int64_t count = c->offsets[expert + 1] - c->offsets[expert];
    const int64_t columns = c->columns[expert + 1] - c->columns[expert];
    OPERAND *to = packed + c->columns[expert] * depth;
    for (int64_t j = 0; j < columns; j += tile_cols) {
        const int64_t width = least(tile_cols, columns - j);
        NAME(pack_columns)(c->kernels, rows + j * stride, stride, least(width, count - j), deep, width,
                           to + j * depth + from * width);
    }
}

static mmbal_status NAME(packed_bytes)(mmbal_expert_mlp_shape s, int64_t *bytes) {
    const mmbal_kernels *kernels = mmbal_kernels_in_use();
    *bytes = s.E * (int64_t)sizeof(OPERAND) *
             (NAME(panel_elements)(kernels, s.F, s.D) + NAME(panel_elements)(kernels, s.D, s.F));
    return MMBAL_OK;
}

typedef struct {
    const mmbal_kernels *kernels;
    mmbal_expert_mlp_shape shape;
    const STORED *w1, *w2;
    OPERAND *packed;
} NAME(packing);

/* Task 2 e packs w1 of expert e, 2 e + 1 its w2. */
static mmbal_status NAME(pack_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(packing) *p = context;
    const int64_t D = p->shape.D, F = p->shape.F;
    const int64_t w1_panels = NAME(panel_elements)(p->kernels, F, D),
                  w2_panels = NAME(panel_elements)(p->kernels, D, F);
    for (int64_t index = begin; index < end; index++) {
        const int64_t e = index / 2;
        if (index % 2 == 0) {
            const NAME(weights) w1 = {p->w1 + e * F * D, D, 1, NULL};
            NAME(pack_all)(p->kernels, w1, D, F, p->packed + e * w1_panels);
        } else {
            const NAME(weights) w2 = {p->w2 + e * D * F, F, 1, NULL};
            NAME(pack_all)(p->kernels, w2, F, D, p->packed + p->shape.E * w1_panels + e * w2_panels);
        }
    }
    return MMBAL_OK;
}

static mmbal_status NAME(pack)(const void *w1, const void *w2, mmbal_expert_mlp_shape shape, void *packed,
                               const mmbal_pool *pool) {
    NAME(packing) p = {mmbal_kernels_in_use(), shape, w1, w2, packed};
    return pool->run(pool->self, 2 * shape.E, 1, NAME(pack_task), &p);
}

#include "expert_mlp_backward_body.h"
#include "expert_mlp_forward_body.h"
