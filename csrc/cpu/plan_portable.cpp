// The plan with 4 lanes, for every CPU: the code is that of kernels.h, the tile that of register_tile.h.
#define GATEDCONV_ISA portable
#define GATEDCONV_LANES 4
#include "kernels.h"

namespace gatedconv {
const Kernels kernels_portable = {"portable", portable::kLanes, portable::run, portable::scratch_floats};
}  // namespace gatedconv
