/* Includes BODY once for every way that a product of a storage dtype is taken. BODY is written in these terms:
 *   STORED   how an element lies in memory; WIDEN and NARROW convert n of them to and from REAL
 *   REAL     what sums are taken in, OF_REAL(f) f with its suffix; STORED_IS_REAL where nothing is converted
 *   OPERAND  how the factors of products lie between passes, OF_OPERAND(f) f with the suffix of their kernels.
 *            It has the precision of STORED: OPERAND_IS_STORED, or it is REAL and rounded.
 *   NAME(f)  f with the suffix of this way
 *   PACKING  the file that packs OPERANDs, TRANSPOSE for its words
 */
#include "bfloat16.h"
#include "float16.h"

/* What gemm_body.h and the packing define: not every BODY calls all of it. */
#define PRODUCT_PART static __attribute__((unused))

#define COPY(kernels, n, from, to) ((void)(kernels), memcpy(to, from, (size_t)(n) * sizeof *(to)))
#define TRANSPOSE_32(kernels, ...) (kernels)->transpose_32(__VA_ARGS__)
#define TRANSPOSE_64(kernels, ...) (kernels)->transpose_64(__VA_ARGS__)

#define NAME(f) f##_f32
#define STORED float
#define WIDEN COPY
#define NARROW COPY
#define REAL float
#define OF_REAL(f) f##_f32
#define STORED_IS_REAL 1
#define OPERAND float
#define OF_OPERAND(f) f##_f32
#define OPERAND_IS_STORED 1
#define PACKING "pack_elements.h"
#define TRANSPOSE TRANSPOSE_32
#include BODY
#include "forget_product.h"

#define NAME(f) f##_f64
#define STORED double
#define WIDEN COPY
#define NARROW COPY
#define REAL double
#define OF_REAL(f) f##_f64
#define STORED_IS_REAL 1
#define OPERAND double
#define OF_OPERAND(f) f##_f64
#define OPERAND_IS_STORED 1
#define PACKING "pack_elements.h"
#define TRANSPOSE TRANSPOSE_64
#include BODY
#include "forget_product.h"

/* bfloat16 and float16 multiplied as float32 */
#define NAME(f) f##_bf16
#define STORED bfloat16
#define WIDEN(kernels, n, from, to) (kernels)->widen_bf16(n, from, to)
#define NARROW(kernels, n, from, to) (kernels)->narrow_bf16(n, from, to)
#define REAL float
#define OF_REAL(f) f##_f32
#define STORED_IS_REAL 0
#define OPERAND float
#define OF_OPERAND(f) f##_f32
#define OPERAND_IS_STORED 0
#define PACKING "pack_elements.h"
#define TRANSPOSE TRANSPOSE_32
#include BODY
#include "forget_product.h"

#define NAME(f) f##_f16
#define STORED float16
#define WIDEN(kernels, n, from, to) (kernels)->widen_f16(n, from, to)
#define NARROW(kernels, n, from, to) (kernels)->narrow_f16(n, from, to)
#define REAL float
#define OF_REAL(f) f##_f32
#define STORED_IS_REAL 0
#define OPERAND float
#define OF_OPERAND(f) f##_f32
#define OPERAND_IS_STORED 0
#define PACKING "pack_elements.h"
#define TRANSPOSE TRANSPOSE_32
#include BODY
#include "forget_product.h"

/* bfloat16 multiplied in pairs */
#define NAME(f) f##_bf16_pairs
#define STORED bfloat16
#define WIDEN(kernels, n, from, to) (kernels)->widen_bf16(n, from, to)
#define NARROW(kernels, n, from, to) (kernels)->narrow_bf16(n, from, to)
#define REAL float
#define OF_REAL(f) f##_f32
#define STORED_IS_REAL 0
#define OPERAND bfloat16
#define OF_OPERAND(f) f##_bf16
#define OPERAND_IS_STORED 1
#define PACKING "pack_pairs.h"
#define TRANSPOSE TRANSPOSE_32
#include BODY
#include "forget_product.h"

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
