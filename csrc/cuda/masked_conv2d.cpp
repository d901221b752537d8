// The operators of the GPU convolution: masked_conv2d, and the parts that a plan calls one by one.
#define USE_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "cuda/conv.h"
#include "cuda/op_support.h"
#include "shared/conv_choose.h"
#include "shared/masked_conv2d_op.h"

namespace {

using namespace gatedconv;

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

// Layout of what a call prepares: lists of the open outputs of every mask and of the open inputs, counts
// behind each, then from the next 16 bytes on the packed weights. In int32.
struct Prepared {
  int64_t rows, in_rows, weights_at, size;
};

template <class Math>
Prepared prepared_layout(const ConvArgs& a, int64_t rows, int64_t in_rows) {
  const int64_t lists = rows * (a.out_channels + 1) + in_rows * (a.in_channels + 1);
  const int64_t elements = packed_size<Math>(a.in_channels, a.kernel_h * a.kernel_w, a.out_channels);
  const int64_t at = (lists + 3) / 4 * 4,
                bytes = elements * static_cast<int64_t>(sizeof(typename Math::Storage));
  return {rows, in_rows, at, at + (bytes + 3) / 4};
}

// Points a convolution at what was prepared for it.
void use_prepared(ConvArgs& a, const Prepared& p, const Tensor& kept) {
  const int32_t* at = static_cast<const int32_t*>(kept.const_data_ptr());
  a.masks = static_cast<int32_t>(p.rows), a.in_masks = static_cast<int32_t>(p.in_rows);
  a.out_index = at, a.out_count = at + p.rows * a.out_channels;
  const int32_t* inputs = a.out_count + p.rows;
  if (p.in_rows > 0) a.in_index = inputs, a.in_count = inputs + p.in_rows * a.in_channels;
  a.weights = at + p.weights_at;
}

// With one mask for all samples the weights follow its order of the inputs; with many, that of all inputs.
template <class Math>
Tensor prepare(const ConvArgs& a, const Prepared& p, const Tensor& weight, const Tensor& out_open,
               const std::optional<Tensor>& in_open) {
  const Tensor kept = ints(p.size, weight);
  int32_t* at = static_cast<int32_t*>(kept.mutable_data_ptr());
  const cudaStream_t stream = current_stream(weight);
  launch_list_open(static_cast<const bool*>(out_open.const_data_ptr()), static_cast<int32_t>(p.rows),
                   a.out_channels, at, at + p.rows * a.out_channels, stream);
  int32_t* inputs = at + p.rows * (a.out_channels + 1);
  int32_t* in_count = inputs + p.in_rows * a.in_channels;
  if (in_open) {
    launch_list_open(static_cast<const bool*>(in_open->const_data_ptr()), static_cast<int32_t>(p.in_rows),
                     a.in_channels, inputs, in_count, stream);
  }
  const bool in_order = p.in_rows == 1;
  launch_pack<Math>(weight.const_data_ptr(), strides4(weight), a.out_channels, a.in_channels, a.kernel_h,
                    a.kernel_w, in_order ? inputs : nullptr, in_order ? in_count : nullptr, at + p.weights_at,
                    stream);
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return kept;
}

std::optional<Tensor> dense(const std::optional<Tensor>& tensor) {
  return tensor ? std::optional(torch::stable::contiguous(*tensor)) : std::nullopt;
}

// in_open may be (C_in), or here (N, C_in), too.
Tensor masked_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                     const Tensor& out_open, const std::optional<Tensor>& in_open,
                     const std::optional<Tensor>& residual, std::vector<int64_t> stride,
                     std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, bool relu,
                     const std::optional<Tensor>& packed, bool allow_tf32) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  const bool loose = in_open && in_open->dim() == 2;
  const ConvShape shape = conv_shape(input, weight, bias, out_open, loose ? std::nullopt : in_open, residual,
                                     stride, padding, dilation, groups);
  STD_TORCH_CHECK(!loose || (in_open->scalar_type() == ScalarType::Bool && in_open->size(0) == shape.batch &&
                             in_open->size(1) == shape.in_channels),
                  "masked_conv2d: expected in_open to be bool of shape (C_in) or (N, C_in)");
  STD_TORCH_CHECK(on_one_device(input, in_open, packed), "masked_conv2d: expected all tensors on one device");
  const Tensor output = new_output(shape, input, weight), mask = torch::stable::contiguous(out_open);
  if (output.numel() == 0) return output;
  const std::optional<Tensor> in_mask = dense(in_open);
  const std::optional<MathKind> math = choose_math(input, allow_tf32);
  ConvArgs a = conv_args(shape, input, residual, output, relu ? ConvAct::kRelu : ConvAct::kNone);
  const int64_t rows = mask.dim() == 2 ? shape.batch : 1, in_rows = loose ? shape.batch : in_mask ? 1 : 0;
  a.masks = static_cast<int32_t>(rows), a.in_masks = static_cast<int32_t>(in_rows);
  ConvTile tile{};
  const int processors = attribute(input, cudaDevAttrMultiProcessorCount);
  if (groups != 1 || !math || !chosen_tile(a, *math, processors, tile)) {
    STD_TORCH_CHECK(!loose,
                    "masked_conv2d: no kernel for an in_open of each sample with this geometry or dtype");
    run_direct(shape, input, weight, bias, mask, in_mask, residual, output, relu);
    return output;
  }
  const std::optional<Tensor> float_bias = bias ? std::optional(as_float(*bias)) : std::nullopt;
  a.bias = float_bias ? static_cast<const float*>(float_bias->const_data_ptr()) : nullptr;
  with_math(*math, [&](auto format) {
    using Math = decltype(format);
    const Prepared p = prepared_layout<Math>(a, rows, in_rows);
    const bool given = packed && rows == 1 && in_rows <= 1 && packed->scalar_type() == ScalarType::Int &&
                       packed->numel() == p.size && packed->stride(0) == 1;
    const Tensor kept = given ? *packed : prepare<Math>(a, p, weight, mask, in_mask);
    use_prepared(a, p, kept);
    set_access<Math>(a);
    launch_conv<Math>(a, tile, current_stream(input));
  });
  STD_CUDA_KERNEL_LAUNCH_CHECK();
  return output;
}

// Makes the `packed` of these very masks and this very weight for masked_conv2d; empty where it takes none.
Tensor masked_conv2d_pack(const Tensor& weight, const Tensor& out_open, const std::optional<Tensor>& in_open,
                          int64_t groups, bool allow_tf32) {
  const torch::stable::accelerator::DeviceGuard guard(weight.get_device_index());
  STD_TORCH_CHECK(weight.dim() == 4 && out_open.dim() == 1 && out_open.scalar_type() == ScalarType::Bool &&
                      out_open.numel() == weight.size(0) &&
                      (!in_open || (in_open->dim() == 1 && in_open->scalar_type() == ScalarType::Bool &&
                                    in_open->numel() == weight.size(1) * groups)),
                  "masked_conv2d_pack: expected masks of weight's outputs and inputs");
  STD_TORCH_CHECK(on_one_device(weight, out_open, in_open),
                  "masked_conv2d_pack: expected all tensors on one device");
  const std::optional<MathKind> math = choose_math(weight, allow_tf32);
  if (groups != 1 || !math || weight.numel() == 0) return ints(0, weight);
  ConvArgs a{};
  a.out_channels = narrow32(weight.size(0)), a.in_channels = narrow32(weight.size(1));
  a.kernel_h = narrow32(weight.size(2)), a.kernel_w = narrow32(weight.size(3));
  Tensor kept;
  with_math(*math, [&](auto format) {
    using Math = decltype(format);
    const Prepared p = prepared_layout<Math>(a, 1, in_open ? 1 : 0);
    kept = prepare<Math>(a, p, weight, torch::stable::contiguous(out_open), dense(in_open));
  });
  return kept;
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

bool is_index_list(const std::optional<Tensor>& list) {
  return !list || (list->scalar_type() == ScalarType::Int && list->dim() == 1 && list->is_contiguous());
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
  STD_TORCH_CHECK(on_one_device(input, packed, bias, in_index, out_index, residual, output),
                  "conv_run: expected all tensors on one device");
  const auto as_large = [&](const Tensor& map) {
    for (int64_t dim = 0; dim < 4; ++dim) {
      if (map.dim() != 4 || map.size(dim) != output.size(dim)) return false;
    }
    return true;
  };
  STD_TORCH_CHECK((!residual || as_large(*residual)) && packed.is_contiguous(),
                  "conv_run: expected residual of the output's shape and contiguous packed weights");
  STD_TORCH_CHECK(is_index_list(in_index) && is_index_list(out_index),
                  "conv_run: expected in_index and out_index to be contiguous int32");
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
  m.impl("masked_conv2d_pack", TORCH_BOX(&masked_conv2d_pack));
  m.impl("conv_pack", TORCH_BOX(&conv_pack));
  m.impl("conv_run", TORCH_BOX(&conv_run));
}
