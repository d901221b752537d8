// Cuts a masked convolution into bands of images that fit a core's cache: open channels in, one step of the
// plan's kernels, open channels out to their places.
#include "masked_maps.h"

#include <algorithm>
#include <cstring>
#include <limits>

#include "workspace.h"

namespace gatedconv {
namespace {

// Inputs times outputs up to which Winograd's weights, 36 for each, stay in the second-level cache: 1.1 MiB,
// which leaves nearly half of 2 MiB to the maps. Chosen by size. On an AMD EPYC (all its times:
// benchmarks/results/constants-epyc-2c.json) layers that half as many leave out take up to 3.4 times as long;
// twice as many make most faster (a third of the time at best), but not one 7x7 image whose weights are
// packed at the call (1.12), nor some of stride 2 with AVX2 for which PyTorch's convolution serves (1.12).
// The numbers of can_use_maps equal those of gatedconv/ops/masked_conv2d.py.
constexpr int64_t kMostWeights = 64 * 128;

// With 4, layers of 4 to 7 inputs take 0.77 to 2.1 times as long, with 16 those of 8 to 15
// 0.95 to 1.9 times (AMD EPYC, AVX-512 and AVX2).
constexpr int64_t kLeastInputs = 8;

// Floats of maps that stay in such a cache with the weights (384 KiB), and images of a band. With
// half and twice as many floats layers take 0.99 to 1.08 and 0.94 to 1.11 of the time, with half and twice as
// many images 0.98 to 1.10 and 0.82 to 1.08 (AMD EPYC, AVX-512 and AVX2).
constexpr int64_t kMapBandFloats = 96 * 1024;
constexpr int64_t kMostImages = 8;

// Multiply-adds that are worth a thread: 5 us at 40 a nanosecond. Assumed, not timed: it takes two idle
// cores.
constexpr int64_t kMapThreadMacs = 200 * 1000;

constexpr int64_t kTile = 4;  // outputs of Winograd, along a line and down

Spread make_spread(int64_t channels, const std::vector<int32_t>& open) {
  Spread places(channels, -1);
  for (size_t i = 0; i < open.size(); ++i) {
    if (open[i] >= 0) places[open[i]] = static_cast<int32_t>(i);
  }
  return places;
}

// Sizes of one band's maps, in floats.
struct Bands {
  int64_t images, rows;      // of one band
  int64_t in_rows, in_cols;  // of the input's map, its border included
  int64_t in_pixel, out_pixel;
  int64_t in_image() const { return in_rows * in_cols * in_pixel; }
};

Bands lay_out_bands(const ConvShape& s, int64_t inputs, int64_t outputs, int threads) {
  Bands bands{};
  bands.in_pixel = round_up(inputs, kPanel), bands.out_pixel = round_up(outputs, kPanel);
  const int64_t multiple = is_winograd(s) ? kTile : 1;
  const auto in_rows = [&](int64_t rows) { return (round_up(rows, multiple) - 1) * s.stride_h + 3; };
  bands.in_cols = (round_up(s.out_w, multiple) - 1) * s.stride_w + 3;
  const auto floats = [&](int64_t rows) {
    return in_rows(rows) * bands.in_cols * bands.in_pixel + rows * s.out_w * bands.out_pixel;
  };
  bands.rows = s.out_h, bands.images = 1;
  while (bands.rows > multiple && floats(bands.rows) > kMapBandFloats) {
    bands.rows = round_up(ceil_div(bands.rows, 2), multiple);
  }
  // Enough bands for every thread, and whole images together where they are small.
  while (bands.rows > multiple && s.batch * ceil_div(s.out_h, bands.rows) < threads) {
    bands.rows = round_up(ceil_div(bands.rows, 2), multiple);
  }
  if (bands.rows >= s.out_h) {
    const int64_t share = std::max<int64_t>(1, s.batch / std::max(1, threads));
    bands.images = std::clamp<int64_t>(kMapBandFloats / floats(bands.rows), 1, std::min(kMostImages, share));
  }
  bands.in_rows = in_rows(bands.rows);
  return bands;
}

// Outputs of an image: rows [y0, y1), columns [x0, x1).
struct Region {
  int64_t y0, y1, x0, x1;
  int64_t area() const { return y0 < y1 && x0 < x1 ? (y1 - y0) * (x1 - x0) : 0; }
};

// The outputs whose windows are inside the image.
Region find_inner(const ConvShape& s) {
  const auto end = [](int64_t size, int64_t pad, int64_t stride, int64_t outputs) {
    return size + pad < 3 ? 0 : std::min(outputs, (size + pad - 3) / stride + 1);
  };
  return {ceil_div(s.pad_top, s.stride_h), end(s.height, s.pad_top, s.stride_h, s.out_h),
          ceil_div(s.pad_left, s.stride_w), end(s.width, s.pad_left, s.stride_w, s.out_w)};
}

// Whether a pixel of the input is a pixel of a map: its channels side by side, every one of them open.
bool is_map(const ConvShape& s, const ConvTensors<float>& t) {
  constexpr int64_t kFarthest = std::numeric_limits<int32_t>::max() / 8;  // taps are 32-bit offsets
  return t.input_strides.c == 1 && t.in_offset[1] == s.in_channels && t.input_strides.h < kFarthest &&
         t.input_strides.w < kFarthest;
}

// One thread's work on one call.
class Worker {
 public:
  Worker(const ConvShape& s, const ConvTensors<float>& t, const std::vector<int32_t>& outputs,
         const Kernels& kernels, const PlaneKernels& planes, const Bands& bands, const float* weights)
      : s_(s), t_(t), outputs_(outputs), kernels_(kernels), planes_(planes), bands_(bands) {
    inputs_ = t.in_offset[1];
    const int64_t count = static_cast<int64_t>(outputs.size());
    bias_.assign(bands.out_pixel, 0.0f);
    keep_.assign(bands.out_pixel, -1);
    for (int64_t i = 0; i < count; ++i) {
      if (outputs[i] < 0) keep_[i] = 0;
      if (t.bias && outputs[i] >= 0) bias_[i] = t.bias[outputs[i]];
    }
    in_place_ = !t.residual && t.output_strides.c == 1 && count == s.out_channels && count % kPanel == 0 &&
                t.output_strides.w == count && t.output_strides.h == s.out_w * count;
    describe_step(weights, weights + bands.out_pixel * inputs_ * kTaps);
    const size_t floats =
        bands.images * (bands.in_image() + (in_place_ ? 0 : bands.rows * s.out_w * bands.out_pixel));
    scratch_floats_ = kernels.scratch_floats(step_);
    // A register may be read beyond the last pixel.
    if (buffer_.size() < floats + scratch_floats_ + 2 * kPanel)
      buffer_.resize(floats + scratch_floats_ + 2 * kPanel);
    poison(buffer_.data(), static_cast<int64_t>(buffer_.size()));
    if (!in_place_) spread_ = make_spread(s.out_channels, outputs);
    if (!is_winograd(s) && is_map(s, t)) inner_ = find_inner(s);
  }

  void run(int64_t image, int64_t images, int64_t row, int64_t rows) {
    float* out = buffer_.data() + bands_.images * bands_.in_image();
    float* scratch = out;
    if (in_place_) {
      out = t_.output + image * t_.output_strides.n + row * t_.output_strides.h;
    } else {
      scratch += bands_.images * bands_.rows * s_.out_w * bands_.out_pixel;
    }
    if (is_winograd(s_)) {
      run_winograd(image, images, row, rows, out, scratch);
    } else {
      run_direct(image, images, row, rows, out);
    }
    if (in_place_) return;
    for (int64_t i = 0; i < images; ++i) write_image(image + i, row, rows, out + i * step_.out.image);
  }

 private:
  void describe_step(const float* direct, const float* winograd) {
    const bool fast = is_winograd(s_);
    step_.op = fast ? Op::kWinograd4 : Op::kConv;
    step_.act = in_place_ && t_.relu ? Act::kRelu : Act::kNone;
    step_.kernel_h = step_.kernel_w = 3;
    step_.stride_h = static_cast<int>(s_.stride_h), step_.stride_w = static_cast<int>(s_.stride_w);
    step_.pad_top = step_.pad_left = fast ? 1 : 0;
    step_.dilation_h = step_.dilation_w = 1;
    step_.span = static_cast<int>(inputs_);
    step_.weights = fast ? winograd : direct;
    step_.direct = direct;
    step_.bias = bias_.data();
    step_.keep = in_place_ ? keep_.data() : nullptr;
    Map& in = step_.in;
    in.channels = static_cast<int>(inputs_);
    in.width = static_cast<int>(s_.out_w);
    in.halo = fast ? 1 : 0, in.multiple = fast ? static_cast<int>(kTile) : 1;
    in.pixel = bands_.in_pixel, in.row = bands_.in_cols * in.pixel, in.image = bands_.in_image();
    Map& out = step_.out;
    out.channels = static_cast<int>(outputs_.size());
    out.height = static_cast<int>(bands_.rows), out.width = static_cast<int>(s_.out_w);
    out.pixel = bands_.out_pixel, out.row = s_.out_w * out.pixel;
    out.image = in_place_ ? t_.output_strides.n : bands_.rows * out.row;
  }

  void run_step(const Step& step, int64_t images, float* scratch) {
    kernels_.run(step, {0, images * step.rows, 0, static_cast<int>(bands_.out_pixel / kPanel)}, scratch);
  }

  void run_winograd(int64_t image, int64_t images, int64_t row, int64_t rows, float* out, float* scratch) {
    float* in = buffer_.data();
    for (int64_t i = 0; i < images; ++i) {
      read_window(image + i, row - s_.pad_top, bands_.in_rows, -s_.pad_left, bands_.in_cols,
                  in + i * bands_.in_image());
    }
    Step step = step_;
    step.in.data = in + step.in.row + step.in.pixel;
    step.out.data = out;
    step.in.height = step.out.height = static_cast<int>(rows);
    step.rows = static_cast<int>(ceil_div(rows, kTile));
    run_step(step, images, scratch);
  }

  // Where the input is a map, only the windows that hang over its edge are copied.
  void run_direct(int64_t image, int64_t images, int64_t row, int64_t rows, float* out) {
    const Region all{row, row + rows, 0, s_.out_w};
    const Region inner{std::max(row, inner_.y0), std::min(row + rows, inner_.y1), inner_.x0, inner_.x1};
    if (2 * inner.area() < all.area()) return run_copied(image, images, all, out);
    const auto at = [&](int64_t y, int64_t x) {
      return out + (y - row) * step_.out.row + x * step_.out.pixel;
    };
    run_copied(image, images, {row, inner.y0, 0, s_.out_w}, out);
    run_copied(image, images, {inner.y1, row + rows, 0, s_.out_w}, at(inner.y1, 0));
    for (int64_t x = 0; x < s_.out_w; ++x) {
      if (x >= inner.x0 && x < inner.x1) continue;
      run_copied(image, images, {inner.y0, inner.y1, x, x + 1}, at(inner.y0, x));
    }
    const Strides4& strides = t_.input_strides;
    const int64_t y = inner.y0 * s_.stride_h - s_.pad_top, x = inner.x0 * s_.stride_w - s_.pad_left;
    Step step = region_step(inner, at(inner.y0, inner.x0));
    step.in.pixel = strides.w, step.in.row = strides.h, step.in.image = strides.n;
    // A map has no constant data; a convolution only reads its input.
    step.in.data = const_cast<float*>(t_.input) + image * strides.n + y * strides.h + x * strides.w;
    run_step(step, images, nullptr);
  }

  Step region_step(const Region& region, float* out) const {
    Step step = step_;
    step.out.data = out;
    step.out.height = step.rows = static_cast<int>(region.y1 - region.y0);
    step.out.width = static_cast<int>(region.x1 - region.x0);
    return step;
  }

  void run_copied(int64_t image, int64_t images, const Region& region, float* out) {
    if (region.area() == 0) return;
    const int64_t in_rows = (region.y1 - region.y0 - 1) * s_.stride_h + 3;
    const int64_t in_cols = (region.x1 - region.x0 - 1) * s_.stride_w + 3;
    Step step = region_step(region, out);
    step.in.data = buffer_.data();
    step.in.row = in_cols * step.in.pixel, step.in.image = in_rows * step.in.row;
    for (int64_t i = 0; i < images; ++i) {
      read_window(image + i, region.y0 * s_.stride_h - s_.pad_top, in_rows,
                  region.x0 * s_.stride_w - s_.pad_left, in_cols, step.in.data + i * step.in.image);
    }
    if (step.out.width == 1) {
      // A column is one line: from output to output the window moves by rows of `in_cols` pixels.
      step.stride_w = static_cast<int>(s_.stride_h * in_cols);
      step.out.pixel = step.out.row;
      step.out.width = step.out.height;
      step.out.height = step.rows = 1;
    }
    run_step(step, images, nullptr);
  }

  // Rows [first, first + rows) and columns [left, left + columns) of an image, zeros where there is none.
  void read_window(int64_t n, int64_t first, int64_t rows, int64_t left, int64_t columns, float* to) {
    const int64_t pixel = bands_.in_pixel, line = columns * pixel;
    const int64_t y0 = std::clamp<int64_t>(-first, 0, rows);
    const int64_t y1 = std::clamp<int64_t>(s_.height - first, y0, rows);
    const int64_t x0 = std::clamp<int64_t>(-left, 0, columns);
    const int64_t x1 = std::clamp<int64_t>(s_.width - left, x0, columns);
    std::fill(to, to + y0 * line, 0.0f);
    std::fill(to + y1 * line, to + rows * line, 0.0f);
    for (int64_t y = y0; y < y1; ++y) {
      std::fill(to + y * line, to + y * line + x0 * pixel, 0.0f);
      std::fill(to + y * line + x1 * pixel, to + (y + 1) * line, 0.0f);
    }
    if (y0 == y1 || x0 == x1) return;
    const Strides4& strides = t_.input_strides;
    const float* from = t_.input + n * strides.n + (first + y0) * strides.h + (left + x0) * strides.w;
    read_rows(from, y1 - y0, x1 - x0, line, to + y0 * line + x0 * pixel);
  }

  void read_rows(const float* from, int64_t rows, int64_t columns, int64_t line, float* to) {
    const Strides4& strides = t_.input_strides;
    const int64_t pixel = bands_.in_pixel;
    if (strides.w == 1 && strides.c != 1) {
      const bool joined = strides.h == columns;  // the rows are one run of pixels
      sources_.assign(bands_.in_pixel, nullptr);
      for (int64_t y = 0; y < rows; y += joined ? rows : 1) {
        for (int64_t k = 0; k < inputs_; ++k) sources_[k] = from + y * strides.h + t_.in_index[k] * strides.c;
        planes_.planes_to_map(sources_.data(), bands_.in_pixel, joined ? rows * columns : columns, columns,
                              to + y * line, pixel, line);
      }
      return;
    }
    const bool whole = strides.c == 1 && inputs_ == s_.in_channels;
    for (int64_t y = 0; y < rows; ++y, from += strides.h, to += line) {
      if (whole && strides.w == inputs_ && pixel == inputs_) {
        std::memcpy(to, from, columns * inputs_ * sizeof(float));
        continue;
      }
      for (int64_t x = 0; x < columns; ++x) {
        const float* source = from + x * strides.w;
        float* target = to + x * pixel;
        if (whole) {
          std::memcpy(target, source, inputs_ * sizeof(float));
        } else {
          for (int64_t k = 0; k < inputs_; ++k) target[k] = source[t_.in_index[k] * strides.c];
        }
      }
    }
  }

  void write_image(int64_t n, int64_t row, int64_t rows, const float* from) {
    const Strides4& o = t_.output_strides;
    float* to = t_.output + n * o.n + row * o.h;
    const int64_t pixels = rows * s_.out_w;
    if (o.c == 1) {
      planes_.spread(from, bands_.out_pixel, pixels, to, s_.out_channels, spread_);
    } else {
      targets_.clear();
      for (const int32_t row : outputs_) targets_.push_back(row < 0 ? nullptr : to + row * o.c);
      planes_.map_to_planes(from, bands_.out_pixel, pixels, targets_.data(), targets_.size());
      for (int64_t c = 0; c < s_.out_channels; ++c) {
        if (!t_.out_open[c]) std::memset(to + c * o.c, 0, pixels * sizeof(float));
      }
    }
    if (t_.residual || t_.relu) finish_rows(s_, t_, n, row, row + rows);
  }

  const ConvShape& s_;
  const ConvTensors<float>& t_;
  const std::vector<int32_t>& outputs_;
  const Kernels& kernels_;
  const PlaneKernels& planes_;
  const Bands& bands_;
  int64_t inputs_;
  Region inner_{};  // outputs that can be computed from the input itself
  bool in_place_;   // the kernel writes the output itself
  size_t scratch_floats_;
  Step step_{};
  Spread spread_;
  std::vector<float> bias_;
  std::vector<int32_t> keep_;
  std::vector<const float*> sources_;
  std::vector<float*> targets_;
  // Kept by the thread: to clear a fresh one would cost as much as to fill it.
  static thread_local std::vector<float> buffer_;
};

thread_local std::vector<float> Worker::buffer_;

}  // namespace

bool can_use_maps(const ConvShape& s, int64_t inputs, int64_t outputs) {
  return s.groups == 1 && s.kernel_h == 3 && s.kernel_w == 3 && inputs >= kLeastInputs && outputs > 0 &&
         inputs * outputs <= kMostWeights;
}

bool prefer_maps(const ConvShape& s, int64_t inputs, int64_t outputs, int lanes, bool kept) {
  const int64_t widest = std::max(s.width, s.out_w) * std::max(inputs, outputs) * 8 * s.stride_h;
  if (!can_use_maps(s, inputs, outputs) || s.dilation_h != 1 || s.dilation_w != 1 ||
      widest > std::numeric_limits<int32_t>::max()) {
    return false;
  }
  // Register instructions for 16 pixels; the factors 1.4, 1.5, 6 and 10 are what planes,
  // transforms and packing cost in addition to the sums. They are set by hand; no saved times support them.
  const int64_t in_vectors = ceil_div(inputs, lanes), out_vectors = ceil_div(outputs, lanes);
  const double planes = 1.4 * kTaps * inputs * outputs * 16 / lanes;
  if (!is_winograd(s)) return kTaps * inputs * out_vectors * 16 < 1.5 * planes;
  const double tiles = static_cast<double>(ceil_div(s.out_h, kTile) * ceil_div(s.out_w, kTile));
  const double filled = static_cast<double>(s.out_h * s.out_w) / (tiles * 16);
  double maps = kPoints * (inputs * out_vectors + 6 * (in_vectors + out_vectors));
  if (!kept) maps += 10.0 * kPoints * inputs * out_vectors / (tiles * static_cast<double>(s.batch));
  return maps < planes * filled;
}

namespace {

// Weights packed by the calling thread for itself: that takes less time than to fetch them from another core.
const float* own_weights(const ConvShape& s, const ConvTensors<float>& t, const OpenOutputs& outputs,
                         const PlaneKernels& kernels) {
  // Kept by the thread: to clear a fresh one would cost more than to fill it.
  static thread_local std::vector<float> own;
  const size_t floats = map_weight_floats(t.in_offset[1], static_cast<int64_t>(outputs.rows.size()));
  if (own.size() < floats) own.resize(floats);
  poison(own.data(), static_cast<int64_t>(floats));
  pack_map_weights(s, t, outputs, kernels, is_winograd(s), own.data());
  return own.data();
}

}  // namespace

void masked_conv2d_maps(const ConvShape& s, const ConvTensors<float>& t, const OpenOutputs& outputs,
                        const Kernels& kernels, const PlaneKernels& planes, int threads,
                        const ParallelFor& parallel, const float* weights) {
  const std::vector<int32_t> places = place_outputs(s, outputs, planes.lanes);
  const int64_t inputs = t.in_offset[1], count = static_cast<int64_t>(places.size());
  const Bands bands = lay_out_bands(s, inputs, count, threads);
  const int64_t strips = ceil_div(s.out_h, bands.rows);
  // The same number of groups for every thread.
  const int64_t groups = std::min(s.batch, round_up(ceil_div(s.batch, bands.images), std::max(1, threads)));
  const int64_t work = ceil_div(s.batch, groups) * bands.rows * s.out_w * count * inputs * kTaps;
  parallel(groups * strips, 1 + kMapThreadMacs / std::max<int64_t>(1, work), [&](int64_t begin, int64_t end) {
    const float* panels = weights ? weights : own_weights(s, t, outputs, planes);
    Worker worker(s, t, places, kernels, planes, bands, panels);
    for (int64_t unit = begin; unit < end; ++unit) {
      // Even groups: 32 images in groups of up to 5 are 7 x 4 or 5 and not 6 x 5 and a group of 2.
      const int64_t image = s.batch * (unit / strips) / groups, next = s.batch * (unit / strips + 1) / groups;
      const int64_t row = unit % strips * bands.rows;
      worker.run(image, next - image, row, std::min(bands.rows, s.out_h - row));
    }
  });
}

}  // namespace gatedconv
