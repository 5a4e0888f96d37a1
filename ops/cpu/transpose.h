/* transpose_32 and transpose_64: matrices of elements of that many bits. */
#ifndef MMBAL_CPU_TRANSPOSE_H
#define MMBAL_CPU_TRANSPOSE_H

#include <stdint.h>

#include "arena.h"
#include "blocks.h"

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
