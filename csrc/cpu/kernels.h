// One instruction set's table of kernels; included once by each of plan_portable, plan_avx2 and
// plan_avx512.cpp.
#pragma once

#include <algorithm>
#include <utility>
#include <vector>

#include "conv_direct.h"
#include "conv_winograd.h"
#include "map_kernels.h"

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

static void run(const Step& step, const Part& part, float* scratch) {
  switch (step.op) {
    case Op::kInput:
      return read_input(step, part);
    case Op::kOutput:
      return write_output(step, part);
    case Op::kConv:
      conv_direct(step, part);
      break;
    case Op::kWinograd2:
      if (!conv_winograd<2>(step, part, scratch)) conv_instead(step, part, 2);
      break;
    case Op::kWinograd4:
      if (!conv_winograd<4>(step, part, scratch)) conv_instead(step, part, 4);
      break;
    case Op::kDepthwise:
      conv_depthwise(step, part);
      break;
    case Op::kMaxPool:
    case Op::kAvgPool:
      pool(step, part);
      break;
    case Op::kMeanPool:
      pool_mean(step, part);
      break;
    case Op::kGather:
    case Op::kSubsample:
      move_channels(step, part);
      break;
    case Op::kFill:
      fill(step, part);
      break;
    case Op::kScatterAdd:
    case Op::kAdd:
      add(step, part);
      break;
  }
  clear_borders(step, part);
}

static size_t scratch_floats(const Step& step) {
  if (step.op == Op::kWinograd2) return winograd_scratch<2>(step);
  if (step.op == Op::kWinograd4) return winograd_scratch<4>(step);
  return 0;
}

}  // namespace gatedconv::GATEDCONV_ISA
