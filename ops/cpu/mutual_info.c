#include "mmbal/mutual_info.h"

#include <math.h>
#include <string.h>

#include "arena.h"
#include "bfloat16.h"
#include "float16.h"
#include "mmbal/philox.h"
#include "radix_sort.h"

/* --- The estimator of Kraskov, Stoegbauer and Grassberger ------------------------------------------------------------
 *
 * 1. The x of each modality's n valid samples are sorted, and y once for all modalities that miss no sample.
 * 2. The samples in order of x are cut into strips of equally many, each strip in order of y (one task a modality).
 *    Nearest neighbours then lie next to each other in a strip, or in the strips beside it.
 * 3. For each strip, each of its samples finds eps_i among the strips, nx_i in the sorted x and ny_i in the sorted y.
 */

enum { LEAST_STRIP = 16 }; /* samples: fewer save nothing */

typedef struct {
    int64_t n, strip;       /* valid samples; samples of a strip, fewer in the last */
    double *sorted_x;       /* [n] */
    const double *sorted_y; /* [n] */
    int32_t *rank_x;        /* [N] by sample: place in sorted_x */
    double *own_y;          /* [N] for the sorted y of a modality that misses samples */
    double *x, *y;          /* [n] strip after strip */
    int32_t *at_x, *at_y;   /* [n] likewise: place in sorted_x and in sorted_y */
    double *sums;           /* [strips] of psi(nx + 1) + psi(ny + 1) */
} ksg_modality;

typedef struct {
    mmbal_dtype dtype;
    const void *x, *y;
    const uint8_t *present;
    int64_t N, M, neighbors;
    int standardize;
    double jitter;
    uint64_t seed;
    ksg_modality *modalities; /* [M] */
    sort_entry *entries;      /* [M + 1, 2, N]: x of each modality, y; to sort, and to sort into */
    int64_t n;                /* samples whose y is finite */
    double *sorted_y;         /* [n] of these */
    const sort_entry *by_y;   /* [n] these in order of y */
    double *psi;              /* [N + 1] from psi[1] on */
    int32_t *cursors;         /* [workers, most_strips] */
    int64_t most_strips;
} ksg;

/* About as wide as the distance to the k-th neighbour where x and y are independent. Any number gives the same result.
 */
static int64_t strip_size(int64_t n, int64_t neighbors) {
    const int64_t size = (int64_t)sqrt((double)n * (double)neighbors);
    return size < LEAST_STRIP ? LEAST_STRIP : size;
}

static int64_t count_strips(const ksg_modality *s) { return (s->n + s->strip - 1) / s->strip; }

static void lay_out(ksg *k, arena *memory, int workers) {
    const int64_t N = k->N, M = k->M;
    k->most_strips = N / LEAST_STRIP + 1;
    k->modalities = carve(memory, M * (int64_t)sizeof(ksg_modality));
    k->entries = carve(memory, 2 * (M + 1) * N * (int64_t)sizeof(sort_entry));
    k->sorted_y = carve(memory, N * (int64_t)sizeof(double));
    k->psi = carve(memory, (N + 1) * (int64_t)sizeof(double));
    k->cursors = carve(memory, workers * k->most_strips * (int64_t)sizeof(int32_t));
}

/* The pieces of one modality; of counts only the bytes where s is NULL. */
static void lay_out_modality(ksg_modality *s, arena *memory, int64_t N, int64_t most_strips) {
    ksg_modality counted;
    if (!s) s = &counted;
    const int64_t doubles = N * (int64_t)sizeof(double), places = N * (int64_t)sizeof(int32_t);
    s->sorted_x = carve(memory, doubles), s->own_y = carve(memory, doubles);
    s->x = carve(memory, doubles), s->y = carve(memory, doubles);
    s->rank_x = carve(memory, places), s->at_x = carve(memory, places), s->at_y = carve(memory, places);
    s->sums = carve(memory, most_strips * (int64_t)sizeof(double));
}

int64_t mmbal_ksg_mutual_info_workspace(int64_t N, int64_t M, const mmbal_pool *pool) {
    ksg k = {.N = N, .M = M};
    arena memory = {0};
    lay_out(&k, &memory, pool->workers);
    for (int64_t m = 0; m < M; m++) lay_out_modality(NULL, &memory, N, k.most_strips);
    return bytes_carved(&memory);
}

static double load(mmbal_dtype dtype, const void *values, int64_t i) {
    switch (dtype) {
    case MMBAL_F32: return (double)((const float *)values)[i];
    case MMBAL_BF16: return (double)float_of_bfloat16(((const bfloat16 *)values)[i]);
    case MMBAL_F16: return (double)float_of_float16(((const float16 *)values)[i]);
    case MMBAL_F64: break;
    }
    return ((const double *)values)[i];
}

enum { NORMALS = 4 };

/* The normal numbers of NORMALS samples from a multiple of it on (Box and Muller, 1958). */
static void normal_numbers(uint64_t seed, int64_t m, int64_t first, double normals[NORMALS]) {
    const uint32_t counter[4] = {(uint32_t)(first / NORMALS), (uint32_t)m, 0, 0};
    const uint32_t key[2] = {(uint32_t)seed, (uint32_t)(seed >> 32)};
    uint32_t words[4];
    mmbal_philox4x32(counter, key, words);
    for (int i = 0; i < NORMALS; i += 2) {
        const double above_zero = ((double)words[i] + 1) * 0x1p-32, turn = (double)words[i + 1] * 0x1p-32;
        const double radius = sqrt(-2 * log(above_zero)), angle = 6.283185307179586 * turn;
        normals[i] = radius * cos(angle), normals[i + 1] = radius * sin(angle);
    }
}

enum { ANY = -1 }; /* in place of a modality: samples whose y is finite, whatever x is */

static int is_valid(const ksg *k, int64_t m, int64_t sample) {
    if (!isfinite(load(k->dtype, k->y, sample))) return 0;
    if (m == ANY) return 1;
    const int64_t i = sample * k->M + m;
    return (!k->present || k->present[i]) && isfinite(load(k->dtype, k->x, i));
}

/* The x of modality m's valid samples, or their y, scaled and jittered: values [n], with the samples they are from. */
static int64_t gather(const ksg *k, int64_t m, int of_y, double *values, sort_entry *entries) {
    int64_t n = 0;
    double sum = 0, squares = 0, sizes = 0;
    for (int64_t sample = 0; sample < k->N; sample++) {
        if (!is_valid(k, m, sample)) continue;
        values[n] = of_y ? load(k->dtype, k->y, sample) : load(k->dtype, k->x, sample * k->M + m);
        entries[n].from = (int32_t)sample;
        sum += values[n++];
    }
    const double mean = n > 0 ? sum / (double)n : 0;
    for (int64_t i = 0; i < n; i++) squares += (values[i] - mean) * (values[i] - mean);
    const double deviation = n > 0 ? sqrt(squares / (double)n) : 0;
    if (k->standardize && deviation > 0 && isfinite(deviation)) /* infinite where squares overflow */
        for (int64_t i = 0; i < n; i++) values[i] /= deviation;
    if (k->jitter > 0) {
        for (int64_t i = 0; i < n; i++) sizes += fabs(values[i]);
        const double size = sizes / (double)n, scale = k->jitter * (size > 1 ? size : 1);
        double normals[NORMALS];
        int64_t first = -1; /* sample of normals */
        for (int64_t i = 0; i < n; i++) {
            const int64_t sample = entries[i].from, wanted = sample / NORMALS * NORMALS;
            /* y has one number for a sample, whatever the modality */
            if (wanted != first) normal_numbers(k->seed, of_y ? ANY : m, wanted, normals);
            first = wanted;
            values[i] += scale * normals[sample - first];
        }
    }
    for (int64_t i = 0; i < n; i++) entries[i].key = sort_key(values[i]);
    return n;
}

/* Sorts what gather finds into values; returns n, and the samples in this order. entries: [2, N]. */
static int64_t gather_sorted(const ksg *k, int64_t m, int of_y, double *values, sort_entry *entries,
                             const sort_entry **order) {
    const int64_t n = gather(k, m, of_y, values, entries);
    *order = radix_sort(entries, entries + k->N, n);
    for (int64_t i = 0; i < n; i++) values[i] = sorted_number((*order)[i].key);
    return n;
}

static mmbal_status sort_task(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    ksg *k = context;
    for (int64_t m = begin; m < end; m++) {
        sort_entry *entries = k->entries + m * 2 * k->N;
        if (m == k->M) {
            k->n = gather_sorted(k, ANY, 1, k->sorted_y, entries, &k->by_y);
            continue;
        }
        ksg_modality *s = &k->modalities[m];
        const sort_entry *by_x;
        s->n = gather_sorted(k, m, 0, s->sorted_x, entries, &by_x), s->strip = strip_size(s->n, k->neighbors);
        for (int64_t i = 0; i < s->n; i++) s->rank_x[by_x[i].from] = (int32_t)i;
    }
    return MMBAL_OK;
}

/* Takes the samples in order of y and appends each to its strip, so that every strip is in order of y. */
static mmbal_status strip_task(void *context, int worker, int64_t begin, int64_t end) {
    const ksg *k = context;
    int32_t *next = k->cursors + worker * k->most_strips;
    for (int64_t m = begin; m < end; m++) {
        ksg_modality *s = &k->modalities[m];
        const sort_entry *by_y = k->by_y;
        s->sorted_y = k->sorted_y;
        if (s->n < k->n) { /* it misses a sample; what sorted x is not needed any more */
            s->sorted_y = s->own_y;
            gather_sorted(k, m, 1, s->own_y, k->entries + m * 2 * k->N, &by_y);
        }
        const int64_t strips = count_strips(s);
        for (int64_t b = 0; b < strips; b++) next[b] = (int32_t)(b * s->strip);
        for (int64_t i = 0; i < s->n; i++) {
            const int32_t rank = s->rank_x[by_y[i].from], place = next[rank / s->strip]++;
            s->x[place] = s->sorted_x[rank], s->at_x[place] = rank;
            s->y[place] = s->sorted_y[i], s->at_y[place] = (int32_t)i;
        }
    }
    return MMBAL_OK;
}

/* The distances to the nearest samples found so far, in ascending order. */
typedef struct {
    int64_t wanted;
    double distance[MMBAL_MAX_NEIGHBORS];
} nearest;

static inline double bound(const nearest *found) { return found->distance[found->wanted - 1]; }

static inline void offer(nearest *found, double distance) {
    if (!(distance < bound(found))) return;
    int64_t i = found->wanted - 1;
    for (; i > 0 && found->distance[i - 1] > distance; i--) found->distance[i] = found->distance[i - 1];
    found->distance[i] = distance;
}

static inline double chebyshev(double dx, double dy) {
    const double across = fabs(dx), along = fabs(dy);
    return across > along ? across : along;
}

/* Offers the samples [from, end) of a strip, those of growing distance in y, until y alone is too far. */
static inline void search_up(const ksg_modality *s, double x, double y, int64_t from, int64_t end, nearest *found) {
    for (int64_t j = from; j < end && s->y[j] - y < bound(found); j++)
        offer(found, chebyshev(s->x[j] - x, s->y[j] - y));
}

/* The same downwards, for the samples [begin, from]. */
static inline void search_down(const ksg_modality *s, double x, double y, int64_t from, int64_t begin, nearest *found) {
    for (int64_t j = from; j >= begin && y - s->y[j] < bound(found); j--)
        offer(found, chebyshev(s->x[j] - x, s->y[j] - y));
}

/* A strip that the sample i is not in. Queries come in order of y, so the place of y in it only moves up. */
static void search_beside(const ksg_modality *s, int64_t strip, int64_t i, int32_t *cursor, nearest *found) {
    const int64_t begin = strip * s->strip, end = begin + s->strip < s->n ? begin + s->strip : s->n;
    const double x = s->x[i], y = s->y[i];
    int64_t place = *cursor;
    while (place < end && s->y[place] < y) place++;
    *cursor = (int32_t)place;
    search_up(s, x, y, place, end, found);
    search_down(s, x, y, place - 1, begin, found);
}

/* eps_i: the distance from sample i, which lies in strip, to its k-th nearest other. */
static double neighbor_distance(const ksg_modality *s, int64_t strip, int64_t i, int64_t neighbors, int32_t *cursors) {
    const int64_t begin = strip * s->strip, end = begin + s->strip < s->n ? begin + s->strip : s->n;
    const int64_t strips = count_strips(s);
    const double x = s->x[i], y = s->y[i];
    nearest found = {.wanted = neighbors};
    for (int64_t j = 0; j < neighbors; j++) found.distance[j] = INFINITY;
    /* First the k on either side, so that the bound is finite before the search goes far. */
    const int64_t low = i - neighbors > begin ? i - neighbors : begin,
                  high = i + neighbors < end ? i + neighbors : end - 1;
    for (int64_t j = low; j <= high; j++)
        if (j != i) offer(&found, chebyshev(s->x[j] - x, s->y[j] - y));
    search_up(s, x, y, high + 1, end, &found);
    search_down(s, x, y, low - 1, begin, &found);
    for (int64_t b = strip - 1; b >= 0 && x - s->sorted_x[(b + 1) * s->strip - 1] < bound(&found); b--)
        search_beside(s, b, i, &cursors[b], &found);
    for (int64_t b = strip + 1; b < strips && s->sorted_x[b * s->strip] - x < bound(&found); b++)
        search_beside(s, b, i, &cursors[b], &found);
    return bound(&found);
}

/* The largest distance that counts: the number before eps, so that distance <= it where distance < eps; 0 for eps = 0.
 */
static inline double largest_within(double eps) {
    uint64_t bits;
    memcpy(&bits, &eps, sizeof bits);
    bits -= bits > 0;
    memcpy(&eps, &bits, sizeof eps);
    return eps;
}

/* The others within that distance of sorted[at] for x and y at once, by halving what is left. All samples take the same
 * steps without a branch, so that those of one go on while another's wait for memory; the predicate is that of the
 * distances themselves. */
static inline void count_within(const ksg_modality *s, int64_t at_x, int64_t at_y, double most, int64_t *nx,
                                int64_t *ny) {
    const double *xs = s->sorted_x, *ys = s->sorted_y, x = xs[at_x], y = ys[at_y];
    int64_t last_x = 0, last_y = 0, first_x = 0, first_y = 0; /* first: samples before it */
    for (int64_t left = s->n; left > 1; left -= left / 2) {
        const int64_t half = left / 2;
        last_x += half & -(int64_t)(xs[last_x + half] - x <= most);
        last_y += half & -(int64_t)(ys[last_y + half] - y <= most);
        first_x += half & -(int64_t)(x - xs[first_x + half - 1] > most);
        first_y += half & -(int64_t)(y - ys[first_y + half - 1] > most);
    }
    *nx = last_x - first_x - (x - xs[first_x] > most), *ny = last_y - first_y - (y - ys[first_y] > most);
}

static mmbal_status count_task(void *context, int worker, int64_t begin, int64_t end) {
    const ksg *k = context;
    int32_t *cursors = k->cursors + worker * k->most_strips;
    for (int64_t job = begin; job < end; job++) {
        const ksg_modality *s = &k->modalities[job / k->most_strips];
        const int64_t strip = job % k->most_strips, strips = count_strips(s);
        if (s->n <= k->neighbors || strip >= strips) continue;
        for (int64_t b = 0; b < strips; b++) cursors[b] = (int32_t)(b * s->strip);
        const int64_t last = (strip + 1) * s->strip < s->n ? (strip + 1) * s->strip : s->n;
        double sum = 0;
        for (int64_t i = strip * s->strip; i < last; i++) {
            const double eps = neighbor_distance(s, strip, i, k->neighbors, cursors);
            int64_t nx, ny;
            count_within(s, s->at_x[i], s->at_y[i], largest_within(eps), &nx, &ny);
            sum += k->psi[nx + 1] + k->psi[ny + 1];
        }
        s->sums[strip] = sum;
    }
    return MMBAL_OK;
}

/* psi(1) is minus Euler's constant, psi(n + 1) = psi(n) + 1 / n. */
static void fill_psi(double *psi, int64_t largest) {
    psi[1] = -0.57721566490153286;
    for (int64_t n = 1; n < largest; n++) psi[n + 1] = psi[n] + 1 / (double)n;
}

mmbal_status mmbal_ksg_mutual_info(mmbal_dtype dtype, const void *x, const void *y, const uint8_t *present, int64_t N,
                                   int64_t M, int64_t neighbors, int standardize, double jitter, uint64_t seed,
                                   double *mi, void *workspace, const mmbal_pool *pool) {
    if (N < 0 || N > INT32_MAX || M < 1) return MMBAL_INVALID_ARGUMENT;
    if (neighbors < 1 || neighbors > MMBAL_MAX_NEIGHBORS || !(jitter >= 0 && jitter < INFINITY))
        return MMBAL_INVALID_ARGUMENT;
    if (dtype != MMBAL_F32 && dtype != MMBAL_BF16 && dtype != MMBAL_F16 && dtype != MMBAL_F64) return MMBAL_UNSUPPORTED;
    ksg k = {.dtype = dtype, .x = x, .y = y, .present = present, .N = N, .M = M, .neighbors = neighbors};
    k.standardize = standardize, k.jitter = jitter, k.seed = seed;
    arena memory = {(uintptr_t)workspace};
    lay_out(&k, &memory, pool->workers);
    for (int64_t m = 0; m < M; m++) lay_out_modality(&k.modalities[m], &memory, N, k.most_strips);

    mmbal_status status = pool->run(pool->self, M + 1, 1, sort_task, &k);
    if (status == MMBAL_OK) status = pool->run(pool->self, M, 1, strip_task, &k);
    if (status != MMBAL_OK) return status;
    if (N > neighbors) fill_psi(k.psi, N);
    int64_t strips = 1;
    for (int64_t m = 0; m < M; m++) {
        const int64_t of_m = count_strips(&k.modalities[m]);
        strips = of_m > strips ? of_m : strips;
    }
    k.most_strips = strips; /* the slices of cursors only come closer together */
    status = pool->run(pool->self, M * strips, 1, count_task, &k);
    for (int64_t m = 0; m < M; m++) {
        const ksg_modality *s = &k.modalities[m];
        double sum = 0, value = NAN;
        if (s->n > neighbors) {
            for (int64_t b = 0; b < count_strips(s); b++) sum += s->sums[b];
            value = k.psi[s->n] + k.psi[neighbors] - sum / (double)s->n;
        }
        mi[m] = value < 0 ? 0 : value;
    }
    return status;
}

/* --- The plug-in estimator of labels ------------------------------------------------------------------------------ */

mmbal_status mmbal_count_classes(const int64_t *a, const int64_t *b, const uint8_t *present, int64_t M, int64_t N,
                                 int64_t *C) {
    int64_t largest = 0, least = 0;
    for (int64_t n = 0; n < N; n++) {
        largest = b[n] > largest ? b[n] : largest;
        least = b[n] < least ? b[n] : least;
        for (int64_t m = 0; m < M; m++) {
            if (present && !present[n * M + m]) continue;
            const int64_t class = a[m * N + n];
            largest = class > largest ? class : largest;
            least = class < least ? class : least;
        }
    }
    if (least < 0 || largest == INT64_MAX) return MMBAL_INVALID_INDEX;
    *C = largest + 1;
    return MMBAL_OK;
}

typedef struct {
    const int64_t *a, *b;
    const uint8_t *present;
    int64_t M, N, C;
    double *mi;
    int64_t *counts; /* [M, C + 2, C]: the table, then its sums over columns, then over rows */
} label_pairs;

int64_t mmbal_discrete_mutual_info_workspace(int64_t M, int64_t C) {
    return M * (C + 2) * C * (int64_t)sizeof(int64_t);
}

/* n log n, 0 at 0 */
static double entropy_term(int64_t n) { return n > 0 ? (double)n * log((double)n) : 0; }

/* With counts n: mi = (sum n[i,j] ln n[i,j] - sum n[i,.] ln n[i,.] - sum n[.,j] ln n[.,j]) / n + ln n. */
static mmbal_status label_task(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const label_pairs *t = context;
    const int64_t C = t->C;
    for (int64_t m = begin; m < end; m++) {
        int64_t *table = t->counts + m * (C + 2) * C, *of_a = table + C * C, *of_b = of_a + C, n = 0;
        memset(table, 0, (size_t)((C + 2) * C) * sizeof *table);
        for (int64_t i = 0; i < t->N; i++) {
            if (t->b[i] < 0 || t->b[i] >= C) return MMBAL_INVALID_INDEX;
            if (t->present && !t->present[i * t->M + m]) continue;
            const int64_t class = t->a[m * t->N + i];
            if (class < 0 || class >= C) return MMBAL_INVALID_INDEX;
            table[class * C + t->b[i]]++, of_a[class]++, of_b[t->b[i]]++, n++;
        }
        double sum = 0;
        for (int64_t pair = 0; pair < C * C; pair++) sum += entropy_term(table[pair]);
        for (int64_t class = 0; class < C; class++) sum -= entropy_term(of_a[class]) + entropy_term(of_b[class]);
        const double value = n > 0 ? sum / (double)n + log((double)n) : NAN;
        t->mi[m] = value < 0 ? 0 : value;
    }
    return MMBAL_OK;
}

mmbal_status mmbal_discrete_mutual_info(const int64_t *a, const int64_t *b, const uint8_t *present, int64_t M,
                                        int64_t N, int64_t C, double *mi, void *workspace, const mmbal_pool *pool) {
    if (M < 1 || N < 0 || C < 1) return MMBAL_INVALID_ARGUMENT;
    label_pairs pairs = {a, b, present, M, N, C, mi, workspace};
    return pool->run(pool->self, M, 1, label_task, &pairs);
}
