/* The tasks over samples of divergence.c, btw.c and significance.c, and those over units of gradients of units.c and
 * elements.c. Every instruction set compiles the same bodies (rows_body.h) in a
 * file of its own, rows_ISA.c; the entry points check, fill one of these contexts and reach the tasks through a table.
 * Shapes as in the headers; a pointer's type is the dtype's of the task, or "real". */
#ifndef MMBAL_CPU_ROWS_H
#define MMBAL_CPU_ROWS_H

#include <stdint.h>

#include "arena.h"
#include "mmbal/alignment.h"
#include "mmbal/attribution.h"
#include "mmbal/btw.h"
#include "mmbal/dtype.h"
#include "mmbal/elements.h"
#include "mmbal/modalities.h"
#include "mmbal/pool.h"

enum {
    TILE = 1024,            /* elements that a task holds on its stack in an array */
    ROWS_PER_CHUNK = 1024,  /* of a sum over samples: fixed, so that its order does not depend on the workers */
    CATEGORICAL_ARRAYS = 5, /* of a tile each: x and exp(x) twice, dfused_logits */
    FEW_CLASSES = 24,       /* at most these lie as columns: about where both ways took the same time */
    PARTS = 16              /* sums of a long row side by side, added in their order in the end */
};
_Static_assert((int)TILE >= (int)MMBAL_MAX_MODALITIES, "a row of modalities fits a tile");

/* Rows of `row_size` elements that a task does at a time: enough work to pay for handing it out, and otherwise long
 * stretches of memory, two a worker. A row's results do not depend on it. */
static inline int64_t rows_per_task(int64_t N, int64_t row_size, const mmbal_pool *pool) {
    const int64_t least = 16384 / row_size, share = N / (2 * pool->workers);
    if (share <= least) return least > 1 ? least : 1;
    return (share + CACHE_LINE - 1) / CACHE_LINE * CACHE_LINE; /* so that a task begins where a line does */
}

/* Asks for one of `parts` parts of memory that is soon read, or written: a core waits once it has some twenty lines on
 * the way, so the next tile comes a part at a time while this one is computed. */
static inline void fetch_part(const void *first, int64_t bytes, int64_t part, int64_t parts, int write) {
    const int64_t lines = (bytes + CACHE_LINE - 1) / CACHE_LINE, end = lines * (part + 1) / parts;
    for (int64_t line = lines * part / parts; line < end; line++) {
        if (write)
            __builtin_prefetch((const char *)first + line * CACHE_LINE, 1, 3);
        else
            __builtin_prefetch((const char *)first + line * CACHE_LINE, 0, 3);
    }
}

/* A tile of logits: whole rows of C classes, one at least, and in the workspace whole blocks of PARTS for each. */
static inline int64_t tile_rows(int64_t C) { return C < TILE ? TILE / C : 1; }
static inline int64_t row_stride(int64_t C) { return (C + PARTS - 1) / PARTS * PARTS; }
static inline int64_t categorical_tile(int64_t C) { return tile_rows(C) * row_stride(C); }

/* Normal distributions: standard deviations by their logarithms (Gaussian), or the residuals of a target. */
typedef struct {
    const void *mu, *log_sigma;             /* [N, M]; log_sigma NULL: residual */
    const void *fused_mu, *fused_log_sigma; /* [N] */
    const void *target;                     /* [N] or NULL: Gaussian */
    const void *dkl;                        /* [N, M] real */
    int64_t M;
    double sigma_min;
    void *kl;                           /* [N, M] real */
    void *dmu, *dlog_sigma;             /* [N, M] or NULL */
    void *dfused_mu, *dfused_log_sigma; /* [N] or NULL */
} normal_rows;

typedef struct {
    const void *logits;       /* [M, N, C] */
    const void *fused_logits; /* [N, C] */
    const void *dkl;          /* [N, M] real */
    int64_t M, N, C;
    int reverse;
    void *kl;            /* [N, M] real */
    void *dlogits;       /* [M, N, C] or NULL */
    void *dfused_logits; /* [N, C] or NULL */
    void *workspace;     /* [workers, CATEGORICAL_ARRAYS, categorical_tile(C)] real */
} categorical_rows;

typedef struct {
    const void *kl;         /* [N, M] */
    const double *mi;       /* [M] */
    const uint8_t *present; /* [N, M] or NULL */
    int64_t N, M;
    const mmbal_btw_options *options;
    void *weights;        /* [N, M] real */
    const void *dweights; /* [N, M] real */
    void *dkl;            /* [N, M] or NULL */
    double *dmi_parts;    /* [chunks of ROWS_PER_CHUNK, M] or NULL */
} weight_rows;

/* One modality m of embeddings [N, d] and its column of [N, M]. */
typedef struct {
    const void *h, *dscaled; /* [N, d] */
    const void *weights;     /* [N, M] real */
    int64_t m, M, d;
    void *scaled;   /* [N, d] */
    void *dweights; /* [N, M] real */
} embedding_rows;

/* Rows whose target is not ignore_index, for the others the result is 0. */
typedef struct {
    const void *values; /* [B, width] */
    const int64_t *targets;
    int64_t ignore_index, width;
    double *result; /* [B] */
} labelled_rows;

/* Samples of mmbal/attribution.h; outputs and what is upstream as there, dshares and dmagnitudes may be NULL: 0. */
typedef struct {
    const mmbal_attribution *attribution;
    const void *dreg, *dshares, *dmagnitudes;
    void *reg, *shares, *magnitudes; /* magnitudes: read by the backward ones */
    void *ddreg, *ddshares, *ddmagnitudes;
} attributed_rows;

mmbal_status mmbal_check_attribution(const mmbal_attribution *attribution);

/* Of a linear head, for all samples: see attribution_linear.c. */
typedef struct {
    const mmbal_attribution *attribution;
    const mmbal_linear_head *head;
    void *coefficients, *zeta; /* [B, C] real */
    void *const *gradients;    /* [M] pointers to [B, d] real: g, then v */
    void *const *embeddings;   /* [M] pointers to [B, d] real */
    void *const *dweights;     /* [M] pointers to [C, d] */
    int64_t m;                 /* of linear_weights and linear_gradients */
} linear_rows;

/* Elements of a row, and rows, that a task holds sums of; how many terms it adds to them before they are stored. */
enum { LINEAR_TILE = 512, LINEAR_ROWS = 4, LINEAR_TERMS = 4 };

/* A part of a tensor of units.h: `units` of one group, and of each the rows first_row .. end_row. Row r is the part
 * r mod parts, of ROW_PART elements at most, of outer index r / parts. */
typedef struct {
    void *data;       /* of the first of the units */
    const void *base; /* as data, or NULL */
    int64_t units, first_row, end_row, parts, inner;
    int64_t unit_stride, outer_stride, inner_stride, base_unit_stride, base_outer_stride, base_inner_stride;
} unit_block;

enum { ROW_PART = 1 << 15, MOST_UNITS = 1024 }; /* of a block */

/* What a pass over the elements of one tensor needs; see elements.c. */
typedef struct {
    const mmbal_elements *tensor;
    mmbal_importance importance;
    mmbal_sampler sampler;
    int64_t seed, step;
    double level, scale_of_weight, floor; /* p = min(1, level (scale_of_weight w + floor)) */
    double multiplier;                    /* of what is kept; 0: 1 / p */
    double tie_multiplier;                /* of what has the threshold's key */
    uint32_t threshold;                   /* keys below it are kept */
} element_pass;

enum { ELEMENTS_PER_TILE = 256 };

/* Rows of embeddings and the vectors of length 1 that they point along; see mmbal/alignment.h. */
typedef struct {
    const void *x;          /* [A, width] */
    const uint8_t *present; /* [A] or NULL */
    int64_t width, stride;
    void *unit;      /* [A, stride] real: x / |x|; 0 beyond width, and where a row is not present */
    double *inverse; /* [A] 1 / |x|, 0 where there is no gradient */
    void *dx;        /* [A, width], of unit_gradient */
} unit_rows;

static const double LEAST_NORM = 1e-12; /* as torch.nn.functional.normalize has it */

/* Own rows of an alignment. */
typedef struct {
    const mmbal_alignment *alignment;
    double *losses;        /* [B], forward */
    double scale;          /* what is upstream of a row's loss, backward */
    void *dpred, *dtarget; /* [B, D] or NULL */
} regression_rows;

/* A block of similarities: rows x cols, row by row `stride` apart. */
enum { SIMILARITY_ROWS = 280, SIMILARITY_COLS = 512, SUMMED_AT_ONCE = 32 };
typedef struct {
    void *z; /* real: products, then logits, then their gradient */
    int64_t rows, cols, stride;
    int64_t row, col; /* of its first element among all candidates */
    double inverse_tau;
    const void *penalty;   /* [A] real: 0, or -inf where a candidate is not present */
    const int64_t *groups; /* [A] or NULL */
} similarity_block;

/* Of rows and columns, [A] real: logsumexps, infinite where a candidate is none of our own; weights of their losses. */
typedef struct {
    const void *row_normalizer, *row_weight, *col_normalizer, *col_weight;
    int symmetric;
} similarity_weights;

/* By mmbal_dtype. Indices are rows, for weights_backward chunks. */
typedef struct mmbal_row_tasks {
    mmbal_task *cross_entropy[4], *softmax_entropy[4];
    mmbal_task *attribution[4], *attribution_backward[4], *attribution_second[4];
    mmbal_task *linear_scores[4], *linear_gradients[4], *linear_zeta[4], *linear_weights[4];
    mmbal_task *unit[4], *regression[4], *regression_backward[4];
    void (*unit_gradient[4])(const unit_rows *rows, int64_t a, const void *dunit); /* dunit [width] real */
    /* By whether real is float64. largest and sum: [rows] or [cols] real */
    void (*similarity_logits[2])(const similarity_block *block);
    void (*similarity_rows[2])(const similarity_block *block, void *largest, void *sum);
    void (*similarity_cols[2])(const similarity_block *block, void *largest, void *sum);
    void (*similarity_gradient[2])(const similarity_block *block, const similarity_weights *of);
    /* Where z [rows, cols] is at least its column's threshold; how many there are. */
    int64_t (*at_least[2])(const void *z, int64_t rows, int64_t cols, int64_t stride, const void *thresholds,
                           int32_t *places);
    /* sums[units] of the squares of a block, and the product of a block with scale[units] */
    void (*squares[4])(const unit_block *block, double *sums);
    void (*multiply[4])(const unit_block *block, const double *scale);
    /* Of elements first .. first + n <= first + ELEMENTS_PER_TILE, with w[n] their weights: */
    void (*element_weights[4])(const element_pass *pass, int64_t first, int64_t n, double *w);
    void (*element_multiply[4])(const element_pass *pass, int64_t first, int64_t n, const double *multipliers);
    void (*add_weights)(int64_t n, const double *w, double *sum, int64_t *positive);
    void (*add_uncapped)(const element_pass *pass, int64_t n, const double *w, double *sum, int64_t *capped);
    void (*element_keys)(const element_pass *pass, int64_t first, int64_t n, const double *w, uint32_t *keys);
    int64_t (*keep_smallest)(const element_pass *pass, int64_t n, const uint32_t *keys, double *multipliers);
    void (*keep_drawn)(const element_pass *pass, int64_t first, int64_t n, const double *w, double *multipliers);
    mmbal_task *normal_kl[4], *normal_kl_backward[4], *categorical_kl[4], *categorical_kl_backward[4];
    mmbal_task *weights[4], *weights_backward[4], *scale[4], *scale_dweights[4];
} mmbal_row_tasks;

extern const mmbal_row_tasks mmbal_row_tasks_portable, mmbal_row_tasks_avx2, mmbal_row_tasks_avx512;
/* Those of isa, or of the largest one below it that has its own. */
const mmbal_row_tasks *mmbal_row_tasks_of(int isa);
const mmbal_row_tasks *mmbal_row_tasks_in_use(void);

static inline int is_dtype(mmbal_dtype dtype) {
    return dtype == MMBAL_F32 || dtype == MMBAL_BF16 || dtype == MMBAL_F16 || dtype == MMBAL_F64;
}

#endif
