/* Includes BODY once for every storage dtype. BODY is written in these terms:
 *   STORED  how an element lies in memory       LOAD(s)   STORED to REAL
 *   REAL    what sums are taken in              STORE(r)  REAL to STORED, rounding
 *   NAME(f) f with the dtype's suffix           OF_REAL(f) f with the suffix of REAL
 *   EXP     exp for REAL
 */
#include <math.h>

#include "bfloat16.h"
#include "float16.h"

#define STORED float
#define REAL float
#define NAME(f) f##_f32
#define LOAD(s) (s)
#define STORE(r) (r)
#define OF_REAL(f) f##_f32
#define EXP expf
#include BODY
#undef STORED
#undef NAME
#undef LOAD
#undef STORE

#define STORED bfloat16
#define NAME(f) f##_bf16
#define LOAD(s) float_of_bfloat16(s)
#define STORE(r) bfloat16_of_float(r)
#include BODY
#undef STORED
#undef NAME
#undef LOAD
#undef STORE

#define STORED float16
#define NAME(f) f##_f16
#define LOAD(s) float_of_float16(s)
#define STORE(r) float16_of_float(r)
#include BODY
#undef STORED
#undef REAL
#undef NAME
#undef LOAD
#undef STORE
#undef OF_REAL
#undef EXP

#define STORED double
#define REAL double
#define NAME(f) f##_f64
#define LOAD(s) (s)
#define STORE(r) (r)
#define OF_REAL(f) f##_f64
#define EXP exp
#include BODY
#undef STORED
#undef REAL
#undef NAME
#undef LOAD
#undef STORE
#undef OF_REAL
#undef EXP

/* Returns f's version for dtype from the enclosing function. */
#define RETURN_FOR_DTYPE(dtype, f, ...)                                                                                \
    switch (dtype) {                                                                                                   \
    case MMBAL_F32: return f##_f32(__VA_ARGS__);                                                                       \
    case MMBAL_BF16: return f##_bf16(__VA_ARGS__);                                                                     \
    case MMBAL_F16: return f##_f16(__VA_ARGS__);                                                                       \
    case MMBAL_F64: return f##_f64(__VA_ARGS__);                                                                       \
    }                                                                                                                  \
    return MMBAL_UNSUPPORTED
