/* Penalties on the distance of a share from the one asked for, and their derivatives; the formulas are in
 * mmbal/attribution.h. */
#ifndef MMBAL_CPU_ATTRIBUTION_PENALTY_H
#define MMBAL_CPU_ATTRIBUTION_PENALTY_H

#include <math.h>

#include "mmbal/any_device.h"
#include "mmbal/attribution.h"

#define HUBER_BEND 0.1    /* half of the largest deviation from equal shares among ten modalities */
#define LEAST_SUM 0x1p-64 /* of magnitudes whose shares above 1e-12 are all normal in float32 */

MMBAL_ON_ANY_DEVICE double penalty_of(mmbal_attribution_penalty penalty, double x) {
    if (penalty == MMBAL_SQUARED) return x * x;
    if (penalty == MMBAL_L1 || fabs(x) > HUBER_BEND) return fabs(x) - (penalty == MMBAL_HUBER ? HUBER_BEND / 2 : 0);
    return x * x / (2 * HUBER_BEND);
}

MMBAL_ON_ANY_DEVICE double penalty_slope(mmbal_attribution_penalty penalty, double x) {
    if (penalty == MMBAL_SQUARED) return 2 * x;
    if (penalty == MMBAL_HUBER && fabs(x) <= HUBER_BEND) return x / HUBER_BEND;
    return x > 0 ? 1 : x < 0 ? -1 : x; /* 0 at 0, NaN at NaN */
}

MMBAL_ON_ANY_DEVICE double penalty_curvature(mmbal_attribution_penalty penalty, double x) {
    if (penalty == MMBAL_SQUARED) return 2;
    return penalty == MMBAL_HUBER && fabs(x) <= HUBER_BEND ? 1 / HUBER_BEND : 0;
}

#endif
