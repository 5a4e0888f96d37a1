/* transpose_32 and transpose_64: matrices of elements of that many bits. */
#ifndef MMBAL_CPU_TRANSPOSE_H
#define MMBAL_CPU_TRANSPOSE_H

#include <stdint.h>

#include "arena.h"
#include "blocks.h"

/* Clang has its own name for it, GCC has it from 12 on. */
#if defined __clang__ || __GNUC__ >= 12
#define SHUFFLE(a, b, i, j, k, l) __builtin_shufflevector(a, b, i, j, k, l)
#else
#define SHUFFLE(a, b, i, j, k, l) __builtin_shuffle(a, b, (__typeof__(a)){i, j, k, l})
#endif

#define WORD uint32_t
#define NAME(f) f##_32
#include "transpose_body.h"
#undef WORD
#undef NAME

#define WORD uint64_t
#define NAME(f) f##_64
#include "transpose_body.h"
#undef WORD
#undef NAME

#endif
