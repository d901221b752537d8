#include "cuda/experimental/resident_kernel.cuh"

template cudaError_t gatedconv::launch_resident<gatedconv::BFloat16>(const ResidentArgs&, int64_t,
                                                                     cudaStream_t);
