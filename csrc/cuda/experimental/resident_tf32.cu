#include "cuda/experimental/resident_kernel.cuh"

template cudaError_t gatedconv::launch_resident<gatedconv::TensorFloat32>(const ResidentArgs&, int64_t,
                                                                          cudaStream_t);
