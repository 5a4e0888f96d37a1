#ifndef MMBAL_MODALITIES_H
#define MMBAL_MODALITIES_H

/* The most modalities M that the operators on [N, M] take: a row fits a tile on the stack. */
enum { MMBAL_MAX_MODALITIES = 256 };

#endif
