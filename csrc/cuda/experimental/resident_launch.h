// Launches of the resident driver. Each number format is compiled by itself (resident_*.cu).
#pragma once

#include <cuda_runtime.h>

#include "cuda/experimental/resident.h"

namespace gatedconv {

// A block, or a cluster of args.ranks blocks, for each image; more than one rank needs compute
// capability 9.0, bf16 and tf32 need 8.0.
template <class Math>
cudaError_t launch_resident(const ResidentArgs& args, int64_t images, cudaStream_t stream);

}  // namespace gatedconv
