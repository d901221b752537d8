// Pooling: maxima and means over windows, clipped to the image, of fixed size or as many as the output has
// pixels.
#pragma once

#include <algorithm>
#include <limits>

#include "simd.h"

namespace gatedconv::GATEDCONV_ISA {

// Pixels [begin, end) of a line under one output pixel, and how many an average divides by.
struct Window {
  int begin, end, count;
};

static inline Window window(int64_t at, int size, int kernel, int stride, int pad, bool adaptive,
                            bool padded) {
  if (adaptive) {  // `kernel` is the size of the output
    const int begin = static_cast<int>(at * size / kernel),
              end = static_cast<int>(((at + 1) * size + kernel - 1) / kernel);
    return {begin, end, end - begin};
  }
  const int from = static_cast<int>(at) * stride - pad;
  const int begin = std::max(from, 0), end = std::min(from + kernel, size);
  return {begin, end, padded ? std::min(from + kernel, size + pad) - from : end - begin};
}

static inline void pool(const Step& step, const Part& part) {
  const bool max = step.op == Op::kMaxPool || step.op == Op::kAdaptiveMaxPool;
  const bool adaptive = step.op == Op::kAdaptiveMaxPool || step.op == Op::kAdaptiveAvgPool;
  const int last = std::min(vectors(step.out.channels), part.panel1 * kPanelVectors);
  for (int64_t unit = part.unit0; unit < part.unit1; ++unit) {
    const int64_t image = unit / step.rows, y = unit % step.rows;
    const Window down =
        window(y, step.in.height, step.kernel_h, step.stride_h, step.pad_top, adaptive, step.option & 1);
    for (int x = 0; x < step.out.width; ++x) {
      const Window across =
          window(x, step.in.width, step.kernel_w, step.stride_w, step.pad_left, adaptive, step.option & 1);
      const float scale = 1.0f / (static_cast<float>(down.count) * across.count);
      for (int v = part.panel0 * kPanelVectors; v < last; ++v) {
        vec sum = max ? splat(-std::numeric_limits<float>::infinity()) : vec{};
        for (int i = down.begin; i < down.end; ++i) {
          const float* from = step.in.at(image, i) + v * kLanes;
          for (int j = across.begin; j < across.end; ++j) {
            const vec value = load(from + j * step.in.pixel);
            if (max) {
              sum = ((value <= sum) | (sum != sum)) ? sum : value;  // a NaN wins and stays
            } else {
              sum += value;
            }
          }
        }
        store(step.out.at(image, y) + x * step.out.pixel + v * kLanes,
              activate(max ? sum : sum * scale, step.act));
      }
    }
  }
}

// Means of V vectors over the whole map of an image: neighboring ones together, because every pixel of one is
// a cache line of its own, and a sum waits for the one before.
template <int V>
static inline void mean_of(const Step& step, int64_t image, int channel) {
  const float scale = 1.0f / (static_cast<float>(step.in.height) * step.in.width);
  vec total[V] = {};
  for (int y = 0; y < step.in.height; ++y) {  // a sum of row sums rounds less than one long sum
    const float* from = step.in.at(image, y) + channel;
    vec sum[V] = {};
    for (int x = 0; x < step.in.width; ++x, from += step.in.pixel) {
#pragma GCC unroll 8
      for (int v = 0; v < V; ++v) sum[v] += load(from + v * kLanes);
    }
#pragma GCC unroll 8
    for (int v = 0; v < V; ++v) total[v] += sum[v];
  }
  for (int v = 0; v < V; ++v)
    store(step.out.at(image, 0) + channel + v * kLanes, activate(total[v] * scale, step.act));
}

// Mean over the whole map: one output pixel.
static inline void pool_mean(const Step& step, const Part& part) {
  const int last = std::min(vectors(step.out.channels), part.panel1 * kPanelVectors);
  for (int64_t image = part.unit0; image < part.unit1; ++image) {
    int v = part.panel0 * kPanelVectors;
    for (; v + 4 <= last; v += 4) mean_of<4>(step, image, v * kLanes);
    for (; v < last; ++v) mean_of<1>(step, image, v * kLanes);
  }
}

}  // namespace gatedconv::GATEDCONV_ISA
