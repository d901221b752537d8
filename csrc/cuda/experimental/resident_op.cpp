// The operator of the resident driver.
#define USE_CUDA
#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/library.h>

#include <vector>

#include "cuda/experimental/resident_launch.h"
#include "cuda/op_support.h"

namespace {

using namespace gatedconv;

Strides4 strides(const Tensor& t) {
  return {t.stride(0), t.stride(1), t.stride(2), t.stride(3)};
}

// Whether a tensor is (N, units, height, width) in whole aligned 16-byte units of channels.
bool is_map(const Tensor& t, int64_t units, int64_t height, int64_t width) {
  const int64_t unit = kUnitBytes / static_cast<int64_t>(t.element_size());
  if (t.dim() != 4 || t.size(1) != units * unit || t.size(2) != height || t.size(3) != width) return false;
  for (int64_t dim : {0, 2, 3}) {
    if (t.size(dim) > 1 && t.stride(dim) % unit != 0) return false;
  }
  return t.stride(1) == 1 && reinterpret_cast<uintptr_t>(t.const_data_ptr()) % kUnitBytes == 0;
}

// layout: ranks, ring_pieces, record_at, table_at, ring_at, shared_bytes; then units, height and width of the
// input and of the output. The stream's own content is trusted, as any address in a plan is.
void resident_run(const Tensor& input, const Tensor& stream, Tensor output, std::vector<int64_t> layout,
                  bool allow_tf32) {
  const torch::stable::accelerator::DeviceGuard guard(input.get_device_index());
  STD_TORCH_CHECK(layout.size() == 12, "resident_run: expected 12 numbers of layout");
  STD_TORCH_CHECK(input.scalar_type() == output.scalar_type() &&
                      is_map(input, layout[6], layout[7], layout[8]) &&
                      is_map(output, layout[9], layout[10], layout[11]) && output.size(0) == input.size(0),
                  "resident_run: input or output is not a map that the run was laid out for");
  STD_TORCH_CHECK(stream.scalar_type() == ScalarType::Byte && stream.dim() == 1 && stream.stride(0) == 1 &&
                      stream.numel() > 0 && stream.numel() % kPieceBytes == 0 &&
                      stream.numel() < (int64_t{1} << 31) &&
                      reinterpret_cast<uintptr_t>(stream.const_data_ptr()) % kUnitBytes == 0,
                  "resident_run: expected a stream of whole pieces");
  const std::optional<MathKind> math = choose_math(input, allow_tf32);
  STD_TORCH_CHECK(math && *math != MathKind::kFloat32, "resident_run: no tensor-core format for this dtype");
  const bool clusters = attribute(input, cudaDevAttrComputeCapabilityMajor) >= 9;
  STD_TORCH_CHECK(layout[0] >= 1 && layout[0] <= (clusters ? kMostRanks : 1) &&
                      (layout[1] == 2 || layout[1] == 4 || layout[1] == 8) && layout[5] > 0 &&
                      layout[5] <= attribute(input, cudaDevAttrMaxSharedMemoryPerBlockOptin),
                  "resident_run: this GPU has no room for the layout");
  STD_TORCH_CHECK(input.size(0) * layout[0] < (int64_t{1} << 31), "resident_run: too many images");
  ResidentArgs a{};
  a.input = input.const_data_ptr(), a.output = output.mutable_data_ptr();
  a.stream = static_cast<const uint8_t*>(stream.const_data_ptr());
  a.in = strides(input), a.out = strides(output);
  a.pieces = static_cast<int32_t>(stream.numel() / kPieceBytes);
  a.ranks = static_cast<int32_t>(layout[0]), a.ring_pieces = static_cast<int32_t>(layout[1]);
  a.record_at = static_cast<int32_t>(layout[2]), a.table_at = static_cast<int32_t>(layout[3]);
  a.ring_at = static_cast<int32_t>(layout[4]), a.shared_bytes = static_cast<int32_t>(layout[5]);
  with_math(*math, [&](auto format) {
    using Math = decltype(format);
    if constexpr (Math::kTensorCores) {
      STD_CUDA_CHECK(launch_resident<Math>(a, input.size(0), current_stream(input)));
    }
  });
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gatedconv, CUDA, m) {
  m.impl("resident_run", TORCH_BOX(&resident_run));
}
