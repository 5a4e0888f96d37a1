/* Functions in headers that the C core and the CUDA kernels share. */
#ifndef MMBAL_ANY_DEVICE_H
#define MMBAL_ANY_DEVICE_H

#ifdef __CUDACC__
#define MMBAL_ON_ANY_DEVICE static inline __host__ __device__
#else
#define MMBAL_ON_ANY_DEVICE static inline
#endif

#endif
