// Decides how the work of a run is shared out: which steps take how many images together, who does them, and
// which maps they need of their own.
#pragma once

#include <array>
#include <utility>
#include <vector>

#include "plan.h"

namespace gatedconv {

// Bytes of feature maps that should stay in a core's own cache while a step runs.
int64_t cache_bytes();

// Bytes of one image's map, of which only a few rows exist if it passes from a step to the next.
int64_t map_bytes(const Map& map);

// Bytes of the maps of one image that a step reads and writes.
int64_t step_bytes(const Step& step);

// The same and the bytes of weights, of some steps together.
struct Amount {
  int64_t maps, weights;
};

Amount amount_of(const Plan& plan, std::pair<size_t, size_t> steps);

// Consecutive steps that take the same number of images at a time.
struct StepGroup {
  size_t begin, end;
  int64_t batch;  // images that a step takes together
  bool alone;     // a worker takes an image through all steps; else all workers share every step
};

// The groups for images that one worker has to itself.
std::vector<StepGroup> group_steps(const Plan& plan, int64_t images);

// The groups for images that some workers share.
std::vector<StepGroup> group_shared_steps(const Plan& plan, int64_t images, int workers);

// From the step that writes a map to the last one that reads it.
struct Life {
  size_t begin, end;
  bool inside(const StepGroup& group) const { return begin >= group.begin && end < group.end; }
};

// The lives of the maps `in`, `out`, `residual` and `gate` of every step.
std::vector<std::array<Life, 4>> find_lives(const Plan& plan);

// How one step, or a run that ends with it, is cut into tasks: bands of rows, each in blocks of output
// channel panels.
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

Split split_step(const Step& step, int64_t images, int workers);

// Whether one core does a step in about the time that a barrier of two takes.
bool is_small(const Step& step, int64_t images);

}  // namespace gatedconv
