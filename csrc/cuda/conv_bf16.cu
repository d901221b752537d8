#include "cuda/conv_kernel.cuh"

template void gatedconv::launch_conv<gatedconv::BFloat16>(const ConvArgs&, const ConvTile&, cudaStream_t);
template void gatedconv::launch_pack<gatedconv::BFloat16>(const void*, const Strides4&, int32_t, int32_t,
                                                          int32_t, int32_t, const int32_t*, const int32_t*,
                                                          void*, cudaStream_t);
