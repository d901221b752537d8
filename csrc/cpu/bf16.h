// Products of bfloat16 matrices, summed in float32.
#pragma once

#include <cstddef>
#include <cstdint>

namespace gatedconv {

constexpr int kBf16Depth = 32;   // terms of a sum come in multiples of this: a row of an AMX tile
constexpr int kBf16Pixels = 32;  // of a product, at most: two AMX tiles
constexpr int kBf16Panels = 2;   // the same

// sums[pixel][panel][16] of `count` rows of pixels with as many panels of weights. Rows behind the last one,
// up to a multiple of 16, are multiplied too; their sums are never used.
struct Bf16Product {
  const uint16_t* pixels;  // [pixel][stride], `depth` of each row
  ptrdiff_t stride;
  int count, depth, panels;
  const uint32_t*
      weights;  // [panel][depth / 2][16]: a pair of consecutive terms, the first in the lower half
  float* sums;  // [kBf16Pixels][kBf16Panels * 16]
};

// One way to compute them. A thread calls `begin` before, and `end` after, some products.
struct Bf16Kernels {
  const char* name;
  void (*begin)();
  // To the nearest, ties to even: `count` values of each of some rows. Up to 15 floats behind them are read.
  void (*round)(const float* from, ptrdiff_t from_stride, int count, uint16_t* to, ptrdiff_t to_stride,
                int rows);
  void (*multiply)(const Bf16Product& product);
  void (*end)();
};

// By the instructions of this machine, AMX or AVX512_BF16, if GATEDCONV_ISA names no others; null without
// any.
const Bf16Kernels* native_bf16();

}  // namespace gatedconv
