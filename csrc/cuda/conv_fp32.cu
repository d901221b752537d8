#include "cuda/conv_kernel.cuh"

template void gatedconv::launch_conv<gatedconv::Float32>(const ConvArgs&, const ConvTile&, cudaStream_t);
template void gatedconv::launch_pack<gatedconv::Float32>(const void*, const Strides4&, int32_t, int32_t,
                                                         int32_t, int32_t, const int32_t*, const int32_t*,
                                                         void*, cudaStream_t);
