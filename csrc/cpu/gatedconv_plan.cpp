#include "gatedconv_plan.h"

#include <algorithm>
#include <array>
#include <charconv>
#include <cinttypes>
#include <cstdarg>
#include <cstdio>
#include <cstring>
#include <new>
#include <string>
#include <thread>

#include "plan.h"
#include "plan_file.h"
#include "worker_pool.h"
#include "workspace.h"

struct gatedconv_plan {
  gatedconv::PlanFile file;
  int64_t input[4];
  int rank;  // of the output
};

namespace {

using namespace gatedconv;

// The most images of a call, and the most floats of a tensor: its bytes still have an address.
constexpr int64_t kMostImages = INT32_MAX, kMostFloats = INT64_MAX / 64;

// Its size is fixed, so that there is room for the reason when memory has run out.
thread_local char last_error[1024];

// Runs the body of a function of the interface; `failed` is what the function returns where it cannot do its
// work.
template <typename Result, typename Body>
Result guarded(Result failed, const char* where, Body body) noexcept {
  try {
    return body();
  } catch (const FileError& error) {
    std::snprintf(last_error, sizeof(last_error), "%.800s%s%s", where ? where : "", where ? ": " : "",
                  error.what());
  } catch (const std::exception&) {  // std::bad_alloc and std::length_error
    std::strcpy(last_error, "no memory");
  }
  return failed;
}

[[noreturn]] void fail(const std::string& why) {
  throw FileError(why);
}

std::string text_of(const int64_t size[4]) {
  std::string text;
  for (int i = 0; i < 4; ++i) text += (i ? " x " : "") + std::to_string(size[i]);
  return text;
}

int64_t count(const int64_t size[4]) {
  int64_t floats = 1;
  for (int i = 0; i < 4; ++i) {
    if (size[i] < 0 || __builtin_mul_overflow(floats, std::max<int64_t>(size[i], 1), &floats) ||
        floats > kMostFloats) {
      fail("a tensor of " + text_of(size) + " is too large");
    }
  }
  return size[0] == 0 ? 0 : floats;
}

const Kernels& kernels() {
  const char* error = nullptr;
  const Kernels* found = choose_kernels(&error);
  if (!found) fail(error);
  return *found;
}

int worker_count(int threads) {
  if (threads < 0) fail("threads must be at least 0, got " + std::to_string(threads));
  return std::clamp(threads ? threads : static_cast<int>(std::thread::hardware_concurrency()), 1, 64);
}

Input input_of(const int64_t size[4], const float* data = nullptr, const int64_t* stride = nullptr) {
  if (size[0] < 0 || size[0] > kMostImages)
    fail("a batch of " + std::to_string(size[0]) + " images is too large");
  count(size);
  const int64_t contiguous[4] = {size[1] * size[2] * size[3], size[2] * size[3], size[3], 1};
  Input input{data, {}, {}};
  std::copy(size, size + 4, input.size);
  std::copy(stride ? stride : contiguous, (stride ? stride : contiguous) + 4, input.stride);
  return input;
}

Plan decode_for(const gatedconv_plan& plan, const Input& input) {
  if (input.size[1] != plan.input[1]) {
    fail("the input must have " + std::to_string(plan.input[1]) + " channels, got " + text_of(input.size));
  }
  Plan decoded;
  const PlanFile& file = plan.file;
  const char* error = decode(file.program.data(), static_cast<int64_t>(file.program.size()),
                             file.weights.get(), file.weights_size, input, decoded);
  if (error) fail("for an input of " + text_of(input.size) + " " + error);
  if (plan.rank == 2 && (decoded.out_height != 1 || decoded.out_width != 1)) {
    fail("for an input of " + text_of(input.size) + " the output is no vector: the network is made for " +
         text_of(plan.input));
  }
  return decoded;
}

struct Size {
  int64_t of[4];
  int64_t floats;
};

Size output_of(const Plan& decoded, int64_t images) {
  Size size{{images, decoded.out_channels, decoded.out_height, decoded.out_width}, 0};
  size.floats = count(size.of);
  return size;
}

// Whole numbers with a blank between them.
std::array<int64_t, 4> numbers(const PlanFile& file, const char* key, int wanted) {
  std::array<int64_t, 4> values{};
  const auto found = file.metadata.find(key);
  if (found == file.metadata.end()) fail("the header is damaged");
  const char *at = found->second.data(), *end = at + found->second.size();
  for (int i = 0; i < wanted; ++i) {
    if (i > 0 && (at == end || *at++ != ' ')) fail("the header is damaged");
    const auto [next, error] = std::from_chars(at, end, values[static_cast<size_t>(i)]);
    if (error != std::errc()) fail("the header is damaged");
    at = next;
  }
  if (at != end) fail("the header is damaged");
  return values;
}

gatedconv_plan* open_plan(PlanFile file) {
  auto plan = std::make_unique<gatedconv_plan>();
  plan->file = std::move(file);
  const auto input = numbers(plan->file, "input", 4);
  std::copy(input.begin(), input.end(), plan->input);
  plan->rank = static_cast<int>(numbers(plan->file, "rank", 1)[0]);
  if (plan->rank != 2 && plan->rank != 4) fail("the header is damaged");
  decode_for(*plan, input_of(plan->input));  // whatever is wrong with the program is found here
  return plan.release();
}

const char* const kOps[] = {"input",
                            "output",
                            "conv",
                            "winograd F(2x2)",
                            "winograd F(4x4)",
                            "depthwise",
                            "max_pool",
                            "avg_pool",
                            "mean_pool",
                            "gather",
                            "scatter_add",
                            "subsample",
                            "add",
                            "fill",
                            "multiply",
                            "view",
                            "copy",
                            "adaptive_max_pool",
                            "adaptive_avg_pool",
                            "nearest",
                            "bilinear",
                            "pixel_shuffle",
                            "layer_norm",
                            "group_norm",
                            "softmax",
                            "prelu"};
const char* const kActs[] = {"",     "relu",       "relu6",        "leaky_relu", "elu",
                             "silu", "hard_swish", "hard_sigmoid", "sigmoid",    "tanh",
                             "gelu", "gelu_tanh",  "mish"};
static_assert(std::size(kOps) == size_t(Op::kPrelu) + 1 && std::size(kActs) == size_t(Act::kMish) + 1);

__attribute__((format(printf, 2, 3))) void append(std::string& text, const char* format, ...) {
  char line[256];
  va_list arguments;
  va_start(arguments, format);
  std::vsnprintf(line, sizeof(line), format, arguments);
  va_end(arguments);
  text += line;
}

// Multiply-adds of a layer for one image, as the direct sum would need them.
int64_t macs_of(const Step& step) {
  if (step.op < Op::kConv || step.op > Op::kDepthwise) return 0;
  const int64_t reads = step.op == Op::kDepthwise ? 1 : step.span;
  return reads * step.kernel_h * step.kernel_w * step.out.channels * step.out.height * step.out.width;
}

void append_step(std::string& text, const Step& step) {
  const Act act = step.late != Act::kNone ? step.late : step.act;
  char maps[80], what[80];
  std::snprintf(maps, sizeof(maps), "%dx%dx%d -> %dx%dx%d", step.in.channels, step.in.height, step.in.width,
                step.out.channels, step.out.height, step.out.width);
  std::snprintf(what, sizeof(what), "%s %dx%d", kOps[size_t(step.op)], step.kernel_h, step.kernel_w);
  const bool window = step.op >= Op::kConv && step.op <= Op::kAvgPool;
  append(text, "  %-28s %s", maps, window ? what : kOps[size_t(step.op)]);
  if (window && (step.stride_h != 1 || step.stride_w != 1)) append(text, " stride %d", step.stride_h);
  if (in_bf16(step)) text += " in bf16";
  if (step.changes_input) text += step.gate.exists() ? " of gated input" : " of normed input";
  if (window && step.residual.exists()) text += " + residual";
  if (act != Act::kNone) append(text, " + %s", kActs[size_t(act)]);
  const int64_t macs = macs_of(step);
  if (macs > 0) append(text, "; %.2f M MACs", static_cast<double>(macs) / 1e6);
  text += '\n';
}

std::string describe(const gatedconv_plan& plan, const int64_t size[4], int threads) {
  const Plan decoded = decode_for(plan, input_of(size));
  const Kernels& isa = kernels();
  const int workers = worker_count(threads);
  std::string text = "Plan for inputs of " + text_of(size);
  append(text, "; %s, %d thread%s", isa.name, workers, workers == 1 ? "" : "s");
  const bool halves = std::any_of(decoded.steps.begin(), decoded.steps.end(), in_bf16);
  if (halves) append(text, "; bf16: %s", bf16_name(isa));
  text += ".\n";
  int64_t macs = 0;
  for (const Step& step : decoded.steps) {
    if (step.op == Op::kInput || step.op == Op::kOutput) continue;
    append_step(text, step);
    macs += macs_of(step);
  }
  append(text, "  in all %.2f M MACs an image, weights %.2f MiB, workspace %.2f MiB",
         static_cast<double>(macs) / 1e6, 4.0 * static_cast<double>(plan.file.weights_size) / (1 << 20),
         static_cast<double>(workspace_bytes(decoded, isa, size[0], workers)) / (1 << 20));
  return text;
}

}  // namespace

extern "C" {

int gatedconv_plan_version(void) {
  return GATEDCONV_PLAN_VERSION;
}

int gatedconv_plan_file_version(void) {
  return GATEDCONV_PLAN_FILE_VERSION;
}

const char* gatedconv_plan_error(void) {
  return last_error;
}

gatedconv_plan* gatedconv_plan_open(const char* path) {
  return guarded<gatedconv_plan*>(nullptr, path, [&] {
    if (!path) fail("no path");
    return open_plan(read_plan_file(path));
  });
}

gatedconv_plan* gatedconv_plan_open_memory(const void* bytes, size_t size) {
  return guarded<gatedconv_plan*>(nullptr, nullptr, [&] {
    if (!bytes) fail("no bytes");
    return open_plan(read_plan_file(bytes, size));
  });
}

void gatedconv_plan_close(gatedconv_plan* plan) {
  delete plan;
}

void gatedconv_plan_input_size(const gatedconv_plan* plan, int64_t size[4]) {
  std::copy(plan->input, plan->input + 4, size);
}

int gatedconv_plan_output_size(const gatedconv_plan* plan, const int64_t input[4], int64_t output[4]) {
  return guarded(-1, nullptr, [&] {
    const Size size = output_of(decode_for(*plan, input_of(input)), input[0]);
    std::copy(size.of, size.of + 4, output);
    return plan->rank;
  });
}

int64_t gatedconv_plan_workspace(const gatedconv_plan* plan, const int64_t input[4], int threads) {
  return guarded<int64_t>(-1, nullptr, [&] {
    return workspace_bytes(decode_for(*plan, input_of(input)), kernels(), input[0], worker_count(threads));
  });
}

int gatedconv_plan_run(const gatedconv_plan* plan, const float* input, const int64_t size[4],
                       const int64_t stride[4], float* output, int64_t output_floats, int threads) {
  return gatedconv_plan_run_on(plan, input, size, stride, output, output_floats, threads, nullptr, nullptr);
}

int gatedconv_plan_run_on(const gatedconv_plan* plan, const float* input, const int64_t size[4],
                          const int64_t stride[4], float* output, int64_t output_floats, int threads,
                          gatedconv_parallel_for parallel_for, void* user) {
  const ThreadsInUse in_use(parallel_for, user);
  return guarded(-1, nullptr, [&] {
    const Input source = input_of(size, input, stride);
    const Plan decoded = decode_for(*plan, source);
    const int64_t floats = output_of(decoded, size[0]).floats;
    if (output_floats != floats) {
      fail("the output has " + std::to_string(floats) + " floats, and there is room for " +
           std::to_string(output_floats));
    }
    if (!run(decoded, kernels(), source, output, worker_count(threads))) throw std::bad_alloc();
    return 0;
  });
}

const char* gatedconv_plan_metadata(const gatedconv_plan* plan, const char* key) {
  return guarded<const char*>(nullptr, nullptr, [&]() -> const char* {
    const auto found = plan->file.metadata.find(key);
    return found == plan->file.metadata.end() ? nullptr : found->second.c_str();
  });
}

int64_t gatedconv_plan_describe(const gatedconv_plan* plan, const int64_t input[4], int threads, char* text,
                                int64_t room) {
  return guarded<int64_t>(-1, nullptr, [&] {
    const std::string all = describe(*plan, input, threads);
    if (room > 0) {
      const size_t length = std::min(all.size(), static_cast<size_t>(room - 1));
      std::memcpy(text, all.data(), length);
      text[length] = '\0';
    }
    return static_cast<int64_t>(all.size());
  });
}

const char* gatedconv_plan_isa(void) {
  return guarded<const char*>(nullptr, nullptr, [&] { return kernels().name; });
}

int64_t gatedconv_plan_release(void) {
  return Workspace::release();
}

}  // extern "C"
