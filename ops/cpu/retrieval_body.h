/* topk_search for float32 and float64; see each_product.h and mmbal/retrieval.h. */
#if STORED_IS_REAL
#include "gemm_body.h"

typedef struct {
    REAL score;
    int64_t index;
} NAME(found);

/* Queries go through the bank some at a time. Rows of the bank are the left factor, read row by row; the queries are
 * its right one, packed once. */
typedef struct {
    const mmbal_kernels *kernels;
    const mmbal_row_tasks *tasks;
    mmbal_dtype query_dtype, bank_dtype;
    const char *query, *bank;
    int64_t n, D, k, room;
    int64_t tile_cols, depth_step, cols_at_once, row_stride;
    int64_t first_query, queries, queries_at_once; /* those under way */
    int workers;
    /* workspace */
    OPERAND *query_rows, *panels; /* [queries_at_once, D] */
    OPERAND *rows;                /* [workers, BANK_ROWS, row_stride] */
    REAL *products;               /* [workers, BANK_ROWS, cols_at_once] */
    int32_t *places;              /* [workers, BANK_ROWS cols_at_once] */
    REAL *thresholds;             /* [workers, queries_at_once]: what scores less is none of the first k */
    int64_t *counts;              /* [workers, queries_at_once] */
    NAME(found) * kept;           /* [workers, queries_at_once, room]: the first k are among them */
    REAL *scores;                 /* [Q, k] */
    int64_t *indices;             /* [Q, k] */
} NAME(search);

static NAME(search)
    NAME(begin_search)(mmbal_dtype bank_dtype, int64_t Q, int64_t n, int64_t D, int64_t k, int workers, arena *from) {
    const mmbal_kernels *kernels = mmbal_kernels_in_use();
    const blocking cut = mmbal_blocking_in_use();
    NAME(search) s = {.kernels = kernels, .tasks = mmbal_row_tasks_in_use(), .bank_dtype = bank_dtype};
    s.n = n, s.D = D, s.k = k, s.workers = workers;
    s.room = k < LEAST_ROOM / 2 ? LEAST_ROOM : 2 * k;
    s.tile_cols = kernels->OF_OPERAND(tile_cols), s.row_stride = NAME(row_stride)(D);
    s.depth_step = cut.depth_bytes / (int64_t)sizeof(OPERAND), s.cols_at_once = cut.cols;
    const int64_t few = KEPT_BYTES / ((int64_t)sizeof(NAME(found)) * s.room * workers) / s.tile_cols * s.tile_cols;
    s.queries_at_once = least(Q, least(QUERIES_AT_ONCE, few < s.tile_cols ? s.tile_cols : few));
    const int64_t size = (int64_t)sizeof(OPERAND), kept = workers * s.queries_at_once;
    s.query_rows = carve(from, s.queries_at_once * D * size);
    s.panels = carve(from, NAME(panel_elements)(kernels, s.queries_at_once, D) * size);
    s.rows = carve(from, workers * BANK_ROWS * s.row_stride * size);
    s.products = carve(from, workers * BANK_ROWS * s.cols_at_once * (int64_t)sizeof(REAL));
    s.places = carve(from, workers * BANK_ROWS * s.cols_at_once * (int64_t)sizeof(int32_t));
    s.thresholds = carve(from, kept * (int64_t)sizeof(REAL));
    s.counts = carve(from, kept * (int64_t)sizeof(int64_t));
    s.kept = carve(from, kept * s.room * (int64_t)sizeof(NAME(found)));
    return s;
}

/* n numbers as they are stored, halves as float32 */
static void NAME(to_reals)(const mmbal_kernels *kernels, mmbal_dtype dtype, int64_t n, const void *from, REAL *to) {
    if (dtype == MMBAL_BF16)
        kernels->widen_bf16(n, from, (void *)to);
    else if (dtype == MMBAL_F16)
        kernels->widen_f16(n, from, (void *)to);
    else
        memcpy(to, from, (size_t)n * sizeof(REAL));
}

static mmbal_status NAME(pack_queries_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(search) *s = context;
    for (int64_t panel = begin; panel < end; panel++) {
        const int64_t first = panel * s->tile_cols, cols = least(s->tile_cols, s->queries - first);
        REAL *rows = s->query_rows + first * s->D;
        NAME(to_reals)(s->kernels, s->query_dtype, cols * s->D,
                       s->query + (s->first_query + first) * s->D * bytes_of(s->query_dtype), rows);
        const NAME(weights) b = {rows, s->D, 1, NULL};
        NAME(pack_all)(s->kernels, b, s->D, cols, s->panels + first * s->D);
    }
    return MMBAL_OK;
}

/* Whether a comes before b: by score, then by index; or by index alone. */
static inline int NAME(is_before)(NAME(found) a, NAME(found) b, int by_index) {
    if (!by_index && a.score != b.score) return a.score > b.score;
    return a.index < b.index;
}

static inline void NAME(swap)(NAME(found) * a, NAME(found) * b) {
    const NAME(found) kept = *a;
    *a = *b, *b = kept;
}

/* Lets the entry at `place` of a heap, the last of all on top, sink to where it belongs. */
static void NAME(sink)(NAME(found) * heap, int64_t count, int64_t place, int by_index) {
    const NAME(found) entry = heap[place];
    for (int64_t child; (child = 2 * place + 1) < count; place = child) {
        if (child + 1 < count && NAME(is_before)(heap[child], heap[child + 1], by_index)) child++;
        if (!NAME(is_before)(entry, heap[child], by_index)) break;
        heap[place] = heap[child];
    }
    heap[place] = entry;
}

/* From the first to the last. */
static void NAME(sort_found)(NAME(found) * found, int64_t count, int by_index) {
    for (int64_t place = count / 2 - 1; place >= 0; place--) NAME(sink)(found, count, place, by_index);
    for (int64_t end = count - 1; end > 0; end--) {
        NAME(swap)(&found[0], &found[end]);
        NAME(sink)(found, end, 0, by_index);
    }
}

/* Brings the first k of count > k to the front, the last of these to place k - 1 (Hoare's selection). */
static void NAME(select_found)(NAME(found) * found, int64_t count, int64_t k) {
    for (int64_t low = 0, high = count - 1; low < high;) {
        const int64_t middle = low + (high - low) / 2;
        if (NAME(is_before)(found[middle], found[low], 0)) NAME(swap)(&found[middle], &found[low]);
        if (NAME(is_before)(found[high], found[low], 0)) NAME(swap)(&found[high], &found[low]);
        if (NAME(is_before)(found[high], found[middle], 0)) NAME(swap)(&found[high], &found[middle]);
        const NAME(found) pivot = found[middle];
        int64_t i = low, j = high;
        while (i <= j) {
            while (NAME(is_before)(found[i], pivot, 0)) i++;
            while (NAME(is_before)(pivot, found[j], 0)) j--;
            if (i <= j) NAME(swap)(&found[i++], &found[j--]);
        }
        if (k - 1 <= j)
            high = j;
        else if (k - 1 >= i)
            low = i;
        else
            return;
    }
}

/* Keeps an entry until there is no more room, and then the first k of all. Returns the score of the k-th of those that
 * were compared last: what is below it need not be offered. */
static REAL NAME(offer)(const NAME(search) * s, NAME(found) * kept, int64_t *count, NAME(found) entry, REAL threshold) {
    kept[(*count)++] = entry;
    if (*count < s->room) return threshold;
    NAME(select_found)(kept, *count, s->k);
    *count = s->k;
    return kept[s->k - 1].score;
}

/* The bank's rows of one block as the left factor. */
static void NAME(read_bank)(const NAME(search) * s, int64_t first, int64_t count, OPERAND *rows) {
    const int64_t bytes = s->D * bytes_of(s->bank_dtype);
    for (int64_t i = 0; i < count; i++)
        NAME(to_reals)(s->kernels, s->bank_dtype, s->D, s->bank + (first + i) * bytes, rows + i * s->row_stride);
}

/* Rows of the bank, a block at a time, by all queries under way; those of the next block are fetched meanwhile. */
static mmbal_status NAME(search_task)(void *context, int worker, int64_t begin, int64_t end) {
    const NAME(search) *s = context;
    OPERAND *copy = s->rows + worker * BANK_ROWS * s->row_stride;
    REAL *products = s->products + worker * BANK_ROWS * s->cols_at_once;
    int32_t *places = s->places + worker * BANK_ROWS * s->cols_at_once;
    REAL *thresholds = s->thresholds + worker * s->queries_at_once;
    int64_t *counts = s->counts + worker * s->queries_at_once;
    NAME(found) *kept = s->kept + worker * s->queries_at_once * s->room;
    const int64_t bytes = s->D * bytes_of(s->bank_dtype);
    for (int64_t at = begin; at < end; at++) {
        const int64_t first = at * BANK_ROWS, here = least(BANK_ROWS, s->n - first);
        const int64_t next = at + 1 < end ? least(BANK_ROWS, s->n - first - here) : 0;
        /* With one panel of queries a row is read once, and a copy of it would take longer than it saves. */
        const int in_place = bytes == s->D * (int64_t)sizeof(OPERAND) && s->queries <= s->tile_cols;
        const OPERAND *rows = in_place ? (const OPERAND *)(const void *)(s->bank + first * bytes) : copy;
        const int64_t stride = in_place ? s->D : s->row_stride;
        if (!in_place) NAME(read_bank)(s, first, here, copy);
        fetches ahead = {.later = make_fetch(s->bank + (first + here) * bytes, bytes, next, bytes)};
        set_pace(&ahead.later, NAME(tile_steps)(s->kernels, here, s->queries, s->D));
        for (int64_t col = 0; col < s->queries; col += s->cols_at_once) {
            const int64_t cols = least(s->cols_at_once, s->queries - col);
            for (int64_t from = 0; from < s->D; from += s->depth_step) {
                NAME(panels) b = NAME(packed_panels)(s->kernels, s->panels + col * s->D, s->D);
                b.data += from * b.stride;
                NAME(multiply_panels)(s->kernels, here, cols, least(s->depth_step, s->D - from), rows + from, stride,
                                      here, b, products, s->cols_at_once, from > 0, &ahead);
            }
            const int64_t passing = s->tasks->at_least[sizeof(REAL) == sizeof(double)](
                products, here, cols, s->cols_at_once, thresholds + col, places);
            for (int64_t p = 0; p < passing; p++) {
                const int64_t query = col + places[p] % s->cols_at_once;
                const NAME(found) entry = {products[places[p]], first + places[p] / s->cols_at_once};
                if (entry.score >= thresholds[query])
                    thresholds[query] =
                        NAME(offer)(s, kept + query * s->room, &counts[query], entry, thresholds[query]);
            }
        }
    }
    return MMBAL_OK;
}

/* What all workers found of a query, in order. Where there are fewer than k, the rest of the bank has NaN. */
static mmbal_status NAME(merge_task)(void *context, int worker, int64_t begin, int64_t end) {
    (void)worker;
    const NAME(search) *s = context;
    for (int64_t q = begin; q < end; q++) {
        NAME(found) *best = s->kept + q * s->room;
        int64_t count = s->counts[q];
        for (int other = 1; other < s->workers; other++) {
            const int64_t at = other * s->queries_at_once + q;
            for (int64_t i = 0; i < s->counts[at]; i++) NAME(offer)(s, best, &count, s->kept[at * s->room + i], 0);
        }
        if (count > s->k) NAME(select_found)(best, count, s->k);
        count = least(count, s->k);
        REAL *scores = s->scores + (s->first_query + q) * s->k;
        int64_t *indices = s->indices + (s->first_query + q) * s->k;
        if (count < s->k) {
            NAME(sort_found)(best, count, 1);
            for (int64_t next = 0, at = 0, place = count; place < s->k; next++) {
                if (at < count && best[at].index == next)
                    at++;
                else
                    scores[place] = (REAL)NAN, indices[place++] = next;
            }
        }
        NAME(sort_found)(best, count, 0);
        for (int64_t i = 0; i < count; i++) scores[i] = best[i].score, indices[i] = best[i].index;
    }
    return MMBAL_OK;
}

static mmbal_status NAME(topk_search)(mmbal_dtype query_dtype, const void *query, mmbal_dtype bank_dtype,
                                      const void *bank, int64_t Q, int64_t n, int64_t D, int64_t k, void *scores,
                                      int64_t *indices, void *workspace, const mmbal_pool *pool) {
    arena from = {(uintptr_t)workspace};
    NAME(search) s = NAME(begin_search)(bank_dtype, Q, n, D, k, pool->workers, &from);
    s.query_dtype = query_dtype, s.query = query, s.bank = bank, s.scores = scores, s.indices = indices;
    const int64_t blocks = ceil_div(n, BANK_ROWS);
    mmbal_status status = MMBAL_OK;
    for (s.first_query = 0; s.first_query < Q && status == MMBAL_OK; s.first_query += s.queries_at_once) {
        s.queries = least(s.queries_at_once, Q - s.first_query);
        for (int64_t i = 0; i < s.workers * s.queries_at_once; i++) s.counts[i] = 0, s.thresholds[i] = -(REAL)INFINITY;
        status = pool->run(pool->self, ceil_div(s.queries, s.tile_cols), 1, NAME(pack_queries_task), &s);
        if (status == MMBAL_OK)
            status = pool->run(pool->self, blocks, blocks_per_task(blocks, s.workers), NAME(search_task), &s);
        if (status == MMBAL_OK) status = pool->run(pool->self, s.queries, QUERIES_PER_TASK, NAME(merge_task), &s);
    }
    return status;
}

static int64_t NAME(search_bytes)(mmbal_dtype bank_dtype, int64_t Q, int64_t n, int64_t D, int64_t k, int workers) {
    arena from = {0};
    NAME(begin_search)(bank_dtype, Q, n, D, k, workers, &from);
    return bytes_carved(&from);
}
#endif
