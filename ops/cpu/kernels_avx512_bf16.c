/* As kernels_avx512.c, and products of bfloat16 pairs. */
#define VECTOR_BYTES 64
#define TILE_ROWS 14
#define TILE_BF16 "tile_avx512_bf16.h"
#define KERNELS mmbal_kernels_avx512_bf16
#include "kernels_body.h"
