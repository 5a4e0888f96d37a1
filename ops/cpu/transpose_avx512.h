/* transpose_32 by squares of sixteen: a line of memory is read whole and written whole. */
#include <immintrin.h>

static inline void transpose_sixteen(const word_32 *from, int64_t from_stride, word_32 *to, int64_t to_stride) {
    __m512i row[16], pair[16], four[16];
#pragma GCC unroll 16
    for (int i = 0; i < 16; i++) row[i] = _mm512_loadu_si512(from + i * from_stride);
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 2) {
        pair[i] = _mm512_unpacklo_epi32(row[i], row[i + 1]);
        pair[i + 1] = _mm512_unpackhi_epi32(row[i], row[i + 1]);
    }
    /* four[i + k]: 128 bits l of it hold column 4 l + k of rows i .. i + 3 */
#pragma GCC unroll 16
    for (int i = 0; i < 16; i += 4) {
        four[i] = _mm512_unpacklo_epi64(pair[i], pair[i + 2]);
        four[i + 1] = _mm512_unpackhi_epi64(pair[i], pair[i + 2]);
        four[i + 2] = _mm512_unpacklo_epi64(pair[i + 1], pair[i + 3]);
        four[i + 3] = _mm512_unpackhi_epi64(pair[i + 1], pair[i + 3]);
    }
    enum { EVEN = 0x88, ODD = 0xdd }; /* of the 128-bit parts of each operand */
#pragma GCC unroll 16
    for (int k = 0; k < 4; k++) {
        const __m512i even_above = _mm512_shuffle_i32x4(four[k], four[4 + k], EVEN);
        const __m512i odd_above = _mm512_shuffle_i32x4(four[k], four[4 + k], ODD);
        const __m512i even_below = _mm512_shuffle_i32x4(four[8 + k], four[12 + k], EVEN);
        const __m512i odd_below = _mm512_shuffle_i32x4(four[8 + k], four[12 + k], ODD);
        _mm512_storeu_si512(to + k * to_stride, _mm512_shuffle_i32x4(even_above, even_below, EVEN));
        _mm512_storeu_si512(to + (4 + k) * to_stride, _mm512_shuffle_i32x4(odd_above, odd_below, EVEN));
        _mm512_storeu_si512(to + (8 + k) * to_stride, _mm512_shuffle_i32x4(even_above, even_below, ODD));
        _mm512_storeu_si512(to + (12 + k) * to_stride, _mm512_shuffle_i32x4(odd_above, odd_below, ODD));
    }
}

/* Squares where they fit, the edges by fours. */
static void transpose_by_sixteen(const void *from, int64_t from_stride, int64_t rows, int64_t cols, void *to,
                                 int64_t to_stride) {
    enum { AHEAD = 4 * 16 }; /* four lines: as many rows are more streams than the processor follows by itself */
    const int64_t whole_rows = rows / 16 * 16, whole_cols = cols / 16 * 16;
    const word_32 *source = from;
    word_32 *target = to;
    for (int64_t i = 0; i < whole_rows; i += 16) {
        for (int64_t j = 0; j < whole_cols; j += 16) {
            for (int k = 0; k < 16 && j + AHEAD < cols; k++)
                __builtin_prefetch(source + (i + k) * from_stride + j + AHEAD);
            transpose_sixteen(source + i * from_stride + j, from_stride, target + j * to_stride + i, to_stride);
        }
    }
    transpose_32(source + whole_cols, from_stride, whole_rows, cols - whole_cols, target + whole_cols * to_stride,
                 to_stride);
    transpose_32(source + whole_rows * from_stride, from_stride, rows - whole_rows, cols, target + whole_rows,
                 to_stride);
}
