// One thread per output. It is right on every shape and never fast; gatedconv.ops does not choose it by
// itself.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "shared/masked_conv2d_op.h"

namespace {

using gatedconv::ConvShape;
using gatedconv::ConvTensors;
using torch::stable::Tensor;

constexpr int kThreads = 256;
constexpr int64_t kMaxBlocks = 1 << 20;  // a grid-stride loop covers what is left

template <typename T>
__global__ void masked_conv2d_kernel(ConvShape shape, ConvTensors<T> tensors, int64_t count) {
  const int64_t step = static_cast<int64_t>(gridDim.x) * blockDim.x;
  for (int64_t i = static_cast<int64_t>(blockIdx.x) * blockDim.x + threadIdx.x; i < count; i += step) {
    const int64_t q = i % shape.out_w;
    const int64_t p = i / shape.out_w % shape.out_h;
    const int64_t oc = i / (shape.out_w * shape.out_h) % shape.out_channels;
    const int64_t n = i / (shape.out_w * shape.out_h * shape.out_channels);
    write_output(shape, tensors, n, oc, p, q);
  }
}

// Lists the open inputs on the device, so that the host never waits for the mask. One thread: the list is
// short.
__global__ void list_open_inputs_kernel(const bool* in_open, int64_t channels, int64_t groups, int32_t* index,
                                        int32_t* offset) {
  gatedconv::list_open_inputs(in_open, channels, groups, index, offset);
}

template <typename T>
void launch(const ConvShape& shape, const ConvTensors<T>& tensors, cudaStream_t stream) {
  const int64_t count = shape.batch * shape.out_channels * shape.out_h * shape.out_w;
  if (count == 0) return;
  const int64_t blocks = (count + kThreads - 1) / kThreads;
  masked_conv2d_kernel<T>
      <<<static_cast<unsigned>(blocks < kMaxBlocks ? blocks : kMaxBlocks), kThreads, 0, stream>>>(
          shape, tensors, count);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

Tensor masked_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                     const Tensor& out_open, const std::optional<Tensor>& in_open,
                     const std::optional<Tensor>& residual, std::vector<int64_t> stride,
                     std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, bool relu,
                     const std::optional<Tensor>& /* packed, for CPUs */) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const ConvShape shape = gatedconv::conv_shape(input, weight, bias, out_open, in_open, residual, stride,
                                                padding, dilation, groups);
  const Tensor output = gatedconv::new_output(shape, input, weight);
  const Tensor mask = torch::stable::contiguous(out_open);
  const std::optional<Tensor> dense_bias =
      bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
  const std::optional<Tensor> in_mask =
      in_open ? std::optional(torch::stable::contiguous(*in_open)) : std::nullopt;
  void* handle = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(input.get_device_index(), &handle));
  const cudaStream_t stream = static_cast<cudaStream_t>(handle);
  const Tensor lists = torch::stable::empty({shape.in_channels + groups + 1},
                                            torch::headeronly::ScalarType::Int, std::nullopt, input.device());
  int32_t* index = static_cast<int32_t*>(lists.mutable_data_ptr());
  int32_t* offset = index + shape.in_channels;
  list_open_inputs_kernel<<<1, 1, 0, stream>>>(
      in_mask ? static_cast<const bool*>(in_mask->const_data_ptr()) : nullptr, shape.in_channels, groups,
      index, offset);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  const auto type = input.scalar_type();
  if (type == torch::headeronly::ScalarType::Float) {
    launch(shape,
           gatedconv::conv_tensors<float>(shape, input, weight, dense_bias, mask, residual, output, index,
                                          offset, relu),
           stream);
  } else {
    STD_TORCH_CHECK(type == torch::headeronly::ScalarType::Double,
                    "masked_conv2d: expected float32 or float64");
    launch(shape,
           gatedconv::conv_tensors<double>(shape, input, weight, dense_bias, mask, residual, output, index,
                                           offset, relu),
           stream);
  }
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gatedconv, CUDA, m) {
  m.impl("masked_conv2d", TORCH_BOX(&masked_conv2d));
}
