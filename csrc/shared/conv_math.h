// The number formats of the GPU convolution. A fragment step is 32 bytes of the reduction for every format
// that tensor cores multiply: 16 halves or 8 floats, so one tile layout and one fragment decode serve them
// all.
#pragma once

#include <cstdint>
#include <cstring>

#include "shared/host_device.h"

#if defined(__CUDACC__)
#include <cuda_bf16.h>
#include <cuda_fp16.h>
#endif

namespace gatedconv {

constexpr int kStepBytes = 32;

GATEDCONV_HOST_DEVICE inline uint32_t bits_of(float value) {
  uint32_t bits;
  memcpy(&bits, &value, sizeof bits);
  return bits;
}

GATEDCONV_HOST_DEVICE inline float float_of(uint32_t bits) {
  float value;
  memcpy(&value, &bits, sizeof value);
  return value;
}

// Drops the low `drop` bits of a finite float, to nearest; ties go to even, or away from zero.
GATEDCONV_HOST_DEVICE inline uint32_t round_mantissa(uint32_t bits, int drop, bool ties_to_even) {
  if ((bits & 0x7f800000u) == 0x7f800000u) return bits;
  const uint32_t half = 1u << (drop - 1);
  const uint32_t odd = (bits >> drop) & 1u;
  return (bits + (ties_to_even ? half - 1 + odd : half)) & ~((1u << drop) - 1u);
}

struct Half {
  using Storage = uint16_t;
  static constexpr bool kTensorCores = true;

  GATEDCONV_HOST_DEVICE static float load(Storage bits) {
#if defined(__CUDA_ARCH__)
    return __half2float(__ushort_as_half(bits));
#else
    const uint32_t sign = (bits & 0x8000u) << 16, exponent = (bits >> 10) & 31u, mantissa = bits & 1023u;
    if (exponent == 31) return float_of(sign | 0x7f800000u | (mantissa << 13));
    if (exponent != 0) return float_of(sign | ((exponent + 112) << 23) | (mantissa << 13));
    const float value = static_cast<float>(mantissa) * float_of(0x33800000u);  // 2^-24
    return sign ? -value : value;
#endif
  }

  GATEDCONV_HOST_DEVICE static Storage store(float value) {
#if defined(__CUDA_ARCH__)
    return __half_as_ushort(__float2half_rn(value));
#else
    const uint32_t bits = bits_of(value), sign = (bits >> 16) & 0x8000u, magnitude = bits & 0x7fffffffu;
    if (magnitude > 0x7f800000u) return static_cast<Storage>(sign | 0x7e00u);
    if (magnitude >= 0x477ff000u) return static_cast<Storage>(sign | 0x7c00u);  // 65520 and more
    if (magnitude < 0x38800000u) {                                              // below 2^-14: subnormal
      // Adding 0.5 leaves 24 bits below the binary point, rounded to nearest even.
      const float shifted = float_of(magnitude) + 0.5f;
      return static_cast<Storage>(sign | (bits_of(shifted) - bits_of(0.5f)));
    }
    const uint32_t rounded = round_mantissa(magnitude, 13, true);
    return static_cast<Storage>(sign | ((rounded - 0x38000000u) >> 13));
#endif
  }
  GATEDCONV_HOST_DEVICE static Storage pack(float value) { return store(value); }
};

struct BFloat16 {
  using Storage = uint16_t;
  static constexpr bool kTensorCores = true;

  GATEDCONV_HOST_DEVICE static float load(Storage bits) {
    return float_of(static_cast<uint32_t>(bits) << 16);
  }
  GATEDCONV_HOST_DEVICE static Storage store(float value) {
    const uint32_t bits = bits_of(value);
    if ((bits & 0x7fffffffu) > 0x7f800000u) return static_cast<Storage>((bits >> 16) | 0x40u);
    return static_cast<Storage>(round_mantissa(bits, 16, true) >> 16);
  }
  GATEDCONV_HOST_DEVICE static Storage pack(float value) { return store(value); }
};

// fp32 tensors, multiplied with 10 bits of mantissa: cvt.rna, to nearest, ties away from zero.
struct TensorFloat32 {
  using Storage = float;
  static constexpr bool kTensorCores = true;

  GATEDCONV_HOST_DEVICE static float load(float value) { return value; }
  GATEDCONV_HOST_DEVICE static float store(float value) { return value; }
  GATEDCONV_HOST_DEVICE static float pack(float value) {
    return float_of(round_mantissa(bits_of(value), 13, false));
  }
};

// fp32 throughout, on the ordinary units.
struct Float32 {
  using Storage = float;
  static constexpr bool kTensorCores = false;

  GATEDCONV_HOST_DEVICE static float load(float value) { return value; }
  GATEDCONV_HOST_DEVICE static float store(float value) { return value; }
  GATEDCONV_HOST_DEVICE static float pack(float value) { return value; }
};

// Elements of one fragment step, and of one 16-byte vector.
template <class Math>
constexpr int kStep = kStepBytes / static_cast<int>(sizeof(typename Math::Storage));
template <class Math>
constexpr int kVector = kStep<Math> / 2;

}  // namespace gatedconv
