/* Sixteen 128-bit registers are what every 64-bit machine has: eight hold the tile. */
#define VECTOR_BYTES 16
#define TILE_ROWS 4
#define KERNELS mmbal_kernels_portable
#include "kernels_body.h"
