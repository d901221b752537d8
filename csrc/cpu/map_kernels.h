// Kernels that move or pool maps: input and output conversion, pooling, gather, scatter-add, subsample, add.
#pragma once

#include <algorithm>
#include <limits>
#include <vector>

#include "simd.h"

namespace gatedconv::GATEDCONV_ISA {

// Zeros the border of the output map beside the rows of the part (and above the first, below the last).
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
    for (int c = 0; c < out.channels; ++c) {
      for (int x = 0; x < out.width; ++x) to[x * out.pixel + c] = from[c * stride[1] + x * stride[3]];
    }
    // Channels between the last one and the pixel's end are read by nobody but whole vectors: keep them
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

// Max or average over windows clipped to the image.
static inline void pool(const Step& step, const Part& part) {
  const bool max = step.op == Op::kMaxPool;
  const int last = std::min(vectors(step.out.channels), part.panel1 * kPanelVectors);
  for (int64_t unit = part.unit0; unit < part.unit1; ++unit) {
    const int64_t image = unit / step.rows, y = unit % step.rows;
    const int top = static_cast<int>(y) * step.stride_h - step.pad_top;
    const int y0 = std::max(top, 0), y1 = std::min(top + step.kernel_h, step.in.height);
    for (int x = 0; x < step.out.width; ++x) {
      const int left = x * step.stride_w - step.pad_left;
      const int x0 = std::max(left, 0), x1 = std::min(left + step.kernel_w, step.in.width);
      // With ceil_mode the last window may hang over the padding too; PyTorch counts up to the padding's end.
      const int whole = (std::min(top + step.kernel_h, step.in.height + step.pad_top) - top) *
                        (std::min(left + step.kernel_w, step.in.width + step.pad_left) - left);
      const float scale = 1.0f / (step.option ? whole : (y1 - y0) * (x1 - x0));
      for (int v = part.panel0 * kPanelVectors; v < last; ++v) {
        vec sum = max ? splat(-std::numeric_limits<float>::infinity()) : vec{};
        for (int i = y0; i < y1; ++i) {
          const float* from = step.in.at(image, i) + v * kLanes;
          for (int j = x0; j < x1; ++j) {
            const vec value = load(from + j * step.in.pixel);
            if (max) {
              sum = (value <= sum) | (sum != sum) ? sum : value;  // a NaN wins and stays
            } else {
              sum += value;
            }
          }
        }
        store(step.out.at(image, y) + x * step.out.pixel + v * kLanes,
              activate(max ? sum : sum * scale, step.act));
      }
    }
  }
}

// Mean over the whole map: one output pixel.
static inline void pool_mean(const Step& step, const Part& part) {
  const float scale = 1.0f / (static_cast<float>(step.in.height) * step.in.width);
  const int last = std::min(vectors(step.out.channels), part.panel1 * kPanelVectors);
  for (int64_t image = part.unit0; image < part.unit1; ++image) {
    for (int v = part.panel0 * kPanelVectors; v < last; ++v) {
      vec total{};
      for (int y = 0; y < step.in.height; ++y) {  // a sum of row sums rounds less than one long sum
        const float* from = step.in.at(image, y) + v * kLanes;
        vec sum{};
        for (int x = 0; x < step.in.width; ++x) sum += load(from + x * step.in.pixel);
        total += sum;
      }
      store(step.out.at(image, 0) + v * kLanes, total * scale);
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

// out = act(residual + in), or, with an index list, act(residual) with act(residual + in) at the listed
// channels.
static inline void add(const Step& step, const Part& part) {
  const int last = std::min(vectors(step.out.channels), part.panel1 * kPanelVectors);
  const bool scatter = step.op == Op::kScatterAdd;
  std::vector<int> source(scatter ? step.out.channels : 0, -1);
  for (int64_t k = 0; scatter && k < step.index_size; ++k) source[step.index[k]] = static_cast<int>(k);
  const std::vector<std::vector<Piece>> pieces = find_pieces(source);
  for (int64_t unit = part.unit0; unit < part.unit1; ++unit) {
    const int64_t image = unit / step.rows, y = unit % step.rows;
    const float* from = step.in.at(image, y);
    const float* stream = step.residual.at(image, y);
    float* to = step.out.at(image, y);
    for (int x = 0; x < step.out.width;
         ++x, from += step.in.pixel, stream += step.residual.pixel, to += step.out.pixel) {
      for (int v = part.panel0 * kPanelVectors; v < last; ++v) {
        const int c = v * kLanes;
        const vec part_of = scatter ? assemble(from, pieces[v]) : load(from + c);
        store(to + c, activate(load(stream + c) + part_of, step.act));
      }
    }
  }
}

}  // namespace gatedconv::GATEDCONV_ISA
