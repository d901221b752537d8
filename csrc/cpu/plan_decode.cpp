// Decodes a program for one input size. Nothing is taken on trust: what decode accepts, run can run.
#include <algorithm>
#include <cstring>

#include "plan.h"

namespace gatedconv {
namespace {

// The largest size or count, and the largest kernel, stride, padding or dilation: products stay below 2^63.
constexpr int64_t kLargest = 1 << 18, kLargestWindow = 1 << 10;

bool within(int64_t value, int64_t low, int64_t high) {
  return value >= low && value <= high;
}

int64_t round_up(int64_t value, int64_t multiple) {
  return (value + multiple - 1) / multiple * multiple;
}

int winograd_tile(Op op) {
  return op == Op::kWinograd4 ? 4 : op == Op::kWinograd2 ? 2 : 1;
}

bool has_window(Op op) {
  return within(int64_t(op), int64_t(Op::kConv), int64_t(Op::kAvgPool));
}

bool has_weights(Op op) {
  return within(int64_t(op), int64_t(Op::kConv), int64_t(Op::kDepthwise));
}

int64_t weight_floats(const Step& step) {
  const int64_t panels = round_up(step.out.channels, kPanel);
  const int tile = winograd_tile(step.op);
  if (tile > 1) return panels * step.span * (tile + 2) * (tile + 2);
  return panels * step.kernel_h * step.kernel_w * (step.op == Op::kDepthwise ? 1 : step.span);
}

// The program as a list that is read field by field, and never beyond its end.
struct Reader {
  const int64_t* program;
  int64_t size;
  int64_t maps, steps, lists;
  const float* weights;
  int64_t weights_size;
  const Input& input;

  const char* read_header();
  const char* read_map(const int64_t* field, Map& map) const;
  const char* read_step(const int64_t* field, std::vector<Map>& maps, Step& step) const;
  const char* read_index(int64_t at, Step& step) const;
};

const char* Reader::read_header() {
  if (size < 4) return "the program is cut short";
  if (program[0] != kVersion) return "the program is of another version of gatedconv";
  maps = program[1];
  steps = program[2];
  lists = program[3];
  if (!within(maps, 1, kLargest) || !within(steps, 2, kLargest) || lists > size ||
      lists != 4 + maps * kMapFields + steps * kStepFields) {
    return "the program is cut short";
  }
  return nullptr;
}

const char* Reader::read_map(const int64_t* field, Map& map) const {
  const int64_t multiple = field[kMultiple];
  if (!within(field[kChannels], 1, kLargest) || !within(field[kPixel], field[kChannels], kLargest) ||
      !within(field[kHalo], 0, kLargest) || (multiple != 1 && multiple != 2 && multiple != 4) ||
      !within(field[kSlot], 0, maps - 1)) {
    return "a map is damaged";
  }
  map.channels = static_cast<int>(field[kChannels]);
  map.pixel = field[kPixel];
  map.halo = static_cast<int>(field[kHalo]);
  map.multiple = static_cast<int>(multiple);
  map.slot = static_cast<int>(field[kSlot]);
  return nullptr;
}

// Index lists are stored as size, entries; at 0 there is none.
const char* Reader::read_index(int64_t at, Step& step) const {
  if (at == 0) return nullptr;
  if (!within(at, 1, size - lists - 1)) return "an index list is out of range";
  step.index_size = program[lists + at];
  step.index = program + lists + at + 1;
  if (!within(step.index_size, 0, size - lists - at - 1)) return "an index list is cut short";
  return nullptr;
}

const char* check_index(const Step& step) {
  int64_t size = 0, limit = 0;
  if (step.op == Op::kGather) size = step.out.channels, limit = step.in.channels - 1;
  if (step.op == Op::kScatterAdd) size = step.in.channels, limit = step.out.channels - 1;
  if (step.op == Op::kConv && step.index) {
    size = (step.out.channels + kPanel - 1) / kPanel, limit = step.in.channels - step.span;
  }
  if (step.index_size != size) return "an index list has another length than its layer";
  for (int64_t i = 0; i < size; ++i) {
    if (!within(step.index[i], 0, limit)) return "an index is out of range";
  }
  return nullptr;
}

// Channels and borders that the kernels rely on.
const char* check_maps(const Step& step, const int64_t* field) {
  const Map &in = step.in, &out = step.out;
  const bool wide_in = step.op != Op::kInput && step.op != Op::kOutput && step.op != Op::kConv;
  const auto is_wide = [](const Map& map) { return map.pixel >= round_up(map.channels, kPanel); };
  if ((wide_in && !is_wide(in)) || (step.residual.data && !is_wide(step.residual)) ||
      (step.op != Op::kInput && step.op != Op::kOutput && !is_wide(out))) {
    return "a pixel is too narrow for vectors";
  }
  const bool same = step.op == Op::kDepthwise || step.op == Op::kMaxPool || step.op == Op::kAvgPool ||
                    step.op == Op::kMeanPool || step.op == Op::kAdd;
  if (same && in.channels != out.channels) return "two maps differ in channels";
  const bool grouped = step.op == Op::kConv && step.index;
  const bool dense = step.op == Op::kConv || winograd_tile(step.op) > 1;
  if (dense && (grouped ? !within(step.span, 1, in.channels) : step.span != in.channels)) {
    return "a convolution reads more channels than there are";
  }
  if (step.op == Op::kSubsample && !within(step.option, 0, out.channels - in.channels))
    return "an offset is out of range";
  const int tile = winograd_tile(step.op);
  if (has_weights(step.op)) {
    for (const StepField pad : {kPadTop, kPadLeft, kPadBottom, kPadRight}) {
      if (field[pad] > in.halo) return "a border is narrower than a layer's padding";
    }
  }
  if (tile > 1 &&
      (in.multiple % tile != 0 || step.kernel_h != 3 || step.kernel_w != 3 || step.stride_h != 1 ||
       step.stride_w != 1 || step.dilation_h != 1 || step.dilation_w != 1 || step.pad_top != 1 ||
       step.pad_left != 1 || field[kPadBottom] != 1 || field[kPadRight] != 1)) {
    return "a Winograd layer is no 3x3 convolution with stride and padding 1";
  }
  const bool needs_residual = step.op == Op::kAdd || step.op == Op::kScatterAdd;
  if (needs_residual && !step.residual.data) return "an addition lacks an operand";
  if (step.residual.data && (step.residual.height != out.height || step.residual.width != out.width ||
                             step.residual.channels != out.channels)) {
    return "a residual has another size than what it is added to";
  }
  return check_index(step);
}

int window_count(int size, int64_t pad, int kernel, int dilation, int stride) {
  return static_cast<int>((size + pad - static_cast<int64_t>(dilation) * (kernel - 1) - 1) / stride + 1);
}

const char* resolve_size(Step& step, const int64_t* field) {
  const Map& in = step.in;
  Map& out = step.out;
  out.height = in.height;
  out.width = in.width;
  if (has_window(step.op)) {
    const int64_t pad_h = field[kPadTop] + field[kPadBottom], pad_w = field[kPadLeft] + field[kPadRight];
    if (in.height + pad_h < static_cast<int64_t>(step.dilation_h) * (step.kernel_h - 1) + 1 ||
        in.width + pad_w < static_cast<int64_t>(step.dilation_w) * (step.kernel_w - 1) + 1) {
      return "a map is smaller than the kernel that runs over it";
    }
    out.height = window_count(in.height, pad_h, step.kernel_h, step.dilation_h, step.stride_h);
    out.width = window_count(in.width, pad_w, step.kernel_w, step.dilation_w, step.stride_w);
  } else if (step.op == Op::kMeanPool) {
    out.height = out.width = 1;
  } else if (step.op == Op::kSubsample || step.op == Op::kFill) {
    out.height = (in.height + step.stride_h - 1) / step.stride_h;
    out.width = (in.width + step.stride_w - 1) / step.stride_w;
  }
  // Taps are reached by 32-bit offsets.
  const int64_t reach =
      int64_t{step.dilation_h} * step.kernel_h * in.row + int64_t{step.dilation_w} * step.kernel_w * in.pixel;
  if (reach > INT32_MAX) return "the input is too wide";
  const int tile = winograd_tile(step.op);
  step.rows = (out.height + tile - 1) / tile;
  out.row = (out.halo + out.width + out.right()) * out.pixel;
  return nullptr;
}

const char* Reader::read_step(const int64_t* field, std::vector<Map>& all, Step& step) const {
  if (!within(field[kOp], 0, int64_t(Op::kFill)) || !within(field[kAct], 0, int64_t(Act::kRelu6))) {
    return "an instruction is unknown";
  }
  for (int name = kKernelH; name <= kDilationW; ++name) {
    const bool pad = within(name, kPadTop, kPadRight);
    if (!within(field[name], pad ? 0 : 1, kLargestWindow)) return "an instruction is damaged";
  }
  const auto number = [&](StepField name) { return static_cast<int>(field[name]); };
  step.op = static_cast<Op>(field[kOp]);
  step.act = static_cast<Act>(field[kAct]);
  step.kernel_h = number(kKernelH);
  step.kernel_w = number(kKernelW);
  step.stride_h = number(kStrideH);
  step.stride_w = number(kStrideW);
  step.pad_top = number(kPadTop);
  step.pad_left = number(kPadLeft);
  step.dilation_h = number(kDilationH);
  step.dilation_w = number(kDilationW);
  step.span = within(field[kSpan], 0, kLargest) ? number(kSpan) : 0;
  step.option = field[kOption];
  if (const char* error = read_index(field[kIndex], step)) return error;
  const auto is_map = [&](StepField name) { return within(field[name], 0, maps - 1); };
  // A map that no earlier step has made is as wrong as none: its height is still 0.
  const auto is_made = [&](StepField name) { return is_map(name) && all[field[name]].height > 0; };
  if (step.op == Op::kInput) {
    step.in.channels = static_cast<int>(input.size[1]);
    step.in.height = static_cast<int>(input.size[2]);
    step.in.width = static_cast<int>(input.size[3]);
    step.in.pixel = step.in.channels;
    step.source = input.data;
    std::copy(input.stride, input.stride + 4, step.source_stride);
    if (!is_map(kOut) || all[field[kOut]].channels != input.size[1]) {
      return "the input has another number of channels";
    }
  } else if (!is_made(kIn)) {
    return "a map is read before it is written";
  } else {
    step.in = all[field[kIn]];
  }
  if (step.op == Op::kOutput) {
    step.out.channels = step.in.channels;
    step.out.pixel = step.in.pixel;
  } else {
    if (!is_map(kOut) || all[field[kOut]].height > 0) return "a map is written twice";
    step.out = all[field[kOut]];
  }
  if (field[kResidual] >= 0) {
    if (!is_made(kResidual)) return "a map is read before it is written";
    step.residual = all[field[kResidual]];
    // Not placed yet, but known to be there.
    static float there;
    step.residual.data = &there;
  }
  if (const char* error = resolve_size(step, field)) return error;
  if (const char* error = check_maps(step, field)) return error;
  if (step.op == Op::kFill) {
    if (!within(field[kBias], 0, weights_size - round_up(step.out.channels, kPanel))) {
      return "a weight is out of range";
    }
    step.bias = weights + field[kBias];
  }
  if (has_weights(step.op)) {
    if (!within(field[kWeights], 0, weights_size - weight_floats(step)) ||
        !within(field[kBias], 0, weights_size - round_up(step.out.channels, kPanel))) {
      return "a weight is out of range";
    }
    if (winograd_tile(step.op) > 1) {
      const int64_t direct = round_up(step.out.channels, kPanel) * step.span * 9;
      if (!within(field[kDirect], 0, weights_size - direct)) return "a weight is out of range";
      step.direct = weights + field[kDirect];
    }
    step.weights = weights + field[kWeights];
    step.bias = weights + field[kBias];
  }
  if (step.op != Op::kOutput) all[field[kOut]] = step.out;
  return nullptr;
}

}  // namespace

const char* decode(const int64_t* program, int64_t program_size, const float* weights, int64_t weights_size,
                   const Input& input, Plan& plan) {
  Reader reader{program, program_size, 0, 0, 0, weights, weights_size, input};
  if (const char* error = reader.read_header()) return error;
  for (const int64_t size : {input.size[1], input.size[2], input.size[3]}) {
    if (!within(size, 1, kLargest)) return "the input is empty or too large";
  }
  std::vector<Map> maps(reader.maps);
  const int64_t* field = program + 4;
  for (Map& map : maps) {
    if (const char* error = reader.read_map(field, map)) return error;
    field += kMapFields;
  }
  plan.slot_floats.assign(reader.maps, 0);
  for (int64_t i = 0; i < reader.steps; ++i, field += kStepFields) {
    Step step{};
    if (const char* error = reader.read_step(field, maps, step)) return error;
    if ((step.op == Op::kInput) != (i == 0) || (step.op == Op::kOutput) != (i + 1 == reader.steps)) {
      return "a program starts with its input and ends with its output";
    }
    if (step.op != Op::kOutput) {
      // A vector read at the last, narrow pixel stays inside the image.
      const Map& out = step.out;
      const int64_t floats = (out.halo + out.height + out.bottom()) * out.row + kPanel;
      plan.slot_floats[out.slot] = std::max(plan.slot_floats[out.slot], round_up(floats, kPanel));
    }
    plan.steps.push_back(step);
  }
  const Map& last = plan.steps.back().in;
  plan.out_channels = last.channels;
  plan.out_height = last.height;
  plan.out_width = last.width;
  // Images lie a whole slot apart in every map, so that one image's maps never reach into another image's.
  for (Step& step : plan.steps) {
    for (Map* map : {&step.in, &step.out, &step.residual}) map->image = plan.slot_floats[map->slot];
  }
  return nullptr;
}

}  // namespace gatedconv
