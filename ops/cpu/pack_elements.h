/* How the factors of a product are packed where the depth goes by single elements; see gemm_body.h. */

/* GROUP: elements of the depth that lie side by side in a panel. At most ROWS_IN_PLACE rows read weights that lie row
 * by row where they lie: packing would take longer than it saves. */
enum { NAME(GROUP) = 1, NAME(ROWS_IN_PLACE) = 128, NAME(TURNED_AT_ONCE) = 16 };
enum { NAME(FEWEST_RIGHT) = OPERAND_IS_STORED ? LEAST_RIGHT : LEAST_RIGHT_CONVERTED };

static inline int64_t NAME(packed_depth)(int64_t depth) { return depth; }

/* Row d of every panel from one row of B. */
PRODUCT_PART void NAME(deal)(const OPERAND *row, int64_t cols, int panel_cols, int64_t depth, OPERAND *to) {
    for (int64_t left = 0; left < cols; left += panel_cols, to += panel_cols * depth) {
        const int64_t here = least(panel_cols, cols - left);
        if (here % 8 == 0) /* a length that the compiler knows is copied without a call */
            for (int64_t i = 0; i < here; i += 8) memcpy(to + i, row + left + i, sizeof(OPERAND) * 8);
        else
            memcpy(to, row + left, sizeof(OPERAND) * (size_t)here);
        for (int64_t i = here; i < panel_cols; i++) to[i] = 0;
    }
}

/* packed[panel][d][i] = rows(from + d, col + panel panel_cols + i), zero beyond cols; d < depth of panel_depth that the
 * panels have */
PRODUCT_PART void NAME(pack_rows)(const mmbal_kernels *kernels, const NAME(rows) * b, int64_t from, int64_t depth,
                                  int64_t col, int64_t cols, int panel_cols, int64_t panel_depth, OPERAND *packed) {
    (void)kernels;
    fetch ahead = make_fetch(NAME(row_of)(b, from) + col, b->stride * (int64_t)sizeof(OPERAND), depth,
                             cols * (int64_t)sizeof(OPERAND));
    fetch_lines_now(&ahead, FETCH_AHEAD * ahead.lines);
    for (int64_t d = 0; d < depth; d++) {
        fetch_lines_now(&ahead, ahead.lines);
        NAME(deal)(NAME(row_of)(b, from + d) + col, cols, panel_cols, panel_depth, packed + d * panel_cols);
    }
}

/* packed[panel][d][i] = B(from + d, col + panel panel_cols + i), zero beyond cols */
PRODUCT_PART void NAME(pack_weights)(const mmbal_kernels *kernels, const NAME(weights) * b, int64_t from, int64_t depth,
                                     int64_t col, int64_t cols, int panel_cols, OPERAND *packed) {
    if (!b->transposed) {
        OPERAND line[BLOCK_COLS];
        fetch ahead = make_fetch(b->data + from * b->stride + col, b->stride * (int64_t)sizeof(STORED), depth,
                                 cols * (int64_t)sizeof(STORED));
        fetch_lines_now(&ahead, FETCH_AHEAD * ahead.lines);
        for (int64_t d = 0; d < depth; d++) {
            const STORED *row = b->data + (from + d) * b->stride + col;
            fetch_lines_now(&ahead, ahead.lines);
#if OPERAND_IS_STORED
            (void)line;
            NAME(deal)(row, cols, panel_cols, depth, packed + d * panel_cols);
#else
            NAME(stored_to_operands)(kernels, cols, row, line);
            NAME(deal)(line, cols, panel_cols, depth, packed + d * panel_cols);
#endif
        }
        return;
    }
    for (int64_t left = 0; left < cols; left += panel_cols, packed += panel_cols * depth) {
        const int64_t here = least(panel_cols, cols - left);
        const STORED *columns = b->data + (col + left) * b->stride + from;
        if (here < panel_cols) memset(packed, 0, sizeof(OPERAND) * (size_t)(panel_cols * depth));
#if OPERAND_IS_STORED
        TRANSPOSE(kernels, columns, b->stride, here, depth, packed, panel_cols);
#else
        OPERAND lines[4 * NAME(MOST_DEPTH)];
        for (int64_t i = 0; i < here; i += 4) { /* four columns are converted, then transposed */
            const int64_t wide = least(4, here - i);
            for (int64_t k = 0; k < wide; k++)
                NAME(stored_to_operands)(kernels, depth, columns + (i + k) * b->stride, lines + k * NAME(MOST_DEPTH));
            TRANSPOSE(kernels, lines, NAME(MOST_DEPTH), wide, depth, packed + i, panel_cols);
        }
#endif
    }
}

/* packed[d][i] = rows[i, d] for as many rows as a panel has columns at most, zero beyond them */
PRODUCT_PART void NAME(pack_columns)(const mmbal_kernels *kernels, const OPERAND *rows, int64_t stride, int64_t count,
                                     int64_t depth, int64_t panel_cols, OPERAND *packed) {
    if (count < panel_cols) memset(packed, 0, sizeof(OPERAND) * (size_t)(panel_cols * depth));
    TRANSPOSE(kernels, rows, stride, count, depth, packed, panel_cols);
}

/* to[j, i] = from[i, j]. A few rows of `to` at a time: they are written from end to end, which the processor follows.
 */
PRODUCT_PART void NAME(turn)(const mmbal_kernels *kernels, const OPERAND *from, int64_t from_stride, int64_t rows,
                             int64_t cols, OPERAND *to, int64_t to_stride) {
    for (int64_t j = 0; j < cols; j += NAME(TURNED_AT_ONCE))
        TRANSPOSE(kernels, from + j, from_stride, rows, least(NAME(TURNED_AT_ONCE), cols - j), to + j * to_stride,
                  to_stride);
}
