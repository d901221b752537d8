// Every operator with a C++ body; those of Triton and the backwards are declared in gatedconv/ops. The bodies
// are in cpu/ and cuda/, the fakes in gatedconv/ops.
#include <torch/csrc/stable/library.h>

STABLE_TORCH_LIBRARY(gatedconv, m) {
  // input (N, C_in, H, W), weight (C_out, C_in / groups, KH, KW), bias (C_out), residual (N, C_out, P, Q),
  // out_open bool (C_out) or (N, C_out), in_open bool (C_in), on GPUs also (N, C_in); padding is top, bottom,
  // left, right. packed is the result of masked_conv2d_pack, so that the call need not pack the weights. If
  // it is of other weights or masks, it is ignored on CPUs; on GPUs the result is wrong, since checking would
  // synchronize. allow_tf32 lets GPUs multiply float32 in tf32. Returns (N, C_out, P, Q).
  m.def(
      "masked_conv2d(Tensor input, Tensor weight, Tensor? bias, Tensor out_open, Tensor? in_open, "
      "Tensor? residual, int[] stride, int[] padding, int[] dilation, int groups, bool relu, "
      "Tensor? packed=None, bool allow_tf32=False) -> Tensor");
  // Returns a vector for `packed`: float32 on CPUs, empty for weights that are not dense; int32 on GPUs,
  // empty where no kernel takes it. Eager mode alone: on CPUs its length depends on how many channels are
  // open.
  m.def(
      "masked_conv2d_pack(Tensor weight, Tensor out_open, Tensor? in_open, int groups, "
      "bool allow_tf32=False) -> Tensor");
  // One convolution of a plan on a GPU. conv_pack packs weight (C_out, inputs, KH, KW), whose inputs are
  // those of in_index (int32) in their order, or all. conv_run writes act(conv + bias + residual) to output:
  // in_index lists the channels of input that are read; out_index, int32 (C_out + 1), lists the open outputs,
  // then the closed ones, then how many are open; closed ones become act(residual), or 0, or with skip_closed
  // stay as they are. geometry is kernel, stride, padding (top, left), dilation; act 0 none, 1 ReLU, 2 ReLU6;
  // mt and nt choose the tile, 0 lets us choose.
  m.def("conv_pack(Tensor weight, Tensor? in_index, bool allow_tf32) -> Tensor");
  m.def(
      "conv_run(Tensor input, Tensor packed, Tensor? bias, Tensor? in_index, Tensor? out_index, Tensor? "
      "residual, "
      "Tensor(a!) output, int[] geometry, int act, bool skip_closed, bool allow_tf32, int mt, "
      "int nt) -> ()");
  // A run of a plan's layers in one launch, the maps of an image in shared memory: input and output channels
  // last, stream (uint8) and layout as gatedconv/engine/cuda/resident.py writes them.
  m.def("resident_run(Tensor input, Tensor stream, Tensor(a!) output, int[] layout, bool allow_tf32) -> ()");
  // A network in one call: input (N, C, H, W), program int64 and weights float32 as gatedconv.Engine packs
  // them. shape gives the output's size as a function of the input's, for the fake: output channels, output
  // rank (2 or 4), then for every layer that changes height or width: extent, stride, padding of
  // both. workers 0 is as many threads as PyTorch uses. Returns (N, C') or (N, C', H', W').
  m.def("plan_run(Tensor input, Tensor program, Tensor weights, int[] shape, int workers=0) -> Tensor");
  // The same run, all workers at every step: how long each step that computes something took, float64, in ms.
  m.def("plan_times(Tensor input, Tensor program, Tensor weights, int workers=0) -> Tensor");
  m.def("plan_workspace(int[] size, Tensor program, int workers) -> int");
  // For every step that computes something 1 or 0: whether the next one reads what it writes band by band.
  m.def("plan_passing(int[] size, Tensor program) -> int[]");
  m.def("plan_release() -> int");
  // The instruction set in use, with bf16 that for bfloat16 products.
  m.def("plan_isa(bool bf16=False) -> str");
}
