// Cuts a masked convolution into tiles for the plane kernels.
//
// A kernel needs every tap's pixels as one run, so each input channel is copied into planes as wide as the
// output: one plane for every kernel column and, with a stride, for every phase of the rows. In such a plane
// the next kernel row is the next row of the plane, and row ends need no special case. The copies are
// made band by band, so that they stay in cache, and cost KW stores for an input pixel against KH * KW *
// outputs multiplies.
#include "masked_planes.h"

#include <algorithm>
#include <cstring>

#include "masked_pack.h"
#include "plan.h"
#include "workspace.h"

namespace gatedconv {
namespace {

// Floats of copied planes that stay in a core's second-level cache with the weights: 512 KiB. Layers take
// 0.77 to 1.02 of the time that half as many give (AMD EPYC with 1 MiB, AVX-512 and AVX2; 7 % and 3 % less
// in the mean). With twice as many most are faster yet, but a 1x1 of 63 channels at 56x56 takes 1.11 of it.
constexpr int64_t kPlaneBandFloats = 128 * 1024;

// Floats between planes whose size is a power of 2: the same pixel of all of them would fall on one cache
// set.
constexpr int64_t kPlaneGap = 16;

// Multiply-adds that are worth a thread: 2.5 us at 40 a nanosecond. Assumed, not timed: it takes two idle
// cores.
constexpr int64_t kPlaneThreadMacs = 100 * 1000;

// The rows that kernel rows of one phase (kh * dilation modulo stride) read.
struct Phase {
  int64_t residue, max_shift;
};

// The input columns that a kernel column reads, and which of them exist.
struct Columns {
  int64_t col0;
  TapRange range;
};

struct Layout {
  std::vector<Phase> phases;
  std::vector<Columns> columns;
  std::vector<ptrdiff_t> taps;
  int64_t band;                   // output rows
  std::vector<ptrdiff_t> offset;  // of the plane of (phase, kernel column) in a channel
  int64_t channel_floats;
  bool in_place;  // the input is its own plane
};

void reserve(std::vector<float>& buffer, int64_t floats) {
  if (static_cast<int64_t>(buffer.size()) < floats) buffer.resize(floats);
  poison(buffer.data(), floats);
}

bool planar(const Strides4& strides, int64_t width) {
  return strides.w == 1 && strides.h == width;
}

void lay_out_band(const ConvShape& s, int64_t band, Layout& layout) {
  layout.band = band;
  layout.offset.clear();
  int64_t at = 0;
  for (const Phase& phase : layout.phases) {
    for (int64_t kw = 0; kw < s.kernel_w; ++kw) {
      layout.offset.push_back(at);
      at += (band + phase.max_shift) * s.out_w;
    }
  }
  layout.channel_floats = at;
  layout.taps.clear();
  for (int64_t kh = 0; kh < s.kernel_h; ++kh) {
    const int64_t residue = kh * s.dilation_h % s.stride_h, shift = kh * s.dilation_h / s.stride_h;
    size_t phase = 0;
    while (layout.phases[phase].residue != residue) ++phase;
    for (int64_t kw = 0; kw < s.kernel_w; ++kw) {
      layout.taps.push_back(layout.offset[phase * s.kernel_w + kw] + shift * s.out_w);
    }
  }
}

Layout lay_out(const ConvShape& s, const ConvTensors<float>& t, int64_t channels, int lanes, int threads) {
  Layout layout{};
  for (int64_t kh = 0; kh < s.kernel_h; ++kh) {
    const Phase phase{kh * s.dilation_h % s.stride_h, kh * s.dilation_h / s.stride_h};
    auto same = [&](const Phase& other) { return other.residue == phase.residue; };
    auto found = std::find_if(layout.phases.begin(), layout.phases.end(), same);
    if (found == layout.phases.end()) {
      layout.phases.push_back(phase);
    } else {
      found->max_shift = std::max(found->max_shift, phase.max_shift);
    }
  }
  for (int64_t kw = 0; kw < s.kernel_w; ++kw) {
    const int64_t col0 = kw * s.dilation_w - s.pad_left;
    layout.columns.push_back({col0, tap_range(col0, s.stride_w, s.out_w, s.width)});
  }
  // Enough bands for every thread, and each small enough for the cache.
  int64_t band = ceil_div(s.out_h, std::max<int64_t>(1, ceil_div(threads, std::max<int64_t>(1, s.batch))));
  const int64_t row_floats = channels * s.kernel_w * static_cast<int64_t>(layout.phases.size()) * s.out_w;
  band =
      std::max<int64_t>(1, std::min(band, kPlaneBandFloats / std::max<int64_t>(1, row_floats) - s.kernel_h));
  band = ceil_div(s.out_h, ceil_div(s.out_h, band));
  const bool pointwise = s.kernel_h == 1 && s.kernel_w == 1 && s.stride_h == 1 && s.stride_w == 1 &&
                         s.out_h == s.height && s.out_w == s.width;
  // Read in place nothing may be read beyond the last pixel.
  layout.in_place = pointwise && planar(t.input_strides, s.width) && s.out_h * s.out_w % lanes == 0 &&
                    band * s.out_w % lanes == 0;
  lay_out_band(s, band, layout);
  return layout;
}

// The part of a plane that is inside the input; the rest is zeros.
struct Window {
  int64_t row0, col0;  // of the input, for the plane's first pixel
  TapRange rows, cols;
};

void clear(float* begin, float* end) {
  while (begin < end) *begin++ = 0;
}

// Writes one plane of `rows` rows: pixel (r, q) is the input's (row0 + r * stride, col0 + q * stride).
void copy_plane(const ConvShape& s, const Strides4& strides, const float* from, const Window& window,
                int64_t rows, float* to) {
  const auto [row0, col0, valid, cols] = window;
  const int64_t width = s.out_w;
  clear(to, to + valid.begin * width);
  clear(to + valid.end * width, to + rows * width);
  if (s.stride_w == 1 && s.stride_h == 1 && width == s.width && planar(strides, s.width)) {
    // The rows are one run, only shifted; what comes from the neighboring rows is overwritten.
    const int64_t shift = row0 * width + col0;
    const int64_t begin = std::max(valid.begin * width, -shift);
    const int64_t end = std::min(valid.end * width, s.height * width - shift);
    if (begin < end) std::memcpy(to + begin, from + begin + shift, (end - begin) * sizeof(float));
    for (int64_t q = 0; q < cols.begin; ++q) {
      for (int64_t r = valid.begin; r < valid.end; ++r) to[r * width + q] = 0;
    }
    for (int64_t q = cols.end; q < width; ++q) {
      for (int64_t r = valid.begin; r < valid.end; ++r) to[r * width + q] = 0;
    }
    return;
  }
  const int64_t step = s.stride_w * strides.w;
  for (int64_t r = valid.begin; r < valid.end; ++r) {
    float* row = to + r * width;
    const float* source = from + (row0 + r * s.stride_h) * strides.h + col0 * strides.w;
    clear(row, row + cols.begin);
    if (step == 1) {
      std::memcpy(row + cols.begin, source + cols.begin, (cols.end - cols.begin) * sizeof(float));
    } else if (step == 2) {
      for (int64_t q = cols.begin; q < cols.end; ++q) row[q] = source[q * 2];
    } else {
      for (int64_t q = cols.begin; q < cols.end; ++q) row[q] = source[q * step];
    }
    clear(row + cols.end, row + width);
  }
}

int64_t map_floats(const ConvShape& s) {
  return s.height * s.width + kPlaneGap;
}

// Copies the group's open channels, rows [first, last), into planar maps one after another.
void make_planar(const ConvShape& s, const ConvTensors<float>& t, const PlaneKernels& kernels, int64_t n,
                 int64_t group, int64_t first, int64_t last, float* to) {
  const int32_t *begin = t.in_index + t.in_offset[group], *end = t.in_index + t.in_offset[group + 1];
  const Strides4& strides = t.input_strides;
  if (strides.c != 1) {
    for (int64_t y = first; y < last; ++y) {
      const float* row = t.input + n * strides.n + y * strides.h;
      for (const int32_t* channel = begin; channel < end; ++channel) {
        const float* from = row + *channel * strides.c;
        float* at = to + (channel - begin) * map_floats(s) + y * s.width;
        for (int64_t x = 0; x < s.width; ++x) at[x] = from[x * strides.w];
      }
    }
    return;
  }
  const bool joined = strides.h == s.width * strides.w;  // the rows are one run of pixels
  const int64_t rows = joined ? last - first : 1;
  std::vector<float*> planes(s.in_channels);
  for (int64_t y = first; y < last; y += rows) {
    for (const int32_t* c = begin; c < end; ++c) planes[*c] = to + (c - begin) * map_floats(s) + y * s.width;
    const int64_t c0 = group * (s.in_channels / s.groups), c1 = c0 + s.in_channels / s.groups;
    const float* from = t.input + n * strides.n + y * strides.h + c0;
    kernels.to_planes(from, strides.w, rows * s.width, planes.data() + c0, c1 - c0);
  }
}

// Copies what output rows [row, row + rows) read of the group's open channels.
void copy_band(const ConvShape& s, const ConvTensors<float>& t, const Layout& layout, int64_t n,
               int64_t group, int64_t row, int64_t rows, const PlaneKernels& kernels,
               std::vector<float>& maps, float* to) {
  const bool in_rows = t.input_strides.w == 1;
  const int32_t first = t.in_offset[group], count = t.in_offset[group + 1] - first;
  Strides4 strides = t.input_strides;
  if (!in_rows) {
    const int64_t top = std::max<int64_t>(0, row * s.stride_h - s.pad_top);
    const int64_t bottom = (row + rows - 1) * s.stride_h + (s.kernel_h - 1) * s.dilation_h - s.pad_top + 1;
    strides = {0, map_floats(s), s.width, 1};
    reserve(maps, count * strides.c);
    make_planar(s, t, kernels, n, group, top, std::min(s.height, bottom), maps.data());
  }
  size_t plane = 0;
  for (const Phase& phase : layout.phases) {
    const int64_t row0 = row * s.stride_h + phase.residue - s.pad_top, planes = rows + phase.max_shift;
    const TapRange valid = tap_range(row0, s.stride_h, planes, s.height);
    for (int64_t kw = 0; kw < s.kernel_w; ++kw, ++plane) {
      const Window window{row0, layout.columns[kw].col0, valid, layout.columns[kw].range};
      for (int32_t i = 0; i < count; ++i) {
        const float* from = in_rows ? t.input + n * t.input_strides.n + t.in_index[first + i] * strides.c
                                    : maps.data() + i * strides.c;
        copy_plane(s, strides, from, window, planes, to + i * layout.channel_floats + layout.offset[plane]);
      }
    }
  }
}

// Writes rows of a closed channel to a planar output: act(residual), or 0.
void write_closed(const ConvShape& s, const ConvTensors<float>& t, int64_t n, int64_t row, int64_t begin,
                  int64_t end) {
  const int64_t first = begin * s.out_w, count = (end - begin) * s.out_w;
  float* to = t.output + n * t.output_strides.n + row * t.output_strides.c + first;
  if (!t.residual) {
    std::memset(to, 0, count * sizeof(float));
    return;
  }
  const float* from = t.residual + n * t.residual_strides.n + row * t.residual_strides.c + first;
  for (int64_t i = 0; i < count; ++i) to[i] = t.relu ? relu_keeping_nan(from[i]) : from[i];
}

// One thread's work on one call.
class Worker {
 public:
  Worker(const ConvShape& shape, const ConvTensors<float>& tensors, const PlaneKernels& kernels,
         const Layout& layout, const std::vector<OpenOutputs>& shared)
      : s_(shape), t_(tensors), kernels_(kernels), layout_(layout), shared_(shared) {
    direct_ = planar(t_.output_strides, s_.out_w) && (!t_.residual || planar(t_.residual_strides, s_.out_w));
  }

  void run(int64_t n, int64_t row, int64_t rows) {
    const bool* open = t_.out_open + n * t_.mask_stride;
    if (!direct_) reserve(results_, s_.out_channels * (rows * s_.out_w + kPlaneGap));
    result_planes_.assign(s_.out_channels, nullptr);
    for (int64_t group = 0; group < s_.groups; ++group) {
      const OpenOutputs* outputs = &own_;
      if (t_.mask_stride == 0) {
        outputs = &shared_[group];
      } else {
        list_open_outputs(s_, group, open, kernels_.max_outputs, own_);
        pack_weights(s_, t_, group, own_);
      }
      if (!outputs->rows.empty()) run_group(n, group, row, rows, *outputs);
    }
    if (!direct_) return write_results(n, row, rows);
    for (int64_t c = 0; c < s_.out_channels; ++c) {
      if (!open[c]) write_closed(s_, t_, n, c, row, row + rows);
    }
  }

 private:
  void run_group(int64_t n, int64_t group, int64_t row, int64_t rows, const OpenOutputs& outputs) {
    PlaneTile tile{};
    tile.num_channels = t_.in_offset[group + 1] - t_.in_offset[group];
    channels_.clear();
    if (layout_.in_place) {
      tile.planes = t_.input + n * t_.input_strides.n + row * t_.input_strides.h;
      for (int32_t i = t_.in_offset[group]; i < t_.in_offset[group + 1]; ++i) {
        channels_.push_back(t_.in_index[i] * t_.input_strides.c);
      }
    } else {
      reserve(planes_, tile.num_channels * layout_.channel_floats + kernels_.lanes);
      copy_band(s_, t_, layout_, n, group, row, rows, kernels_, maps_, planes_.data());
      tile.planes = planes_.data();
      for (int c = 0; c < tile.num_channels; ++c) channels_.push_back(c * layout_.channel_floats);
    }
    tile.channels = channels_.data();
    tile.taps = layout_.taps.data();
    tile.num_taps = static_cast<int>(layout_.taps.size());
    tile.pixels = rows * s_.out_w;
    tile.weights = outputs.weights;
    for (size_t i = 0; i + 1 < outputs.tile_begin.size(); ++i) {
      tile.outputs = outputs.tile_begin[i + 1] - outputs.tile_begin[i];
      run_tile(n, row, outputs.rows.data() + outputs.tile_begin[i], tile);
      tile.weights += static_cast<ptrdiff_t>(tile.outputs) * tile.num_channels * tile.num_taps;
    }
  }

  void run_tile(int64_t n, int64_t row, const int32_t* channel, PlaneTile& tile) {
    const Strides4 &o = t_.output_strides, &r = t_.residual_strides;
    tile.relu = direct_ && t_.relu;
    for (int i = 0; i < tile.outputs; ++i) {
      tile.bias[i] = t_.bias ? t_.bias + channel[i] : nullptr;
      tile.residual[i] =
          direct_ && t_.residual ? t_.residual + n * r.n + channel[i] * r.c + row * r.h : nullptr;
      float*& result = result_planes_[channel[i]];
      if (!direct_) result = results_.data() + channel[i] * (tile.pixels + kPlaneGap);
      tile.out[i] = direct_ ? t_.output + n * o.n + channel[i] * o.c + row * o.h : result;
    }
    kernels_.run(tile);
  }

  // Turns the finished planes, null where closed, into the output's own order.
  void write_results(int64_t n, int64_t row, int64_t rows) {
    const Strides4& o = t_.output_strides;
    const bool joined = o.h == s_.out_w * o.w;
    const int64_t run = joined ? rows : 1;
    for (int64_t p = 0; p < rows; p += run) {
      float* to = t_.output + n * o.n + (row + p) * o.h;
      kernels_.from_planes(result_planes_.data(), s_.out_channels, p * s_.out_w, run * s_.out_w, to, o.c,
                           o.w);
    }
    if (t_.residual || t_.relu) finish_rows(s_, t_, n, row, row + rows);
  }

  const ConvShape& s_;
  const ConvTensors<float>& t_;
  const PlaneKernels& kernels_;
  const Layout& layout_;
  const std::vector<OpenOutputs>& shared_;
  bool direct_;  // kernels write the output itself
  OpenOutputs own_;
  std::vector<ptrdiff_t> channels_;
  std::vector<float*> result_planes_;
  // Kept by the thread: to clear fresh ones would cost as much as to fill them.
  static thread_local std::vector<float> planes_, maps_, results_;
};

thread_local std::vector<float> Worker::planes_, Worker::maps_, Worker::results_;

}  // namespace

void finish_rows(const ConvShape& s, const ConvTensors<float>& t, int64_t n, int64_t begin, int64_t end) {
  const Strides4 &o = t.output_strides, &r = t.residual_strides;
  for (int64_t p = begin; p < end; ++p) {
    for (int64_t q = 0; q < s.out_w; ++q) {
      float* to = t.output + n * o.n + p * o.h + q * o.w;
      const float* from = t.residual ? t.residual + n * r.n + p * r.h + q * r.w : nullptr;
      if (o.c == 1 && r.c == 1 && from) {
        for (int64_t c = 0; c < s.out_channels; ++c) {
          const float value = to[c] + from[c];
          to[c] = t.relu && value < 0 ? 0 : value;
        }
        continue;
      }
      for (int64_t c = 0; c < s.out_channels; ++c) {
        const float value = to[c * o.c] + (from ? from[c * r.c] : 0.0f);
        to[c * o.c] = t.relu ? relu_keeping_nan(value) : value;
      }
    }
  }
}

void masked_conv2d_planes(const ConvShape& shape, const ConvTensors<float>& tensors,
                          const PlaneKernels& kernels, int threads, const ParallelFor& parallel,
                          const float* tiles) {
  if (shape.batch * shape.out_channels * shape.out_h * shape.out_w == 0) return;
  std::vector<OpenOutputs> outputs(tensors.mask_stride == 0 ? shape.groups : 0);
  for (int64_t group = 0; group < static_cast<int64_t>(outputs.size()); ++group) {
    OpenOutputs& open = outputs[group];
    list_open_outputs(shape, group, tensors.out_open, kernels.max_outputs, open);
    if (!tiles) {
      pack_weights(shape, tensors, group, open);
      continue;
    }
    open.weights = tiles;
    const int64_t inputs = tensors.in_offset[group + 1] - tensors.in_offset[group];
    tiles += static_cast<int64_t>(open.rows.size()) * inputs * shape.kernel_h * shape.kernel_w;
  }
  int32_t channels = 0;
  for (int64_t group = 0; group < shape.groups; ++group) {
    channels = std::max(channels, tensors.in_offset[group + 1] - tensors.in_offset[group]);
  }
  const Layout layout = lay_out(shape, tensors, channels, kernels.lanes, threads);
  const int64_t bands = ceil_div(shape.out_h, layout.band);
  const int64_t work = layout.band * shape.out_w * shape.out_channels * shape.in_channels / shape.groups *
                       shape.kernel_h * shape.kernel_w;
  parallel(shape.batch * bands, 1 + kPlaneThreadMacs / std::max<int64_t>(1, work),
           [&](int64_t begin, int64_t end) {
             Worker worker(shape, tensors, kernels, layout, outputs);
             for (int64_t unit = begin; unit < end; ++unit) {
               const int64_t row = unit % bands * layout.band;
               worker.run(unit / bands, row, std::min(layout.band, shape.out_h - row));
             }
           });
}

}  // namespace gatedconv
