// Weights of the masked convolution over maps, packed into panels of 16 outputs. Independent of PyTorch.
#pragma once

#include <vector>

#include "masked_pack.h"
#include "masked_planes.h"
#include "plan.h"

namespace gatedconv {

// Weights of a filter, and of its Winograd transform.
constexpr int64_t kTaps = 9, kPoints = 36;

inline bool is_winograd(const ConvShape& s) {
  return s.stride_h == 1 && s.stride_w == 1;
}

// Open outputs by their place in a pixel of the map. Closed ones are among them, as -1, where they fill up
// registers that are computed anyway: then nothing has to be moved to its place.
std::vector<int32_t> place_outputs(const ConvShape& s, const OpenOutputs& outputs, int lanes);

// Weights of `inputs` by `outputs` open channels: panels of the direct convolution, then of Winograd's.
int64_t map_weight_floats(int64_t inputs, int64_t outputs);
void pack_map_weights(const ConvShape& s, const ConvTensors<float>& t, const OpenOutputs& outputs,
                      const PlaneKernels& kernels, bool winograd, float* to);

}  // namespace gatedconv
