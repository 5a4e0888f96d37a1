/* One block of a product A B for one way of taking it; see each_product.h and docs/kernels.md. A is read where it lies,
 * row by row; B is packed into panels on the way. */

/* Rows between passes are OPERANDs. They begin on a cache line, end in zeros up to one, and are an odd number of lines
 * apart: so the rows of a tile never meet in one set of the cache, whatever the width is. */
enum {
    NAME(LINE) = CACHE_LINE / sizeof(OPERAND),
    NAME(MOST_DEPTH) = MOST_DEPTH_BYTES / sizeof(OPERAND),
    NAME(FEW_DEPTH) = FEW_DEPTH_BYTES / sizeof(OPERAND),
    NAME(DEPTH_IN_PLACE) = NAME(FEW_DEPTH) / 4
};

static inline int64_t NAME(whole_lines)(int64_t width) { return ceil_div(width, NAME(LINE)) * NAME(LINE); }
static inline int64_t NAME(row_stride)(int64_t width) { return (ceil_div(width, NAME(LINE)) | 1) * NAME(LINE); }

typedef struct {
    const OPERAND *data;
    int64_t stride, first; /* data begins with row `first` */
} NAME(rows);

PRODUCT_PART const OPERAND *NAME(row_of)(const NAME(rows) * rows, int64_t row) {
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
    REAL c[BLOCK_ELEMENTS];                   /* row stride block.stride */
    REAL turned[BLOCK_ELEMENTS];              /* the same transposed, where the weights are the left factor */
    OPERAND b[PANEL_BYTES / sizeof(OPERAND)]; /* panels */
} NAME(scratch);

_Static_assert(FEW_ROWS * BLOCK_COLS * sizeof(OPERAND) <= PANEL_BYTES, "b also holds a strip of few rows");

/* A right factor as tiles read it: panels of tile_cols columns. */
typedef struct {
    OF_OPERAND(mmbal_tile) * tile;
    const OPERAND *data;
    int64_t stride, panel; /* between its rows, between its panels */
} NAME(panels);

PRODUCT_PART NAME(panels) NAME(packed_panels)(const mmbal_kernels *kernels, const OPERAND *packed, int64_t depth) {
    const int64_t cols = kernels->OF_OPERAND(tile_cols);
    const NAME(panels) made = {kernels->OF_OPERAND(tile), packed, cols * NAME(GROUP), cols * depth};
    return made;
}

/* c[i, j] = sum over the depth of a(i, d) b(d, j), rows x cols. The rows of a tile stay in the first-level cache while
 * all panels of b pass by; those of the next tile are fetched meanwhile. a_rows: rows of a that there are, at
 * least rows. */
PRODUCT_PART void NAME(multiply_panels)(const mmbal_kernels *kernels, int64_t rows, int64_t cols, int64_t depth,
                                        const OPERAND *a, int64_t a_stride, int64_t a_rows, NAME(panels) b, REAL *c,
                                        int64_t c_stride, tile_result result, fetches *ahead) {
    const int tile_rows = kernels->OF_OPERAND(tile_rows), tile_cols = kernels->OF_OPERAND(tile_cols);
    for (int64_t i = 0; i < rows; i += tile_rows) {
        const int64_t rows_below = least(tile_rows, a_rows - i - tile_rows);
        ahead->soon = make_fetch(a + (i + tile_rows) * a_stride, a_stride * (int64_t)sizeof(OPERAND),
                                 rows_below > 0 ? rows_below : 0, depth * (int64_t)sizeof(OPERAND));
        set_pace(&ahead->soon, ceil_div(cols, tile_cols) * (depth / NAME(GROUP)));
        for (int64_t j = 0; j < cols; j += tile_cols)
            b.tile((int)least(tile_rows, rows - i), depth, a + i * a_stride, a_stride, b.data + j / tile_cols * b.panel,
                   b.stride, c + i * c_stride + j, c_stride, result, ahead);
    }
}

/* The same for one panel, which stays in the first-level cache while all rows pass by. */
PRODUCT_PART void NAME(multiply_rows)(const mmbal_kernels *kernels, int64_t rows, int64_t depth, const OPERAND *a,
                                      int64_t a_stride, NAME(panels) b, REAL *c, int64_t c_stride, tile_result result,
                                      fetches *ahead) {
    const int64_t height = ceil_div(rows, ceil_div(rows, kernels->OF_OPERAND(tile_rows)));
    for (int64_t i = 0; i < rows; i += height)
        b.tile((int)least(height, rows - i), depth, a + i * a_stride, a_stride, b.data, b.stride, c + i * c_stride,
               c_stride, result, ahead);
}

/* Columns that the panels of few rows have, those rows being the right factor: whole panels, but for half a one in the
 * end. */
PRODUCT_PART int64_t NAME(columns_of)(const mmbal_kernels *kernels, int64_t rows) {
    return whole_multiples(kernels->OF_OPERAND(tile_cols) / 2, rows);
}

/* Elements of the panels of `cols` columns. */
PRODUCT_PART int64_t NAME(panel_elements)(const mmbal_kernels *kernels, int64_t cols, int64_t depth) {
    const int64_t tile_cols = kernels->OF_OPERAND(tile_cols);
    return ceil_div(cols, tile_cols) * tile_cols * NAME(packed_depth)(depth);
}

/* All panels of an expert's B [depth, cols], one after the other over the whole depth. */
PRODUCT_PART void NAME(pack_all)(const mmbal_kernels *kernels, NAME(weights) b, int64_t depth, int64_t cols,
                                 OPERAND *packed) {
    const int tile_cols = kernels->OF_OPERAND(tile_cols);
    for (int64_t col = 0; col < cols; col += tile_cols) {
        for (int64_t from = 0; from < depth; from += NAME(FEW_DEPTH)) {
            const int64_t deep = least(NAME(FEW_DEPTH), depth - from);
            NAME(pack_weights)(kernels, &b, from, deep, col, least(tile_cols, cols - col), tile_cols, packed);
            packed += tile_cols * NAME(packed_depth)(deep);
        }
    }
}

/* Steps of depth that the tiles of rows x cols take together. */
PRODUCT_PART int64_t NAME(tile_steps)(const mmbal_kernels *kernels, int64_t rows, int64_t cols, int64_t depth) {
    return ceil_div(rows, kernels->OF_OPERAND(tile_rows)) * ceil_div(cols, kernels->OF_OPERAND(tile_cols)) *
           (depth / NAME(GROUP));
}

/* A factor as a block reads it: its columns, by steps of the depth. */
typedef struct {
    NAME(weights) b;
    block place;
    int64_t depth, step;
    int in_place;           /* whole panels are read where they lie */
    const OPERAND *columns; /* the rows of a as a right factor, where the weights are the left one; else NULL */
} NAME(reading);

PRODUCT_PART int NAME(go_right)(int64_t rows_of_expert) {
    return rows_of_expert >= NAME(FEWEST_RIGHT) && few_rows(rows_of_expert);
}

/* Whether weights may be the left factor of products with few rows: even where they are packed, that is faster. */
PRODUCT_PART int NAME(weights_go_left)(const mmbal_kernels *kernels, int64_t depth) {
    return kernels->OF_OPERAND(half_tile) && depth % NAME(GROUP) == 0;
}

/* A step of the depth is short where weights are read in place: what it reads stays in the caches even where the rows
 * of the weights are 16 KiB apart and so share few of their sets. */
PRODUCT_PART NAME(reading) NAME(read_weights)(const mmbal_kernels *kernels, NAME(weights) b, block place, int64_t depth,
                                              int64_t step_of_many, const OPERAND *columns) {
    NAME(reading) r = {b, place, depth, step_of_many, 0, NULL};
    if (!place.few) return r;
    if (columns && NAME(go_right)(place.rows)) {
        const int64_t row_bytes = NAME(columns_of)(kernels, place.rows) * (int64_t)sizeof(OPERAND);
        const int64_t fits = OPERAND_IS_STORED ? COLUMNS_BYTES / row_bytes : NAME(MOST_DEPTH);
        r.columns = columns, r.step = NAME(whole_lines)(ceil_div(depth, ceil_div(depth, fits)));
        return r;
    }
    r.in_place = OPERAND_IS_STORED && kernels->OF_OPERAND(tile_in_place) && depth % NAME(GROUP) == 0 && !b.packed &&
                 !b.transposed && place.rows <= NAME(ROWS_IN_PLACE);
    r.step = r.in_place ? NAME(DEPTH_IN_PLACE) : NAME(FEW_DEPTH);
    return r;
}

/* Where the weights are the left factor, tile i of a block takes rows i, i + tiles, i + 2 tiles .. of it: memory is
 * read as some streams, each from end to end, which a core fetches ahead by itself. */
PRODUCT_PART int64_t NAME(left_tiles)(const mmbal_kernels *kernels, int64_t cols) {
    return ceil_div(cols, kernels->OF_OPERAND(tile_rows));
}

/* What tile i reads in the step of the depth that begins at `from`. */
PRODUCT_PART fetch NAME(fetch_left)(const mmbal_kernels *kernels, const NAME(reading) * r, int64_t i, int64_t from) {
    const int64_t tiles = NAME(left_tiles)(kernels, r->place.cols), size = (int64_t)sizeof(STORED);
    return make_fetch(r->b.data + (r->place.col + i) * r->b.stride + from, tiles * r->b.stride * size,
                      ceil_div(r->place.cols - i, tiles), least(r->step, r->depth - from) * size);
}

/* The panels of the step that begins at `from`, where all of an expert's lie packed. */
PRODUCT_PART NAME(panels) NAME(packed_step)(const mmbal_kernels *kernels, const NAME(reading) * r, int64_t from) {
    NAME(panels) whole = NAME(packed_panels)(kernels, r->b.packed, NAME(packed_depth)(r->depth));
    const int64_t tile_cols = kernels->OF_OPERAND(tile_cols);
    whole.data += r->place.col / tile_cols * whole.panel + from * tile_cols;
    return whole;
}

/* What a block reads of memory in the step of its depth that begins at `from`. */
PRODUCT_PART fetch NAME(fetch_step)(const mmbal_kernels *kernels, const NAME(reading) * r, int64_t from) {
    const int64_t deep = least(r->step, r->depth - from), size = (int64_t)sizeof(STORED);
    if (r->columns) return NAME(fetch_left)(kernels, r, 0, from);
    if (r->b.packed) {
        const NAME(panels) step = NAME(packed_step)(kernels, r, from);
        const int64_t tile_cols = kernels->OF_OPERAND(tile_cols), bytes = tile_cols * (int64_t)sizeof(OPERAND);
        return make_fetch(step.data, step.panel * (int64_t)sizeof(OPERAND), ceil_div(r->place.cols, tile_cols),
                          NAME(packed_depth)(deep) * bytes);
    }
    if (r->b.transposed)
        return make_fetch(r->b.data + r->place.col * r->b.stride + from, r->b.stride * size, r->place.cols,
                          deep * size);
    const fetch rows = make_fetch(r->b.data + from * r->b.stride + r->place.col, r->b.stride * size,
                                  least(deep, rows_that_stay(r->b.stride * size)), r->place.cols * size);
    const int64_t together = r->in_place ? TOGETHER_IN_PLACE : TOGETHER_PACKED;
    return r->place.few && r->place.rows <= together ? fetch_together(rows) : rows;
}

/* With few rows every panel is read once, when its turn comes: in place, packed before, or packed now. */
PRODUCT_PART void NAME(multiply_few)(const mmbal_kernels *kernels, const NAME(reading) * r, int64_t from, int64_t deep,
                                     const OPERAND *a, int64_t a_stride, tile_result result, fetches *ahead,
                                     NAME(scratch) * s) {
    const int64_t tile_cols = kernels->OF_OPERAND(tile_cols), packed_depth = NAME(packed_depth)(deep);
    for (int64_t j = 0; j < r->place.cols; j += tile_cols) {
        const int64_t cols = least(tile_cols, r->place.cols - j);
        NAME(panels) panel = NAME(packed_panels)(kernels, s->b, packed_depth);
        if (r->b.packed) {
            panel = NAME(packed_step)(kernels, r, from);
            panel.data += j / tile_cols * panel.panel;
#if OPERAND_IS_STORED
        } else if (r->in_place && cols == tile_cols) {
            panel.tile = kernels->OF_OPERAND(tile_in_place);
            panel.data = r->b.data + from * r->b.stride + r->place.col + j, panel.stride = r->b.stride;
#endif
        } else {
            NAME(pack_weights)(kernels, &r->b, from, deep, r->place.col + j, cols, (int)tile_cols, s->b);
        }
        NAME(multiply_rows)(kernels, r->place.rows, packed_depth, a, a_stride, panel, s->c + j, r->place.stride, result,
                            ahead);
    }
}

/* With many rows the panels of a step stay in the second-level cache. */
PRODUCT_PART void NAME(multiply_many)(const mmbal_kernels *kernels, const NAME(reading) * r, int64_t from, int64_t deep,
                                      const OPERAND *a, int64_t a_stride, tile_result result, fetches *ahead,
                                      NAME(scratch) * s) {
    const int64_t packed_depth = NAME(packed_depth)(deep), cols = r->place.cols;
    NAME(panels) panels = NAME(packed_panels)(kernels, s->b, packed_depth);
    if (r->b.packed)
        panels = NAME(packed_step)(kernels, r, from);
    else
        NAME(pack_weights)(kernels, &r->b, from, deep, r->place.col, cols, kernels->OF_OPERAND(tile_cols), s->b);
    NAME(multiply_panels)(kernels, r->place.rows, cols, packed_depth, a, a_stride, r->place.rows, panels, s->c,
                          r->place.stride, result, ahead);
}

/* Few rows against weights that lie transposed: the weights are the left factor, read where they lie, and what comes
 * out is turned in the end. So no weight is packed. Weights that are converted on the way are fetched by the tiles
 * before: a row that is converted at once is no stream that a core could follow. */
PRODUCT_PART void NAME(multiply_left)(const mmbal_kernels *kernels, const NAME(reading) * r, const NAME(reading) * next,
                                      NAME(scratch) * s) {
    const block at = r->place;
    const int64_t tile_cols = kernels->OF_OPERAND(tile_cols), columns = NAME(columns_of)(kernels, at.rows);
    const int64_t tiles = NAME(left_tiles)(kernels, at.cols);
    for (int64_t from = 0; from < r->depth; from += r->step) {
        const int64_t deep = least(r->step, r->depth - from);
        for (int64_t i = 0; i < tiles; i++) {
            const int64_t here = ceil_div(at.cols - i, tiles);
            const STORED *weights = r->b.data + (at.col + i) * r->b.stride + from;
            fetches ahead = {.later = {.pace = 0}};
#if OPERAND_IS_STORED
            (void)next;
            const OPERAND *left = weights;
            const int64_t left_stride = tiles * r->b.stride;
#else
            if (i + 1 < tiles)
                ahead.later = NAME(fetch_left)(kernels, r, i + 1, from);
            else if (from + deep < r->depth)
                ahead.later = NAME(fetch_left)(kernels, r, 0, from + deep);
            else if (next)
                ahead.later = NAME(fetch_step)(kernels, next, 0);
            set_pace(&ahead.later, ceil_div(columns, tile_cols) * (deep / NAME(GROUP)));
            const OPERAND *left = s->b;
            const int64_t left_stride = NAME(row_stride)(NAME(MOST_DEPTH));
            for (int64_t k = 0; k < here; k++)
                NAME(stored_to_operands)(kernels, deep, weights + k * tiles * r->b.stride, s->b + k * left_stride);
#endif
            for (int64_t j = 0; j < columns; j += tile_cols) {
                const int64_t width = least(tile_cols, columns - j);
                (width == tile_cols ? kernels->OF_OPERAND(tile) : kernels->OF_OPERAND(half_tile))(
                    (int)here, deep, left, left_stride, r->columns + j * r->depth + from * width, width * NAME(GROUP),
                    s->turned + i * columns + j, tiles * columns, from > 0 ? TILE_ADD : TILE_SET, &ahead);
            }
        }
    }
    (sizeof(REAL) == sizeof(double) ? kernels->transpose_64 : kernels->transpose_32)(s->turned, columns, at.cols,
                                                                                     at.rows, s->c, at.stride);
}

/* s->c = a(place.row + i, .) B(., place.col + j) over the whole depth, in its order. next: what this worker reads
 * after it, or NULL. */
PRODUCT_PART void NAME(multiply)(const mmbal_kernels *kernels, NAME(rows) a, const NAME(reading) * r,
                                 const NAME(reading) * next, NAME(scratch) * s) {
    if (r->columns) {
        NAME(multiply_left)(kernels, r, next, s);
        return;
    }
    for (int64_t from = 0; from < r->depth; from += r->step) {
        const int64_t deep = least(r->step, r->depth - from);
        const OPERAND *rows = NAME(row_of)(&a, r->place.row) + from;
        fetches ahead = {.later = {.pace = 0}};
        if (from + deep < r->depth)
            ahead.later = NAME(fetch_step)(kernels, r, from + deep);
        else if (next)
            ahead.later = NAME(fetch_step)(kernels, next, 0);
        set_pace(&ahead.later, NAME(tile_steps)(kernels, r->place.rows, r->place.cols, NAME(packed_depth)(deep)));
        (r->place.few ? NAME(multiply_few) : NAME(multiply_many))(kernels, r, from, deep, rows, a.stride, from > 0,
                                                                  &ahead, s);
    }
}
