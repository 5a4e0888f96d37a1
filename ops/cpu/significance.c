#include "mmbal/significance.h"

#include <math.h>
#include <string.h>

#include "rows.h"

int64_t mmbal_modal_stats_workspace(int64_t B, int64_t M) {
    (void)M;
    return B * (int64_t)sizeof(double);
}

static mmbal_status check_stats(const mmbal_modality *modalities, const int64_t *targets, int64_t M, int64_t B,
                                int64_t C, int64_t ignore_index) {
    if (M < 1 || M > MMBAL_MAX_MODALITIES || B < 0 || C < 1) return MMBAL_INVALID_ARGUMENT;
    for (int64_t m = 0; m < M; m++) {
        if (!is_dtype(modalities[m].logits_dtype) || !is_dtype(modalities[m].features_dtype)) return MMBAL_UNSUPPORTED;
        if (modalities[m].D < 1) return MMBAL_INVALID_ARGUMENT;
    }
    for (int64_t b = 0; b < B; b++)
        if (targets[b] != ignore_index && !(targets[b] >= 0 && targets[b] < C)) return MMBAL_INVALID_INDEX;
    return MMBAL_OK;
}

/* The sum over the rows of what a task says of each. */
static mmbal_status sum_of_rows(mmbal_task *task, labelled_rows *rows, int64_t B, const mmbal_pool *pool, double *sum) {
    const mmbal_status status = pool->run(pool->self, B, rows_per_task(B, rows->width, pool), task, rows);
    *sum = 0;
    for (int64_t b = 0; b < B; b++) *sum += rows->result[b];
    return status;
}

mmbal_status mmbal_modal_stats(const mmbal_modality *modalities, const int64_t *targets, int64_t M, int64_t B,
                               int64_t C, int64_t ignore_index, double *ce_sum, double *entropy_sum, double *histogram,
                               double *rows, void *workspace, const mmbal_pool *pool) {
    mmbal_status status = check_stats(modalities, targets, M, B, C, ignore_index);
    if (status != MMBAL_OK) return status;
    const mmbal_row_tasks *tasks = mmbal_row_tasks_in_use();
    for (int64_t m = 0; m < M && status == MMBAL_OK; m++) {
        const mmbal_modality *of = &modalities[m];
        labelled_rows logits = {of->logits, targets, ignore_index, C, workspace};
        labelled_rows features = {of->features, targets, ignore_index, of->D, workspace};
        status = sum_of_rows(tasks->cross_entropy[of->logits_dtype], &logits, B, pool, &ce_sum[m]);
        if (status != MMBAL_OK) return status;
        status = sum_of_rows(tasks->softmax_entropy[of->features_dtype], &features, B, pool, &entropy_sum[m]);
    }
    memset(histogram, 0, (size_t)C * sizeof(double));
    *rows = 0;
    for (int64_t b = 0; b < B; b++) {
        if (targets[b] == ignore_index) continue;
        histogram[targets[b]]++;
        *rows += 1;
    }
    return status;
}

static double bounded(double ratio, const mmbal_ratio_options *options) {
    return fmin(fmax(ratio, options->least), options->most);
}

static mmbal_status check_ratio(int64_t M, const mmbal_ratio_options *options) {
    const mmbal_significance kind = options->significance;
    if (M < 1 || M > MMBAL_MAX_MODALITIES) return MMBAL_INVALID_ARGUMENT;
    if (kind != MMBAL_RATE && kind != MMBAL_RATE_UNNORMALISED && kind != MMBAL_MI) return MMBAL_INVALID_ARGUMENT;
    if (!(options->temperature > 0 && isfinite(options->temperature))) return MMBAL_INVALID_ARGUMENT;
    if (!(options->least_entropy > 0 && isfinite(options->least_entropy))) return MMBAL_INVALID_ARGUMENT;
    if (!isfinite(options->offset) || !isfinite(options->bias)) return MMBAL_INVALID_ARGUMENT;
    if (!(options->least >= 0 && options->least <= options->most && options->most <= 1)) return MMBAL_INVALID_ARGUMENT;
    return MMBAL_OK;
}

mmbal_status mmbal_ratio_of_rates(const double *rate, int64_t M, mmbal_ratio_options options, double *rho) {
    const mmbal_status status = check_ratio(M, &options);
    if (status != MMBAL_OK) return status;
    double largest = -INFINITY, total = 0;
    int finite = 1;
    for (int64_t m = 0; m < M; m++) {
        finite &= isfinite(rate[m]) != 0;
        largest = fmax(largest, rate[m]);
    }
    for (int64_t m = 0; m < M; m++) total += exp((rate[m] - largest) / options.temperature);
    for (int64_t m = 0; m < M; m++) {
        const double share = exp((rate[m] - largest) / options.temperature) / total;
        rho[m] = M == 1 ? 1 : bounded(finite ? 1 - share + options.bias : 1 - 1 / (double)M, &options);
    }
    return MMBAL_OK;
}

static double entropy_of_labels(const double *histogram, double rows, int64_t C) {
    double entropy = 0;
    for (int64_t c = 0; c < C; c++) {
        const double p = histogram[c] / rows;
        entropy -= p > 0 ? p * log(p) : 0;
    }
    return entropy;
}

mmbal_status mmbal_update_ratio(const double *ce_sum, const double *entropy_sum, const double *histogram,
                                const double *rows, const int64_t *dims, int64_t M, int64_t C,
                                mmbal_ratio_options options, double *rate, double *rho) {
    const mmbal_status status = check_ratio(M, &options);
    if (status != MMBAL_OK) return status;
    if (C < 1) return MMBAL_INVALID_ARGUMENT;
    for (int64_t m = 0; m < M; m++)
        if (dims[m] < 1) return MMBAL_INVALID_ARGUMENT;
    const double label_entropy = entropy_of_labels(histogram, *rows, C);
    int guarded = 0;
    for (int64_t m = 0; m < M; m++) {
        const double information = label_entropy - ce_sum[m] / *rows + options.offset;
        const double largest = log((double)dims[m]);
        const double entropy = dims[m] > 1 ? fmax(entropy_sum[m] / *rows / largest, options.least_entropy) : 1;
        guarded |= information <= 0;
        rate[m] = information > 0 || isnan(information) ? information : 0;
        if (options.significance != MMBAL_MI) rate[m] /= isnan(entropy_sum[m]) ? NAN : entropy;
        if (options.significance == MMBAL_RATE_UNNORMALISED && dims[m] > 1) rate[m] /= largest;
    }
    if (!(options.official_guard && guarded && M > 1)) return mmbal_ratio_of_rates(rate, M, options, rho);
    for (int64_t m = 0; m < M; m++) rho[m] = bounded(0.5, &options);
    return MMBAL_OK;
}
