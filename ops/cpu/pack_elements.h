/* How the factors of a product are packed where the depth goes by single elements; see gemm_body.h. */

static inline int64_t NAME(packed_depth)(int64_t depth) { return depth; }

/* packed[panel][d][i] = B(from + d, col + panel panel_cols + i) where a row of B is a row of memory, zero beyond cols
 */
#define PACK_ROWS(ELEMENT, CONVERT)                                                                                    \
    for (int64_t d = 0; d < depth; d++) {                                                                              \
        const ELEMENT *source = b->data + (from + d) * b->stride + col;                                                \
        OPERAND *to = packed + d * panel_cols;                                                                         \
        for (int64_t i = 0; d + FETCH_AHEAD < depth && i < cols; i += CACHE_LINE / (int64_t)sizeof(ELEMENT))           \
            __builtin_prefetch(source + FETCH_AHEAD * b->stride + i);                                                  \
        for (int64_t left = 0; left < cols; left += panel_cols, to += panel_cols * depth) {                            \
            const int64_t here = least(panel_cols, cols - left);                                                       \
            for (int64_t i = 0; i < here; i++) to[i] = CONVERT(source[left + i]);                                      \
            for (int64_t i = here; i < panel_cols; i++) to[i] = 0;                                                     \
        }                                                                                                              \
    }

static void NAME(pack_weights)(const NAME(weights) * b, int64_t from, int64_t depth, int64_t col, int64_t cols,
                               int panel_cols, OPERAND *packed) {
    if (!b->transposed) {
        PACK_ROWS(STORED, LOAD)
        return;
    }
    OPERAND lines[4 * BLOCK_DEPTH];
    for (int64_t left = 0; left < cols; left += panel_cols, packed += panel_cols * depth) {
        const int64_t here = least(panel_cols, cols - left);
        const STORED *columns = b->data + (col + left) * b->stride + from;
        if (here < panel_cols) memset(packed, 0, sizeof(OPERAND) * (size_t)(panel_cols * depth));
        if (sizeof(STORED) == sizeof(OPERAND)) {
            TRANSPOSE(columns, b->stride, here, depth, packed, panel_cols);
            continue;
        }
        for (int64_t i = 0; i < here; i += 4) { /* four columns are converted, then transposed */
            const int64_t wide = least(4, here - i);
            for (int64_t k = 0; k < wide; k++)
                for (int64_t d = 0; d < depth; d++) lines[k * BLOCK_DEPTH + d] = LOAD(columns[(i + k) * b->stride + d]);
            TRANSPOSE(lines, BLOCK_DEPTH, wide, depth, packed + i, panel_cols);
        }
    }
}

static void NAME(pack_rows)(const NAME(rows) * b, int64_t from, int64_t depth, int64_t col, int64_t cols,
                            int panel_cols, OPERAND *packed) {
    PACK_ROWS(OPERAND, )
}
#undef PACK_ROWS

/* to[j, i] = from[i, j] */
static void NAME(turn)(const OPERAND *from, int64_t from_stride, int64_t rows, int64_t cols, OPERAND *to,
                       int64_t to_stride) {
    TRANSPOSE(from, from_stride, rows, cols, to, to_stride);
}
