#include "plan_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cerrno>
#include <charconv>
#include <cstdio>
#include <cstring>
#include <new>

#include "plan.h"
#include "plan_weights.h"

namespace gatedconv {
namespace {

static_assert(std::endian::native == std::endian::little, "files hold little-endian numbers");

constexpr uint64_t kMostHeader = 16 << 20;

// The bytes of a file in their order, from memory or from a descriptor.
class Source {
 public:
  Source(const void* bytes, size_t size) : memory_(static_cast<const char*>(bytes)), left_(size) {}
  explicit Source(const char* path) : file_(open(path, O_RDONLY | O_CLOEXEC | O_NONBLOCK)) {
    struct stat status;
    if (file_ < 0 || fstat(file_, &status) != 0) throw_system();
    if (!S_ISREG(status.st_mode)) {
      close(file_);
      throw FileError("it is no file");
    }
    left_ = static_cast<uint64_t>(status.st_size);
  }
  Source(const Source&) = delete;
  ~Source() {
    if (file_ >= 0) close(file_);
  }

  uint64_t left() const { return left_; }

  void read(void* to, uint64_t count) {
    if (count > left_) throw FileError("the file is cut short");
    left_ -= count;
    if (memory_) {
      std::memcpy(to, memory_, count);
      memory_ += count;
      return;
    }
    for (uint64_t done = 0; done < count;) {
      const ssize_t got =
          ::read(file_, static_cast<char*>(to) + done, std::min<uint64_t>(count - done, 1 << 30));
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) throw_system();
      if (got == 0) throw FileError("the file is cut short");
      done += static_cast<uint64_t>(got);
    }
  }

 private:
  [[noreturn]] static void throw_system() { throw FileError(std::strerror(errno)); }
  int file_ = -1;
  const char* memory_ = nullptr;
  uint64_t left_ = 0;
};

// CRC-32 as zlib computes it, eight bytes at a time.
class Checksum {
 public:
  void add(const void* bytes, size_t size) {
    const auto& table = tables();
    const auto* at = static_cast<const unsigned char*>(bytes);
    for (; size >= 8; size -= 8, at += 8) {
      uint64_t word;
      std::memcpy(&word, at, 8);
      word ^= state_;
      state_ = 0;
      for (int i = 0; i < 8; ++i) state_ ^= table[7 - i][(word >> (8 * i)) & 0xff];
    }
    for (; size > 0; --size, ++at) state_ = table[0][(state_ ^ *at) & 0xff] ^ (state_ >> 8);
  }
  uint32_t value() const { return ~state_; }

 private:
  using Tables = std::array<std::array<uint32_t, 256>, 8>;
  static const Tables& tables() {
    static const Tables made = [] {
      Tables table;
      for (uint32_t i = 0; i < 256; ++i) {
        uint32_t value = i;
        for (int bit = 0; bit < 8; ++bit) value = (value >> 1) ^ (value & 1 ? 0xedb88320u : 0);
        table[0][i] = value;
      }
      for (size_t k = 1; k < 8; ++k) {
        for (size_t i = 0; i < 256; ++i)
          table[k][i] = (table[k - 1][i] >> 8) ^ table[0][table[k - 1][i] & 0xff];
      }
      return table;
    }();
    return made;
  }
  uint32_t state_ = ~0u;
};

FileHeader read_header(Source& source) {
  uint64_t length;
  if (source.left() < sizeof(length)) throw FileError("it is no plan");
  source.read(&length, sizeof(length));
  if (length > kMostHeader || length < 2) throw FileError("it is no plan");
  if (length > source.left()) throw FileError("the file is cut short");
  std::string text(length, '\0');
  source.read(text.data(), length);
  if (text[0] != '{') throw FileError("it is no plan");
  return parse_header(text);
}

// Whether the file is of a form that is known here, before anything else about it is called damaged.
void check_format(const FileHeader& header) {
  const auto text = [&](const char* key) {
    const auto found = header.metadata.find(key);
    return found == header.metadata.end() ? std::string() : found->second;
  };
  if (text("format") != "gatedconv.plan") throw FileError("it is no plan");
  const std::string number = text("version");
  int version = 0;
  const auto [end, error] = std::from_chars(number.data(), number.data() + number.size(), version);
  if (error != std::errc() || end != number.data() + number.size() || version < 1) {
    throw FileError("the header is damaged");
  }
  if (version > kVersion) {
    throw FileError("it is a file of version " + std::to_string(version) +
                    ", and this library reads version " + std::to_string(kVersion) +
                    ": update gatedconv-runtime");
  }
}

// The number of elements of the tensor whose data begins at `begin`.
int64_t tensor_size(const FileHeader& header, const char* name, const char* dtype, int64_t bytes,
                    int64_t begin) {
  const auto found = header.tensors.find(name);
  if (found == header.tensors.end()) throw FileError("it is no plan");
  const TensorEntry& entry = found->second;
  if (entry.dtype != dtype || entry.shape.size() != 1 || entry.offsets.size() != 2 ||
      entry.offsets[0] != begin || entry.offsets[1] < begin ||
      entry.offsets[1] - begin != bytes * entry.shape[0]) {
    throw FileError("the header is damaged");
  }
  return entry.shape[0];
}

// Calls body(begin, end) for the floats between the gaps.
template <typename Body>
void for_stored(const std::vector<Gap>& gaps, int64_t size, Body body) {
  int64_t begin = 0;
  for (const Gap& gap : gaps) {
    body(begin, gap.begin);
    begin = gap.end;
  }
  body(begin, size);
}

void allocate_weights(PlanFile& file, int64_t floats) {
  if (floats > PTRDIFF_MAX / 8) throw std::bad_alloc();  // they would have no addresses
  const size_t bytes = (static_cast<size_t>(floats) * 4 + 64) / 64 * 64;
  file.weights.reset(static_cast<float*>(std::aligned_alloc(64, bytes)));
  if (!file.weights) throw std::bad_alloc();
  file.weights_size = floats;
}

PlanFile read_plan(Source& source) {
  FileHeader header = read_header(source);
  check_format(header);
  const int64_t program = tensor_size(header, "program", "I64", 8, 0);
  const int64_t stored = tensor_size(header, "weights", "F32", 4, 8 * program);
  if (header.tensors.size() != 2) throw FileError("it is no plan");
  // Before memory is allocated: the sizes must be those of the file.
  const uint64_t bytes = 8 * static_cast<uint64_t>(program) + 4 * static_cast<uint64_t>(stored);
  if (source.left() != bytes) {
    throw FileError(source.left() < bytes ? "the file is cut short" : "the file goes on after its end");
  }
  PlanFile file;
  Checksum sum;  // of the texts but the checksum itself, in the order of their keys, and of the data
  for (const auto& [key, value] : header.metadata) {
    if (key == "checksum") continue;
    sum.add(key.c_str(), key.size() + 1);
    sum.add(value.c_str(), value.size() + 1);
  }
  const auto read = [&](void* to, int64_t count) {
    source.read(to, static_cast<uint64_t>(count));
    sum.add(to, static_cast<size_t>(count));
  };
  file.program.resize(static_cast<size_t>(program));
  read(file.program.data(), 8 * program);
  const std::vector<Gap> gaps = find_gaps(file.program, stored);
  int64_t floats = stored;
  for (const Gap& gap : gaps) floats += gap.end - gap.begin;
  allocate_weights(file, floats);
  float* weights = file.weights.get();
  for_stored(gaps, floats, [&](int64_t begin, int64_t end) { read(weights + begin, 4 * (end - begin)); });
#ifndef FUZZING_BUILD_MODE_UNSAFE_FOR_PRODUCTION
  char expected[16];
  std::snprintf(expected, sizeof(expected), "crc32:%08x", sum.value());
  if (header.metadata["checksum"] != expected)
    throw FileError("the file is damaged: its checksum is another");
#endif
  for (const Gap& gap : gaps)
    std::fill(weights + gap.begin, weights + gap.end, 0.0f);  // one may read another
  for (const Gap& gap : gaps) fill_gap(gap, weights);
  file.metadata = std::move(header.metadata);
  return file;
}

}  // namespace

PlanFile read_plan_file(const char* path) {
  Source source(path);
  return read_plan(source);
}

PlanFile read_plan_file(const void* bytes, size_t size) {
  Source source(bytes, size);
  return read_plan(source);
}

}  // namespace gatedconv
