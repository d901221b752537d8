// Runs the body of the GPU convolution on a CPU: threads and warps one after another, every lane with
// registers of its own, asynchronous copies as late as they may land, mma.sync by the fragment layouts that
// NVIDIA's PTX manual gives.
#pragma once

#include <cstdint>
#include <cstring>
#include <deque>
#include <vector>

#include "shared/conv_body.h"

namespace host {

struct Lanes {
  template <class F>
  uint32_t ballot(F f) {
    uint32_t bits = 0;
    for (int lane = 0; lane < 32; ++lane) bits |= f(lane) ? 1u << lane : 0u;
    return bits;
  }
  template <class F>
  void each(F f) {
    for (int lane = 0; lane < 32; ++lane) f(lane);
  }
  static int ones(uint32_t bits) { return __builtin_popcount(bits); }
};

template <class Math, int MT, int NT>
class Warp {
  using State = gatedconv::LaneState<Math, MT, NT>;
  using T = typename Math::Storage;

 public:
  Warp(int index, const uint8_t* shared) : index_(index), shared_(shared), state_(32) {}
  int index() const { return index_; }

  template <class F>
  void each_lane(F f) {
    for (int lane = 0; lane < 32; ++lane) f(lane, state_[lane]);
  }

  void step(int32_t a, int32_t b, int32_t pitch, int32_t blocks) {
    for (int j = 0; j < NT && j < blocks; ++j) {
      for (int i = 0; i < MT; ++i) {
        if constexpr (Math::kTensorCores) {
          mma(i, j, a, b, pitch);
        } else {
          plain(i, j, a, b, pitch);
        }
      }
    }
  }

 private:
  // ldmatrix: lane l of the result gets the 4 bytes at 4 * (l % 4) of the row that lane 8 * matrix + l / 4
  // names.
  uint32_t loaded(const int32_t (&rows)[32], int matrix, int lane) const {
    uint32_t bits;
    const int32_t at = rows[8 * matrix + lane / 4];
    if (at % 16 != 0) std::abort();  // ldmatrix takes aligned rows alone
    std::memcpy(&bits, shared_ + at + 4 * (lane % 4), 4);
    return bits;
  }

  void mma(int i, int j, int32_t a, int32_t b, int32_t pitch) {
    int32_t a_rows[32], b_rows[32];
    for (int lane = 0; lane < 32; ++lane) {
      a_rows[lane] = state_[lane].row[i][0] + a;
      const int column = j / 2 * 16 + gatedconv::fragment_column(lane);
      b_rows[lane] = NT == 1 && lane >= 16 ? 0 : b + column * pitch + gatedconv::fragment_column_byte(lane);
    }
    constexpr int kWide = gatedconv::kStep<Math>, kEach = 4 / static_cast<int>(sizeof(T));
    float left[16][kWide], right[kWide][8];
    for (int lane = 0; lane < 32; ++lane) {
      for (int reg = 0; reg < 4; ++reg) {
        T values[kEach];
        const uint32_t bits = loaded(a_rows, reg, lane);
        std::memcpy(values, &bits, 4);
        for (int e = 0; e < kEach; ++e) {
          const int row = lane / 4 + reg % 2 * 8, k = reg / 2 * 4 * kEach + lane % 4 * kEach + e;
          left[row][k] = Math::load(Math::pack(Math::load(values[e])));
        }
      }
      for (int reg = 0; reg < 2; ++reg) {
        T values[kEach];
        const uint32_t bits = loaded(b_rows, j % 2 * 2 + reg, lane);
        std::memcpy(values, &bits, 4);
        for (int e = 0; e < kEach; ++e) {
          right[reg * 4 * kEach + lane % 4 * kEach + e][lane / 4] = Math::load(values[e]);
        }
      }
    }
    for (int lane = 0; lane < 32; ++lane) {
      for (int r = 0; r < 4; ++r) {
        const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
        float& sum = state_[lane].sum[i][j][r];
        for (int k = 0; k < kWide; ++k) sum += left[row][k] * right[k][column];
      }
    }
  }

  void plain(int i, int j, int32_t a, int32_t b, int32_t pitch) {
    for (int lane = 0; lane < 32; ++lane) {
      for (int r = 0; r < 4; ++r) {
        const uint8_t* row = shared_ + state_[lane].row[i][(r >> 1) % State::kRows] + a;
        const uint8_t* column = shared_ + b + (j * 8 + gatedconv::accumulator_column(lane, r)) * pitch;
        float x[8], w[8];
        std::memcpy(x, row, 32);
        std::memcpy(w, column, 32);
        for (int k = 0; k < 8; ++k) state_[lane].sum[i][j][r] += x[k] * w[k];
      }
    }
  }

  int index_;
  const uint8_t* shared_;
  std::vector<State> state_;
};

template <class Math, int MT, int NT>
class Cta {
 public:
  explicit Cta(int32_t shared_bytes) : shared_(new (std::align_val_t{16}) uint8_t[shared_bytes]) {
    std::memset(shared_, 0xff, shared_bytes);  // NaN in every format: what was never written shows
    for (int i = 0; i < gatedconv::kWarps; ++i) warps_.emplace_back(i, shared_);
  }
  ~Cta() { ::operator delete[](shared_, std::align_val_t{16}); }
  Cta(const Cta&) = delete;
  Cta& operator=(const Cta&) = delete;

  uint8_t* shared() { return shared_; }
  template <class F>
  void each_thread(F f) {
    for (int tid = 0; tid < gatedconv::kThreads; ++tid) f(tid);
  }
  template <class F>
  void each_warp(F f) {
    for (auto& warp : warps_) f(warp);
  }
  void sync() {}
  void copy16(uint8_t* to, const void* from, bool valid) {
    if (valid && reinterpret_cast<uintptr_t>(from) % 16 != 0) std::abort();
    open_.push_back({to, valid ? static_cast<const uint8_t*>(from) : nullptr});
  }
  void commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
  }
  void wait() {
    while (groups_.size() > 1) {
      for (const Copy& copy : groups_.front()) {
        if (copy.from == nullptr) {
          std::memset(copy.to, 0, 16);
        } else {
          std::memcpy(copy.to, copy.from, 16);
        }
      }
      groups_.pop_front();
    }
  }

 private:
  struct Copy {
    uint8_t* to;
    const uint8_t* from;
  };
  uint8_t* shared_;
  std::vector<Warp<Math, MT, NT>> warps_;
  std::vector<Copy> open_;
  std::deque<std::vector<Copy>> groups_;
};

}  // namespace host
