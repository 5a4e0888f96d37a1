/* Rows of numbers for one way of taking products; see each_product.h. */

static void NAME(widen)(const mmbal_kernels *kernels, int64_t n, const STORED *from, REAL *to) {
    WIDEN(kernels, n, from, to);
}

static void NAME(narrow)(const mmbal_kernels *kernels, int64_t n, const REAL *from, STORED *to) {
    NARROW(kernels, n, from, to);
}

/* u as it is stored, n <= BLOCK_COLS: rounded, and kept where that is not NULL */
static void NAME(round_row)(const mmbal_kernels *kernels, int64_t n, REAL *u, STORED *kept, int past_caches) {
    const int64_t bytes = n * (int64_t)sizeof(STORED);
#if STORED_IS_REAL
    if (!kept) return;
    if (past_caches)
        kernels->stream(bytes, u, kept);
    else
        NARROW(kernels, n, u, kept);
#else
    STORED line[BLOCK_COLS];
    STORED *rounded = kept && !past_caches ? kept : line;
    NARROW(kernels, n, u, rounded);
    WIDEN(kernels, n, rounded, u);
    if (kept && past_caches) kernels->stream(bytes, rounded, kept);
#endif
}

/* narrow around the caches */
static void NAME(narrow_past_caches)(const mmbal_kernels *kernels, int64_t n, const REAL *from, STORED *to) {
#if STORED_IS_REAL
    kernels->stream(n * (int64_t)sizeof(STORED), from, to);
#else
    STORED line[BLOCK_COLS];
    for (int64_t i = 0; i < n; i += BLOCK_COLS) {
        const int64_t here = least(BLOCK_COLS, n - i);
        NARROW(kernels, here, from + i, line);
        kernels->stream(here * (int64_t)sizeof(STORED), line, to + i);
    }
#endif
}

#if OPERAND_IS_STORED
static void NAME(to_operands)(const mmbal_kernels *kernels, int64_t n, const REAL *from, OPERAND *to) {
    NARROW(kernels, n, from, to);
}
static void NAME(from_operands)(const mmbal_kernels *kernels, int64_t n, const OPERAND *from, REAL *to) {
    WIDEN(kernels, n, from, to);
}
static void NAME(stored_to_operands)(const mmbal_kernels *kernels, int64_t n, const STORED *from, OPERAND *to) {
    COPY(kernels, n, from, to);
}
#else
static void NAME(to_operands)(const mmbal_kernels *kernels, int64_t n, const REAL *from, OPERAND *to) {
    STORED line[BLOCK_COLS];
    for (int64_t i = 0; i < n; i += BLOCK_COLS) {
        const int64_t here = least(BLOCK_COLS, n - i);
        NARROW(kernels, here, from + i, line);
        WIDEN(kernels, here, line, to + i);
    }
}
static void NAME(from_operands)(const mmbal_kernels *kernels, int64_t n, const OPERAND *from, REAL *to) {
    COPY(kernels, n, from, to);
}
static void NAME(stored_to_operands)(const mmbal_kernels *kernels, int64_t n, const STORED *from, OPERAND *to) {
    WIDEN(kernels, n, from, to);
}
#endif

/* Multiplies the n values by the dropout mask of elements first .. first + n. */
static void NAME(mask)(const dropout *d, int64_t first, int64_t n, REAL *values) {
    double mask[BLOCK_COLS];
    if (d->probability == 0) return;
    for (int64_t from = 0; from < n; from += BLOCK_COLS) {
        const int64_t here = least(BLOCK_COLS, n - from);
        fill_mask(d, first + from, here, mask);
        for (int64_t i = 0; i < here; i++) values[from + i] *= (REAL)mask[i];
    }
}

/* Sums run in eight lanes side by side: in one alone every addition waits for the one before it. */
enum { NAME(SIDE_BY_SIDE) = 8 };

static REAL NAME(sum_of)(const REAL *side) {
    return ((side[0] + side[4]) + (side[2] + side[6])) + ((side[1] + side[5]) + (side[3] + side[7]));
}

static REAL NAME(dot)(int64_t n, const REAL *a, const REAL *b) {
    REAL side[NAME(SIDE_BY_SIDE)] = {0};
    int64_t i = 0;
    for (; i + NAME(SIDE_BY_SIDE) <= n; i += NAME(SIDE_BY_SIDE))
        for (int64_t k = 0; k < NAME(SIDE_BY_SIDE); k++) side[k] += a[i + k] * b[i + k];
    for (int64_t k = 0; i < n; i++, k++) side[k] += a[i] * b[i];
    return NAME(sum_of)(side);
}

/* start and the sum of a, by pieces of SUM_PIECE: so it may be cut there. */
static REAL NAME(sum)(const mmbal_kernels *kernels, REAL start, int64_t n, const OPERAND *a) {
    REAL sum = start;
    for (int64_t from = 0; from < n; from += SUM_PIECE) {
        const int64_t here = least(SUM_PIECE, n - from);
#if STORED_IS_REAL || !OPERAND_IS_STORED /* operands are REAL */
        sum += kernels->OF_REAL(sum)(here, a + from);
#else
        REAL line[SUM_PIECE];
        NAME(from_operands)(kernels, here, a + from, line);
        sum += kernels->OF_REAL(sum)(here, line);
#endif
    }
    return sum;
}
