#include "mmbal/sampling.h"

#include <math.h>
#include <string.h>

#include "exponential.h"
#include "masks.h"

static const uint64_t never = UINT64_MAX; /* the key of what has no weight */

static uint64_t bits_of(double value) {
    uint64_t bits;
    memcpy(&bits, &value, sizeof bits);
    return bits;
}

static double double_of(uint64_t bits) {
    double value;
    memcpy(&value, &bits, sizeof value);
    return value;
}

/* The words of n units from first_unit on. */
static void fill_words(int64_t seed, int64_t step, int64_t id, mmbal_purpose purpose, int64_t first_unit, int64_t n,
                       uint32_t *out) {
    uint32_t words[4];
    for (int64_t i = 0; i < n; i++) {
        const int64_t unit = first_unit + i;
        if (i == 0 || unit % 4 == 0) mmbal_unit_words(seed, step, id, purpose, unit / 4, words);
        out[i] = words[unit % 4];
    }
}

/* The number of place `place` (from 0) when all are in ascending order; the numbers are lost. */
static uint64_t in_place(uint64_t *numbers, int64_t n, int64_t place) {
    for (int shift = 56; shift >= 0 && n > 1; shift -= 8) {
        int64_t counts[256] = {0}, kept = 0;
        for (int64_t i = 0; i < n; i++) counts[numbers[i] >> shift & 255]++;
        uint64_t digit = 0;
        while (place >= counts[digit]) place -= counts[digit++];
        for (int64_t i = 0; i < n; i++)
            if ((numbers[i] >> shift & 255) == digit) numbers[kept++] = numbers[i];
        n = kept;
    }
    return numbers[0];
}

/* The k smallest keys, of equal ones the first. */
typedef struct {
    uint64_t last, next; /* the largest key that is kept, the smallest that is not (`never`: there is none) */
    int64_t ties;        /* of those equal to last, how many are kept */
} smallest;

static smallest find_smallest(const uint64_t *keys, int64_t n, int64_t k, uint64_t *spare) {
    smallest found = {0, never, 0};
    if (k > 0) {
        memcpy(spare, keys, (size_t)n * sizeof *spare);
        found.last = in_place(spare, n, k - 1);
    }
    int64_t below = 0, equal = 0;
    for (int64_t i = 0; i < n; i++) {
        below += k > 0 && keys[i] < found.last;
        equal += k > 0 && keys[i] == found.last;
        if ((k == 0 || keys[i] > found.last) && keys[i] < found.next) found.next = keys[i];
    }
    found.ties = k - below;
    if (equal > found.ties) found.next = found.last;
    return found;
}

static int take(smallest *found, uint64_t key, int64_t k) {
    if (k == 0 || key > found->last) return 0;
    return key < found->last || found->ties-- > 0;
}

/* How many of the sums of masks.h n numbers have: a power of two. */
static int64_t count_lanes(int64_t n) {
    int64_t lanes = SUM_GROUP;
    while (lanes < n && lanes < SUM_LANES) lanes *= 2;
    return lanes;
}

static double sum_of_lanes(double *sums, int64_t lanes) {
    for (int64_t half = SUM_GROUP / 2; half > 0; half /= 2)
        for (int64_t group = 0; group < lanes; group += SUM_GROUP)
            for (int64_t i = group; i < group + half; i++) sums[i] += sums[i + half];
    for (int64_t half = lanes / 2; half >= SUM_GROUP; half /= 2)
        for (int64_t group = 0; group < half; group += SUM_GROUP) sums[group] += sums[group + half];
    return sums[0];
}

static int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

static double sum_of(const double *x, int64_t n) {
    double sums[SUM_LANES];
    const int64_t lanes = count_lanes(n);
    for (int64_t i = 0; i < lanes; i++) sums[i] = 0;
    for (int64_t first = 0; first < n; first += lanes)
        for (int64_t i = 0, here = least(lanes, n - first); i < here; i++) sums[i] += x[first + i];
    return sum_of_lanes(sums, lanes);
}

/* The sum of the q that are not capped at the level c; *capped is how many are. */
static double sum_uncapped(const double *q, int64_t n, double c, int64_t *capped) {
    double sums[SUM_LANES];
    const int64_t lanes = count_lanes(n);
    int64_t reached = 0;
    for (int64_t i = 0; i < lanes; i++) sums[i] = 0;
    for (int64_t first = 0; first < n; first += lanes)
        for (int64_t i = 0, here = least(lanes, n - first); i < here; i++) {
            const double value = q[first + i];
            sums[i] += c * value >= 1 ? 0 : value;
            reached += c * value >= 1;
        }
    *capped = reached;
    return sum_of_lanes(sums, lanes);
}

/* q = (1 - mix) w / sum(w) + mix / n, in q[n]; the weights are divided by the largest first, so that their sum is
 * finite. Returns how many are greater than 0. */
static int64_t mix_weights(double *q, int64_t n, double mix) {
    double largest = 0;
    int64_t positive = 0;
    for (int64_t i = 0; i < n; i++) largest = q[i] > largest ? q[i] : largest;
    for (int64_t i = 0; i < n && largest > 0; i++) q[i] /= largest;
    const double sum = sum_of(q, n);
    for (int64_t i = 0; i < n; i++) {
        q[i] = (largest > 0 ? (1 - mix) * (q[i] / sum) : 0) + mix / (double)n;
        positive += q[i] > 0;
    }
    return positive;
}

/* c of p = min(1, c q) with the sum kappa. What reaches 1 is capped until nothing more does: c only grows, and the sum
 * of what is not capped is taken anew each time, so that no rounding adds up. */
static double water_level(const double *q, int64_t n, int64_t positive, double kappa) {
    int64_t capped = -1;
    if (kappa == 0) return 0;
    if (kappa >= (double)positive) return INFINITY;
    for (double c = 0;;) {
        int64_t now;
        const double rest = sum_uncapped(q, n, c, &now);
        /* Fewer than before: some just reach 1, and did so by rounding alone. */
        if (now <= capped || !(kappa > (double)now)) return c;
        capped = now, c = (kappa - (double)now) / rest;
    }
}

static double capped_probability(double c, double q) { return q == 0 ? 0 : c * q < 1 ? c * q : 1; }

/* --- weighted_sample and waterfill ------------------------------------------------------------------------------- */

typedef struct {
    mmbal_dtype dtype;
    const void *weights; /* [S, N] */
    const int64_t *k;
    const double *kappa;
    int64_t N, seed, step;
    double mix;
    uint8_t *mask;       /* [S, N] */
    void *probabilities; /* [S, N] */
    double *c;
    uint64_t *keys; /* [workers, 2, N] */
    double *q;      /* [workers, N] */
} weighted_rows;

static double weight_at(mmbal_dtype dtype, const void *weights, int64_t i) {
    return dtype == MMBAL_F64 ? ((const double *)weights)[i] : (double)((const float *)weights)[i];
}

static mmbal_status check_rows(mmbal_dtype dtype, const void *weights, int64_t S, int64_t N) {
    if (dtype != MMBAL_F32 && dtype != MMBAL_F64) return MMBAL_UNSUPPORTED;
    if (S < 0 || N < 0) return MMBAL_INVALID_ARGUMENT;
    for (int64_t i = 0; i < S * N; i++) {
        const double w = weight_at(dtype, weights, i);
        if (!(w >= 0 && w < INFINITY)) return MMBAL_INVALID_ARGUMENT;
    }
    return MMBAL_OK;
}

static mmbal_status sample_task(void *context, int worker, int64_t begin, int64_t end) {
    const weighted_rows *t = context;
    const int64_t N = t->N;
    uint64_t *keys = t->keys + worker * 2 * N;
    for (int64_t s = begin; s < end; s++) {
        int64_t positive = 0;
        uint32_t words[4];
        for (int64_t n = 0; n < N; n++) {
            const int64_t unit = s * N + n;
            const double w = weight_at(t->dtype, t->weights, unit);
            if (n == 0 || unit % 4 == 0) mmbal_unit_words(t->seed, t->step, 0, MMBAL_DRAW_UNIT, unit / 4, words);
            keys[n] = w > 0 ? bits_of(exponential(words[unit % 4]) / w) : never;
            positive += w > 0;
        }
        const int64_t k = t->k[s] < positive ? t->k[s] : positive;
        smallest found = find_smallest(keys, N, k, keys + N);
        for (int64_t n = 0; n < N; n++) t->mask[s * N + n] = (uint8_t)take(&found, keys[n], k);
    }
    return MMBAL_OK;
}

int64_t mmbal_weighted_sample_workspace(int64_t N, const mmbal_pool *pool) {
    return pool->workers * 2 * N * (int64_t)sizeof(uint64_t);
}

mmbal_status mmbal_weighted_sample(mmbal_dtype dtype, const void *weights, const int64_t *k, int64_t S, int64_t N,
                                   int64_t seed, int64_t step, uint8_t *mask, void *workspace, const mmbal_pool *pool) {
    const mmbal_status status = is_step(step) ? check_rows(dtype, weights, S, N) : MMBAL_INVALID_ARGUMENT;
    if (status != MMBAL_OK) return status;
    for (int64_t s = 0; s < S; s++)
        if (!(k[s] >= 0 && k[s] <= N)) return MMBAL_INVALID_ARGUMENT;
    weighted_rows rows = {.dtype = dtype, .weights = weights, .k = k, .N = N, .seed = seed, .step = step};
    rows.mask = mask, rows.keys = workspace;
    return pool->run(pool->self, S, 1, sample_task, &rows);
}

static mmbal_status waterfill_task(void *context, int worker, int64_t begin, int64_t end) {
    const weighted_rows *t = context;
    const int64_t N = t->N;
    double *q = t->q + worker * N;
    for (int64_t s = begin; s < end; s++) {
        for (int64_t n = 0; n < N; n++) q[n] = weight_at(t->dtype, t->weights, s * N + n);
        const int64_t positive = mix_weights(q, N, t->mix);
        const double c = water_level(q, N, positive, t->kappa[s]);
        for (int64_t n = 0; n < N; n++) {
            const double p = capped_probability(c, q[n]);
            if (t->dtype == MMBAL_F64)
                ((double *)t->probabilities)[s * N + n] = p;
            else
                ((float *)t->probabilities)[s * N + n] = (float)p;
        }
        t->c[s] = c;
    }
    return MMBAL_OK;
}

int64_t mmbal_waterfill_workspace(int64_t N, const mmbal_pool *pool) {
    return pool->workers * N * (int64_t)sizeof(double);
}

mmbal_status mmbal_waterfill(mmbal_dtype dtype, const void *weights, const double *kappa, int64_t S, int64_t N,
                             double mix, void *probabilities, double *c, void *workspace, const mmbal_pool *pool) {
    const mmbal_status status = check_rows(dtype, weights, S, N);
    if (status != MMBAL_OK) return status;
    if (!(mix >= 0 && mix <= 1)) return MMBAL_INVALID_ARGUMENT;
    for (int64_t s = 0; s < S; s++) {
        int64_t positive = mix > 0 ? N : 0;
        for (int64_t n = 0; n < N && mix == 0; n++) positive += weight_at(dtype, weights, s * N + n) > 0;
        if (!(kappa[s] >= 0 && kappa[s] <= (double)positive)) return MMBAL_INVALID_ARGUMENT;
    }
    weighted_rows rows = {.dtype = dtype, .weights = weights, .kappa = kappa, .N = N, .mix = mix};
    rows.probabilities = probabilities, rows.c = c, rows.q = workspace;
    return pool->run(pool->self, S, 1, waterfill_task, &rows);
}

/* --- mask_units -------------------------------------------------------------------------------------------------- */

typedef struct {
    const double *energy; /* [U] */
    const mmbal_segment *segments;
    const double *rho; /* [M] */
    int64_t seed, step, widest;
    mmbal_mask_options options;
    double *scale, *probability; /* [U] */
    char *workspace;             /* [workers, BYTES_A_UNIT, widest] */
} masked_segments;

/* A random word and the unit it belongs to. */
typedef struct {
    uint32_t word;
    int32_t unit;
} ordered;

/* By word, equal words in the order they come; returns where the result lies: entries or spare, both [n]. */
static ordered *sort_by_word(ordered *entries, ordered *spare, int64_t n) {
    enum { INSERTED = 32, DIGITS = 4, BUCKETS = 256 };
    if (n <= INSERTED) {
        for (int64_t i = 1; i < n; i++) {
            const ordered entry = entries[i];
            int64_t to = i;
            for (; to > 0 && entries[to - 1].word > entry.word; to--) entries[to] = entries[to - 1];
            entries[to] = entry;
        }
        return entries;
    }
    int32_t starts[DIGITS][BUCKETS] = {0};
    for (int64_t i = 0; i < n; i++)
        for (int digit = 0; digit < DIGITS; digit++) starts[digit][entries[i].word >> 8 * digit & 255]++;
    for (int digit = 0; digit < DIGITS; digit++) {
        int32_t *start = starts[digit], next = 0;
        for (int bucket = 0; bucket < BUCKETS; bucket++) {
            const int32_t count = start[bucket];
            start[bucket] = next, next += count;
        }
        for (int64_t i = 0; i < n; i++) spare[start[entries[i].word >> 8 * digit & 255]++] = entries[i];
        ordered *sorted = spare;
        spare = entries, entries = sorted;
    }
    return entries;
}

static const int64_t BYTES_A_UNIT = 2 * sizeof(ordered) + 2 * sizeof(uint64_t);

/* One segment and its worker's scratch memory. */
typedef struct {
    const mmbal_segment *segment;
    const double *energy; /* [n] */
    int64_t n;
    double rho;
    double *scale, *probability;  /* [n] */
    ordered *entries, *spare;     /* [n] */
    uint64_t *numbers, *numbers2; /* [n] */
} drawn;

static void keep_all(drawn *d) {
    for (int64_t u = 0; u < d->n; u++) d->scale[u] = d->probability[u] = 1;
}

static void keep(drawn *d, int64_t u, int kept, double probability, int unbiased) {
    d->probability[u] = probability;
    d->scale[u] = !kept ? 0 : unbiased ? 1 / probability : 1;
}

/* BOTTOMK, TOPK and UNIFORM: the k smallest keys. */
static void draw_smallest(const masked_segments *t, drawn *d) {
    const mmbal_sampler sampler = t->options.sampler;
    const int mixes = sampler == MMBAL_BOTTOMK && t->options.unbiased;
    const int64_t n = d->n;
    uint64_t *keys = d->numbers;
    uint32_t *words = (uint32_t *)d->spare;
    double *w = (double *)d->entries;
    int64_t positive = 0;
    memcpy(w, d->energy, (size_t)n * sizeof *w);
    if (mixes) mix_weights(w, n, t->options.mix);
    for (int64_t u = 0; u < n && sampler == MMBAL_UNIFORM; u++) w[u] = 1;
    if (sampler != MMBAL_TOPK)
        fill_words(t->seed, t->step, d->segment->id, MMBAL_DRAW_UNIT, d->segment->first_unit, n, words);
    for (int64_t u = 0; u < n; u++) {
        keys[u] = !(w[u] > 0) ? never : sampler == MMBAL_TOPK ? ~bits_of(w[u]) : bits_of(exponential(words[u]) / w[u]);
        positive += w[u] > 0;
    }
    const int64_t wanted = count_kept(d->rho, n), k = wanted < positive ? wanted : positive;
    const smallest found = find_smallest(keys, n, k, d->numbers2);
    smallest left = found;
    for (int64_t u = 0; u < n; u++) {
        const int kept = take(&left, keys[u], k);
        double probability = kept;
        if (sampler == MMBAL_UNIFORM) probability = (double)k / (double)n;
        if (sampler == MMBAL_BOTTOMK && w[u] > 0 && k > 0) { /* given the keys of the others */
            const uint64_t rival = kept ? found.next : found.last;
            probability = rival == never ? 1 : below_exponential(w[u] * double_of(rival));
        }
        keep(d, u, kept, probability, t->options.unbiased);
    }
}

/* P[n] = clamp(round(p 2^32), 1, 2^32) in d->numbers. */
static void fix_probabilities(const masked_segments *t, drawn *d) {
    double *q = (double *)d->numbers2;
    memcpy(q, d->energy, (size_t)d->n * sizeof *q);
    const int64_t positive = mix_weights(q, d->n, t->options.mix);
    const double c = water_level(q, d->n, positive, d->rho * (double)d->n);
    for (int64_t u = 0; u < d->n; u++) d->numbers[u] = (uint64_t)fixed_point(capped_probability(c, q[u]));
}

static const uint64_t one = UINT64_C(1) << 32; /* of fixed-point probabilities */

/* Adds what fits between 1 and 2^32; returns what is left. */
static int64_t add_within(uint64_t *p, int64_t amount) {
    const int64_t now = (int64_t)*p, sum = now + amount;
    const int64_t fitted = sum<1 ? 1 : sum>(int64_t) one ? (int64_t)one : sum;
    *p = (uint64_t)fitted;
    return sum - fitted;
}

/* Makes the sum of P what rho says: the largest below 1 takes what rounding left. */
static void fix_sum(drawn *d) {
    int64_t left = (int64_t)rint(d->rho * (double)d->n * 0x1p32), largest = -1;
    uint64_t *P = d->numbers;
    for (int64_t u = 0; u < d->n; u++) {
        left -= (int64_t)P[u];
        if (P[u] < one && (largest < 0 || P[u] > P[largest])) largest = u;
    }
    if (largest >= 0) left = add_within(&P[largest], left);
    for (int64_t u = 0; u < d->n && left != 0; u++) left = add_within(&P[u], left);
}

static void draw_systematic(const masked_segments *t, drawn *d) {
    const mmbal_segment *segment = d->segment;
    uint32_t start, words[4];
    fix_probabilities(t, d);
    fix_sum(d);
    for (int64_t u = 0; u < d->n; u++) {
        const int64_t unit = segment->first_unit + u;
        if (u == 0 || unit % 4 == 0) mmbal_unit_words(t->seed, t->step, segment->id, MMBAL_DRAW_ORDER, unit / 4, words);
        d->entries[u] = (ordered){words[unit % 4], (int32_t)u};
    }
    const ordered *order = sort_by_word(d->entries, d->spare, d->n);
    fill_words(t->seed, t->step, segment->id, MMBAL_DRAW_START, segment->first_unit, 1, &start);
    uint64_t sum = start;
    for (int64_t i = 0; i < d->n; i++) {
        const int64_t u = order[i].unit;
        const uint64_t before = sum >> 32;
        sum += d->numbers[u];
        keep(d, u, sum >> 32 > before, (double)d->numbers[u] * 0x1p-32, t->options.unbiased);
    }
}

static void draw_independent(const masked_segments *t, drawn *d) {
    uint32_t *words = (uint32_t *)d->spare;
    fix_probabilities(t, d);
    fill_words(t->seed, t->step, d->segment->id, MMBAL_DRAW_UNIT, d->segment->first_unit, d->n, words);
    for (int64_t u = 0; u < d->n; u++)
        keep(d, u, words[u] < d->numbers[u], (double)d->numbers[u] * 0x1p-32, t->options.unbiased);
}

static mmbal_status mask_task(void *context, int worker, int64_t begin, int64_t end) {
    const masked_segments *t = context;
    for (int64_t s = begin; s < end; s++) {
        const mmbal_segment *segment = &t->segments[s];
        drawn d = {.segment = segment, .n = segment->units, .rho = t->rho[segment->modality]};
        d.energy = t->energy + segment->first;
        d.scale = t->scale + segment->first, d.probability = t->probability + segment->first;
        d.entries = (ordered *)(t->workspace + worker * BYTES_A_UNIT * t->widest), d.spare = d.entries + t->widest;
        d.numbers = (uint64_t *)(d.spare + t->widest), d.numbers2 = d.numbers + t->widest;
        double largest = 0;
        for (int64_t u = 0; u < d.n; u++) largest = d.energy[u] > largest ? d.energy[u] : largest;
        if (largest == 0 || d.rho >= 1)
            keep_all(&d);
        else if (t->options.sampler == MMBAL_SYSTEMATIC)
            draw_systematic(t, &d);
        else if (t->options.sampler == MMBAL_INDEPENDENT)
            draw_independent(t, &d);
        else
            draw_smallest(t, &d);
    }
    return MMBAL_OK;
}

static int64_t widest_of(const mmbal_segment *segments, int64_t S) {
    int64_t widest = 0;
    for (int64_t s = 0; s < S; s++) widest = segments[s].units > widest ? segments[s].units : widest;
    return widest;
}

int64_t mmbal_mask_units_workspace(const mmbal_segment *segments, int64_t S, const mmbal_pool *pool) {
    return pool->workers * BYTES_A_UNIT * widest_of(segments, S);
}

static int are_segments(const mmbal_segment *segments, int64_t S, int64_t U, int64_t M) {
    for (int64_t s = 0; s < S; s++) {
        const mmbal_segment *of = &segments[s];
        if (of->units < 0 || of->units > INT32_MAX || of->first < 0 || of->first > U - of->units) return 0;
        if (of->modality < 0 || of->modality >= M || of->id < 0 || of->id > UINT32_MAX) return 0;
        if (of->first_unit < 0 || of->first_unit > (INT64_C(1) << 46) - of->units) return 0;
    }
    return 1;
}

mmbal_status mmbal_mask_units(const double *energy, const mmbal_segment *segments, const double *rho, int64_t U,
                              int64_t S, int64_t M, int64_t seed, int64_t step, mmbal_mask_options options,
                              double *scale, double *probability, void *workspace, const mmbal_pool *pool) {
    if (U < 0 || S < 0 || !mask_is_served(rho, M, step, options)) return MMBAL_INVALID_ARGUMENT;
    if (!are_segments(segments, S, U, M)) return MMBAL_INVALID_ARGUMENT;
    int valid = 1;
    for (int64_t u = 0; u < U; u++) {
        valid &= energy[u] >= 0 && energy[u] < INFINITY;
        scale[u] = probability[u] = 1;
    }
    if (!valid) return MMBAL_OK;
    masked_segments masked = {.energy = energy, .segments = segments, .rho = rho, .seed = seed, .step = step};
    masked.widest = widest_of(segments, S), masked.options = options;
    masked.scale = scale, masked.probability = probability, masked.workspace = workspace;
    return pool->run(pool->self, S, 1, mask_task, &masked);
}
