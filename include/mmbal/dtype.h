#ifndef MMBAL_DTYPE_H
#define MMBAL_DTYPE_H

/* How tensors are stored. Sums are taken in float64 for MMBAL_F64, in float32 for the others; "real" in a comment means
 * that type. */
typedef enum mmbal_dtype { MMBAL_F32 = 0, MMBAL_BF16, MMBAL_F64, MMBAL_F16 } mmbal_dtype;

#endif
