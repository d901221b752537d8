#include "cuda/conv_kernel.cuh"

template void gatedconv::launch_conv<gatedconv::Half>(const ConvArgs&, const ConvTile&, cudaStream_t);
template void gatedconv::launch_pack<gatedconv::Half>(const void*, const Strides4&, int32_t, int32_t, int32_t,
                                                      int32_t, const int32_t*, const int32_t*, void*,
                                                      cudaStream_t);
