// Launches of the GPU convolution. Each number format is compiled by itself (conv_*.cu); no header of PyTorch
// is needed for that. A launch leaves its error to cudaGetLastError.
#pragma once

#include <cuda_runtime.h>

#include "shared/conv_tile.h"

namespace gatedconv {

// One tile a block; grid and shared memory as in `tile`. bf16 and tf32 need compute capability 8.0.
template <class Math>
void launch_conv(const ConvArgs& args, const ConvTile& tile, cudaStream_t stream);

// Lists the open outputs of each of `rows` masks (rows, channels): index (rows, channels), count (rows).
void launch_list_open(const bool* mask, int32_t rows, int32_t channels, int32_t* index, int32_t* count,
                      cudaStream_t stream);

// Packs a dense weight (C_out, C_in, KH, KW); in_index and in_count as in ConvArgs.
template <class Math>
void launch_pack(const void* weight, const Strides4& strides, int32_t out_channels, int32_t in_channels,
                 int32_t kernel_h, int32_t kernel_w, const int32_t* in_index, const int32_t* in_count,
                 void* packed, cudaStream_t stream);

// The direct convolution in float or double. `lists` has room for C_in + groups + 1 entries.
template <typename T>
void launch_direct(const ConvShape& shape, ConvTensors<T> tensors, const bool* in_open, int32_t* lists,
                   cudaStream_t stream);

}  // namespace gatedconv
