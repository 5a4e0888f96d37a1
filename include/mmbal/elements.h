/* Masks of single elements of gradients, drawn and applied without a buffer for them: weights and random words are made
 * again from the gradient and the counter in every pass (AMSS and AMSS+ with unit = element). */
#ifndef MMBAL_ELEMENTS_H
#define MMBAL_ELEMENTS_H

#include <stdint.h>

#include "mmbal/sampling.h"
#include "mmbal/units.h"

#ifdef __cplusplus
extern "C" {
#endif

/* `count` elements that lie side by side, of one dtype. */
typedef struct mmbal_elements {
    void *data;           /* [count], in and out */
    const void *gradient; /* [count]: what the importance is taken from; NULL: data */
    const void *weights;  /* [count]: the parameter, for gn_wn */
    const void *base;     /* [count] or NULL: 0; with a gradient only */
    int64_t count;
    mmbal_dtype dtype;
    int64_t modality; /* of rho[M] */
    int64_t id;       /* of the tensor, for the random words; the unit is the element's number */
} mmbal_elements;

int64_t mmbal_mask_elements_workspace(const mmbal_elements *tensors, int64_t T, const mmbal_pool *pool);

/* mmbal_mask_units and mmbal_scale_units for tensors of one segment each with single elements as units, applied in
 * place: samplers BOTTOMK (not unbiased), INDEPENDENT, TOPK and UNIFORM; MMBAL_UNSUPPORTED for the others. Keys, of
 * TOPK 1 / energy, are compared by the upper 32 bits of their float64; equal ones: the lower element. Nothing is
 * changed where any gradient is infinite or NaN, or a sum of energies is infinite. No two of `data` share memory. */
mmbal_status mmbal_mask_elements(const mmbal_elements *tensors, /* [T] */
                                 const double *rho,             /* [M] */
                                 int64_t T, int64_t M, int64_t seed, int64_t step, mmbal_importance importance,
                                 mmbal_mask_options options, void *workspace, const mmbal_pool *pool);

#ifdef __cplusplus
}
#endif
#endif
