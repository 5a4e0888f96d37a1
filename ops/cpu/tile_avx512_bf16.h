/* Tile of bfloat16 pairs by vdpbf16ps: a pair of a row of a stands in all sixteen lanes, against sixteen columns of b.
 */
#include <immintrin.h>

enum { TILE_ROWS_BF16 = TILE_ROWS, TILE_COLS_BF16 = 32 };
#define TILE_IN_PLACE_BF16 tile_in_place_bf16
#define HALF_TILE_BF16 half_tile_bf16

/* Sixteen columns each: the first and the second half, or as unpacking leaves them: of every eight columns the first
 * four and the last four. */
typedef struct two_sums {
    __m512 first, second;
} two_sums;

enum { EVEN_QUARTERS = 0x88, ODD_QUARTERS = 0xdd, LOW_QUARTERS = 0x44, HIGH_QUARTERS = 0xee, CROSSED = 0xd8 };

static inline two_sums by_fours(two_sums c) {
    return (two_sums){_mm512_shuffle_f32x4(c.first, c.second, EVEN_QUARTERS),
                      _mm512_shuffle_f32x4(c.first, c.second, ODD_QUARTERS)};
}

static inline two_sums by_halves(two_sums c) {
    const __m512 low = _mm512_shuffle_f32x4(c.first, c.second, LOW_QUARTERS);
    const __m512 high = _mm512_shuffle_f32x4(c.first, c.second, HIGH_QUARTERS);
    return (two_sums){_mm512_shuffle_f32x4(low, low, CROSSED), _mm512_shuffle_f32x4(high, high, CROSSED)};
}

/* in_place: row d of b is [32], and two rows are interleaved in registers. */
static inline __attribute__((always_inline)) void tile_of_bf16(const int rows, const int in_place, int64_t depth,
                                                               const bfloat16 *a, int64_t a_stride, const bfloat16 *b,
                                                               int64_t b_stride, float *c, int64_t c_stride,
                                                               tile_result result, fetches *ahead) {
    two_sums sum[TILE_ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        sum[i].first = result == TILE_ADD ? _mm512_loadu_ps(c + i * c_stride) : _mm512_setzero_ps();
        sum[i].second = result == TILE_ADD ? _mm512_loadu_ps(c + i * c_stride + 16) : _mm512_setzero_ps();
        if (in_place) sum[i] = by_fours(sum[i]);
    }
    const bfloat16 *third[(TILE_ROWS + 2) / 3];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i += 3) third[i / 3] = a + i * a_stride;
    for (int64_t d = 0; d < depth; d += 2, b += in_place ? 2 * b_stride : b_stride) {
        if (d % (2 * FETCH_STEPS) == 0) fetch_next(ahead);
        const __m512i one = _mm512_loadu_si512(b), other = _mm512_loadu_si512(b + (in_place ? b_stride : 32));
        const __m512bh b0 = (__m512bh)(in_place ? _mm512_unpacklo_epi16(one, other) : one);
        const __m512bh b1 = (__m512bh)(in_place ? _mm512_unpackhi_epi16(one, other) : other);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            int32_t word;
            memcpy(&word, third[i / 3] + i % 3 * a_stride + d, sizeof word);
            const __m512bh pair = (__m512bh)_mm512_set1_epi32(word);
            sum[i].first = _mm512_dpbf16_ps(sum[i].first, b0, pair);
            sum[i].second = _mm512_dpbf16_ps(sum[i].second, b1, pair);
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) {
        if (in_place) sum[i] = by_halves(sum[i]);
        _mm512_storeu_ps(c + i * c_stride, sum[i].first);
        _mm512_storeu_ps(c + i * c_stride + 16, sum[i].second);
    }
}

static inline __attribute__((always_inline)) void half_tile_of_bf16(const int rows, int64_t depth, const bfloat16 *a,
                                                                    int64_t a_stride, const bfloat16 *b,
                                                                    int64_t b_stride, float *c, int64_t c_stride,
                                                                    tile_result result, fetches *ahead) {
    __m512 sum[TILE_ROWS];
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++)
        sum[i] = result == TILE_ADD ? _mm512_loadu_ps(c + i * c_stride) : _mm512_setzero_ps();
    for (int64_t d = 0; d < depth; d += 2, b += b_stride) {
        if (d % (2 * FETCH_STEPS) == 0) fetch_next(ahead);
        const __m512bh columns = (__m512bh)_mm512_loadu_si512(b);
#pragma GCC unroll 16
        for (int i = 0; i < rows; i++) {
            int32_t word;
            memcpy(&word, a + i * a_stride + d, sizeof word);
            sum[i] = _mm512_dpbf16_ps(sum[i], columns, (__m512bh)_mm512_set1_epi32(word));
        }
    }
#pragma GCC unroll 16
    for (int i = 0; i < rows; i++) _mm512_storeu_ps(c + i * c_stride, sum[i]);
}

#define FOR_ROWS(n)                                                                                                    \
    case n: half_tile_of_bf16(n, depth, a, a_stride, b, b_stride, c, c_stride, result, ahead); return
static void half_tile_bf16(int rows, int64_t depth, const bfloat16 *a, int64_t a_stride, const bfloat16 *b,
                           int64_t b_stride, float *c, int64_t c_stride, tile_result result,
                           fetches *ahead){SWITCH_ROWS}
#undef FOR_ROWS

#define FOR_ROWS(n)                                                                                                    \
    case n: tile_of_bf16(n, IN_PLACE, depth, a, a_stride, b, b_stride, c, c_stride, result, ahead); return
static void tile_bf16(int rows, int64_t depth, const bfloat16 *a, int64_t a_stride, const bfloat16 *b, int64_t b_stride,
                      float *c, int64_t c_stride, tile_result result, fetches *ahead) {
#define IN_PLACE 0
    SWITCH_ROWS
#undef IN_PLACE
}

static void tile_in_place_bf16(int rows, int64_t depth, const bfloat16 *a, int64_t a_stride, const bfloat16 *b,
                               int64_t b_stride, float *c, int64_t c_stride, tile_result result, fetches *ahead) {
#define IN_PLACE 1
    SWITCH_ROWS
#undef IN_PLACE
}
#undef FOR_ROWS
