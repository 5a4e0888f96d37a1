/* What the CUDA functions share. Each does what the function without _cuda in its name promises, on device memory, in
 * the order of a stream: it returns once its work is queued and never waits for the device. It allocates nothing.
 *
 * An index outside its range ends the launch with an error of the device, which shows at the next synchronisation:
 * MMBAL_INVALID_INDEX would take a wait. */
#ifndef MMBAL_CUDA_STREAM_H
#define MMBAL_CUDA_STREAM_H

#ifdef __cplusplus
extern "C" {
#endif

typedef void *mmbal_stream; /* a cudaStream_t; NULL is the default stream */

/* The first number of the current device's compute capability, such as 9 for 9.0; 0 where it cannot be had. */
int mmbal_cuda_capability_major(void);

#ifdef __cplusplus
}
#endif

#endif
