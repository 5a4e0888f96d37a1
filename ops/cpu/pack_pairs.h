/* How the factors of a product are packed where the depth goes by pairs of 16-bit elements: a pair lies in one word, so
 * that a panel is [pairs, panel_cols] words. An odd depth ends in a pair with a zero. See gemm_body.h. */

static inline int64_t NAME(packed_depth)(int64_t depth) { return (depth + 1) / 2 * 2; }

/* words[i] = {first[i], second[i]}; second NULL: zeros */
static inline void NAME(interleave)(const OPERAND *first, const OPERAND *second, int64_t count, OPERAND *words) {
    for (int64_t i = 0; second && i < count; i++) words[2 * i] = first[i], words[2 * i + 1] = second[i];
    for (int64_t i = 0; !second && i < count; i++) words[2 * i] = first[i], words[2 * i + 1] = 0;
}

/* packed[panel][d / 2][i][d % 2] = rows(d, panel panel_cols + i), zero beyond cols and depth */
static void NAME(interleave_rows)(const OPERAND *rows, int64_t stride, int64_t depth, int64_t cols, int panel_cols,
                                  OPERAND *packed) {
    for (int64_t d = 0; d < depth; d += 2) {
        const OPERAND *row = rows + d * stride, *next = d + 1 < depth ? row + stride : NULL;
        OPERAND *to = packed + d * panel_cols;
        for (int64_t k = 0; k < 2 && d + FETCH_AHEAD + k < depth; k++)
            for (int64_t i = 0; i < cols; i += NAME(LINE)) __builtin_prefetch(row + (FETCH_AHEAD + k) * stride + i);
        for (int64_t left = 0; left < cols; left += panel_cols, to += panel_cols * NAME(packed_depth)(depth)) {
            const int64_t here = least(panel_cols, cols - left);
            NAME(interleave)(row + left, next ? next + left : NULL, here, to);
            for (int64_t i = 2 * here; i < 2 * panel_cols; i++) to[i] = 0;
        }
    }
}

/* packed[panel][d / 2][i][d % 2] = B(from + d, col + panel panel_cols + i), zero beyond cols and depth */
static void NAME(pack_weights)(const NAME(weights) * b, int64_t from, int64_t depth, int64_t col, int64_t cols,
                               int panel_cols, OPERAND *packed) {
    if (!b->transposed) {
        NAME(interleave_rows)(b->data + from * b->stride + col, b->stride, depth, cols, panel_cols, packed);
        return;
    }
    const int64_t by_words = b->stride % 2 == 0 ? depth / 2 * 2 : 0; /* else a pair may straddle two words */
    for (int64_t left = 0; left < cols; left += panel_cols, packed += panel_cols * NAME(packed_depth)(depth)) {
        const int64_t here = least(panel_cols, cols - left);
        const OPERAND *columns = b->data + (col + left) * b->stride + from;
        if (here < panel_cols) memset(packed, 0, sizeof(OPERAND) * (size_t)(panel_cols * NAME(packed_depth)(depth)));
        TRANSPOSE(columns, b->stride / 2, here, by_words / 2, packed, panel_cols);
        for (int64_t d = by_words; d < depth; d += 2)
            for (int64_t i = 0; i < here; i++) {
                OPERAND *word = packed + d * panel_cols + 2 * i;
                word[0] = columns[i * b->stride + d], word[1] = d + 1 < depth ? columns[i * b->stride + d + 1] : 0;
            }
    }
}

static void NAME(pack_rows)(const NAME(rows) * b, int64_t from, int64_t depth, int64_t col, int64_t cols,
                            int panel_cols, OPERAND *packed) {
    NAME(interleave_rows)(b->data + from * b->stride + col, b->stride, depth, cols, panel_cols, packed);
}

/* to[j, i] = from[i, j]; rows that are paired first are words, and words are turned; an odd row stands beside a zero */
static void NAME(turn)(const OPERAND *from, int64_t from_stride, int64_t rows, int64_t cols, OPERAND *to,
                       int64_t to_stride) {
    OPERAND words[4 * 2 * BLOCK_COLS];
    for (int64_t i = 0; i < rows; i += 8) {
        const int64_t pairs = least(4, (rows - i + 1) / 2);
        for (int64_t left = 0; left < cols; left += BLOCK_COLS) {
            const int64_t here = least(BLOCK_COLS, cols - left);
            for (int64_t k = 0; k < pairs; k++) {
                const OPERAND *row = from + (i + 2 * k) * from_stride + left;
                NAME(interleave)(row, i + 2 * k + 1 < rows ? row + from_stride : NULL, here,
                                 words + k * 2 * BLOCK_COLS);
            }
            TRANSPOSE(words, BLOCK_COLS, pairs, here, to + left * to_stride + i, to_stride / 2);
        }
    }
}
