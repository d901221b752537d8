// Packing of the weights of the masked convolution over maps.

#include "map_weights.h"

#include <algorithm>
#include <array>

namespace gatedconv {

std::vector<int32_t> place_outputs(const ConvShape& s, const OpenOutputs& outputs, int lanes) {
  const int64_t count = static_cast<int64_t>(outputs.rows.size());
  if (ceil_div(count, lanes) < ceil_div(s.out_channels, lanes)) return outputs.rows;
  std::vector<int32_t> places(s.out_channels, -1);
  for (const int32_t row : outputs.rows) places[row] = row;
  return places;
}

int64_t map_weight_floats(int64_t inputs, int64_t outputs) {
  return round_up(outputs, kPanel) * inputs * (kTaps + kPoints);
}

namespace {

// Filters, null for zeros, into a panel [9][inputs][16].
void pack_panel(const ConvShape& s, const ConvTensors<float>& t, const PlaneKernels& kernels,
                std::array<const float*, kPanel> filters, float* panel) {
  const int64_t inputs = t.in_offset[1], panel_floats = inputs * kPanel;
  const Strides4& w = t.weight_strides;
  const bool all = inputs == s.in_channels;
  if (all && w.w == 1 && w.h == 3 && w.c == kTaps) {  // (C_out, C_in, 3, 3), contiguous
    return kernels.planes_to_map(filters.data(), kPanel, inputs * kTaps, kTaps, panel, panel_floats, kPanel);
  }
  for (int64_t tap = 0; tap < kTaps; ++tap) {
    std::array<const float*, kPanel> at{};
    for (size_t i = 0; i < kPanel; ++i) {
      if (filters[i]) at[i] = filters[i] + tap / 3 * w.h + tap % 3 * w.w;
    }
    float* to = panel + tap * panel_floats;
    if (all && w.c == 1) {  // channels_last
      kernels.planes_to_map(at.data(), kPanel, inputs, inputs, to, kPanel, 0);
      continue;
    }
    for (int64_t k = 0; k < inputs; ++k) {
      for (size_t i = 0; i < kPanel; ++i) to[k * kPanel + i] = at[i] ? at[i][t.in_index[k] * w.c] : 0;
    }
  }
}

}  // namespace

void pack_map_weights(const ConvShape& s, const ConvTensors<float>& t, const OpenOutputs& outputs,
                      const PlaneKernels& kernels, bool winograd, float* to) {
  const std::vector<int32_t> places = place_outputs(s, outputs, kernels.lanes);
  const int64_t inputs = t.in_offset[1], count = static_cast<int64_t>(places.size());
  const int64_t panels = ceil_div(count, kPanel), panel_floats = inputs * kPanel;
  const Strides4& w = t.weight_strides;
  for (int64_t panel = 0; panel < panels; ++panel) {
    std::array<const float*, kPanel> filters{};
    for (int64_t row = panel * kPanel; row < std::min(count, (panel + 1) * kPanel); ++row) {
      if (places[row] >= 0) filters[row % kPanel] = t.weight + places[row] * w.n;
    }
    pack_panel(s, t, kernels, filters, to + panel * panel_floats * kTaps);
  }
  if (!winograd) return;
  float* points = to + panels * panel_floats * kTaps;
  for (int64_t panel = 0; panel < panels; ++panel) {
    kernels.winograd_weights(to + panel * panel_floats * kTaps, inputs,
                             points + panel * panel_floats * kPoints);
  }
}

}  // namespace gatedconv
