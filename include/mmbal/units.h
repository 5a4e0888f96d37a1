/* Units of gradients (filters, rows, heads, ...): their energies, and their multiplication by what a mask says, for a
 * list of tensors in one pass (AMSS: Yang et al., TPAMI 47(6), 2025, arXiv 2404.08347). */
#ifndef MMBAL_UNITS_H
#define MMBAL_UNITS_H

#include <stdint.h>

#include "mmbal/dtype.h"
#include "mmbal/pool.h"
#include "mmbal/status.h"

#ifdef __cplusplus
extern "C" {
#endif

/* A tensor seen as units: element (g, u, o, i) lies at data[g stride[0] + u stride[1] + o stride[2] + i stride[3]], in
 * elements. Unit u of group g is all its (o, i); a group is drawn from by itself. Sorted by
 * stride, every axis steps over all that the axes before it reach, so that no element occurs twice;
 * MMBAL_INVALID_ARGUMENT otherwise. No two tensors of a list that is written share memory.
 *   filters of [Cout, Cin, h, w]       size {1, Cout, 1, Cin h w}
 *   H heads as rows of [R, C]          size {1, H, 1, R/H C}
 *   H heads as columns of [R, C]       size {1, H, R, C/H}, stride {.., C/H, C, 1}
 *   columns c .. c+D of a head [K, W]  size {K, D, 1, 1},   stride {W, 1, .., ..}, data at column c */
typedef struct mmbal_units {
    void *data;
    mmbal_dtype dtype;
    int64_t size[4], stride[4]; /* groups, units, outer, inner; all >= 0 */
} mmbal_units;

/* Of G, the tensors' values, and W, those of the parameters of the same units:
 *   gn       E[u] = sum G^2
 *   sqrt_gn  E[u] = sqrt(sum G^2)
 *   gn_wn    E[u] = sum G^2 / (sum W^2 + 2^-126) */
typedef enum mmbal_importance { MMBAL_GN = 0, MMBAL_SQRT_GN, MMBAL_GN_WN } mmbal_importance;

/* What every function on units checks first: MMBAL_UNSUPPORTED for another dtype, MMBAL_INVALID_ARGUMENT where axes are
 * not as above or `others` ([T], or NULL) differ in their sizes. */
mmbal_status mmbal_check_units(const mmbal_units *tensors, const mmbal_units *others, int64_t T);

int64_t mmbal_unit_energy_workspace(const mmbal_units *tensors, int64_t T);

/* energy[U]: of each tensor groups x units of them, in order. Squares and sums are float64, in an order that depends on
 * the shapes alone; nothing of float32 over- or underflows. *nonfinite = 1 where a value of a tensor is infinite or NaN
 * (or an energy of float64 values is infinite, or a weight is NaN), else 0. weights: the parameters, for gn_wn; NULL
 * otherwise. */
mmbal_status mmbal_unit_energy(const mmbal_units *tensors,                             /* [T], read */
                               const mmbal_units *weights,                             /* [T] or NULL */
                               int64_t T, mmbal_importance importance, double *energy, /* [U] out */
                               uint8_t *nonfinite,                                     /* [1] out */
                               void *workspace, const mmbal_pool *pool);

int64_t mmbal_scale_units_workspace(int64_t T);

/* Each unit's values x become scale x, or base + scale (x - base) where bases are given: 0 (base) where scale = 0
 * whatever x holds, untouched where scale = 1. Computed in real, rounded once; what the dtype cannot hold (float16:
 * from 65520 on) becomes infinite. */
mmbal_status mmbal_scale_units(const mmbal_units *tensors,     /* [T], in and out */
                               const mmbal_units *bases,       /* [T] of the same dtypes and sizes, or NULL */
                               int64_t T, const double *scale, /* [U] */
                               void *workspace, const mmbal_pool *pool);

#ifdef __cplusplus
}
#endif
#endif
