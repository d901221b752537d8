// Activations over vectors.
//
// Errors against float64 in units in the last place of the result, where its absolute value is at least 1e-36
// (below, a factor may be a subnormal number): ReLU and ReLU6 0; LeakyReLU and ELU with alpha 1 at most 1;
// ELU, sigmoid, tanh, SiLU, Mish, both forms of GELU, hard sigmoid and hard swish (the last two in simd.h) at
// most 2. GELU needs a few exact products for that: without FMA it takes 1.5 and its tanh form 1.4 times as
// long with them as with rounded ones (AMD EPYC, SSE2, g++ 12). NaN and infinities give what PyTorch gives in
// float64.
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

// ln 2 is kLn2 + kLn2Rest; k kLn2 is exact. kRounder is 1.5 * 2^23.
constexpr float kLn2 = 0.693359375f, kLn2Rest = -2.12194440e-4f, kRounder = 12582912.0f;

// kRounder plus x / ln 2 rounded to an integer, which the low bits are.
static inline vec round_multiple(vec x) {
  return x * 1.44269504f + kRounder;
}

static inline Reduced reduced(vec rounded, vec r) {
  vec p = splat(1.9875691500e-4f);
  for (const float c :
       {1.3981999507e-3f, 8.3334519073e-3f, 4.1665795894e-2f, 1.6666665459e-1f, 5.0000001201e-1f}) {
    p = p * r + c;
  }
  return {reinterpret_cast<lanes_of_int>(rounded) - 0x4b400000, r, p};
}

static inline Reduced reduce(vec x) {
  const vec rounded = round_multiple(x), k = rounded - kRounder;
  return reduced(rounded, (x - k * kLn2) - k * kLn2Rest);
}

static inline vec power_of_two(lanes_of_int k) {
  return reinterpret_cast<vec>((k + 127) << 23);
}

// exp(x) for x <= 0, into the subnormal numbers, is value * (1 + rest); NaN for NaN.
struct Exponential {
  vec value, rest;
};

static inline Exponential exp_with_rest(vec x) {
  x = at_least(-104, x);
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
  x = at_least(-30, x);
  const Reduced s = reduce(x);
  const vec scale = power_of_two(s.k);
  return scale * (s.tail * (s.r * s.r) + s.r) + (scale - 1.0f);
}

// factor / (1 + exp(z)) for the reduced z. With exp(z) = s (1 + m) and a power of two s, the denominator is
// (1 + s) + s m; what the first sum loses where s is large goes to the second.
static inline vec over_one_plus_exp(Reduced z, vec factor) {
  const vec s = power_of_two(z.k), m = z.tail * (z.r * z.r) + z.r, sum = 1.0f + s;
  return factor / ((s * m + (1.0f - (sum - s))) + sum);
}

// factor / (1 + exp(-x)). Beyond -88 it is below 1e-36, and 0.
static inline vec sigmoid_times(vec x, vec factor) {
  const vec y = at_least(-88, at_most(87, x));
  return x < -88.0f ? factor * 0.0f : over_one_plus_exp(reduce(-y), factor);
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

// x times the normal distribution function: max(x, 0) - a tail with a = |x| and tail = exp(-a^2 / 2) t p(t),
// t = 1 / (1 + a / 4). p is a polynomial about `middle`, fitted to the least relative error against float64's
// erfcx for a <= 13.2 (it is 2^-26.8), its coefficients rounded one after another; at `middle`, p is a float.
// `low` takes up the roundings of t, squares, products and sums, that of t by the derivative of
// log(t p(t)), which is 0.75 + 2.3 t to 5 %. Beyond 13.25, power_of_two gives 0.
static inline vec gelu(vec x) {
  constexpr float middle = 0.54638671875f, at_middle = 0.203791827f;
  const vec a = at_most(13.25f, absolute(x)), square = a * a;
  const vec d = 1.0f + 0.25f * a, t = 1.0f / d, q = t - middle;
  vec p = splat(0.0156596024f);
  for (const float c : {0.0192287397f, -0.0444722064f, -0.0718163624f, 0.0423551053f, 0.253601283f,
                        0.419053197f, 0.442225307f, 0.342370182f})
    p = p * q + c;
  const vec ratio = p * q + at_middle, ratio_low = fused(p, q, at_middle - ratio);
  const Reduced e = reduce(-0.5f * square);
  const vec above = e.tail * (e.r * e.r) + e.r, scaled = t * power_of_two(e.k);
  const vec most = ratio * scaled, most_low = fused(ratio, scaled, -most) + ratio_low * scaled;
  const vec tail = most * above + most;
  const vec t_low = fused(-t, d, splat(1.0f)) - t * (0.25f * a - (d - 1.0f));
  const vec relative = t_low * (0.75f + 2.3f * t) - 0.5f * fused(a, a, -square);
  const vec low = (most * above + (most - tail)) + (most * relative + most_low) * (above + 1.0f);
  return (x - (x < 0.0f ? x : vec{})) - a * tail - a * low;  // NaN for -infinity, as PyTorch has it
}

// x / (1 + exp(-x g)) with g = 2 sqrt(2 / pi) (1 + 0.044715 x^2), to twice the digits: the error of x g
// is that of its exponential. 1.5957689 is on a grid of 2^-20, so that its difference from g is exact.
static inline vec gelu_tanh(vec x) {
  constexpr float one = 1.59576893f, one_low = 1.93077899e-7f, cube = 0.0713548139f, cube_low = 2.3988324e-9f;
  const vec y = at_least(-10, at_most(10, x)), square = y * y, g = square * cube + one;
  const vec g_low =
      fused(square, splat(cube), one - g) + (fused(y, y, -square) * cube + (square * cube_low + one_low));
  const vec rounded = round_multiple(-y * g), k = rounded - kRounder;
  const vec r = fused(-y, g, k * -kLn2) - (k * kLn2Rest + y * g_low);
  return x < -10.0f ? x * 0.0f : over_one_plus_exp(reduced(rounded, r), x);
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
  const vec w = twice * e, most = 1.0f + twice, sum = most + w, s = w / sum, slip = w - (sum - most);
  const vec above = x - x * (s + s * (rest * (2.0f - 1.2f * e) - slip * (1.0f - 0.8f * e)));
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
