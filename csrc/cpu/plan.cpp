// Runs a plan: every worker on images of its own, or all workers on one group of images.
#include "plan.h"

#include <algorithm>
#include <array>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <memory>
#include <thread>

#include "bf16.h"
#include "plan_bands.h"
#include "plan_schedule.h"
#include "worker_pool.h"
#include "workspace.h"

namespace gatedconv {
namespace {

constexpr int64_t kMaxGroup = 8;  // images in a workspace

// A chunk of images in a workspace: the steps with their maps placed there.
class Chunk {
 public:
  Chunk(const Plan& plan, float* workspace, int64_t images)
      : steps_(plan.steps),
        lives_(find_lives(plan)),
        out_floats_(int64_t{plan.out_channels} * plan.out_height * plan.out_width) {
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

  // The step for the images from `image` on, image `first` of the batch being image 0 of the chunk. With a
  // group, maps that live inside of it are those of image `own`.
  Step at(size_t index, int64_t first, int64_t image, float* output, const StepGroup* group = nullptr,
          int64_t own = 0) const {
    Step step = steps_[index];
    Map* maps[] = {&step.in, &step.out, &step.residual, &step.gate};
    for (int i = 0; i < 4; ++i) {
      if (!maps[i]->data) continue;
      maps[i]->data += (group && lives_[index][i].inside(*group) ? own : image) * maps[i]->image;
    }
    if (step.source) step.source += (first + image) * step.source_stride[0];
    step.target = output + (first + image) * out_floats_;
    return step;
  }

 private:
  static void place(Map& map, const std::vector<float*>& slot) {
    map.data = slot[map.slot] + map.halo * (map.row + map.pixel) + map.offset;
  }
  std::vector<Step> steps_;
  std::vector<std::array<Life, 4>> lives_;
  int64_t out_floats_;
};

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

// Steps [begin, end) for some images on one worker; at(i) is step i with its maps in place.
template <typename At>
void run_steps(const Kernels& kernels, size_t begin, size_t end, int64_t images, float* scratch, At at) {
  std::vector<Step> run;
  for (size_t i = begin; i < end; ++i) {
    const Step step = at(i);
    if (run.empty() && !step.out.passes) {
      kernels.run(step, split_step(step, images, 1).part(0), scratch);
      continue;
    }
    run.push_back(step);
    if (step.out.passes) continue;
    run_bands(kernels, run.data(), run.size(), split_step(step, images, 1).part(0), scratch);
    run.clear();
  }
}

// One worker, one chunk of images, all steps.
void run_alone(const Kernels& kernels, const Chunk& chunk, const std::vector<StepGroup>& groups,
               int64_t first, int64_t images, float* output, float* scratch) {
  for (const StepGroup& group : groups) {
    for (int64_t image = 0; image < images; image += group.batch) {
      const int64_t batch = std::min(group.batch, images - image);
      run_steps(kernels, group.begin, group.end, batch, scratch,
                [&](size_t i) { return chunk.at(i, first, image, output); });
    }
  }
}

// How a batch is shared out, and the memory that it takes.
struct Schedule {
  bool alone;          // every worker takes its own images through the whole net; else all share every step
  int64_t share;       // images of one worker, or the whole batch
  int64_t most;        // images in a workspace at a time
  int64_t places;      // images that it has room for: `most`, and one of every worker's own
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
  for (const auto& run : find_runs(plan)) {
    const size_t scratch = run_scratch(kernels, &plan.steps[run.first], run.second - run.first);
    schedule.scratch = std::max<int64_t>(schedule.scratch, scratch);
    widest = std::max(widest, amount_of(plan, run).maps);
  }
  schedule.scratch = (schedule.scratch + 2 * kPanel - 1) / kPanel * kPanel;  // and a panel that nobody uses
  schedule.alone = !together && widest <= 2 * cache_bytes() && batch >= schedule.workers;
  schedule.share = schedule.alone ? batch / schedule.workers : batch;
  schedule.most = std::min(schedule.share, kMaxGroup);
  schedule.copies = schedule.alone ? schedule.workers : 1;
  const bool own = !schedule.alone && schedule.most > 1 && schedule.most >= schedule.workers;
  schedule.places = schedule.most + (own ? schedule.workers : 0);
  schedule.map_floats = schedule.places * image_floats;
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
      attempt([&] { run_chunk(i, worker); });
    }
    if (worker == 0) wait_until([&] { return done_.load(std::memory_order_acquire) == chunks_; });
  }

 private:
  void run_chunk(int64_t i, int worker) {
    const Chunk chunk(plan_, workspace_ + worker * schedule_.map_floats, schedule_.places);
    const int64_t begin = images_ * i / chunks_, end = images_ * (i + 1) / chunks_;
    float* scratch = workspace_ + schedule_.copies * schedule_.map_floats + worker * schedule_.scratch;
    run_alone(kernels_, chunk, group_steps(plan_, schedule_.most), begin, end - begin, output_, scratch);
  }
  const Plan& plan_;  // like the tensors, read inside of tasks only: the caller waits for those
  const Kernels& kernels_;
  const Schedule schedule_;
  float* output_;
  float* workspace_;
  int64_t images_, chunks_;
  std::atomic<int64_t> next_{0}, done_{0};
};

// All workers share the steps of one chunk of images, and the images of step groups that a worker does alone.
class StepWork : public Work {
 public:
  StepWork(const Plan& plan, const Kernels& kernels, const Schedule& schedule, float* output,
           float* workspace, int64_t first, int64_t images, double* seconds)
      : kernels_(kernels),
        schedule_(schedule),
        chunk_(plan, workspace, schedule.places),
        groups_(seconds ? group_steps(plan, images) : group_shared_steps(plan, images, schedule.workers)),
        output_(output),
        scratch_(workspace + schedule.copies * schedule.map_floats),
        first_(first),
        seconds_(seconds) {
    for (const StepGroup& group : groups_) {
      // Images that are left over are shared.
      const int64_t alone = group.alone ? images / schedule.workers * schedule.workers : 0;
      if (alone)
        items_.push_back({{}, {}, {alone, static_cast<int>(alone), 1, 1}, group.begin, 1, false, &group});
      add_steps(plan, group, alone, images);
    }
    queues_.reset(new TaskQueue[items_.size()]);
    for (size_t i = 0; i < items_.size(); ++i) queues_[i].reset(items_[i].split.tasks());
  }
  void work(int worker) override {
    float* scratch = scratch_ + worker * schedule_.scratch;
    auto then = Clock::now();
    for (size_t i = 0; i < items_.size(); i += items_[i].count) {
      for (int task; (task = queues_[i].claim(worker, schedule_.workers)) >= 0; queues_[i].finish()) {
        attempt([&] { run_task(i, task, worker, scratch); });
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
    std::vector<Step> run;  // empty, or steps that are done band by band, `step` last
    Split split;
    size_t index;  // of the step in the plan
    size_t count;  // of items that one worker does in a row: small ones need no barrier in between
    bool small;
    const StepGroup* group;  // null, or steps that a worker takes an image through; tasks are images
  };
  void add_steps(const Plan& plan, const StepGroup& group, int64_t image, int64_t images) {
    for (; image < images; image += group.batch) {
      const int64_t batch = std::min(group.batch, images - image);
      for (size_t i = group.begin; i < group.end; ++i) {
        std::vector<Step> run;
        for (; plan.steps[i].out.passes; ++i) run.push_back(chunk_.at(i, first_, image, output_));
        const Step step = chunk_.at(i, first_, image, output_);
        if (!run.empty()) run.push_back(step);
        const bool small = !seconds_ && run.empty() && is_small(step, batch);
        if (small && !items_.empty() && items_.back().small)
          ++items_[head_].count;
        else
          head_ = items_.size();
        items_.push_back(
            {step, run, split_step(step, batch, small ? 1 : schedule_.workers), i, 1, small, nullptr});
      }
    }
  }
  void run_task(size_t item, int task, int worker, float* scratch) const {
    if (items_[item].group) {
      take_through(*items_[item].group, task, schedule_.most + worker, scratch);
      return;
    }
    for (size_t j = item; j < item + items_[item].count; ++j) {
      const Part part = items_[j].split.part(task);
      std::vector<Step> run = items_[j].run;  // a copy, whose maps are in this worker's scratch
      if (run.empty())
        kernels_.run(items_[j].step, part, scratch);
      else
        run_bands(kernels_, run.data(), run.size(), part, scratch);
    }
  }
  void take_through(const StepGroup& group, int64_t image, int64_t own, float* scratch) const {
    run_steps(kernels_, group.begin, group.end, 1, scratch,
              [&](size_t i) { return chunk_.at(i, first_, image, output_, &group, own); });
  }
  const Kernels& kernels_;
  const Schedule schedule_;
  const Chunk chunk_;
  const std::vector<StepGroup> groups_;
  float* output_;
  float* scratch_;
  int64_t first_;
  double* seconds_;
  std::vector<Item> items_;
  size_t head_ = 0;
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
  const auto finish = [&](const std::shared_ptr<Work>& work) {
    do_work(work, schedule.workers);
    return !work->failed();
  };
  for (int worker = 1; worker <= schedule.workers; ++worker) {
    const int64_t end = 4 * (schedule.copies * schedule.map_floats + worker * schedule.scratch);
    workspace.guard(end - 4 * kPanel, end);
  }
  float* memory = workspace.data();
  int64_t first = 0;
  if (schedule.alone) {
    if (!finish(std::make_shared<ImageWork>(plan, kernels, schedule, output, memory))) return false;
    first = schedule.share * schedule.workers;
  }
  for (; first < batch; first += schedule.most) {
    const int64_t images = std::min(schedule.most, batch - first);
    if (!finish(
            std::make_shared<StepWork>(plan, kernels, schedule, output, memory, first, images, seconds))) {
      return false;
    }
  }
  return true;
}

const char* bf16_name(const Kernels& kernels) {
  const Bf16Kernels* native = kernels.lanes == kPanel ? native_bf16() : nullptr;
  return native ? native->name : "emulated";
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
    // The names of instructions for bfloat16 are those of more than AVX-512.
    const bool named = !wanted || !*wanted || std::strcmp(wanted, choice.kernels->name) == 0 ||
                       (std::strcmp(choice.kernels->name, "avx512") == 0 && native_bf16());
    if (named && choice.runs) return choice.kernels;
  }
  *error =
      "GATEDCONV_ISA: expected portable, avx2, avx512, avx512_bf16 or amx, and one that this machine has";
  return nullptr;
}

}  // namespace gatedconv
