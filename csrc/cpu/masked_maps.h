// The masked convolution over maps: a pixel holds an image's open channels side by side, a register holds
// output channels. For 3x3 filters: Winograd F(4x4) with stride 1, direct with any other. Independent of
// PyTorch.
#pragma once

#include "map_weights.h"
#include "masked_pack.h"
#include "masked_planes.h"
#include "plan.h"

namespace gatedconv {

// Whether maps can hold this convolution at all, whatever its stride, dilation and image.
bool can_use_maps(const ConvShape& s, int64_t inputs, int64_t outputs);

// Whether they are faster than planes for it; `kept`: its weights are packed already.
bool prefer_maps(const ConvShape& s, int64_t inputs, int64_t outputs, int lanes, bool kept);

// Runs a whole convolution; `weights` is what pack_map_weights wrote, or null for packing them here.
void masked_conv2d_maps(const ConvShape& s, const ConvTensors<float>& t, const OpenOutputs& outputs,
                        const Kernels& kernels, const PlaneKernels& planes, int threads,
                        const ParallelFor& parallel, const float* weights);

}  // namespace gatedconv
