// The weights of a plan's file: all but those of Winograd's algorithms, which are made when it is opened from
// the direct ones stored after them. They are two to four times as large, and follow from nine numbers a
// filter.
#pragma once

#include <cstdint>
#include <vector>

namespace gatedconv {

// Weights of one step that a file leaves out: floats [begin, end) of all weights.
struct Gap {
  int64_t begin, end;
  int64_t direct;  // where the 3x3 filters begin: [panel][3][3][span][16]
  int64_t panels, span;
  int tile;  // 2 or 4
};

// The gaps of a program in the order of their places; throws FileError where they cannot be those of a file
// with `stored` floats. What else is wrong with the program is found when it is decoded.
std::vector<Gap> find_gaps(const std::vector<int64_t>& program, int64_t stored);

// Makes a gap's weights, as gatedconv/engine/pack.py does, bit for bit.
void fill_gap(const Gap& gap, float* weights);

}  // namespace gatedconv
