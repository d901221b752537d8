// One thread per output: for what the tiled kernels do not take (groups, fp64, patches too large for shared
// memory). Right on every shape and never fast.
#include "cuda/conv.h"

namespace gatedconv {
namespace {

constexpr int kBlock = 256;
constexpr int64_t kMaxBlocks = 1 << 20;  // a grid-stride loop covers what is left

template <typename T>
__global__ void direct_kernel(ConvShape shape, ConvTensors<T> tensors, int64_t count) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const int64_t q = i % shape.out_w;
    const int64_t p = i / shape.out_w % shape.out_h;
    const int64_t oc = i / (shape.out_w * shape.out_h) % shape.out_channels;
    const int64_t n = i / (shape.out_w * shape.out_h * shape.out_channels);
    write_output(shape, tensors, n, oc, p, q);
  }
}

// One thread: the list is short.
__global__ void list_inputs_kernel(const bool* in_open, int64_t channels, int64_t groups, int32_t* index,
                                   int32_t* offset) {
  list_open_inputs(in_open, channels, groups, index, offset);
}

}  // namespace

template <typename T>
void launch_direct(const ConvShape& shape, ConvTensors<T> tensors, const bool* in_open, int32_t* lists,
                   cudaStream_t stream) {
  const int64_t count = shape.batch * shape.out_channels * shape.out_h * shape.out_w;
  if (count == 0) return;
  tensors.in_index = lists;
  tensors.in_offset = lists + shape.in_channels;
  list_inputs_kernel<<<1, 1, 0, stream>>>(in_open, shape.in_channels, shape.groups, lists,
                                          lists + shape.in_channels);
  const int64_t blocks = (count + kBlock - 1) / kBlock;
  direct_kernel<T><<<static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kBlock, 0, stream>>>(
      shape, tensors, count);
}

template void launch_direct(const ConvShape&, ConvTensors<float>, const bool*, int32_t*, cudaStream_t);
template void launch_direct(const ConvShape&, ConvTensors<double>, const bool*, int32_t*, cudaStream_t);

}  // namespace gatedconv
