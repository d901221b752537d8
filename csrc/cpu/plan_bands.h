// Depth-first runs: steps in a row, each of which alone reads what the one in front has made, done band by
// band of rows. Of the maps between them only the rows in use exist, in a worker's own memory, and so they
// stay in its cache, where whole maps, such as the expanded ones of inverted residuals, would not.
#pragma once

#include <utility>
#include <vector>

#include "plan.h"

namespace gatedconv {

// Gives every slot the floats of its largest map; one that passes takes none. Images are a whole slot apart
// in every map, so that one image's maps never reach into another image's.
void size_slots(Plan& plan);

// Marks the maps of more than `bytes` that can be done so (Map::passes), and no others, and sizes the slots.
void mark_passing(Plan& plan, int64_t bytes);

// All steps of a plan as runs [begin, end), most of them of one step.
std::vector<std::pair<size_t, size_t>> find_runs(const Plan& plan);

// Floats of scratch that a run of `count` steps needs.
size_t run_scratch(const Kernels& kernels, const Step* steps, size_t count);

// Does a run of `count` steps for a part of the rows of its last one.
void run_bands(const Kernels& kernels, Step* steps, size_t count, const Part& part, float* scratch);

}  // namespace gatedconv
