// The drivers over planes and over maps, with their portable kernels, against the direct convolution, under
// sanitizers. Every buffer has exactly its tensor's size, and threads run at the same time.
#include "cpu/masked_planes.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <thread>
#include <vector>

#include "cpu/masked_maps.h"
#include "cpu/masked_pack.h"

namespace {

using gatedconv::ConvShape;
using gatedconv::ConvTensors;
using gatedconv::Strides4;

void in_threads(int64_t count, int64_t grain, const std::function<void(int64_t, int64_t)>& body) {
  std::vector<std::thread> threads;
  const int64_t chunk = std::max(grain, (count + 1) / 2);
  for (int64_t begin = 0; begin < count; begin += chunk) {
    threads.emplace_back([=, &body] { body(begin, std::min(count, begin + chunk)); });
  }
  for (std::thread& thread : threads) thread.join();
}

Strides4 strides(int64_t c, int64_t h, int64_t w, bool channels_last) {
  if (channels_last) return {c * h * w, 1, w * c, c};
  return {c * h * w, h * w, w, 1};
}

std::unique_ptr<float[]> filled(int64_t count, std::mt19937& random) {
  std::unique_ptr<float[]> data(new float[count]);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < count; ++i) data[i] = normal(random);
  return data;
}

bool check(const ConvShape& s, unsigned bits, bool maps, std::mt19937& random) {
  const bool per_sample = (bits & 1) && !maps, last = bits & 16, poison = (bits & 96) == 0;
  auto input = filled(s.batch * s.in_channels * s.height * s.width, random);
  auto weight = filled(s.out_channels * (s.in_channels / s.groups) * s.kernel_h * s.kernel_w, random);
  auto bias = filled(s.out_channels, random);
  const int64_t outputs = s.batch * s.out_channels * s.out_h * s.out_w;
  auto residual = filled(outputs, random);
  std::unique_ptr<float[]> output(new float[outputs]), expected(new float[outputs]);
  const int64_t masks = per_sample ? s.batch * s.out_channels : s.out_channels;
  std::unique_ptr<bool[]> out_open(new bool[masks]), in_open(new bool[s.in_channels]);
  for (int64_t i = 0; i < masks; ++i) out_open[i] = random() % 2;
  for (int64_t i = 0; i < s.in_channels; ++i) in_open[i] = random() % 3 > 0;
  std::unique_ptr<int32_t[]> index(new int32_t[s.in_channels]), offset(new int32_t[s.groups + 1]);
  gatedconv::list_open_inputs(in_open.get(), s.in_channels, s.groups, index.get(), offset.get());
  const Strides4 out = strides(s.out_channels, s.out_h, s.out_w, last);
  ConvTensors<float> t{input.get(),
                       weight.get(),
                       bits & 2 ? bias.get() : nullptr,
                       bits & 4 ? residual.get() : nullptr,
                       output.get(),
                       out_open.get(),
                       index.get(),
                       offset.get(),
                       strides(s.in_channels, s.height, s.width, last),
                       strides(s.in_channels / s.groups, s.kernel_h, s.kernel_w, false),
                       out,
                       out,
                       per_sample ? s.out_channels : 0,
                       (bits & 8) != 0};
  const gatedconv::PlaneKernels& kernels = gatedconv::plane_kernels_portable;
  std::unique_ptr<float[]> kept;
  int64_t floats = 0;
  if (gatedconv::can_keep(s, t) && random() % 2) {
    floats = gatedconv::kept_floats(s, t, kernels);
    kept.reset(new float[floats]);
    gatedconv::keep_weights(s, t, kernels, kept.get());
    if (!gatedconv::kept_tiles(s, t, kernels, kept.get(), floats)) return false;
    // Weights that changed since then must not be taken for those that are kept.
    if (random() % 2) weight[random() % (s.out_channels * t.weight_strides.n)] += 1;
  }
  const float* tiles = kept ? gatedconv::kept_tiles(s, t, kernels, kept.get(), floats) : nullptr;
  if (!maps) {
    gatedconv::masked_conv2d_planes(s, t, kernels, 2, in_threads, tiles);
  } else {
    gatedconv::OpenOutputs open;
    gatedconv::list_open_outputs(s, 0, out_open.get(), kernels.max_outputs, open);
    const int64_t inputs = t.in_offset[1], count = static_cast<int64_t>(open.rows.size());
    if (!gatedconv::can_use_maps(s, inputs, count)) return true;
    if (poison) input[random() % (s.batch * s.in_channels * s.height * s.width)] = NAN;
    gatedconv::masked_conv2d_maps(s, t, open, gatedconv::kernels_portable, kernels, 2, in_threads,
                                  tiles ? tiles + inputs * count * 9 : nullptr);
  }
  t.output = expected.get();
  for (int64_t n = 0; n < s.batch; ++n) {
    for (int64_t c = 0; c < s.out_channels; ++c) {
      for (int64_t p = 0; p < s.out_h; ++p) {
        for (int64_t q = 0; q < s.out_w; ++q) gatedconv::write_output(s, t, n, c, p, q);
      }
    }
  }
  for (int64_t i = 0; i < outputs; ++i) {
    if (std::isnan(output[i]) != std::isnan(expected[i])) return false;
    if (std::fabs(output[i] - expected[i]) > 1e-4f * (1 + std::fabs(expected[i]))) return false;
  }
  return true;
}

}  // namespace

int main() {
  std::mt19937 random(0);
  int64_t cases = 0;
  for (int64_t i = 0; i < 1500; ++i) {
    auto draw = [&](int64_t low, int64_t high) {
      return low + static_cast<int64_t>(random() % (high - low + 1));
    };
    const bool maps = i % 3 == 0;
    ConvShape s{};
    s.batch = draw(1, 3), s.groups = maps ? 1 : draw(1, 3);
    s.in_channels = s.groups * (maps ? draw(10, 40) : draw(1, 9));
    s.out_channels = s.groups * (maps ? draw(1, 40) : draw(1, 9));
    s.height = draw(1, 12), s.width = draw(1, 12);
    s.kernel_h = maps ? 3 : draw(1, 4), s.kernel_w = maps ? 3 : draw(1, 4);
    s.stride_h = draw(1, 3), s.stride_w = draw(1, 3);
    s.dilation_h = maps ? 1 : draw(1, 2), s.dilation_w = maps ? 1 : draw(1, 2);
    s.pad_top = draw(0, 5), s.pad_left = draw(0, 5);
    const int64_t room_h = s.height + s.pad_top + draw(0, 5) - s.dilation_h * (s.kernel_h - 1) - 1;
    const int64_t room_w = s.width + s.pad_left + draw(0, 5) - s.dilation_w * (s.kernel_w - 1) - 1;
    if (room_h < 0 || room_w < 0) continue;
    s.out_h = room_h / s.stride_h + 1, s.out_w = room_w / s.stride_w + 1;
    if (!check(s, random(), maps, random)) {
      std::printf("wrong: C %ld -> %ld, groups %ld, %ldx%ld, kernel %ldx%ld, stride %ldx%ld, pad %ldx%ld\n",
                  s.in_channels, s.out_channels, s.groups, s.height, s.width, s.kernel_h, s.kernel_w,
                  s.stride_h, s.stride_w, s.pad_top, s.pad_left);
      return 1;
    }
    ++cases;
  }
  std::printf("%ld cases\n", cases);
  return cases > 1000 ? 0 : 1;
}
