/* Turning rows [r, M] into columns [M, r] and back, for one dtype; see each_dtype.h. Columns are REAL, `stride` apart;
 * rows are STORED, or REAL for real_*. The usual numbers of modalities are constants to the compiler. */

#ifndef FOR_USUAL_WIDTHS
#define FOR_USUAL_WIDTHS(M, TURN)                                                                                      \
    switch (M) {                                                                                                       \
    case 1: TURN(1); break;                                                                                            \
    case 2: TURN(2); break;                                                                                            \
    case 3: TURN(3); break;                                                                                            \
    case 4: TURN(4); break;                                                                                            \
    case 5: TURN(5); break;                                                                                            \
    case 6: TURN(6); break;                                                                                            \
    case 7: TURN(7); break;                                                                                            \
    case 8: TURN(8); break;                                                                                            \
    default: TURN(M);                                                                                                  \
    }
#define INTO_COLUMNS(M)                                                                                                \
    for (int64_t r = 0; r < count; r++)                                                                                \
        for (int64_t m = 0; m < (M); m++) columns[m * stride + r] = FROM_ROW(rows[r * (M) + m])
#define INTO_ROWS(M)                                                                                                   \
    for (int64_t r = 0; r < count; r++)                                                                                \
        for (int64_t m = 0; m < (M); m++) rows[r * (M) + m] = TO_ROW(columns[m * stride + r])
#endif

#define FROM_ROW LOAD
#define TO_ROW STORE
static inline void NAME(columns_of)(const STORED *restrict rows, int64_t count, int64_t M, REAL *restrict columns,
                                    int64_t stride) {
    FOR_USUAL_WIDTHS(M, INTO_COLUMNS)
}

static inline void NAME(rows_of)(const REAL *restrict columns, int64_t stride, int64_t count, int64_t M,
                                 STORED *restrict rows){FOR_USUAL_WIDTHS(M, INTO_ROWS)}
#undef FROM_ROW
#undef TO_ROW

#define FROM_ROW
#define TO_ROW
static inline void NAME(real_columns_of)(const REAL *restrict rows, int64_t count, int64_t M, REAL *restrict columns,
                                         int64_t stride) {
    FOR_USUAL_WIDTHS(M, INTO_COLUMNS)
}

static inline void NAME(real_rows_of)(const REAL *restrict columns, int64_t stride, int64_t count, int64_t M,
                                      REAL *restrict rows) {
    FOR_USUAL_WIDTHS(M, INTO_ROWS)
}
#undef FROM_ROW
#undef TO_ROW

static inline void NAME(load_all)(const STORED *restrict from, int64_t count, REAL *restrict to) {
    for (int64_t r = 0; r < count; r++) to[r] = LOAD(from[r]);
}
