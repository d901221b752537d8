// The plan with 16 lanes: the code is that of kernels.h, the tile that of register_tile.h.
#if defined(__x86_64__)
#define GATEDCONV_ISA avx512
#define GATEDCONV_LANES 16
#include "kernels.h"

namespace gatedconv {
const Kernels kernels_avx512 = {"avx512", avx512::kLanes, avx512::run, avx512::scratch_floats};
}  // namespace gatedconv
#endif
