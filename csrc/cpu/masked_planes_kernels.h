// One instruction set's plane kernels; included once by each of masked_planes_portable, _avx2 and
// _avx512.cpp.
#pragma once

#include "masked_planes.h"
#include "masked_transpose.h"
#include "simd.h"

namespace gatedconv::GATEDCONV_ISA {

// T outputs times P registers of pixels are T * P sums; P inputs and one weight need registers, too. With 32
// registers 8 x 3 = 24 sums, with 16 of them 6 x 2 = 12 (sweep on Zen 3 and Zen 5; more spill).
constexpr int kMaxOutputs = kLanes == 16 ? 8 : 6;
constexpr int kMaxVectors = kLanes == 16 ? 3 : 2;

static inline vec load_part(const float* from, int64_t count) {
  vec value{};
  for (int64_t i = 0; i < count; ++i) value[i] = from[i];
  return value;
}

static inline void store_part(float* to, vec value, int64_t count) {
  for (int64_t i = 0; i < count; ++i) to[i] = value[i];
}

// `left` pixels from `first` on; the last register may be filled in part.
template <int T, int P>
static void run_block(const PlaneTile& tile, int64_t first, int64_t left) {
  vec sum[T][P];
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
    const vec bias = tile.bias[t] ? splat(*tile.bias[t]) : vec{};
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) sum[t][p] = bias;
  }
  const float* w = tile.weights;
  for (int c = 0; c < tile.num_channels; ++c) {
    const float* plane = tile.planes + tile.channels[c] + first;
    for (int k = 0; k < tile.num_taps; ++k) {
      const float* from = plane + tile.taps[k];
      vec x[P];
#pragma GCC unroll 4
      for (int p = 0; p < P; ++p) x[p] = load(from + p * kLanes);
#pragma GCC unroll 8
      for (int t = 0; t < T; ++t) {
        const vec weight = splat(w[t]);
#pragma GCC unroll 4
        for (int p = 0; p < P; ++p) sum[t][p] += x[p] * weight;
      }
      w += T;
    }
  }
#pragma GCC unroll 8
  for (int t = 0; t < T; ++t) {
#pragma GCC unroll 4
    for (int p = 0; p < P; ++p) {
      const int64_t count = left - p * kLanes;
      vec value = sum[t][p];
      if (tile.residual[t]) {
        const float* from = tile.residual[t] + first + p * kLanes;
        value += count >= kLanes ? load(from) : load_part(from, count);
      }
      if (tile.relu) value = activate(value, Act::kRelu);
      float* to = tile.out[t] + first + p * kLanes;
      if (count >= kLanes) {
        store(to, value);
      } else {
        store_part(to, value, count);
      }
    }
  }
}

template <int T>
static void run_outputs(const PlaneTile& tile) {
  const int64_t vectors = (tile.pixels + kLanes - 1) / kLanes;
  const int64_t blocks = (vectors + kMaxVectors - 1) / kMaxVectors;
  // Even blocks: 4 registers are 2 + 2 and not 3 + 1, whose last would wait for its own sums.
  for (int64_t i = 0, at = 0; i < blocks; ++i) {
    const int64_t count = vectors / blocks + (i < vectors % blocks);
    const int64_t first = at * kLanes, left = tile.pixels - first;
    if (count == 1) run_block<T, 1>(tile, first, left);
    if (count == 2) run_block<T, 2>(tile, first, left);
    if constexpr (kMaxVectors > 2) {
      if (count == 3) run_block<T, 3>(tile, first, left);
    }
    at += count;
  }
}

static void run_plane_tile(const PlaneTile& tile) {
  using Function = void (*)(const PlaneTile&);
  static constexpr Function functions[] = {run_outputs<1>, run_outputs<2>, run_outputs<3>,
                                           run_outputs<4>, run_outputs<5>, run_outputs<6>,
#if GATEDCONV_LANES == 16
                                           run_outputs<7>, run_outputs<8>
#endif
  };
  functions[tile.outputs - 1](tile);
}

// One line of G g for F(4) at 0, +-3/4, +-3/2 and infinity: (1, p, p^2) over the product of p's distances.
static inline void winograd_line(const vec* g, vec* u) {
  constexpr float a = 0.75f, b = 1.5f, near = 1 / (2 * a * a * (a * a - b * b)),
                  far = 1 / (2 * b * b * (b * b - a * a));
  u[0] = g[0] * (1 / (a * a * b * b));
  u[1] = (g[0] + a * a * g[2] + a * g[1]) * near;
  u[2] = (g[0] + a * a * g[2] - a * g[1]) * near;
  u[3] = (g[0] + b * b * g[2] + b * g[1]) * far;
  u[4] = (g[0] + b * b * g[2] - b * g[1]) * far;
  u[5] = g[2];
}

static void winograd_weights(const float* panel, int64_t inputs, float* to) {
  for (int64_t at = 0; at < inputs * kPanel; at += kLanes) {
    vec column[3], line[6], half[6][3];
    for (int x = 0; x < 3; ++x) {
      for (int y = 0; y < 3; ++y) column[y] = load(panel + (y * 3 + x) * inputs * kPanel + at);
      winograd_line(column, line);
      for (int y = 0; y < 6; ++y) half[y][x] = line[y];
    }
    for (int y = 0; y < 6; ++y) {
      winograd_line(half[y], line);
      for (int x = 0; x < 6; ++x) store(to + (y * 6 + x) * inputs * kPanel + at, line[x]);
    }
  }
}

static constexpr PlaneKernels plane_kernels() {
  return {kLanes,        kMaxOutputs,   run_plane_tile, to_planes,       from_planes,
          planes_to_map, map_to_planes, spread,         winograd_weights};
}

}  // namespace gatedconv::GATEDCONV_ISA
