// Decodes a program for one input size. Nothing in it is trusted: what decode accepts, run can run.
#include <algorithm>
#include <cstring>

#include "bf16.h"
#include "plan.h"
#include "plan_bands.h"
#include "plan_check.h"
#include "plan_schedule.h"

namespace gatedconv {
namespace {

// The largest size or count, and the largest kernel, stride, padding or dilation: products stay below 2^63.
constexpr int64_t kLargest = 1 << 18, kLargestWindow = 1 << 10;
// The most floats of one image's maps together: those of a batch on every worker still have an address, and
// where addresses are of 32 bits, every stride is below 2^31 bytes.
constexpr int64_t kMostFloats = std::min<int64_t>(int64_t{1} << 44, PTRDIFF_MAX / 8);

bool has_window(Op op) {
  return within(int64_t(op), int64_t(Op::kConv), int64_t(Op::kAvgPool));
}

int64_t weight_floats(const Step& step) {
  const int64_t panels = round_up(step.out.channels, kPanel);
  const int tile = winograd_tile(step.op);
  if (tile > 1) return panels * step.span * (tile + 2) * (tile + 2);
  if (in_bf16(step)) {
    return panels * round_up(int64_t{step.kernel_h} * step.kernel_w * step.span, kBf16Depth) / 2;
  }
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
  const char* read_weights(const int64_t* field, Step& step) const;
};

const char* Reader::read_header() {
  if (size < 4) return "the program is cut short";
  if (program[0] != kVersion) return "the program is of another version of gatedconv: export it again";
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
      !within(field[kSlot], 0, maps - 1) || !within(field[kOffset], 0, field[kPixel] - field[kChannels])) {
    return "a map is damaged";
  }
  map.channels = static_cast<int>(field[kChannels]);
  map.pixel = field[kPixel];
  map.halo = static_cast<int>(field[kHalo]);
  map.multiple = static_cast<int>(multiple);
  map.slot = static_cast<int>(field[kSlot]);
  map.offset = field[kOffset];
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

int window_count(int size, int64_t pad, int kernel, int dilation, int stride) {
  return static_cast<int>((size + pad - static_cast<int64_t>(dilation) * (kernel - 1) - 1) / stride + 1);
}

// The same rounded up, but for a window that would begin behind the image and the padding in front of it.
int window_count_up(int size, int64_t pad, int before, int kernel, int stride) {
  const int64_t count = (size + pad - kernel + stride - 1) / stride + 1;
  return static_cast<int>((count - 1) * stride >= size + before ? count - 1 : count);
}

bool rounds_up(const Step& step) {
  return (step.op == Op::kMaxPool || step.op == Op::kAvgPool) && (step.option & 2) != 0;
}

const char* resolve_size(Step& step, const int64_t* field) {
  const Map& in = step.in;
  Map& out = step.out;
  out.height = in.height;
  out.width = in.width;
  if (has_window(step.op) || step.op == Op::kFill) {
    const int64_t pad_h = field[kPadTop] + field[kPadBottom], pad_w = field[kPadLeft] + field[kPadRight];
    if (in.height + pad_h < static_cast<int64_t>(step.dilation_h) * (step.kernel_h - 1) + 1 ||
        in.width + pad_w < static_cast<int64_t>(step.dilation_w) * (step.kernel_w - 1) + 1) {
      return "a map is smaller than the kernel that runs over it";
    }
    out.height = window_count(in.height, pad_h, step.kernel_h, step.dilation_h, step.stride_h);
    out.width = window_count(in.width, pad_w, step.kernel_w, step.dilation_w, step.stride_w);
    if (rounds_up(step)) {
      out.height = window_count_up(in.height, pad_h, step.pad_top, step.kernel_h, step.stride_h);
      out.width = window_count_up(in.width, pad_w, step.pad_left, step.kernel_w, step.stride_w);
    }
  } else if (step.op == Op::kMeanPool) {
    out.height = out.width = 1;
  } else if (step.op == Op::kSubsample) {
    out.height = (in.height + step.stride_h - 1) / step.stride_h;
    out.width = (in.width + step.stride_w - 1) / step.stride_w;
  } else if (step.op == Op::kAdaptiveMaxPool || step.op == Op::kAdaptiveAvgPool) {
    out.height = step.kernel_h;
    out.width = step.kernel_w;
  } else if (step.op == Op::kNearest || step.op == Op::kBilinear || step.op == Op::kPixelShuffle) {
    const bool given = step.residual.exists();
    out.height = given ? step.residual.height : in.height * step.kernel_h;
    out.width = given ? step.residual.width : in.width * step.kernel_w;
  }
  if (out.height > kLargest || out.width > kLargest) return "a map grows too large";
  // Taps are reached by 32-bit offsets, forwards and backwards.
  const auto reach = [](int dilation, int kernel, int pad) {
    return std::max<int64_t>(int64_t{dilation} * kernel, pad);
  };
  if (reach(step.dilation_h, step.kernel_h, step.pad_top) * in.row +
          reach(step.dilation_w, step.kernel_w, step.pad_left) * in.pixel >
      INT32_MAX) {
    return "the input is too wide";
  }
  const int tile = winograd_tile(step.op);
  step.rows = step.op == Op::kGroupNorm ? std::max(step.span, 1) : (out.height + tile - 1) / tile;
  const int64_t columns = out.halo + out.width + out.right();
  // Pixels are counted in 32 bits.
  const int64_t pixels = (out.halo + out.height + out.bottom()) * columns;
  if (pixels > INT32_MAX || pixels * out.pixel > kMostFloats) return "a map grows too large";
  out.row = static_cast<ptrdiff_t>(columns * out.pixel);
  return nullptr;
}

// Finds where the weights of a step begin; without weights (a plan that is only sized) it checks that they
// fit.
const char* Reader::read_weights(const int64_t* field, Step& step) const {
  const int64_t channels = round_up(step.out.channels, kPanel);
  const auto find = [&](StepField name, int64_t floats, const float*& found) {
    if (!within(field[name], 0, weights_size - floats)) return false;
    found = weights ? weights + field[name] : nullptr;
    return true;
  };
  bool found = true;
  if (has_weights(step.op)) {
    found = find(kWeights, weight_floats(step), step.weights) && find(kBias, channels, step.bias);
    if (winograd_tile(step.op) > 1) found = found && find(kDirect, channels * step.span * 9, step.direct);
  } else if (step.op == Op::kFill || step.op == Op::kPrelu) {
    found = find(kBias, channels, step.bias);
  } else if (step.op == Op::kScatterAdd && field[kBias] != 0) {
    found = find(kBias, channels, step.bias);
  } else if (step.op == Op::kLayerNorm || step.op == Op::kGroupNorm) {
    found = find(kBias, 2 * channels + kPanel, step.bias);  // the vectors of a group begin at any channel
  }
  if (field[kPre] != 0) {
    found = found && find(kPre, 2 * round_up(step.in.channels, kPanel), step.pre);
  }
  return found ? nullptr : "a weight is out of range";
}

const char* Reader::read_step(const int64_t* field, std::vector<Map>& all, Step& step) const {
  if (!within(field[kOp], 0, int64_t(Op::kPrelu)) || !within(field[kAct], 0, int64_t(Act::kMish)) ||
      !within(field[kPreAct], 0, int64_t(Act::kMish)) || !within(field[kValue], 0, UINT32_MAX)) {
    return "an instruction is unknown";
  }
  for (int name = kKernelH; name <= kDilationW; ++name) {
    const bool pad = within(name, kPadTop, kPadRight);
    if (!within(field[name], pad ? 0 : 1, kLargestWindow)) return "an instruction is damaged";
  }
  const auto number = [&](StepField name) { return static_cast<int>(field[name]); };
  step.op = static_cast<Op>(field[kOp]);
  const Act act = static_cast<Act>(field[kAct]);
  (in_registers(act) ? step.act : step.late) = act;
  step.pre_act = static_cast<Act>(field[kPreAct]);
  const auto bits = static_cast<uint32_t>(field[kValue]);
  std::memcpy(&step.value, &bits, sizeof(bits));
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
  step.bf16 = in_bf16(step) ? native_bf16() : nullptr;
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
  }
  if (field[kGate] >= 0) {
    if (!is_made(kGate)) return "a map is read before it is written";
    step.gate = all[field[kGate]];
  }
  step.changes_input = step.gate.exists() || field[kPre] != 0;
  if (const char* error = resolve_size(step, field)) return error;
  if (const char* error = read_weights(field, step)) return error;
  if (const char* error = check_maps(step, field)) return error;
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
  plan.slot_parts.assign(reader.maps, false);
  for (const Map& map : maps) {
    if (map.offset != 0) plan.slot_parts[map.slot] = true;
  }
  for (int64_t i = 0; i < reader.steps; ++i, field += kStepFields) {
    Step step{};
    if (const char* error = reader.read_step(field, maps, step)) return error;
    if ((step.op == Op::kInput) != (i == 0) || (step.op == Op::kOutput) != (i + 1 == reader.steps)) {
      return "a program starts with its input and ends with its output";
    }
    if (step.op == Op::kView) {
      plan.slot_parts[step.out.slot] = true;
    } else {
      plan.steps.push_back(step);
    }
  }
  size_slots(plan);
  int64_t floats = 0;
  for (const int64_t slot : plan.slot_floats) {
    floats += slot;
    if (floats > kMostFloats) return "the maps grow too large";
  }
  const Map& last = plan.steps.back().in;
  plan.out_channels = last.channels;
  plan.out_height = last.height;
  plan.out_width = last.width;
  mark_passing(plan, kFuzzing ? 0 : cache_bytes() / 2);
  return nullptr;
}

}  // namespace gatedconv
