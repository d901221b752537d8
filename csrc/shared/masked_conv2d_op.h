// Shared by the CPU and the CUDA body of masked_conv2d: its arguments, checked and laid out.
#pragma once

#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "shared/masked_conv2d.h"

namespace gatedconv {

using torch::stable::Tensor;

inline Strides4 strides4(const Tensor& tensor) {
  return {tensor.stride(0), tensor.stride(1), tensor.stride(2), tensor.stride(3)};
}

inline bool is_on(const torch::stable::Device& device, const std::optional<Tensor>& tensor) {
  return !tensor || tensor->device() == device;
}

// The dispatcher chooses a body by one of the tensors: the others may be anywhere.
template <typename... Tensors>
bool on_one_device(const Tensor& input, const Tensors&... others) {
  return (is_on(input.device(), others) && ...);
}

// The public function has checked everything, with clearer errors; this keeps a direct call of the op from
// reading memory that is not there.
inline ConvShape conv_shape(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                            const Tensor& out_open, const std::optional<Tensor>& in_open,
                            const std::optional<Tensor>& residual, const std::vector<int64_t>& stride,
                            const std::vector<int64_t>& padding, const std::vector<int64_t>& dilation,
                            int64_t groups) {
  STD_TORCH_CHECK(input.dim() == 4 && weight.dim() == 4, "masked_conv2d: expected 4-D input and weight");
  STD_TORCH_CHECK(on_one_device(input, weight, bias, out_open, in_open, residual),
                  "masked_conv2d: expected all tensors on one device");
  STD_TORCH_CHECK(stride.size() == 2 && padding.size() == 4 && dilation.size() == 2 && groups > 0,
                  "masked_conv2d: expected 2 strides, 4 paddings, 2 dilations and at least 1 group");
  ConvShape s{input.size(0),
              input.size(1),
              input.size(2),
              input.size(3),
              weight.size(0),
              weight.size(2),
              weight.size(3),
              0,
              0,
              stride[0],
              stride[1],
              padding[0],
              padding[2],
              dilation[0],
              dilation[1],
              groups};
  STD_TORCH_CHECK(s.stride_h > 0 && s.stride_w > 0 && s.dilation_h > 0 && s.dilation_w > 0,
                  "masked_conv2d: expected positive strides and dilations");
  for (int64_t pad : padding) STD_TORCH_CHECK(pad >= 0, "masked_conv2d: expected padding of at least 0");
  const int64_t room_h = s.height + padding[0] + padding[1] - s.dilation_h * (s.kernel_h - 1) - 1;
  const int64_t room_w = s.width + padding[2] + padding[3] - s.dilation_w * (s.kernel_w - 1) - 1;
  STD_TORCH_CHECK(room_h >= 0 && room_w >= 0, "masked_conv2d: the kernel is larger than the padded input");
  s.out_h = room_h / s.stride_h + 1;
  s.out_w = room_w / s.stride_w + 1;
  STD_TORCH_CHECK(s.in_channels == weight.size(1) * groups && s.out_channels % groups == 0,
                  "masked_conv2d: channels of input, weight and groups do not fit together");
  STD_TORCH_CHECK(
      weight.scalar_type() == input.scalar_type() &&
          (!bias || (bias->scalar_type() == input.scalar_type() && bias->numel() == s.out_channels)),
      "masked_conv2d: expected weight and bias of input's dtype and C_out biases");
  STD_TORCH_CHECK(out_open.scalar_type() == torch::headeronly::ScalarType::Bool &&
                      out_open.size(out_open.dim() - 1) == s.out_channels &&
                      (out_open.dim() == 1 || (out_open.dim() == 2 && out_open.size(0) == s.batch)),
                  "masked_conv2d: expected out_open to be bool of shape (C_out) or (N, C_out)");
  STD_TORCH_CHECK(!in_open || (in_open->scalar_type() == torch::headeronly::ScalarType::Bool &&
                               in_open->dim() == 1 && in_open->numel() == s.in_channels),
                  "masked_conv2d: expected in_open to be bool of shape (C_in)");
  STD_TORCH_CHECK(!residual || (residual->scalar_type() == input.scalar_type() && residual->dim() == 4 &&
                                residual->size(0) == s.batch && residual->size(1) == s.out_channels &&
                                residual->size(2) == s.out_h && residual->size(3) == s.out_w),
                  "masked_conv2d: expected residual of the output's shape and input's dtype");
  return s;
}

// PyTorch's own rule for a tensor whose strides fit more than one layout (c10: is_channels_last_strides_2d).
inline bool is_channels_last(const Tensor& tensor) {
  if (tensor.stride(1) == 0) return false;
  int64_t least = 0;
  for (int64_t dim : {1, 3, 2, 0}) {
    if (tensor.size(dim) == 0 || tensor.stride(dim) < least) return false;
    if (dim == 0 && least == tensor.stride(1)) return false;
    least = tensor.stride(dim) * (tensor.size(dim) > 1 ? tensor.size(dim) : 1);
  }
  return true;
}

inline Tensor new_output(const ConvShape& s, const Tensor& input, const Tensor& weight) {
  const bool last = is_channels_last(input) || is_channels_last(weight);
  const auto format =
      last ? torch::headeronly::MemoryFormat::ChannelsLast : torch::headeronly::MemoryFormat::Contiguous;
  return torch::stable::empty({s.batch, s.out_channels, s.out_h, s.out_w}, input.scalar_type(), std::nullopt,
                              input.device(), std::nullopt, format);
}

template <typename T>
ConvTensors<T> conv_tensors(const ConvShape& s, const Tensor& input, const Tensor& weight,
                            const std::optional<Tensor>& bias, const Tensor& out_open,
                            const std::optional<Tensor>& residual, const Tensor& output,
                            const int32_t* in_index, const int32_t* in_offset, bool relu) {
  return {static_cast<const T*>(input.const_data_ptr()),
          static_cast<const T*>(weight.const_data_ptr()),
          bias ? static_cast<const T*>(bias->const_data_ptr()) : nullptr,
          residual ? static_cast<const T*>(residual->const_data_ptr()) : nullptr,
          static_cast<T*>(output.mutable_data_ptr()),
          static_cast<const bool*>(out_open.const_data_ptr()),
          in_index,
          in_offset,
          strides4(input),
          strides4(weight),
          residual ? strides4(*residual) : Strides4{},
          strides4(output),
          out_open.dim() == 2 ? s.out_channels : 0,
          relu};
}

}  // namespace gatedconv
