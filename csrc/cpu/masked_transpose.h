// Channels side by side into planes and back, a square of one register's lanes at a time, and open channels
// to their places.
#pragma once

#include <algorithm>
#include <utility>

#include "masked_planes.h"
#include "simd.h"

namespace gatedconv::GATEDCONV_ISA {

#if defined(__has_builtin)
#if __has_builtin(__builtin_shufflevector)
#define GATEDCONV_SHUFFLE 1
#endif
#endif

#ifdef GATEDCONV_SHUFFLE
// Swaps the off-diagonal quarters of every square of 2 * S lanes that two rows, S apart, take part in.
template <int S, int... I>
static inline __attribute__((always_inline)) void swap_quarters(vec& a, vec& b,
                                                                std::integer_sequence<int, I...>) {
  const vec low = __builtin_shufflevector(a, b, ((I & S) ? kLanes + I - S : I)...);
  const vec high = __builtin_shufflevector(a, b, ((I & S) ? kLanes + I : I + S)...);
  a = low;
  b = high;
}

template <int S>
static inline __attribute__((always_inline)) void transpose_square(vec (&rows)[kLanes]) {
#pragma GCC unroll 16
  for (int i = 0; i < kLanes; ++i) {
    if (!(i & S)) swap_quarters<S>(rows[i], rows[i + S], std::make_integer_sequence<int, kLanes>());
  }
  if constexpr (S > 1) transpose_square<S / 2>(rows);
}
#endif

static void to_planes(const float* from, ptrdiff_t pixel_stride, int64_t pixels, float* const* planes,
                      int64_t count) {
  for (int64_t c = 0; c < count; c += kLanes) {
    const int64_t channels = std::min<int64_t>(kLanes, count - c);
    if (std::all_of(planes + c, planes + c + channels, [](float* plane) { return !plane; })) continue;
    int64_t p = 0;
#ifdef GATEDCONV_SHUFFLE
    for (; channels == kLanes && p + kLanes <= pixels; p += kLanes) {
      vec rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) rows[i] = load(from + (p + i) * pixel_stride + c);
      transpose_square<kLanes / 2>(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) {
        if (planes[c + i]) store(planes[c + i] + p, rows[i]);
      }
    }
#endif
    for (int64_t i = c; i < c + channels; ++i) {
      if (!planes[i]) continue;
      for (int64_t q = p; q < pixels; ++q) planes[i][q] = from[q * pixel_stride + i];
    }
  }
}

static void from_planes(float* const* planes, int64_t count, int64_t first, int64_t pixels, float* to,
                        ptrdiff_t channel_stride, ptrdiff_t pixel_stride) {
  for (int64_t c = 0; c < count; c += kLanes) {
    const int64_t channels = std::min<int64_t>(kLanes, count - c);
    int64_t p = 0;
#ifdef GATEDCONV_SHUFFLE
    for (; channel_stride == 1 && channels == kLanes && p + kLanes <= pixels; p += kLanes) {
      vec rows[kLanes];
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) rows[i] = planes[c + i] ? load(planes[c + i] + first + p) : vec{};
      transpose_square<kLanes / 2>(rows);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) store(to + (p + i) * pixel_stride + c, rows[i]);
    }
#endif
    for (int64_t q = p; q < pixels; ++q) {
      float* pixel = to + q * pixel_stride;
      for (int64_t i = c; i < c + channels; ++i) {
        pixel[i * channel_stride] = planes[i] ? planes[i][first + q] : 0;
      }
    }
  }
}

// A square of pixels starts at each multiple of the lanes; the last one overlaps the one before.
static inline int64_t square_begin(int64_t square, int64_t pixels) {
  return std::min(square * kLanes, pixels - kLanes);
}

static void planes_to_map(const float* const* planes, int64_t count, int64_t pixels, int64_t width, float* to,
                          ptrdiff_t pixel_stride, ptrdiff_t row_stride) {
  const auto place = [&](int64_t p) { return to + p / width * row_stride + p % width * pixel_stride; };
#ifdef GATEDCONV_SHUFFLE
  for (int64_t i = 0; pixels >= kLanes && i * kLanes < pixels; ++i) {
    const int64_t p = square_begin(i, pixels);
    int64_t x = p % width;
    float* pixel[kLanes];
    pixel[0] = place(p);
    for (int q = 1; q < kLanes; ++q) {
      const bool wraps = ++x == width;
      pixel[q] = pixel[q - 1] + (wraps ? row_stride - (width - 1) * pixel_stride : pixel_stride);
      if (wraps) x = 0;
    }
    for (int64_t c = 0; c < count; c += kLanes) {
      vec rows[kLanes];
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; ++k) rows[k] = planes[c + k] ? load(planes[c + k] + p) : vec{};
      transpose_square<kLanes / 2>(rows);
#pragma GCC unroll 16
      for (int q = 0; q < kLanes; ++q) store(pixel[q] + c, rows[q]);
    }
  }
  if (pixels >= kLanes) return;
#endif
  for (int64_t p = 0; p < pixels; ++p) {
    float* pixel = place(p);
    for (int64_t c = 0; c < count; ++c) pixel[c] = planes[c] ? planes[c][p] : 0;
  }
}

static void map_to_planes(const float* from, ptrdiff_t pixel_stride, int64_t pixels, float* const* planes,
                          int64_t count) {
#ifdef GATEDCONV_SHUFFLE
  for (int64_t i = 0; pixels >= kLanes && i * kLanes < pixels; ++i) {
    const int64_t p = square_begin(i, pixels);
    for (int64_t c = 0; c < count; c += kLanes) {
      vec rows[kLanes];
#pragma GCC unroll 16
      for (int q = 0; q < kLanes; ++q) rows[q] = load(from + (p + q) * pixel_stride + c);
      transpose_square<kLanes / 2>(rows);
#pragma GCC unroll 16
      for (int k = 0; k < kLanes; ++k) {
        if (c + k < count && planes[c + k]) store(planes[c + k] + p, rows[k]);
      }
    }
  }
  if (pixels >= kLanes) return;
#endif
  for (int64_t c = 0; c < count; ++c) {
    for (int64_t p = 0; planes[c] && p < pixels; ++p) planes[c][p] = from[p * pixel_stride + c];
  }
}

static void spread(const float* from, ptrdiff_t pixel_stride, int64_t pixels, float* to, int64_t channels,
                   const Spread& places) {
  int64_t c = 0;
#if defined(__GNUC__) && !defined(__clang__)
  for (; c + kLanes <= channels; c += kLanes) {
    int32_t first = -1;
    lanes_of_int pick{}, open{};
    for (int k = 0; k < kLanes; ++k) {
      if (places[c + k] < 0) continue;
      if (first < 0) first = places[c + k];
      pick[k] = places[c + k] - first;
      open[k] = -1;
    }
    const float* pixel = from + std::max(first, 0);
    for (int64_t p = 0; p < pixels; ++p, pixel += pixel_stride) {
      const lanes_of_int picked = reinterpret_cast<lanes_of_int>(__builtin_shuffle(load(pixel), pick));
      store(to + p * channels + c, reinterpret_cast<vec>(picked & open));
    }
  }
#endif
  for (; c < channels; ++c) {
    for (int64_t p = 0; p < pixels; ++p) {
      to[p * channels + c] = places[c] < 0 ? 0 : from[p * pixel_stride + places[c]];
    }
  }
}

}  // namespace gatedconv::GATEDCONV_ISA
