// Checks of a step that plan_decode.cpp has read: each returns null, or what is wrong.
#pragma once

#include "plan.h"

namespace gatedconv {

// The most terms of a sum in bfloat16: a block of their rows fits the memory.
constexpr int64_t kMostTerms = 1 << 24;

inline bool within(int64_t value, int64_t low, int64_t high) {
  return value >= low && value <= high;
}

inline int winograd_tile(Op op) {
  return op == Op::kWinograd4 ? 4 : op == Op::kWinograd2 ? 2 : 1;
}

inline bool has_weights(Op op) {
  return within(int64_t(op), int64_t(Op::kConv), int64_t(Op::kDepthwise));
}

inline const char* check_index(const Step& step) {
  int64_t size = 0, limit = 0;
  if (step.op == Op::kGather) size = step.out.channels, limit = step.in.channels - 1;
  if (step.op == Op::kScatterAdd) size = step.in.channels, limit = step.out.channels - 1;
  if (step.op == Op::kConv && step.index) {
    size = ceil_div(step.out.channels, kPanel), limit = step.in.channels - step.span;
  }
  if (step.index_size != size) return "an index list has another length than its layer";
  for (int64_t i = 0; i < size; ++i) {
    if (!within(step.index[i], 0, limit)) return "an index is out of range";
  }
  return nullptr;
}

inline bool is_wide(const Map& map) {
  return map.pixel >= round_up(map.channels, kPanel);
}

// Whether whole vectors of the map end inside of its own pixels.
inline bool takes_vectors(const Map& map) {
  return map.offset + round_up(map.channels, kPanel) <= map.pixel;
}

inline bool same_size(const Map& a, const Map& b) {
  return a.height == b.height && a.width == b.width;
}

// A second operand: of the output's size, of one pixel, or of one channel.
inline const char* check_operand(const Step& step) {
  const Map &other = step.residual, &out = step.out;
  const bool broadcasts = step.op == Op::kAdd || step.op == Op::kMultiply;
  const bool pixel = other.height == 1 && other.width == 1;
  if (!is_wide(other)) return "a pixel is too narrow for vectors";
  if (same_size(other, out) ? other.channels == out.channels || (broadcasts && other.channels == 1)
                            : broadcasts && pixel && other.channels == out.channels) {
    return nullptr;
  }
  return "a residual has another size than what it is added to";
}

// The gate or the scale that a 1x1 convolution applies to its input before it reads it.
inline const char* check_input_change(const Step& step) {
  if (!step.changes_input) return nullptr;
  const bool pointwise = step.op == Op::kConv && !step.index && step.kernel_h == 1 && step.kernel_w == 1 &&
                         step.pad_top == 0 && step.pad_left == 0;
  if (!pointwise || !is_wide(step.in)) return "only a 1x1 convolution changes its input";
  if (step.gate.exists() && (step.gate.channels != step.in.channels || step.gate.height != 1 ||
                             step.gate.width != 1 || !is_wide(step.gate))) {
    return "a gate has another size than what it multiplies";
  }
  return nullptr;
}

inline const char* check_window(const Step& step, const int64_t* field) {
  for (const StepField pad : {kPadTop, kPadLeft, kPadBottom, kPadRight}) {
    if (field[pad] > step.in.halo) return "a border is narrower than a layer's padding";
  }
  const int tile = winograd_tile(step.op);
  if (tile > 1 &&
      (step.in.multiple % tile != 0 || step.kernel_h != 3 || step.kernel_w != 3 || step.stride_h != 1 ||
       step.stride_w != 1 || step.dilation_h != 1 || step.dilation_w != 1 || step.pad_top != 1 ||
       step.pad_left != 1 || field[kPadBottom] != 1 || field[kPadRight] != 1)) {
    return "a Winograd layer is no 3x3 convolution with stride and padding 1";
  }
  return nullptr;
}

// A row of the matrix that is multiplied holds all terms of a sum.
inline const char* check_bf16(const Step& step) {
  const int64_t terms = int64_t{step.kernel_h} * step.kernel_w * step.span;
  return in_bf16(step) && !step.index && terms <= kMostTerms ? nullptr : "a convolution is damaged";
}

// Channels that an operation keeps, drops or needs.
inline const char* check_channels(const Step& step) {
  const Map &in = step.in, &out = step.out;
  switch (step.op) {
    case Op::kConv:
    case Op::kWinograd2:
    case Op::kWinograd4:
      if (step.op == Op::kConv && step.option == 1) {
        return step.span == kPanel / 2 && in.channels == out.channels && is_wide(in) && !step.index &&
                       !step.changes_input
                   ? nullptr
                   : "a convolution in groups of 8 is damaged";
      }
      if (step.op == Op::kConv && step.index ? !within(step.span, 1, in.channels)
                                             : step.span != in.channels) {
        return "a convolution reads more channels than there are";
      }
      if (step.op == Op::kConv && step.option != 0) return check_bf16(step);
      return nullptr;
    case Op::kSubsample:
      return within(step.option, 0, out.channels - in.channels) ? nullptr : "an offset is out of range";
    case Op::kPixelShuffle:
      if (step.kernel_h != step.kernel_w || step.residual.exists()) return "a pixel shuffle is damaged";
      return in.channels == int64_t{out.channels} * step.kernel_h * step.kernel_h
                 ? nullptr
                 : "two maps differ in channels";
    case Op::kGather:
      return step.stride_h == 1 && step.stride_w == 1 ? nullptr : "a gather has a stride";
    case Op::kGroupNorm:
      if (step.span < 1 || in.channels % step.span != 0) return "channels do not make whole groups";
      break;
    case Op::kInput:  // which writes whole pixels
      return out.offset == 0 ? nullptr : "the input is no map of its own";
    case Op::kOutput:
    case Op::kScatterAdd:
    case Op::kFill:
      return nullptr;
    case Op::kView:
      if (out.slot != in.slot || out.pixel != in.pixel || out.halo != in.halo ||
          out.multiple != in.multiple) {
        return "a view has another form than its map";
      }
      return nullptr;
    default:
      break;
  }
  return in.channels == out.channels ? nullptr : "two maps differ in channels";
}

// Channels and borders that the kernels rely on.
inline const char* check_maps(const Step& step, const int64_t* field) {
  const bool ends = step.op == Op::kInput || step.op == Op::kOutput;
  const bool exact = ends || step.op == Op::kView || step.op == Op::kCopy;
  if ((!ends && step.op != Op::kConv && !is_wide(step.in)) || (!exact && !takes_vectors(step.out))) {
    return "a pixel is too narrow for vectors";
  }
  const bool needs = step.op == Op::kAdd || step.op == Op::kMultiply;
  if (needs && !step.residual.exists()) return "an addition lacks an operand";
  if (const char* error = check_channels(step)) return error;
  if (has_weights(step.op)) {
    if (const char* error = check_window(step, field)) return error;
  }
  const bool resizes = step.op == Op::kNearest || step.op == Op::kBilinear;
  if (step.residual.exists() && !resizes) {
    if (const char* error = check_operand(step)) return error;
  }
  if (const char* error = check_input_change(step)) return error;
  return check_index(step);
}

}  // namespace gatedconv
