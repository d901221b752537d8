// Marks functions that the CPU bodies and the CUDA kernels both compile.
#pragma once

#if defined(__CUDACC__)
#define GATEDCONV_HOST_DEVICE __host__ __device__
#else
#define GATEDCONV_HOST_DEVICE
#endif
