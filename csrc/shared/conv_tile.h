// The GPU convolution's work, cut into tiles: an implicit GEMM of output pixels x open outputs over kernel
// taps x open inputs. Everything here is plain index arithmetic, the same in kernels and on the host.
//
// A tile is `samples` x `rows` x `cols` output pixels (at most 64 * mt) by 8 * nt output slots. The part of
// the input that the tile reads, its patch, is kept in shared memory pixel by pixel, for `chunks` fragment
// steps of channels at a time; all taps read it there, shifted. Rows of shared memory are an odd number of
// 16-byte units apart, so that the eight rows of an ldmatrix have no bank conflict.
#pragma once

#include "shared/conv_math.h"
#include "shared/masked_conv2d.h"

namespace gatedconv {

constexpr int kThreads = 128;
constexpr int kWarps = 4;

enum class ConvAct : int32_t { kNone, kRelu, kRelu6 };

// A convolution of one group, as kernels take it. Strides are in elements.
struct ConvArgs {
  const void* input;
  const void* weights;       // [chunk][tap][C_out][kStep], inputs in the order of in_index: see packed_weight
  const float* bias;         // (C_out), or null
  const void* residual;      // (N, C_out, P, Q), or null
  void* output;              // (N, C_out, P, Q)
  const int32_t* in_index;   // open inputs, or null for all; of every sample where in_masks > 1
  const int32_t* in_count;   // how many, where the count is on the device; null: all C_in
  const int32_t* out_index;  // for every mask the open outputs, then the closed ones; null: all open
  const int32_t* out_count;  // for every mask the number of open outputs
  Strides4 in, res, out;
  int32_t batch, in_channels, height, width, out_channels, out_h, out_w;
  int32_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int32_t masks;     // 1 for the whole batch, or one for each sample
  int32_t in_masks;  // so for in_index; one for each sample finds its weights in the order of all inputs
  ConvAct act;
  bool skip_closed;            // leave closed outputs as they are in memory
  bool in_vector;              // pixels of the input are whole aligned 16-byte vectors
  bool out_vector;             // so are those of output and residual, and all outputs are open
  bool in_planar, out_planar;  // neighboring pixels, not channels, are neighbors in memory
};

// How a convolution is cut into tiles.
struct ConvTile {
  int32_t mt, nt;                        // 16-row fragments of a warp, 8-column fragments of a block
  int32_t samples, rows, cols;           // output pixels of a tile
  int32_t patch_h, patch_w;              // pixels of a sample's patch
  int32_t step_h, step_w, tap_h, tap_w;  // patch pixels from one output pixel, from one tap, to the next
  int32_t from_h, from_w;                // input pixels from one patch pixel to the next
  int32_t chunks, group_taps;            // of one round: fragment steps of channels, taps
  int32_t pitch, patch_bytes, weight_bytes, shared_bytes;
  int32_t row_tiles, col_tiles;
  int64_t pixel_tiles;  // grid.x
  int32_t slot_tiles;   // grid.y
};

GATEDCONV_HOST_DEVICE inline int32_t ceil_div(int32_t a, int32_t b) {
  return (a + b - 1) / b;
}
GATEDCONV_HOST_DEVICE inline int32_t smaller(int32_t a, int32_t b) {
  return a < b ? a : b;
}
GATEDCONV_HOST_DEVICE inline int32_t larger(int32_t a, int32_t b) {
  return a > b ? a : b;
}

// Whether tensors can be read and written in whole 16-byte vectors, and their order in memory;
// all other fields are set.
template <class Math>
inline void set_access(ConvArgs& a) {
  constexpr int64_t kUnit = kVector<Math>;
  const auto whole = [&](const void* data, const Strides4& s, int64_t channels, int64_t height,
                         int64_t width) {
    // The stride of a dimension of size 1 means nothing: a pooled map is (C, 1, 1, 1) apart.
    const bool strides = s.c == 1 && (a.batch == 1 || s.n % kUnit == 0) &&
                         (height == 1 || s.h % kUnit == 0) && (width == 1 || s.w % kUnit == 0);
    return data == nullptr ||
           (strides && channels % kUnit == 0 && reinterpret_cast<uintptr_t>(data) % 16 == 0);
  };
  a.in_vector = a.in_index == nullptr && whole(a.input, a.in, a.in_channels, a.height, a.width);
  a.out_vector = a.out_index == nullptr && whole(a.output, a.out, a.out_channels, a.out_h, a.out_w) &&
                 whole(a.residual, a.res, a.out_channels, a.out_h, a.out_w);
  a.in_planar = a.in.c != 1;
  a.out_planar = a.out.c != 1;
}

// ---- packed weights ----

template <class Math>
GATEDCONV_HOST_DEVICE int64_t packed_size(int32_t in_channels, int32_t taps, int32_t out_channels) {
  return static_cast<int64_t>(ceil_div(in_channels, kStep<Math>)) * taps * out_channels * kStep<Math>;
}

// The element at `at` of the packed weights of a dense (C_out, C_in, KH, KW) tensor; zero behind the last
// input.
template <class Math>
GATEDCONV_HOST_DEVICE typename Math::Storage packed_weight(int64_t at, const typename Math::Storage* weight,
                                                           const Strides4& strides, int32_t out_channels,
                                                           int32_t kernel_h, int32_t kernel_w,
                                                           const int32_t* in_index, int32_t in_count) {
  const int32_t in_step = static_cast<int32_t>(at % kStep<Math>);
  int64_t rest = at / kStep<Math>;
  const int64_t oc = rest % out_channels;
  rest /= out_channels;
  const int32_t taps = kernel_h * kernel_w, tap = static_cast<int32_t>(rest % taps);
  const int32_t slot = static_cast<int32_t>(rest / taps) * kStep<Math> + in_step;
  if (slot >= in_count) return Math::store(0.0f);
  const int64_t channel = in_index == nullptr ? slot : in_index[slot];
  const int64_t kh = tap / kernel_w, kw = tap % kernel_w;
  return Math::pack(
      Math::load(weight[oc * strides.n + channel * strides.c + kh * strides.h + kw * strides.w]));
}

// ---- index lists ----

// Lists the open channels of a mask, then the closed ones, 32 at a time; `count` gets the number of open
// ones. Lanes: ballot(f) gives the bits of f(lane), each(f) calls f(lane).
template <class Lanes>
GATEDCONV_HOST_DEVICE void list_open(Lanes& lanes, const bool* mask, int32_t channels, int32_t* list,
                                     int32_t* count) {
  int32_t at = 0;
  for (int closed = 0; closed < 2; ++closed) {
    for (int32_t base = 0; base < channels; base += 32) {
      const uint32_t votes = lanes.ballot([&](int lane) {
        const int32_t channel = base + lane;
        return channel < channels && mask[channel] == (closed == 0);
      });
      lanes.each([&](int lane) {
        if ((votes >> lane) & 1u) list[at + Lanes::ones(votes & ((1u << lane) - 1u))] = base + lane;
      });
      at += Lanes::ones(votes);
    }
    if (closed == 0)
      lanes.each([&](int lane) {
        if (lane == 0) *count = at;
      });
  }
}

// ---- tiles ----

struct TileStart {
  int32_t sample, row, col;
};

GATEDCONV_HOST_DEVICE inline TileStart tile_start(const ConvTile& t, int64_t block) {
  const int32_t col = static_cast<int32_t>(block % t.col_tiles);
  block /= t.col_tiles;
  const int32_t row = static_cast<int32_t>(block % t.row_tiles);
  return {static_cast<int32_t>(block / t.row_tiles) * t.samples, row * t.rows, col * t.cols};
}

// The output pixel of row m of a tile.
struct Pixel {
  int32_t sample, row, col;
  bool inside;
};

GATEDCONV_HOST_DEVICE inline Pixel tile_pixel(const ConvArgs& a, const ConvTile& t, const TileStart& at,
                                              int m) {
  const int32_t per_sample = t.rows * t.cols, in_sample = m % per_sample;
  const Pixel p{at.sample + m / per_sample, at.row + in_sample / t.cols, at.col + in_sample % t.cols, false};
  const bool inside = m < t.samples * per_sample && p.sample < a.batch && p.row < a.out_h && p.col < a.out_w;
  return {p.sample, p.row, p.col, inside};
}

// The byte of the patch at which row m of a tile begins, at tap (0, 0); any place for rows past the tile.
GATEDCONV_HOST_DEVICE inline int32_t patch_row(const ConvTile& t, int m) {
  const int32_t per_sample = t.rows * t.cols;
  if (m >= t.samples * per_sample) return 0;
  const int32_t in_sample = m % per_sample;
  const int32_t row = (m / per_sample) * t.patch_h + in_sample / t.cols * t.step_h;
  return (row * t.patch_w + in_sample % t.cols * t.step_w) * t.pitch;
}

GATEDCONV_HOST_DEVICE inline int32_t patch_tap(const ConvArgs& a, const ConvTile& t, int tap) {
  return (tap / a.kernel_w * t.tap_h * t.patch_w + tap % a.kernel_w * t.tap_w) * t.pitch;
}

// The place of a patch pixel in the input, in elements, at channel 0; -1 for padding and for samples past the
// end.
GATEDCONV_HOST_DEVICE inline int64_t patch_source(const ConvArgs& a, const ConvTile& t, const TileStart& at,
                                                  int32_t pixel) {
  const int32_t col = pixel % t.patch_w, row = pixel / t.patch_w % t.patch_h;
  const int32_t sample = at.sample + pixel / (t.patch_w * t.patch_h);
  const int32_t h = at.row * a.stride_h - a.pad_top + row * t.from_h;
  const int32_t w = at.col * a.stride_w - a.pad_left + col * t.from_w;
  if (sample >= a.batch || h < 0 || h >= a.height || w < 0 || w >= a.width) return -1;
  return sample * a.in.n + h * a.in.h + w * a.in.w;
}

// ---- fragments: which rows of shared memory a lane of a warp names, and which accumulators it holds ----

// mma.sync m16n8: ldmatrix gives matrix i the rows that lanes 8i to 8i + 7 name. Matrices 0 and 1 are rows 0
// to 7 and 8 to 15 of the first 16 bytes of a step, 2 and 3 those of the second.
GATEDCONV_HOST_DEVICE inline int fragment_row(int lane) {
  return lane & 15;
}
GATEDCONV_HOST_DEVICE inline int fragment_byte(int lane) {
  return (lane >> 4) * 16;
}
// Columns: lanes 0 to 7 name eight columns' first 16 bytes, 8 to 15 their second; 16 to 31 the next eight.
GATEDCONV_HOST_DEVICE inline int fragment_column(int lane) {
  return (lane & 7) + (lane >> 4) * 8;
}
GATEDCONV_HOST_DEVICE inline int fragment_column_byte(int lane) {
  return ((lane >> 3) & 1) * 16;
}
// Accumulator r of a lane: row and column of the 16 x 8 product.
GATEDCONV_HOST_DEVICE inline int accumulator_row(int lane, int r) {
  return (lane >> 2) + (r >> 1) * 8;
}
GATEDCONV_HOST_DEVICE inline int accumulator_column(int lane, int r) {
  return (lane & 3) * 2 + (r & 1);
}

}  // namespace gatedconv
