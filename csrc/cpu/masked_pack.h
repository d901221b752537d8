// Weights of a masked convolution in the order in which the plane kernels read them, for one call or kept
// between calls. Independent of PyTorch.
#pragma once

#include <cstdint>
#include <vector>

#include "shared/masked_conv2d.h"

namespace gatedconv {

struct PlaneKernels;

// The outputs of one group that are open, for one sample or for all, with their weights.
struct OpenOutputs {
  std::vector<int32_t> rows;
  std::vector<int32_t> tile_begin;  // into rows
  const float* weights;             // tile after tile: [channel][tap][outputs]
  std::vector<float> own;           // `weights`, if they were packed for this call
};

// Lists the open outputs of a group, cut into even tiles of at most max_outputs.
void list_open_outputs(const ConvShape& s, int64_t group, const bool* open, int max_outputs,
                       OpenOutputs& outputs);

// Packs the weights of a group for this call; list_open_outputs has been here.
void pack_weights(const ConvShape& s, const ConvTensors<float>& t, int64_t group, OpenOutputs& outputs);

// Weights kept between calls are all groups' tiles, and where masked_maps.h can use them the weights of maps,
// behind what they were made of: the sizes, the masks and the open rows. Whoever reads them compares, so they
// are never stale. They need one mask for all samples and rows of weights that are dense in memory.
bool can_keep(const ConvShape& s, const ConvTensors<float>& t);
int64_t kept_floats(const ConvShape& s, const ConvTensors<float>& t, const PlaneKernels& kernels);
void keep_weights(const ConvShape& s, const ConvTensors<float>& t, const PlaneKernels& kernels, float* kept);

// The tiles of kept weights; null if they were made of other weights or other masks, or are no such thing.
const float* kept_tiles(const ConvShape& s, const ConvTensors<float>& t, const PlaneKernels& kernels,
                        const float* kept, int64_t floats);

}  // namespace gatedconv
