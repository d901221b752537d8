#define GATEDCONV_ISA avx2
#define GATEDCONV_LANES 8
#include "masked_planes_kernels.h"

namespace gatedconv {
const PlaneKernels plane_kernels_avx2 = avx2::plane_kernels();
}  // namespace gatedconv
