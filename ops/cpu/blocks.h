/* How a product is cut into blocks, and where a block lies among those of all experts. */
#ifndef MMBAL_CPU_BLOCKS_H
#define MMBAL_CPU_BLOCKS_H

#include <stdint.h>

/* A block of the result is at most this large and its depth is taken in steps: both packed operands (450 KiB in
 * float32) stay in a second-level cache of 1 MiB, and packing costs one load for about a hundred multiplications. */
enum { BLOCK_ROWS = 112, BLOCK_COLS = 192, BLOCK_DEPTH = 256 };

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

typedef struct block {
    int64_t expert, row, rows, col, cols;
} block;

/* Rows of the block grid that are whole tiles: a block of a product with many rows is this high. */
static inline int64_t block_height(int tile_rows) { return BLOCK_ROWS / tile_rows * tile_rows; }

/* Blocks of products with the routed rows of each expert as rows, cols columns. */
static inline int64_t count_row_blocks(const int64_t *offsets, int64_t E, int64_t height, int64_t cols) {
    int64_t count = 0;
    for (int64_t e = 0; e < E; e++) count += ceil_div(offsets[e + 1] - offsets[e], height);
    return count * ceil_div(cols, BLOCK_COLS);
}

/* The index-th of them; those that share columns of an expert's weights follow one another. */
static inline block find_row_block(const int64_t *offsets, int64_t height, int64_t cols, int64_t index) {
    const int64_t across = ceil_div(cols, BLOCK_COLS);
    int64_t e = 0, down;
    while (index >= (down = ceil_div(offsets[e + 1] - offsets[e], height)) * across) index -= down * across, e++;
    block b = {.expert = e, .row = offsets[e] + index % down * height, .col = index / down * BLOCK_COLS};
    b.rows = least(height, offsets[e + 1] - b.row);
    b.cols = least(BLOCK_COLS, cols - b.col);
    return b;
}

/* The index-th block of E matrices [rows, cols]. */
static inline block find_expert_block(int64_t rows, int64_t cols, int64_t height, int64_t index) {
    const int64_t down = ceil_div(rows, height), across = ceil_div(cols, BLOCK_COLS);
    block b = {.expert = index / (down * across)};
    index %= down * across;
    b.row = index / across * height, b.col = index % across * BLOCK_COLS;
    b.rows = least(height, rows - b.row), b.cols = least(BLOCK_COLS, cols - b.col);
    return b;
}

#endif
