// The operator plan_run: a whole network in one call.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <string>

#include "plan.h"
#include "plan_bands.h"
#include "workspace.h"

namespace {

using torch::stable::Tensor;

// A program decoded for an input, and the kernels that run it here.
struct Ready {
  const gatedconv::Kernels* kernels;
  gatedconv::Input source;
  gatedconv::Plan plan;
  int workers;
};

bool is_program(const Tensor& tensor) {
  return tensor.scalar_type() == torch::headeronly::ScalarType::Long && tensor.is_contiguous();
}

Ready get_ready(const Tensor& input, const Tensor& program, const Tensor& weights, int64_t workers) {
  STD_TORCH_CHECK(input.dim() == 4 && input.scalar_type() == torch::headeronly::ScalarType::Float,
                  "plan_run: input must be float32 (N, C, H, W)");
  STD_TORCH_CHECK(is_program(program) && weights.scalar_type() == torch::headeronly::ScalarType::Float &&
                      weights.is_contiguous(),
                  "plan_run: program must be int64, weights float32, both contiguous");
  const char* error = nullptr;
  Ready ready{
      gatedconv::choose_kernels(&error), {static_cast<const float*>(input.const_data_ptr()), {}, {}}, {}, 0};
  STD_TORCH_CHECK(ready.kernels, "plan_run: ", error);
  for (int i = 0; i < 4; ++i) {
    ready.source.size[i] = input.size(i);
    ready.source.stride[i] = input.stride(i);
  }
  error = gatedconv::decode(static_cast<const int64_t*>(program.const_data_ptr()), program.numel(),
                            static_cast<const float*>(weights.const_data_ptr()), weights.numel(),
                            ready.source, ready.plan);
  STD_TORCH_CHECK(!error, "plan_run: ", error);
  if (workers < 1) workers = torch::stable::get_num_threads();
  ready.workers = static_cast<int>(std::min<int64_t>(workers, 64));
  return ready;
}

void run_ready(const Ready& ready, Tensor& output, double* seconds = nullptr) {
  const bool ran = gatedconv::run(ready.plan, *ready.kernels, ready.source,
                                  static_cast<float*>(output.mutable_data_ptr()), ready.workers, seconds);
  STD_TORCH_CHECK(ran, "plan_run: no memory");
}

Tensor plan_run(const Tensor& input, const Tensor& program, const Tensor& weights, std::vector<int64_t> shape,
                int64_t workers) {
  STD_TORCH_CHECK(shape.size() >= 2 && (shape[1] == 2 || shape[1] == 4), "plan_run: shape is cut short");
  const Ready ready = get_ready(input, program, weights, workers);
  const gatedconv::Plan& plan = ready.plan;
  std::vector<int64_t> size{ready.source.size[0], plan.out_channels};
  if (shape[1] == 4) {
    size.insert(size.end(), {plan.out_height, plan.out_width});
  } else {
    STD_TORCH_CHECK(plan.out_height == 1 && plan.out_width == 1, "plan_run: the output is no vector");
  }
  Tensor output = torch::stable::new_empty(input, size);
  run_ready(ready, output);
  return output;
}

// Milliseconds of every step, all workers at each.
Tensor plan_times(const Tensor& input, const Tensor& program, const Tensor& weights, int64_t workers) {
  Ready ready = get_ready(input, program, weights, workers);
  gatedconv::mark_passing(ready.plan, INT64_MAX);  // every step by itself
  const gatedconv::Plan& plan = ready.plan;
  Tensor output = torch::stable::new_empty(
      input, {ready.source.size[0], plan.out_channels, plan.out_height, plan.out_width});
  const auto steps = static_cast<int64_t>(plan.steps.size());
  Tensor times = torch::stable::new_empty(input, {steps}, torch::headeronly::ScalarType::Double);
  double* spent = static_cast<double*>(times.mutable_data_ptr());
  std::fill_n(spent, steps, 0.0);
  run_ready(ready, output, spent);  // in seconds
  for (int64_t i = 0; i < steps; ++i) spent[i] *= 1000;
  return times;
}

// The program decoded for an input of a size, without weights: to be looked at, not to be run.
gatedconv::Plan get_plan(const std::vector<int64_t>& size, const Tensor& program) {
  STD_TORCH_CHECK(size.size() == 4, "plan: size must be N, C, H, W");
  STD_TORCH_CHECK(is_program(program), "plan: program must be int64 and contiguous");
  const gatedconv::Input source{nullptr, {size[0], size[1], size[2], size[3]}, {}};
  gatedconv::Plan plan;
  const char* error = gatedconv::decode(static_cast<const int64_t*>(program.const_data_ptr()),
                                        program.numel(), nullptr, INT64_MAX, source, plan);
  STD_TORCH_CHECK(!error, "plan: ", error);
  return plan;
}

// Bytes that plan_run needs in addition to its input, output and weights for an input of this size on this
// machine.
int64_t plan_workspace(std::vector<int64_t> size, const Tensor& program, int64_t workers) {
  const char* error = nullptr;
  const gatedconv::Kernels* kernels = gatedconv::choose_kernels(&error);
  STD_TORCH_CHECK(kernels, "plan_workspace: ", error);
  return gatedconv::workspace_bytes(get_plan(size, program), *kernels, size[0], static_cast<int>(workers));
}

// For every step 1 or 0: whether the next one reads what it writes band by band.
std::vector<int64_t> plan_passing(std::vector<int64_t> size, const Tensor& program) {
  std::vector<int64_t> passing;
  for (const gatedconv::Step& step : get_plan(size, program).steps) passing.push_back(step.out.passes);
  return passing;
}

// Frees the memory that runs keep for the next one; returns its bytes.
int64_t plan_release() {
  return gatedconv::Workspace::release();
}

// The instruction set in use: portable, avx2 or avx512; for bfloat16 products amx, avx512_bf16 or emulated.
std::string plan_isa(bool bf16) {
  const char* error = nullptr;
  const gatedconv::Kernels* kernels = gatedconv::choose_kernels(&error);
  STD_TORCH_CHECK(kernels, "plan_isa: ", error);
  return bf16 ? gatedconv::bf16_name(*kernels) : kernels->name;
}

}  // namespace

STABLE_TORCH_LIBRARY_IMPL(gatedconv, CPU, m) {
  m.impl("plan_run", TORCH_BOX(&plan_run));
  m.impl("plan_times", TORCH_BOX(&plan_times));
  m.impl("plan_workspace", TORCH_BOX(&plan_workspace));
  m.impl("plan_passing", TORCH_BOX(&plan_passing));
}

STABLE_TORCH_LIBRARY_IMPL(gatedconv, CompositeExplicitAutograd, m) {
  m.impl("plan_release", TORCH_BOX(&plan_release));
  m.impl("plan_isa", TORCH_BOX(&plan_isa));
}
