/* Includes BODY once for every way that a product of a storage dtype is taken. BODY is written in these terms:
 *   STORED   how an element lies in memory; WIDEN and NARROW convert n of them to and from REAL
 *   REAL     what sums are taken in, OF_REAL(f) f with its suffix
 *   OPERAND  how the factors of products lie between passes, OF_OPERAND(f) f with the suffix of their kernels.
 *            It has the precision of STORED: OPERAND_IS_STORED, or it is REAL and rounded.
 *   NAME(f)  f with the suffix of this way
 *   PACKING  the file that packs OPERANDs, TRANSPOSE for its words
 */
#include "bfloat16.h"
#include "float16.h"

#define COPY(kernels, n, from, to) ((void)(kernels), memcpy(to, from, (size_t)(n) * sizeof *(to)))

#define STORED float
#define REAL float
#define OPERAND float
#define OPERAND_IS_STORED 1
#define NAME(f) f##_f32
#define WIDEN COPY
#define NARROW COPY
#define OF_REAL(f) f##_f32
#define OF_OPERAND(f) f##_f32
#define PACKING "pack_elements.h"
#define TRANSPOSE transpose_32
#include BODY
#undef STORED
#undef OPERAND_IS_STORED
#undef NAME
#undef WIDEN
#undef NARROW

/* bfloat16 and float16 multiplied as float32 */
#define OPERAND_IS_STORED 0
#define STORED bfloat16
#define NAME(f) f##_bf16
#define WIDEN(kernels, n, from, to) (kernels)->widen_bf16(n, from, to)
#define NARROW(kernels, n, from, to) (kernels)->narrow_bf16(n, from, to)
#include BODY
#undef STORED
#undef NAME
#undef WIDEN
#undef NARROW

#define STORED float16
#define NAME(f) f##_f16
#define WIDEN(kernels, n, from, to) (kernels)->widen_f16(n, from, to)
#define NARROW(kernels, n, from, to) (kernels)->narrow_f16(n, from, to)
#include BODY
#undef STORED
#undef OPERAND
#undef OPERAND_IS_STORED
#undef NAME
#undef WIDEN
#undef NARROW
#undef OF_OPERAND
#undef PACKING

/* bfloat16 multiplied in pairs */
#define STORED bfloat16
#define OPERAND bfloat16
#define OPERAND_IS_STORED 1
#define NAME(f) f##_bf16_pairs
#define WIDEN(kernels, n, from, to) (kernels)->widen_bf16(n, from, to)
#define NARROW(kernels, n, from, to) (kernels)->narrow_bf16(n, from, to)
#define OF_OPERAND(f) f##_bf16
#define PACKING "pack_pairs.h"
#include BODY
#undef STORED
#undef REAL
#undef OPERAND
#undef NAME
#undef WIDEN
#undef NARROW
#undef OF_REAL
#undef OF_OPERAND
#undef PACKING
#undef TRANSPOSE

#define STORED double
#define REAL double
#define OPERAND double
#define NAME(f) f##_f64
#define WIDEN COPY
#define NARROW COPY
#define OF_REAL(f) f##_f64
#define OF_OPERAND(f) f##_f64
#define PACKING "pack_elements.h"
#define TRANSPOSE transpose_64
#include BODY
#undef STORED
#undef REAL
#undef OPERAND
#undef OPERAND_IS_STORED
#undef NAME
#undef WIDEN
#undef NARROW
#undef OF_REAL
#undef OF_OPERAND
#undef PACKING
#undef TRANSPOSE

/* Returns f's version for dtype and the kernels in use from the enclosing function. */
#define RETURN_FOR_PRODUCT(dtype, f, ...)                                                                              \
    switch (dtype) {                                                                                                   \
    case MMBAL_F32: return f##_f32(__VA_ARGS__);                                                                       \
    case MMBAL_F16: return f##_f16(__VA_ARGS__);                                                                       \
    case MMBAL_F64: return f##_f64(__VA_ARGS__);                                                                       \
    case MMBAL_BF16:                                                                                                   \
        if (mmbal_kernels_in_use()->tile_bf16) return f##_bf16_pairs(__VA_ARGS__);                                     \
        return f##_bf16(__VA_ARGS__);                                                                                  \
    }                                                                                                                  \
    return MMBAL_UNSUPPORTED
