/* Thirty-two 512-bit registers: twenty-eight hold the tile, two a row of b. */
#define VECTOR_BYTES 64
#define TILE_ROWS 14
#define KERNELS mmbal_kernels_avx512
#include "kernels_body.h"
