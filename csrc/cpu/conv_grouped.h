// Convolution in groups of 8 channels, over NHWC maps with a zero border.
//
// A panel of 16 outputs belongs to two groups, and each of them reads 8 inputs of its own: as a direct
// convolution of 16 inputs half of the products would be with zeros. Here the lanes of a vector alternate
// between the two groups, so that one load of two inputs serves all of their outputs. The rows in use are
// copied with their channels interleaved; the sums return to the groups' order at the end.
#pragma once

#include <algorithm>
#include <utility>

#include "conv_direct.h"

namespace gatedconv::GATEDCONV_ISA {

constexpr int kGroup = kPanel / 2;

typedef int64_t pairs __attribute__((vector_size(4 * GATEDCONV_LANES)));

// Two neighboring floats again and again.
static inline vec splat_pair(const float* from) {
  int64_t pair;
  __builtin_memcpy(&pair, from, sizeof(pair));
  return reinterpret_cast<vec>(pairs{} + pair);
}

// 16 channels, one of each group in turn; those from `channels` on are zeros.
static inline void interleave(const float* from, int channels, float* to) {
  if (channels >= kPanel) {
#if GATEDCONV_LANES == 16 && !defined(__clang__)
    store(to,
          __builtin_shuffle(load(from), lanes_of_int{0, 8, 1, 9, 2, 10, 3, 11, 4, 12, 5, 13, 6, 14, 7, 15}));
#else
#pragma GCC unroll 8
    for (int c = 0; c < kGroup; ++c) {
      const float a = from[c], b = from[kGroup + c];
      to[2 * c] = a, to[2 * c + 1] = b;
    }
#endif
  } else {
    for (int c = 0; c < kPanel; ++c) to[c % kGroup * 2 + c / kGroup] = c < channels ? from[c] : 0.0f;
  }
}

static inline void by_groups(const vec (&sum)[kPanelVectors], vec (&ordered)[kPanelVectors]) {
#if GATEDCONV_LANES == 16 && !defined(__clang__)
  ordered[0] = __builtin_shuffle(sum[0], lanes_of_int{0, 2, 4, 6, 8, 10, 12, 14, 1, 3, 5, 7, 9, 11, 13, 15});
#else
  float mixed[kPanel], groups[kPanel];
  for (int v = 0; v < kPanelVectors; ++v) store(mixed + v * kLanes, sum[v]);
#pragma GCC unroll 16
  for (int c = 0; c < kPanel; ++c) groups[c] = mixed[c % kGroup * 2 + c / kGroup];
  for (int v = 0; v < kPanelVectors; ++v) ordered[v] = load(groups + v * kLanes);
#endif
}

// The operands of a tile: `rows` are interleaved, 16 floats a pixel.
struct GroupedTile {
  const float* rows;
  ptrdiff_t row;
  const float* weights;
  const float* bias;
  const float* residual;  // null for none
  float* out;
};

template <int PX>
static void grouped_tile(const Step& step, const GroupedTile& tile) {
  vec sum[PX][kPanelVectors] = {};
  const float* w = tile.weights;
  const ptrdiff_t next = step.stride_w * kPanel;
  for (int i = 0; i < step.kernel_h; ++i) {
    for (int j = 0; j < step.kernel_w; ++j) {
      const float* from = tile.rows + i * step.dilation_h * tile.row + j * step.dilation_w * kPanel;
#pragma GCC unroll 2
      for (int c = 0; c < kGroup; ++c, w += kPanel) {
        vec weights[kPanelVectors];
        for (int v = 0; v < kPanelVectors; ++v) weights[v] = load(w + v * kLanes);
#pragma GCC unroll 16
        for (int p = 0; p < PX; ++p) {
          const vec x = splat_pair(from + p * next + 2 * c);
#pragma GCC unroll 4
          for (int v = 0; v < kPanelVectors; ++v) sum[p][v] += x * weights[v];
        }
      }
    }
  }
#pragma GCC unroll 16
  for (int p = 0; p < PX; ++p) {
    vec result[kPanelVectors];
    by_groups(sum[p], result);
    for (int v = 0; v < kPanelVectors; ++v) {
      result[v] += load(tile.bias + v * kLanes);
      if (tile.residual) result[v] += load(tile.residual + p * step.residual.pixel + v * kLanes);
    }
    activate_each(result, step.act);
    for (int v = 0; v < kPanelVectors; ++v) store(tile.out + p * step.out.pixel + v * kLanes, result[v]);
  }
}

constexpr int kGroupedPixels = kLanes == 16 ? 14 : kLanes == 8 ? 6 : 3;  // sums that fit the registers

using GroupedFunction = void (*)(const Step&, const GroupedTile&);

template <int... I>
static GroupedFunction pick_grouped(int px, std::integer_sequence<int, I...>) {
  static constexpr GroupedFunction functions[] = {grouped_tile<I + 1>...};
  return functions[px - 1];
}

// Rows of output for which the rows below are copied together. Eight read 10 rows for a 3x3, so that most are
// copied once. Four and 16 take 0.99 to 1.05 and 0.95 to 1.00 of the time (AMD EPYC, AVX-512 and AVX2, layers
// of RegNetY-400MF; the network takes 0.99 to 1.00 of it).
static inline int grouped_strip(const Step& step) {
  return std::max(1, 8 / step.stride_h);
}

// Those rows below.
static inline int grouped_rows(const Step& step, int rows) {
  return (rows - 1) * step.stride_h + (step.kernel_h - 1) * step.dilation_h + 1;
}

// The pixels of one of them.
static inline int grouped_columns(const Step& step) {
  return (step.out.width - 1) * step.stride_w + (step.kernel_w - 1) * step.dilation_w + 1;
}

static inline size_t grouped_scratch(const Step& step) {
  return static_cast<size_t>(grouped_rows(step, grouped_strip(step))) * grouped_columns(step) * kPanel;
}

static inline void conv_grouped(const Step& step, const Part& part, float* scratch) {
  const int columns = grouped_columns(step), width = step.out.width;
  const int pieces = (width + kGroupedPixels - 1) / kGroupedPixels;
  const ptrdiff_t taps = static_cast<ptrdiff_t>(step.kernel_h) * step.kernel_w;
  for (int64_t unit = part.unit0; unit < part.unit1;) {
    const int64_t image = unit / step.rows, y = unit % step.rows;
    const int rows =
        static_cast<int>(std::min({int64_t{grouped_strip(step)}, step.rows - y, part.unit1 - unit}));
    const float* top = step.in.data + image * step.in.image +
                       (y * step.stride_h - step.pad_top) * step.in.row - step.pad_left * step.in.pixel;
    for (int panel = part.panel0; panel < part.panel1; ++panel) {
      const int channel = panel * kPanel;
      for (int i = 0; i < grouped_rows(step, rows); ++i) {
        const float* from = top + i * step.in.row + channel;
        float* to = scratch + static_cast<ptrdiff_t>(i) * columns * kPanel;
        for (int x = 0; x < columns; ++x, from += step.in.pixel, to += kPanel)
          interleave(from, step.in.channels - channel, to);
      }
      for (int i = 0; i < rows; ++i) {
        const float* residual = residual_at(step, image, y + i);
        float* out = step.out.at(image, y + i) + channel;
        for (int piece = 0, x = 0; piece < pieces; ++piece) {
          const int px = width / pieces + (piece < width % pieces);
          const GroupedTile tile{scratch + (static_cast<ptrdiff_t>(i) * step.stride_h * columns +
                                            static_cast<ptrdiff_t>(x) * step.stride_w) *
                                               kPanel,
                                 static_cast<ptrdiff_t>(columns) * kPanel,
                                 step.weights + panel * taps * kGroup * kPanel,
                                 step.bias + channel,
                                 residual ? residual + x * step.residual.pixel + channel : nullptr,
                                 out + x * step.out.pixel};
          pick_grouped(px, std::make_integer_sequence<int, kGroupedPixels>())(step, tile);
          x += px;
        }
        activate_pixels(step.late, step.value, out, width, step.out.pixel, kPanelVectors);
      }
    }
    unit += rows;
  }
}

}  // namespace gatedconv::GATEDCONV_ISA
