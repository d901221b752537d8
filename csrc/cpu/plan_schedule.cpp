#include "plan_schedule.h"

#include <unistd.h>

#include <algorithm>
#include <limits>

#include "plan_bands.h"

namespace gatedconv {
namespace {

bool is_conv(const Step& step) {
  return step.op >= Op::kConv && step.op <= Op::kWinograd4;
}

int64_t weight_bytes(const Step& step) {
  if (!is_conv(step)) return 0;
  const int side = step.op == Op::kWinograd4 ? 6 : step.op == Op::kWinograd2 ? 4 : 0;
  const int64_t taps = side ? side * side : int64_t{step.kernel_h} * step.kernel_w;
  return (in_bf16(step) ? 2 : 4) * taps * step.span * step.out.channels;
}

// Images that a run takes together: as many as fit the cache, and more while its weights are more than its
// maps, because every such batch has the weights come from memory once.
int64_t batch_of(const Amount& amount, int64_t most) {
  int64_t batch = 1;
  while (batch * 2 <= most &&
         (batch * 2 * amount.maps <= cache_bytes() || batch * amount.maps < amount.weights)) {
    batch *= 2;
  }
  return batch;
}

}  // namespace

int64_t cache_bytes() {
#if defined(_SC_LEVEL2_CACHE_SIZE)
  static const int64_t found = sysconf(_SC_LEVEL2_CACHE_SIZE);
#else
  static const int64_t found = 0;
#endif
  return std::clamp<int64_t>(found, 512 * 1024, 2048 * 1024) / 4 * 3;
}

int64_t map_bytes(const Map& map) {
  return map.passes ? 0 : 4 * (map.halo + map.height + map.bottom()) * map.row;
}

int64_t step_bytes(const Step& step) {
  return map_bytes(step.in) + map_bytes(step.out) + (step.residual.exists() ? map_bytes(step.residual) : 0);
}

Amount amount_of(const Plan& plan, std::pair<size_t, size_t> steps) {
  Amount amount{};
  for (size_t i = steps.first; i < steps.second; ++i) {
    amount.maps += step_bytes(plan.steps[i]);
    amount.weights += weight_bytes(plan.steps[i]);
  }
  return amount;
}

std::vector<StepGroup> group_steps(const Plan& plan, int64_t images) {
  std::vector<StepGroup> groups;
  for (const auto& run : find_runs(plan)) {
    const int64_t batch = batch_of(amount_of(plan, run), images);
    if (groups.empty() || groups.back().batch != batch) groups.push_back({run.first, 0, batch, false});
    groups.back().end = run.second;
  }
  return groups;
}

// Alone, an image's maps stay in one cache, but every image has the weights come from memory; together, the
// images share the weights, but their maps do not stay. The schedule with the fewest bytes for an image,
// where a change between the two costs the current map and a barrier.
std::vector<StepGroup> group_shared_steps(const Plan& plan, int64_t images, int workers) {
  if (images == 1 || images < workers) return group_steps(plan, images);
  constexpr int64_t kMeeting = 32 * 1024;  // bytes read in the 1.3 us that a barrier takes, as assumed below
  const auto runs = find_runs(plan);
  std::array<int64_t, 2> bytes{};  // of the best schedule that ends together, and that ends alone
  std::vector<std::array<bool, 2>> before(runs.size());  // whether the run in front is alone in that schedule
  for (size_t i = 0; i < runs.size(); ++i) {
    const auto [maps, weights] = amount_of(plan, runs[i]);
    const int64_t change = map_bytes(plan.steps[runs[i].first].in) + kMeeting;
    const int64_t own[2] = {images * maps <= workers * cache_bytes() ? kMeeting / images : maps,
                            weights + std::max<int64_t>(maps - cache_bytes(), 0)};
    std::array<int64_t, 2> next;
    for (const bool alone : {false, true}) {
      before[i][alone] = bytes[true] + (alone ? 0 : change) < bytes[false] + (alone ? change : 0);
      next[alone] = own[alone] + bytes[before[i][alone]] + (before[i][alone] != alone ? change : 0);
    }
    bytes = next;
  }
  std::vector<StepGroup> groups;
  bool alone = bytes[true] < bytes[false];
  for (size_t i = runs.size(); i-- > 0; alone = before[i][alone]) {
    if (groups.empty() || groups.back().alone != alone) {
      groups.push_back({0, runs[i].second, alone ? 1 : images, alone});
    }
    groups.back().begin = runs[i].first;
  }
  std::reverse(groups.begin(), groups.end());
  return groups;
}

std::vector<std::array<Life, 4>> find_lives(const Plan& plan) {
  constexpr size_t never = std::numeric_limits<size_t>::max();
  std::vector<Life> lives(plan.slot_floats.size(),
                          {0, never});  // of maps that are read before they are written
  std::vector<size_t> current(plan.slot_floats.size());
  for (size_t slot = 0; slot < current.size(); ++slot) current[slot] = slot;
  std::vector<std::array<size_t, 4>> found(plan.steps.size());
  for (size_t i = 0; i < plan.steps.size(); ++i) {
    const Step& step = plan.steps[i];
    const auto read = [&](const Map& map) {
      const size_t life = current[map.slot];
      if (map.exists() && lives[life].end != never) lives[life].end = i;
      return life;
    };
    found[i] = {read(step.in), 0, read(step.residual), read(step.gate)};
    if (!plan.slot_parts[step.out.slot]) {  // maps that hold parts of each other live on
      current[step.out.slot] = lives.size();
      lives.push_back({i, i});
    }
    found[i][1] = current[step.out.slot];
  }
  std::vector<std::array<Life, 4>> result(found.size());
  for (size_t i = 0; i < found.size(); ++i) {
    for (size_t k = 0; k < 4; ++k) result[i][k] = lives[found[i][k]];
  }
  return result;
}

Split split_step(const Step& step, int64_t images, int workers) {
  const int channels = step.op == Op::kOutput || step.op == Op::kInput ? kPanel : step.out.channels;
  Split split{images * step.rows, 1, static_cast<int>(ceil_div(channels, kPanel)), 1};
  if (workers == 1) return split;
  const bool by_channels = !step.in.passes && (is_conv(step) || step.op == Op::kMeanPool) &&
                           split.panels >= workers &&
                           (weight_bytes(step) > images * step_bytes(step) || split.units < workers);
  if (by_channels) {
    split.blocks = workers;
  } else {
    split.bands = static_cast<int>(std::min<int64_t>(split.units, workers));
  }
  return split;
}

// Below 4 us at 40 multiply-adds and 25 bytes a nanosecond, so that 2 us are lost at most where the other
// core is free at once. The rates and the limit are assumed, not tuned.
bool is_small(const Step& step, int64_t images) {
  const int64_t area = int64_t{step.out.height} * step.out.width;
  const int64_t taps =
      is_conv(step) || step.op == Op::kDepthwise ? int64_t{step.kernel_h} * step.kernel_w : 1;
  const int64_t reads = taps * (is_conv(step) ? step.span : 1);
  const int64_t weights = is_conv(step) ? reads * step.out.channels : 0;
  const int64_t macs = images * area * step.out.channels * reads;
  return macs / 40 + 4 * (weights + images * step_bytes(step) / 4) / 25 < 4000;
}

}  // namespace gatedconv
