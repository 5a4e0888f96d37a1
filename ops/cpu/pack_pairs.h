/* How the factors of a product are packed where the depth goes by pairs of 16-bit elements: a pair lies in one word, so
 * that a panel is [pairs, panel_cols] words. An odd depth ends in a pair with a zero. See gemm_body.h. */

/* As in pack_elements.h; every tile that reads in place interleaves again, so that fewer rows are worth it. */
enum { NAME(GROUP) = 2, NAME(ROWS_IN_PLACE) = 16, NAME(FEWEST_RIGHT) = LEAST_RIGHT_PAIRS };

static inline int64_t NAME(packed_depth)(int64_t depth) { return (depth + 1) / 2 * 2; }

static const OPERAND NAME(zeros)[BLOCK_COLS];

/* packed[panel][d / 2][i][d % 2] = rows(d, panel panel_cols + i), zero beyond cols and depth; the
 * panels have panel_depth, of which this is the beginning, in pairs */
static void NAME(pair_rows)(const mmbal_kernels *kernels, const OPERAND *rows, int64_t stride, int64_t depth,
                            int64_t cols, int panel_cols, int64_t panel_depth, OPERAND *packed) {
    OPERAND words[2 * BLOCK_COLS];
    fetch ahead = make_fetch(rows, stride * (int64_t)sizeof(OPERAND), depth, cols * (int64_t)sizeof(OPERAND));
    fetch_lines_now(&ahead, FETCH_AHEAD * ahead.lines);
    for (int64_t d = 0; d < depth; d += 2) {
        const OPERAND *row = rows + d * stride;
        OPERAND *to = packed + d * panel_cols;
        fetch_lines_now(&ahead, 2 * ahead.lines);
        kernels->interleave(cols, row, d + 1 < depth ? row + stride : NAME(zeros), words);
        for (int64_t left = 0; left < cols; left += panel_cols, to += panel_cols * NAME(packed_depth)(panel_depth)) {
            const int64_t here = least(panel_cols, cols - left);
            memcpy(to, words + 2 * left, sizeof(OPERAND) * (size_t)(2 * here));
            for (int64_t i = 2 * here; i < 2 * panel_cols; i++) to[i] = 0;
        }
    }
}

static void NAME(pack_rows)(const mmbal_kernels *kernels, const NAME(rows) * b, int64_t from, int64_t depth,
                            int64_t col, int64_t cols, int panel_cols, int64_t panel_depth, OPERAND *packed) {
    NAME(pair_rows)(kernels, NAME(row_of)(b, from) + col, b->stride, depth, cols, panel_cols, panel_depth, packed);
}

/* packed[panel][d / 2][i][d % 2] = B(from + d, col + panel panel_cols + i), zero beyond cols and depth */
static void NAME(pack_weights)(const mmbal_kernels *kernels, const NAME(weights) * b, int64_t from, int64_t depth,
                               int64_t col, int64_t cols, int panel_cols, OPERAND *packed) {
    if (!b->transposed) {
        NAME(pair_rows)(kernels, b->data + from * b->stride + col, b->stride, depth, cols, panel_cols, depth, packed);
        return;
    }
    const int64_t by_words = b->stride % 2 == 0 ? depth / 2 * 2 : 0; /* else a pair may straddle two words */
    for (int64_t left = 0; left < cols; left += panel_cols, packed += panel_cols * NAME(packed_depth)(depth)) {
        const int64_t here = least(panel_cols, cols - left);
        const OPERAND *columns = b->data + (col + left) * b->stride + from;
        if (here < panel_cols) memset(packed, 0, sizeof(OPERAND) * (size_t)(panel_cols * NAME(packed_depth)(depth)));
        TRANSPOSE(kernels, columns, b->stride / 2, here, by_words / 2, packed, panel_cols);
        for (int64_t d = by_words; d < depth; d += 2) {
            for (int64_t i = 0; i < here; i++) {
                OPERAND *word = packed + d * panel_cols + 2 * i;
                word[0] = columns[i * b->stride + d], word[1] = d + 1 < depth ? columns[i * b->stride + d + 1] : 0;
            }
        }
    }
}

/* packed[d / 2][i][d % 2] = rows[i, d] for as many rows as a panel has columns at most, zero beyond them; depth is even
 */
PRODUCT_PART void NAME(pack_columns)(const mmbal_kernels *kernels, const OPERAND *rows, int64_t stride, int64_t count,
                                     int64_t depth, int64_t panel_cols, OPERAND *packed) {
    if (count < panel_cols) memset(packed, 0, sizeof(OPERAND) * (size_t)(panel_cols * depth));
    TRANSPOSE(kernels, rows, stride / 2, count, depth / 2, packed, panel_cols);
}

/* to[j, i] = from[i, j]; two rows are made one row of words, and words are turned; an odd row stands beside zeros */
static void NAME(turn)(const mmbal_kernels *kernels, const OPERAND *from, int64_t from_stride, int64_t rows,
                       int64_t cols, OPERAND *to, int64_t to_stride) {
    OPERAND words[4 * 2 * BLOCK_COLS];
    for (int64_t i = 0; i < rows; i += 8) {
        const int64_t pairs = least(4, (rows - i + 1) / 2);
        for (int64_t left = 0; left < cols; left += BLOCK_COLS) {
            const int64_t here = least(BLOCK_COLS, cols - left);
            for (int64_t k = 0; k < pairs; k++) {
                const OPERAND *row = from + (i + 2 * k) * from_stride + left;
                const OPERAND *second = i + 2 * k + 1 < rows ? row + from_stride : NAME(zeros);
                kernels->interleave(here, row, second, words + k * 2 * BLOCK_COLS);
            }
            TRANSPOSE(kernels, words, BLOCK_COLS, pairs, here, to + left * to_stride + i, to_stride / 2);
        }
    }
}
