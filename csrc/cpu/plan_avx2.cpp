// The plan with 8 lanes: the code is that of kernels.h, the tile that of register_tile.h.
#if defined(__x86_64__)
#define GATEDCONV_ISA avx2
#define GATEDCONV_LANES 8
#include "kernels.h"

namespace gatedconv {
const Kernels kernels_avx2 = {"avx2", avx2::kLanes, avx2::run, avx2::scratch_floats};
}  // namespace gatedconv
#endif
