// Memory for feature maps, kept between runs: fresh pages cost more than the layers that write them.
#pragma once

#include <sys/mman.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <vector>

namespace gatedconv {

// With GATEDCONV_POISON set (the tests do), memory that a run has not written yet is NaN, so that reading it
// shows in the result.
inline void poison(float* data, int64_t floats) {
  static const bool wanted = std::getenv("GATEDCONV_POISON") != nullptr;
  if (wanted) std::fill_n(data, floats, std::numeric_limits<float>::quiet_NaN());
}

// One run's memory. At most kKept blocks wait for the next run, whatever the number of threads; `release`
// frees them.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    {
      std::lock_guard<std::mutex> lock(mutex());
      size_t best = kept().size();
      for (size_t i = 0; i < kept().size(); ++i) {
        const bool fits = kept()[i].bytes >= bytes;
        if (fits && (best == kept().size() || kept()[i].bytes < kept()[best].bytes)) best = i;
      }
      if (best < kept().size()) {
        block_ = kept()[best];
        kept().erase(kept().begin() + best);
      }
    }
    if (!block_.data) {
      constexpr int64_t page = 2 << 20;
      block_.bytes = bytes < page ? (bytes + 4095) / 4096 * 4096 : (bytes + page - 1) / page * page;
      block_.data = static_cast<float*>(std::aligned_alloc(bytes < page ? 4096 : page, block_.bytes));
      if (block_.data) madvise(block_.data, block_.bytes, MADV_HUGEPAGE);
    }
    if (block_.data) poison(block_.data, bytes / 4);
  }
  Workspace(const Workspace&) = delete;
  ~Workspace() {
    if (!block_.data) return;
    std::lock_guard<std::mutex> lock(mutex());
    if (kept().size() == kKept) {
      // Keep the larger blocks: they serve every run that the smaller ones would.
      size_t least = 0;
      for (size_t i = 1; i < kept().size(); ++i) {
        if (kept()[i].bytes < kept()[least].bytes) least = i;
      }
      if (kept()[least].bytes < block_.bytes) std::swap(kept()[least], block_);
      std::free(block_.data);
    } else {
      kept().push_back(block_);
    }
  }
  float* data() const { return block_.data; }
  int64_t bytes() const { return block_.bytes; }

  static int64_t release() {
    std::lock_guard<std::mutex> lock(mutex());
    int64_t bytes = 0;
    for (Block& block : kept()) {
      bytes += block.bytes;
      std::free(block.data);
    }
    kept().clear();
    return bytes;
  }

 private:
  struct Block {
    float* data = nullptr;
    int64_t bytes = 0;
  };
  static constexpr size_t kKept = 4;
  static std::mutex& mutex() {
    static std::mutex value;
    return value;
  }
  static std::vector<Block>& kept() {  // never destroyed: a thread may still run at exit
    static auto* value = new std::vector<Block>;
    return *value;
  }
  Block block_;
};

}  // namespace gatedconv
