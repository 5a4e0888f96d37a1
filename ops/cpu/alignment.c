#include "mmbal/alignment.h"

#include <math.h>
#include <string.h>

#include "arena.h"
#include "fetch.h"
#include "kernels.h"
#include "rows.h"

/* Rows of simple passes for a task; whole lines of every dtype, as two tasks must not write to one line by turns. */
enum { ROWS_AT_ONCE = 64, COMBINED_AT_ONCE = 256, SOURCE_ROWS = 126 };

/* What an own row weighs, and whether there is anything to contrast it with. */
typedef struct {
    double of_row;
    int contrasted;
} align_scale;

static align_scale scale_of(const mmbal_alignment *t) {
    int64_t present = t->present ? 0 : t->A;
    for (int64_t a = 0; a < t->A && t->present; a++) present += t->present[a] != 0;
    const int any = present > 0 && t->B > 0;
    const align_scale scale = {any ? (double)t->A / ((double)t->B * (double)present) : 0, any && present > 1};
    return scale;
}

/* Rows of a block: whole tiles, and with few candidates so few that there are some blocks for each worker. It depends
 * on the shape alone, as column statistics are sums over blocks. */
static int64_t block_height_of(int64_t A, int tile_rows) {
    enum { BLOCKS = 8 };
    const int64_t height = ceil_div(ceil_div(A, BLOCKS), tile_rows) * tile_rows;
    return height < tile_rows ? tile_rows : least(height, SIMILARITY_ROWS / tile_rows * tile_rows);
}

static size_t size_of(mmbal_dtype dtype) { return dtype == MMBAL_F64 ? 8 : dtype == MMBAL_F32 ? 4 : 2; }

#define BODY "alignment_body.h"
#include "each_product.h"

int mmbal_regression_from_name(const char *name, mmbal_regression *regression) {
    static const char *const names[] = {"smooth_l1", "mse", "l2", "cosine"};
    for (int i = MMBAL_REGRESSION_SMOOTH_L1; i <= MMBAL_REGRESSION_COSINE; i++)
        if (strcmp(name, names[i]) == 0) {
            *regression = (mmbal_regression)i;
            return 1;
        }
    return 0;
}

static mmbal_status check_alignment(const mmbal_alignment *t) {
    if (!is_dtype(t->dtype)) return MMBAL_UNSUPPORTED;
    if (t->B < 0 || t->D < 1 || t->C < 1 || t->A < t->B || t->offset < 0 || t->offset > t->A - t->B)
        return MMBAL_INVALID_ARGUMENT;
    if (t->regression < MMBAL_REGRESSION_SMOOTH_L1 || t->regression > MMBAL_REGRESSION_COSINE)
        return MMBAL_INVALID_ARGUMENT;
    if (!(t->tau >= 1e-30 && t->tau <= 1e30) || !(t->alpha >= 0 && t->alpha <= 1)) return MMBAL_INVALID_ARGUMENT;
    if (!(t->beta >= 0 && isfinite(t->beta))) return MMBAL_INVALID_ARGUMENT;
    return MMBAL_OK;
}

int64_t mmbal_align_loss_workspace(const mmbal_alignment *alignment, int workers) {
    if (check_alignment(alignment) != MMBAL_OK || workers < 1) return 0;
    return alignment->dtype == MMBAL_F64 ? forward_bytes_f64(alignment, workers)
                                         : forward_bytes_f32(alignment, workers);
}

int64_t mmbal_align_loss_backward_workspace(const mmbal_alignment *alignment,
                                            const mmbal_alignment_gradients *gradients, int workers) {
    if (check_alignment(alignment) != MMBAL_OK || workers < 1) return 0;
    return alignment->dtype == MMBAL_F64 ? backward_bytes_f64(alignment, gradients, workers)
                                         : backward_bytes_f32(alignment, gradients, workers);
}

mmbal_status mmbal_align_loss(const mmbal_alignment *alignment, void *loss, void *regression, void *contrastive,
                              void *normalizers, void *workspace, const mmbal_pool *pool) {
    const mmbal_status status = check_alignment(alignment);
    if (status != MMBAL_OK) return status;
    return (alignment->dtype == MMBAL_F64 ? align_f64 : align_f32)(alignment, loss, regression, contrastive,
                                                                   normalizers, workspace, pool);
}

mmbal_status mmbal_align_loss_backward(const mmbal_alignment *alignment, const void *dloss, const void *dregression,
                                       const void *dcontrastive, const void *normalizers,
                                       const mmbal_alignment_gradients *gradients, void *workspace,
                                       const mmbal_pool *pool) {
    const mmbal_status status = check_alignment(alignment);
    if (status != MMBAL_OK) return status;
    return (alignment->dtype == MMBAL_F64 ? align_backward_f64 : align_backward_f32)(
        alignment, dloss, dregression, dcontrastive, normalizers, gradients, workspace, pool);
}
