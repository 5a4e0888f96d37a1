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
typedef void tile_action(element_work *work, int64_t chunk, int worker, int64_t first, int64_t n, const double *w);

static const int64_t NO_TIES = -1;         /* a chunk without */
static const int64_t ALL_TIES = INT64_MAX; /* of a tensor are kept, or there is none */

/* Of one tensor, found before any is changed. */
typedef struct {
    double sum, level;
    int64_t positive, ties; /* ties: how many of the elements with the threshold's key are kept */
    uint32_t threshold;
} found_mask;

/* The passes over one tensor. A key's upper bits choose a bin first, its lower ones then. */
enum { LOWER_BITS = 15, KEY_BINS = 1 << 16 };
struct element_work {
    element_pass pass;
    const mmbal_row_tasks *tasks;
    tile_action *action;
    double *sums;    /* [chunks] */
    int64_t *counts; /* [chunks] */
    int64_t *bins;   /* [workers, KEY_BINS] */
    uint32_t upper;  /* bits of the threshold */
    int64_t ties;
};

static tile_action multiply_ties;

static mmbal_status act_on_chunks(void *context, int worker, int64_t begin, int64_t end) {
    element_work *work = context;
    const mmbal_elements *tensor = work->pass.tensor;
    for (int64_t chunk = begin; chunk < end; chunk++) {
        const int64_t last = least((chunk + 1) * CHUNK, tensor->count);
        if (work->action == multiply_ties && work->counts[chunk] == NO_TIES) continue;
        for (int64_t first = chunk * CHUNK; first < last; first += ELEMENTS_PER_TILE) {
            const int64_t n = least(ELEMENTS_PER_TILE, last - first);
            double w[ELEMENTS_PER_TILE];
            work->tasks->element_weights[tensor->dtype](&work->pass, first, n, w);
            work->action(work, chunk, worker, first, n, w);
        }
    }
    return MMBAL_OK;
}

static mmbal_status act(element_work *work, tile_action *action, const mmbal_pool *pool) {
    work->action = action;
    return pool->run(pool->self, count_chunks(work->pass.tensor), 1, act_on_chunks, work);
}

static void count_upper(element_work *work, int worker, int64_t first, int64_t n, const double *w) {
    uint32_t keys[ELEMENTS_PER_TILE];
    int64_t *bins = work->bins + worker * KEY_BINS;
    work->tasks->element_keys(&work->pass, first, n, w, keys);
    for (int64_t i = 0; i < n; i++) bins[keys[i] >> LOWER_BITS]++;
}

static void sum_weights(element_work *work, int64_t chunk, int worker, int64_t first, int64_t n, const double *w) {
    work->tasks->add_weights(n, w, &work->sums[chunk], &work->counts[chunk]);
    if (work->pass.sampler != MMBAL_INDEPENDENT) count_upper(work, worker, first, n, w);
}

static void sum_uncapped(element_work *work, int64_t chunk, int worker, int64_t first, int64_t n, const double *w) {
    (void)worker, (void)first;
    work->tasks->add_uncapped(&work->pass, n, w, &work->sums[chunk], &work->counts[chunk]);
}

static void count_lower(element_work *work, int64_t chunk, int worker, int64_t first, int64_t n, const double *w) {
    (void)chunk;
    uint32_t keys[ELEMENTS_PER_TILE];
    int64_t *bins = work->bins + worker * KEY_BINS;
    work->tasks->element_keys(&work->pass, first, n, w, keys);
    for (int64_t i = 0; i < n; i++)
        if (keys[i] >> LOWER_BITS == work->upper) bins[keys[i] & ((1u << LOWER_BITS) - 1)]++;
}

static void multiply_smallest(element_work *work, int64_t chunk, int worker, int64_t first, int64_t n,
                              const double *w) {
    (void)worker;
    uint32_t keys[ELEMENTS_PER_TILE];
    double multipliers[ELEMENTS_PER_TILE];
    work->tasks->element_keys(&work->pass, first, n, w, keys);
    work->counts[chunk] += work->tasks->keep_smallest(&work->pass, n, keys, multipliers);
    work->tasks->element_multiply[work->pass.tensor->dtype](&work->pass, first, n, multipliers);
}

/* What multiply_smallest left: the first `ties` of the elements whose key is the threshold are kept; counts holds how
 * many come before the chunk. Keys are what they were: of elements that were set to 0 infinite, of others the same. */
static void multiply_ties(element_work *work, int64_t chunk, int worker, int64_t first, int64_t n, const double *w) {
    (void)worker;
    const element_pass *pass = &work->pass;
    uint32_t keys[ELEMENTS_PER_TILE], equal = 0;
    double multipliers[ELEMENTS_PER_TILE];
    work->tasks->element_keys(pass, first, n, w, keys);
    for (int64_t i = 0; i < n; i++) {
        multipliers[i] = 1;
        if (keys[i] != pass->threshold) continue;
        multipliers[i] = work->counts[chunk]++ < work->ties ? pass->multiplier : 0;
        equal++;
    }
    if (equal) work->tasks->element_multiply[pass->tensor->dtype](pass, first, n, multipliers);
}

static void multiply_drawn(element_work *work, int64_t chunk, int worker, int64_t first, int64_t n, const double *w) {
    (void)chunk, (void)worker;
    double multipliers[ELEMENTS_PER_TILE];
    work->tasks->keep_drawn(&work->pass, first, n, w, multipliers);
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

static void clear_bins(element_work *work, const mmbal_pool *pool) {
    memset(work->bins, 0, (size_t)pool->workers * KEY_BINS * sizeof *work->bins);
}

/* The bin in which the `place`-th key lies (from 1): *below are before it, *inside in it. */
static uint32_t find_bin(const element_work *work, int64_t place, int workers, int64_t *below, int64_t *inside) {
    *below = 0;
    for (uint32_t bin = 0;; bin++) {
        *inside = 0;
        for (int worker = 0; worker < workers; worker++) *inside += work->bins[worker * KEY_BINS + bin];
        if (bin == KEY_BINS - 1 || *below + *inside >= place) return bin;
        *below += *inside;
    }
}

/* The k smallest keys, k > 0: the threshold by its upper bits, which are counted already, and by its lower ones. */
static mmbal_status find_threshold(element_work *work, int64_t k, const mmbal_pool *pool, found_mask *found) {
    int64_t below, inside, further, equal;
    work->upper = find_bin(work, k, pool->workers, &below, &inside);
    clear_bins(work, pool);
    const mmbal_status status = act(work, count_lower, pool);
    found->threshold = work->upper << LOWER_BITS | find_bin(work, k - below, pool->workers, &further, &equal);
    found->ties = k - below - further;
    if (found->ties == equal) found->ties = ALL_TIES; /* wherever they are */
    return status;
}

/* As sampling.c finds it for units. */
static mmbal_status find_level(element_work *work, double kappa, int64_t positive, const mmbal_pool *pool,
                               double *level) {
    mmbal_status status = MMBAL_OK;
    work->pass.level = kappa >= (double)positive ? INFINITY : 0;
    for (int64_t capped = -1; work->pass.level < INFINITY && status == MMBAL_OK;) {
        double rest;
        int64_t now;
        status = take_sums(work, sum_uncapped, pool, &rest, &now);
        if (now <= capped || !(kappa > (double)now)) break;
        capped = now, work->pass.level = (kappa - (double)now) / rest;
    }
    *level = work->pass.level;
    return status;
}

static int is_left_alone(const found_mask *found, double rho) { return found->sum == 0 || rho >= 1; }

static int64_t count_smallest(const mmbal_elements *t, double rho, const found_mask *found, mmbal_sampler sampler) {
    const int64_t k = count_kept(rho, t->count);
    return sampler == MMBAL_UNIFORM ? k : least(k, found->positive);
}

static void prepare(element_work *work, const mmbal_elements *t, const found_mask *found, double rho,
                    mmbal_mask_options options) {
    element_pass *pass = &work->pass;
    pass->tensor = t;
    pass->scale_of_weight = (1 - options.mix) / found->sum, pass->floor = options.mix / (double)t->count;
    pass->level = found->level, pass->threshold = found->threshold, work->ties = found->ties;
    if (options.sampler == MMBAL_INDEPENDENT)
        pass->multiplier = options.unbiased ? 0 : 1;
    else
        pass->multiplier = options.unbiased ? (double)t->count / (double)count_kept(rho, t->count) : 1;
    pass->tie_multiplier = found->ties == ALL_TIES ? pass->multiplier : 1; /* 1 leaves them to multiply_ties */
}

/* What is kept of a tensor; nothing is changed. */
static mmbal_status find_mask(element_work *work, const mmbal_elements *t, double rho, mmbal_mask_options options,
                              const mmbal_pool *pool, found_mask *found) {
    *found = (found_mask){.ties = ALL_TIES};
    work->pass.tensor = t;
    if (options.sampler != MMBAL_INDEPENDENT) clear_bins(work, pool);
    const mmbal_status status = take_sums(work, sum_weights, pool, &found->sum, &found->positive);
    if (status != MMBAL_OK || !isfinite(found->sum) || is_left_alone(found, rho)) return status;
    prepare(work, t, found, rho, options);
    if (options.sampler == MMBAL_INDEPENDENT)
        return find_level(work, rho * (double)t->count, options.mix > 0 ? t->count : found->positive, pool,
                          &found->level);
    const int64_t k = count_smallest(t, rho, found, options.sampler);
    if (k > 0) return find_threshold(work, k, pool, found);
    found->ties = 0;
    return MMBAL_OK;
}

static mmbal_status apply_mask(element_work *work, const mmbal_elements *t, double rho, mmbal_mask_options options,
                               const mmbal_pool *pool, const found_mask *found) {
    const int64_t chunks = count_chunks(t);
    if (is_left_alone(found, rho)) return MMBAL_OK;
    prepare(work, t, found, rho, options);
    if (options.sampler == MMBAL_INDEPENDENT) return act(work, multiply_drawn, pool);
    memset(work->counts, 0, (size_t)chunks * sizeof *work->counts);
    const mmbal_status status = act(work, multiply_smallest, pool);
    if (status != MMBAL_OK || found->ties == ALL_TIES) return status;
    int64_t before = 0;
    for (int64_t chunk = 0; chunk < chunks; chunk++) {
        const int64_t here = work->counts[chunk];
        work->counts[chunk] = here ? before : NO_TIES;
        before += here;
    }
    return act(work, multiply_ties, pool);
}

static mmbal_status check_elements(const mmbal_elements *tensors, int64_t T, int64_t M, mmbal_importance importance) {
    const int known = importance == MMBAL_GN || importance == MMBAL_SQRT_GN || importance == MMBAL_GN_WN;
    if (T < 0 || !known) return MMBAL_INVALID_ARGUMENT;
    for (int64_t t = 0; t < T; t++) {
        const mmbal_elements *of = &tensors[t];
        if (!is_dtype(of->dtype)) return MMBAL_UNSUPPORTED;
        if (of->count < 0 || of->modality < 0 || of->modality >= M || of->id < 0 || of->id > UINT32_MAX)
            return MMBAL_INVALID_ARGUMENT;
        if ((importance == MMBAL_GN_WN && !of->weights && of->count > 0) || (of->base && !of->gradient))
            return MMBAL_INVALID_ARGUMENT;
    }
    return MMBAL_OK;
}

/* Cuts the workspace: sums and counts of the longest tensor, the bins, and what is found of each tensor. */
static int64_t lay_out(const mmbal_elements *tensors, int64_t T, const mmbal_pool *pool, arena *from,
                       element_work *work, found_mask **found) {
    int64_t chunks = 0;
    for (int64_t t = 0; t < T; t++) chunks = count_chunks(&tensors[t]) > chunks ? count_chunks(&tensors[t]) : chunks;
    work->sums = carve(from, chunks * (int64_t)sizeof(double));
    work->counts = carve(from, chunks * (int64_t)sizeof(int64_t));
    work->bins = carve(from, pool->workers * (int64_t)KEY_BINS * (int64_t)sizeof(int64_t));
    *found = carve(from, T * (int64_t)sizeof(found_mask));
    return bytes_carved(from);
}

int64_t mmbal_mask_elements_workspace(const mmbal_elements *tensors, int64_t T, const mmbal_pool *pool) {
    element_work work;
    found_mask *found;
    return lay_out(tensors, T, pool, &(arena){0}, &work, &found);
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
    found_mask *found;
    lay_out(tensors, T, pool, &(arena){(uintptr_t)workspace}, &work, &found);
    for (int64_t t = 0; t < T; t++) {
        status = find_mask(&work, &tensors[t], rho[tensors[t].modality], options, pool, &found[t]);
        if (status != MMBAL_OK || !isfinite(found[t].sum)) return status;
    }
    for (int64_t t = 0; t < T && status == MMBAL_OK; t++)
        status = apply_mask(&work, &tensors[t], rho[tensors[t].modality], options, pool, &found[t]);
    return status;
}
