// Memory for feature maps, kept between runs: fresh pages cost more than the layers that write them.
#pragma once

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include <pthread.h>

#include <algorithm>
#include <cstdint>
#include <cstdlib>
#include <limits>
#include <mutex>
#include <utility>

#if defined(__has_feature)
#if __has_feature(address_sanitizer)
#define GATEDCONV_ASAN
#endif
#elif defined(__SANITIZE_ADDRESS__)
#define GATEDCONV_ASAN
#endif
#ifdef GATEDCONV_ASAN
#include <sanitizer/asan_interface.h>
#endif

namespace gatedconv {

// With GATEDCONV_POISON set (the tests do), memory that a run has not written yet is NaN, so that reading it
// shows in the result.
inline void poison(float* data, int64_t floats) {
  static const bool wanted = std::getenv("GATEDCONV_POISON") != nullptr;
  if (wanted) std::fill_n(data, floats, std::numeric_limits<float>::quiet_NaN());
}

// One run's memory. At most kKept blocks wait for the next run, whatever the number of threads; `release`
// frees them. Under AddressSanitizer what a block has beyond the request is out of bounds.
class Workspace {
 public:
  explicit Workspace(int64_t bytes) {
    {
      std::lock_guard<std::mutex> lock(kept().mutex);
      Block* best = nullptr;
      for (Block& block : kept().blocks) {
        if (block.data && block.bytes >= bytes && (!best || block.bytes < best->bytes)) best = &block;
      }
      if (best) std::swap(block_, *best);
    }
    if (!block_.data && bytes <= kMostBytes) block_ = allocate(bytes);
    if (!block_.data) return;
    guard(bytes, block_.bytes);
    poison(block_.data, bytes / 4);
  }
  Workspace(const Workspace&) = delete;
  ~Workspace() {
    if (!block_.data) return;
#ifdef GATEDCONV_ASAN
    ASAN_UNPOISON_MEMORY_REGION(block_.data, static_cast<size_t>(block_.bytes));
#endif
    {
      // Keep the larger blocks: they serve every run that the smaller ones would.
      std::lock_guard<std::mutex> lock(kept().mutex);
      Block* least = kept().blocks;
      for (Block& block : kept().blocks) {
        if (block.bytes < least->bytes) least = &block;
      }
      if (least->bytes < block_.bytes) std::swap(block_, *least);
    }
    std::free(block_.data);
  }
  float* data() const { return block_.data; }  // null where there is no memory
  int64_t bytes() const { return block_.bytes; }

  // Makes bytes [begin, end) out of bounds, under AddressSanitizer.
  void guard([[maybe_unused]] int64_t begin, [[maybe_unused]] int64_t end) const {
#ifdef GATEDCONV_ASAN
    ASAN_POISON_MEMORY_REGION(reinterpret_cast<char*>(block_.data) + begin, static_cast<size_t>(end - begin));
#endif
  }

  static int64_t release() {
    std::lock_guard<std::mutex> lock(kept().mutex);
    int64_t bytes = 0;
    for (Block& block : kept().blocks) {
      bytes += block.bytes;
      std::free(block.data);
      block = {};
    }
    return bytes;
  }

 private:
  struct Block {
    float* data;
    int64_t bytes;
  };
  static constexpr size_t kKept = 4;
  static constexpr int64_t kPage = 2 << 20;
  static constexpr int64_t kMostBytes = PTRDIFF_MAX - kPage;
  struct Kept {
    // A process that is forked off while a thread is in here finds the mutex free.
    Kept() {
      pthread_atfork([] { kept().mutex.lock(); }, [] { kept().mutex.unlock(); },
                     [] { kept().mutex.unlock(); });
    }
    std::mutex mutex;
    Block blocks[kKept]{};  // of size 0 where there is none
  };

  static Block allocate(int64_t bytes) {
    const int64_t page = bytes < kPage ? 4096 : kPage, whole = (bytes + page - 1) / page * page;
    Block block{static_cast<float*>(std::aligned_alloc(page, whole)), whole};
#if defined(__linux__)
    if (block.data) madvise(block.data, whole, MADV_HUGEPAGE);
#endif
    return block;
  }

  static Kept& kept() {
    static Kept value;
    return value;
  }
  Block block_{};
};

}  // namespace gatedconv
