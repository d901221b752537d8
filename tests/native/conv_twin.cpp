// The GPU convolution's own body, run on the CPU: reads cases from standard input, writes their outputs.
// Driven by tests/native/test_conv_twin.py, compiled without PyTorch under AddressSanitizer and UBSan. Every
// tensor has a buffer of exactly its size, so one step too far is a fault.
#include <unistd.h>

#include <cstdio>
#include <cstdlib>
#include <memory>
#include <new>

#include "host_cta.h"
#include "shared/conv_choose.h"

namespace {

using namespace gatedconv;

// In the order in which the test writes them.
struct Header {
  int32_t math, mt, nt;  // mt 0: let choose_tile decide
  int32_t batch, in_channels, height, width, out_channels, out_h, out_w;
  int32_t kernel_h, kernel_w, stride_h, stride_w, pad_top, pad_left, dilation_h, dilation_w;
  int32_t masks, act, bias, residual, in_masks, in_place, in_last, out_last, budget;
};

bool read_all(void* to, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    const ssize_t got = read(0, static_cast<char*>(to) + done, bytes - done);
    if (got <= 0) return false;
    done += static_cast<size_t>(got);
  }
  return true;
}

void write_all(const void* from, size_t bytes) {
  for (size_t done = 0; done < bytes;) {
    const ssize_t put = write(1, static_cast<const char*>(from) + done, bytes - done);
    if (put <= 0) std::exit(3);
    done += static_cast<size_t>(put);
  }
}

// A 16-byte aligned array of exactly `count` elements.
template <class T>
struct Buffer {
  explicit Buffer(int64_t n) : count(n), data(new (std::align_val_t{16}) T[n]) {}
  ~Buffer() { ::operator delete[](data, std::align_val_t{16}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void fill() {
    if (!read_all(data, count * sizeof(T))) std::exit(2);
  }
  int64_t count;
  T* data;
};

Strides4 strides(int64_t c, int64_t h, int64_t w, bool last) {
  return last ? Strides4{c * h * w, 1, w * c, c} : Strides4{c * h * w, h * w, w, 1};
}

template <class Math, int MT, int NT>
void run_tiles(const ConvArgs& a, const ConvTile& t) {
  for (int64_t x = 0; x < t.pixel_tiles; ++x) {
    for (int32_t y = 0; y < t.slot_tiles; ++y) {
      host::Cta<Math, MT, NT> cta(t.shared_bytes);
      conv_tile<Math, MT, NT>(cta, a, t, x, y);
    }
  }
}

template <class Math>
void run(const ConvArgs& a, const ConvTile& t) {
  switch (t.mt * 10 + t.nt) {
    case 11:
      return run_tiles<Math, 1, 1>(a, t);
    case 12:
      return run_tiles<Math, 1, 2>(a, t);
    case 14:
      return run_tiles<Math, 1, 4>(a, t);
    case 18:
      return run_tiles<Math, 1, 8>(a, t);
    case 21:
      return run_tiles<Math, 2, 1>(a, t);
    case 22:
      return run_tiles<Math, 2, 2>(a, t);
    case 24:
      return run_tiles<Math, 2, 4>(a, t);
    case 28:
      return run_tiles<Math, 2, 8>(a, t);
  }
  std::exit(4);
}

template <class Math>
void serve(const Header& h) {
  using T = typename Math::Storage;
  const int32_t taps = h.kernel_h * h.kernel_w;
  Buffer<T> input(int64_t{h.batch} * h.in_channels * h.height * h.width);
  Buffer<T> weight(int64_t{h.out_channels} * h.in_channels * taps);
  Buffer<float> bias(h.bias ? h.out_channels : 0);
  Buffer<T> residual(h.residual ? int64_t{h.batch} * h.out_channels * h.out_h * h.out_w : 0);
  Buffer<bool> out_mask(int64_t{h.masks} * h.out_channels), in_mask(int64_t{h.in_masks} * h.in_channels);
  input.fill(), weight.fill(), bias.fill(), residual.fill(), out_mask.fill(), in_mask.fill();
  Buffer<T> output(int64_t{h.batch} * h.out_channels * h.out_h * h.out_w);
  std::memset(output.data, 0xff, output.count * sizeof(T));
  if (h.in_place) std::memcpy(output.data, residual.data, output.count * sizeof(T));

  Buffer<int32_t> in_index(in_mask.count), out_index(out_mask.count), out_count(h.masks),
      in_count(h.in_masks);
  host::Lanes lanes;
  for (int32_t i = 0; i < h.masks; ++i) {
    const int64_t row = int64_t{i} * h.out_channels;
    list_open(lanes, out_mask.data + row, h.out_channels, out_index.data + row, out_count.data + i);
  }
  for (int32_t i = 0; i < h.in_masks; ++i) {
    const int64_t row = int64_t{i} * h.in_channels;
    list_open(lanes, in_mask.data + row, h.in_channels, in_index.data + row, in_count.data + i);
  }
  const bool in_order = h.in_masks == 1;
  ConvArgs a{};
  const Strides4 dense{int64_t{h.in_channels} * taps, taps, h.kernel_w, 1};
  Buffer<T> packed(packed_size<Math>(h.in_channels, taps, h.out_channels));
  for (int64_t i = 0; i < packed.count; ++i) {
    packed.data[i] =
        packed_weight<Math>(i, weight.data, dense, h.out_channels, h.kernel_h, h.kernel_w,
                            in_order ? in_index.data : nullptr, in_order ? *in_count.data : h.in_channels);
  }
  a.input = input.data, a.weights = packed.data, a.output = output.data;
  a.bias = h.bias ? bias.data : nullptr;
  a.residual = !h.residual ? nullptr : h.in_place ? output.data : residual.data;
  if (h.in_masks) a.in_index = in_index.data, a.in_count = in_count.data, a.in_masks = h.in_masks;
  bool open = true;
  for (int64_t i = 0; i < out_mask.count; ++i) open = open && out_mask.data[i];
  if (!open) a.out_index = out_index.data, a.out_count = out_count.data;
  a.in = strides(h.in_channels, h.height, h.width, h.in_last);
  a.out = a.res = strides(h.out_channels, h.out_h, h.out_w, h.out_last);
  a.batch = h.batch, a.in_channels = h.in_channels, a.height = h.height, a.width = h.width;
  a.out_channels = h.out_channels, a.out_h = h.out_h, a.out_w = h.out_w;
  a.kernel_h = h.kernel_h, a.kernel_w = h.kernel_w, a.stride_h = h.stride_h, a.stride_w = h.stride_w;
  a.pad_top = h.pad_top, a.pad_left = h.pad_left, a.dilation_h = h.dilation_h, a.dilation_w = h.dilation_w;
  a.masks = open ? 1 : h.masks, a.act = static_cast<ConvAct>(h.act), a.skip_closed = h.in_place;
  set_access<Math>(a);
  ConvTile t{};
  const bool fits = h.mt == 0 ? choose_tile(a, kStep<Math>, h.budget, t)
                              : choose_tile(a, kStep<Math>, h.mt, h.nt, h.budget, t);
  const int32_t answer[3] = {fits, t.mt, t.nt};
  if (fits) run<Math>(a, t);
  write_all(answer, sizeof answer);
  if (fits) write_all(output.data, output.count * sizeof(T));
}

}  // namespace

int main() {
  Header header;
  while (read_all(&header, sizeof header)) {
    switch (header.math) {
      case 0:
        serve<Half>(header);
        break;
      case 1:
        serve<BFloat16>(header);
        break;
      case 2:
        serve<TensorFloat32>(header);
        break;
      default:
        serve<Float32>(header);
    }
  }
  return 0;
}
