#define GATEDCONV_ISA portable
#define GATEDCONV_LANES 4
#include "masked_planes_kernels.h"

namespace gatedconv {
const PlaneKernels plane_kernels_portable = {portable::kLanes, portable::kMaxOutputs,
                                             portable::run_plane_tile, portable::to_planes,
                                             portable::from_planes};
}  // namespace gatedconv
