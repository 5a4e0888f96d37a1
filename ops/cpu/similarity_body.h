/* Blocks of similarities for one REAL: what becomes of the products of unit vectors in mmbal/alignment.h. */

/* z = products / tau, -inf where j is no candidate of i. */
static void NAME(similarity_logits)(const similarity_block *block) {
    const REAL *penalty = block->penalty, scale = (REAL)block->inverse_tau;
    for (int64_t i = 0; i < block->rows; i++) {
        const int64_t row = block->row + i, diagonal = row - block->col;
        REAL *z = (REAL *)block->z + i * block->stride;
        for (int64_t j = 0; j < block->cols; j++)
            z[j] = penalty[row] < 0 ? penalty[row] : z[j] * scale + penalty[block->col + j];
        if (!block->groups) continue;
        const int on_diagonal = diagonal >= 0 && diagonal < block->cols;
        const REAL own = on_diagonal ? z[diagonal] : 0;
        const int64_t group = block->groups[row], *groups = block->groups + block->col;
        for (int64_t j = 0; j < block->cols; j++) z[j] = groups[j] == group ? -(REAL)INFINITY : z[j];
        if (on_diagonal) z[diagonal] = own;
    }
}

/* The largest of each row and the sum of exp(z - largest); -inf and 0 where all are -inf. */
static void NAME(similarity_rows)(const similarity_block *block, void *largest, void *sum) {
    for (int64_t i = 0; i < block->rows; i++) {
        const REAL *z = (const REAL *)block->z + i * block->stride;
        REAL side[PARTS];
        for (int part = 0; part < PARTS; part++) side[part] = -(REAL)INFINITY;
        int64_t j = 0;
        for (; j + PARTS <= block->cols; j += PARTS)
            for (int part = 0; part < PARTS; part++) side[part] = z[j + part] > side[part] ? z[j + part] : side[part];
        for (int part = 0; j < block->cols; j++, part++) side[part] = z[j] > side[part] ? z[j] : side[part];
        REAL top = -(REAL)INFINITY, total = 0;
        for (int part = 0; part < PARTS; part++) top = side[part] > top ? side[part] : top;
        const REAL shift = top == -(REAL)INFINITY ? 0 : top;
        for (int part = 0; part < PARTS; part++) side[part] = 0;
        for (j = 0; j + PARTS <= block->cols; j += PARTS)
            for (int part = 0; part < PARTS; part++) side[part] += NAME(exp_nonpositive)(z[j + part] - shift);
        for (int part = 0; j < block->cols; j++, part++) side[part] += NAME(exp_nonpositive)(z[j] - shift);
        for (int part = 0; part < PARTS; part++) total += side[part];
        ((REAL *)largest)[i] = top, ((REAL *)sum)[i] = total;
    }
}

/* The same of each column. */
static void NAME(similarity_cols)(const similarity_block *block, void *largest, void *sum) {
    REAL *restrict top = largest, *restrict total = sum;
    REAL shift[SIMILARITY_COLS], part[SIMILARITY_COLS];
    for (int64_t j = 0; j < block->cols; j++) top[j] = -(REAL)INFINITY, total[j] = 0;
    for (int64_t i = 0; i < block->rows; i++) {
        const REAL *restrict z = (const REAL *)block->z + i * block->stride;
        for (int64_t j = 0; j < block->cols; j++) top[j] = z[j] > top[j] ? z[j] : top[j];
    }
    for (int64_t j = 0; j < block->cols; j++) shift[j] = top[j] == -(REAL)INFINITY ? 0 : top[j];
    for (int64_t from = 0; from < block->rows; from += SUMMED_AT_ONCE) {
        const int64_t end = from + SUMMED_AT_ONCE < block->rows ? from + SUMMED_AT_ONCE : block->rows;
        for (int64_t j = 0; j < block->cols; j++) part[j] = 0;
        for (int64_t i = from; i < end; i++) {
            const REAL *restrict z = (const REAL *)block->z + i * block->stride;
            for (int64_t j = 0; j < block->cols; j++) part[j] += NAME(exp_nonpositive)(z[j] - shift[j]);
        }
        for (int64_t j = 0; j < block->cols; j++) total[j] += part[j];
    }
}

/* z becomes the gradient of the loss for it. */
static void NAME(similarity_gradient)(const similarity_block *block, const similarity_weights *of) {
    const REAL *restrict col_normalizer = (const REAL *)of->col_normalizer + block->col;
    const REAL *restrict col_weight = (const REAL *)of->col_weight + block->col;
    for (int64_t i = 0; i < block->rows; i++) {
        const int64_t row = block->row + i, diagonal = row - block->col;
        const REAL normalizer = ((const REAL *)of->row_normalizer)[row], weight = ((const REAL *)of->row_weight)[row];
        REAL *restrict z = (REAL *)block->z + i * block->stride;
        if (of->symmetric)
            for (int64_t j = 0; j < block->cols; j++)
                z[j] = weight * NAME(exp_nonpositive)(z[j] - normalizer) +
                       col_weight[j] * NAME(exp_nonpositive)(z[j] - col_normalizer[j]);
        else
            for (int64_t j = 0; j < block->cols; j++) z[j] = weight * NAME(exp_nonpositive)(z[j] - normalizer);
        if (diagonal >= 0 && diagonal < block->cols) z[diagonal] -= weight + (of->symmetric ? col_weight[diagonal] : 0);
    }
}
