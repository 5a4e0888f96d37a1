/* The kernels of expert_mlp.c for one dtype; see each_dtype.h. */
#include "gemm_body.h"

/* Everything that the tasks of one call share. */
typedef struct {
    const mmbal_kernels *kernels;
    mmbal_activation activation;
    dropout hidden_dropout, output_dropout;
    int64_t N, D, F, E, K, R, height; /* height: rows of a block */
    const STORED *x, *w1, *b1, *w2, *b2, *dy, *preactivation;
    const REAL *weights;
    const int64_t *permutation, *offsets, *inverse;
    STORED *y, *kept_preactivation, *dx, *dw1, *db1, *dw2, *db2; /* outputs, NULL where not asked for */
    REAL *dweights;
    /* workspace */
    STORED *hidden;  /* [R, F] a; in the backward weights * a */
    STORED *dhidden; /* [R, F] du */
    STORED *g;       /* [R, D] dy of the routed row under its output mask; only with output dropout */
    REAL *rows;      /* [R, D] o; in the backward dx of the routed row */
    REAL *dot_parts; /* [R, blocks across F] parts of <h, a> */
    REAL *scratch;   /* [workers, SCRATCH] */
} NAME(call);

static NAME(call) NAME(begin_call)(const mmbal_expert_mlp_inputs *in, mmbal_expert_mlp_shape s,
                                   const mmbal_expert_mlp_options *options) {
    const mmbal_kernels *kernels = mmbal_kernels_in_use();
    NAME(call) c = {.kernels = kernels, .N = s.N, .D = s.D, .F = s.F, .E = s.E, .K = s.K, .R = s.N * s.K};
    c.activation = options->activation, c.height = block_height(kernels->OF_REAL(tile_rows));
    c.hidden_dropout = make_dropout(options, HIDDEN_TENSOR), c.output_dropout = make_dropout(options, OUTPUT_TENSOR);
    c.x = in->x, c.w1 = in->w1, c.b1 = in->b1, c.w2 = in->w2, c.b2 = in->b2, c.weights = in->weights;
    c.permutation = in->permutation, c.offsets = in->offsets, c.inverse = in->inverse;
    return c;
}

static REAL *NAME(scratch_of)(const NAME(call) * c, int worker) { return c->scratch + (int64_t)worker * NAME(SCRATCH); }

/* Multiplies the n values by the dropout mask of elements first .. first + n; n <= BLOCK_COLS. */
static void NAME(mask)(const dropout *d, int64_t first, int64_t n, REAL *values) {
    double mask[BLOCK_COLS];
    if (d->probability == 0) return;
    fill_mask(d, first, n, mask);
    for (int64_t i = 0; i < n; i++) values[i] *= (REAL)mask[i];
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
