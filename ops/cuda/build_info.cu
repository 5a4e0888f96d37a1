/* What this library was compiled with. No operator runs on CUDA yet. */

#define TEXT(x) #x
#define VALUE(x) TEXT(x)

#if defined(__GNUC__)
#define MMBAL_EXPORT __attribute__((visibility("default")))
#else
#define MMBAL_EXPORT
#endif

/* For example "CUDA 13.0, architectures 80-real 90-real 90-virtual"; -virtual stands for PTX. */
extern "C" MMBAL_EXPORT const char *mmbal_cuda_build_info(void) {
    return "CUDA " VALUE(__CUDACC_VER_MAJOR__) "." VALUE(
        __CUDACC_VER_MINOR__) ", architectures " MMBAL_CUDA_ARCHITECTURES;
}
