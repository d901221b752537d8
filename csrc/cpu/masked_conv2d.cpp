#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "masked_maps.h"
#include "masked_pack.h"
#include "masked_planes.h"
#include "plan.h"
#include "shared/masked_conv2d_op.h"

namespace {

using gatedconv::ConvShape;
using gatedconv::ConvTensors;
using torch::stable::Tensor;

// Threads take whole output planes (n, oc). Planes of fewer outputs together are not worth waking a thread
// for. Assumed, not timed: it takes two idle cores.
constexpr int64_t kOutputsPerTask = 4096;

template <typename T>
void run(const ConvShape& shape, const ConvTensors<T>& tensors) {
  const int64_t plane = shape.out_h * shape.out_w;
  const int64_t grain = plane >= kOutputsPerTask ? 1 : kOutputsPerTask / (plane > 0 ? plane : 1);
  torch::stable::parallel_for(0, shape.batch * shape.out_channels, grain, [&](int64_t begin, int64_t end) {
    for (int64_t i = begin; i < end; ++i) {
      for (int64_t p = 0; p < shape.out_h; ++p) {
        for (int64_t q = 0; q < shape.out_w; ++q) {
          write_output(shape, tensors, i / shape.out_channels, i % shape.out_channels, p, q);
        }
      }
    }
  });
}

// The kernels of the instruction set that the engine chose for this machine.
struct ChosenKernels {
  const gatedconv::Kernels& maps;
  const gatedconv::PlaneKernels& planes;
};

ChosenKernels choose_kernels() {
  const char* error = nullptr;
  const gatedconv::Kernels* chosen = gatedconv::choose_kernels(&error);
  STD_TORCH_CHECK(chosen, "masked_conv2d: ", error);
#if defined(__x86_64__)
  for (const auto* planes : {&gatedconv::plane_kernels_avx512, &gatedconv::plane_kernels_avx2}) {
    if (planes->lanes == chosen->lanes) return {*chosen, *planes};
  }
#endif
  return {*chosen, gatedconv::plane_kernels_portable};
}

void run_floats(const ConvShape& shape, const ConvTensors<float>& tensors,
                const std::optional<Tensor>& packed) {
  STD_TORCH_CHECK(!packed || (packed->scalar_type() == torch::headeronly::ScalarType::Float &&
                              packed->dim() == 1 && packed->stride(0) == 1),
                  "masked_conv2d: expected packed as masked_conv2d_pack makes it");
  if (shape.batch * shape.out_channels * shape.out_h * shape.out_w == 0) return;
  const ChosenKernels kernels = choose_kernels();
  const auto* kept = packed ? static_cast<const float*>(packed->const_data_ptr()) : nullptr;
  const float* tiles =
      kept ? gatedconv::kept_tiles(shape, tensors, kernels.planes, kept, packed->numel()) : nullptr;
  auto parallel = [](int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    torch::stable::parallel_for(0, count, grain, body);
  };
  const int threads = static_cast<int>(torch::stable::get_num_threads());
  if (shape.groups == 1 && tensors.mask_stride == 0) {
    gatedconv::OpenOutputs outputs;
    gatedconv::list_open_outputs(shape, 0, tensors.out_open, kernels.planes.max_outputs, outputs);
    const int64_t inputs = tensors.in_offset[1], count = static_cast<int64_t>(outputs.rows.size());
    if (gatedconv::prefer_maps(shape, inputs, count, kernels.planes.lanes, tiles != nullptr)) {
      const float* weights = tiles ? tiles + inputs * count * shape.kernel_h * shape.kernel_w : nullptr;
      return gatedconv::masked_conv2d_maps(shape, tensors, outputs, kernels.maps, kernels.planes, threads,
                                           parallel, weights);
    }
  }
  gatedconv::masked_conv2d_planes(shape, tensors, kernels.planes, threads, parallel, tiles);
}

struct OpenInputs {
  OpenInputs(const std::optional<Tensor>& in_open, int64_t channels, int64_t groups)
      : index(channels), offset(groups + 1) {
    const Tensor mask = in_open ? torch::stable::contiguous(*in_open) : Tensor();
    gatedconv::list_open_inputs(in_open ? static_cast<const bool*>(mask.const_data_ptr()) : nullptr, channels,
                                groups, index.data(), offset.data());
  }
  std::vector<int32_t> index, offset;
};

Tensor masked_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                     const Tensor& out_open, const std::optional<Tensor>& in_open,
                     const std::optional<Tensor>& residual, std::vector<int64_t> stride,
                     std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, bool relu,
                     const std::optional<Tensor>& packed, bool /* allow_tf32 */) {
  const ConvShape shape = gatedconv::conv_shape(input, weight, bias, out_open, in_open, residual, stride,
                                                padding, dilation, groups);
  const Tensor output = gatedconv::new_output(shape, input, weight);
  const Tensor mask = torch::stable::contiguous(out_open);
  const std::optional<Tensor> dense_bias =
      bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
  const OpenInputs inputs(in_open, shape.in_channels, groups);
  const auto type = input.scalar_type();
  if (type == torch::headeronly::ScalarType::Float) {
    run_floats(shape,
               gatedconv::conv_tensors<float>(shape, input, weight, dense_bias, mask, residual, output,
                                              inputs.index.data(), inputs.offset.data(), relu),
               packed);
  } else {
    STD_TORCH_CHECK(type == torch::headeronly::ScalarType::Double,
                    "masked_conv2d: expected float32 or float64");
    run(shape, gatedconv::conv_tensors<double>(shape, input, weight, dense_bias, mask, residual, output,
                                               inputs.index.data(), inputs.offset.data(), relu));
  }
  return output;
}

Tensor masked_conv2d_pack(const Tensor& weight, const Tensor& out_open, const std::optional<Tensor>& in_open,
                          int64_t groups, bool /* allow_tf32, for GPUs */) {
  STD_TORCH_CHECK(weight.dim() == 4 && weight.scalar_type() == torch::headeronly::ScalarType::Float,
                  "masked_conv2d_pack: expected 4-D float32 weight");
  STD_TORCH_CHECK(groups > 0 && weight.size(0) % groups == 0,
                  "masked_conv2d_pack: expected C_out to be a multiple of groups");
  ConvShape shape{};
  shape.in_channels = weight.size(1) * groups, shape.out_channels = weight.size(0);
  shape.kernel_h = weight.size(2), shape.kernel_w = weight.size(3), shape.groups = groups;
  for (const auto& [mask, size] :
       {std::pair{&out_open, shape.out_channels}, {in_open ? &*in_open : nullptr, shape.in_channels}}) {
    STD_TORCH_CHECK(!mask || (mask->scalar_type() == torch::headeronly::ScalarType::Bool &&
                              mask->dim() == 1 && mask->size(0) == size),
                    "masked_conv2d_pack: expected bool masks of shape (C_out) and (C_in)");
  }
  const Tensor out_mask = torch::stable::contiguous(out_open);
  const OpenInputs inputs(in_open, shape.in_channels, groups);
  ConvTensors<float> tensors{};
  tensors.weight = static_cast<const float*>(weight.const_data_ptr());
  tensors.weight_strides = gatedconv::strides4(weight);
  tensors.out_open = static_cast<const bool*>(out_mask.const_data_ptr());
  tensors.in_index = inputs.index.data(), tensors.in_offset = inputs.offset.data();
  const gatedconv::PlaneKernels& kernels = choose_kernels().planes;
  const bool keep = gatedconv::can_keep(shape, tensors);
  const int64_t floats = keep ? gatedconv::kept_floats(shape, tensors, kernels) : 0;
  Tensor packed = torch::stable::empty({floats}, weight.scalar_type(), std::nullopt, weight.device());
  if (keep) {
    gatedconv::keep_weights(shape, tensors, kernels, static_cast<float*>(packed.mutable_data_ptr()));
  }
  return packed;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gatedconv, CPU, m) {
  m.impl("masked_conv2d", TORCH_BOX(&masked_conv2d));
  m.impl("masked_conv2d_pack", TORCH_BOX(&masked_conv2d_pack));
}
