// The direct masked convolution over a grid of shapes, under AddressSanitizer and UBSan, without PyTorch.
// Every buffer has exactly the size that the tensors have, so one step too far is a fault; every sum counts
// its multiply-adds, so work on a closed channel is a failure.
#include "shared/masked_conv2d.h"

#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <memory>
#include <random>
#include <vector>

namespace {

int64_t multiplications = 0;

// A float that counts how often it is multiplied.
struct Counted {
  float value;
  Counted() = default;
  explicit Counted(double v) : value(static_cast<float>(v)) {}
  Counted& operator+=(Counted other) {
    value += other.value;
    return *this;
  }
  friend Counted operator*(Counted a, Counted b) {
    ++multiplications;
    return Counted(a.value * b.value);
  }
  friend bool operator<(Counted a, Counted b) { return a.value < b.value; }
};

struct Case {
  gatedconv::ConvShape shape;
  bool per_sample, bias, residual, relu, channels_last;
};

[[noreturn]] void fail(const char* what, const gatedconv::ConvShape& s) {
  std::printf(
      "%s: N %ld C %ld -> %ld, %ldx%ld, kernel %ldx%ld, stride %ld, pad %ld, dilation %ld, groups %ld\n",
      what, s.batch, s.in_channels, s.out_channels, s.height, s.width, s.kernel_h, s.kernel_w, s.stride_h,
      s.pad_top, s.dilation_h, s.groups);
  std::exit(1);
}

gatedconv::Strides4 strides(int64_t c, int64_t h, int64_t w, bool channels_last) {
  if (channels_last) return {c * h * w, 1, w * c, c};
  return {c * h * w, h * w, w, 1};
}

std::unique_ptr<Counted[]> filled(int64_t count, std::mt19937& random) {
  std::unique_ptr<Counted[]> data(new Counted[count]);
  std::normal_distribution<float> normal;
  for (int64_t i = 0; i < count; ++i) data[i] = Counted(normal(random));
  return data;
}

void check(const Case& c, std::mt19937& random) {
  const gatedconv::ConvShape& s = c.shape;
  const int64_t per_group = s.in_channels / s.groups, rows = s.out_channels / s.groups;
  auto input = filled(s.batch * s.in_channels * s.height * s.width, random);
  auto weight = filled(s.out_channels * per_group * s.kernel_h * s.kernel_w, random);
  auto bias = filled(s.out_channels, random);
  const int64_t outputs = s.batch * s.out_channels * s.out_h * s.out_w;
  auto residual = filled(outputs, random);
  std::unique_ptr<Counted[]> output(new Counted[outputs]);
  const int64_t masks = c.per_sample ? s.batch * s.out_channels : s.out_channels;
  std::unique_ptr<bool[]> out_open(new bool[masks]), in_open(new bool[s.in_channels]);
  for (int64_t i = 0; i < masks; ++i) out_open[i] = random() % 2;
  for (int64_t i = 0; i < s.in_channels; ++i) in_open[i] = random() % 3 > 0;
  std::unique_ptr<int32_t[]> index(new int32_t[s.in_channels]), offset(new int32_t[s.groups + 1]);
  gatedconv::list_open_inputs(in_open.get(), s.in_channels, s.groups, index.get(), offset.get());
  const gatedconv::ConvTensors<Counted> t{input.get(),
                                          weight.get(),
                                          c.bias ? bias.get() : nullptr,
                                          c.residual ? residual.get() : nullptr,
                                          output.get(),
                                          out_open.get(),
                                          index.get(),
                                          offset.get(),
                                          strides(s.in_channels, s.height, s.width, c.channels_last),
                                          strides(per_group, s.kernel_h, s.kernel_w, false),
                                          strides(s.out_channels, s.out_h, s.out_w, c.channels_last),
                                          strides(s.out_channels, s.out_h, s.out_w, c.channels_last),
                                          c.per_sample ? s.out_channels : 0,
                                          c.relu};
  for (int64_t n = 0; n < s.batch; ++n) {
    for (int64_t oc = 0; oc < s.out_channels; ++oc) {
      for (int64_t p = 0; p < s.out_h; ++p) {
        for (int64_t q = 0; q < s.out_w; ++q) {
          // The definition, tap by tap, in double.
          double sum = 0;
          int64_t taps = 0;
          const bool open = out_open[(c.per_sample ? n * s.out_channels : 0) + oc];
          for (int64_t i = 0; open && i < per_group; ++i) {
            const int64_t ic = oc / rows * per_group + i;
            for (int64_t k = 0; in_open[ic] && k < s.kernel_h * s.kernel_w; ++k) {
              const int64_t y = p * s.stride_h - s.pad_top + k / s.kernel_w * s.dilation_h;
              const int64_t x = q * s.stride_w - s.pad_left + k % s.kernel_w * s.dilation_w;
              if (y < 0 || y >= s.height || x < 0 || x >= s.width) continue;
              ++taps;
              const gatedconv::Strides4& is = t.input_strides;
              sum += static_cast<double>(input[n * is.n + ic * is.c + y * is.h + x * is.w].value) *
                     weight[(oc * per_group + i) * s.kernel_h * s.kernel_w + k].value;
            }
          }
          if (open && c.bias) sum += bias[oc].value;
          const gatedconv::Strides4& os = t.output_strides;
          const int64_t at = n * os.n + oc * os.c + p * os.h + q * os.w;
          if (c.residual) sum += residual[at].value;
          if (c.relu && sum < 0) sum = 0;
          multiplications = 0;
          gatedconv::write_output(s, t, n, oc, p, q);
          if (multiplications != taps) fail("work on a closed or padded tap", s);
          if (std::fabs(output[at].value - sum) > 1e-4 * (1 + std::fabs(sum))) fail("wrong value", s);
        }
      }
    }
  }
}

}  // namespace

int main() {
  std::mt19937 random(0);
  int64_t cases = 0;
  for (int64_t groups : {1, 2, 3}) {
    for (int64_t kernel : {1, 2, 3, 5}) {
      for (int64_t stride : {1, 2, 3}) {
        for (int64_t dilation : {1, 2}) {
          for (int64_t pad : {0, 1, 2, 7}) {
            for (int64_t size : {1, 4, 7}) {
              gatedconv::ConvShape s{};
              s.batch = 2, s.groups = groups;
              s.in_channels = groups * (1 + static_cast<int64_t>(random() % 3));
              s.out_channels = groups * (1 + static_cast<int64_t>(random() % 3));
              s.height = size, s.width = size + 1;
              s.kernel_h = kernel, s.kernel_w = kernel;
              s.stride_h = stride, s.stride_w = stride, s.pad_top = pad, s.pad_left = pad;
              s.dilation_h = dilation, s.dilation_w = dilation;
              const int64_t room_h = s.height + 2 * pad - dilation * (kernel - 1) - 1;
              const int64_t room_w = s.width + 2 * pad - dilation * (kernel - 1) - 1;
              if (room_h < 0 || room_w < 0) continue;
              s.out_h = room_h / stride + 1, s.out_w = room_w / stride + 1;
              const auto bits = random();
              check({s, !!(bits & 1), !!(bits & 2), !!(bits & 4), !!(bits & 8), !!(bits & 16)}, random);
              ++cases;
            }
          }
        }
      }
    }
  }
  std::printf("%ld cases\n", cases);
  return cases > 500 ? 0 : 1;
}
