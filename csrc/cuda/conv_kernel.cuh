// The kernel and its launch for one number format.
#pragma once

#include "cuda/conv.h"
#include "cuda/device_cta.cuh"

namespace gatedconv {

template <class Math, int MT, int NT>
__global__ void __launch_bounds__(kThreads)
    conv_kernel(const __grid_constant__ ConvArgs args, const __grid_constant__ ConvTile tile) {
#if defined(__CUDA_ARCH__)
  if constexpr (__CUDA_ARCH__ >= kOldest<Math>) {
    extern __shared__ __align__(16) uint8_t shared[];
    DeviceCta<Math, MT, NT> cta(shared);
    conv_tile<Math, MT, NT>(cta, args, tile, blockIdx.x, static_cast<int32_t>(blockIdx.y));
  } else {
    __trap();  // an empty kernel would leave its output as it was, without an error
  }
#endif
}

template <class Math>
__global__ void pack_kernel(const typename Math::Storage* weight, Strides4 strides, int32_t out_channels,
                            int32_t in_channels, int32_t kernel_h, int32_t kernel_w, const int32_t* in_index,
                            const int32_t* in_count, typename Math::Storage* packed, int64_t size) {
  const int32_t open = in_count == nullptr ? in_channels : *in_count;
  for (int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x; i < size;
       i += int64_t{gridDim.x} * blockDim.x) {
    packed[i] = packed_weight<Math>(i, weight, strides, out_channels, kernel_h, kernel_w, in_index, open);
  }
}

template <class Math, int MT>
void launch_tile(const ConvArgs& args, const ConvTile& tile, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(tile.pixel_tiles), static_cast<unsigned>(tile.slot_tiles));
  const size_t bytes = static_cast<size_t>(tile.shared_bytes);
  switch (tile.nt) {
    case 1:
      conv_kernel<Math, MT, 1><<<grid, kThreads, bytes, stream>>>(args, tile);
      break;
    case 2:
      conv_kernel<Math, MT, 2><<<grid, kThreads, bytes, stream>>>(args, tile);
      break;
    case 4:
      conv_kernel<Math, MT, 4><<<grid, kThreads, bytes, stream>>>(args, tile);
      break;
    default:
      conv_kernel<Math, MT, 8><<<grid, kThreads, bytes, stream>>>(args, tile);
  }
}

template <class Math>
void launch_conv(const ConvArgs& args, const ConvTile& tile, cudaStream_t stream) {
  if (tile.pixel_tiles == 0 || tile.slot_tiles == 0) return;  // an empty grid is an error
  if (tile.mt == 1) {
    launch_tile<Math, 1>(args, tile, stream);
  } else {
    launch_tile<Math, 2>(args, tile, stream);
  }
}

template <class Math>
void launch_pack(const void* weight, const Strides4& strides, int32_t out_channels, int32_t in_channels,
                 int32_t kernel_h, int32_t kernel_w, const int32_t* in_index, const int32_t* in_count,
                 void* packed, cudaStream_t stream) {
  using T = typename Math::Storage;
  const int64_t size = packed_size<Math>(in_channels, kernel_h * kernel_w, out_channels);
  if (size == 0) return;
  const int64_t blocks = (size + 255) / 256;
  pack_kernel<Math><<<static_cast<unsigned>(blocks < 4096 ? blocks : 4096), 256, 0, stream>>>(
      static_cast<const T*>(weight), strides, out_channels, in_channels, kernel_h, kernel_w, in_index,
      in_count, static_cast<T*>(packed), size);
}

}  // namespace gatedconv
