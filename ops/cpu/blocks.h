/* How a product is cut into blocks, and where a block lies among those of all experts. */
#ifndef MMBAL_CPU_BLOCKS_H
#define MMBAL_CPU_BLOCKS_H

#include <stdint.h>

/* A block of the result is at most rows x cols, and its depth is taken by steps of depth_bytes of operands. The packed
 * right factor (192 KiB) and the block (420 KiB of float32) stay in the second-level cache; the left factor is read
 * where it lies, the rows of a tile from the first-level cache. */
typedef struct blocking {
    int64_t rows, cols, depth_bytes;
} blocking;

/* For caches of 32 KiB and 1 MiB, and for 48 KiB and 2 MiB: higher blocks pack a factor less often, and deeper steps
 * read and write their sums less often. Both need the same scratch memory. */
#define BLOCKING_OF_SMALL_CACHES ((blocking){560, 192, 1024})
#define BLOCKING_OF_LARGE_CACHES ((blocking){1120, 96, 2048})

/* Columns are multiples of every tile's. A row of a block is BLOCK_COLS elements at most. */
enum { BLOCK_COLS = 192, BLOCK_ELEMENTS = 560 * BLOCK_COLS, PANEL_BYTES = 1024 * BLOCK_COLS, MOST_DEPTH_BYTES = 2048 };

/* Blocks of at most this many rows go panel by panel, by steps of FEW_DEPTH_BYTES. */
enum { FEW_ROWS = 128, FEW_DEPTH_BYTES = 1024 };

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

static inline row_blocks cut_rows(int64_t rows, blocking most, int tile_rows, int64_t cols) {
    const int64_t height = block_height(rows, most.rows, tile_rows);
    const int few = least(height, rows) <= FEW_ROWS;
    const int64_t width = few ? (int64_t)BLOCK_COLS : most.cols;
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
