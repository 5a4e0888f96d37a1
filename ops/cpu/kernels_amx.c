/* As kernels_avx512.c, and products of bfloat16 tiles. */
#include <immintrin.h>

#define VECTOR_BYTES 64
#define TILE_ROWS 14
#define TILE_BF16 "tile_amx.h"
#define KERNELS mmbal_kernels_amx
#include "kernels_body.h"
