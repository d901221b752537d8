// A run of layers whose maps stay in shared memory: one block, or one cluster of blocks, takes an image
// through all of them in one launch. Plain arithmetic here; the body is in resident_body.h, the list of
// instructions is written by gatedconv/engine/cuda/resident.py.
//
// A map is planes of units: a unit is 16 bytes of channels (8 halves, 4 floats), a plane one unit of every
// pixel. Eight neighboring pixels of a plane fill the banks of shared memory exactly, so an ldmatrix of any
// tap, and the stores of an accumulator, have no conflict. `halo` rows of zeros are above and below, `halo`
// zeros between one row and the next, which are the right border of the one and the left border of the other.
//
// In addition to its input a run reads one stream of bytes, in the order in which they are needed,
// through a ring of pieces in shared memory. A request is aligned to its own size, a power of two, so none
// crosses two pieces. For every instruction: a record; then for a convolution, `steps` times the fragments of
// `blocks` groups of 8 outputs, then their biases (64 floats) and, where it scatters, their channels (64
// int32).
//
// In a cluster every block holds all maps at the same places, and owns a band of rows of each: it computes
// them and stores them in the other blocks, too, where those will read them.
#pragma once

#include "shared/conv_tile.h"

namespace gatedconv {

constexpr int kResidentWarps = 8;
constexpr int kResidentThreads = 32 * kResidentWarps;
constexpr int kUnitBytes = 16;
constexpr int kItemBytes = 256;    // of a record, of one fragment of 8 outputs, of 64 biases
constexpr int kPieceBytes = 4096;  // of the ring
constexpr int kMostRanks = 8;      // blocks of a cluster
constexpr int kPassOutputs = 64;

enum class ResidentOp : int32_t { kEnd, kLoad, kConv, kMove, kMean, kSave };

struct ResidentMap {
  int32_t at, plane;  // bytes: where it begins, from one plane to the next
  int32_t pitch;      // pixels from one row to the next
  int32_t halo, units, height, width;
};

// In the order in which resident.py writes it.
struct ResidentRecord {
  ResidentOp op;
  ConvAct act;
  ResidentMap source, target, residual;  // residual.units == 0: there is none
  int32_t clear;                         // zero the target's halo
  int32_t kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int32_t mt, nt;             // fragments of a warp: 16 pixels each, 8 outputs each
  int32_t groups;             // of nt fragments of outputs, side by side
  int32_t blocks, steps;      // fragments of outputs in the stream, steps of two units
  int32_t units;              // that a pixel's sum reads: taps times units of the source
  int32_t fragment;           // of 16 pixels, the first of this pass
  int32_t channel;            // the first of this pass
  int32_t scatters;           // whether a list gives the places of outputs; -1 there: none
  uint32_t need[kMostRanks];  // rows of the target that a rank reads: first << 16 | end
};

static_assert(sizeof(ResidentRecord) <= kItemBytes);

struct ResidentArgs {
  const void* input;                     // (N, C, H, W), channels last, whole aligned units
  void* output;                          // so is this
  const uint8_t* stream;                 // pieces
  Strides4 in, out;                      // in elements
  int32_t pieces;                        // of the stream
  int32_t ring_pieces;                   // 2, 4 or 8
  int32_t record_at, table_at, ring_at;  // bytes of shared memory, where the first 16 are zeros
  int32_t ranks, shared_bytes;
};

// Rows of a map that one block of a cluster owns.
struct Band {
  int32_t first, end;
};

GATEDCONV_HOST_DEVICE inline Band band(int32_t height, int32_t rank, int32_t ranks) {
  return {rank * height / ranks, (rank + 1) * height / ranks};
}

GATEDCONV_HOST_DEVICE inline Band needed(const ResidentRecord& r, int32_t rank) {
  return {static_cast<int32_t>(r.need[rank] >> 16), static_cast<int32_t>(r.need[rank] & 0xffffu)};
}

// Bytes from the begin of a plane to a pixel; -halo <= row < height + halo, and so for columns.
GATEDCONV_HOST_DEVICE inline int32_t pixel_byte(const ResidentMap& m, int32_t row, int32_t col) {
  return ((row + m.halo) * m.pitch + col + m.halo) * kUnitBytes;
}

// The byte of a channel in a map, `pixel` being that of its pixel in a plane.
template <class Math>
GATEDCONV_HOST_DEVICE int32_t channel_byte(const ResidentMap& m, int32_t pixel, int32_t channel) {
  const int32_t in_unit = channel % kVector<Math> * static_cast<int32_t>(sizeof(typename Math::Storage));
  return m.at + channel / kVector<Math> * m.plane + pixel + in_unit;
}

// The units of a plane that are halo, counted from 0 on.
GATEDCONV_HOST_DEVICE inline int32_t halo_units(const ResidentMap& m) {
  return 2 * m.halo * m.pitch + m.halo + m.height * m.halo;
}

GATEDCONV_HOST_DEVICE inline int32_t halo_byte(const ResidentMap& m, int32_t i) {
  const int32_t above = m.halo * m.pitch + m.halo, between = m.height * m.halo;
  if (i < above) return i * kUnitBytes;
  i -= above;
  if (i < between) return ((i / m.halo + m.halo) * m.pitch + m.halo + m.width + i % m.halo) * kUnitBytes;
  return ((m.height + m.halo) * m.pitch + m.halo + i - between) * kUnitBytes;
}

// From a pixel's first byte in the source, at tap (0, 0), to unit `unit` of its sum; -1 where there is none.
GATEDCONV_HOST_DEVICE inline int32_t unit_offset(const ResidentRecord& r, int32_t unit) {
  if (unit >= r.units) return -1;
  const int32_t tap = unit / r.source.units, plane = unit % r.source.units;
  const int32_t row = tap / r.kernel_w * r.dilation_h, col = tap % r.kernel_w * r.dilation_w;
  return plane * r.source.plane + (row * r.source.pitch + col) * kUnitBytes;
}

}  // namespace gatedconv
