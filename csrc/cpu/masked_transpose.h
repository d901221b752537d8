// Channels side by side into planes and back, a square of one register's lanes at a time.
#pragma once

#include <algorithm>
#include <utility>

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

}  // namespace gatedconv::GATEDCONV_ISA
