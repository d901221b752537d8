// Kernels that move or combine maps: input and output conversion, gather, subsample, copies, sums, products,
// upsampling, pixel shuffle.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "activations.h"

namespace gatedconv::GATEDCONV_ISA {

// Zeros the border of the output map next to the rows of the part (and above the first, below the last).
static inline void clear_border(const Map& map, int64_t image, int y0, int y1, int channel0, int channel1) {
  const auto clear = [&](float* from, int pixels) {
    for (int i = 0; i < pixels; ++i, from += map.pixel) {
      for (int c = channel0; c < channel1; c += kLanes) store(from + c, vec{});
    }
  };
  const int right = map.right(), bottom = map.bottom();
  if (map.halo == 0 && right == 0 && bottom == 0) return;
  const int whole = map.halo + map.width + right;
  for (int y = -map.halo; y < 0 && y0 == 0; ++y) clear(map.at(image, y) - map.halo * map.pixel, whole);
  for (int y = y0; y < y1; ++y) {
    clear(map.at(image, y) - map.halo * map.pixel, map.halo);
    clear(map.at(image, y) + map.width * map.pixel, right);
  }
  for (int y = map.height; y < map.height + bottom && y1 >= map.height; ++y) {
    clear(map.at(image, y) - map.halo * map.pixel, whole);
  }
}

static inline void read_input(const Step& step, const Part& part) {
  const Map& out = step.out;
  const int64_t* stride = step.source_stride;
  for (int64_t unit = part.unit0; unit < part.unit1; ++unit) {
    const int64_t image = unit / step.rows, y = unit % step.rows;
    const float* from = step.source + image * stride[0] + y * stride[2];
    float* to = out.at(image, y);
    if (out.channels == 3 && out.pixel == 3 && stride[3] == 1) {  // a form that compilers make vectors of
      const float *red = from, *green = from + stride[1], *blue = from + 2 * stride[1];
      for (int x = 0; x < out.width; ++x) {
        const float a = red[x], b = green[x], c = blue[x];
        to[3 * x] = a, to[3 * x + 1] = b, to[3 * x + 2] = c;
      }
    } else {
      for (int c = 0; c < out.channels; ++c) {
        for (int x = 0; x < out.width; ++x) to[x * out.pixel + c] = from[c * stride[1] + x * stride[3]];
      }
    }
    // Channels between the last one and the pixel's end are read only as parts of whole vectors: keep them
    // finite.
    for (int c = out.channels; c < out.pixel; ++c) {
      for (int x = 0; x < out.width; ++x) to[x * out.pixel + c] = 0;
    }
    // Narrow pixels are shorter than a vector, so this border is cleared here, float by float.
    const auto zero = [&](int64_t row, int64_t x0, int64_t x1) {
      std::fill(out.at(image, row) + x0 * out.pixel, out.at(image, row) + x1 * out.pixel, 0.0f);
    };
    const int64_t left = -out.halo, right = out.width + out.right();
    for (int64_t row = left; row < 0 && y == 0; ++row) zero(row, left, right);
    zero(y, left, 0);
    zero(y, out.width, right);
    for (int64_t row = out.height; row < out.height + out.bottom() && y + 1 == out.height; ++row)
      zero(row, left, right);
  }
}

static inline void write_output(const Step& step, const Part& part) {
  const Map& in = step.in;
  const int64_t area = static_cast<int64_t>(in.height) * in.width;
  for (int64_t unit = part.unit0; unit < part.unit1; ++unit) {
    const int64_t image = unit / step.rows, y = unit % step.rows;
    const float* from = in.at(image, y);
    float* to = step.target + image * in.channels * area + y * in.width;
    for (int c = 0; c < in.channels; ++c) {
      for (int x = 0; x < in.width; ++x) to[c * area + x] = from[x * in.pixel + c];
    }
  }
}

// Lanes of one input register and where they go in one output register.
struct Piece {
  int from;  // first channel of the input register
  lanes_of_int pick, open;
};

// For every output register the pieces that make it up; source[k] is output channel k's input channel, or -1.
static inline std::vector<std::vector<Piece>> find_pieces(const std::vector<int>& source) {
  std::vector<std::vector<Piece>> pieces(vectors(static_cast<int>(source.size())));
  for (size_t k = 0; k < source.size(); ++k) {
    if (source[k] < 0) continue;
    const int from = source[k] / kLanes * kLanes;
    std::vector<Piece>& own = pieces[k / kLanes];
    auto found = std::find_if(own.begin(), own.end(), [&](const Piece& piece) { return piece.from == from; });
    if (found == own.end()) found = own.insert(own.end(), Piece{from, {}, {}});
    found->pick[k % kLanes] = source[k] - from;
    found->open[k % kLanes] = -1;
  }
  return pieces;
}

static inline __attribute__((always_inline)) vec assemble(const float* pixel,
                                                          const std::vector<Piece>& pieces) {
  lanes_of_int value{};
  for (const Piece& piece : pieces) {
#if defined(__clang__)
    for (int i = 0; i < kLanes; ++i) {
      if (piece.open[i]) value[i] |= reinterpret_cast<lanes_of_int>(load(pixel + piece.from))[piece.pick[i]];
    }
#else
    value |=
        reinterpret_cast<lanes_of_int>(__builtin_shuffle(load(pixel + piece.from), piece.pick)) & piece.open;
#endif
  }
  return reinterpret_cast<vec>(value);
}

// gather: out[k] = in[index[k]]; subsample: out[offset + c] = in[c] at every stride-th pixel, zeros
// elsewhere.
static inline void move_channels(const Step& step, const Part& part) {
  std::vector<int> source(step.out.channels, -1);
  for (int k = 0; step.op == Op::kGather && k < step.out.channels; ++k)
    source[k] = static_cast<int>(step.index[k]);
  for (int c = 0; step.op == Op::kSubsample && c < step.in.channels; ++c) source[step.option + c] = c;
  const std::vector<std::vector<Piece>> pieces = find_pieces(source);
  for (int64_t unit = part.unit0; unit < part.unit1; ++unit) {
    const int64_t image = unit / step.rows, y = unit % step.rows;
    const float* from = step.in.at(image, y * step.stride_h);
    float* to = step.out.at(image, y);
    for (int x = 0; x < step.out.width; ++x, from += step.stride_w * step.in.pixel, to += step.out.pixel) {
      for (size_t v = 0; v < pieces.size(); ++v) store(to + v * kLanes, assemble(from, pieces[v]));
    }
  }
}

// A constant for every channel, over the whole map.
static inline void fill(const Step& step, const Part& part) {
  const int last = std::min(vectors(step.out.channels), part.panel1 * kPanelVectors);
  for (int64_t unit = part.unit0; unit < part.unit1; ++unit) {
    float* to = step.out.at(unit / step.rows, unit % step.rows);
    for (int x = 0; x < step.out.width; ++x, to += step.out.pixel) {
      for (int v = part.panel0 * kPanelVectors; v < last; ++v) {
        store(to + v * kLanes, activate(load(step.bias + v * kLanes), step.act));
      }
    }
  }
}

// out = act(residual + bias) with act(residual + bias + in) at the listed channels; either term may be
// missing.
static inline void scatter_add(const Step& step, const Part& part) {
  const int last = std::min(vectors(step.out.channels), part.panel1 * kPanelVectors);
  std::vector<int> source(step.out.channels, -1);
  for (int64_t k = 0; k < step.index_size; ++k) source[step.index[k]] = static_cast<int>(k);
  const std::vector<std::vector<Piece>> pieces = find_pieces(source);
  for (int64_t unit = part.unit0; unit < part.unit1; ++unit) {
    const int64_t image = unit / step.rows, y = unit % step.rows;
    const float* from = step.in.at(image, y);
    const float* stream = step.residual.exists() ? step.residual.at(image, y) : nullptr;
    float* to = step.out.at(image, y);
    for (int x = 0; x < step.out.width; ++x, from += step.in.pixel, to += step.out.pixel) {
      for (int v = part.panel0 * kPanelVectors; v < last; ++v) {
        const int c = v * kLanes;
        vec value = assemble(from, pieces[v]);
        if (step.bias) value += load(step.bias + c);
        if (stream) value += load(stream + x * step.residual.pixel + c);
        store(to + c, activate(value, step.act));
      }
    }
  }
}

// out = act(in op residual); the residual is a map of the same size, one pixel for all, or one channel for
// all.
template <typename Combine>
static inline void combine(const Step& step, const Part& part, Combine op) {
  const Map& other = step.residual;
  const bool one_pixel = other.height == 1 && other.width == 1;
  const bool one_channel = other.channels == 1 && step.out.channels > 1;
  const ptrdiff_t pixel = one_pixel ? 0 : other.pixel;
  const int last = std::min(vectors(step.out.channels), part.panel1 * kPanelVectors);
  for (int64_t unit = part.unit0; unit < part.unit1; ++unit) {
    const int64_t image = unit / step.rows, y = unit % step.rows;
    const float* from = step.in.at(image, y);
    const float* with = other.at(image, one_pixel ? 0 : y);
    float* to = step.out.at(image, y);
    for (int x = 0; x < step.out.width; ++x, from += step.in.pixel, with += pixel, to += step.out.pixel) {
      for (int v = part.panel0 * kPanelVectors; v < last; ++v) {
        const int c = v * kLanes;
        const vec second = one_channel ? splat(with[0]) : load(with + c);
        store(to + c, activate(op(load(from + c), second), step.act));
      }
    }
  }
}

// Into channels of a wider map, not one float beyond them.
static inline void copy(const Step& step, const Part& part) {
  const Map &in = step.in, &out = step.out;
  const int channels = out.channels, body = channels / kLanes * kLanes;
  const auto clear = [&](float* from, int64_t pixels) {
    for (int64_t i = 0; i < pixels; ++i) std::fill_n(from + i * out.pixel, channels, 0.0f);
  };
  const int64_t row_pixels = out.halo + out.width + out.right();
  for (int64_t unit = part.unit0; unit < part.unit1; ++unit) {
    const int64_t image = unit / step.rows, y = unit % step.rows;
    const float* from = in.at(image, y);
    float* to = out.at(image, y);
    for (int x = 0; x < out.width; ++x, from += in.pixel, to += out.pixel) {
      for (int c = 0; c < body; c += kLanes) store(to + c, load(from + c));
      for (int c = body; c < channels; ++c) to[c] = from[c];
    }
    clear(out.at(image, y) - out.halo * out.pixel, out.halo);
    clear(out.at(image, y) + out.width * out.pixel, out.right());
    for (int row = -out.halo; row < 0 && y == 0; ++row)
      clear(out.at(image, row) - out.halo * out.pixel, row_pixels);
    for (int row = out.height; row < out.height + out.bottom() && y + 1 == out.height; ++row) {
      clear(out.at(image, row) - out.halo * out.pixel, row_pixels);
    }
  }
}

// Pixel `to` of an upsampled line as PyTorch finds its source: floor(to * size / out).
static inline void resize_nearest(const Step& step, const Part& part) {
  const Map &in = step.in, &out = step.out;
  const float down = static_cast<float>(in.height) / out.height,
              across = static_cast<float>(in.width) / out.width;
  const int last = std::min(vectors(out.channels), part.panel1 * kPanelVectors);
  for (int64_t unit = part.unit0; unit < part.unit1; ++unit) {
    const int64_t image = unit / step.rows, y = unit % step.rows;
    const float* row = in.at(image, std::min(static_cast<int>(y * down), in.height - 1));
    float* to = out.at(image, y);
    for (int x = 0; x < out.width; ++x, to += out.pixel) {
      const float* from = row + std::min(static_cast<int>(x * across), in.width - 1) * in.pixel;
      for (int v = part.panel0 * kPanelVectors; v < last; ++v) {
        store(to + v * kLanes, activate(load(from + v * kLanes), step.act));
      }
    }
  }
}

// Two neighbors and their weights on a line.
struct Between {
  int first, second;
  float weight;  // of the second
};

static inline Between between(int64_t at, int size, int out, bool corners) {
  float source;
  if (corners) {
    source = out > 1 ? at * (static_cast<float>(size - 1) / (out - 1)) : 0.0f;
  } else {
    source = std::max((at + 0.5f) * (static_cast<float>(size) / out) - 0.5f, 0.0f);
  }
  const int first = std::min(static_cast<int>(source), size - 1);
  return {first, std::min(first + 1, size - 1), std::min(source - first, 1.0f)};
}

static inline void resize_bilinear(const Step& step, const Part& part) {
  const Map &in = step.in, &out = step.out;
  const bool corners = step.option != 0;
  const int last = std::min(vectors(out.channels), part.panel1 * kPanelVectors);
  for (int64_t unit = part.unit0; unit < part.unit1; ++unit) {
    const int64_t image = unit / step.rows;
    const Between down = between(unit % step.rows, in.height, out.height, corners);
    const float *upper = in.at(image, down.first), *lower = in.at(image, down.second);
    float* to = out.at(image, unit % step.rows);
    for (int x = 0; x < out.width; ++x, to += out.pixel) {
      const Between across = between(x, in.width, out.width, corners);
      const ptrdiff_t left = across.first * in.pixel, right = across.second * in.pixel;
      for (int v = part.panel0 * kPanelVectors; v < last; ++v) {
        const int c = v * kLanes;
        const vec top =
            load(upper + left + c) * (1.0f - across.weight) + load(upper + right + c) * across.weight;
        const vec bottom =
            load(lower + left + c) * (1.0f - across.weight) + load(lower + right + c) * across.weight;
        store(to + c, activate(top * (1.0f - down.weight) + bottom * down.weight, step.act));
      }
    }
  }
}

// out[y r + i, x r + j, c] = in[y, x, (c r + i) r + j].
static inline void pixel_shuffle(const Step& step, const Part& part) {
  const int r = step.kernel_h, channels = step.out.channels;
  const int whole = vectors(channels) * kLanes;
  for (int64_t unit = part.unit0; unit < part.unit1; ++unit) {
    const int64_t image = unit / step.rows, y = unit % step.rows;
    float* to = step.out.at(image, y);
    for (int x = 0; x < step.out.width; ++x, to += step.out.pixel) {
      const float* from = step.in.at(image, y / r) + x / r * step.in.pixel + (y % r) * r + x % r;
      for (int c = 0; c < channels; ++c) to[c] = from[c * r * r];
      for (int c = channels; c < whole; ++c) to[c] = 0.0f;
    }
    for (int x = 0; x < step.out.width && step.act != Act::kNone; ++x) {
      float* at = step.out.at(image, y) + x * step.out.pixel;
      for (int c = 0; c < whole; c += kLanes) store(at + c, activate(load(at + c), step.act));
    }
  }
}

// x where x > 0, else x times its channel's slope.
static inline void prelu(const Step& step, const Part& part) {
  const int last = std::min(vectors(step.out.channels), part.panel1 * kPanelVectors);
  for (int64_t unit = part.unit0; unit < part.unit1; ++unit) {
    const int64_t image = unit / step.rows, y = unit % step.rows;
    const float* from = step.in.at(image, y);
    float* to = step.out.at(image, y);
    for (int x = 0; x < step.out.width; ++x, from += step.in.pixel, to += step.out.pixel) {
      for (int v = part.panel0 * kPanelVectors; v < last; ++v) {
        const vec value = load(from + v * kLanes);
        store(to + v * kLanes, value > 0.0f ? value : value * load(step.bias + v * kLanes));
      }
    }
  }
}

}  // namespace gatedconv::GATEDCONV_ISA
