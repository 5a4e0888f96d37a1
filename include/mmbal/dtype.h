#ifndef MMBAL_DTYPE_H
#define MMBAL_DTYPE_H

/* How tensors are stored. Sums are taken in float32 for MMBAL_F32 and MMBAL_BF16, in float64 for MMBAL_F64;
 * "real" in a comment means that type. */
typedef enum mmbal_dtype { MMBAL_F32 = 0, MMBAL_BF16, MMBAL_F64 } mmbal_dtype;

#endif
