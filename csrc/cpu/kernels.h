// One instruction set's table of kernels; included once by each of plan_portable, plan_avx2 and
// plan_avx512.cpp.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "conv_bf16.h"
#include "conv_direct.h"
#include "conv_grouped.h"
#include "conv_winograd.h"
#include "depthwise.h"
#include "map_kernels.h"
#include "norm_kernels.h"
#include "pool_kernels.h"

namespace gatedconv::GATEDCONV_ISA {

static void clear_borders(const Step& step, const Part& part) {
  const int rows = step.op == Op::kWinograd4 ? 4 : step.op == Op::kWinograd2 ? 2 : 1;
  const int channel1 = std::min(part.panel1 * kPanel, vectors(step.out.channels) * kLanes);
  for (int64_t unit = part.unit0; unit < part.unit1;) {
    const int64_t image = unit / step.rows, end = std::min((image + 1) * step.rows, part.unit1);
    const int y0 = static_cast<int>(unit - image * step.rows) * rows;
    const int y1 = std::min(static_cast<int>(end - image * step.rows) * rows, step.out.height);
    clear_border(step.out, image, y0, y1, part.panel0 * kPanel, channel1);
    unit = end;
  }
}

// Applies the late activation to all that a part has written.
static void activate_part(const Step& step, const Part& part) {
  const int first = part.panel0 * kPanelVectors;
  const int last = std::min(vectors(step.out.channels), part.panel1 * kPanelVectors);
  for (int64_t unit = part.unit0; unit < part.unit1; ++unit) {
    float* row = step.out.at(unit / step.rows, unit % step.rows) + first * kLanes;
    activate_pixels(step.late, step.value, row, step.out.width, step.out.pixel, last - first);
  }
}

static void run(const Step& step, const Part& part, float* scratch) {
  bool activates = false, clears = false;  // whether the kernel has done that itself
  switch (step.op) {
    case Op::kInput:
      return read_input(step, part);
    case Op::kOutput:
      return write_output(step, part);
    case Op::kView:
      return;
    case Op::kConv:
      activates = true;
      if (in_bf16(step)) {
        conv_bf16(step, part, scratch);
      } else if (step.changes_input) {
        conv_changed(step, part, scratch);
      } else if (step.option == 1) {
        conv_grouped(step, part, scratch);
      } else {
        conv_direct(step, part);
      }
      break;
    case Op::kWinograd2:
      activates = true;
      if (!conv_winograd<2>(step, part, scratch)) conv_instead(step, part, 2);
      break;
    case Op::kWinograd4:
      activates = true;
      if (!conv_winograd<4>(step, part, scratch)) conv_instead(step, part, 4);
      break;
    case Op::kDepthwise:
      activates = true;
      conv_depthwise(step, part);
      break;
    case Op::kMaxPool:
    case Op::kAvgPool:
    case Op::kAdaptiveMaxPool:
    case Op::kAdaptiveAvgPool:
      pool(step, part);
      break;
    case Op::kMeanPool:
      pool_mean(step, part);
      break;
    case Op::kGather:
    case Op::kSubsample:
      move_channels(step, part);
      break;
    case Op::kCopy:
      clears = true;
      copy(step, part);
      break;
    case Op::kFill:
      fill(step, part);
      break;
    case Op::kScatterAdd:
      scatter_add(step, part);
      break;
    case Op::kAdd:
      combine(step, part, [](vec a, vec b) { return a + b; });
      break;
    case Op::kMultiply:
      combine(step, part, [](vec a, vec b) { return a * b; });
      break;
    case Op::kNearest:
      resize_nearest(step, part);
      break;
    case Op::kBilinear:
      resize_bilinear(step, part);
      break;
    case Op::kPixelShuffle:
      pixel_shuffle(step, part);
      break;
    case Op::kLayerNorm:
      layer_norm(step, part);
      break;
    case Op::kGroupNorm:
      activates = clears = true;
      group_norm(step, part);
      break;
    case Op::kSoftmax:
      softmax(step, part);
      break;
    case Op::kPrelu:
      prelu(step, part);
      break;
  }
  if (!activates && step.late != Act::kNone) activate_part(step, part);
  if (!clears) clear_borders(step, part);
}

static size_t scratch_floats(const Step& step) {
  if (step.op == Op::kWinograd2) return winograd_scratch<2>(step);
  if (step.op == Op::kWinograd4) return winograd_scratch<4>(step);
  if (step.op == Op::kConv && step.option == 1) return grouped_scratch(step);
  if (in_bf16(step)) return bf16_scratch(step);
  return step.changes_input ? changed_scratch(step) : 0;
}

}  // namespace gatedconv::GATEDCONV_ISA
