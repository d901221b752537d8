// Convolution with weights and input rounded to bfloat16, and float32 sums.
//
// A block of output pixels at a time becomes a matrix of bfloat16: a row for each pixel, with the terms of
// its sum in the order of the weights. Where the machine has no instructions for its product, that is
// computed with float32 ones. A product of two bfloat16 is exact in float32, if it is no subnormal number,
// and sums are added up in the order of AVX512_BF16: the same bits come out on every instruction set but AMX,
// which adds up the terms of even and of odd places, 32 at a time, by themselves first. (Both instruction
// sets take subnormal numbers for zeros.)
#pragma once

#include "bf16.h"
#include "conv_direct.h"

namespace gatedconv::GATEDCONV_ISA {

typedef uint32_t words __attribute__((vector_size(4 * GATEDCONV_LANES)));
typedef uint16_t halves __attribute__((vector_size(2 * GATEDCONV_LANES)));
typedef uint16_t unaligned_halves __attribute__((vector_size(2 * GATEDCONV_LANES), aligned(2), may_alias));

static inline halves round_vector(vec value) {
  const words bits = reinterpret_cast<words>(value), high = bits >> 16;
  const words nan = reinterpret_cast<words>((bits & 0x7fffffff) > 0x7f800000);
  const words rounded = (bits + 0x7fff + (high & 1)) >> 16;
  return __builtin_convertvector((nan & (high | 0x40)) | (~nan & rounded), halves);
}

static void round_emulated(const float* from, ptrdiff_t from_stride, int count, uint16_t* to,
                           ptrdiff_t to_stride, int rows) {
  for (int row = 0; row < rows; ++row, from += from_stride, to += to_stride) {
    int i = 0;
    for (; i + kLanes <= count; i += kLanes)
      *reinterpret_cast<unaligned_halves*>(to + i) = round_vector(load(from + i));
    if (i == count) continue;
    const halves last = round_vector(load(from + i));
    for (int k = 0; i + k < count; ++k) to[i + k] = last[k];
  }
}

// A pair's terms as float32: a bfloat16 is the upper half of one.
static inline vec first_term(lanes_of_int pair) {
  return reinterpret_cast<vec>(pair << 16);
}
static inline vec second_term(lanes_of_int pair) {
  return reinterpret_cast<vec>(pair & static_cast<int32_t>(0xffff0000));
}

template <int PX>
static inline void multiply_some(const Bf16Product& in, int pixel, int panel) {
  vec sum[PX][kPanelVectors] = {};
  const uint16_t* x = in.pixels + pixel * in.stride;
  const uint32_t* w = in.weights + static_cast<ptrdiff_t>(panel) * (in.depth / 2) * kPanel;
  for (int k = 0; k < in.depth; k += 2, w += kPanel) {
    vec first[kPanelVectors], second[kPanelVectors];
    for (int v = 0; v < kPanelVectors; ++v) {
      const lanes_of_int pair = *reinterpret_cast<const unaligned_ints*>(w + v * kLanes);
      first[v] = first_term(pair);
      second[v] = second_term(pair);
    }
#pragma GCC unroll 8
    for (int p = 0; p < PX; ++p) {
      int32_t both;
      __builtin_memcpy(&both, x + p * in.stride + k, sizeof(both));
      const lanes_of_int pair = lanes_of_int{} + both;
      const vec a = first_term(pair), b = second_term(pair);
      for (int v = 0; v < kPanelVectors; ++v) {
        sum[p][v] += b * second[v];
        sum[p][v] += a * first[v];
      }
    }
  }
  for (int p = 0; p < PX; ++p) {
    float* to = in.sums + (pixel + p) * kBf16Panels * kPanel + panel * kPanel;
    for (int v = 0; v < kPanelVectors; ++v) store(to + v * kLanes, sum[p][v]);
  }
}

static void multiply_emulated(const Bf16Product& in) {
  constexpr int kSome = kLanes / 2;  // by the registers
  for (int panel = 0; panel < in.panels; ++panel) {
    int pixel = 0;
    for (; pixel + kSome <= in.count; pixel += kSome) multiply_some<kSome>(in, pixel, panel);
    for (; pixel < in.count; ++pixel) multiply_some<1>(in, pixel, panel);
  }
}

constexpr Bf16Kernels kEmulatedBf16 = {"emulated", [] {}, round_emulated, multiply_emulated, [] {}};

// The matrix of a block of pixels.
struct Bf16Rows {
  int terms, depth;
  ptrdiff_t stride;
  int pixels;
};

static inline Bf16Rows bf16_rows(const Step& step) {
  Bf16Rows rows;
  rows.terms = step.kernel_h * step.kernel_w * step.span;
  rows.depth = (rows.terms + kBf16Depth - 1) / kBf16Depth * kBf16Depth;
  // Rows a multiple of 1 KiB apart share too few sets of the first cache.
  rows.stride = rows.depth + (rows.depth % 512 == 0 ? kBf16Depth : 0);
  // About 512 KiB: with some of the weights in the second cache.
  rows.pixels = (std::clamp(262144 / rows.depth, 1, 256) + kBf16Pixels - 1) / kBf16Pixels * kBf16Pixels;
  return rows;
}

// In the scratch: sums, a pixel whose input is changed, and the matrix.
constexpr size_t kBf16Sums = size_t{kBf16Pixels} * kBf16Panels * kPanel;

static inline size_t changed_floats(const Step& step) {
  return step.changes_input ? static_cast<size_t>(step.in.channels + kPanel - 1) / kPanel * kPanel : 0;
}

static inline size_t bf16_scratch(const Step& step) {
  const Bf16Rows rows = bf16_rows(step);
  return kBf16Sums + changed_floats(step) + static_cast<size_t>(rows.pixels * rows.stride) / 2;
}

// Calls body(at, image, y, x, pixels) for each row's share of `count` output pixels from `first` on.
template <typename Body>
static inline void for_rows(const Step& step, int64_t first, int count, Body body) {
  const int width = step.out.width;
  for (int at = 0; at < count;) {
    const int64_t unit = (first + at) / width;
    const int x = static_cast<int>((first + at) % width), pixels = std::min(width - x, count - at);
    body(at, unit / step.rows, unit % step.rows, x, pixels);
    at += pixels;
  }
}

static inline void fill_rows(const Step& step, const Bf16Kernels& kernels, const Taps& taps,
                             const Bf16Rows& rows, int64_t first, int count, float* changed, uint16_t* to) {
  const ptrdiff_t stride = step.stride_w * step.in.pixel;
  for_rows(step, first, count, [&](int, int64_t image, int64_t y, int x, int pixels) {
    const float* in = step.in.at(image, y * step.stride_h) + x * stride;
    const float* gate = step.gate.data ? step.gate.at(image, 0) : nullptr;
    if (!step.changes_input) {
      uint16_t* run = to;
      for (const int tap : taps.offsets) {
        kernels.round(in + tap, stride, taps.run, run, rows.stride, pixels);
        run += taps.run;
      }
      to += pixels * rows.stride;
      return;
    }
    for (int i = 0; i < pixels; ++i, in += stride, to += rows.stride) {
      change_pixels(step, in, 0, 1, gate, 0, changed);
      kernels.round(changed, 0, step.span, to, 0, 1);
    }
  });
}

// Sums of some pixels and panels become outputs.
static inline void finish(const Step& step, int64_t first, int count, int panel, int panels,
                          const float* sums) {
  const int channel = panel * kPanel;
  const int width = std::min(panels * kPanelVectors, vectors(step.out.channels) - panel * kPanelVectors);
  for_rows(step, first, count, [&](int at, int64_t image, int64_t y, int x, int pixels) {
    float* out = step.out.at(image, y) + x * step.out.pixel + channel;
    const float* residual =
        step.residual.data ? step.residual.at(image, y) + x * step.residual.pixel + channel : nullptr;
    for (int i = 0; i < pixels; ++i) {
      const float* sum = sums + (at + i) * kBf16Panels * kPanel;
      for (int v = 0; v < width; ++v) {
        const int c = v * kLanes;
        vec value = load(sum + c) + load(step.bias + channel + c);
        if (step.keep) value = keep_lanes(value, step.keep + channel + c);
        if (residual) value += load(residual + i * step.residual.pixel + c);
        store(out + i * step.out.pixel + c, activate(value, step.act));
      }
    }
    activate_pixels(step.late, step.value, out, pixels, step.out.pixel, width);
  });
}

static inline void conv_bf16(const Step& step, const Part& part, float* scratch) {
  const Bf16Kernels& kernels = kLanes == 16 && step.bf16 ? *step.bf16 : kEmulatedBf16;
  const Taps taps = step.changes_input ? Taps{{0}, step.span} : find_taps(step);
  const Bf16Rows rows = bf16_rows(step);
  float* changed = scratch + kBf16Sums;
  auto* matrix = reinterpret_cast<uint16_t*>(changed + changed_floats(step));
  const auto* weights = reinterpret_cast<const uint32_t*>(step.weights);
  const int64_t end = part.unit1 * step.out.width;
  const int most = static_cast<int>(std::min<int64_t>(rows.pixels, end - part.unit0 * step.out.width));
  for (int i = 0; i < most; ++i)
    std::fill(matrix + i * rows.stride + rows.terms, matrix + i * rows.stride + rows.depth, uint16_t{0});
  kernels.begin();
  for (int64_t first = part.unit0 * step.out.width; first < end; first += rows.pixels) {
    const int count = static_cast<int>(std::min<int64_t>(rows.pixels, end - first));
    fill_rows(step, kernels, taps, rows, first, count, changed, matrix);
    for (int panel = part.panel0; panel < part.panel1; panel += kBf16Panels) {
      const int panels = std::min(kBf16Panels, part.panel1 - panel);
      for (int at = 0; at < count; at += kBf16Pixels) {
        const int pixels = std::min(kBf16Pixels, count - at);
        kernels.multiply({matrix + at * rows.stride, rows.stride, pixels, rows.depth, panels,
                          weights + static_cast<ptrdiff_t>(panel) * (rows.depth / 2) * kPanel, scratch});
        finish(step, first + at, pixels, panel, panels, scratch);
      }
    }
  }
  kernels.end();
}

}  // namespace gatedconv::GATEDCONV_ISA
