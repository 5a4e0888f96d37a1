/* How a product is cut into blocks, and where a block lies among those of all experts. */
#ifndef MMBAL_CPU_BLOCKS_H
#define MMBAL_CPU_BLOCKS_H

#include <stdint.h>

/* A block of the result is at most BLOCK_ROWS x BLOCK_COLS, and its depth is taken by steps of DEPTH_BYTES of operands.
 * The packed right factor (192 KiB) and the block (420 KiB of float32) stay in a second-level cache of 1 MiB; the left
 * factor is read where it lies. BLOCK_COLS is a multiple of every tile's columns. Sizes up to a half more or less came
 * out within 5 %. */
enum { BLOCK_ROWS = 560, BLOCK_COLS = 192, DEPTH_BYTES = 1024 };

/* Blocks of at most this many rows go panel by panel. */
enum { FEW_ROWS = 128 };

static inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }
static inline int64_t least(int64_t a, int64_t b) { return a < b ? a : b; }

typedef struct block {
    int64_t expert, row, rows, col, cols;
} block;

/* Rows of the blocks that `rows` rows are cut into: equal, whole tiles, at most `most`. */
static inline int64_t block_height(int64_t rows, int64_t most, int tile_rows) {
    const int64_t pieces = ceil_div(rows, most / tile_rows * tile_rows);
    return pieces ? ceil_div(ceil_div(rows, pieces), tile_rows) * tile_rows : tile_rows;
}

/* Blocks of products with the routed rows of each expert as rows, cols columns. */
static inline int64_t count_row_blocks(const int64_t *offsets, int64_t E, int64_t most, int tile_rows, int64_t cols) {
    int64_t count = 0;
    for (int64_t e = 0; e < E; e++) {
        const int64_t rows = offsets[e + 1] - offsets[e];
        count += ceil_div(rows, block_height(rows, most, tile_rows));
    }
    return count * ceil_div(cols, BLOCK_COLS);
}

/* The index-th of them; those that share columns of an expert's weights follow one another. */
static inline block find_row_block(const int64_t *offsets, int64_t most, int tile_rows, int64_t cols, int64_t index) {
    const int64_t across = ceil_div(cols, BLOCK_COLS);
    for (int64_t e = 0;; e++) {
        const int64_t rows = offsets[e + 1] - offsets[e], height = block_height(rows, most, tile_rows);
        const int64_t down = ceil_div(rows, height);
        if (index < down * across) {
            const int64_t row = index % down * height, col = index / down * BLOCK_COLS;
            const block b = {e, offsets[e] + row, least(height, rows - row), col, least(BLOCK_COLS, cols - col)};
            return b;
        }
        index -= down * across;
    }
}

/* Blocks of E matrices [rows, cols]. */
static inline int64_t count_expert_blocks(int64_t E, int64_t rows, int64_t cols) {
    return E * ceil_div(rows, BLOCK_ROWS) * ceil_div(cols, BLOCK_COLS);
}

/* The index-th of them. */
static inline block find_expert_block(int64_t rows, int64_t cols, int64_t index) {
    const int64_t down = ceil_div(rows, BLOCK_ROWS), across = ceil_div(cols, BLOCK_COLS);
    const int64_t row = index / across % down * BLOCK_ROWS, col = index % across * BLOCK_COLS;
    const block b = {index / (down * across), row, least(BLOCK_ROWS, rows - row), col, least(BLOCK_COLS, cols - col)};
    return b;
}

#endif
