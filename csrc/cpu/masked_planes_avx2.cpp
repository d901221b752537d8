#define GATEDCONV_ISA avx2
#define GATEDCONV_LANES 8
#include "masked_planes_kernels.h"

namespace gatedconv {
const PlaneKernels plane_kernels_avx2 = {avx2::kLanes, avx2::kMaxOutputs, avx2::run_plane_tile,
                                         avx2::to_planes, avx2::from_planes};
}  // namespace gatedconv
