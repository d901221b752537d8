#define GATEDCONV_ISA avx512
#define GATEDCONV_LANES 16
#include "masked_planes_kernels.h"

namespace gatedconv {
const PlaneKernels plane_kernels_avx512 = {avx512::kLanes, avx512::kMaxOutputs, avx512::run_plane_tile,
                                           avx512::to_planes, avx512::from_planes};
}  // namespace gatedconv
