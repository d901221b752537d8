// Direct convolution and depthwise convolution over NHWC maps with a zero border.
#pragma once

#include "conv_tile.h"

namespace gatedconv::GATEDCONV_ISA {

// Offsets of the taps. Where a pixel's channels fill its stride, the taps of one kernel row are one run.
struct Taps {
  std::vector<int> offsets;
  int run;
};

static inline Taps find_taps(const Step& step) {
  const Map& in = step.in;
  const bool joined = step.dilation_w == 1 && in.pixel == step.span;
  Taps taps{{}, joined ? step.kernel_w * step.span : step.span};
  for (int y = 0; y < step.kernel_h; ++y) {
    const ptrdiff_t row = (y * step.dilation_h - step.pad_top) * in.row;
    for (int x = 0; x < (joined ? 1 : step.kernel_w); ++x) {
      taps.offsets.push_back(static_cast<int>(row + (x * step.dilation_w - step.pad_left) * in.pixel));
    }
  }
  return taps;
}

// How output pixels line up. Rows that follow one another without a border are one long row, and maps of one
// pixel are a row of images, so that a linear layer over the batch is one matrix product.
struct Lines {
  int64_t per_image;  // lines of one image; 0 if all images are one line
  int width;
  ptrdiff_t in, out, residual;  // from one output pixel to the next
};

static inline bool has_border(const Map& map) {
  return map.row != map.width * map.pixel;
}

static inline Lines find_lines(const Step& step) {
  if (step.out.height == 1 && step.out.width == 1) {
    return {0, 1, step.in.image, step.out.image, step.residual.image};
  }
  return {step.out.height, step.out.width, step.stride_w * step.in.pixel, step.out.pixel,
          step.residual.pixel};
}

static inline bool is_flat(const Step& step) {
  return step.kernel_h == 1 && step.kernel_w == 1 && step.stride_h == 1 && step.stride_w == 1 &&
         !has_border(step.in) && !has_border(step.out) && (!step.residual.data || !has_border(step.residual));
}

// Calls body(image, y, width) for every line of a part.
template <typename Body>
static inline void for_lines(const Step& step, const Part& part, const Lines& lines, Body body) {
  if (lines.per_image == 0) return body(part.unit0, int64_t{0}, static_cast<int>(part.unit1 - part.unit0));
  const bool flat = is_flat(step);
  for (int64_t unit = part.unit0; unit < part.unit1;) {
    const int64_t image = unit / step.rows, y = unit % step.rows;
    const int64_t rows = flat ? std::min<int64_t>(step.rows - y, part.unit1 - unit) : 1;
    body(image, y, static_cast<int>(rows) * lines.width);
    unit += rows;
  }
}

static inline void conv_direct(const Step& step, const Part& part) {
  const Taps taps = find_taps(step);
  const Lines lines = find_lines(step);
  const ptrdiff_t panel_stride = static_cast<ptrdiff_t>(step.kernel_h) * step.kernel_w * step.span * kPanel;
  const int last = std::min(vectors(step.out.channels), part.panel1 * kPanelVectors);
  const bool grouped = step.index != nullptr;
  Tile tile{};
  tile.pixel_stride = lines.in;
  tile.taps = taps.offsets.data();
  tile.num_taps = static_cast<int>(taps.offsets.size());
  tile.run = taps.run;
  tile.panel_stride = panel_stride;
  tile.residual_stride = lines.residual;
  tile.out_stride = lines.out;
  tile.act = step.act;
  const int typical = is_flat(step) || lines.per_image == 0 ? 2 * max_pixels(2) : lines.width;
  for (int v0 = part.panel0 * kPanelVectors, v = 0; v0 < last; v0 += v) {
    v = tile_vectors(last - v0, typical);
    if (grouped) v = std::min(v, kPanelVectors - v0 % kPanelVectors);  // panels read different input channels
    const int channel = v0 * kLanes;
    const float* group = step.in.data + (grouped ? step.index[v0 / kPanelVectors] : 0);
    tile.weights = step.weights + (v0 / kPanelVectors) * panel_stride + (v0 % kPanelVectors) * kLanes;
    tile.bias = step.bias + channel;
    tile.keep = step.keep ? step.keep + channel : nullptr;
    for_lines(step, part, lines, [&](int64_t image, int64_t y, int width) {
      const float* in = group + image * step.in.image + y * step.stride_h * step.in.row;
      float* out = step.out.at(image, y) + channel;
      const float* residual = step.residual.data ? step.residual.at(image, y) + channel : nullptr;
      for_pieces(width, v, [&](int x, int px) {
        tile.pixels = in + x * lines.in;
        tile.out = out + x * lines.out;
        tile.residual = residual ? residual + x * lines.residual : nullptr;
        tile_function(px, v)(tile);
      });
    });
  }
}

static inline void conv_depthwise(const Step& step, const Part& part) {
  const int padded = (step.out.channels + kPanel - 1) / kPanel * kPanel;
  const int last = std::min(vectors(step.out.channels), part.panel1 * kPanelVectors);
  for (int64_t unit = part.unit0; unit < part.unit1; ++unit) {
    const int64_t image = unit / step.rows, y = unit % step.rows;
    const float* top = step.in.data + image * step.in.image +
                       (y * step.stride_h - step.pad_top) * step.in.row - step.pad_left * step.in.pixel;
    for (int v = part.panel0 * kPanelVectors; v < last; ++v) {
      const int c = v * kLanes;
      for (int x = 0; x < step.out.width; ++x) {
        const float* window = top + x * step.stride_w * step.in.pixel + c;
        vec sum = load(step.bias + c);
        const float* w = step.weights + c;
        for (int i = 0; i < step.kernel_h; ++i) {
          for (int j = 0; j < step.kernel_w; ++j, w += padded) {
            sum += load(window + i * step.dilation_h * step.in.row + j * step.dilation_w * step.in.pixel) *
                   load(w);
          }
        }
        if (step.residual.data) sum += load(step.residual.at(image, y) + x * step.residual.pixel + c);
        store(step.out.at(image, y) + x * step.out.pixel + c, activate(sum, step.act));
      }
    }
  }
}

}  // namespace gatedconv::GATEDCONV_ISA
