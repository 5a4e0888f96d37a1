/* Tile of bfloat16 pairs by vdpbf16ps: a pair of a row of a stands in all sixteen lanes, against sixteen columns of b.
 */
#include <immintrin.h>

enum { TILE_ROWS_BF16 = TILE_ROWS, TILE_COLS_BF16 = 32 };

static inline __attribute__((always_inline)) void tile_of_bf16(const int rows, int64_t depth, const bfloat16 *a,
                                                               int64_t a_stride, const bfloat16 *b, int64_t b_stride,
                                                               float *c, int64_t c_stride, int add, fetch *ahead) {
    __m512 sum[TILE_ROWS][2];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        sum[i][0] = add ? _mm512_loadu_ps(c + i * c_stride) : _mm512_setzero_ps();
        sum[i][1] = add ? _mm512_loadu_ps(c + i * c_stride + 16) : _mm512_setzero_ps();
    }
    const bfloat16 *third[(TILE_ROWS + 2) / 3];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i += 3) third[i / 3] = a + i * a_stride;
    fetch next = *ahead;
    for (int64_t d = 0; d < depth; d += 2, b += b_stride) {
        fetch_lines(&next, next.pace);
        const __m512bh b0 = (__m512bh)_mm512_loadu_si512(b), b1 = (__m512bh)_mm512_loadu_si512(b + 32);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            int32_t word;
            memcpy(&word, third[i / 3] + i % 3 * a_stride + d, sizeof word);
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(word);
            sum[i][0] = _mm512_dpbf16_ps(sum[i][0], b0, pair);
            sum[i][1] = _mm512_dpbf16_ps(sum[i][1], b1, pair);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        _mm512_storeu_ps(c + i * c_stride, sum[i][0]);
        _mm512_storeu_ps(c + i * c_stride + 16, sum[i][1]);
    }
    *ahead = next;
}

static void tile_bf16(int rows, int64_t depth, const bfloat16 *a, int64_t a_stride, const bfloat16 *b, int64_t b_stride,
                      float *c, int64_t c_stride, int add, fetch *ahead) {
#define FOR_ROWS(n)                                                                                                    \
    case n: tile_of_bf16(n, depth, a, a_stride, b, b_stride, c, c_stride, add, ahead); return
    SWITCH_ROWS
#undef FOR_ROWS
}
