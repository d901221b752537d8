// The masked convolution over planes: one output channel at a time is a row of pixels, a register holds
// pixels, and a weight is broadcast. So any number of open outputs runs at full speed, and a closed one costs
// nothing. Independent of PyTorch.
#pragma once

#include <cstddef>
#include <cstdint>
#include <functional>
#include <vector>

#include "shared/masked_conv2d.h"

namespace gatedconv {

// A few outputs over a run of pixels: what a kernel computes in one call.
struct PlaneTile {
  const float* planes;
  const ptrdiff_t* channels;  // offset of every input channel from `planes`
  const ptrdiff_t* taps;      // offset of every tap from its channel
  int num_channels, num_taps;
  const float* weights;  // [channel][tap][outputs]
  int outputs;
  int64_t pixels;            // `planes` may be read one register beyond them
  const float* bias[8];      // one number each, or null
  const float* residual[8];  // `pixels` numbers each, or null
  float* out[8];             // `pixels` numbers each
  bool relu;
};

struct PlaneKernels {
  int lanes;        // pixels in a register
  int max_outputs;  // of a tile
  void (*run)(const PlaneTile& tile);
  // Pixels of `count` neighbouring channels into one plane for each; a null plane is left out.
  void (*to_planes)(const float* from, ptrdiff_t pixel_stride, int64_t pixels, float* const* planes,
                    int64_t count);
  // `pixels` pixels from `first` on of `count` planes, null for zeros, into channels that lie side by side.
  void (*from_planes)(float* const* planes, int64_t count, int64_t first, int64_t pixels, float* to,
                      ptrdiff_t channel_stride, ptrdiff_t pixel_stride);
};

extern const PlaneKernels plane_kernels_portable;
extern const PlaneKernels plane_kernels_avx2;
extern const PlaneKernels plane_kernels_avx512;

// Calls body(begin, end) over [0, count) in chunks of at least `grain`, on several threads or on one.
using ParallelFor =
    std::function<void(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>&)>;

// Runs a whole masked convolution of floats; `threads` is how many of them `parallel` has. `kept` is null or
// what keep_weights wrote (masked_pack.h); where it fits these tensors, nothing is packed.
void masked_conv2d_planes(const ConvShape& shape, const ConvTensors<float>& tensors,
                          const PlaneKernels& kernels, int threads, const ParallelFor& parallel,
                          const float* kept = nullptr, int64_t kept_size = 0);

}  // namespace gatedconv
