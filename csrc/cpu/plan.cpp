// Runs a plan: every worker on images of its own, or all workers on one group of images.
#include "plan.h"

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>

#include "worker_pool.h"
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

int64_t map_bytes(const Map& map) {
  return 4 * (map.halo + map.height + map.bottom()) * map.row;
}

int64_t step_bytes(const Step& step) {
  return map_bytes(step.in) + map_bytes(step.out) + (step.residual.exists() ? map_bytes(step.residual) : 0);
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
      if (step.residual.exists()) place(step.residual, slot);
      if (step.gate.exists()) place(step.gate, slot);
    }
  }

  // The step for the images from `image` on, image `first` of the batch being image 0 of the chunk.
  Step at(size_t index, int64_t first, int64_t image, const Plan& plan, float* output) const {
    Step step = steps_[index];
    step.in.data += image * step.in.image;
    step.out.data += image * step.out.image;
    if (step.residual.exists()) step.residual.data += image * step.residual.image;
    if (step.gate.exists()) step.gate.data += image * step.gate.image;
    if (step.source) step.source += (first + image) * step.source_stride[0];
    step.target = output + (first + image) * plan.out_channels * plan.out_height * plan.out_width;
    return step;
  }

 private:
  static void place(Map& map, const std::vector<float*>& slot) {
    map.data = slot[map.slot] + map.halo * (map.row + map.pixel) + map.offset;
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
  const bool by_channels = (is_conv(step) || step.op == Op::kMeanPool) && split.panels >= workers &&
                           (weights > maps || split.units < workers);
  if (by_channels) {
    split.blocks = tasks;
  } else {
    split.bands = static_cast<int>(std::min<int64_t>(split.units, tasks));
  }
  return split;
}

// Whether one core does a step in about the time that two take to meet after it: below 4 us at 40
// multiply-adds and 25 bytes a nanosecond, so that 2 us are lost at most where the other core is free at
// once. The rates and the limit are assumed, not tuned.
bool is_small(const Step& step, int64_t images) {
  const int64_t area = int64_t{step.out.height} * step.out.width;
  const int64_t taps =
      is_conv(step) || step.op == Op::kDepthwise ? int64_t{step.kernel_h} * step.kernel_w : 1;
  const int64_t reads = taps * (is_conv(step) ? step.span : 1);
  const int64_t weights = is_conv(step) ? reads * step.out.channels : 0;
  const int64_t macs = images * area * step.out.channels * reads;
  return macs / 40 + 4 * (weights + images * step_bytes(step) / 4) / 25 < 4000;
}

// Tasks of one step for the workers: each begins with its own and then helps the others, so that a worker
// that the system has not scheduled delays only the task it may be in.
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

// Spins briefly, then yields the core between the checks.
template <typename Condition>
void wait_until(Condition condition) {
  for (int spins = 0; !condition(); ++spins) {
    if (spins > 1000) std::this_thread::yield();
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
  }
}

// One worker, one chunk of images, all steps.
void run_alone(const Kernels& kernels, const Plan& plan, const Chunk& chunk,
               const std::vector<Segment>& segments, int64_t first, int64_t images, float* output,
               float* scratch) {
  for (const Segment& segment : segments) {
    for (int64_t image = 0; image < images; image += segment.group) {
      const int64_t group = std::min(segment.group, images - image);
      for (size_t i = segment.begin; i < segment.end; ++i) {
        const Step step = chunk.at(i, first, image, plan, output);
        kernels.run(step, split_step(step, group, 1).part(0), scratch);
      }
    }
  }
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

Schedule make_schedule(const Plan& plan, const Kernels& kernels, int64_t batch, int workers,
                       bool together = false) {
  Schedule schedule{};
  schedule.workers = std::clamp(workers, 1, 64);
  int64_t image_floats = 0, widest = 0;
  for (const int64_t floats : plan.slot_floats) image_floats += floats;
  for (const Step& step : plan.steps) {
    schedule.scratch = std::max<int64_t>(schedule.scratch, kernels.scratch_floats(step));
    widest = std::max(widest, step_bytes(step));
  }
  schedule.scratch = (schedule.scratch + 2 * kPanel - 1) / kPanel * kPanel;
  schedule.alone = !together && widest <= 2 * kCacheBytes && batch >= schedule.workers;
  schedule.share = schedule.alone ? batch / schedule.workers : batch;
  schedule.most = std::min(schedule.share, kMaxGroup);
  schedule.copies = schedule.alone ? schedule.workers : 1;
  schedule.map_floats = schedule.most * image_floats;
  return schedule;
}

// Every worker takes chunks of images through the whole net, each in its own workspace.
class ImageWork : public Work {
 public:
  ImageWork(const Plan& plan, const Kernels& kernels, const Schedule& schedule, float* output,
            float* workspace)
      : plan_(plan), kernels_(kernels), schedule_(schedule), output_(output), workspace_(workspace) {
    images_ = schedule.share * schedule.workers;
    chunks_ = ceil_div(schedule.share, schedule.most) * schedule.workers;
  }
  void work(int worker) override {
    for (int64_t i; (i = next_.fetch_add(1)) < chunks_; done_.fetch_add(1, std::memory_order_release)) {
      const Chunk chunk(plan_, workspace_ + worker * schedule_.map_floats, schedule_.most);
      const int64_t begin = images_ * i / chunks_, end = images_ * (i + 1) / chunks_;
      float* scratch = workspace_ + schedule_.copies * schedule_.map_floats + worker * schedule_.scratch;
      run_alone(kernels_, plan_, chunk, find_segments(plan_, schedule_.most), begin, end - begin, output_,
                scratch);
    }
    if (worker == 0) wait_until([&] { return done_.load(std::memory_order_acquire) == chunks_; });
  }

 private:
  const Plan& plan_;  // like the tensors, read inside of tasks only: the caller waits for those
  const Kernels& kernels_;
  const Schedule schedule_;
  float* output_;
  float* workspace_;
  int64_t images_, chunks_;
  std::atomic<int64_t> next_{0}, done_{0};
};

// All workers share every step of one chunk of images.
class StepWork : public Work {
 public:
  StepWork(const Plan& plan, const Kernels& kernels, const Schedule& schedule, float* output,
           float* workspace, int64_t first, int64_t images, double* seconds)
      : kernels_(kernels),
        schedule_(schedule),
        scratch_(workspace + schedule.copies * schedule.map_floats),
        seconds_(seconds) {
    const Chunk chunk(plan, workspace, schedule.most);
    size_t head = 0;
    for (const Segment& segment : find_segments(plan, images)) {
      for (int64_t image = 0; image < images; image += segment.group) {
        const int64_t group = std::min(segment.group, images - image);
        for (size_t i = segment.begin; i < segment.end; ++i) {
          const Step step = chunk.at(i, first, image, plan, output);
          const bool small = !seconds && is_small(step, group);
          if (small && !items_.empty() && items_.back().small)
            ++items_[head].count;
          else
            head = items_.size();
          items_.push_back({step, split_step(step, group, small ? 1 : schedule.workers), i, 1, small});
        }
      }
    }
    queues_.reset(new TaskQueue[items_.size()]);
    for (size_t i = 0; i < items_.size(); ++i) queues_[i].reset(items_[i].split.tasks());
  }
  void work(int worker) override {
    float* scratch = scratch_ + worker * schedule_.scratch;
    auto then = Clock::now();
    for (size_t i = 0; i < items_.size(); i += items_[i].count) {
      for (int task; (task = queues_[i].claim(worker, schedule_.workers)) >= 0; queues_[i].finish()) {
        for (size_t j = i; j < i + items_[i].count; ++j) {
          kernels_.run(items_[j].step, items_[j].split.part(task), scratch);
        }
      }
      wait_until([&] { return queues_[i].done(); });
      if (seconds_ && worker == 0) {
        const auto now = Clock::now();
        seconds_[items_[i].index] += std::chrono::duration<double>(now - then).count();
        then = now;
      }
    }
  }

 private:
  using Clock = std::chrono::steady_clock;
  struct Item {
    Step step;
    Split split;
    size_t index;  // of the step in the plan
    size_t count;  // of items that one worker does in a row: small ones need not meet in between
    bool small;
  };
  const Kernels& kernels_;
  const Schedule schedule_;
  float* scratch_;
  double* seconds_;
  std::vector<Item> items_;
  std::unique_ptr<TaskQueue[]> queues_;
};

}  // namespace

int64_t workspace_bytes(const Plan& plan, const Kernels& kernels, int64_t batch, int workers) {
  return 4 * make_schedule(plan, kernels, batch, workers).floats();
}

bool run(const Plan& plan, const Kernels& kernels, const Input& input, float* output, int workers,
         double* seconds) {
  const int64_t batch = input.size[0];
  if (batch == 0) return true;
  const Schedule schedule = make_schedule(plan, kernels, batch, workers, seconds != nullptr);
  const Workspace workspace(4 * schedule.floats());
  if (!workspace.data()) return false;
  int64_t first = 0;
  if (schedule.alone) {
    do_work(std::make_shared<ImageWork>(plan, kernels, schedule, output, workspace.data()), schedule.workers);
    first = schedule.share * schedule.workers;
  }
  for (; first < batch; first += schedule.most) {
    const int64_t images = std::min(schedule.most, batch - first);
    do_work(
        std::make_shared<StepWork>(plan, kernels, schedule, output, workspace.data(), first, images, seconds),
        schedule.workers);
  }
  return true;
}

const Kernels* choose_kernels(const char** error) {
  struct Choice {
    const Kernels* kernels;
    bool runs;
  };
#if defined(__x86_64__)
  __builtin_cpu_init();
  const bool avx2 = __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma");
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  const Choice choices[] = {{&kernels_avx512, avx512}, {&kernels_avx2, avx2}, {&kernels_portable, true}};
#else
  const Choice choices[] = {{&kernels_portable, true}};
#endif
  const char* wanted = std::getenv("GATEDCONV_ISA");
  for (const Choice& choice : choices) {
    const bool named = !wanted || !*wanted || std::strcmp(wanted, choice.kernels->name) == 0;
    if (named && choice.runs) return choice.kernels;
  }
  *error = "GATEDCONV_ISA: expected portable, avx2 or avx512, and one that this machine has";
  return nullptr;
}

}  // namespace gatedconv
