// Decodes a program for one input size and runs it: on one image group per worker, or all workers on one
// group.
#include "plan.h"

#include <algorithm>
#include <atomic>
#include <cstdlib>
#include <cstring>
#include <memory>

#include "workspace.h"

namespace gatedconv {
namespace {

// Bytes of feature maps that should stay in a core's own cache while a step runs, and the most images of a
// group.
constexpr int64_t kCacheBytes = 384 * 1024;
constexpr int64_t kMaxGroup = 8;

int ceil_div(int64_t a, int64_t b) {
  return static_cast<int>((a + b - 1) / b);
}

int window_count(int size, int pad, int kernel, int dilation, int stride) {
  return (size + pad - dilation * (kernel - 1) - 1) / stride + 1;
}

void resolve_strides(Map& map) {
  map.row = (map.halo + map.width + map.right()) * map.pixel;
  // A whole vector stored at the last pixel, or read at the last narrow one, stays inside the image.
  map.image = ((map.halo + map.height + map.bottom()) * map.row + 2 * kPanel - 1) / kPanel * kPanel;
}

const char* resolve_size(Step& step, const int64_t* field) {
  const Map& in = step.in;
  Map& out = step.out;
  out.height = in.height;
  out.width = in.width;
  switch (step.op) {
    case Op::kConv:
    case Op::kWinograd2:
    case Op::kWinograd4:
    case Op::kDepthwise:
    case Op::kMaxPool:
    case Op::kAvgPool: {
      const int pad_h = static_cast<int>(field[kPadTop] + field[kPadBottom]);
      const int pad_w = static_cast<int>(field[kPadLeft] + field[kPadRight]);
      if (in.height + pad_h < step.dilation_h * (step.kernel_h - 1) + 1 ||
          in.width + pad_w < step.dilation_w * (step.kernel_w - 1) + 1) {
        return "a map is smaller than the kernel that runs over it";
      }
      out.height = window_count(in.height, pad_h, step.kernel_h, step.dilation_h, step.stride_h);
      out.width = window_count(in.width, pad_w, step.kernel_w, step.dilation_w, step.stride_w);
      break;
    }
    case Op::kMeanPool:
      out.height = out.width = 1;
      break;
    case Op::kSubsample:
      out.height = ceil_div(in.height, step.stride_h);
      out.width = ceil_div(in.width, step.stride_w);
      break;
    default:
      break;
  }
  const int tile = step.op == Op::kWinograd4 ? 4 : step.op == Op::kWinograd2 ? 2 : 1;
  step.rows = ceil_div(step.op == Op::kOutput ? in.height : out.height, tile);
  return nullptr;
}

struct Header {
  int64_t version, maps, steps, index_start;
};

}  // namespace

const char* decode(const int64_t* program, int64_t program_size, const float* weights, int64_t weights_size,
                   const Input& input, Plan& plan) {
  Header header;
  if (program_size < 4) return "the program is cut short";
  std::memcpy(&header, program, sizeof(header));
  if (header.version != kVersion) return "the program is of another version of gatedconv";
  if (header.maps < 1 || header.steps < 2 || header.index_start > program_size ||
      header.index_start != 4 + header.maps * kMapFields + header.steps * kStepFields) {
    return "the program is cut short";
  }
  std::vector<Map> maps(header.maps);
  const int64_t* field = program + 4;
  for (Map& map : maps) {
    map.channels = static_cast<int>(field[kChannels]);
    map.pixel = field[kPixel];
    map.halo = static_cast<int>(field[kHalo]);
    map.multiple = static_cast<int>(field[kMultiple]);
    map.slot = static_cast<int>(field[kSlot]);
    if (map.slot < 0 || map.slot >= header.maps) return "a slot is out of range";
    field += kMapFields;
  }
  plan.slot_floats.assign(header.maps, 0);
  for (int64_t i = 0; i < header.steps; ++i, field += kStepFields) {
    const auto number = [&](StepField name) { return static_cast<int>(field[name]); };
    const auto is_map = [&](StepField name) { return field[name] >= 0 && field[name] < header.maps; };
    Step step{};
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
    step.span = number(kSpan);
    step.option = field[kOption];
    if (field[kWeights] < 0 || field[kWeights] > weights_size || field[kBias] < 0 ||
        field[kBias] > weights_size || field[kIndex] < 0 ||
        header.index_start + field[kIndex] > program_size) {
      return "a weight or index is out of range";
    }
    step.weights = weights + field[kWeights];
    step.bias = weights + field[kBias];
    if (field[kIndex] > 0) {  // index lists are stored as size, entries; 0 is no list
      const int64_t* list = program + header.index_start + field[kIndex];
      step.index = list + 1;
      step.index_size = *list;
      if (header.index_start + field[kIndex] + 1 + *list > program_size) return "an index list is cut short";
    }
    if ((step.op != Op::kInput && !is_map(kIn)) || (step.op != Op::kOutput && !is_map(kOut))) {
      return "a map is out of range";
    }
    if (step.op == Op::kInput) {
      step.in.channels = static_cast<int>(input.size[1]);
      step.in.height = static_cast<int>(input.size[2]);
      step.in.width = static_cast<int>(input.size[3]);
      step.source = input.data;
      std::copy(input.stride, input.stride + 4, step.source_stride);
      if (maps[field[kOut]].channels != input.size[1]) return "the input has another number of channels";
    } else {
      step.in = maps[field[kIn]];
    }
    if (step.op != Op::kOutput) step.out = maps[field[kOut]];
    if (is_map(kResidual)) step.residual = maps[field[kResidual]];
    if (const char* error = resolve_size(step, field)) return error;
    if (step.op == Op::kOutput) {
      plan.out_channels = step.in.channels;
      plan.out_height = step.in.height;
      plan.out_width = step.in.width;
      step.out = {};
    } else {
      resolve_strides(step.out);
      maps[field[kOut]] = step.out;
      plan.slot_floats[step.out.slot] = std::max<int64_t>(plan.slot_floats[step.out.slot], step.out.image);
    }
    if (is_map(kResidual)) {
      if (step.residual.height != step.out.height || step.residual.width != step.out.width ||
          step.residual.channels != step.out.channels) {
        return "a residual has another size than what it is added to";
      }
      step.residual.data = const_cast<float*>(weights);  // any non-null pointer: run() places it
    }
    plan.steps.push_back(step);
  }
  // Images lie a whole slot apart in every map, so that one image's maps never reach into another image's.
  for (Step& step : plan.steps) {
    for (Map* map : {&step.in, &step.out, &step.residual}) map->image = plan.slot_floats[map->slot];
  }
  return nullptr;
}

namespace {

int64_t map_bytes(const Map& map) {
  return 4 * (map.halo + map.height + map.bottom()) * map.row;
}

int64_t step_bytes(const Step& step) {
  return map_bytes(step.in) + map_bytes(step.out) + (step.residual.data ? map_bytes(step.residual) : 0);
}

// Images that one step takes together, so that its maps fit the cache and its weights serve as many as they
// can.
int64_t group_of(const Step& step, int64_t most) {
  int64_t group = 1;
  while (group * 2 <= most && group * 2 * step_bytes(step) <= kCacheBytes) group *= 2;
  return group;
}

// Where a chunk of images lies in a workspace, and the steps with their maps placed there.
class Chunk {
 public:
  Chunk(const Plan& plan, float* workspace, int64_t images) : steps_(plan.steps) {
    std::vector<float*> slot(plan.slot_floats.size());
    for (size_t i = 0; i < slot.size(); ++i) {
      slot[i] = workspace;
      workspace += plan.slot_floats[i] * images;
    }
    for (Step& step : steps_) {
      place(step.in, slot);
      place(step.out, slot);
      if (step.residual.data) place(step.residual, slot);
    }
  }

  // The step for the images from `image` on, image `first` of the batch being image 0 of the chunk.
  Step at(size_t index, int64_t first, int64_t image, const Plan& plan, float* output) const {
    Step step = steps_[index];
    step.in.data += image * step.in.image;
    step.out.data += image * step.out.image;
    if (step.residual.data) step.residual.data += image * step.residual.image;
    if (step.source) step.source += (first + image) * step.source_stride[0];
    step.target = output + (first + image) * plan.out_channels * plan.out_height * plan.out_width;
    return step;
  }

 private:
  static void place(Map& map, const std::vector<float*>& slot) {
    map.data = slot[map.slot] + map.halo * (map.row + map.pixel);
  }
  std::vector<Step> steps_;
};

// A run of steps that take the same number of images together.
struct Segment {
  size_t begin, end;
  int64_t group;
};

std::vector<Segment> find_segments(const Plan& plan, int64_t images) {
  std::vector<Segment> segments;
  for (size_t i = 0; i < plan.steps.size(); ++i) {
    const int64_t group = group_of(plan.steps[i], images);
    if (segments.empty() || segments.back().group != group) segments.push_back({i, i, group});
    segments.back().end = i + 1;
  }
  return segments;
}

// How one step is cut into tasks: bands of rows, each in blocks of output channel panels.
struct Split {
  int64_t units;
  int bands, panels, blocks;
  int tasks() const { return bands * blocks; }
  Part part(int task) const {
    const int band = task / blocks, block = task % blocks;
    return {units * band / bands, units * (band + 1) / bands, panels * block / blocks,
            panels * (block + 1) / blocks};
  }
};

bool is_conv(const Step& step) {
  return step.op >= Op::kConv && step.op <= Op::kWinograd4;
}

Split split_step(const Step& step, int64_t images, int workers) {
  const int channels = step.op == Op::kOutput || step.op == Op::kInput ? kPanel : step.out.channels;
  Split split{images * step.rows, 1, ceil_div(channels, kPanel), 1};
  if (workers == 1) return split;
  const int64_t weights =
      is_conv(step) ? static_cast<int64_t>(step.kernel_h) * step.kernel_w * step.span * channels : 0;
  const int64_t maps = images * step_bytes(step) / 4;
  const int tasks = workers;
  const bool by_channels =
      is_conv(step) && split.panels >= workers && (weights > maps || split.units < workers);
  if (by_channels) {
    split.blocks = tasks;
  } else {
    split.bands = static_cast<int>(std::min<int64_t>(split.units, tasks));
  }
  return split;
}

// Tasks of one step, handed to workers: each begins with its own and then helps the others, so that a worker
// that the system has not scheduled holds nobody up but for the one task it may be in.
class TaskQueue {
 public:
  void reset(int tasks) {
    tasks_ = tasks;
    done_.store(0, std::memory_order_relaxed);
    claimed_.store(0, std::memory_order_relaxed);
  }
  int claim(int worker, int workers) {
    for (int i = 0; i < tasks_; ++i) {
      const int task = (tasks_ * worker / workers + i) % tasks_;
      const uint64_t bit = uint64_t{1} << task;
      if (claimed_.load(std::memory_order_relaxed) & bit) continue;
      if (!(claimed_.fetch_or(bit, std::memory_order_relaxed) & bit)) return task;
    }
    return -1;
  }
  void finish() { done_.fetch_add(1, std::memory_order_release); }
  bool done() const { return done_.load(std::memory_order_acquire) == tasks_; }

 private:
  int tasks_ = 0;
  alignas(64) std::atomic<uint64_t> claimed_{0};
  alignas(64) std::atomic<int> done_{0};
};

void pause() {
#if defined(__x86_64__)
  __builtin_ia32_pause();
#endif
}

struct Job {
  const Plan& plan;
  const Kernels& kernels;
  float* output;
  int64_t scratch;  // floats of one worker
};

// One worker, one chunk of images, all steps.
void run_alone(const Job& job, const Chunk& chunk, const std::vector<Segment>& segments, int64_t first,
               int64_t images, float* scratch) {
  for (const Segment& segment : segments) {
    for (int64_t image = 0; image < images; image += segment.group) {
      const int64_t group = std::min(segment.group, images - image);
      for (size_t i = segment.begin; i < segment.end; ++i) {
        const Step step = chunk.at(i, first, image, job.plan, job.output);
        const Split split = split_step(step, group, 1);
        job.kernels.run(step, split.part(0), scratch);
      }
    }
  }
}

// All workers on one chunk, step by step.
void run_together(const Job& job, const Chunk& chunk, const std::vector<Segment>& segments, int64_t first,
                  int64_t images, float* scratch, int workers, const Parallel& parallel) {
  struct Item {
    Step step;
    Split split;
  };
  std::vector<Item> items;
  for (const Segment& segment : segments) {
    for (int64_t image = 0; image < images; image += segment.group) {
      const int64_t group = std::min(segment.group, images - image);
      for (size_t i = segment.begin; i < segment.end; ++i) {
        const Step step = chunk.at(i, first, image, job.plan, job.output);
        items.push_back({step, split_step(step, group, workers)});
      }
    }
  }
  std::unique_ptr<TaskQueue[]> queues(new TaskQueue[items.size()]);
  for (size_t i = 0; i < items.size(); ++i) queues[i].reset(items[i].split.tasks());
  parallel(workers, [&](int worker) {
    float* own = scratch + worker * job.scratch;
    for (size_t i = 0; i < items.size(); ++i) {
      for (int task; (task = queues[i].claim(worker, workers)) >= 0; queues[i].finish()) {
        job.kernels.run(items[i].step, items[i].split.part(task), own);
      }
      while (!queues[i].done()) pause();
    }
  });
}

// How a batch is shared out, and the memory that it takes.
struct Schedule {
  bool alone;          // every worker takes its own images through the whole net; else all share every step
  int64_t share;       // images of one worker, or the whole batch
  int64_t most;        // images in a workspace at a time
  int64_t map_floats;  // of one workspace
  int64_t scratch;     // floats of one worker
  int copies;          // workspaces
  int workers;
  int64_t floats() const { return copies * map_floats + workers * scratch; }
};

Schedule make_schedule(const Plan& plan, const Kernels& kernels, int64_t batch, int workers) {
  Schedule schedule{};
  schedule.workers = std::clamp(workers, 1, 64);
  int64_t image_floats = 0, widest = 0;
  for (const int64_t floats : plan.slot_floats) image_floats += floats;
  for (const Step& step : plan.steps) {
    schedule.scratch = std::max<int64_t>(schedule.scratch, kernels.scratch_floats(step));
    widest = std::max(widest, step_bytes(step));
  }
  schedule.scratch = (schedule.scratch + 2 * kPanel - 1) / kPanel * kPanel;
  schedule.alone = widest <= 2 * kCacheBytes && batch >= schedule.workers;
  schedule.share = schedule.alone ? batch / schedule.workers : batch;
  schedule.most = std::min(schedule.share, kMaxGroup);
  schedule.copies = schedule.alone ? schedule.workers : 1;
  schedule.map_floats = schedule.most * image_floats;
  return schedule;
}

}  // namespace

int64_t workspace_bytes(const Plan& plan, const Kernels& kernels, int64_t batch, int workers) {
  return 4 * make_schedule(plan, kernels, batch, workers).floats();
}

bool run(const Plan& plan, const Kernels& kernels, const Input& input, float* output, int workers,
         const Parallel& parallel) {
  const int64_t batch = input.size[0];
  if (batch == 0) return true;
  const Schedule schedule = make_schedule(plan, kernels, batch, workers);
  Workspace workspace(4 * schedule.floats());
  if (!workspace.data()) return false;
  float* scratch = workspace.data() + schedule.copies * schedule.map_floats;
  const Job job{plan, kernels, output, schedule.scratch};
  const int64_t most = schedule.most;
  int64_t together_from = 0;
  if (schedule.alone) {
    const int64_t chunks = ceil_div(schedule.share, most) * schedule.workers;
    together_from = schedule.share * schedule.workers;
    const std::vector<Segment> segments = find_segments(plan, most);
    std::atomic<int64_t> next{0};
    parallel(schedule.workers, [&](int worker) {
      const Chunk chunk(plan, workspace.data() + worker * schedule.map_floats, most);
      for (int64_t i; (i = next.fetch_add(1)) < chunks;) {
        const int64_t begin = together_from * i / chunks, end = together_from * (i + 1) / chunks;
        run_alone(job, chunk, segments, begin, end - begin, scratch + worker * schedule.scratch);
      }
    });
  }
  if (together_from < batch) {
    const Chunk chunk(plan, workspace.data(), most);
    for (int64_t first = together_from; first < batch; first += most) {
      const int64_t images = std::min(most, batch - first);
      run_together(job, chunk, find_segments(plan, images), first, images, scratch, schedule.workers,
                   parallel);
    }
  }
  return true;
}

const Kernels* choose_kernels(const char** error) {
  const Kernels* known[] = {&kernels_avx512, &kernels_avx2, &kernels_portable};
  __builtin_cpu_init();
  const bool can[] = {
      __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
          __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
          __builtin_cpu_supports("fma"),
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma"),
      true,
  };
  const char* wanted = std::getenv("GATEDCONV_ISA");
  for (int i = 0; i < 3; ++i) {
    if (wanted && *wanted && std::strcmp(wanted, known[i]->name) != 0) continue;
    if (can[i]) return known[i];
  }
  *error = "GATEDCONV_ISA: expected portable, avx2 or avx512, and one that this machine has";
  return nullptr;
}

}  // namespace gatedconv
