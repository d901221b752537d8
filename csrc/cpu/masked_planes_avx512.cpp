#define GATEDCONV_ISA avx512
#define GATEDCONV_LANES 16
#include "masked_planes_kernels.h"

namespace gatedconv {
const PlaneKernels plane_kernels_avx512 = avx512::plane_kernels();
}  // namespace gatedconv
