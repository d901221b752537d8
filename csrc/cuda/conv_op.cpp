// The operators of the GPU convolution: masked_conv2d, and the parts that a plan calls one by one.
#define USE_CUDA
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cuda/conv.h"
#include "shared/conv_choose.h"
#include "shared/masked_conv2d_op.h"

namespace {

using namespace gatedconv;
using torch::headeronly::ScalarType;

enum class MathKind : int64_t { kHalf, kBFloat16, kTensorFloat32, kFloat32 };

// Calls f with an object of the format's type.
template <class F>
void with_math(MathKind kind, F f) {
  switch (kind) {
    case MathKind::kHalf:
      return f(Half{});
    case MathKind::kBFloat16:
      return f(BFloat16{});
    case MathKind::kTensorFloat32:
      return f(TensorFloat32{});
    default:
      f(Float32{});
  }
}

cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

int attribute(const Tensor& tensor, cudaDeviceAttr which) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, tensor.get_device_index()));
  return value;
}

// The format that multiplies tensors of a dtype on a device; nothing where the tiled kernels have none.
std::optional<MathKind> choose_math(const Tensor& tensor, bool allow_tf32) {
  const bool ampere = attribute(tensor, cudaDevAttrComputeCapabilityMajor) >= 8;
  switch (tensor.scalar_type()) {
    case ScalarType::Half:
      return MathKind::kHalf;
    case ScalarType::BFloat16:
      return ampere ? std::optional(MathKind::kBFloat16) : std::nullopt;
    case ScalarType::Float:
      return allow_tf32 && ampere ? MathKind::kTensorFloat32 : MathKind::kFloat32;
    default:
      return std::nullopt;
  }
}

int32_t narrow32(int64_t value) {
  STD_TORCH_CHECK(value >= 0 && value < (int64_t{1} << 31), "gatedconv: a size does not fit 32 bits");
  return static_cast<int32_t>(value);
}

ConvArgs conv_args(const ConvShape& s, const Tensor& input, const std::optional<Tensor>& residual,
                   const Tensor& output, ConvAct act) {
  ConvArgs a{};
  a.input = input.const_data_ptr();
  a.residual = residual ? residual->const_data_ptr() : nullptr;
  a.output = output.mutable_data_ptr();
  a.in = strides4(input);
  a.res = residual ? strides4(*residual) : Strides4{};
  a.out = strides4(output);
  a.batch = narrow32(s.batch), a.in_channels = narrow32(s.in_channels);
  a.height = narrow32(s.height), a.width = narrow32(s.width);
  a.out_channels = narrow32(s.out_channels), a.out_h = narrow32(s.out_h), a.out_w = narrow32(s.out_w);
  a.kernel_h = narrow32(s.kernel_h), a.kernel_w = narrow32(s.kernel_w);
  a.stride_h = narrow32(s.stride_h), a.stride_w = narrow32(s.stride_w);
  a.pad_top = narrow32(s.pad_top), a.pad_left = narrow32(s.pad_left);
  a.dilation_h = narrow32(s.dilation_h), a.dilation_w = narrow32(s.dilation_w);
  a.masks = 1, a.act = act;
  return a;
}

Tensor ints(int64_t count, const Tensor& like) {
  return torch::stable::empty({count}, ScalarType::Int, std::nullopt, like.device());
}

Tensor as_float(const Tensor& bias) {
  return torch::stable::contiguous(torch::stable::to(bias, ScalarType::Float));
}

bool chosen_tile(const ConvArgs& a, MathKind math, int processors, ConvTile& tile) {
  bool fits = false;
  with_math(math, [&](auto format) { fits = choose_tile(a, kStep<decltype(format)>, processors, tile); });
  return fits;
}

void run_direct(const ConvShape& shape, const Tensor& input, const Tensor& weight,
                const std::optional<Tensor>& bias, const Tensor& out_open,
                const std::optional<Tensor>& in_open, const std::optional<Tensor>& residual,
                const Tensor& output, bool relu) {
  const bool* in_mask = in_open ? static_cast<const bool*>(in_open->const_data_ptr()) : nullptr;
  const Tensor lists = ints(shape.in_channels + shape.groups + 1, input);
  int32_t* room = static_cast<int32_t*>(lists.mutable_data_ptr());
  const auto launch = [&](auto zero) {
    using T = decltype(zero);
    const std::optional<Tensor> dense = bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
    launch_direct<T>(
        shape,
        conv_tensors<T>(shape, input, weight, dense, out_open, residual, output, nullptr, nullptr, relu),
        in_mask, room, current_stream(input));
    STD_CUDA_KERNEL_LAUNCH_CHECK();
  };
  if (input.scalar_type() == ScalarType::Float) return launch(0.0f);
  STD_TORCH_CHECK(input.scalar_type() == ScalarType::Double,
                  "masked_conv2d: no kernel for this dtype with these groups, dilations or this GPU");
  launch(0.0);
}

Tensor masked_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                     const Tensor& out_open, const std::optional<Tensor>& in_open,
                     const std::optional<Tensor>& residual, std::vector<int64_t> stride,
                     std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, bool relu,
                     const std::optional<Tensor>& /* packed, for CPUs */, bool allow_tf32) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const ConvShape shape =
      conv_shape(input, weight, bias, out_open, in_open, residual, stride, padding, dilation, groups);
  const Tensor output = new_output(shape, input, weight), mask = torch::stable::contiguous(out_open);
  if (output.numel() == 0) return output;
  const std::optional<Tensor> in_mask =
      in_open ? std::optional(torch::stable::contiguous(*in_open)) : std::nullopt;
  const std::optional<MathKind> math = choose_math(input, allow_tf32);
  ConvArgs a = conv_args(shape, input, residual, output, relu ? ConvAct::kRelu : ConvAct::kNone);
  a.masks = mask.dim() == 2 ? a.batch : 1;
  ConvTile tile{};
  const int processors = attribute(input, cudaDevAttrMultiProcessorCount);
  if (groups != 1 || !math || !chosen_tile(a, *math, processors, tile)) {
    run_direct(shape, input, weight, bias, mask, in_mask, residual, output, relu);
    return output;
  }
  const cudaStream_t stream = current_stream(input);
  // Lists of the open outputs of every mask and of the open inputs, each with its counts behind it.
  const int64_t rows = a.masks, out_size = rows * (shape.out_channels + 1);
  const Tensor lists = ints(out_size + shape.in_channels + 1, input);
  int32_t* at = static_cast<int32_t*>(lists.mutable_data_ptr());
  launch_list_open(static_cast<const bool*>(mask.const_data_ptr()), a.masks, a.out_channels, at,
                   at + rows * shape.out_channels, stream);
  a.out_index = at, a.out_count = at + rows * shape.out_channels;
  if (in_mask) {
    int32_t* inputs = at + out_size;
    launch_list_open(static_cast<const bool*>(in_mask->const_data_ptr()), 1, a.in_channels, inputs,
                     inputs + shape.in_channels, stream);
    a.in_index = inputs, a.in_count = inputs + shape.in_channels;
  }
  const std::optional<Tensor> float_bias = bias ? std::optional(as_float(*bias)) : std::nullopt;
  a.bias = float_bias ? static_cast<const float*>(float_bias->const_data_ptr()) : nullptr;
  with_math(*math, [&](auto format) {
    using Math = decltype(format);
    const int64_t size = packed_size<Math>(a.in_channels, a.kernel_h * a.kernel_w, a.out_channels);
    const Tensor packed = torch::stable::empty({size}, input.scalar_type(), std::nullopt, input.device());
    launch_pack<Math>(weight.const_data_ptr(), strides4(weight), a.out_channels, a.in_channels, a.kernel_h,
                      a.kernel_w, a.in_index, a.in_count, packed.mutable_data_ptr(), stream);
    a.weights = packed.const_data_ptr();
    set_access<Math>(a);
    launch_conv<Math>(a, tile, stream);
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}

Tensor conv_pack(const Tensor& weight, const std::optional<Tensor>& in_index, bool allow_tf32) {
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  STD_TORCH_CHECK(weight.dim() == 4, "conv_pack: expected weight (C_out, C_in, KH, KW)");
  const std::optional<MathKind> math = choose_math(weight, allow_tf32);
  STD_TORCH_CHECK(math, "conv_pack: no tensor-core format for this dtype on this GPU");
  const int32_t inputs = narrow32(weight.size(1)), taps = narrow32(weight.size(2) * weight.size(3));
  // Columns of `weight` are the listed inputs already, so packing takes them as they come.
  STD_TORCH_CHECK(!in_index || in_index->numel() == inputs, "conv_pack: expected one index for each input");
  Tensor packed;
  with_math(*math, [&](auto format) {
    using Math = decltype(format);
    packed = torch::stable::empty({packed_size<Math>(inputs, taps, narrow32(weight.size(0)))},
                                  weight.scalar_type(), std::nullopt, weight.device());
    launch_pack<Math>(weight.const_data_ptr(), strides4(weight), narrow32(weight.size(0)), inputs,
                      narrow32(weight.size(2)), narrow32(weight.size(3)), nullptr, nullptr,
                      packed.mutable_data_ptr(), current_stream(weight));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return packed;
}

// geometry: kernel, stride, padding (top, left), dilation, each vertical and horizontal.
ConvShape run_shape(const Tensor& input, const Tensor& output, const std::vector<int64_t>& g) {
  STD_TORCH_CHECK(input.dim() == 4 && output.dim() == 4 && g.size() == 8, "conv_run: expected 4-D tensors");
  for (int64_t i = 0; i < 8; ++i) {
    STD_TORCH_CHECK(g[i] >= (i == 4 || i == 5 ? 0 : 1), "conv_run: a bad geometry");
  }
  ConvShape s{
      input.size(0),  input.size(1), input.size(2), input.size(3), output.size(1), g[0], g[1], output.size(2),
      output.size(3), g[2],          g[3],          g[4],          g[5],           g[6], g[7], 1};
  return s;
}

void conv_run(const Tensor& input, const Tensor& packed, const std::optional<Tensor>& bias,
              const std::optional<Tensor>& in_index, const std::optional<Tensor>& out_index,
              const std::optional<Tensor>& residual, Tensor output, std::vector<int64_t> geometry,
              int64_t act, bool skip_closed, bool allow_tf32, int64_t mt, int64_t nt) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const ConvShape shape = run_shape(input, output, geometry);
  const std::optional<MathKind> math = choose_math(input, allow_tf32);
  STD_TORCH_CHECK(math && packed.scalar_type() == input.scalar_type() &&
                      output.scalar_type() == input.scalar_type() &&
                      (!residual || residual->scalar_type() == input.scalar_type()),
                  "conv_run: expected tensors of one dtype that this GPU multiplies");
  STD_TORCH_CHECK(output.size(0) == input.size(0) && act >= 0 && act <= 2,
                  "conv_run: bad batch or activation");
  ConvArgs a = conv_args(shape, input, residual, output, static_cast<ConvAct>(act));
  if (in_index) {
    a.in_index = static_cast<const int32_t*>(in_index->const_data_ptr());
    a.in_channels = narrow32(in_index->numel());
  }
  if (out_index) {  // a permutation of all outputs, then how many of them are open
    STD_TORCH_CHECK(out_index->numel() == shape.out_channels + 1, "conv_run: out_index has a wrong length");
    a.out_index = static_cast<const int32_t*>(out_index->const_data_ptr());
    a.out_count = a.out_index + shape.out_channels;
  }
  STD_TORCH_CHECK(!bias || (bias->scalar_type() == ScalarType::Float && bias->numel() == shape.out_channels),
                  "conv_run: expected float32 bias (C_out)");
  a.bias = bias ? static_cast<const float*>(bias->const_data_ptr()) : nullptr;
  a.weights = packed.const_data_ptr();
  a.skip_closed = skip_closed;
  if (a.batch == 0) return;
  with_math(*math, [&](auto format) {
    using Math = decltype(format);
    STD_TORCH_CHECK(
        packed.numel() == packed_size<Math>(a.in_channels, a.kernel_h * a.kernel_w, a.out_channels),
        "conv_run: packed has a wrong length");
    ConvTile tile{};
    const bool fits =
        mt == 0 ? choose_tile(a, kStep<Math>, attribute(input, cudaDevAttrMultiProcessorCount), tile)
                : choose_tile(a, kStep<Math>, static_cast<int>(mt), static_cast<int>(nt), kSharedBytes, tile);
    STD_TORCH_CHECK(fits, "conv_run: no tile of this shape fits shared memory");
    set_access<Math>(a);
    launch_conv<Math>(a, tile, current_stream(input));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gatedconv, CUDA, m) {
  m.impl("masked_conv2d", TORCH_BOX(&masked_conv2d));
  m.impl("conv_pack", TORCH_BOX(&conv_pack));
  m.impl("conv_run", TORCH_BOX(&conv_run));
}
