// Shared by the operators of the CUDA library: streams, properties of the device, the format for a dtype.
#pragma once

// Files that include this define USE_CUDA above all includes: PyTorch's headers require it.
#include <cuda_runtime.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>

#include "shared/conv_math.h"

namespace gatedconv {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;

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

inline cudaStream_t current_stream(const Tensor& tensor) {
  void* stream = nullptr;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(tensor.get_device_index(), &stream));
  return static_cast<cudaStream_t>(stream);
}

inline int attribute(const Tensor& tensor, cudaDeviceAttr which) {
  int value = 0;
  STD_CUDA_CHECK(cudaDeviceGetAttribute(&value, which, tensor.get_device_index()));
  return value;
}

// The format that multiplies tensors of a dtype on a device; nothing where the tiled kernels have none.
inline std::optional<MathKind> choose_math(const Tensor& tensor, bool allow_tf32) {
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

}  // namespace gatedconv
