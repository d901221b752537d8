// Runs hand-written programs on every instruction set and compares them with sums written out here.
#include "cpu/plan.h"

#include <sys/wait.h>
#include <unistd.h>

#include <array>
#include <atomic>
#include <bit>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <thread>
#include <vector>

#include "cpu/plan_bands.h"
#include "cpu/plan_schedule.h"
#include "cpu/workspace.h"

using namespace gatedconv;

namespace {

int failures = 0;

float noise(uint32_t& state) {
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(state)) / 2147483648.0f;
}

std::vector<float> random_floats(size_t count, uint32_t seed) {
  std::vector<float> values(count);
  for (float& value : values) value = noise(seed);
  return values;
}

struct Case {
  int batch, channels, outputs, height, width, kernel, stride, pad;
  bool residual;
  Op op;
  bool bf16 = false;
};

// relu(conv(x) [+ x]) by its definition; x (N, C, H, W), w (O, C, K, K).
std::vector<float> reference(const Case& c, const std::vector<float>& x, const std::vector<float>& w,
                             int high, int wide) {
  std::vector<float> out(static_cast<size_t>(c.batch) * c.outputs * high * wide);
  size_t at = 0;
  for (int n = 0; n < c.batch; ++n)
    for (int o = 0; o < c.outputs; ++o)
      for (int p = 0; p < high; ++p)
        for (int q = 0; q < wide; ++q, ++at) {
          double sum = 0.25 * o;
          for (int i = 0; i < c.channels; ++i)
            for (int a = 0; a < c.kernel; ++a)
              for (int b = 0; b < c.kernel; ++b) {
                const int y = p * c.stride - c.pad + a, z = q * c.stride - c.pad + b;
                if (y < 0 || z < 0 || y >= c.height || z >= c.width) continue;
                sum += static_cast<double>(x[((n * c.channels + i) * c.height + y) * c.width + z]) *
                       w[((o * c.channels + i) * c.kernel + a) * c.kernel + b];
              }
          if (c.residual) sum += x[((n * c.channels + o) * c.height + p) * c.width + q];
          out[at] = sum > 0 ? static_cast<float>(sum) : 0.0f;
        }
  return out;
}

// G w G^T of the interpolation points that csrc/cpu/conv_winograd.h names.
double point_row(int tile, int row, int column) {
  const std::vector<double> points =
      tile == 2 ? std::vector<double>{0, 1, -1} : std::vector<double>{0, 0.75, -0.75, 1.5, -1.5};
  if (row == tile + 1) return column == 2;
  double scale = 1;
  for (size_t k = 0; k < points.size(); ++k)
    scale *= static_cast<int>(k) == row ? 1 : points[row] - points[k];
  return std::pow(points[row], column) / scale;
}

std::vector<float> pack(const Case& c, const std::vector<float>& w) {
  const int tile = c.op == Op::kWinograd2 ? 2 : c.op == Op::kWinograd4 ? 4 : 0;
  const int side = tile ? tile + 2 : c.kernel, panels = (c.outputs + 15) / 16;
  std::vector<float> packed(static_cast<size_t>(panels) * side * side * c.channels * 16);
  for (int o = 0; o < c.outputs; ++o)
    for (int i = 0; i < c.channels; ++i)
      for (int a = 0; a < side; ++a)
        for (int b = 0; b < side; ++b) {
          double value = 0;
          const float* kernel = &w[(o * c.channels + i) * c.kernel * c.kernel];
          for (int k = 0; k < c.kernel * c.kernel; ++k) {
            const int row = k / c.kernel, column = k % c.kernel;
            value += kernel[k] * (tile ? point_row(tile, a, row) * point_row(tile, b, column)
                                       : (row == a && column == b));
          }
          packed[(((o / 16 * side + a) * side + b) * c.channels + i) * 16 + o % 16] =
              static_cast<float>(value);
        }
  return packed;
}

// The upper half of a float: a bfloat16, and what is left when the lower half is zero.
uint16_t upper_half(float value) {
  return static_cast<uint16_t>(std::bit_cast<uint32_t>(value) >> 16);
}
void cut_to_bf16(std::vector<float>& values) {
  for (float& value : values) value = std::bit_cast<float>(uint32_t{upper_half(value)} << 16);
}

// [panel][pairs of kh * kw * c_in, rounded up to 32][16][2], a pair in the bits of a float.
std::vector<float> pack_bf16(const Case& c, const std::vector<float>& w) {
  const int terms = c.kernel * c.kernel * c.channels, pairs = (terms + 31) / 32 * 16;
  std::vector<float> packed(static_cast<size_t>((c.outputs + 15) / 16) * pairs * 16);
  for (int o = 0; o < c.outputs; ++o)
    for (int k = 0; k < terms; ++k) {
      const int tap = k / c.channels, i = k % c.channels;
      const uint32_t half = upper_half(w[(o * c.channels + i) * c.kernel * c.kernel + tap]);
      float& pair = packed[(o / 16 * pairs + k / 2) * 16 + o % 16];
      pair = std::bit_cast<float>(std::bit_cast<uint32_t>(pair) | half << (k % 2 * 16));
    }
  return packed;
}

void check(const Kernels& kernels, const Case& c, int workers) {
  const int high = (c.height + 2 * c.pad - c.kernel) / c.stride + 1;
  const int wide = (c.width + 2 * c.pad - c.kernel) / c.stride + 1;
  std::vector<float> x = random_floats(static_cast<size_t>(c.batch) * c.channels * c.height * c.width, 1);
  std::vector<float> w = random_floats(static_cast<size_t>(c.outputs) * c.channels * c.kernel * c.kernel, 2);
  if (c.bf16) {  // what is rounded is exact then, and the products are those of float32
    cut_to_bf16(x);
    cut_to_bf16(w);
  }
  const std::vector<float> expected = reference(c, x, w, high, wide);

  // Exactly as many floats as the kernels may read: a read beyond them is an error under the sanitizer.
  std::vector<float> weights = c.bf16 ? pack_bf16(c, w) : pack(c, w);
  const int64_t bias = static_cast<int64_t>(weights.size());
  weights.resize(weights.size() + (c.outputs + 15) / 16 * 16);
  for (int o = 0; o < c.outputs; ++o) weights[bias + o] = 0.25f * o;
  const int64_t multiple = c.op == Op::kWinograd4 ? 4 : c.op == Op::kWinograd2 ? 2 : 1;
  const auto padded = [](int64_t channels) { return (channels + 15) / 16 * 16; };
  std::vector<int64_t> program = {kVersion, 2, 3, 0};
  program.insert(program.end(), {c.channels, padded(c.channels), c.pad, multiple, 0, 0});
  program.insert(program.end(), {c.outputs, padded(c.outputs), 0, 1, 1, 0});
  const auto step = [&](std::vector<int64_t> fields) {
    fields.resize(kStepFields);
    fields[kGate] = -1;
    program.insert(program.end(), fields.begin(), fields.end());
  };
  step({int64_t(Op::kInput), -1, 0, -1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1});
  step({int64_t(c.op),
        0,
        1,
        c.residual ? 0 : -1,
        int64_t(Act::kRelu),
        c.kernel,
        c.kernel,
        c.stride,
        c.stride,
        c.pad,
        c.pad,
        c.pad,
        c.pad,
        1,
        1,
        0,
        bias,
        c.channels,
        0,
        c.bf16 ? 2 : 0});
  step({int64_t(Op::kOutput), 1, -1, -1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1});
  program[3] = static_cast<int64_t>(program.size());
  program.push_back(0);

  const int64_t area = static_cast<int64_t>(c.height) * c.width;
  const Input input{
      x.data(), {c.batch, c.channels, c.height, c.width}, {c.channels * area, area, c.width, 1}};
  Plan plan;
  const char* error = decode(program.data(), program.size(), weights.data(), weights.size(), input, plan);
  std::vector<float> out(expected.size(), NAN);
  if (error || !run(plan, kernels, input, out.data(), workers)) {
    std::printf("%s\n", error ? error : "no memory");
    ++failures;
    return;
  }
  double worst = 0, largest = 0;
  for (size_t i = 0; i < out.size(); ++i) {
    worst = std::fmax(worst, std::isnan(out[i]) ? INFINITY : std::fabs(out[i] - expected[i]));
    largest = std::fmax(largest, std::fabs(expected[i]));
  }
  if (worst > 1e-5 * largest) {
    std::printf("%s op %d %d->%d %dx%d k%d s%d batch %d workers %d: error %g of %g\n", kernels.name,
                int(c.op), c.channels, c.outputs, c.height, c.width, c.kernel, c.stride, c.batch, workers,
                worst, largest);
    ++failures;
  }
}

// A layer without a second operand.
struct Layer {
  Op op;
  int64_t kernel, stride, pad, reads, outputs;
};

// Steps that run band by band give what they give one after another, bit for bit.
void check_bands(const Kernels& kernels, const std::vector<Layer>& layers, int64_t height, int64_t width,
                 int workers) {
  const int64_t batch = 2, count = static_cast<int64_t>(layers.size());
  std::vector<int64_t> program = {kVersion, count + 1, count + 2, 0};
  const auto append = [&](std::vector<int64_t> fields, size_t size) {
    fields.resize(size);
    program.insert(program.end(), fields.begin(), fields.end());
  };
  const auto end = [&](Op op, int64_t in, int64_t out) {
    append({int64_t(op), in, out, -1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 0, 0, -1}, kStepFields);
  };
  append({4, 4, layers[0].pad, 1, 0, 0}, kMapFields);
  for (int64_t i = 0; i < count; ++i) {
    const int64_t pixel = (layers[i].outputs + 15) / 16 * 16;
    append({layers[i].outputs, pixel, i + 1 < count ? layers[i + 1].pad : 0, 1, i + 1, 0}, kMapFields);
  }
  end(Op::kInput, -1, 0);
  int64_t floats = 0;
  for (int64_t i = 0; i < count; ++i) {
    const auto& [op, k, s, p, reads, outputs] = layers[i];
    std::vector<int64_t> fields = {int64_t(op), i, i + 1, -1, int64_t(Act::kRelu6), k, k, s, s, p, p,
                                   p,           p, 1,     1};
    fields.resize(kStepFields);
    fields[kWeights] = floats;
    fields[kBias] = floats + (outputs + 15) / 16 * 16 * k * k * reads;
    fields[kSpan] = reads;
    fields[kGate] = -1;
    floats = fields[kBias] + (outputs + 15) / 16 * 16;
    append(fields, kStepFields);
  }
  end(Op::kOutput, count, -1);
  program[3] = static_cast<int64_t>(program.size());
  program.push_back(0);
  const std::vector<float> weights = random_floats(static_cast<size_t>(floats), 3);
  const std::vector<float> x = random_floats(static_cast<size_t>(batch * 4 * height * width), 4);
  const Input input{x.data(), {batch, 4, height, width}, {4 * height * width, height * width, width, 1}};
  std::vector<std::vector<float>> results;
  for (const int64_t least : {INT64_MAX, int64_t{0}}) {
    Plan plan;
    const char* error = decode(program.data(), program.size(), weights.data(), weights.size(), input, plan);
    if (error) std::printf("%s\n", error);
    mark_passing(plan, least);
    if (error || find_runs(plan).size() != (least ? layers.size() + 2 : 3u)) {
      std::printf("bands: not the runs that were expected\n");
      ++failures;
      return;
    }
    results.emplace_back(static_cast<size_t>(batch * plan.out_channels * plan.out_height * plan.out_width),
                         NAN);
    run(plan, kernels, input, results.back().data(), workers);
  }
  if (results[0] != results[1]) {
    std::printf("%s bands of %zu layers, k%d s%d, %dx%d, workers %d: the results differ\n", kernels.name,
                layers.size(), int(layers[1].kernel), int(layers[1].stride), int(height), int(width),
                workers);
    ++failures;
  }
}

// A program of 1x1 convolutions: `slots` of its maps, and for each step the map that it reads, the map that
// it writes and its stride. Steps share bands wherever they may.
const char* decode_convolutions(const std::vector<int64_t>& slots,
                                const std::vector<std::array<int64_t, 3>>& steps, Plan& plan) {
  std::vector<int64_t> program = {kVersion, int64_t(slots.size()), int64_t(steps.size()) + 2, 0};
  const auto append = [&](std::vector<int64_t> fields, size_t size) {
    fields.resize(size);
    program.insert(program.end(), fields.begin(), fields.end());
  };
  const auto step = [&](Op op, int64_t in, int64_t out, int64_t stride) {
    append({int64_t(op), in, out, -1, 0, 1, 1, stride, stride, 0, 0, 0, 0, 1, 1, 0, 0, 16, 0, 0, 0, 0, -1},
           kStepFields);
  };
  for (const int64_t slot : slots) append({16, 16, 0, 1, slot, 0}, kMapFields);
  step(Op::kInput, -1, 0, 1);
  for (const auto& [in, out, stride] : steps) step(Op::kConv, in, out, stride);
  step(Op::kOutput, steps.back()[1], -1, 1);
  program[3] = static_cast<int64_t>(program.size());
  program.push_back(0);
  static const std::vector<float> weights(16 * 16), x(16 * 20 * 20);
  const Input input{x.data(), {1, 16, 20, 20}, {16 * 400, 400, 20, 1}};
  const char* error = decode(program.data(), program.size(), weights.data(), weights.size(), input, plan);
  if (!error) mark_passing(plan, 0);
  return error;
}

// A step that reads a slot as another map than was written there last does not share bands with the step that
// wrote it, and stays inside of the slot.
void check_other_map() {
  Plan plan;
  const char* error =
      decode_convolutions({0, 1, 2, 1, 3}, {{0, 1, 1}, {1, 2, 2}, {2, 3, 1}, {1, 4, 1}}, plan);
  if (error || !plan.steps[2].out.passes || plan.steps[3].out.passes) {
    std::printf("a map that was overwritten: %s\n", error ? error : "not the runs that were expected");
    ++failures;
  }
  Plan larger;
  error = decode_convolutions({0, 1, 1, 2}, {{0, 1, 1}, {1, 2, 2}, {1, 3, 1}}, larger);
  if (error || !larger.steps[1].out.passes || 4 * larger.slot_floats[1] < map_bytes(larger.steps[3].in)) {
    std::printf("a map larger than what was written: %s\n", error ? error : "its slot is too small");
    ++failures;
  }
}

// A depthwise layer between other local ones. High maps: many bands whatever the cache.
void check_high(const Kernels& kernels, int64_t kernel, int64_t stride, int64_t pad, int64_t height,
                int workers) {
  check_bands(kernels,
              {{Op::kConv, 1, 1, 0, 4, 16},
               {Op::kDepthwise, kernel, stride, pad, 1, 16},
               {Op::kConv, 1, 2, 0, 16, 8},
               {Op::kMaxPool, 3, 1, 1, 0, 8}},
              height, 40, workers);
}

// Bands of one row, whose windows leave out rows of the map in front.
void check_wide(const Kernels& kernels, int64_t stride, int workers) {
  const int64_t room = cache_bytes() / 2 / 4;    // floats of rows between the steps
  const int64_t two = room / (16 * 2 * stride);  // where two strides of rows, for one output row, just fit
  for (const int64_t width : {two - stride, two / 2, two * 9 / 10})
    check_bands(kernels, {{Op::kConv, 1, 1, 0, 4, 16}, {Op::kConv, 1, stride, 0, 16, 8}}, 37, width, workers);
}

// A process that was forked off while another thread came and went has a workspace, too.
void check_fork() {
  std::atomic<bool> stop{false};
  std::thread other([&] {
    while (!stop) Workspace(4096);
  });
  for (int i = 0; i < 40; ++i) {
    const pid_t child = fork();
    if (child == 0) {
      alarm(20);
      const Workspace workspace(4096);
      _exit(workspace.data() ? 0 : 1);
    }
    int status = 1;
    waitpid(child, &status, 0);
    if (status != 0) {
      std::printf("a forked process has no workspace: status %d\n", status);
      ++failures;
      break;
    }
  }
  stop = true;
  other.join();
}

// A program that is cut, or full of nonsense, is refused and never read beyond its end.
void check_damage() {
  const Input input{nullptr, {1, 1, 4, 4}, {16, 16, 4, 1}};
  uint32_t state = 5;
  for (int i = 0; i < 2000; ++i) {
    std::vector<int64_t> program(4 + 2 * kMapFields + 2 * kStepFields + 1);
    for (int64_t& value : program) value = static_cast<int64_t>(noise(state) * 4);
    program[0] = kVersion;
    program[1] = 2;
    program[2] = 2;
    program[3] = static_cast<int64_t>(program.size()) - 1;
    const size_t size = i % 2 ? program.size() : static_cast<size_t>(i) % program.size();
    program.resize(size);
    Plan plan;
    float weights[4] = {};
    decode(program.data(), size, weights, 4, input, plan);
  }
}

// Programs with one field wrong, each of which would have a kernel read or write outside of its maps.
void check_refusals() {
  using Fields = std::vector<int64_t>;
  const int64_t gather = int64_t(Op::kGather), shuffle = int64_t(Op::kPixelShuffle);
  const int64_t conv = int64_t(Op::kConv), pool = int64_t(Op::kMaxPool);
  const Fields wide = {16, 16, 0, 1, 0, 0};
  const auto map = [](int64_t channels, int64_t pixel, int64_t halo, int64_t slot, int64_t offset) {
    return Fields{channels, pixel, halo, 1, slot, offset};
  };
  const auto refused = [&](const char* what, Fields first, Fields second, Fields step, Input input,
                           bool refuses = true) {
    std::vector<int64_t> program = {kVersion, 2, 3, 4 + 2 * kMapFields + 3 * kStepFields};
    const auto append = [&](Fields fields) { program.insert(program.end(), fields.begin(), fields.end()); };
    const auto append_step = [&](Fields fields) {
      fields.resize(kStepFields);
      fields[kGate] = -1;
      append(fields);
    };
    append(first);
    append(second);
    append_step({int64_t(Op::kInput), -1, 0, -1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1});
    append_step(step);
    append_step({int64_t(Op::kOutput), 1, -1, -1, 0, 1, 1, 1, 1, 0, 0, 0, 0, 1, 1});
    append({0, 16, 0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15});
    const std::vector<float> weights(4096);
    Plan plan;
    const char* error = decode(program.data(), program.size(), weights.data(), weights.size(), input, plan);
    if ((error != nullptr) != refuses) {
      std::printf("%s: %s\n", what, error ? error : "accepted");
      ++failures;
    }
  };
  const Input small{nullptr, {1, 16, 8, 8}, {1024, 64, 8, 1}};
  const auto step = [](int64_t op, int64_t residual, int64_t kernel_h, int64_t kernel_w, int64_t stride,
                       int64_t pad, int64_t index) {
    Fields fields = {op, 0, 1, residual, 0, kernel_h, kernel_w, stride, stride, pad, pad, pad, pad, 1, 1};
    fields.resize(kStepFields);
    if (op == int64_t(Op::kConv)) fields[kSpan] = 16;
    fields[kIndex] = index;
    return fields;
  };
  const Fields out = map(16, 16, 0, 1, 0), quarter = map(4, 16, 0, 1, 0), one = map(1, 16, 0, 1, 0);
  refused("a gather", wide, out, step(gather, -1, 1, 1, 1, 0, 1), small, false);
  refused("a gather with a stride", wide, out, step(gather, -1, 1, 1, 2, 0, 1), small);
  refused("a shuffle", wide, quarter, step(shuffle, -1, 2, 2, 1, 0, 0), small, false);
  refused("an oblong shuffle", wide, quarter, step(shuffle, -1, 2, 4, 1, 0, 0), small);
  refused("a shuffle to a map's size", map(1, 16, 0, 0, 0), one, step(shuffle, 0, 1, 1, 1, 0, 0),
          {nullptr, {1, 1, 8, 8}, {64, 64, 8, 1}});
  refused("an input inside of another map", map(16, 48, 0, 0, 32), out, step(pool, -1, 1, 1, 1, 0, 0), small);
  refused("a map that grows", wide, out, step(pool, -1, 1, 1, 1, 1024, 0),
          {nullptr, {1, 16, 1 << 18, 1}, {1, 1, 1, 1}});
  refused("pixels past 32 bits", wide, out, step(conv, -1, 1, 1, 1, 0, 0),
          {nullptr, {1, 16, 1 << 18, 1 << 14}, {1, 1, 1, 1}});
  refused("taps behind 32 bits", map(16, 16, 1024, 0, 0), out, step(conv, -1, 1, 1, 1, 1024, 0),
          {nullptr, {1, 16, 8, 1 << 18}, {1, 1, 1, 1}});
  Fields halves = step(conv, -1, 1, 1, 1, 0, 0);
  halves[kOption] = 2;
  refused("a convolution in bfloat16", wide, out, halves, small, false);
  halves[kOption] = 3;
  refused("an unknown convolution", wide, out, halves, small);
  halves[kOption] = 2;
  halves[kIndex] = 1;
  refused("a grouped convolution in bfloat16", wide, out, halves, small);
  refused("a padded convolution", map(16, 16, 3, 0, 0), out, step(conv, -1, 1, 1, 1, 3, 0), small, false);
}

}  // namespace

int main() {
  const Case cases[] = {
      {1, 3, 16, 9, 7, 3, 1, 1, false, Op::kConv},        {2, 5, 37, 8, 12, 3, 2, 1, false, Op::kConv},
      {3, 16, 16, 6, 6, 1, 1, 0, true, Op::kConv},        {1, 7, 7, 5, 5, 5, 1, 2, true, Op::kConv},
      {5, 9, 70, 1, 1, 1, 1, 0, false, Op::kConv},        {2, 8, 8, 9, 6, 3, 1, 1, true, Op::kWinograd2},
      {1, 20, 35, 7, 7, 3, 1, 1, false, Op::kWinograd2},  {2, 8, 8, 9, 6, 3, 1, 1, true, Op::kWinograd4},
      {9, 33, 50, 14, 5, 3, 1, 1, false, Op::kWinograd4}, {3, 64, 64, 8, 8, 3, 1, 1, true, Op::kWinograd4},
      {1, 200, 200, 7, 7, 3, 1, 1, true, Op::kConv},      {2, 250, 35, 6, 8, 1, 1, 0, false, Op::kConv},
      {4, 16, 16, 150, 150, 1, 1, 0, true, Op::kConv},    {1, 3, 16, 9, 7, 3, 1, 1, false, Op::kConv, true},
      {2, 5, 37, 8, 12, 3, 2, 1, false, Op::kConv, true}, {3, 64, 64, 23, 21, 1, 1, 0, true, Op::kConv, true},
      {1, 7, 7, 5, 5, 5, 1, 2, true, Op::kConv, true},    {5, 600, 70, 1, 1, 1, 1, 0, false, Op::kConv, true},
  };
  const char* isas[] = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};
  for (const char* isa : isas) {
    setenv("GATEDCONV_ISA", isa, 1);
    const char* error = nullptr;
    const Kernels* kernels = choose_kernels(&error);
    if (!kernels) continue;
    for (const Case& c : cases) {
      for (int workers : {1, 2, 3}) check(*kernels, c, workers);
    }
    for (int workers : {1, 2, 3}) {
      check_high(*kernels, 3, 1, 1, 640, workers);
      check_high(*kernels, 5, 2, 2, 833, workers);
      check_high(*kernels, 3, 2, 0, 900, workers);
      check_high(*kernels, 7, 1, 3, 500, workers);
      check_high(*kernels, 7, 1, 3, 5, workers);
      check_high(*kernels, 1, 3, 2, 900, workers);
      check_high(*kernels, 1, 4, 0, 900, workers);
      check_wide(*kernels, 3, workers);
      check_wide(*kernels, 4, workers);
    }
  }
  check_fork();
  check_other_map();
  check_damage();
  check_refusals();
  Workspace::release();
  return failures != 0;
}
