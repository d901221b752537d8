// Fixed-width float vectors on the compiler's vector extension.
//
// Each instruction-set unit (plan_portable.cpp, plan_avx2.cpp, plan_avx512.cpp) defines GATEDCONV_ISA, its
// namespace, and GATEDCONV_LANES, the floats in one register, before it includes the kernels; the kernels
// themselves are written once. Contraction (a * b + c -> fma) is the compiler's default where the unit's
// flags allow it.
#pragma once

#include <cstddef>
#include <cstdint>

#include "plan.h"

#if defined(__x86_64__)
#include <immintrin.h>
#endif

#if !defined(GATEDCONV_ISA) || !defined(GATEDCONV_LANES)
#error "define GATEDCONV_ISA and GATEDCONV_LANES before including simd.h"
#endif

namespace gatedconv::GATEDCONV_ISA {

constexpr int kLanes = GATEDCONV_LANES;
constexpr int kPanelVectors = kPanel / kLanes;  // registers that hold one row of a weight panel

typedef float vec __attribute__((vector_size(4 * GATEDCONV_LANES)));
typedef float unaligned_vec __attribute__((vector_size(4 * GATEDCONV_LANES), aligned(4), may_alias));
typedef int32_t lanes_of_int __attribute__((vector_size(4 * GATEDCONV_LANES)));
typedef int32_t unaligned_ints __attribute__((vector_size(4 * GATEDCONV_LANES), aligned(4), may_alias));

static inline vec load(const float* from) {
  return *reinterpret_cast<const unaligned_vec*>(from);
}
static inline void store(float* to, vec value) {
  *reinterpret_cast<unaligned_vec*>(to) = value;
}

// Not vec{} + value: the sum with +0 is an instruction of its own, because it turns -0 into +0.
static inline vec splat(float value) {
#if GATEDCONV_LANES == 16
  return vec{value, value, value, value, value, value, value, value,
             value, value, value, value, value, value, value, value};
#elif GATEDCONV_LANES == 8
  return vec{value, value, value, value, value, value, value, value};
#else
  return vec{value, value, value, value};
#endif
}

// The first 12 of the 24 bits.
static inline vec upper_half(vec value) {
  return reinterpret_cast<vec>(reinterpret_cast<lanes_of_int>(value) & ~0xfff);
}

// a * b + c with an exact product. Without the instruction, products of halves are exact, and what the
// rounded product lost is added last.
static inline vec fused(vec a, vec b, vec c) {
#if defined(__FP_FAST_FMAF)
  vec result;
  for (int i = 0; i < kLanes; ++i) result[i] = __builtin_fmaf(a[i], b[i], c[i]);
  return result;
#else
  const vec product = a * b, a_high = upper_half(a), b_high = upper_half(b);
  const vec a_low = a - a_high, b_low = b - b_high;
  const vec lost = (a_high * b_high - product) + (a_high * b_low + a_low * b_high) + a_low * b_low;
  return (product + c) + lost;
#endif
}

// NaN stays NaN, as in PyTorch: every comparison with it is false, and the machine's minimum and maximum give
// their second operand. Compilers make four instructions of the comparisons.
static inline vec at_least(float limit, vec value) {
#if defined(__x86_64__) && GATEDCONV_LANES == 16
  return reinterpret_cast<vec>(_mm512_maskz_max_ps(static_cast<__mmask16>(-1), _mm512_set1_ps(limit),
                                                   reinterpret_cast<__m512>(value)));
#elif defined(__x86_64__) && GATEDCONV_LANES == 8
  return reinterpret_cast<vec>(_mm256_max_ps(_mm256_set1_ps(limit), reinterpret_cast<__m256>(value)));
#else
  return value < limit ? splat(limit) : value;
#endif
}

static inline vec at_most(float limit, vec value) {
#if defined(__x86_64__) && GATEDCONV_LANES == 16
  return reinterpret_cast<vec>(_mm512_maskz_min_ps(static_cast<__mmask16>(-1), _mm512_set1_ps(limit),
                                                   reinterpret_cast<__m512>(value)));
#elif defined(__x86_64__) && GATEDCONV_LANES == 8
  return reinterpret_cast<vec>(_mm256_min_ps(_mm256_set1_ps(limit), reinterpret_cast<__m256>(value)));
#else
  return value > limit ? splat(limit) : value;
#endif
}

static inline vec clamp_to_six(vec value) {
  return at_most(6, at_least(0, value));
}

// clamp(x + 3, 0, 6) / 6, by the two halves of 1 / 6 where the sum is fused: a division takes as long as ten
// multiplications.
static inline vec hard_sigmoid(vec value) {
  const vec clamped = clamp_to_six(value + 3.0f);
  if constexpr (kLanes == 4) return clamped / 6.0f;
  return clamped * 0.16666667163f + clamped * -4.967053731e-9f;
}

// Applies one of the activations that `in_registers` names.
static inline vec activate(vec value, Act act) {
  if (act == Act::kNone) return value;
  if (act <= Act::kRelu6) {
    value = at_least(0, value);
    return act == Act::kRelu6 ? at_most(6, value) : value;
  }
  return act == Act::kHardSwish ? value * hard_sigmoid(value) : hard_sigmoid(value);
}

// The same for some registers at once, so that they share the decision.
template <int N>
static inline __attribute__((always_inline)) void activate_each(vec (&values)[N], Act act) {
  if (act == Act::kNone) return;
  if (act == Act::kRelu) {
#pragma GCC unroll 32
    for (int i = 0; i < N; ++i) values[i] = at_least(0, values[i]);
  } else if (act == Act::kRelu6) {
#pragma GCC unroll 32
    for (int i = 0; i < N; ++i) values[i] = clamp_to_six(values[i]);
  } else if (act == Act::kHardSwish) {
#pragma GCC unroll 32
    for (int i = 0; i < N; ++i) values[i] *= hard_sigmoid(values[i]);
  } else {
#pragma GCC unroll 32
    for (int i = 0; i < N; ++i) values[i] = hard_sigmoid(values[i]);
  }
}

// The lanes whose `keep` is -1; zeros where it is 0, whatever the value was.
static inline vec keep_lanes(vec value, const int32_t* keep) {
  const lanes_of_int mask = *reinterpret_cast<const unaligned_ints*>(keep);
  return reinterpret_cast<vec>(reinterpret_cast<lanes_of_int>(value) & mask);
}

// Registers that cover `channels`.
static inline int vectors(int channels) {
  return (channels + kLanes - 1) / kLanes;
}

}  // namespace gatedconv::GATEDCONV_ISA
