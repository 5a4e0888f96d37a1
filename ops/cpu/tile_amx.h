/* Tile of bfloat16 by AMX: 32 x 32 sums in four tile registers, two registers for each factor. A register has at most
 * sixteen rows of 64 bytes: 32 columns of a, or sixteen pairs by sixteen columns of b. The tests run this file against
 * a model of the registers (tests/core/amx_model.h). The intrinsics are those of immintrin.h. */

#include "blocks.h"

#define TILE_IN_PLACE_BF16 NULL /* a register wants pairs of rows side by side */
#define HALF_TILE_BF16 NULL

enum { TILE_ROWS_BF16 = 32, TILE_COLS_BF16 = 32, AMX_ROWS = 16, AMX_DEPTH = 32 };

/* The compiler's headers do not say which memory the instructions read, so what was written to it must be there. */
#define AMX_MEMORY_IS_READ(pointer) __asm__ volatile("" : : "r"(pointer) : "memory")

/* Intel SDM vol. 2A, LDTILECFG: what each register holds. */
typedef struct amx_config {
    uint8_t palette, start_row, reserved[14];
    uint16_t row_bytes[16];
    uint8_t rows[16];
} amx_config;

/* Registers 0 to 3 hold the sums (upper left, upper right, lower left, lower right), 4 and 5 a, 6 and 7 b. */
static inline void amx_configure(int upper, int lower, int64_t depth) {
    const int pairs = (int)(depth / 2), rows[8] = {upper, upper, lower, lower, upper, lower, pairs, pairs};
    amx_config config;
    memset(&config, 0, sizeof config);
    config.palette = 1;
    for (int i = 0; i < 8; i++) {
        config.row_bytes[i] = (uint16_t)(i == 4 || i == 5 ? 4 * pairs : 64);
        config.rows[i] = (uint8_t)(rows[i] > 0 ? rows[i] : 1);
    }
    AMX_MEMORY_IS_READ(&config);
    _tile_loadconfig(&config);
}

/* Adds depth columns, a multiple of AMX_DEPTH or at most that, to the sums in c. */
static inline void amx_sum(int upper, int lower, int64_t depth, const bfloat16 *a, int64_t a_stride, const bfloat16 *b,
                           int64_t b_stride, float *c, int64_t c_stride, fetches *ahead) {
    const int64_t step = least(depth, AMX_DEPTH), c_bytes = c_stride * (int64_t)sizeof *c;
    const int64_t a_bytes = a_stride * (int64_t)sizeof *a, b_bytes = b_stride * (int64_t)sizeof *b;
    float *below = c + AMX_ROWS * c_stride;
    amx_configure(upper, lower, step);
    _tile_loadd(0, c, c_bytes);
    _tile_loadd(1, c + AMX_ROWS, c_bytes);
    if (lower > 0) {
        _tile_loadd(2, below, c_bytes);
        _tile_loadd(3, below + AMX_ROWS, c_bytes);
    }
    for (int64_t d = 0; d < depth; d += step) {
        const bfloat16 *panel = b + d / 2 * b_stride;
        for (int64_t done = 0; done < step / 2; done += FETCH_STEPS) fetch_next(ahead);
        _tile_loadd(6, panel, b_bytes);
        _tile_loadd(7, panel + 2 * AMX_ROWS, b_bytes);
        _tile_loadd(4, a + d, a_bytes);
        _tile_dpbf16ps(0, 4, 6);
        _tile_dpbf16ps(1, 4, 7);
        if (lower > 0) {
            _tile_loadd(5, a + AMX_ROWS * a_stride + d, a_bytes);
            _tile_dpbf16ps(2, 5, 6);
            _tile_dpbf16ps(3, 5, 7);
        }
    }
    _tile_stored(0, c, c_bytes);
    _tile_stored(1, c + AMX_ROWS, c_bytes);
    if (lower > 0) {
        _tile_stored(2, below, c_bytes);
        _tile_stored(3, below + AMX_ROWS, c_bytes);
    }
    _tile_release();
}

static void tile_bf16(int rows, int64_t depth, const bfloat16 *a, int64_t a_stride, const bfloat16 *b, int64_t b_stride,
                      float *c, int64_t c_stride, tile_result result, fetches *ahead) {
    const int upper = rows < AMX_ROWS ? rows : AMX_ROWS, lower = rows - upper;
    const int64_t whole = depth / AMX_DEPTH * AMX_DEPTH, rest = depth - whole;
    if (result == TILE_SET)
        for (int i = 0; i < rows; i++) memset(c + i * c_stride, 0, TILE_COLS_BF16 * sizeof *c);
    if (whole) amx_sum(upper, lower, whole, a, a_stride, b, b_stride, c, c_stride, ahead);
    if (rest) amx_sum(upper, lower, rest, a + whole, a_stride, b + whole / 2 * b_stride, b_stride, c, c_stride, ahead);
}
