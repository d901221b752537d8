// Chooses how a convolution is cut into tiles. On the host alone, and without PyTorch.
#pragma once

#include <algorithm>
#include <array>
#include <cstdint>

#include "shared/conv_tile.h"

namespace gatedconv {

constexpr int64_t kSharedBytes = 48 * 1024;  // of a block, on every GPU without asking for more

// Fills in everything that follows from mt, nt, samples, rows and cols; false if it does not fit.
inline bool fit_tile(const ConvArgs& a, int32_t in_chunks, int64_t budget, ConvTile& t) {
  // A kernel of one row skips the rows that a stride jumps over: they are no part of the patch.
  const auto axis = [](int32_t outs, int32_t kernel, int32_t stride, int32_t dilation, int32_t& patch,
                       int32_t& step, int32_t& tap, int32_t& from) {
    step = kernel == 1 ? 1 : stride;
    tap = dilation;
    from = kernel == 1 ? stride : 1;
    const int64_t size = int64_t{outs - 1} * step + int64_t{kernel - 1} * dilation + 1;
    patch = static_cast<int32_t>(std::min<int64_t>(size, 1 << 20));
  };
  axis(t.rows, a.kernel_h, a.stride_h, a.dilation_h, t.patch_h, t.step_h, t.tap_h, t.from_h);
  axis(t.cols, a.kernel_w, a.stride_w, a.dilation_w, t.patch_w, t.step_w, t.tap_w, t.from_w);
  const int64_t pixels = int64_t{t.samples} * t.patch_h * t.patch_w;
  const int32_t taps = a.kernel_h * a.kernel_w;
  const std::array<std::array<int32_t, 2>, 6> rounds{
      {{4, 1}, {2, 1}, {1, taps}, {1, a.kernel_w}, {1, (a.kernel_w + 1) / 2}, {1, 1}}};
  for (const auto& [chunks, group] : rounds) {
    if (chunks > 1 && (taps > 1 || chunks > std::max(1, in_chunks))) continue;
    t.chunks = chunks;
    t.group_taps = group;
    t.pitch = chunks * kStepBytes + 16;
    const int64_t patch = pixels * t.pitch, weights = int64_t{group} * 8 * t.nt * t.pitch;
    const int64_t sums = int64_t{64} * t.mt * (8 * t.nt + 4) * 4;
    const int64_t bytes = std::max(2 * (patch + weights), sums);
    if (bytes > budget) continue;
    t.patch_bytes = static_cast<int32_t>(patch);
    t.weight_bytes = static_cast<int32_t>(weights);
    t.shared_bytes = static_cast<int32_t>(bytes);
    t.row_tiles = ceil_div(a.out_h, t.rows);
    t.col_tiles = ceil_div(a.out_w, t.cols);
    t.pixel_tiles = int64_t{ceil_div(a.batch, t.samples)} * t.row_tiles * t.col_tiles;
    t.slot_tiles = ceil_div(a.out_channels, 8 * t.nt);
    return t.pixel_tiles < (int64_t{1} << 31) && t.slot_tiles < (1 << 16);
  }
  return false;
}

// The tile of mt x nt fragments that reads and computes least; false if none fits. A tile has as many pixels
// as fragments have rows, and fewer only where their patch would not fit: one pixel's always does while its
// taps reach over at most 400 pixels.
inline bool choose_tile(const ConvArgs& a, int32_t step, int mt, int nt, int64_t budget, ConvTile& best) {
  const int32_t fragment_rows = 64 * mt, in_chunks = ceil_div(a.in_channels, step);
  int64_t least = INT64_MAX;
  for (int32_t pixels = fragment_rows; pixels > 0 && least == INT64_MAX; pixels /= 4) {
    for (int32_t cols = std::min(a.out_w, pixels); cols > 0; --cols) {
      ConvTile t{};
      t.mt = mt;
      t.nt = nt;
      t.cols = cols;
      t.rows = std::min(a.out_h, pixels / cols);
      const bool whole = t.rows == a.out_h && t.cols == a.out_w && a.masks <= 1 && a.in_masks <= 1;
      t.samples = whole ? std::min(a.batch, pixels / (t.rows * t.cols)) : 1;
      if (!fit_tile(a, in_chunks, budget, t)) continue;
      const int64_t cost = t.pixel_tiles * (2 * fragment_rows + t.samples * t.patch_h * t.patch_w);
      if (cost < least) {
        least = cost;
        best = t;
      }
    }
  }
  return least < INT64_MAX;
}

// A tile for `processors` multiprocessors: small ones where large ones would leave processors without work.
inline bool choose_tile(const ConvArgs& a, int32_t step, int processors, ConvTile& best) {
  const int nt = a.out_channels <= 8 ? 1 : a.out_channels <= 16 ? 2 : a.out_channels <= 32 ? 4 : 8;
  if (choose_tile(a, step, 2, nt, kSharedBytes, best) &&
      best.pixel_tiles * best.slot_tiles >= 2 * processors) {
    return true;
  }
  ConvTile small{};
  if (!choose_tile(a, step, 1, nt, kSharedBytes, small)) return best.mt == 2;
  best = small;
  return true;
}

}  // namespace gatedconv
