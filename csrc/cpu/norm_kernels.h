// Norms and softmax: over the channels of a pixel, or over groups of channels of an image.
#pragma once

#include <algorithm>
#include <cmath>
#include <limits>

#include "activations.h"

namespace gatedconv::GATEDCONV_ISA {

static inline float sum_lanes(vec value) {
  float sum = 0;
  for (int i = 0; i < kLanes; ++i) sum += value[i];
  return sum;
}

// Calls body(c, vector) for the channels [begin, end) of a pixel, `fill` in the lanes beyond the end.
template <typename Body>
static inline void for_vectors(const float* pixel, int begin, int end, float fill, Body body) {
  int c = begin;
  for (; c + kLanes <= end; c += kLanes) body(c, load(pixel + c));
  if (c == end) return;
  vec rest = splat(fill);
  for (int i = 0; c + i < end; ++i) rest[i] = pixel[c + i];
  body(c, rest);
}

// out = (x - mean) / sqrt(variance + epsilon) * scale + shift over the channels of every pixel.
static inline void layer_norm(const Step& step, const Part& part) {
  const int channels = step.out.channels, padded = (channels + kPanel - 1) / kPanel * kPanel;
  const float* shift = step.bias + padded;
  for (int64_t unit = part.unit0; unit < part.unit1; ++unit) {
    const int64_t image = unit / step.rows, y = unit % step.rows;
    const float* from = step.in.at(image, y);
    float* to = step.out.at(image, y);
    for (int x = 0; x < step.out.width; ++x, from += step.in.pixel, to += step.out.pixel) {
      vec sum{}, squares{};
      for_vectors(from, 0, channels, 0.0f, [&](int, vec value) { sum += value; });
      const float mean = sum_lanes(sum) / channels;
      for_vectors(from, 0, channels, mean,
                  [&](int, vec value) { squares += (value - mean) * (value - mean); });
      const float scale = 1.0f / std::sqrt(sum_lanes(squares) / channels + step.value);
      for (int c = 0; c < channels; c += kLanes) {
        store(to + c,
              activate((load(from + c) - mean) * scale * load(step.bias + c) + load(shift + c), step.act));
      }
    }
  }
}

static inline void softmax(const Step& step, const Part& part) {
  const int channels = step.out.channels;
  for (int64_t unit = part.unit0; unit < part.unit1; ++unit) {
    const int64_t image = unit / step.rows, y = unit % step.rows;
    const float* from = step.in.at(image, y);
    float* to = step.out.at(image, y);
    for (int x = 0; x < step.out.width; ++x, from += step.in.pixel, to += step.out.pixel) {
      float largest = -std::numeric_limits<float>::infinity();
      for (int c = 0; c < channels; ++c)
        largest = from[c] <= largest || largest != largest ? largest : from[c];
      vec sum{};
      for_vectors(from, 0, channels, -std::numeric_limits<float>::infinity(), [&](int c, vec value) {
        const vec e = exp_negative(value - largest);
        sum += e;
        store(to + c, e);
      });
      const float scale = 1.0f / sum_lanes(sum);
      for (int c = 0; c < channels; c += kLanes) store(to + c, load(to + c) * scale);
    }
  }
}

// One unit is one group of channels of one image; other groups, maybe in the same vector, are others' work.
static inline void group_norm(const Step& step, const Part& part) {
  const Map &in = step.in, &out = step.out;
  const int size = out.channels / step.span, padded = (out.channels + kPanel - 1) / kPanel * kPanel;
  for (int64_t unit = part.unit0; unit < part.unit1; ++unit) {
    const int64_t image = unit / step.rows;
    const int begin = static_cast<int>(unit % step.rows) * size, end = begin + size;
    const auto total = [&](float fill, auto value_of) {
      double sum = 0;
      for (int y = 0; y < in.height; ++y) {
        vec row{};
        for (int x = 0; x < in.width; ++x) {
          for_vectors(in.at(image, y) + x * in.pixel, begin, end, fill,
                      [&](int, vec v) { row += value_of(v); });
        }
        sum += sum_lanes(row);
      }
      return sum / (static_cast<double>(size) * in.height * in.width);
    };
    const float mean = static_cast<float>(total(0.0f, [](vec v) { return v; }));
    const double variance = total(mean, [&](vec v) { return (v - mean) * (v - mean); });
    const float scale = static_cast<float>(1.0 / std::sqrt(variance + step.value));
    for (int y = 0; y < out.height; ++y) {
      for (int x = 0; x < out.width; ++x) {
        float* to = out.at(image, y) + x * out.pixel;
        for_vectors(in.at(image, y) + x * in.pixel, begin, end, 0.0f, [&](int c, vec v) {
          v = (v - mean) * scale * load(step.bias + c) + load(step.bias + padded + c);
          v = activate(v, step.act);
          if (step.late != Act::kNone)
            activate_pixels(step.late, step.value, reinterpret_cast<float*>(&v), 1, 0, 1);
          if (c + kLanes <= end) return store(to + c, v);
          for (int i = 0; c + i < end; ++i) to[c + i] = v[i];
        });
      }
    }
    const auto clear = [&](int row, int column, int pixels) {
      for (int i = 0; i < pixels; ++i) {
        std::fill_n(out.at(image, row) + (column + i) * out.pixel + begin, size, 0.0f);
      }
    };
    const int whole = out.halo + out.width + out.right();
    for (int row = -out.halo; row < out.height + out.bottom(); ++row) {
      const bool outside = row < 0 || row >= out.height;
      clear(row, -out.halo, outside ? whole : out.halo);
      if (!outside) clear(row, out.width, out.right());
    }
  }
}

}  // namespace gatedconv::GATEDCONV_ISA
