// Index lists, made where they are read: the host never waits for a mask.
#include "cuda/conv.h"
#include "cuda/device_cta.cuh"

namespace gatedconv {
namespace {

// One warp a mask.
__global__ void list_open_kernel(const bool* mask, int32_t channels, int32_t* index, int32_t* count) {
  const int64_t row = blockIdx.x;
  DeviceLanes lanes;
  list_open(lanes, mask + row * channels, channels, index + row * channels, count + row);
}

}  // namespace

void launch_list_open(const bool* mask, int32_t rows, int32_t channels, int32_t* index, int32_t* count,
                      cudaStream_t stream) {
  if (rows == 0) return;
  list_open_kernel<<<static_cast<unsigned>(rows), 32, 0, stream>>>(mask, channels, index, count);
}

}  // namespace gatedconv
