#include "masked_pack.h"

#include <algorithm>
#include <array>
#include <cstring>

#include "masked_maps.h"

namespace gatedconv {
namespace {

// Sizes and strides that the packed order depends on.
using Header = std::array<int64_t, 12>;
constexpr int64_t kHeaderFloats = sizeof(Header) / sizeof(float);
constexpr int64_t kMagic = 0x67636b31;

Header make_header(const ConvShape& s, const ConvTensors<float>& t, const PlaneKernels& kernels) {
  return {kMagic,
          kernels.max_outputs,
          s.groups,
          s.out_channels,
          s.in_channels,
          s.kernel_h,
          s.kernel_w,
          kernels.lanes,
          t.weight_strides.n,
          t.weight_strides.c,
          t.weight_strides.h,
          t.weight_strides.w};
}

int64_t row_floats(const ConvShape& s) {
  return s.in_channels / s.groups * s.kernel_h * s.kernel_w;
}

int64_t mask_floats(const ConvShape& s) {
  return (s.out_channels + s.in_channels + 3) / 4;
}

int64_t open_rows(const ConvShape& s, const ConvTensors<float>& t) {
  return std::count(t.out_open, t.out_open + s.out_channels, true);
}

// Both masks as bytes, filled up to whole floats.
void write_masks(const ConvShape& s, const ConvTensors<float>& t, std::vector<unsigned char>& bytes) {
  bytes.assign(mask_floats(s) * sizeof(float), 0);
  for (int64_t row = 0; row < s.out_channels; ++row) bytes[row] = t.out_open[row];
  for (int32_t i = 0; i < t.in_offset[s.groups]; ++i) bytes[s.out_channels + t.in_index[i]] = 1;
}

// One group's tiles to `to`; returns their end.
float* write_tiles(const ConvShape& s, const ConvTensors<float>& t, int64_t group, const OpenOutputs& outputs,
                   float* to) {
  const int64_t first_input = group * (s.in_channels / s.groups);
  const int32_t *inputs = t.in_index + t.in_offset[group], *end = t.in_index + t.in_offset[group + 1];
  const int64_t floats = (end - inputs) * s.kernel_h * s.kernel_w;
  for (size_t tile = 0; tile + 1 < outputs.tile_begin.size(); ++tile) {
    const int64_t begin = outputs.tile_begin[tile], size = outputs.tile_begin[tile + 1] - begin;
    for (int64_t r = 0; r < size; ++r) {
      const float* row = t.weight + outputs.rows[begin + r] * t.weight_strides.n;
      float* at = to + r;
      for (const int32_t* input = inputs; input < end; ++input) {
        const float* filter = row + (*input - first_input) * t.weight_strides.c;
        if (t.weight_strides.w == 1 && t.weight_strides.h == s.kernel_w) {
          for (int64_t tap = 0; tap < s.kernel_h * s.kernel_w; ++tap, at += size) *at = filter[tap];
          continue;
        }
        for (int64_t kh = 0; kh < s.kernel_h; ++kh) {
          for (int64_t kw = 0; kw < s.kernel_w; ++kw, at += size) {
            *at = filter[kh * t.weight_strides.h + kw * t.weight_strides.w];
          }
        }
      }
    }
    to += size * floats;
  }
  return to;
}

}  // namespace

void list_open_outputs(const ConvShape& s, int64_t group, const bool* open, int max_outputs,
                       OpenOutputs& outputs) {
  const int64_t per_group = s.out_channels / s.groups;
  outputs.rows.clear();
  outputs.tile_begin.clear();
  for (int64_t row = group * per_group; row < (group + 1) * per_group; ++row) {
    if (open[row]) outputs.rows.push_back(static_cast<int32_t>(row));
  }
  const int64_t count = static_cast<int64_t>(outputs.rows.size());
  const int64_t tiles = (count + max_outputs - 1) / max_outputs;
  for (int64_t tile = 0, begin = 0; tile < tiles; ++tile) {
    outputs.tile_begin.push_back(static_cast<int32_t>(begin));
    begin += count / tiles + (tile < count % tiles);
  }
  outputs.tile_begin.push_back(static_cast<int32_t>(count));
}

void pack_weights(const ConvShape& s, const ConvTensors<float>& t, int64_t group, OpenOutputs& outputs) {
  const int64_t inputs = t.in_offset[group + 1] - t.in_offset[group];
  outputs.own.resize(outputs.rows.size() * inputs * s.kernel_h * s.kernel_w);
  write_tiles(s, t, group, outputs, outputs.own.data());
  outputs.weights = outputs.own.data();
}

bool can_keep(const ConvShape& s, const ConvTensors<float>& t) {
  const Strides4& w = t.weight_strides;
  const int64_t inputs = s.in_channels / s.groups;
  const bool planar = w.w == 1 && w.h == s.kernel_w && w.c == s.kernel_h * s.kernel_w;
  const bool channels_last = w.c == 1 && w.w == inputs && w.h == s.kernel_w * inputs;
  return t.mask_stride == 0 && (planar || channels_last);
}

int64_t kept_floats(const ConvShape& s, const ConvTensors<float>& t, const PlaneKernels& kernels) {
  int64_t tiles = 0;
  OpenOutputs outputs;
  for (int64_t group = 0; group < s.groups; ++group) {
    list_open_outputs(s, group, t.out_open, kernels.max_outputs, outputs);
    const int64_t inputs = t.in_offset[group + 1] - t.in_offset[group];
    tiles += static_cast<int64_t>(outputs.rows.size()) * inputs * s.kernel_h * s.kernel_w;
  }
  const int64_t inputs = t.in_offset[1], open = open_rows(s, t);
  const int64_t maps = can_use_maps(s, inputs, open) ? map_weight_floats(inputs, open) : 0;
  return kHeaderFloats + mask_floats(s) + open * row_floats(s) + tiles + maps;
}

void keep_weights(const ConvShape& s, const ConvTensors<float>& t, const PlaneKernels& kernels, float* kept) {
  const Header header = make_header(s, t, kernels);
  std::memcpy(kept, header.data(), sizeof(header));
  std::vector<unsigned char> masks;
  write_masks(s, t, masks);
  std::memcpy(kept + kHeaderFloats, masks.data(), masks.size());
  float* to = kept + kHeaderFloats + mask_floats(s);
  for (int64_t row = 0; row < s.out_channels; ++row) {
    if (!t.out_open[row]) continue;
    std::memcpy(to, t.weight + row * t.weight_strides.n, row_floats(s) * sizeof(float));
    to += row_floats(s);
  }
  OpenOutputs outputs;
  for (int64_t group = 0; group < s.groups; ++group) {
    list_open_outputs(s, group, t.out_open, kernels.max_outputs, outputs);
    to = write_tiles(s, t, group, outputs, to);
  }
  if (!can_use_maps(s, t.in_offset[1], open_rows(s, t))) return;
  // There is one group, whose outputs are listed. Winograd's weights are for a stride of 1, which is not
  // known yet: they are packed, too.
  pack_map_weights(s, t, outputs, kernels, true, to);
}

const float* kept_tiles(const ConvShape& s, const ConvTensors<float>& t, const PlaneKernels& kernels,
                        const float* kept, int64_t floats) {
  if (!can_keep(s, t) || floats < kHeaderFloats) return nullptr;
  const Header header = make_header(s, t, kernels);
  if (std::memcmp(kept, header.data(), sizeof(header)) != 0) return nullptr;
  if (floats != kept_floats(s, t, kernels)) return nullptr;
  std::vector<unsigned char> masks;
  write_masks(s, t, masks);
  if (std::memcmp(kept + kHeaderFloats, masks.data(), masks.size()) != 0) return nullptr;
  const float* from = kept + kHeaderFloats + mask_floats(s);
  // Bit by bit: a NaN is equal to itself here, and -0 is not 0.
  for (int64_t row = 0; row < s.out_channels; ++row) {
    if (!t.out_open[row]) continue;
    const float* weights = t.weight + row * t.weight_strides.n;
    if (std::memcmp(from, weights, row_floats(s) * sizeof(float)) != 0) return nullptr;
    from += row_floats(s);
  }
  return from;
}

}  // namespace gatedconv
