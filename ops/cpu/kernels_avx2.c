/* Sixteen 256-bit registers: twelve hold the tile, two a row of b, one an element of a. */
#define VECTOR_BYTES 32
#define TILE_ROWS 6
#define KERNELS mmbal_kernels_avx2
#include "kernels_body.h"
