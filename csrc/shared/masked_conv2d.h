// The direct masked convolution, one output at a time: what the CPU body and the CUDA kernel share.
// No header of PyTorch is needed here, so the native tests compile it alone, under sanitizers.
#pragma once

#include <cstdint>

#include "shared/host_device.h"

namespace gatedconv {

struct Strides4 {
  int64_t n, c, h, w;  // in elements; 0 and negative steps are as good as any other
};

struct ConvShape {
  int64_t batch, in_channels, height, width;
  int64_t out_channels, kernel_h, kernel_w, out_h, out_w;
  int64_t stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w, groups;
};

template <typename T>
struct ConvTensors {
  const T* input;            // (N, C_in, H, W)
  const T* weight;           // (C_out, C_in / groups, KH, KW)
  const T* bias;             // (C_out), or null
  const T* residual;         // (N, C_out, P, Q), or null
  T* output;                 // (N, C_out, P, Q)
  const bool* out_open;      // (C_out), or (N, C_out) with mask_stride = C_out
  const int32_t* in_index;   // open inputs, ascending, group after group
  const int32_t* in_offset;  // (groups + 1): where each group begins in in_index
  Strides4 input_strides, weight_strides, residual_strides, output_strides;
  int64_t mask_stride;  // 0 for one mask for the whole batch
  bool relu;
};

// Half-open range of kernel taps k with 0 <= start + k * dilation < size.
struct TapRange {
  int64_t begin, end;
};

GATEDCONV_HOST_DEVICE inline TapRange tap_range(int64_t start, int64_t dilation, int64_t taps, int64_t size) {
  int64_t begin = start < 0 ? (-start + dilation - 1) / dilation : 0;
  int64_t end = start < size ? (size - start + dilation - 1) / dilation : 0;
  if (end > taps) end = taps;
  if (begin > end) begin = end;
  return {begin, end};
}

// Keeps NaN, as torch.relu does.
template <typename T>
GATEDCONV_HOST_DEVICE inline T relu_keeping_nan(T value) {
  return value < T(0) ? T(0) : value;
}

// The sum of one output over its group's open inputs, without bias.
template <typename T>
GATEDCONV_HOST_DEVICE inline T conv_sum(const ConvShape& shape, const ConvTensors<T>& t, int64_t n,
                                        int64_t oc, int64_t p, int64_t q) {
  const int64_t group = oc / (shape.out_channels / shape.groups);
  const int64_t first_channel = group * (shape.in_channels / shape.groups);
  const int64_t row0 = p * shape.stride_h - shape.pad_top;
  const int64_t col0 = q * shape.stride_w - shape.pad_left;
  const TapRange rows = tap_range(row0, shape.dilation_h, shape.kernel_h, shape.height);
  const TapRange cols = tap_range(col0, shape.dilation_w, shape.kernel_w, shape.width);
  T sum = T(0);
  for (int32_t i = t.in_offset[group]; i < t.in_offset[group + 1]; ++i) {
    const int64_t channel = t.in_index[i];
    const T* plane = t.input + n * t.input_strides.n + channel * t.input_strides.c;
    const T* filter = t.weight + oc * t.weight_strides.n + (channel - first_channel) * t.weight_strides.c;
    for (int64_t kh = rows.begin; kh < rows.end; ++kh) {
      const int64_t row = row0 + kh * shape.dilation_h;
      for (int64_t kw = cols.begin; kw < cols.end; ++kw) {
        const int64_t col = col0 + kw * shape.dilation_w;
        sum += plane[row * t.input_strides.h + col * t.input_strides.w] *
               filter[kh * t.weight_strides.h + kw * t.weight_strides.w];
      }
    }
  }
  return sum;
}

// Writes one output. A closed one is act(residual), or exactly 0, and reads neither input, weight nor bias.
template <typename T>
GATEDCONV_HOST_DEVICE inline void write_output(const ConvShape& shape, const ConvTensors<T>& t, int64_t n,
                                               int64_t oc, int64_t p, int64_t q) {
  T value = T(0);
  if (t.out_open[n * t.mask_stride + oc]) {
    value = conv_sum(shape, t, n, oc, p, q);
    if (t.bias != nullptr) value += t.bias[oc];
  }
  if (t.residual != nullptr) {
    const Strides4& s = t.residual_strides;
    value += t.residual[n * s.n + oc * s.c + p * s.h + q * s.w];
  }
  if (t.relu) value = relu_keeping_nan(value);
  const Strides4& s = t.output_strides;
  t.output[n * s.n + oc * s.c + p * s.h + q * s.w] = value;
}

// Lists the open inputs group by group; in_open may be null (all open). offset has groups + 1 entries.
GATEDCONV_HOST_DEVICE inline void list_open_inputs(const bool* in_open, int64_t channels, int64_t groups,
                                                   int32_t* index, int32_t* offset) {
  int32_t count = 0;
  const int64_t per_group = channels / groups;
  for (int64_t group = 0; group < groups; ++group) {
    offset[group] = count;
    for (int64_t c = group * per_group; c < (group + 1) * per_group; ++c) {
      if (in_open == nullptr || in_open[c]) index[count++] = static_cast<int32_t>(c);
    }
  }
  offset[groups] = count;
}

}  // namespace gatedconv
