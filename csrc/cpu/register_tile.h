// The register tile: PX pixels times V vectors of output channels, accumulated over taps and input channels.
#pragma once

#include "simd.h"

namespace gatedconv::GATEDCONV_ISA {

// The operands of a tile. Offsets and strides are in floats.
struct Tile {
  const float* pixels;     // first tap, first channel of the first pixel
  ptrdiff_t pixel_stride;  // from one output pixel's window to the next one's
  const int* taps;         // offset of every tap from `pixels`
  int num_taps;
  int run;                 // consecutive input floats below one tap
  const float* weights;    // [panel][tap][run][16], at the tile's first vector
  const float* ahead;      // null, or a panel of weights that is read later, to be fetched
  ptrdiff_t panel_stride;  // from one panel to the next
  const float* bias;
  const int32_t* keep;    // null, or -1 and 0 for channels to keep and to clear
  const float* residual;  // null for none
  ptrdiff_t residual_stride;
  float* out;
  ptrdiff_t out_stride;  // from pixel to pixel
  Act act;
  bool resumes;  // `out` holds sums over earlier taps and channels, in place of the bias
  bool pauses;   // more of them come: `out` gets the plain sums
};

template <int PX, int V, bool kFetch = false>
static inline __attribute__((always_inline)) void accumulate(const Tile& in, vec (&sum)[PX][V]) {
  constexpr int kPointers = (PX + 2) / 3;
  const ptrdiff_t s = in.pixel_stride;
  const ptrdiff_t panel_stride = in.panel_stride;
  const float* w = in.weights;
  [[maybe_unused]] const float* ahead = in.ahead;
  for (int t = 0; t < in.num_taps; ++t) {
    // One pointer for three pixels: q, q + s and q + 2s are addressing modes, so 14 pixels need 5 registers.
    const float* q[kPointers];
    for (int i = 0; i < kPointers; ++i) q[i] = in.pixels + in.taps[t] + 3 * i * s;
#pragma GCC unroll 2
    for (int c = 0; c < in.run; ++c) {
      vec b[V];
      for (int v = 0; v < V; ++v)
        b[v] = load(w + (v / kPanelVectors) * panel_stride + (v % kPanelVectors) * kLanes);
      w += kPanel;
      if constexpr (kFetch) {
        __builtin_prefetch(ahead);
        ahead += kPanel;
      }
#pragma GCC unroll 16
      for (int p = 0; p < PX; ++p) {
        const vec x = splat(q[p / 3][(p % 3) * s]);
#pragma GCC unroll 4
        for (int v = 0; v < V; ++v) sum[p][v] += x * b[v];
      }
      for (int i = 0; i < kPointers; ++i) ++q[i];
    }
  }
}

template <int PX, int V>
static void run_tile(const Tile& tile) {
  vec sum[PX][V];
#pragma GCC unroll 4
  for (int v = 0; v < V; ++v) {
    const vec bias = load(tile.bias + v * kLanes);
#pragma GCC unroll 16
    for (int p = 0; p < PX; ++p)
      sum[p][v] = tile.resumes ? load(tile.out + p * tile.out_stride + v * kLanes) : bias;
  }
  if (tile.ahead) {
    accumulate<PX, V, true>(tile, sum);
  } else {
    accumulate<PX, V>(tile, sum);
  }
#pragma GCC unroll 16
  for (int p = 0; p < PX; ++p) {
    if (!tile.pauses) {
#pragma GCC unroll 4
      for (int v = 0; v < V; ++v) {
        if (tile.keep) sum[p][v] = keep_lanes(sum[p][v], tile.keep + v * kLanes);
        if (tile.residual) sum[p][v] += load(tile.residual + p * tile.residual_stride + v * kLanes);
      }
      activate_each(sum[p], tile.act);
    }
#pragma GCC unroll 4
    for (int v = 0; v < V; ++v) store(tile.out + p * tile.out_stride + v * kLanes, sum[p][v]);
  }
}

// Tile heights that fit the registers: PX * V sums, V weights and one pixel.
constexpr int kMaxVectors = kLanes == 16 ? 4 : 2;
constexpr int max_pixels(int v) {
  if (kLanes == 16) return v == 1 ? 16 : v == 2 ? 14 : v == 3 ? 8 : 7;
  return v == 1 ? 12 : 6;
}

template <typename Table, int V, int... I>
static typename Table::Function pick(int px, std::integer_sequence<int, I...>) {
  static constexpr typename Table::Function functions[] = {Table::template of<I + 1, V>()...};
  return functions[px - 1];
}

// The function of a table for tiles of px pixels and v vectors.
template <typename Table>
static inline typename Table::Function function_of(int px, int v) {
  if constexpr (kMaxVectors == 4) {
    if (v == 3) return pick<Table, 3>(px, std::make_integer_sequence<int, max_pixels(3)>());
    if (v == 4) return pick<Table, 4>(px, std::make_integer_sequence<int, max_pixels(4)>());
  }
  if (v == 2) return pick<Table, 2>(px, std::make_integer_sequence<int, max_pixels(2)>());
  return pick<Table, 1>(px, std::make_integer_sequence<int, max_pixels(1)>());
}

struct Tiles {
  using Function = void (*)(const Tile&);
  template <int PX, int V>
  static constexpr Function of() {
    return run_tile<PX, V>;
  }
};

// `count` pixels in even pieces of at most max_pixels(v): 32 pixels are 11 + 11 + 10, not 14 + 14 + 4.
template <typename Body>
static inline void for_pieces(int count, int v, Body body) {
  const int pieces = (count + max_pixels(v) - 1) / max_pixels(v);
  for (int i = 0, at = 0; i < pieces; ++i) {
    const int px = count / pieces + (i < count % pieces);
    body(at, px);
    at += px;
  }
}

// Vectors side by side in a tile: wide tiles load fewer pixels for a weight, but only low ones leave
// registers.
static inline int tile_vectors(int vectors, int pixels) {
  if (kMaxVectors == 2 || vectors <= 2) return vectors < 2 ? vectors : 2;
  if (vectors == 3) return 3;
  return pixels <= 7 ? 4 : 2;
}

}  // namespace gatedconv::GATEDCONV_ISA
