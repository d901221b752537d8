// Depthwise convolution over NHWC maps with a zero border.
#pragma once

#include <algorithm>
#include <utility>

#include "conv_direct.h"

namespace gatedconv::GATEDCONV_ISA {

constexpr int kMostPixels = 8;  // sums in registers: enough to hide the latency of their additions

// PX neighboring pixels, all channels of the part. A weight is loaded once for the pixels; the input comes
// from memory, as an operand of the multiplication.
template <int K, int S, int PX>
static void depthwise_tile(const Step& step, const float* window, float* out, const float* residual,
                           int first, int last) {
  const ptrdiff_t row = step.in.row, pixel = step.in.pixel;
  const int padded = (step.out.channels + kPanel - 1) / kPanel * kPanel;
  for (int v = first; v < last; ++v) {
    const int c = v * kLanes;
    const float* w = step.weights + c;
    vec sum[PX];
    const vec bias = load(step.bias + c);
#pragma GCC unroll 8
    for (int p = 0; p < PX; ++p) sum[p] = bias;
    for (int i = 0; i < K; ++i) {
      const float* from = window + i * row + c;
#pragma GCC unroll 7
      for (int j = 0; j < K; ++j, w += padded) {
        const vec weight = load(w);
#pragma GCC unroll 8
        for (int p = 0; p < PX; ++p) sum[p] += load(from + (p * S + j) * pixel) * weight;
      }
    }
#pragma GCC unroll 8
    for (int p = 0; p < PX; ++p) {
      if (residual) sum[p] += load(residual + p * step.residual.pixel + c);
    }
    activate_each(sum, step.act);
#pragma GCC unroll 8
    for (int p = 0; p < PX; ++p) store(out + p * step.out.pixel + c, sum[p]);
  }
}

// One pixel of any kernel, stride and dilation.
static void depthwise_pixel(const Step& step, const float* window, float* out, const float* residual,
                            int first, int last) {
  const int padded = (step.out.channels + kPanel - 1) / kPanel * kPanel;
  for (int c = first * kLanes; c < last * kLanes; c += kLanes) {
    vec sum = load(step.bias + c);
    const float* w = step.weights + c;
    for (int i = 0; i < step.kernel_h; ++i) {
      for (int j = 0; j < step.kernel_w; ++j, w += padded) {
        sum += load(window + i * step.dilation_h * step.in.row + j * step.dilation_w * step.in.pixel + c) *
               load(w);
      }
    }
    if (residual) sum += load(residual + c);
    store(out + c, activate(sum, step.act));
  }
}

using DepthwiseFunction = void (*)(const Step&, const float*, float*, const float*, int, int);

template <int K, int S, int... I>
static DepthwiseFunction pick_depthwise(int px, std::integer_sequence<int, I...>) {
  static constexpr DepthwiseFunction functions[] = {depthwise_tile<K, S, I + 1>...};
  return functions[px - 1];
}

// The tile of a kernel of this size, stride and number of pixels; null if there is none.
static inline DepthwiseFunction depthwise_function(const Step& step, int px) {
  const auto all = std::make_integer_sequence<int, kMostPixels>();
  const int s = step.stride_w;
  if (step.kernel_h != step.kernel_w || step.dilation_h != 1 || step.dilation_w != 1 || s > 2) return nullptr;
  switch (step.kernel_w) {
    case 3:
      return s == 1 ? pick_depthwise<3, 1>(px, all) : pick_depthwise<3, 2>(px, all);
    case 5:
      return s == 1 ? pick_depthwise<5, 1>(px, all) : pick_depthwise<5, 2>(px, all);
    case 7:
      return s == 1 ? pick_depthwise<7, 1>(px, all) : pick_depthwise<7, 2>(px, all);
    default:
      return nullptr;
  }
}

static inline void conv_depthwise(const Step& step, const Part& part) {
  const int first = part.panel0 * kPanelVectors;
  const int last = std::min(vectors(step.out.channels), part.panel1 * kPanelVectors);
  const int width = step.out.width;
  const int pieces = depthwise_function(step, 1) ? (width + kMostPixels - 1) / kMostPixels : width;
  for (int64_t unit = part.unit0; unit < part.unit1; ++unit) {
    const int64_t image = unit / step.rows, y = unit % step.rows;
    const float* top = step.in.data + image * step.in.image +
                       (y * step.stride_h - step.pad_top) * step.in.row - step.pad_left * step.in.pixel;
    const float* residual = residual_at(step, image, y);
    float* out = step.out.at(image, y);
    for (int i = 0, x = 0; i < pieces; ++i) {
      const int px = width / pieces + (i < width % pieces);
      const DepthwiseFunction function = depthwise_function(step, px);
      (function ? function : depthwise_pixel)(
          step, top + x * step.stride_w * step.in.pixel, out + x * step.out.pixel,
          residual ? residual + x * step.residual.pixel : nullptr, first, last);
      activate_pixels(step.late, step.value, out + x * step.out.pixel + first * kLanes, px, step.out.pixel,
                      last - first);
      x += px;
    }
  }
}

}  // namespace gatedconv::GATEDCONV_ISA
