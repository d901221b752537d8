// Runs one image through a small network on one thread; the instructions of gatedconv::run are what is
// counted.
#include <cstdio>
#include <vector>

#include "cpu/plan.h"

using namespace gatedconv;

namespace {

struct Builder {
  std::vector<int64_t> maps, steps;
  int64_t floats = 0, count = 0;

  int64_t map(int64_t channels, int64_t pixel, int64_t halo, int64_t multiple) {
    const int64_t index = static_cast<int64_t>(maps.size()) / kMapFields;
    maps.insert(maps.end(), {channels, pixel, halo, multiple, index, 0});
    return index;
  }
  void step(Op op, int64_t in, int64_t out, int64_t residual = -1, int64_t kernel = 1, int64_t stride = 1,
            int64_t channels = 0, int64_t outputs = 0, int64_t points = 0) {
    const int64_t pad = kernel / 2, weights = floats, size = (outputs + 15) / 16 * 16;
    floats += size * channels * points;
    const int64_t bias = floats;
    floats += size;
    const int64_t act = static_cast<int64_t>(channels ? Act::kRelu : Act::kNone);
    const int64_t fields[kStepFields] = {static_cast<int64_t>(op),
                                         in,
                                         out,
                                         residual,
                                         act,
                                         kernel,
                                         kernel,
                                         stride,
                                         stride,
                                         pad,
                                         pad,
                                         pad,
                                         pad,
                                         1,
                                         1,
                                         weights,
                                         bias,
                                         channels,
                                         0,
                                         0,
                                         0,
                                         0,
                                         -1};
    steps.insert(steps.end(), fields, fields + kStepFields);
    ++count;
  }
  std::vector<int64_t> program() const {
    std::vector<int64_t> all = {kVersion, static_cast<int64_t>(maps.size()) / kMapFields, count, 0};
    all.insert(all.end(), maps.begin(), maps.end());
    all.insert(all.end(), steps.begin(), steps.end());
    all[3] = static_cast<int64_t>(all.size());
    all.push_back(0);
    return all;
  }
};

}  // namespace

int main() {
  Builder net;
  const int64_t image = net.map(3, 3, 1, 1), a = net.map(16, 16, 1, 4), b = net.map(11, 16, 1, 4);
  const int64_t c = net.map(16, 16, 1, 1), d = net.map(32, 32, 1, 2), e = net.map(32, 32, 0, 1);
  const int64_t f = net.map(32, 32, 0, 1), g = net.map(10, 16, 0, 1);
  net.step(Op::kInput, -1, image);
  net.step(Op::kConv, image, a, -1, 3, 1, 3, 16, 9);
  net.step(Op::kWinograd4, a, b, -1, 3, 1, 16, 11, 36);
  net.step(Op::kWinograd4, b, c, a, 3, 1, 11, 16, 36);
  net.step(Op::kConv, c, d, -1, 3, 2, 16, 32, 9);
  net.step(Op::kWinograd2, d, e, -1, 3, 1, 32, 32, 16);
  net.step(Op::kMeanPool, e, f);
  net.step(Op::kConv, f, g, -1, 1, 1, 32, 10, 1);
  net.step(Op::kOutput, g, -1);
  const std::vector<int64_t> program = net.program();
  const std::vector<float> weights(net.floats, 0.01f), pixels(3 * 32 * 32, 0.5f);
  std::vector<float> out(10);
  const char* error = nullptr;
  const Kernels* kernels = choose_kernels(&error);
  const Input input{pixels.data(), {1, 3, 32, 32}, {3072, 1024, 32, 1}};
  Plan plan;
  if (!error) error = decode(program.data(), program.size(), weights.data(), weights.size(), input, plan);
  if (error || !run(plan, *kernels, input, out.data(), 1)) {
    std::printf("%s\n", error ? error : "no memory");
    return 1;
  }
  std::printf("%s %g\n", kernels->name, out[0]);
  return 0;
}
