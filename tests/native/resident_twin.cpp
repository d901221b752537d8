// The resident driver's own body, run on the CPU: reads cases from standard input, writes their outputs.
// Driven by tests/native/resident_twin.py, compiled without PyTorch under sanitizers. Every tensor has a
// buffer of exactly its size, so one step too far is a fault.
#include <unistd.h>

#include <cstdio>

#include "host_resident.h"

namespace {

using namespace gatedconv;

// In the order in which the test writes them.
struct Header {
  int32_t math, images, stream_bytes;
  int32_t ranks, ring_pieces, record_at, table_at, ring_at, shared_bytes;
  int32_t in_units, in_h, in_w, out_units, out_h, out_w;
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

// 16-byte aligned bytes, as many as asked for and no more.
struct Buffer {
  explicit Buffer(int64_t n) : count(n), data(new (std::align_val_t{16}) uint8_t[n]) {}
  ~Buffer() { ::operator delete[](data, std::align_val_t{16}); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  void fill() {
    if (!read_all(data, count)) std::exit(2);
  }
  int64_t count;
  uint8_t* data;
};

template <class Math>
void serve(const Header& h) {
  const auto strides = [](int64_t units, int64_t height, int64_t width) {
    const int64_t channels = units * kVector<Math>;
    return Strides4{height * width * channels, 1, width * channels, channels};
  };
  Buffer stream(h.stream_bytes), input(int64_t{h.images} * h.in_units * h.in_h * h.in_w * kUnitBytes);
  Buffer output(int64_t{h.images} * h.out_units * h.out_h * h.out_w * kUnitBytes);
  stream.fill(), input.fill();
  std::memset(output.data, 0xff, output.count);
  ResidentArgs a{};
  a.input = input.data, a.output = output.data, a.stream = stream.data;
  a.in = strides(h.in_units, h.in_h, h.in_w), a.out = strides(h.out_units, h.out_h, h.out_w);
  a.pieces = h.stream_bytes / kPieceBytes, a.ring_pieces = h.ring_pieces;
  a.record_at = h.record_at, a.table_at = h.table_at, a.ring_at = h.ring_at;
  a.ranks = h.ranks, a.shared_bytes = h.shared_bytes;
  host::run_images<Math>(a, h.images);
  write_all(output.data, output.count);
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
      default:
        serve<TensorFloat32>(header);
    }
  }
  return 0;
}
