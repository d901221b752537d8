// A plan: a network as a flat list of fused instructions over feature maps in NHWC with a zero border.
//
// The program is a list of int64 that gatedconv/engine writes (field order: the enums below); it holds
// no size of an image, so one program serves every batch, height and width. What depends on those is worked
// out at the start of a run, in plan_decode.cpp. Everything here is independent of PyTorch and of the
// instruction set.
#pragma once

#include <cstddef>
#include <cstdint>
#include <vector>

#include "gatedconv_plan.h"

namespace gatedconv {

struct Bf16Kernels;

constexpr int kPanel = 16;  // output channels of one packed weight panel, on every instruction set
constexpr int64_t kVersion = GATEDCONV_PLAN_FILE_VERSION;  // of the program's encoding, and of files with one

// In a fuzzer's build all steps that can run band by band do, however small their maps are, a row at a time.
#ifdef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
constexpr bool kFuzzing = true;
#else
constexpr bool kFuzzing = false;
#endif

// Static, as is in_bf16 below: every instruction set's units include them, and of an inline function that is
// not inlined the linker could keep the copy with AVX.
static inline int64_t ceil_div(int64_t a, int64_t b) {
  return (a + b - 1) / b;
}

static inline int64_t round_up(int64_t value, int64_t multiple) {
  return ceil_div(value, multiple) * multiple;
}

enum class Op : int64_t {
  kInput,   // NCHW tensor of any strides -> map
  kOutput,  // map -> contiguous NCHW tensor
  kConv,  // direct convolution; weights [panel][kh][kw][c_in][16]; option 1: in groups of 8 (conv_grouped.h);
          // 2: in bfloat16 (conv_bf16.h), weights [panel][kh * kw * c_in rounded up to 32, in pairs][16][2]
  kWinograd2,   // F(2x2, 3x3); weights [panel][16][c_in][16]
  kWinograd4,   // F(4x4, 3x3); weights [panel][36][c_in][16]
  kDepthwise,   // weights [kh][kw][channels rounded up to 16]
  kMaxPool,     // option 2: the size is rounded up, and the last window may leave the padding
  kAvgPool,     // as kMaxPool; option 1 (in addition): divide by the window with padding
  kMeanPool,    // over the whole map
  kGather,      // channels by an index list
  kScatterAdd,  // the input at the channels of an index list, plus the residual if any, plus the bias if any
  kSubsample,   // every stride-th pixel, channels moved up by `offset`, zeros elsewhere
  kAdd,         // residual of the same size, of one pixel, or of one channel
  kFill,        // a constant for every channel, of the size that a convolution's output would have
  kMultiply,    // residual as for kAdd
  kView,        // channels of another map's pixels, or all pixels of a concatenation: nothing runs
  kCopy,        // into channels of a concatenation that whole vectors would overrun
  kAdaptiveMaxPool,  // kernel: height and width of the output
  kAdaptiveAvgPool,
  kNearest,       // upsampling: kernel is the factor, or the residual is a map of the size to reach
  kBilinear,      // as kNearest; option 1 aligns the corners
  kPixelShuffle,  // kernel is the factor
  kLayerNorm,     // over the channels of every pixel; bias: scale, then shift
  kGroupNorm,     // span is the number of groups; bias: scale, then shift
  kSoftmax,       // over the channels of every pixel
  kPrelu,         // bias: the slope of every channel
};

enum class Act : int64_t {
  kNone,
  kRelu,
  kRelu6,
  kLeakyRelu,
  kElu,
  kSilu,
  kHardSwish,
  kHardSigmoid,
  kSigmoid,
  kTanh,
  kGelu,
  kGeluTanh,
  kMish,
};

// Whether kernels apply an activation to their registers; the others go over what a kernel has just written.
constexpr bool in_registers(Act act) {
  return act <= Act::kRelu6 || act == Act::kHardSwish || act == Act::kHardSigmoid;
}

// Fields of one map and one instruction in the program.
enum MapField { kChannels, kPixel, kHalo, kMultiple, kSlot, kOffset, kMapFields };
enum StepField {
  kOp,
  kIn,
  kOut,
  kResidual,
  kAct,
  kKernelH,
  kKernelW,
  kStrideH,
  kStrideW,
  kPadTop,
  kPadLeft,
  kPadBottom,
  kPadRight,
  kDilationH,
  kDilationW,
  kWeights,
  kBias,
  kSpan,
  kIndex,
  kOption,
  kDirect,
  kValue,   // bits of a float: slope or alpha of an activation, epsilon of a norm
  kGate,    // map (N, C, 1, 1) that a 1x1 convolution's input is multiplied by, -1 for none
  kPre,     // weights: scale, then shift, of a 1x1 convolution's input; 0 for none
  kPreAct,  // activation of that input
  kStepFields
};

// A feature map of a run. Strides and offsets are in floats; `data` is channel 0 of the first pixel of image
// 0.
struct Map {
  int channels = 0, height = 0, width = 0;
  int halo = 0, multiple = 1, slot = 0;
  ptrdiff_t pixel = 0, row = 0, image = 0, offset = 0;  // offset: of channel 0 in its pixel
  bool passes = false;  // from one step to the next, a few rows at a time: it is never whole
  float* data = nullptr;
  // Every instruction set's units use these. Were one not inlined, the linker could keep the copy with AVX.
  [[gnu::always_inline]] int bottom() const {
    return halo + (height + multiple - 1) / multiple * multiple - height;
  }
  [[gnu::always_inline]] int right() const {
    return halo + (width + multiple - 1) / multiple * multiple - width;
  }
  [[gnu::always_inline]] bool exists() const { return height > 0; }
  [[gnu::always_inline]] float* at(int64_t n, int64_t y) const { return data + n * image + y * row; }
};

struct Step {
  Op op;
  Act act;   // applied to the registers of a kernel
  Act late;  // applied to what a kernel has written; one of the two is kNone
  float value;
  int kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int span;  // input channels that one output channel reads (fewer than all of them if grouped)
  int64_t option;
  Map in, out, residual, gate;  // residual and gate: a map of height 0 where there is none
  bool changes_input;           // by the gate, by `pre`, or by both
  Act pre_act;
  const float* pre;  // null, or scale and shift of the input, each rounded up to 16 floats
  const float* weights;
  const float* direct;  // of a Winograd step: weights for what it cannot compute, as kConv's
  const float* bias;
  const int32_t* keep;   // null, or for every output channel -1, or 0 for one that is to be 0 whatever comes
  const int64_t* index;  // channel list, or for a grouped convolution the first input channel of every panel
  int64_t index_size;
  const Bf16Kernels* bf16;  // of a convolution in bfloat16: what this machine has for it, or null
  int rows;                 // units of work in one image: rows of the output, or rows of Winograd tiles
  // The tensors outside: kInput reads `source` by these strides, kOutput writes `target`, both from image
  // `first` on.
  const float* source;
  int64_t source_stride[4];
  float* target;
};

static inline bool in_bf16(const Step& step) {
  return step.op == Op::kConv && step.option == 2;
}

// A part of a step: units (image * rows + row) in [unit0, unit1), output channel panels in [panel0, panel1).
struct Part {
  int64_t unit0, unit1;
  int panel0, panel1;
};

// One instruction set's kernels.
struct Kernels {
  const char* name;
  int lanes;
  void (*run)(const Step& step, const Part& part, float* scratch);
  size_t (*scratch_floats)(const Step& step);
};

extern const Kernels kernels_portable;
extern const Kernels kernels_avx2;
extern const Kernels kernels_avx512;

// The instructions that multiply bfloat16: "amx", "avx512_bf16" or "emulated".
const char* bf16_name(const Kernels& kernels);

// The best instruction set of this machine, or the one that GATEDCONV_ISA names (null if it cannot run here).
const Kernels* choose_kernels(const char** error);

struct Input {
  const float* data;
  int64_t size[4];
  int64_t stride[4];
};

// A decoded program for one input size.
struct Plan {
  std::vector<Step> steps;
  std::vector<int64_t> slot_floats;  // of one image
  std::vector<bool> slot_parts;      // whether any map in it is a part of another one
  int out_channels = 0, out_height = 0, out_width = 0;
};

// Null if the program is sound for the input, else what is wrong.
const char* decode(const int64_t* program, int64_t program_size, const float* weights, int64_t weights_size,
                   const Input& input, Plan& plan);

// Bytes that `run` needs for feature maps and scratch.
int64_t workspace_bytes(const Plan& plan, const Kernels& kernels, int64_t batch, int workers);

// Runs the plan over the whole batch with up to `workers` threads; false, or std::bad_alloc, if there is not
// enough memory. With `seconds`, an entry for every step, all workers share every step, and the time of each
// is added to its entry; the time of steps that run band by band to that of the last one.
bool run(const Plan& plan, const Kernels& kernels, const Input& input, float* output, int workers,
         double* seconds = nullptr);

}  // namespace gatedconv
