/* What one instruction set brings: the tile product, transposition, and the activations and conversions of a row.
 * docs/kernels.md is the contract.
 *
 * Every instruction set compiles the same two bodies (kernels_body.h) with its own vectors and flags, in a file of its
 * own; the rest of the core is compiled for the baseline and reaches them through this table. */
#ifndef MMBAL_CPU_KERNELS_H
#define MMBAL_CPU_KERNELS_H

#include <stdint.h>

#include "bfloat16.h"
#include "blocks.h"
#include "fetch.h"
#include "mmbal/expert_mlp.h"

/* What becomes of the sums of a tile: they take the place of what c holds, are added to it, or take its place around
 * the caches (stream.h; c and its rows begin on cache lines). Tiles of bfloat16 have the first two. */
typedef enum tile_result { TILE_SET, TILE_ADD, TILE_STREAM } tile_result;

/* One tile of a product, 1 <= rows <= tile_rows, 0 <= j < tile_cols:
 *     c[i, j] = sum_d a[i, d] b[d, j]
 *   a: row i starts at a + i a_stride and is contiguous in d; b: row d starts at b + d b_stride, tile_cols elements;
 *   c: row i starts at c + i c_stride. Alignment: that of the type. Every FETCH_STEPS of d, some lines of ahead are
 *   fetched.
 * The sum runs in the order of d, so equal rows and columns give equal bits wherever they lie. */
typedef void mmbal_tile_f32(int rows, int64_t depth, const float *a, int64_t a_stride, const float *b, int64_t b_stride,
                            float *c, int64_t c_stride, tile_result result, fetches *ahead);
typedef void mmbal_tile_f64(int rows, int64_t depth, const double *a, int64_t a_stride, const double *b,
                            int64_t b_stride, double *c, int64_t c_stride, tile_result result, fetches *ahead);
/* The same with pairs of bfloat16: depth is even, row d / 2 of b is [tile_cols, 2] and starts at b + d / 2 b_stride.
 * Sums are float32; how a pair is added and rounded is the instruction's. */
typedef void mmbal_tile_bf16(int rows, int64_t depth, const bfloat16 *a, int64_t a_stride, const bfloat16 *b,
                             int64_t b_stride, float *c, int64_t c_stride, tile_result result, fetches *ahead);

/* to[j, i] = from[i, j], 0 <= i < rows, 0 <= j < cols, of elements of 32 or 64 bits at any address that is even.
 * Strides are in elements; from and to do not overlap. */
typedef void mmbal_transpose(const void *from, int64_t from_stride, int64_t rows, int64_t cols, void *to,
                             int64_t to_stride);

/* value[i] = activation(u[i]) and, where slope is not NULL, slope[i] = activation'(u[i]).
 * u may be value. float32, |u| <= 100: value within 3 2^-24 |u|, slope within 35 2^-24 (measured over a dense grid by
 * tests/core/test_kernels.cc). At -inf the sigmoid and Gauss activations give NaN, as torch does. */
typedef void mmbal_activate_f32(mmbal_activation activation, int64_t n, const float *u, float *value, float *slope);
typedef void mmbal_activate_f64(mmbal_activation activation, int64_t n, const double *u, double *value, double *slope);

/* One row of the gradient of the activation: value = activation(u), du = weight h activation'(u), *dot = <h, value>.
 * Nothing overlaps. The sums of this and of mmbal_sum run in an order that depends on n alone. */
typedef void mmbal_gradient_row_f32(mmbal_activation activation, int64_t n, const float *u, const float *h,
                                    float weight, float *value, float *du, float *dot);
typedef void mmbal_gradient_row_f64(mmbal_activation activation, int64_t n, const double *u, const double *h,
                                    double weight, double *value, double *du, double *dot);

/* sum[i] += addend[i] */
typedef void mmbal_add_f32(int64_t n, const float *addend, float *sum);
typedef void mmbal_add_f64(int64_t n, const double *addend, double *sum);

typedef float mmbal_sum_f32(int64_t n, const float *a);
typedef double mmbal_sum_f64(int64_t n, const double *a);

/* n numbers from one storage type to another, by bfloat16.h and float16.h; from and to do not overlap. */
typedef void mmbal_widen(int64_t n, const uint16_t *from, float *to);
typedef void mmbal_narrow(int64_t n, const float *from, uint16_t *to);

/* memcpy around the caches; stream_end (stream.h) makes it visible to other threads. */
typedef void mmbal_stream(int64_t bytes, const void *from, void *to);

/* to[2 i] = first[i], to[2 i + 1] = second[i]; from and to do not overlap. */
typedef void mmbal_interleave(int64_t n, const uint16_t *first, const uint16_t *second, uint16_t *to);

typedef struct mmbal_kernels {
    int tile_rows_f32, tile_cols_f32, tile_rows_f64, tile_cols_f64;
    int tile_rows_bf16, tile_cols_bf16;
    mmbal_tile_f32 *tile_f32;
    mmbal_tile_f64 *tile_f64;
    mmbal_tile_bf16 *tile_bf16; /* NULL where bfloat16 is multiplied as float32 */
    /* The same with half as many columns, tile_cols / 2 a row of b. Where these are NULL every panel is whole. */
    mmbal_tile_f32 *half_tile_f32;
    mmbal_tile_f64 *half_tile_f64;
    mmbal_tile_bf16 *half_tile_bf16;
    /* The same for b as it lies in memory, row d at b + d b_stride also for bfloat16; NULL where b must be packed. */
    mmbal_tile_f32 *tile_in_place_f32;
    mmbal_tile_f64 *tile_in_place_f64;
    mmbal_tile_bf16 *tile_in_place_bf16;
    mmbal_transpose *transpose_32, *transpose_64;
    mmbal_activate_f32 *activate_f32;
    mmbal_activate_f64 *activate_f64;
    mmbal_gradient_row_f32 *gradient_row_f32;
    mmbal_gradient_row_f64 *gradient_row_f64;
    mmbal_add_f32 *add_f32;
    mmbal_add_f64 *add_f64;
    mmbal_sum_f32 *sum_f32;
    mmbal_sum_f64 *sum_f64;
    mmbal_widen *widen_bf16, *widen_f16;
    mmbal_narrow *narrow_bf16, *narrow_f16;
    mmbal_stream *stream;
    mmbal_interleave *interleave;
} mmbal_kernels;

/* NULL when this build has no kernels for isa. */
const mmbal_kernels *mmbal_kernels_of(int isa);
const mmbal_kernels *mmbal_kernels_in_use(void);

/* How products of many rows are cut on this machine, with the kernels in use. */
blocking mmbal_blocking_in_use(void);

extern const mmbal_kernels mmbal_kernels_portable, mmbal_kernels_avx2, mmbal_kernels_avx512, mmbal_kernels_avx512_bf16,
    mmbal_kernels_amx;

#endif
