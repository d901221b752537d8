// The file of a plan: safetensors, that is the length of a JSON header, the header, and the data of two
// tensors, `program` (I64) and `weights` (F32), with texts under `__metadata__`. Weights are packed the same
// way for every instruction set, so one file serves every machine.
#pragma once

#include <cstddef>
#include <cstdint>
#include <cstdlib>
#include <map>
#include <memory>
#include <stdexcept>
#include <string>
#include <string_view>
#include <vector>

namespace gatedconv {

// A damaged file; the message, one line, is the reason.
struct FileError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

struct PlanFile {
  struct Free {
    void operator()(float* data) const { std::free(data); }
  };
  std::vector<int64_t> program;
  std::unique_ptr<float[], Free>
      weights;  // from an address that is a multiple of 64 on: a row of a panel is one line
  int64_t weights_size = 0;
  std::map<std::string, std::string> metadata;
};

// A description of a safetensors header.
struct TensorEntry {
  std::string dtype;
  std::vector<int64_t> shape, offsets;
};
struct FileHeader {
  std::map<std::string, std::string> metadata;
  std::map<std::string, TensorEntry> tensors;
};

// Parses a header strictly: JSON of exactly this form, nothing unknown, nothing twice. Throws FileError.
FileHeader parse_header(std::string_view text);

// Reads a file, or the bytes of one, and checks its form, version and checksum. Throws FileError or
// std::bad_alloc.
PlanFile read_plan_file(const char* path);
PlanFile read_plan_file(const void* bytes, size_t size);

}  // namespace gatedconv
