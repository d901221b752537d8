// bfloat16 products by the instructions of x86-64 processors that have some.
#include "bf16.h"

#if defined(__x86_64__) && defined(__linux__)
#include <cpuid.h>
#include <immintrin.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdlib>
#include <cstring>

#include "plan.h"

namespace gatedconv {
namespace {

// Functions name their instruction set themselves: nothing else in this file may use it.
#define GATEDCONV_DOT __attribute__((target("avx512f,avx512bw,avx512vl,avx512bf16")))
#if defined(__clang__) || __GNUC__ >= 11  // older ones have no AMX
#define GATEDCONV_AMX __attribute__((target("amx-tile,amx-bf16")))
#endif

constexpr ptrdiff_t kSumsStride = kBf16Panels * kPanel;

GATEDCONV_DOT void round_native(const float* from, ptrdiff_t from_stride, int count, uint16_t* to,
                                ptrdiff_t to_stride, int rows) {
  const __mmask16 last = static_cast<__mmask16>((1u << (count % 16)) - 1);
  for (int row = 0; row < rows; ++row, from += from_stride, to += to_stride) {
    int i = 0;
    for (; i + 16 <= count; i += 16) {
      const __m256bh rounded = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + i));
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + i), (__m256i)rounded);
    }
    if (last) _mm256_mask_storeu_epi16(to + i, last, (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(from + i)));
  }
}

template <int PX, int V>
GATEDCONV_DOT void dot_some(const Bf16Product& in, int pixel) {
  __m512 sum[PX][V];
  for (int p = 0; p < PX; ++p) {
    for (int v = 0; v < V; ++v) sum[p][v] = _mm512_setzero_ps();
  }
  const uint16_t* x = in.pixels + pixel * in.stride;
  const uint32_t* w = in.weights;
  const ptrdiff_t panel = in.depth / 2 * kPanel;
  for (int k = 0; k < in.depth; k += 2, w += kPanel) {
    __m512bh b[V];
    for (int v = 0; v < V; ++v) b[v] = (__m512bh)_mm512_loadu_si512(w + v * panel);
#pragma GCC unroll 16
    for (int p = 0; p < PX; ++p) {
      int both;
      std::memcpy(&both, x + p * in.stride + k, sizeof(both));
      const __m512bh a = (__m512bh)_mm512_set1_epi32(both);
#pragma GCC unroll 2
      for (int v = 0; v < V; ++v) sum[p][v] = _mm512_dpbf16_ps(sum[p][v], a, b[v]);
    }
  }
  for (int p = 0; p < PX; ++p) {
    float* to = in.sums + (pixel + p) * kSumsStride;
    for (int v = 0; v < V; ++v) _mm512_storeu_ps(to + v * kPanel, sum[p][v]);
  }
}

// Tiles of 11 pixels at most: 32 are 11 + 11 + 10.
template <int V>
void dot_all(const Bf16Product& in) {
  using Function = void (*)(const Bf16Product&, int);
  static constexpr Function functions[] = {dot_some<1, V>, dot_some<2, V>,  dot_some<3, V>, dot_some<4, V>,
                                           dot_some<5, V>, dot_some<6, V>,  dot_some<7, V>, dot_some<8, V>,
                                           dot_some<9, V>, dot_some<10, V>, dot_some<11, V>};
  const int pieces = (in.count + 10) / 11;
  for (int i = 0, at = 0; i < pieces; ++i) {
    const int pixels = in.count / pieces + (i < in.count % pieces);
    functions[pixels - 1](in, at);
    at += pixels;
  }
}

void multiply_dot(const Bf16Product& in) {
  in.panels == 1 ? dot_all<1>(in) : dot_all<2>(in);
}

#ifdef GATEDCONV_AMX
// All tiles have 16 rows of 64 bytes: 0 to 3 are sums of 16 pixels and a panel, 4 and 5 pixels, 6 and 7
// weights.
struct alignas(64) TileConfig {
  uint8_t palette = 1, start = 0, reserved[14] = {};
  uint16_t bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

GATEDCONV_AMX void begin_amx() {
  static constexpr TileConfig config;
  _tile_loadconfig(&config);
}

GATEDCONV_AMX void end_amx() {
  _tile_release();
}

GATEDCONV_AMX void multiply_amx(const Bf16Product& in) {
  const bool high = in.count > 16, wide = in.panels > 1;
  const uint16_t *upper = in.pixels, *lower = in.pixels + 16 * in.stride;
  const uint32_t *left = in.weights, *right = in.weights + in.depth / 2 * kPanel;
  _tile_zero(0);
  _tile_zero(1);
  _tile_zero(2);
  _tile_zero(3);
  for (int k = 0; k < in.depth; k += kBf16Depth) {
    _tile_loadd(4, upper + k, 2 * in.stride);
    _tile_loadd(6, left + k / 2 * kPanel, 64);
    _tile_dpbf16ps(0, 4, 6);
    if (wide) {
      _tile_loadd(7, right + k / 2 * kPanel, 64);
      _tile_dpbf16ps(1, 4, 7);
    }
    if (high) {
      _tile_loadd(5, lower + k, 2 * in.stride);
      _tile_dpbf16ps(2, 5, 6);
      if (wide) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, in.sums, 4 * kSumsStride);
  if (wide) _tile_stored(1, in.sums + kPanel, 4 * kSumsStride);
  if (high) {
    _tile_stored(2, in.sums + 16 * kSumsStride, 4 * kSumsStride);
    if (wide) _tile_stored(3, in.sums + 16 * kSumsStride + kPanel, 4 * kSumsStride);
  }
}

constexpr Bf16Kernels kAmx = {"amx", begin_amx, round_native, multiply_amx, end_amx};

// Linux gives tiles to a process that requests them. Not all compilers have names for these features.
bool has_amx() {
  constexpr unsigned kAmxBf16 = 1u << 22, kAmxTile = 1u << 24;
  constexpr int kRequestPermission = 0x1023, kTileData = 18;  // ARCH_REQ_XCOMP_PERM, XFEATURE_XTILEDATA
  unsigned a, b, c, d;
  return __get_cpuid_count(7, 0, &a, &b, &c, &d) && (d & kAmxBf16) && (d & kAmxTile) &&
         syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
}
#endif

constexpr Bf16Kernels kDot = {"avx512_bf16", [] {}, round_native, multiply_dot, [] {}};

bool has_dot() {
  __builtin_cpu_init();
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
         __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq") &&
         __builtin_cpu_supports("avx512bf16");
}

}  // namespace

const Bf16Kernels* native_bf16() {
  static const bool dot = has_dot();
  const char* wanted = std::getenv("GATEDCONV_ISA");
  const auto takes = [&](const Bf16Kernels& kernels) {
    return dot && (!wanted || !*wanted || std::strcmp(wanted, kernels.name) == 0);
  };
#ifdef GATEDCONV_AMX
  if (takes(kAmx)) {
    static const bool amx = has_amx();  // requests tiles, so it is called only where they are to be used
    if (amx) return &kAmx;
  }
#endif
  return takes(kDot) ? &kDot : nullptr;
}

}  // namespace gatedconv
#else
const gatedconv::Bf16Kernels* gatedconv::native_bf16() {
  return nullptr;
}
#endif
