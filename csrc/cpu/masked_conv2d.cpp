#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <vector>

#include "masked_planes.h"
#include "plan.h"
#include "shared/masked_conv2d_op.h"

namespace {

using gatedconv::ConvShape;
using gatedconv::ConvTensors;
using torch::stable::Tensor;

// Threads take whole output planes (n, oc). A plane of less work than this is not worth waking a thread for.
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

// The plane kernels of the instruction set that the engine chose for this machine.
const gatedconv::PlaneKernels& plane_kernels() {
  const char* error = nullptr;
  const gatedconv::Kernels* chosen = gatedconv::choose_kernels(&error);
  STD_TORCH_CHECK(chosen, "masked_conv2d: ", error);
  for (const auto* kernels : {&gatedconv::plane_kernels_avx512, &gatedconv::plane_kernels_avx2}) {
    if (kernels->lanes == chosen->lanes) return *kernels;
  }
  return gatedconv::plane_kernels_portable;
}

void run_planes(const ConvShape& shape, const ConvTensors<float>& tensors) {
  auto parallel = [](int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
    torch::stable::parallel_for(0, count, grain, body);
  };
  gatedconv::masked_conv2d_planes(shape, tensors, plane_kernels(),
                                  static_cast<int>(torch::stable::get_num_threads()), parallel);
}

Tensor masked_conv2d(const Tensor& input, const Tensor& weight, const std::optional<Tensor>& bias,
                     const Tensor& out_open, const std::optional<Tensor>& in_open,
                     const std::optional<Tensor>& residual, std::vector<int64_t> stride,
                     std::vector<int64_t> padding, std::vector<int64_t> dilation, int64_t groups, bool relu) {
  const ConvShape shape = gatedconv::conv_shape(input, weight, bias, out_open, in_open, residual, stride,
                                                padding, dilation, groups);
  const Tensor output = gatedconv::new_output(shape, input, weight);
  const Tensor mask = torch::stable::contiguous(out_open);
  const std::optional<Tensor> dense_bias =
      bias ? std::optional(torch::stable::contiguous(*bias)) : std::nullopt;
  const std::optional<Tensor> in_mask =
      in_open ? std::optional(torch::stable::contiguous(*in_open)) : std::nullopt;
  std::vector<int32_t> index(shape.in_channels), offset(groups + 1);
  gatedconv::list_open_inputs(in_mask ? static_cast<const bool*>(in_mask->const_data_ptr()) : nullptr,
                              shape.in_channels, groups, index.data(), offset.data());
  const auto type = input.scalar_type();
  if (type == torch::headeronly::ScalarType::Float) {
    run_planes(shape, gatedconv::conv_tensors<float>(shape, input, weight, dense_bias, mask, residual, output,
                                                     index.data(), offset.data(), relu));
  } else {
    STD_TORCH_CHECK(type == torch::headeronly::ScalarType::Double,
                    "masked_conv2d: expected float32 or float64");
    run(shape, gatedconv::conv_tensors<double>(shape, input, weight, dense_bias, mask, residual, output,
                                               index.data(), offset.data(), relu));
  }
  return output;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gatedconv, CPU, m) {
  m.impl("masked_conv2d", TORCH_BOX(&masked_conv2d));
}
