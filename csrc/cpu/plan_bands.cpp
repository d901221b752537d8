#include "plan_bands.h"

#include <algorithm>
#include <array>
#include <cassert>
#include <cstring>

#include "plan_schedule.h"

namespace gatedconv {
namespace {

// Whether a row of the output is made of the rows of the input under a window.
bool is_local(const Step& step) {
  const bool pixel = step.kernel_h == 1 && step.stride_h == 1 && step.pad_top == 0;
  return step.op == Op::kConv || step.op == Op::kDepthwise || step.op == Op::kMaxPool ||
         step.op == Op::kAvgPool || (step.op == Op::kLayerNorm && pixel);
}

int64_t rows_below(const Step& step, int64_t rows) {
  return (rows - 1) * step.stride_h + int64_t{step.dilation_h} * (step.kernel_h - 1) + 1;
}

// The first row of the input under a row of the output, maybe in the border.
int64_t first_below(const Step& step, int64_t row) {
  return std::clamp<int64_t>(row * step.stride_h - step.pad_top, -step.in.halo, step.in.height - 1);
}

// One more than the last row of the input, without its border, under the rows in front of `end`.
int64_t end_below(const Step& step, int64_t end) {
  return std::clamp<int64_t>(rows_below(step, end) - step.pad_top, 1, step.in.height);
}

// Calls take(k, rows) for the map behind step k: the rows that it has room for where `band` rows of the last
// step are made at a time. A band needs the rows under its windows, and makes those between the windows,
// too. With twice as many rows, those that the next band reads again are moved to the front half as often.
template <typename Take>
void for_rooms(const Step* steps, size_t count, int64_t band, Take take) {
  for (size_t k = count - 1; k-- > 0;) {
    const Map& map = steps[k].out;
    const Step& reader = steps[k + 1];
    band = std::min<int64_t>(std::max(rows_below(reader, band), band * reader.stride_h), map.height);
    take(k, std::min<int64_t>(2 * band, map.height) + 2 * map.halo + map.bottom());
  }
}

int64_t room_floats(const Step* steps, size_t count, int64_t band) {
  int64_t floats = 0;
  for_rooms(steps, count, band, [&](size_t k, int64_t rows) { floats += rows * steps[k].out.row + kPanel; });
  return floats;
}

// Rows of the last step that are made at a time: with few, kernels are called for little work; with many, the
// rows between the steps do not stay in the cache.
int64_t band_rows(const Step* steps, size_t count) {
  int64_t band = 1;
  while (!kFuzzing && 2 * band <= steps[count - 1].rows &&
         4 * room_floats(steps, count, 2 * band) <= cache_bytes() / 2)
    band *= 2;
  return band;
}

size_t kernel_scratch(const Kernels& kernels, const Step* steps, size_t count) {
  size_t floats = 0;
  for (size_t k = 0; k < count; ++k) floats = std::max(floats, kernels.scratch_floats(steps[k]));
  return (floats + kPanel - 1) / kPanel * kPanel;
}

// Rows of the map from one step to the next: room for some from `base` on; those in front of `made` are
// written.
struct Rows {
  float* at;
  int64_t room, base, made;

  void place(Step& writer, Step& reader) const {
    Map& map = writer.out;
    map.data = at + (-base * map.row + map.halo * map.pixel);
    map.image = 0;
    reader.in = map;
  }

  // Makes room for the rows in front of `end`; what is in front of `needed` is not read any more.
  void make_room(int64_t end, int64_t needed, Step& writer, Step& reader) {
    const Map& map = writer.out;
    const int64_t last = end == map.height ? end + map.bottom() : end;
    if (last - base <= room) return;
    needed = std::min(needed, made);  // a stride may leave out rows
    std::memmove(at, at + (needed - base) * map.row, 4 * (made - needed) * map.row);
    base = needed;
    assert(last - base <= room);
    place(writer, reader);
  }
};

// Rows [first, end) of the last step, of one image.
void run_image(const Kernels& kernels, Step* steps, std::vector<Rows>& between, int64_t image, int64_t first,
               int64_t end, int64_t band, float* scratch) {
  const size_t last = between.size();
  const auto panels = [](const Step& step) { return (step.out.channels + kPanel - 1) / kPanel; };
  int64_t start = first;
  for (size_t k = last; k-- > 0;) {
    start = first_below(steps[k + 1], start);
    between[k].base = start <= 0 ? -steps[k].out.halo : start;
    between[k].made = start = std::max<int64_t>(start, 0);
    between[k].place(steps[k], steps[k + 1]);
  }
  std::vector<int64_t> stop(last + 1);
  for (int64_t done = first; done < end; done = stop[last]) {
    stop[last] = std::min(done + band, end);
    for (size_t k = last; k-- > 0;) stop[k] = end_below(steps[k + 1], stop[k + 1]);
    for (size_t k = 0; k < last; ++k) {
      Rows& rows = between[k];
      if (stop[k] <= rows.made) continue;
      const int64_t read = k + 1 < last ? between[k + 1].made : done;
      rows.make_room(stop[k], first_below(steps[k + 1], read), steps[k], steps[k + 1]);
      const int64_t unit = image * steps[k].rows;
      kernels.run(steps[k], {unit + rows.made, unit + stop[k], 0, panels(steps[k])}, scratch);
      rows.made = stop[k];
    }
    const int64_t unit = image * steps[last].rows;
    kernels.run(steps[last], {unit + done, unit + stop[last], 0, panels(steps[last])}, scratch);
  }
}

// Whether the last step of a run writes where an earlier one still reads.
bool overlaps(const Plan& plan, size_t begin, size_t last) {
  const int slot = plan.steps[last].out.slot;
  for (size_t i = begin; i <= last; ++i) {
    const Step& step = plan.steps[i];
    for (const Map* map : {&step.in, &step.residual, &step.gate}) {
      if (map->exists() && !map->passes && map->slot == slot) return true;
    }
  }
  return false;
}

// Whether two maps have the same layout: a damaged program may read a slot as another map than was written
// last.
bool is_alike(const Map& a, const Map& b) {
  return a.channels == b.channels && a.height == b.height && a.width == b.width && a.halo == b.halo &&
         a.multiple == b.multiple && a.pixel == b.pixel && a.offset == b.offset;
}

// Whether the map behind step i is read by the next step alone, and as its input alone.
bool is_private(const Plan& plan, const std::vector<std::array<Life, 4>>& lives, size_t i) {
  const Step& reader = plan.steps[i + 1];
  const auto reads = [&](const Map& map, size_t k) { return map.exists() && lives[i + 1][k].begin == i; };
  return !plan.slot_parts[plan.steps[i].out.slot] && lives[i][1].end == i + 1 && reads(reader.in, 0) &&
         is_alike(plan.steps[i].out, reader.in) && !reads(reader.residual, 2) && !reads(reader.gate, 3);
}

}  // namespace

std::vector<std::pair<size_t, size_t>> find_runs(const Plan& plan) {
  std::vector<std::pair<size_t, size_t>> runs;
  for (size_t i = 0; i < plan.steps.size(); ++i) {
    if (i > 0 && plan.steps[i - 1].out.passes)
      runs.back().second = i + 1;
    else
      runs.push_back({i, i + 1});
  }
  return runs;
}

void size_slots(Plan& plan) {
  std::fill(plan.slot_floats.begin(), plan.slot_floats.end(), 0);
  // Maps that are read count, too: a damaged program may read a slot as a larger map than was written there.
  for (const Step& step : plan.steps) {
    for (const Map* map : {&step.in, &step.out, &step.residual, &step.gate}) {
      if (!map->exists() || map->passes) continue;
      // A vector read at the last, narrow pixel stays inside the image.
      const int64_t floats = map_bytes(*map) / 4 + kPanel;
      int64_t& slot = plan.slot_floats[map->slot];
      slot = std::max(slot, (floats + kPanel - 1) / kPanel * kPanel);
    }
  }
  for (Step& step : plan.steps) {
    for (Map* map : {&step.in, &step.out, &step.residual, &step.gate}) {
      map->image = plan.slot_floats[map->slot];
    }
  }
}

void mark_passing(Plan& plan, int64_t bytes) {
  const std::vector<std::array<Life, 4>> lives = find_lives(plan);
  const auto join = [&](size_t i, bool passes) {
    plan.steps[i].out.passes = plan.steps[i + 1].in.passes = passes;
  };
  for (size_t i = 0; i + 1 < plan.steps.size(); ++i) join(i, false);
  for (size_t begin = 0, last; begin + 1 < plan.steps.size(); begin = last + 1) {
    for (last = begin; last + 1 < plan.steps.size(); ++last) {
      const Step* steps = &plan.steps[begin];
      const Map& map = plan.steps[last].out;
      if (!is_local(plan.steps[last]) || !is_local(plan.steps[last + 1]) || map_bytes(map) <= bytes ||
          !is_private(plan, lives, last) || 4 * room_floats(steps, last + 2 - begin, 1) > cache_bytes() / 2 ||
          amount_of(plan, {begin, last + 2}).weights > cache_bytes() / 2)
        break;
      join(last, true);
    }
    while (last > begin && overlaps(plan, begin, last)) join(--last, false);
  }
  size_slots(plan);
}

size_t run_scratch(const Kernels& kernels, const Step* steps, size_t count) {
  return kernel_scratch(kernels, steps, count) +
         (count > 1 ? room_floats(steps, count, band_rows(steps, count)) : 0);
}

void run_bands(const Kernels& kernels, Step* steps, size_t count, const Part& part, float* scratch) {
  if (count == 1) return kernels.run(*steps, part, scratch);
  const int64_t band = band_rows(steps, count);
  std::vector<Rows> between(count - 1);
  float* room = scratch + kernel_scratch(kernels, steps, count);
  for_rooms(steps, count, band, [&](size_t k, int64_t rows) {
    between[k] = {room, rows, 0, 0};
    room += rows * steps[k].out.row + kPanel;
  });
  const int64_t rows = steps[count - 1].rows;
  for (int64_t unit = part.unit0; unit < part.unit1;) {
    const int64_t image = unit / rows, end = std::min((image + 1) * rows, part.unit1);
    run_image(kernels, steps, between, image, unit - image * rows, end - image * rows, band, scratch);
    unit = end;
  }
}

}  // namespace gatedconv
