/* One block of a product A B for one way of taking it; see each_product.h and docs/kernels.md. A is read where it lies,
 * row by row; B is packed into panels on the way. */

/* Rows between passes are OPERANDs. They begin on a cache line, end in zeros up to one, and are an odd number of lines
 * apart: so the rows of a tile never meet in one set of the cache, whatever the width is. */
enum {
    NAME(LINE) = CACHE_LINE / sizeof(OPERAND),
    NAME(DEPTH) = DEPTH_BYTES / sizeof(OPERAND),
    NAME(DEPTH_IN_PLACE) = NAME(DEPTH) / 4
};

static inline int64_t NAME(whole_lines)(int64_t width) { return ceil_div(width, NAME(LINE)) * NAME(LINE); }
static inline int64_t NAME(row_stride)(int64_t width) { return (ceil_div(width, NAME(LINE)) | 1) * NAME(LINE); }

typedef struct {
    const OPERAND *data;
    int64_t stride, first; /* data begins with row `first` */
} NAME(rows);

static const OPERAND *NAME(row_of)(const NAME(rows) * rows, int64_t row) {
    return rows->data + (row - rows->first) * rows->stride;
}

/* The weights of an expert as the right factor: B(d, j) at data + j stride + d when they lie transposed (one row of
 * memory is one column of B), else at data + d stride + j. packed, where not NULL, holds all of its panels. */
typedef struct {
    const STORED *data;
    int64_t stride;
    int transposed;
    const OPERAND *packed;
} NAME(weights);

/* NAME(pack_weights), NAME(pack_rows), NAME(turn) and NAME(packed_depth), NAME(GROUP) */
#include PACKING

/* What a worker holds of a block. */
typedef struct {
    REAL c[BLOCK_ROWS * BLOCK_COLS];     /* row stride BLOCK_COLS */
    OPERAND b[NAME(DEPTH) * BLOCK_COLS]; /* panels */
} NAME(scratch);

/* A right factor as tiles read it: panels of tile_cols columns. */
typedef struct {
    OF_OPERAND(mmbal_tile) * tile;
    const OPERAND *data;
    int64_t stride, panel; /* between its rows, between its panels */
} NAME(panels);

static NAME(panels) NAME(packed_panels)(const mmbal_kernels *kernels, const OPERAND *packed, int64_t depth) {
    const int64_t cols = kernels->OF_OPERAND(tile_cols);
    const NAME(panels) made = {kernels->OF_OPERAND(tile), packed, cols * NAME(GROUP), cols * depth};
    return made;
}

/* c[i, j] (+)= sum over the depth of a(i, d) b(d, j), rows x cols; a's rows outermost, so that a tile's rows stay in
 * the first-level cache while the panels of b pass by. a_rows: rows of a that there are, rows or more. The rows of the
 * next tiles are fetched meanwhile, and what is read next. */
static void NAME(multiply_panels)(const mmbal_kernels *kernels, int64_t rows, int64_t cols, int64_t depth,
                                  const OPERAND *a, int64_t a_stride, int64_t a_rows, NAME(panels) b, REAL *c, int add,
                                  fetch *next) {
    const int tile_rows = kernels->OF_OPERAND(tile_rows), tile_cols = kernels->OF_OPERAND(tile_cols);
    for (int64_t i = 0; i < rows; i += tile_rows) {
        const int64_t rows_below = least(tile_rows, a_rows - i - tile_rows);
        fetch below = make_fetch(a + (i + tile_rows) * a_stride, a_stride * (int64_t)sizeof(OPERAND),
                                 rows_below > 0 ? rows_below : 0, depth * (int64_t)sizeof(OPERAND));
        set_pace(&below, ceil_div(cols, tile_cols));
        for (int64_t j = 0; j < cols; j += tile_cols) {
            fetch_lines_now(&below, below.pace);
            b.tile((int)least(tile_rows, rows - i), depth, a + i * a_stride, a_stride, b.data + j / tile_cols * b.panel,
                   b.stride, c + i * BLOCK_COLS + j, BLOCK_COLS, add, next);
        }
    }
}

/* What a block reads of B for the depths from .. from + depth, unless it is packed. */
static fetch NAME(fetch_weights)(const NAME(weights) * b, block place, int64_t from, int64_t depth) {
    if (b->packed || depth == 0) return make_fetch(NULL, 0, 0, 0);
    const int64_t rows = b->transposed ? place.cols : depth, width = b->transposed ? depth : place.cols;
    const STORED *first = b->data + (b->transposed ? place.col * b->stride + from : from * b->stride + place.col);
    return make_fetch(first, b->stride * (int64_t)sizeof(STORED), rows, width * (int64_t)sizeof(STORED));
}

/* Elements of the panels of `cols` columns. */
static int64_t NAME(panel_elements)(const mmbal_kernels *kernels, int64_t cols, int64_t depth) {
    const int64_t tile_cols = kernels->OF_OPERAND(tile_cols);
    return ceil_div(cols, tile_cols) * tile_cols * NAME(packed_depth)(depth);
}

/* All panels of an expert's B [depth, cols]: block of columns after block, in each step of the depth after step. */
static void NAME(pack_all)(const mmbal_kernels *kernels, NAME(weights) b, int64_t depth, int64_t cols,
                           OPERAND *packed) {
    for (int64_t col = 0; col < cols; col += BLOCK_COLS) {
        const int64_t here = least(BLOCK_COLS, cols - col);
        for (int64_t from = 0; from < depth; from += NAME(DEPTH)) {
            const int64_t deep = least(NAME(DEPTH), depth - from);
            NAME(pack_weights)(kernels, &b, from, deep, col, here, kernels->OF_OPERAND(tile_cols), packed);
            packed += NAME(panel_elements)(kernels, here, deep);
        }
    }
}

/* Steps of depth that the tiles of rows x cols take together. */
static int64_t NAME(tile_steps)(const mmbal_kernels *kernels, int64_t rows, int64_t cols, int64_t depth) {
    return ceil_div(rows, kernels->OF_OPERAND(tile_rows)) * ceil_div(cols, kernels->OF_OPERAND(tile_cols)) *
           (depth / NAME(GROUP));
}

/* A step of the depth is short then: what it reads stays in the second-level cache even where the rows of the weights
 * are 16 KiB apart and so share few of its sets. */
static int NAME(reads_in_place)(const mmbal_kernels *kernels, const NAME(weights) * b, block place, int64_t depth) {
    return OPERAND_IS_STORED && kernels->OF_OPERAND(tile_in_place) && depth % NAME(GROUP) == 0 && !b->packed &&
           !b->transposed && place.rows <= NAME(ROWS_IN_PLACE);
}

static int64_t NAME(depth_step)(const mmbal_kernels *kernels, const NAME(weights) * b, block place, int64_t depth) {
    return NAME(reads_in_place)(kernels, b, place, depth) ? NAME(DEPTH_IN_PLACE) : NAME(DEPTH);
}

/* What a block reads in the step of its depth that begins at `from`. */
static fetch NAME(fetch_step)(const mmbal_kernels *kernels, const NAME(weights) * b, block place, int64_t from,
                              int64_t depth) {
    return NAME(fetch_weights)(b, place, from, least(NAME(depth_step)(kernels, b, place, depth), depth - from));
}

/* s->c = a(place.row + i, .) B(., place.col + j) over the whole depth, in its order. after: what this worker reads
 * next. */
static void NAME(multiply)(const mmbal_kernels *kernels, NAME(rows) a, NAME(weights) b, block place, int64_t depth,
                           fetch after, NAME(scratch) * s) {
    const int tile_cols = kernels->OF_OPERAND(tile_cols);
    /* columns that are read in place: whole tiles, as one that is not would read beyond them */
    const int64_t direct = NAME(reads_in_place)(kernels, &b, place, depth) ? place.cols / tile_cols * tile_cols : 0;
    const int64_t others = place.cols - direct, step = NAME(depth_step)(kernels, &b, place, depth);
    if (direct) { /* at the first block of a task nothing is on the way yet */
        fetch first = NAME(fetch_step)(kernels, &b, place, 0, depth);
        fetch_lines(&first, first.rows * first.lines);
    }
    for (int64_t from = 0; from < depth; from += step) {
        const int64_t deep = least(step, depth - from), next = from + deep, packed_depth = NAME(packed_depth)(deep);
        const OPERAND *rows = NAME(row_of)(&a, place.row) + from;
        fetch ahead = next < depth ? NAME(fetch_step)(kernels, &b, place, next, depth) : after;
        set_pace(&ahead, NAME(tile_steps)(kernels, place.rows, place.cols, packed_depth));
#if OPERAND_IS_STORED
        if (direct) {
            const NAME(panels) in_place = {kernels->OF_OPERAND(tile_in_place), b.data + from * b.stride + place.col,
                                           b.stride, tile_cols};
            NAME(multiply_panels)(kernels, place.rows, direct, deep, rows, a.stride, place.rows, in_place, s->c,
                                  from > 0, &ahead);
        }
#endif
        if (others == 0) continue;
        const OPERAND *packed = s->b;
        if (b.packed)
            packed = b.packed + NAME(panel_elements)(kernels, place.col, depth) +
                     NAME(panel_elements)(kernels, place.cols, from);
        else
            NAME(pack_weights)(kernels, &b, from, deep, place.col + direct, others, tile_cols, s->b);
        NAME(multiply_panels)(kernels, place.rows, others, packed_depth, rows, a.stride, place.rows,
                              NAME(packed_panels)(kernels, packed, packed_depth), s->c + direct, from > 0, &ahead);
    }
}
