// Winograd convolution F(M x M, 3 x 3), M = 2 or 4 (Lavin and Gray, "Fast Algorithms for Convolutional Neural
// Networks").
//
// An (M+2)^2 patch of the input, transformed, times the transformed weights, point by point, summed over the
// input channels: (M+2)^2 small matrix products [tiles, c_in] x [c_in, c_out], whose result is transformed
// back into M^2 pixels. F(2) interpolates at 0, 1, -1 and infinity; F(4) at 0, +-3/4, +-3/2 and infinity,
// which keeps the rounding error near that of the direct sum (with the usual 0, +-1, +-2 it is half as large
// again on whole networks).
#pragma once

#include "conv_tile.h"

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

// Two or three matrix products of this many tiles keep the weights of one point in the nearest cache.
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

// Where one tile's result goes: `rows` x `columns` of its M x M pixels lie inside the map.
struct Target {
  float* out;
  const float* residual;
  int rows, columns;
};

template <int M>
static inline void transform_result(const Step& step, const float* from, ptrdiff_t stride, vec bias,
                                    const Target& target) {
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
      if (target.residual) value += load(target.residual + y * step.residual.row + x * step.residual.pixel);
      store(target.out + y * step.out.row + x * step.out.pixel, activate(value, step.act));
    }
  }
}

template <int M>
static void conv_winograd(const Step& step, const Part& part, float* scratch) {
  constexpr int N = M + 2, points = N * N;
  const int columns = (step.out.width + M - 1) / M;
  const int channels = step.in.channels, padded = padded_channels(step);
  const int last = std::min(vectors(step.out.channels), part.panel1 * kPanelVectors);
  const ptrdiff_t point_weights = static_cast<ptrdiff_t>(channels) * kPanel;
  const int64_t first = part.unit0 * columns, count = (part.unit1 - part.unit0) * columns;
  const int64_t blocks = (count + block_tiles(step) - 1) / block_tiles(step);
  const int no_tap = 0;
  for (int64_t block = 0; block < blocks; ++block) {
    const int64_t tile0 = first + count * block / blocks;
    const int tiles = static_cast<int>(first + count * (block + 1) / blocks - tile0);
    const ptrdiff_t in_stride = point_stride(tiles, padded);
    float* products = scratch + points * in_stride;
    for (int t = 0; t < tiles; ++t) {
      const int64_t unit = (tile0 + t) / columns, x = (tile0 + t) % columns;
      const int64_t image = unit / step.rows, y = unit % step.rows;
      const float* patch = step.in.at(image, y * M - 1) + (x * M - 1) * step.in.pixel;
      transform_patch<M>(step.in, patch, scratch + static_cast<ptrdiff_t>(t) * padded, in_stride);
    }
    for (int v0 = part.panel0 * kPanelVectors, v = 0; v0 < last; v0 += v) {
      v = tile_vectors(last - v0, tiles);
      const ptrdiff_t out_stride = point_stride(tiles, v * kLanes);
      Tile tile{};
      tile.pixel_stride = padded;
      tile.taps = &no_tap;
      tile.num_taps = 1;
      tile.run = channels;
      tile.panel_stride = points * point_weights;
      tile.out_stride = v * kLanes;
      const float* weights =
          step.weights + (v0 / kPanelVectors) * tile.panel_stride + (v0 % kPanelVectors) * kLanes;
      for (int point = 0; point < points; ++point) {
        tile.weights = weights + point * point_weights;
        for_pieces(tiles, v, [&](int t, int px) {
          tile.pixels = scratch + point * in_stride + static_cast<ptrdiff_t>(t) * padded;
          tile.out = products + point * out_stride + t * v * kLanes;
          tile_function(px, v)(tile);
        });
      }
      for (int t = 0; t < tiles; ++t) {
        const int64_t unit = (tile0 + t) / columns, x = (tile0 + t) % columns;
        const int64_t image = unit / step.rows, y = unit % step.rows;
        const int channel = v0 * kLanes;
        Target target{step.out.at(image, y * M) + x * M * step.out.pixel + channel, nullptr,
                      static_cast<int>(step.out.height - y * M), static_cast<int>(step.out.width - x * M)};
        if (step.residual.data) {
          target.residual = step.residual.at(image, y * M) + x * M * step.residual.pixel + channel;
        }
        for (int i = 0; i < v; ++i) {
          transform_result<M>(step, products + static_cast<ptrdiff_t>(t) * v * kLanes + i * kLanes,
                              out_stride, load(step.bias + channel + i * kLanes), target);
          target.out += kLanes;
          if (target.residual) target.residual += kLanes;
        }
      }
    }
  }
}

}  // namespace gatedconv::GATEDCONV_ISA
