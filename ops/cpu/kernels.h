/* What one instruction set brings: the tile product and the activations of a row. docs/kernels.md is the contract.
 *
 * Every instruction set compiles the same two bodies (kernels_body.h) with its own vectors and flags, in a file of its
 * own; the rest of the core is compiled for the baseline and reaches them through this table. */
#ifndef MMBAL_CPU_KERNELS_H
#define MMBAL_CPU_KERNELS_H

#include <stdint.h>

#include "mmbal/expert_mlp.h"

/* c[i, j] += sum_d a[d, i] b[d, j] for a whole tile of tile_rows x tile_cols; row i of c starts at c + i c_stride.
 *   a [depth, tile_rows], b [depth, tile_cols]: packed panels, zero where the matrix ends. Alignment: that of the type.
 * The sum runs in the order of d, so equal panels give equal bits wherever they lie. */
typedef void mmbal_tile_f32(int64_t depth, const float *a, const float *b, float *c, int64_t c_stride);
typedef void mmbal_tile_f64(int64_t depth, const double *a, const double *b, double *c, int64_t c_stride);

/* value[i] = activation(u[i]) and, where slope is not NULL, slope[i] = activation'(u[i]).
 * u may be value. float32, |u| <= 100: value within 2.5 2^-24 |u|, slope within 35 2^-24 (measured over a dense grid by
 * tests/core/test_kernels.cc). At -inf the sigmoid and Gauss activations give NaN, as torch does. */
typedef void mmbal_activate_f32(mmbal_activation activation, int64_t n, const float *u, float *value, float *slope);
typedef void mmbal_activate_f64(mmbal_activation activation, int64_t n, const double *u, double *value, double *slope);

typedef struct mmbal_kernels {
    int tile_rows_f32, tile_cols_f32, tile_rows_f64, tile_cols_f64;
    mmbal_tile_f32 *tile_f32;
    mmbal_tile_f64 *tile_f64;
    mmbal_activate_f32 *activate_f32;
    mmbal_activate_f64 *activate_f64;
} mmbal_kernels;

/* NULL when this build has no kernels for isa. */
const mmbal_kernels *mmbal_kernels_of(int isa);
const mmbal_kernels *mmbal_kernels_in_use(void);

extern const mmbal_kernels mmbal_kernels_portable, mmbal_kernels_avx2, mmbal_kernels_avx512;

#endif
