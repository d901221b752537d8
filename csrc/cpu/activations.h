// Activations over vectors.
//
// Errors against float64 in units in the last place of the result, where its absolute value is at least 1e-36
// (below, a factor may be a subnormal number): ELU 1, sigmoid, tanh, SiLU, Mish, hard sigmoid and hard swish
// 2 (the last two in simd.h), GELU 7; GELU's tanh form 3 for x >= -1 and below, where its argument's own
// rounding is magnified, 2e-5 of the result. (PyTorch's GELU cancels in its tail and keeps no digits there.)
// NaN and infinities give what PyTorch gives in float64.
#pragma once

#include "simd.h"

namespace gatedconv::GATEDCONV_ISA {

static inline vec select(lanes_of_int mask, vec yes, vec no) {
  return reinterpret_cast<vec>((mask & reinterpret_cast<lanes_of_int>(yes)) |
                               (~mask & reinterpret_cast<lanes_of_int>(no)));
}

static inline vec absolute(vec x) {
  return reinterpret_cast<vec>(reinterpret_cast<lanes_of_int>(x) & 0x7fffffff);
}

// x = k ln 2 + r, |r| <= ln(2) / 2, for x in [-104, 88]; `tail` is (exp(r) - 1 - r) / r^2.
struct Reduced {
  lanes_of_int k;
  vec r, tail;
};

static inline Reduced reduce(vec x) {
  const vec shifted =
      x * 1.44269504f + 12582912.0f;  // 1.5 * 2^23: the sum's low bits are the rounded product
  Reduced reduced;
  reduced.k = reinterpret_cast<lanes_of_int>(shifted) - 0x4b400000;
  const vec k = shifted - 12582912.0f;
  reduced.r = (x - k * 0.693359375f) + k * 2.12194440e-4f;
  vec p = splat(1.9875691500e-4f);
  for (const float c :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = p * reduced.r + c;
  }
  reduced.tail = p;
  return reduced;
}

static inline vec power_of_two(lanes_of_int k) {
  return reinterpret_cast<vec>((k + 127) << 23);
}

// exp(x) for x <= 0, into the subnormal numbers, is value * (1 + rest); NaN for NaN.
struct Exponential {
  vec value, rest;
};

static inline Exponential exp_with_rest(vec x) {
  x = x < -104.0f ? splat(-104.0f) : x;
  const Reduced s = reduce(x);
  const vec more = s.tail * (s.r * s.r), above = more + s.r, value = above + 1.0f;
  const vec lost = (above - (value - 1.0f)) + (more - (above - s.r));
  const vec rest = lost * (2.0f - value);  // value is near 1
  const lanes_of_int half = s.k >> 1;      // in two steps, so that the last one rounds into the subnormals
  return {value * power_of_two(half) * power_of_two(s.k - half), rest};
}

static inline vec exp_negative(vec x) {
  return exp_with_rest(x).value;
}

// exp(x) - 1 for x <= 0.
static inline vec expm1_negative(vec x) {
  x = x < -30.0f ? splat(-30.0f) : x;
  const Reduced s = reduce(x);
  const vec scale = power_of_two(s.k);
  return scale * (s.tail * (s.r * s.r) + s.r) + (scale - 1.0f);
}

// factor / (1 + exp(-x)). With exp(-x) = s (1 + m) and a power of two s, the denominator is (1 + s) + s m;
// what the first sum loses where s is large goes to the second. Beyond -88 the result is below 1e-36, and 0.
static inline vec sigmoid_times(vec x, vec factor) {
  vec y = x > 87.0f ? splat(87.0f) : x;
  y = y < -88.0f ? splat(-88.0f) : y;
  const Reduced e = reduce(-y);
  const vec s = power_of_two(e.k), m = e.tail * (e.r * e.r) + e.r, sum = 1.0f + s;
  const vec d = (s * m + (1.0f - (sum - s))) + sum;
  return x < -88.0f ? factor * 0.0f : factor / d;
}

static inline vec hyperbolic_tangent(vec x) {
  const vec a = absolute(x);
  const vec e = exp_negative(-2.0f * a);
  const vec far = 1.0f - 2.0f * e / (1.0f + e);
  const vec z = x * x;
  vec p = splat(-5.70498872745e-3f);
  for (const float c : {2.06390887954e-2f, -5.37397155531e-2f, 1.33314422036e-1f, -3.33332819422e-1f})
    p = p * z + c;
  const vec near = p * z * x + x;
  return select(a < 0.625f, near, select(x < 0.0f, -far, far));
}

// x times the normal distribution function: for x < 0 it is exp(-x^2 / 2) times a polynomial in 1 / (1 + |x|
// / 4).
static inline vec gelu(vec x) {
  vec a = absolute(x);
  a = a > 15.0f ? splat(15.0f) : a;
  const vec t = 1.0f / (1.0f + 0.25f * a);
  vec p = splat(0.0171899041f);
  for (const float c : {-0.0661441429f, 0.0596352347f, 0.0176365092f, 0.0218405611f, 0.0816656477f,
                        0.0737616362f, 0.0951288774f, 0.0995404142f, 0.099745363f})
    p = p * t + c;
  // exp(-a^2 / 2) by the upper half of a, whose square is exact, and the rest.
  const vec high = reinterpret_cast<vec>(reinterpret_cast<lanes_of_int>(a) & ~0xfff);
  const vec y = (high - a) * (high + a) * 0.5f;
  const vec tail =
      p * t * exp_negative(-0.5f * high * high) * (1.0f + y * (1.0f + y * (0.5f + y * (1.0f / 6))));
  return x * select(x < 0.0f, tail, 1.0f - tail);
}

static inline vec gelu_tanh(vec x) {
  const vec u = 1.5957691216f * (x + 0.044715f * x * x * x);  // 2 sqrt(2 / pi)
  return sigmoid_times(u, x);
}

// x tanh(log(1 + exp(x))), by polynomials in e = exp(-|x|): for x < 0 it is x n / (n + 2) with n = e (e + 2),
// else x - x w / (1 + 2 e + w) with w = 2 e^2. Of what is lost on the way, that which counts is made good.
static inline vec mish(vec x) {
  const Exponential exponential = exp_with_rest(-absolute(x));
  const vec e = exponential.value, rest = exponential.rest;
  const vec twice = 2.0f * e, n = twice + e * e, d = n + 2.0f, q = n / d, rise = 1.0f - q;
  const vec lost = (twice - n) + e * e,
            wrong = rise * (rest * (1.0f + e * (1.0f / 3)) - (n - (d - 2.0f)) * 0.5f);
  const vec below = x * q, more = below * wrong + x * (lost * rise * rise * 0.5f);
  const vec w = 2.0f * e * e, s = w / (1.0f + 2.0f * e + w);
  const vec above = x - x * (s + s * (rest * (2.0f - 1.2f * e)));
  return select(x < 0.0f, below + more, select(e == 0.0f, x, above));
}

// The result of an activation that `activate` does not have.
template <Act A>
static inline vec late_activation(vec x, float value) {
  if constexpr (A == Act::kLeakyRelu) return x < 0.0f ? x * value : x;
  if constexpr (A == Act::kElu) return x > 0.0f ? x : value * expm1_negative(x);
  if constexpr (A == Act::kSilu) return sigmoid_times(x, x);
  if constexpr (A == Act::kSigmoid) return sigmoid_times(x, splat(1.0f));
  if constexpr (A == Act::kTanh) return hyperbolic_tangent(x);
  if constexpr (A == Act::kGelu) return gelu(x);
  if constexpr (A == Act::kGeluTanh) return gelu_tanh(x);
  if constexpr (A == Act::kMish) return mish(x);
  return activate(x, A);
}

template <Act A>
static void activate_all(float* at, int pixels, ptrdiff_t stride, int vectors, float value) {
  for (int i = 0; i < pixels; ++i, at += stride) {
    for (int v = 0; v < vectors; ++v)
      store(at + v * kLanes, late_activation<A>(load(at + v * kLanes), value));
  }
}

// Applies an activation to vectors of pixels that were just written.
static inline void activate_pixels(Act act, float value, float* at, int pixels, ptrdiff_t stride,
                                   int vectors) {
  using Function = void (*)(float*, int, ptrdiff_t, int, float);
  static constexpr Function functions[] = {
      nullptr,
      activate_all<Act::kRelu>,
      activate_all<Act::kRelu6>,
      activate_all<Act::kLeakyRelu>,
      activate_all<Act::kElu>,
      activate_all<Act::kSilu>,
      activate_all<Act::kHardSwish>,
      activate_all<Act::kHardSigmoid>,
      activate_all<Act::kSigmoid>,
      activate_all<Act::kTanh>,
      activate_all<Act::kGelu>,
      activate_all<Act::kGeluTanh>,
      activate_all<Act::kMish>,
  };
  if (act != Act::kNone) functions[static_cast<int>(act)](at, pixels, stride, vectors, value);
}

}  // namespace gatedconv::GATEDCONV_ISA
