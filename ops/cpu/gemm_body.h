/* One block of a product A B for one way of taking it; see each_product.h and docs/kernels.md. A is read where it lies,
 * row by row; B is packed into panels on the way. */

/* Rows between passes are OPERANDs. They begin on a cache line, end in zeros up to one, and are an odd number of lines
 * apart: so the rows of a tile never meet in one set of the cache, whatever the width is. */
enum { NAME(LINE) = CACHE_LINE / sizeof(OPERAND), NAME(DEPTH) = DEPTH_BYTES / sizeof(OPERAND) };

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

/* NAME(pack_weights), NAME(pack_rows), NAME(turn) and NAME(packed_depth) */
#include PACKING

/* What a worker holds of a block. */
typedef struct {
    REAL c[BLOCK_ROWS * BLOCK_COLS];     /* row stride BLOCK_COLS */
    OPERAND b[NAME(DEPTH) * BLOCK_COLS]; /* panels */
} NAME(scratch);

/* c[i, j] (+)= sum over the packed depth of a(i, d) b(d, j), rows x cols; b packed; a's rows outermost, so that a
 * tile's rows stay in the first-level cache while the panels of b pass by. What is packed next is fetched meanwhile. */
static void NAME(multiply_packed)(const mmbal_kernels *kernels, int64_t rows, int64_t cols, int64_t depth,
                                  const OPERAND *a, int64_t a_stride, const OPERAND *b, REAL *c, int add, fetch next) {
    const int tile_rows = kernels->OF_OPERAND(tile_rows), tile_cols = kernels->OF_OPERAND(tile_cols);
    const int64_t lines_a_tile =
        ceil_div(next.rows * next.lines, ceil_div(rows, tile_rows) * ceil_div(cols, tile_cols));
    for (int64_t i = 0; i < rows; i += tile_rows) {
        for (int64_t j = 0; j < cols; j += tile_cols) {
            fetch_lines(&next, lines_a_tile);
            kernels->OF_OPERAND(tile)((int)least(tile_rows, rows - i), depth, a + i * a_stride, a_stride, b + j * depth,
                                      c + i * BLOCK_COLS + j, BLOCK_COLS, add);
        }
    }
}

/* The part of B that a block still has to pack of the depths from .. from + depth. */
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

/* s->c = a(place.row + i, .) B(., place.col + j) over the whole depth, in its order */
static void NAME(multiply)(const mmbal_kernels *kernels, NAME(rows) a, NAME(weights) b, block place, int64_t depth,
                           NAME(scratch) * s) {
    for (int64_t from = 0; from < depth; from += NAME(DEPTH)) {
        const int64_t deep = least(NAME(DEPTH), depth - from), next = from + deep;
        const OPERAND *rows = NAME(row_of)(&a, place.row) + from;
        const OPERAND *panels = s->b;
        if (b.packed)
            panels = b.packed + NAME(panel_elements)(kernels, place.col, depth) +
                     NAME(panel_elements)(kernels, place.cols, from);
        else
            NAME(pack_weights)(kernels, &b, from, deep, place.col, place.cols, kernels->OF_OPERAND(tile_cols), s->b);
        const fetch ahead = NAME(fetch_weights)(&b, place, next, least(NAME(DEPTH), depth - next));
        NAME(multiply_packed)(kernels, place.rows, place.cols, NAME(packed_depth)(deep), rows, a.stride, panels, s->c,
                              from > 0, ahead);
    }
}
