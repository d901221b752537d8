// Opens any bytes as a plan and runs what opens: for libFuzzer, under AddressSanitizer and UBSan (see
// run.sh).
//
// Built with FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION the reader does not compare the checksum, so that
// mutated programs get as far as the checks behind it.
#include <cstring>
#include <random>
#include <vector>

#include "gatedconv_plan.h"

extern "C" size_t LLVMFuzzerMutate(uint8_t* data, size_t size, size_t most);

namespace {

constexpr int64_t kMostBytes = 16 << 20;  // of maps and of the output: more says nothing new, slowly

void run(const gatedconv_plan* plan, int64_t images, int64_t height, int64_t width) {
  int64_t size[4], out[4];
  gatedconv_plan_input_size(plan, size);
  size[0] = images;
  if (height > 0) size[2] = height, size[3] = width;
  if (gatedconv_plan_output_size(plan, size, out) < 0) return;
  const int64_t room = kMostBytes / 4, area = out[2] * out[3];
  if (size[1] * size[2] > room || size[1] * size[2] * size[3] > room || area > room || out[1] * area > room ||
      gatedconv_plan_workspace(plan, size, 1) > kMostBytes) {
    return;
  }
  const std::vector<float> input(static_cast<size_t>(images * size[1] * size[2] * size[3]), 0.5f);
  std::vector<float> output(static_cast<size_t>(images * out[1] * area));
  gatedconv_plan_run(plan, input.data(), size, nullptr, output.data(), static_cast<int64_t>(output.size()),
                     1);
}

}  // namespace

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  gatedconv_plan* plan = gatedconv_plan_open_memory(data, size);
  if (!plan) return 0;
  int64_t example[4];
  char text[64];
  gatedconv_plan_input_size(plan, example);
  gatedconv_plan_describe(plan, example, 1, text, sizeof(text));
  gatedconv_plan_metadata(plan, "classes");
  run(plan, 1, 0, 0);
  run(plan, 2, 7, 5);
  gatedconv_plan_release();  // the next run's memory is its own, with guards around it
  gatedconv_plan_close(plan);
  return 0;
}

// Half of the time one number of the program is replaced; its other bytes, and the header, are libFuzzer's to
// change.
extern "C" size_t LLVMFuzzerCustomMutator(uint8_t* data, size_t size, size_t most, unsigned seed) {
  std::minstd_rand draw(seed);
  uint64_t header = 0;
  if (size > 8) std::memcpy(&header, data, 8);
  if (draw() % 2 || size < 64 || header > size - 48) return LLVMFuzzerMutate(data, size, most);
  const size_t numbers = (size - 8 - header) / 8;
  const auto place = [&] { return data + 8 + header + 8 * (draw() % numbers); };
  uint64_t value;  // that may wrap around
  uint8_t* at = place();
  std::memcpy(&value, at, 8);
  switch (draw() % 5) {
    case 0:
      value = uint64_t{draw() % 40} - 2;
      break;
    case 1:
      std::memcpy(&value, place(), 8);
      break;
    case 2:
      value += draw() % 2 ? 1 : ~uint64_t{0};
      break;
    case 3:
      value = uint64_t{1} << draw() % 64;
      break;
    default:
      value *= 2;
  }
  std::memcpy(at, &value, 8);
  return size;
}
