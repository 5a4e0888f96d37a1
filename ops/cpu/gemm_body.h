/* One block of a product A B^T, packed and multiplied by tiles; see each_dtype.h and docs/kernels.md. */

/* A matrix [rows, depth] in memory. With token set, the routed dimension (rows, or depth when the rows are contiguous)
 * is gathered: its index r stands for token[r] / K. */
typedef struct {
    const STORED *data;
    int64_t stride;      /* between rows, or between depths when the rows are contiguous */
    int rows_contiguous; /* 0: element (i, d) at i stride + d; 1: at d stride + i */
    const int64_t *token;
    int64_t K;
} NAME(matrix);

static const STORED *NAME(line)(const NAME(matrix) * m, int64_t index) {
    return m->data + (m->token ? m->token[index] / m->K : index) * m->stride;
}

/* packed[panel][d][i] = m(row + panel panel_rows + i, from + d), zero beyond rows */
static void NAME(pack)(const NAME(matrix) * m, int64_t row, int64_t rows, int64_t from, int64_t depth, int panel_rows,
                       REAL *packed) {
    for (int64_t top = 0; top < rows; top += panel_rows, packed += panel_rows * depth) {
        const int64_t here = least(panel_rows, rows - top);
        if (here < panel_rows) memset(packed, 0, sizeof(REAL) * (size_t)(panel_rows * depth));
        if (m->rows_contiguous) {
            for (int64_t d = 0; d < depth; d++) {
                const STORED *source = NAME(line)(m, from + d) + row + top;
                for (int64_t i = 0; i < here; i++) packed[d * panel_rows + i] = LOAD(source[i]);
            }
        } else {
            for (int64_t i = 0; i < here; i++) {
                const STORED *source = NAME(line)(m, row + top + i) + from;
                for (int64_t d = 0; d < depth; d++) packed[d * panel_rows + i] = LOAD(source[d]);
            }
        }
    }
}

enum {
    NAME(PACKED_A) = BLOCK_ROWS * BLOCK_DEPTH,
    NAME(PACKED_B) = BLOCK_COLS * BLOCK_DEPTH,
    NAME(SCRATCH) = NAME(PACKED_A) + NAME(PACKED_B) + BLOCK_ROWS * BLOCK_COLS /* of REAL, for each worker */
};

/* Returns C[i, j] = sum over d in [from, to) of a(place.row + i, d) b(place.col + j, d), row stride BLOCK_COLS, in
 * scratch. The sum runs in the order of d in any case. */
static REAL *NAME(multiply)(const mmbal_kernels *kernels, const NAME(matrix) * a, const NAME(matrix) * b, block place,
                            int64_t from, int64_t to, REAL *scratch) {
    const int tile_rows = kernels->OF_REAL(tile_rows), tile_cols = kernels->OF_REAL(tile_cols);
    REAL *packed_a = scratch, *packed_b = packed_a + NAME(PACKED_A), *c = packed_b + NAME(PACKED_B);
    memset(c, 0, sizeof(REAL) * BLOCK_ROWS * BLOCK_COLS);
    for (; from < to; from += BLOCK_DEPTH) {
        const int64_t depth = least(BLOCK_DEPTH, to - from);
        NAME(pack)(a, place.row, place.rows, from, depth, tile_rows, packed_a);
        NAME(pack)(b, place.col, place.cols, from, depth, tile_cols, packed_b);
        for (int64_t j = 0; j < place.cols; j += tile_cols)
            for (int64_t i = 0; i < place.rows; i += tile_rows)
                kernels->OF_REAL(tile)(depth, packed_a + i * depth, packed_b + j * depth, c + i * BLOCK_COLS + j,
                                       BLOCK_COLS);
    }
    return c;
}
