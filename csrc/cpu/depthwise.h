// Depthwise convolution over NHWC maps with a zero border.
#pragma once

#include <algorithm>
#include <utility>

#include "conv_direct.h"

namespace gatedconv::GATEDCONV_ISA {

constexpr int kMostPixels = 8;  // sums in registers: enough to hide the latency of their additions

// The operands of some channels of some pixels: the pointers are at the first ones.
struct Column {
  const float* window;
  const float* weights;
  const float* bias;
  const float* residual;  // null for none
  float* out;
  void to_channel(ptrdiff_t c) {
    window += c, weights += c, bias += c, out += c;
    if (residual) residual += c;
  }
  void to_pixel(const Step& step, ptrdiff_t x) {
    window += x * step.stride_w * step.in.pixel, out += x * step.out.pixel;
    if (residual) residual += x * step.residual.pixel;
  }
  void to_row(const Step& step, ptrdiff_t y) {
    window += y * step.stride_h * step.in.row, out += y * step.out.row;
    if (residual) residual += y * step.residual.row;
  }
};

// PX neighboring pixels. With 32 registers a row's pixels are loaded once for all taps, else they are
// operands of the multiplications.
template <int K, int S, int PX>
static inline __attribute__((always_inline)) void depthwise_tile(const Step& step, const Column& at) {
  constexpr int kRow = (PX - 1) * S + K;
  const ptrdiff_t pixel = step.in.pixel;
  const int padded = (step.out.channels + kPanel - 1) / kPanel * kPanel;
  const float *w = at.weights, *from = at.window;
  vec sum[PX];
  const vec bias = load(at.bias);
#pragma GCC unroll 8
  for (int p = 0; p < PX; ++p) sum[p] = bias;
  for (int i = 0; i < K; ++i, from += step.in.row) {
    [[maybe_unused]] vec x[kRow];
    if constexpr (kLanes == 16) {
#pragma GCC unroll 32
      for (int k = 0; k < kRow; ++k) x[k] = load(from + k * pixel);
    }
#pragma GCC unroll 7
    for (int j = 0; j < K; ++j, w += padded) {
      const vec weight = load(w);
#pragma GCC unroll 8
      for (int p = 0; p < PX; ++p) {
        sum[p] += (kLanes == 16 ? x[p * S + j] : load(from + (p * S + j) * pixel)) * weight;
      }
    }
  }
#pragma GCC unroll 8
  for (int p = 0; p < PX; ++p) {
    if (at.residual) sum[p] += load(at.residual + p * step.residual.pixel);
  }
  activate_each(sum, step.act);
#pragma GCC unroll 8
  for (int p = 0; p < PX; ++p) store(at.out + p * step.out.pixel, sum[p]);
}

// One pixel of any kernel, stride and dilation.
static inline void depthwise_pixel(const Step& step, const Column& at) {
  const int padded = (step.out.channels + kPanel - 1) / kPanel * kPanel;
  const float* w = at.weights;
  vec sum = load(at.bias);
  for (int i = 0; i < step.kernel_h; ++i) {
    for (int j = 0; j < step.kernel_w; ++j, w += padded) {
      sum +=
          load(at.window + i * step.dilation_h * step.in.row + j * step.dilation_w * step.in.pixel) * load(w);
    }
  }
  if (at.residual) sum += load(at.residual);
  store(at.out, activate(sum, step.act));
}

// Rows of tiles, or of single pixels where K is 0.
struct Extent {
  int rows, tiles, vectors;
};

template <int K, int S, int PX>
static void depthwise_tiles(const Step& step, const Column& first, Extent extent) {
  for (int y = 0; y < extent.rows; ++y) {
    for (int t = 0; t < extent.tiles; ++t) {
      for (int v = 0; v < extent.vectors; ++v) {
        Column at = first;
        at.to_row(step, y);
        at.to_pixel(step, t * PX);
        at.to_channel(v * kLanes);
        if constexpr (K > 0) {
          depthwise_tile<K, S, PX>(step, at);
        } else {
          depthwise_pixel(step, at);
        }
      }
    }
  }
}

using DepthwiseFunction = void (*)(const Step&, const Column&, Extent);

template <int K, int S, int... I>
static DepthwiseFunction pick_depthwise(int px, std::integer_sequence<int, I...>) {
  static constexpr DepthwiseFunction functions[] = {depthwise_tiles<K, S, I + 1>...};
  return functions[px - 1];
}

// Whether there are tiles for a kernel of this size and stride, or else single pixels.
static inline bool has_tiles(const Step& step) {
  return step.kernel_h == step.kernel_w && step.kernel_w >= 3 && step.kernel_w <= 7 &&
         step.kernel_w % 2 == 1 && step.dilation_h == 1 && step.dilation_w == 1 && step.stride_w <= 2;
}

static inline DepthwiseFunction depthwise_function(const Step& step, int px) {
  const auto all = std::make_integer_sequence<int, kMostPixels>();
  const bool every = step.stride_w == 1;
  if (!has_tiles(step)) return depthwise_tiles<0, 1, 1>;
  switch (step.kernel_w) {
    case 3:
      return every ? pick_depthwise<3, 1>(px, all) : pick_depthwise<3, 2>(px, all);
    case 5:
      return every ? pick_depthwise<5, 1>(px, all) : pick_depthwise<5, 2>(px, all);
    default:
      return every ? pick_depthwise<7, 1>(px, all) : pick_depthwise<7, 2>(px, all);
  }
}

// Tiles go vector by vector over some rows: of one vector, the rows under a window stay in the nearest cache,
// so that most pixels come there once, and not once for every row of the window. For a 3x3 eight rows read
// ten, 35 KiB of 16 channels at a width of 56. Four and 16 rows take 0.99 to 1.04 and 0.95 to 1.02 of the
// time (AMD EPYC, AVX-512 and AVX2, 3x3 to 7x7 at 14x14 to 56x56; of MobileNetV2 0.99 to 1.01 and 1.01).
constexpr int kStrip = 8;

static inline void conv_depthwise(const Step& step, const Part& part) {
  const int first = part.panel0 * kPanelVectors;
  const int last = std::min(vectors(step.out.channels), part.panel1 * kPanelVectors);
  const int width = step.out.width;
  // Tiles of nearly the same size: `larger` of px + 1 pixels, then those of px.
  const int pieces = has_tiles(step) ? (width + kMostPixels - 1) / kMostPixels : width;
  const int px = width / pieces, larger = width % pieces, block = has_tiles(step) ? 1 : last - first;
  const DepthwiseFunction narrow = depthwise_function(step, px);
  const DepthwiseFunction wide = larger > 0 ? depthwise_function(step, px + 1) : narrow;
  for (int64_t unit = part.unit0; unit < part.unit1;) {
    const int64_t image = unit / step.rows, y = unit % step.rows;
    const int rows = static_cast<int>(std::min({int64_t{kStrip}, step.rows - y, part.unit1 - unit}));
    const float* top = step.in.data + image * step.in.image +
                       (y * step.stride_h - step.pad_top) * step.in.row - step.pad_left * step.in.pixel;
    const Column origin{top, step.weights, step.bias, residual_at(step, image, y), step.out.at(image, y)};
    for (int v = first; v < last; v += block) {
      Column at = origin;
      at.to_channel(v * kLanes);
      wide(step, at, {rows, larger, block});
      at.to_pixel(step, larger * (px + 1));
      narrow(step, at, {rows, pieces - larger, block});
      for (int i = 0; i < rows; ++i) {
        activate_pixels(step.late, step.value, step.out.at(image, y + i) + v * kLanes, width, step.out.pixel,
                        block);
      }
    }
    unit += rows;
  }
}

}  // namespace gatedconv::GATEDCONV_ISA
