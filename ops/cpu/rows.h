/* The tasks over samples of divergence.c and btw.c. Every instruction set compiles the same bodies (rows_body.h) in a
 * file of its own, rows_ISA.c; the entry points check, fill one of these contexts and reach the tasks through a table.
 * Shapes as in the headers; a pointer's type is the dtype's of the task, or "real". */
#ifndef MMBAL_CPU_ROWS_H
#define MMBAL_CPU_ROWS_H

#include <stdint.h>

#include "arena.h"
#include "mmbal/btw.h"
#include "mmbal/dtype.h"
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
    return share > least ? share : least > 1 ? least : 1;
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

/* By mmbal_dtype. Indices are rows, for weights_backward chunks. */
typedef struct mmbal_row_tasks {
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
