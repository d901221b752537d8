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

// For each channel of a pixel its place among the open ones; -1 for closed ones, which are zeros.
using Spread = std::vector<int32_t>;

struct PlaneKernels {
  int lanes;        // pixels in a register
  int max_outputs;  // of a tile
  void (*run)(const PlaneTile& tile);
  // Pixels of `count` neighboring channels into one plane for each; a null plane is left out.
  void (*to_planes)(const float* from, ptrdiff_t pixel_stride, int64_t pixels, float* const* planes,
                    int64_t count);
  // `pixels` pixels from `first` on of `count` planes, null for zeros, into channels side by side.
  void (*from_planes)(float* const* planes, int64_t count, int64_t first, int64_t pixels, float* to,
                      ptrdiff_t channel_stride, ptrdiff_t pixel_stride);
  // `pixels` of `count` planes, their count a multiple of 16 and null for zeros, into a map with rows of
  // `width` pixels.
  void (*planes_to_map)(const float* const* planes, int64_t count, int64_t pixels, int64_t width, float* to,
                        ptrdiff_t pixel_stride, ptrdiff_t row_stride);
  // The first `count` channels of a row of pixels, each a multiple of 16 floats, into planes; a null plane is
  // left out.
  void (*map_to_planes)(const float* from, ptrdiff_t pixel_stride, int64_t pixels, float* const* planes,
                        int64_t count);
  // Open channels to their places among `channels`; `from` may be read one register beyond a pixel.
  void (*spread)(const float* from, ptrdiff_t pixel_stride, int64_t pixels, float* to, int64_t channels,
                 const Spread& places);
  // A panel of 3x3 filters [9][inputs][16] into those of Winograd's F(4x4) [36][inputs][16].
  void (*winograd_weights)(const float* panel, int64_t inputs, float* to);
};

extern const PlaneKernels plane_kernels_portable;
extern const PlaneKernels plane_kernels_avx2;
extern const PlaneKernels plane_kernels_avx512;

// Calls body(begin, end) over [0, count) in chunks of at least `grain`, on several threads or on one.
using ParallelFor =
    std::function<void(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>&)>;

// Adds the residual to rows [begin, end) of an output of any strides, and applies the ReLU.
void finish_rows(const ConvShape& s, const ConvTensors<float>& t, int64_t n, int64_t begin, int64_t end);

// Runs a whole masked convolution of floats; `threads` is how many of them `parallel` has. `tiles` are
// weights that kept_tiles has found (masked_pack.h), or null for packing them here.
void masked_conv2d_planes(const ConvShape& shape, const ConvTensors<float>& tensors,
                          const PlaneKernels& kernels, int threads, const ParallelFor& parallel,
                          const float* tiles = nullptr);

}  // namespace gatedconv
