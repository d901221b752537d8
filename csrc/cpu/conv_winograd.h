// Winograd convolution F(M x M, 3 x 3), M = 2 or 4 (Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks").
//
// An (M+2)^2 patch of the input, transformed, times the transformed weights, point by point, summed over the
// input channels: (M+2)^2 small matrix products [tiles, c_in] x [c_in, c_out], whose result is transformed
// back into M^2 pixels. F(2) interpolates at 0, 1, -1 and infinity; F(4) at 0, +-3/4, +-3/2 and infinity,
// which keeps the rounding error near that of the direct sum (with the usual 0, +-1, +-2 it is half as large
// again on whole networks).
#pragma once

#include "conv_direct.h"

namespace gatedconv::GATEDCONV_ISA {

template <int M>
struct Transform;

template <>
struct Transform<2> {
  static void input(const vec* d, vec* v) {
    v[0] = d[2] - d[0];
    v[1] = d[1] + d[2];
    v[2] = d[2] - d[1];
    v[3] = d[3] - d[1];
  }
  static void output(const vec* m, vec* y) {
    y[0] = m[0] + m[1] + m[2];
    y[1] = m[1] - m[2] + m[3];
  }
};

template <>
struct Transform<4> {
  static constexpr float a = 0.75f, b = 1.5f;
  static void input(const vec* d, vec* v) {
    v[0] = d[4] - (a * a + b * b) * d[2] + (a * a * b * b) * d[0];
    const vec even_a = d[4] - (b * b) * d[2], odd_a = a * d[3] - (a * b * b) * d[1];
    v[1] = even_a + odd_a;
    v[2] = even_a - odd_a;
    const vec even_b = d[4] - (a * a) * d[2], odd_b = b * d[3] - (a * a * b) * d[1];
    v[3] = even_b + odd_b;
    v[4] = even_b - odd_b;
    v[5] = d[5] - (a * a + b * b) * d[3] + (a * a * b * b) * d[1];
  }
  static void output(const vec* m, vec* y) {
    const vec sum_a = m[1] + m[2], odd_a = m[1] - m[2], sum_b = m[3] + m[4], odd_b = m[3] - m[4];
    y[0] = m[0] + sum_a + sum_b;
    y[1] = a * odd_a + b * odd_b;
    y[2] = (a * a) * sum_a + (b * b) * sum_b;
    y[3] = (a * a * a) * odd_a + (b * b * b) * odd_b + m[5];
  }
};

// The weights of one point are read for this many tiles while they are in the nearest cache: two or three
// products of 14, or one of 16 with few channels. Half (of 42, two thirds) and twice as many take 0.95
// to 1.11 and 0.92 to 1.04 of the time, 1.01 and 0.99 in the mean (AMD EPYC, AVX-512 and AVX2).
static inline int block_tiles(const Step& step) {
  const int channels = step.in.channels;
  return channels <= 32 ? 16 : channels <= 128 ? 28 : 42;
}

// Floats from one point's values to the next one's; an odd number of cache lines, so that points do not share
// a set.
static inline ptrdiff_t point_stride(int tiles, int floats) {
  return static_cast<ptrdiff_t>(tiles) * floats + (tiles * floats / 16 % 2 == 0 ? 16 : 0);
}

static inline int padded_channels(const Step& step) {
  return (step.in.channels + kPanel - 1) / kPanel * kPanel;
}

template <int M>
static size_t winograd_scratch(const Step& step) {
  const int tiles = block_tiles(step);
  const int points = (M + 2) * (M + 2);
  return points * (point_stride(tiles, padded_channels(step)) + point_stride(tiles, kMaxVectors * kLanes));
}

template <int M>
static inline void transform_patch(const Map& in, const float* patch, float* to, ptrdiff_t stride) {
  constexpr int N = M + 2;
  for (int c = 0; c < in.channels; c += kLanes) {
    vec half[N][N], column[N], line[N];
#pragma GCC unroll 6
    for (int x = 0; x < N; ++x) {
#pragma GCC unroll 6
      for (int y = 0; y < N; ++y) column[y] = load(patch + y * in.row + x * in.pixel + c);
      Transform<M>::input(column, line);
#pragma GCC unroll 6
      for (int y = 0; y < N; ++y) half[y][x] = line[y];
    }
#pragma GCC unroll 6
    for (int y = 0; y < N; ++y) {
      Transform<M>::input(half[y], line);
#pragma GCC unroll 6
      for (int x = 0; x < N; ++x) store(to + (y * N + x) * stride + c, line[x]);
    }
  }
}

// The place of one tile's result: `rows` x `columns` of its M x M pixels are inside the map.
struct Target {
  float* out;
  const float* residual;
  int rows, columns;
};

template <int M>
static inline void transform_result(const Step& step, const float* from, ptrdiff_t stride, vec bias,
                                    const Target& target, vec& finite) {
  constexpr int N = M + 2;
  vec half[M][N], column[N], line[M];
#pragma GCC unroll 6
  for (int x = 0; x < N; ++x) {
#pragma GCC unroll 6
    for (int y = 0; y < N; ++y) column[y] = load(from + (y * N + x) * stride);
    Transform<M>::output(column, line);
#pragma GCC unroll 6
    for (int y = 0; y < M; ++y) half[y][x] = line[y];
  }
#pragma GCC unroll 6
  for (int y = 0; y < M; ++y) {
    if (y >= target.rows) break;
    Transform<M>::output(half[y], line);
#pragma GCC unroll 6
    for (int x = 0; x < M; ++x) {
      if (x >= target.columns) break;
      vec value = line[x] + bias;
      // Every product is part of a corner that is written, if of anything that is.
      if (y % (M - 1) == 0 && x % (M - 1) == 0) finite += value * 0;
      if (target.residual) value += load(target.residual + y * step.residual.row + x * step.residual.pixel);
      store(target.out + y * step.out.row + x * step.out.pixel, activate(value, step.act));
    }
  }
}

// The product of one point: tiles times vectors of output channels.
struct Product {
  const float* patches;  // [tile][channel], transformed
  ptrdiff_t patch_tile;
  const float* weights;  // [panel][channel][16], at the first vector
  const float* ahead;    // null, or a panel of the next point's
  ptrdiff_t weight_panel;
  float* out;  // [tile][vector]
  int channels;
};

// The weights of one point stay in the nearest caches for all of its tiles.
template <int PX, int V>
static void multiply(const Product& product) {
  const int no_tap = 0;
  Tile tile{};
  tile.pixels = product.patches;
  tile.pixel_stride = product.patch_tile;
  tile.taps = &no_tap;
  tile.num_taps = 1;
  tile.run = product.channels;
  tile.weights = product.weights;
  tile.ahead = product.ahead;
  tile.panel_stride = product.weight_panel;
  vec sum[PX][V]{};
  if (tile.ahead) {
    accumulate<PX, V, true>(tile, sum);
  } else {
    accumulate<PX, V>(tile, sum);
  }
#pragma GCC unroll 16
  for (int p = 0; p < PX; ++p) {
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(product.out + (p * V + v) * kLanes, sum[p][v]);
  }
}

struct Multiplies {
  using Function = void (*)(const Product&);
  template <int PX, int V>
  static constexpr Function of() {
    return multiply<PX, V>;
  }
};

// Walks over the tiles of a batch of maps, row by row.
struct TileCursor {
  int64_t image;
  int y, x, rows, columns;
  TileCursor(const Step& step, int64_t tile, int columns) : rows(step.rows), columns(columns) {
    x = static_cast<int>(tile % columns);
    y = static_cast<int>(tile / columns % rows);
    image = tile / columns / rows;
  }
  void next() {
    if (++x < columns) return;
    x = 0;
    if (++y < rows) return;
    y = 0;
    ++image;
  }
};

template <int M>
static inline void transform_results(const Step& step, TileCursor at, int tiles, int v0, int v,
                                     const float* products, ptrdiff_t stride, vec& finite) {
  const int channel = v0 * kLanes;
  for (int t = 0; t < tiles; ++t, at.next(), products += v * kLanes) {
    Target target{step.out.at(at.image, at.y * M) + at.x * M * step.out.pixel + channel, nullptr,
                  step.out.height - at.y * M, step.out.width - at.x * M};
    if (step.residual.data) {
      target.residual = step.residual.at(at.image, at.y * M) + at.x * M * step.residual.pixel + channel;
    }
    for (int i = 0; i < v; ++i) {
      transform_result<M>(step, products + i * kLanes, stride, load(step.bias + channel + i * kLanes), target,
                          finite);
      target.out += kLanes;
      if (target.residual) target.residual += kLanes;
    }
    if (step.late == Act::kNone) continue;
    for (int y = 0; y < std::min(M, target.rows); ++y) {
      activate_pixels(step.late, step.value, target.out - v * kLanes + y * step.out.row,
                      std::min(M, target.columns), step.out.pixel, v);
    }
  }
}

// Returns whether every sum was finite. Where one is not, the transforms have spread an infinity or a NaN to
// neighboring pixels, and the part has to be computed directly. `step.keep` is applied there alone: here
// channels without weights are 0 already.
template <int M>
static bool conv_winograd(const Step& step, const Part& part, float* scratch) {
  constexpr int N = M + 2, points = N * N;
  const int columns = (step.out.width + M - 1) / M;
  const int padded = padded_channels(step);
  const int last = std::min(vectors(step.out.channels), part.panel1 * kPanelVectors);
  const int64_t first = part.unit0 * columns, count = (part.unit1 - part.unit0) * columns;
  const int64_t blocks = (count + block_tiles(step) - 1) / block_tiles(step);
  vec finite{};
  Product product{};
  product.patch_tile = padded;
  product.channels = step.in.channels;
  const ptrdiff_t weight_point = static_cast<ptrdiff_t>(step.in.channels) * kPanel;
  product.weight_panel = points * weight_point;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t tile0 = first + count * block / blocks;
    const int tiles = static_cast<int>(first + count * (block + 1) / blocks - tile0);
    const TileCursor begin(step, tile0, columns);
    const ptrdiff_t patch_point = point_stride(tiles, padded);
    TileCursor at = begin;
    for (int t = 0; t < tiles; ++t, at.next()) {
      const float* patch = step.in.at(at.image, at.y * M - 1) + (at.x * M - 1) * step.in.pixel;
      transform_patch<M>(step.in, patch, scratch + static_cast<ptrdiff_t>(t) * padded, patch_point);
    }
    float* sums = scratch + points * patch_point;
    for (int v0 = part.panel0 * kPanelVectors, v = 0; v0 < last; v0 += v) {
      v = tile_vectors(last - v0, tiles);
      const ptrdiff_t sum_point = point_stride(tiles, v * kLanes);
      const float* weights =
          step.weights + (v0 / kPanelVectors) * product.weight_panel + (v0 % kPanelVectors) * kLanes;
      for (int point = 0; point < points; ++point) {
        product.weights = weights + point * weight_point;
        Ahead ahead{product.weights + weight_point, product.weight_panel,
                    point + 1 < points ? (v + kPanelVectors - 1) / kPanelVectors : 0};
        for_pieces(tiles, v, [&](int t, int px) {
          product.ahead = ahead.take();
          product.patches = scratch + point * patch_point + static_cast<ptrdiff_t>(t) * padded;
          product.out = sums + point * sum_point + static_cast<ptrdiff_t>(t) * v * kLanes;
          function_of<Multiplies>(px, v)(product);
        });
      }
      transform_results<M>(step, begin, tiles, v0, v, sums, sum_point, finite);
    }
  }
  bool all = true;
  for (int lane = 0; lane < kLanes; ++lane) all = all && finite[lane] == 0;
  return all;
}

// A part of a Winograd step by direct convolution.
static void conv_instead(Step step, const Part& part, int tile) {
  const int tile_rows = step.rows;
  step.weights = step.direct;
  step.rows = step.out.height;
  for (int64_t unit = part.unit0; unit < part.unit1;) {
    const int64_t image = unit / tile_rows, end = std::min((image + 1) * tile_rows, part.unit1);
    const int64_t row0 = (unit - image * tile_rows) * tile, row1 = (end - image * tile_rows) * tile;
    conv_direct(step, {image * step.rows + row0, image * step.rows + std::min<int64_t>(row1, step.rows),
                       part.panel0, part.panel1});
    unit = end;
  }
}

}  // namespace gatedconv::GATEDCONV_ISA
