// Direct convolution over NHWC maps with a zero border.
#pragma once

#include "activations.h"
#include "register_tile.h"

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

// Weights that are read after the current ones: every tile fetches a panel of them.
struct Ahead {
  const float* weights = nullptr;
  ptrdiff_t panel_stride = 0;
  int panels = 0;
  const float* take() {
    if (panels == 0) return nullptr;
    --panels;
    weights += panel_stride;
    return weights - panel_stride;
  }
};

// The convolution of `width` pixels of a line, `v` vectors of output channels; the pointers are at the first
// pixel, those of the output and residual at the first channel.
static inline void conv_line(const Step& step, const Lines& lines, Tile& tile, Ahead& ahead, int v,
                             const float* in, float* out, const float* residual, int width) {
  for_pieces(width, v, [&](int x, int px) {
    tile.pixels = in + x * tile.pixel_stride;
    tile.out = out + x * lines.out;
    tile.residual = residual ? residual + x * lines.residual : nullptr;
    tile.ahead = ahead.take();
    function_of<Tiles>(px, v)(tile);
    if (!tile.pauses) activate_pixels(step.late, step.value, tile.out, px, lines.out, v);
  });
}

static inline Tile make_tile(const Step& step, const Taps& taps, const Lines& lines) {
  Tile tile{};
  tile.pixel_stride = lines.in;
  tile.taps = taps.offsets.data();
  tile.num_taps = static_cast<int>(taps.offsets.size());
  tile.run = taps.run;
  tile.panel_stride = static_cast<ptrdiff_t>(step.kernel_h) * step.kernel_w * step.span * kPanel;
  tile.residual_stride = lines.residual;
  tile.out_stride = lines.out;
  tile.act = step.act;
  return tile;
}

// With few pixels the weights come from memory about as fast as they are used: while some are, the next ones
// are fetched. Up to the 8x8 pixels of an image's last maps: with half and twice as many, layers of 49 to 100
// pixels take 0.96 to 1.14 and 0.91 to 1.04 of the time (AMD EPYC, AVX-512 and AVX2).
constexpr int64_t kFewPixels = 64;

static inline void set_vector(const Step& step, int v0, Tile& tile) {
  tile.weights = step.weights + (v0 / kPanelVectors) * tile.panel_stride + (v0 % kPanelVectors) * kLanes;
  tile.bias = step.bias + v0 * kLanes;
  tile.keep = step.keep ? step.keep + v0 * kLanes : nullptr;
}

// The panels of the vectors behind `v` ones from v0 on.
static inline Ahead panels_behind(const Step& step, const Tile& tile, int v0, int v, int last) {
  const int first = (v0 + v) / kPanelVectors,
            count = (std::min(v, last - v0 - v) + kPanelVectors - 1) / kPanelVectors;
  if (count <= 0 || v0 % kPanelVectors != 0) return {};
  return {step.weights + first * tile.panel_stride, tile.panel_stride, count};
}

static inline const float* residual_at(const Step& step, int64_t image, int64_t y) {
  return step.residual.data ? step.residual.at(image, y) : nullptr;
}

// The sum over taps and channels in blocks whose weights stay in the nearest cache for all pixels: floats of
// input below one tap. Between the blocks the sums wait in the output. With 64 outputs, those of the
// widest tile, 96 take 24 KiB, half of a cache of 48 KiB. 48 take 1.02 to 1.09 of the
// time; 192 take 0.93 to 1.02 with AVX-512, but up to 1.07 with AVX2 (AMD EPYC with such a cache).
constexpr int kBlock = 96;

// Whether that pays: the weights of one tile's outputs are read more than once and do not fit there anyway.
static inline bool in_blocks(const Taps& taps, int64_t pixels) {
  return pixels > max_pixels(kMaxVectors) && pixels <= kFewPixels &&
         static_cast<int64_t>(taps.offsets.size()) * taps.run > 2 * kBlock;
}

// A block of the sum: `run` floats below each of some taps.
struct Block {
  int tap, taps, first, run;
  ptrdiff_t weights;  // of its first one in a panel
};

static inline std::vector<Block> find_blocks(const Taps& taps, bool cut) {
  const int count = static_cast<int>(taps.offsets.size());
  if (!cut) return {{0, count, 0, taps.run, 0}};
  std::vector<Block> blocks;
  const int pieces = (taps.run + kBlock - 1) / kBlock;
  for (int tap = 0; tap < count; ++tap) {
    for (int i = 0; i < pieces; ++i) {
      const int first = taps.run * i / pieces, end = taps.run * (i + 1) / pieces;
      blocks.push_back(
          {tap, 1, first, end - first, (static_cast<ptrdiff_t>(tap) * taps.run + first) * kPanel});
    }
  }
  return blocks;
}

static inline void conv_direct(const Step& step, const Part& part) {
  const Taps taps = find_taps(step);
  const Lines lines = find_lines(step);
  const int last = std::min(vectors(step.out.channels), part.panel1 * kPanelVectors);
  const bool grouped = step.index != nullptr;
  Tile tile = make_tile(step, taps, lines);
  const int64_t pixels = (part.unit1 - part.unit0) * lines.width;
  const int typical = is_flat(step) || lines.per_image == 0 ? 2 * max_pixels(2) : lines.width;
  const std::vector<Block> blocks = find_blocks(taps, in_blocks(taps, pixels));
  for (int v0 = part.panel0 * kPanelVectors, v = 0; v0 < last; v0 += v) {
    v = tile_vectors(last - v0, typical);
    if (grouped) v = std::min(v, kPanelVectors - v0 % kPanelVectors);  // panels read different input channels
    const int channel = v0 * kLanes;
    const float* group = step.in.data + (grouped ? step.index[v0 / kPanelVectors] : 0);
    set_vector(step, v0, tile);
    const float* weights = tile.weights;
    for (const Block& block : blocks) {
      const bool ends = &block == &blocks.back();
      Ahead ahead;
      if (pixels > 1 && pixels <= kFewPixels) {
        ahead = ends ? panels_behind(step, tile, v0, v, last)
                     : Ahead{weights + (&block)[1].weights, tile.panel_stride,
                             (v + kPanelVectors - 1) / kPanelVectors};
      }
      tile.taps = taps.offsets.data() + block.tap;
      tile.num_taps = block.taps;
      tile.run = block.run;
      tile.weights = weights + block.weights;
      tile.resumes = &block != &blocks.front();
      tile.pauses = !ends;
      for_lines(step, part, lines, [&](int64_t image, int64_t y, int width) {
        const float* in = group + image * step.in.image + y * step.stride_h * step.in.row + block.first;
        const float* residual = residual_at(step, image, y);
        conv_line(step, lines, tile, ahead, v, in, step.out.at(image, y) + channel,
                  residual ? residual + channel : nullptr, width);
      });
    }
  }
}

// Pixels that are changed at a time: they stay in the nearest caches while all outputs are made of them.
// 24576 floats are 96 KiB, a quarter of the least cache_bytes(); 28 and 224 are 2 and 16 tiles of 14 pixels.
// Half and twice each number take 0.94 to 1.12 of the time, as much as the same number does when timed again,
// and 0.99 to 1.01 of DenseNet-121's (AMD EPYC, AVX-512 and AVX2).
static inline int changed_pixels(const Step& step) {
  return std::clamp(24576 / std::max(step.in.channels, 1), 28, 224);
}

static inline size_t changed_scratch(const Step& step) {
  return static_cast<size_t>(changed_pixels(step)) * ((step.in.channels + kPanel - 1) / kPanel * kPanel);
}

// `count` input pixels times their image's gate, then scaled, shifted and activated, into `to`.
static inline void change_pixels(const Step& step, const float* from, ptrdiff_t stride, int count,
                                 const float* gate, ptrdiff_t gate_stride, float* to) {
  const int channels = step.in.channels, padded = (channels + kPanel - 1) / kPanel * kPanel;
  const Act quick = in_registers(step.pre_act) ? step.pre_act : Act::kNone;
  for (int i = 0; i < count; ++i, from += stride, gate += gate_stride, to += padded) {
    for (int c = 0; c < channels; c += kLanes) {
      vec value = load(from + c);
      if (step.gate.data) value *= load(gate + c);
      if (step.pre) value = value * load(step.pre + c) + load(step.pre + padded + c);
      store(to + c, activate(value, quick));
    }
    if (!in_registers(step.pre_act)) activate_pixels(step.pre_act, step.value, to, 1, 0, vectors(channels));
  }
}

// A 1x1 convolution of what a gate or a norm in front of it makes of the input.
static inline void conv_changed(const Step& step, const Part& part, float* scratch) {
  const Taps taps{{0}, step.span};
  const Lines lines = find_lines(step);
  const int last = std::min(vectors(step.out.channels), part.panel1 * kPanelVectors);
  const int block = changed_pixels(step);
  const bool by_image = lines.per_image == 0;
  const int64_t pixels = (part.unit1 - part.unit0) * lines.width;
  Tile tile = make_tile(step, taps, lines);
  tile.pixel_stride = (step.in.channels + kPanel - 1) / kPanel * kPanel;
  for_lines(step, part, lines, [&](int64_t image, int64_t y, int width) {
    const float* in = step.in.data + image * step.in.image + y * step.stride_h * step.in.row;
    const float* gate = step.gate.data ? step.gate.at(image, 0) : nullptr;
    const ptrdiff_t gate_stride = gate && by_image ? step.gate.image : 0;
    const float* residual = residual_at(step, image, y);
    for (int x = 0; x < width; x += block) {
      const int count = std::min(block, width - x);
      change_pixels(step, in + x * lines.in, lines.in, count, gate ? gate + x * gate_stride : nullptr,
                    gate_stride, scratch);
      for (int v0 = part.panel0 * kPanelVectors, v = 0; v0 < last; v0 += v) {
        v = tile_vectors(last - v0, count);
        const int channel = v0 * kLanes;
        set_vector(step, v0, tile);
        Ahead ahead;
        if (pixels > 1 && pixels <= kFewPixels) ahead = panels_behind(step, tile, v0, v, last);
        conv_line(step, lines, tile, ahead, v, scratch, step.out.at(image, y) + x * lines.out + channel,
                  residual ? residual + x * lines.residual + channel : nullptr, count);
      }
    }
  });
}

}  // namespace gatedconv::GATEDCONV_ISA
