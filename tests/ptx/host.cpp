// What the host does before it launches a convolution, for tests that launch it by themselves: the choice of a
// tile and the packing of weights. Compiled without PyTorch, called through ctypes.
#include "shared/conv_choose.h"

using namespace gatedconv;

namespace {

template <class F>
void with_format(int format, F f) {
  switch (format) {
    case 0:
      return f(Half{});
    case 1:
      return f(BFloat16{});
    case 2:
      return f(TensorFloat32{});
    default:
      f(Float32{});
  }
}

}  // namespace

extern "C" {

int sizes(int which) {
  return static_cast<int>(which == 0 ? sizeof(ConvArgs) : sizeof(ConvTile));
}

// With mt == 0 the library's choice for an H100.
int tile(int format, ConvArgs* args, ConvTile* tile, int mt, int nt) {
  bool fits = false;
  with_format(format, [&](auto math) {
    using Math = decltype(math);
    set_access<Math>(*args);
    fits = mt == 0 ? choose_tile(*args, kStep<Math>, 132, *tile)
                   : choose_tile(*args, kStep<Math>, mt, nt, kSharedBytes, *tile);
  });
  return fits;
}

int64_t packed(int format, int inputs, int taps, int outputs) {
  int64_t size = 0;
  with_format(format, [&](auto math) { size = packed_size<decltype(math)>(inputs, taps, outputs); });
  return size;
}

void pack(int format, const void* weight, const int64_t* strides, int outputs, int inputs, int kernel_h,
          int kernel_w, const int* index, int count, void* to) {
  with_format(format, [&](auto math) {
    using Math = decltype(math);
    using T = typename Math::Storage;
    const Strides4 dense{strides[0], strides[1], strides[2], strides[3]};
    const int64_t size = packed_size<Math>(inputs, kernel_h * kernel_w, outputs);
    for (int64_t i = 0; i < size; ++i) {
      static_cast<T*>(to)[i] = packed_weight<Math>(i, static_cast<const T*>(weight), dense, outputs, kernel_h,
                                                   kernel_w, index, count);
    }
  });
}

}  // extern "C"
