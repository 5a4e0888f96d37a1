#include "mmbal/elements.h"

#include <math.h>
#include <string.h>

#include "arena.h"
#include "masks.h"
#include "rows.h"

/* Elements of a piece of work, whole tiles; sums are taken over a piece, then over the pieces in order. */
enum { CHUNK = 1 << 15 };
_Static_assert(CHUNK % ELEMENTS_PER_TILE == 0, "a chunk is whole tiles");

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }
static int64_t count_chunks(const mmbal_elements *t) { return (t->count + CHUNK - 1) / CHUNK; }

typedef struct element_work element_work;
typedef void tile_action(element_work *work, int64_t chunk, int worker, int64_t first, int64_t n);

/* The passes over one tensor. */
struct element_work {
    element_pass pass;
    const mmbal_row_tasks *tasks;
    tile_action *action;
    double *sums;    /* [chunks] */
    int64_t *counts; /* [chunks] */
    int64_t *bins;   /* [workers, KEY_BINS] */
    uint32_t coarse; /* the upper bits of the threshold */
    int64_t ties;    /* how many of the elements with the threshold's key are kept */
};

static mmbal_status act_on_chunks(void *context, int worker, int64_t begin, int64_t end) {
    element_work *work = context;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        const int64_t last = least((chunk + 1) * CHUNK, work->pass.tensor->count);
        for (int64_t first = chunk * CHUNK; first < last; first += ELEMENTS_PER_TILE)
            work->action(work, chunk, worker, first, least(ELEMENTS_PER_TILE, last - first));
    }
    return MMBAL_OK;
}

static mmbal_status act(element_work *work, tile_action *action, const mmbal_pool *pool) {
    work->action = action;
    return pool->run(pool->self, count_chunks(work->pass.tensor), 1, act_on_chunks, work);
}

static double sum_of(const double *values, int64_t n) {
    double parts[4] = {0};
    for (int64_t i = 0; i < n; i++) parts[i % 4] += values[i];
    return (parts[0] + parts[1]) + (parts[2] + parts[3]);
}

/* The sum of the weights, and how many are greater than 0. */
static void add_weights(element_work *work, int64_t chunk, int worker, int64_t first, int64_t n) {
    (void)worker;
    double weights[ELEMENTS_PER_TILE];
    work->tasks->element_weights[work->pass.tensor->dtype](&work->pass, first, n, weights);
    work->sums[chunk] += sum_of(weights, n);
    for (int64_t i = 0; i < n; i++) work->counts[chunk] += weights[i] > 0;
}

/* Of what is not capped at the present level the sum of q, and how many are capped. */
static void add_uncapped(element_work *work, int64_t chunk, int worker, int64_t first, int64_t n) {
    (void)worker;
    const element_pass *pass = &work->pass;
    double q[ELEMENTS_PER_TILE];
    work->tasks->element_weights[pass->tensor->dtype](pass, first, n, q);
    for (int64_t i = 0; i < n; i++) {
        q[i] = pass->scale_of_weight * q[i] + pass->floor;
        const int capped = pass->level * q[i] >= 1;
        work->counts[chunk] += capped;
        q[i] = capped ? 0 : q[i];
    }
    work->sums[chunk] += sum_of(q, n);
}

static void count_coarse(element_work *work, int64_t chunk, int worker, int64_t first, int64_t n) {
    (void)chunk;
    uint32_t keys[ELEMENTS_PER_TILE];
    int64_t *bins = work->bins + worker * KEY_BINS;
    work->tasks->element_keys[work->pass.tensor->dtype](&work->pass, first, n, keys);
    for (int64_t i = 0; i < n; i++) bins[keys[i] >> COARSE_SHIFT]++;
}

static void count_fine(element_work *work, int64_t chunk, int worker, int64_t first, int64_t n) {
    (void)chunk;
    uint32_t keys[ELEMENTS_PER_TILE];
    int64_t *bins = work->bins + worker * KEY_BINS;
    work->tasks->element_keys[work->pass.tensor->dtype](&work->pass, first, n, keys);
    for (int64_t i = 0; i < n; i++)
        if (keys[i] >> COARSE_SHIFT == work->coarse) bins[keys[i] & ((1u << COARSE_SHIFT) - 1)]++;
}

static void count_ties(element_work *work, int64_t chunk, int worker, int64_t first, int64_t n) {
    (void)worker;
    uint32_t keys[ELEMENTS_PER_TILE];
    work->tasks->element_keys[work->pass.tensor->dtype](&work->pass, first, n, keys);
    for (int64_t i = 0; i < n; i++) work->counts[chunk] += keys[i] == work->pass.threshold;
}

/* Keys below the threshold are kept, and the first `ties` of those that equal it: counts holds how many come before the
 * chunk. */
static void multiply_smallest(element_work *work, int64_t chunk, int worker, int64_t first, int64_t n) {
    (void)worker;
    const element_pass *pass = &work->pass;
    uint32_t keys[ELEMENTS_PER_TILE], equal = 0;
    double multipliers[ELEMENTS_PER_TILE];
    work->tasks->element_keys[pass->tensor->dtype](pass, first, n, keys);
    for (int64_t i = 0; i < n; i++) {
        multipliers[i] = keys[i] < pass->threshold ? pass->multiplier : 0;
        equal |= keys[i] == pass->threshold;
    }
    for (int64_t i = 0; i < n && equal; i++)
        if (keys[i] == pass->threshold && work->counts[chunk]++ < work->ties) multipliers[i] = pass->multiplier;
    work->tasks->element_multiply[pass->tensor->dtype](pass, first, n, multipliers);
}

static void multiply_drawn(element_work *work, int64_t chunk, int worker, int64_t first, int64_t n) {
    (void)chunk, (void)worker;
    double multipliers[ELEMENTS_PER_TILE];
    work->tasks->element_kept[work->pass.tensor->dtype](&work->pass, first, n, multipliers);
    work->tasks->element_multiply[work->pass.tensor->dtype](&work->pass, first, n, multipliers);
}

/* Runs a pass that sums and counts by chunks; what it found in all. */
static mmbal_status take_sums(element_work *work, tile_action *action, const mmbal_pool *pool, double *sum,
                              int64_t *count) {
    const int64_t chunks = count_chunks(work->pass.tensor);
    memset(work->sums, 0, (size_t)chunks * sizeof *work->sums);
    memset(work->counts, 0, (size_t)chunks * sizeof *work->counts);
    const mmbal_status status = act(work, action, pool);
    *sum = 0, *count = 0;
    for (int64_t chunk = 0; chunk < chunks; chunk++) *sum += work->sums[chunk], *count += work->counts[chunk];
    return status;
}

/* Fills the bins and finds the one in which the `place`-th key lies (from 1): *below are before it, *inside in it. */
static uint32_t find_bin(element_work *work, tile_action *action, int64_t place, const mmbal_pool *pool, int64_t *below,
                         int64_t *inside) {
    memset(work->bins, 0, (size_t)pool->workers * KEY_BINS * sizeof *work->bins);
    act(work, action, pool);
    *below = 0;
    for (uint32_t bin = 0;; bin++) {
        *inside = 0;
        for (int worker = 0; worker < pool->workers; worker++) *inside += work->bins[worker * KEY_BINS + bin];
        if (bin == KEY_BINS - 1 || *below + *inside >= place) return bin;
        *below += *inside;
    }
}

/* The k smallest keys: the threshold by its upper bits, then by the lower ones, then ties by their place. */
static mmbal_status mask_smallest(element_work *work, int64_t k, const mmbal_pool *pool) {
    const int64_t chunks = count_chunks(work->pass.tensor);
    mmbal_status status = MMBAL_OK;
    work->pass.threshold = 0, work->ties = 0;
    if (k > 0) {
        int64_t below, below_inside, inside, equal;
        work->coarse = find_bin(work, count_coarse, k, pool, &below, &inside);
        const uint32_t fine = find_bin(work, count_fine, k - below, pool, &below_inside, &equal);
        work->pass.threshold = work->coarse << COARSE_SHIFT | fine;
        work->ties = k - below - below_inside;
        if (work->ties == equal) work->ties = INT64_MAX; /* all of them, wherever they are */
    }
    memset(work->counts, 0, (size_t)chunks * sizeof *work->counts);
    if (k > 0 && work->ties < INT64_MAX) {
        int64_t before = 0;
        status = act(work, count_ties, pool);
        for (int64_t chunk = 0; chunk < chunks; chunk++) {
            const int64_t here = work->counts[chunk];
            work->counts[chunk] = before, before += here;
        }
    }
    return status == MMBAL_OK ? act(work, multiply_smallest, pool) : status;
}

/* As sampling.c finds it for units. */
static mmbal_status mask_independent(element_work *work, double kappa, int64_t positive, const mmbal_pool *pool) {
    element_pass *pass = &work->pass;
    mmbal_status status = MMBAL_OK;
    pass->level = kappa >= (double)positive ? INFINITY : 0;
    for (int64_t capped = -1; pass->level < INFINITY && status == MMBAL_OK;) {
        double rest;
        int64_t now;
        status = take_sums(work, add_uncapped, pool, &rest, &now);
        if (now == capped || !(kappa > (double)now)) break;
        capped = now, pass->level = (kappa - (double)now) / rest;
    }
    return status == MMBAL_OK ? act(work, multiply_drawn, pool) : status;
}

static mmbal_status mask_tensor(element_work *work, double rho, double sum, int64_t positive,
                                mmbal_mask_options options, const mmbal_pool *pool) {
    element_pass *pass = &work->pass;
    const int64_t n = pass->tensor->count;
    if (sum == 0 || rho >= 1) return MMBAL_OK;
    if (options.sampler == MMBAL_INDEPENDENT) {
        pass->scale_of_weight = (1 - options.mix) / sum, pass->floor = options.mix / (double)n;
        pass->multiplier = options.unbiased ? 0 : 1;
        return mask_independent(work, rho * (double)n, options.mix > 0 ? n : positive, pool);
    }
    int64_t k = count_kept(rho, n);
    if (options.sampler != MMBAL_UNIFORM) k = least(k, positive);
    pass->multiplier = options.unbiased ? (double)n / (double)k : 1;
    return mask_smallest(work, k, pool);
}

static mmbal_status check_elements(const mmbal_elements *tensors, int64_t T, int64_t M, mmbal_importance importance) {
    const int known = importance == MMBAL_GN || importance == MMBAL_SQRT_GN || importance == MMBAL_GN_WN;
    if (T < 0 || !known) return MMBAL_INVALID_ARGUMENT;
    for (int64_t t = 0; t < T; t++) {
        const mmbal_elements *of = &tensors[t];
        if (!is_dtype(of->dtype)) return MMBAL_UNSUPPORTED;
        if (of->count < 0 || of->modality < 0 || of->modality >= M || of->id < 0 || of->id > UINT32_MAX)
            return MMBAL_INVALID_ARGUMENT;
        if (importance == MMBAL_GN_WN && !of->weights) return MMBAL_INVALID_ARGUMENT;
    }
    return MMBAL_OK;
}

/* Cuts the workspace: sums and counts of the longest tensor, the bins, sum and number of the weights of each. */
static int64_t lay_out(const mmbal_elements *tensors, int64_t T, const mmbal_pool *pool, arena *from,
                       element_work *work, double **sums, int64_t **positive) {
    int64_t chunks = 0;
    for (int64_t t = 0; t < T; t++) chunks = count_chunks(&tensors[t]) > chunks ? count_chunks(&tensors[t]) : chunks;
    work->sums = carve(from, chunks * (int64_t)sizeof(double));
    work->counts = carve(from, chunks * (int64_t)sizeof(int64_t));
    work->bins = carve(from, pool->workers * (int64_t)KEY_BINS * (int64_t)sizeof(int64_t));
    *sums = carve(from, T * (int64_t)sizeof(double));
    *positive = carve(from, T * (int64_t)sizeof(int64_t));
    return bytes_carved(from);
}

int64_t mmbal_mask_elements_workspace(const mmbal_elements *tensors, int64_t T, const mmbal_pool *pool) {
    element_work work;
    double *sums;
    int64_t *positive;
    return lay_out(tensors, T, pool, &(arena){0}, &work, &sums, &positive);
}

mmbal_status mmbal_mask_elements(const mmbal_elements *tensors, const double *rho, int64_t T, int64_t M, int64_t seed,
                                 int64_t step, mmbal_importance importance, mmbal_mask_options options, void *workspace,
                                 const mmbal_pool *pool) {
    const mmbal_sampler sampler = options.sampler;
    mmbal_status status = check_elements(tensors, T, M, importance);
    if (status != MMBAL_OK) return status;
    if (!mask_is_served(rho, M, step, options)) return MMBAL_INVALID_ARGUMENT;
    if (sampler == MMBAL_SYSTEMATIC || (sampler == MMBAL_BOTTOMK && options.unbiased)) return MMBAL_UNSUPPORTED;
    element_work work = {.tasks = mmbal_row_tasks_in_use()};
    work.pass.importance = importance, work.pass.sampler = sampler, work.pass.seed = seed, work.pass.step = step;
    double *sums;
    int64_t *positive;
    lay_out(tensors, T, pool, &(arena){(uintptr_t)workspace}, &work, &sums, &positive);
    for (int64_t t = 0; t < T && status == MMBAL_OK; t++) {
        work.pass.tensor = &tensors[t];
        status = take_sums(&work, add_weights, pool, &sums[t], &positive[t]);
    }
    for (int64_t t = 0; t < T; t++)
        if (!isfinite(sums[t])) return status;
    for (int64_t t = 0; t < T && status == MMBAL_OK; t++) {
        work.pass.tensor = &tensors[t];
        status = mask_tensor(&work, rho[tensors[t].modality], sums[t], positive[t], options, pool);
    }
    return status;
}
