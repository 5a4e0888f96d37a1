/* Stands in for libtorch_cuda.so where torch has no CUDA: libmmbal_cuda.so must name that library as needed to be
 * loaded by a torch that has it, and make cuda-check loads it beside this one to read its registrations. */
int aoti_torch_get_current_cuda_stream(int device, void **stream);

int aoti_torch_get_current_cuda_stream(int device, void **stream) {
    (void)device, (void)stream;
    return 1; /* AOTI_TORCH_FAILURE */
}
