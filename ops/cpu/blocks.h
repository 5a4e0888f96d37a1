/* How a product is cut into blocks, and where a block lies among those of all experts. */
#ifndef MMBAL_CPU_BLOCKS_H
#define MMBAL_CPU_BLOCKS_H

#include <stdint.h>

/* A block of the result is at most rows x cols, and its depth is taken by steps of depth_bytes of operands. The packed
 * right factor (192 KiB) and the block (420 KiB of float32) stay in the second-level cache; the left factor is read
 * where it lies, the rows of a tile from the first-level cache. */
typedef struct blocking {
    int64_t rows, cols, depth_bytes;
    int64_t few_across; /* blocks that the columns of an expert with few rows are cut into, at least; 0: as others */
    int64_t wide_from;  /* blocks of few rows are FEW_COLS wide from this many rows on, else BLOCK_COLS */
} blocking;

/* For caches of 32 KiB and 1 MiB, and for 48 KiB and 2 MiB: higher blocks pack a factor less often, and deeper steps
 * read and write their sums less often. Both need the same scratch memory. */
#define BLOCKING_OF_SMALL_CACHES ((blocking){560, 192, 1024, 1, 1})
#define BLOCKING_OF_LARGE_CACHES ((blocking){1120, 96, 2048, 1, 1})

/* Columns are multiples of every tile's. Rows are finished by strips of at most BLOCK_COLS columns. */
enum { BLOCK_COLS = 192, BLOCK_ELEMENTS = 560 * BLOCK_COLS, PANEL_BYTES = 1024 * BLOCK_COLS, MOST_DEPTH_BYTES = 2048 };

/* An expert of at most this many rows has one block of rows and goes panel by panel, by steps of FEW_DEPTH_BYTES. Where
 * nothing is packed its blocks are wide: every piece that a row of the weights is read in costs another look at its
 * page. */
enum { FEW_ROWS = 128, FEW_COLS = 5 * BLOCK_COLS, FEW_DEPTH_BYTES = 1024 };

/* Up to so many rows of an expert some rows of its weights are fetched together (fetch.h), where they are read in place
 * and where they are packed. Beyond, lines are fetched so seldom that one row after the other is faster (measured at
 * 768 x 3072). */
enum { TOGETHER_IN_PLACE = 96, TOGETHER_PACKED = 24 };

/* Few rows are the right factor of products with weights that lie transposed: so no weight need be packed. A step of
 * their depth, COLUMNS_BYTES, stays in the second-level cache while the weights pass by. It takes as long as with 16
 * rows, so it is done from as many rows on as it is faster from: with the weights as they are, converted, by pairs. */
enum { COLUMNS_BYTES = 512 << 10, LEAST_RIGHT = 1, LEAST_RIGHT_CONVERTED = 4, LEAST_RIGHT_PAIRS = 9 };

static inline int few_rows(int64_t rows_of_expert) { return rows_of_expert > 0 && rows_of_expert <= FEW_ROWS; }

/* Elements of a piece of the sums of a bias' gradient: a divisor of every step of a depth. */
enum { SUM_PIECE = 128 };

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

typedef struct block {
    int64_t expert, row, rows, col, cols;
    int64_t stride; /* between the rows of the block's sums */
    int few;
} block;

/* Rows of the blocks that `rows` rows are cut into: equal, whole tiles, at most `most`. */
static inline int64_t block_height(int64_t rows, int64_t most, int tile_rows) {
    const int64_t pieces = ceil_div(rows, most / tile_rows * tile_rows);
    return pieces ? ceil_div(ceil_div(rows, pieces), tile_rows) * tile_rows : tile_rows;
}

/* The blocks of an expert's rows. */
typedef struct row_blocks {
    int64_t height, down, width, across;
    int few;
} row_blocks;

static inline int64_t whole_multiples(int64_t of, int64_t number) { return ceil_div(number, of) * of; }

/* Columns of a block of few rows; the rows may stand in panels of 32 columns. */
static inline int64_t few_width(int64_t rows, blocking most, int64_t cols) {
    const int64_t widest = rows >= most.wide_from ? (int64_t)FEW_COLS : (int64_t)BLOCK_COLS;
    const int64_t room = least(widest, BLOCK_ELEMENTS / whole_multiples(32, rows)) / BLOCK_COLS * BLOCK_COLS;
    const int64_t pieces = ceil_div(cols, room), across = pieces > most.few_across ? pieces : most.few_across;
    return least(whole_multiples(BLOCK_COLS, ceil_div(cols, across)), room);
}

static inline row_blocks cut_rows(int64_t rows, blocking most, int tile_rows, int64_t cols) {
    const int few = most.few_across > 0 && few_rows(rows);
    const int64_t height = few ? rows : block_height(rows, most.rows, tile_rows);
    const int64_t width = few ? few_width(rows, most, cols) : most.cols;
    const row_blocks made = {height, ceil_div(rows, height), width, ceil_div(cols, width), few};
    return made;
}

/* Blocks of products with the routed rows of each expert as rows, cols columns. */
static inline int64_t count_row_blocks(const int64_t *offsets, int64_t E, blocking most, int tile_rows, int64_t cols) {
    int64_t count = 0;
    for (int64_t e = 0; e < E; e++) {
        const row_blocks cut = cut_rows(offsets[e + 1] - offsets[e], most, tile_rows, cols);
        count += cut.down * cut.across;
    }
    return count;
}

/* The index-th of them; those that share columns of an expert's weights follow one another. */
static inline block find_row_block(const int64_t *offsets, blocking most, int tile_rows, int64_t cols, int64_t index) {
    for (int64_t e = 0;; e++) {
        const int64_t rows = offsets[e + 1] - offsets[e];
        const row_blocks cut = cut_rows(rows, most, tile_rows, cols);
        if (index < cut.down * cut.across) {
            const int64_t row = index % cut.down * cut.height, col = index / cut.down * cut.width;
            const block b = {.expert = e,
                             .row = offsets[e] + row,
                             .rows = least(cut.height, rows - row),
                             .col = col,
                             .cols = least(cut.width, cols - col),
                             .stride = cut.width,
                             .few = cut.few};
            return b;
        }
        index -= cut.down * cut.across;
    }
}

/* The columns of a block from `left` on, as many as a row of them is finished at once. */
static inline block strip_of(block whole, int64_t left) {
    block strip = whole;
    strip.col += left, strip.cols = least(BLOCK_COLS, whole.cols - left);
    return strip;
}

/* Blocks of E matrices [rows, cols]. */
static inline int64_t count_expert_blocks(int64_t E, blocking most, int64_t rows, int64_t cols) {
    return E * ceil_div(rows, most.rows) * ceil_div(cols, most.cols);
}

/* The index-th of them. */
static inline block find_expert_block(blocking most, int64_t rows, int64_t cols, int64_t index) {
    const int64_t down = ceil_div(rows, most.rows), across = ceil_div(cols, most.cols);
    const int64_t row = index / across % down * most.rows, col = index % across * most.cols;
    const block b = {.expert = index / (down * across),
                     .row = row,
                     .rows = least(most.rows, rows - row),
                     .col = col,
                     .cols = least(most.cols, cols - col),
                     .stride = most.cols,
                     .few = 0};
    return b;
}

#endif
