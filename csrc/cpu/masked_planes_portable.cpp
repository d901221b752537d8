#define GATEDCONV_ISA portable
#define GATEDCONV_LANES 4
#include "masked_planes_kernels.h"

namespace gatedconv {
const PlaneKernels plane_kernels_portable = portable::plane_kernels();
}  // namespace gatedconv
