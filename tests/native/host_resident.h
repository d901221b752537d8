// Runs the body of the resident driver on a CPU: every warp is a thread of its own, so that ThreadSanitizer
// sees a barrier that is missing; its lanes run one after another. Asynchronous copies land as late as they
// may; mma.sync and ldmatrix follow the fragment layouts that NVIDIA's PTX manual gives.
#pragma once

#include <array>
#include <barrier>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <deque>
#include <memory>
#include <new>
#include <thread>
#include <vector>

#include "cuda/experimental/resident_body.h"

namespace host {

// The blocks that share an image.
struct Cluster {
  Cluster(int ranks, int32_t shared_bytes) : all(ranks * gatedconv::kResidentWarps) {
    for (int rank = 0; rank < ranks; ++rank) {
      shared.push_back(new (std::align_val_t{16}) uint8_t[shared_bytes]);
      std::memset(shared.back(), 0xff, shared_bytes);  // NaN in every format: what was never written shows
      blocks.push_back(std::make_unique<std::barrier<>>(gatedconv::kResidentWarps));
    }
  }
  ~Cluster() {
    for (uint8_t* bytes : shared) ::operator delete[](bytes, std::align_val_t{16});
  }
  Cluster(const Cluster&) = delete;
  Cluster& operator=(const Cluster&) = delete;

  std::vector<uint8_t*> shared;
  std::vector<std::unique_ptr<std::barrier<>>> blocks;
  std::barrier<> all;
};

class ResidentWarp {
 public:
  static constexpr bool kCluster = true;

  ResidentWarp(Cluster& cluster, int rank, int index, int64_t image)
      : cluster_(cluster), rank_(rank), index_(index), image_(image) {}
  uint8_t* shared() const { return cluster_.shared[rank_]; }
  int index() const { return index_; }
  int rank() const { return rank_; }
  int ranks() const { return static_cast<int>(cluster_.shared.size()); }
  int64_t image() const { return image_; }

  template <class F>
  void each_lane(F f) {
    for (int lane = 0; lane < 32; ++lane) f(lane);
  }
  template <class State>
  struct Lanes {
    std::array<State, 32> states;
    template <class F>
    void each(F f) {
      for (int lane = 0; lane < 32; ++lane) f(lane, states[lane]);
    }
  };

  void sync() { cluster_.blocks[rank_]->arrive_and_wait(); }
  void barrier() { cluster_.all.arrive_and_wait(); }

  void copy16(uint8_t* to, const uint8_t* from) {
    if (reinterpret_cast<uintptr_t>(from) % 16 != 0 || reinterpret_cast<uintptr_t>(to) % 16 != 0)
      std::abort();
    open_.push_back({to, from});
  }
  void commit() {
    groups_.push_back(std::move(open_));
    open_.clear();
  }
  void wait(int32_t groups) {
    if (groups != 0 && groups != 2 && groups != 6) std::abort();  // what the device has instructions for
    while (static_cast<int32_t>(groups_.size()) > groups) {
      for (const Copy& copy : groups_.front()) std::memcpy(copy.to, copy.from, 16);
      groups_.pop_front();
    }
  }

  template <class Math>
  void store_there(int rank, int32_t to, const gatedconv::Vector16<Math>& unit) {
    if (to % 16 != 0 || rank == rank_) std::abort();
    std::memcpy(cluster_.shared.at(rank) + to, &unit, sizeof unit);
  }

  template <class Math, int MT, int NT>
  void multiply(Lanes<gatedconv::ResidentLane<MT, NT>>& lanes, int32_t table, int32_t weights) {
    constexpr int kEach = 4 / static_cast<int>(sizeof(typename Math::Storage)),
                  kWide = gatedconv::kStep<Math>;
    float right[NT][kWide][8];
    for (int j = 0; j < NT; ++j) {
      for (int lane = 0; lane < 32; ++lane) {
        for (int reg = 0; reg < 2; ++reg) {
          for (int e = 0; e < kEach; ++e) {
            const int k = reg * 4 * kEach + lane % 4 * kEach + e;
            const int32_t at = weights + j * 256 + lane * 8 + reg * 4;
            right[j][k][lane / 4] = value<Math>(at, e);
          }
        }
      }
    }
    for (int i = 0; i < MT; ++i) {
      int32_t rows[32];
      for (int lane = 0; lane < 32; ++lane) {
        int32_t offset;
        std::memcpy(&offset, shared() + table + lane / 16 * 4, 4);
        rows[lane] = offset < 0 ? 0 : lanes.states[lane].row[i] + offset;
        if (rows[lane] % 16 != 0 || rows[lane] < 0) std::abort();  // ldmatrix takes aligned rows alone
      }
      float left[16][kWide];
      for (int lane = 0; lane < 32; ++lane) {
        for (int reg = 0; reg < 4; ++reg) {
          for (int e = 0; e < kEach; ++e) {
            const int row = lane / 4 + reg % 2 * 8, k = reg / 2 * 4 * kEach + lane % 4 * kEach + e;
            const float read = value<Math>(rows[8 * reg + lane / 4] + lane % 4 * 4, e);
            left[row][k] = Math::load(Math::pack(read));
          }
        }
      }
      for (int lane = 0; lane < 32; ++lane) {
        for (int j = 0; j < NT; ++j) {
          for (int r = 0; r < 4; ++r) {
            const int row = lane / 4 + r / 2 * 8, column = lane % 4 * 2 + r % 2;
            float& sum = lanes.states[lane].sum[i][j][r];
            for (int k = 0; k < kWide; ++k) sum += left[row][k] * right[j][k][column];
          }
        }
      }
    }
  }

 private:
  struct Copy {
    uint8_t* to;
    const uint8_t* from;
  };

  // Element e of the 4 bytes of a register.
  template <class Math>
  float value(int32_t at, int e) const {
    typename Math::Storage bits;
    std::memcpy(&bits, shared() + at + e * sizeof bits, sizeof bits);
    return Math::load(bits);
  }

  Cluster& cluster_;
  int rank_, index_;
  int64_t image_;
  std::vector<Copy> open_;
  std::deque<std::vector<Copy>> groups_;
};

// One image after another, each on a cluster of its own.
template <class Math>
void run_images(const gatedconv::ResidentArgs& args, int64_t images) {
  for (int64_t image = 0; image < images; ++image) {
    Cluster cluster(args.ranks, args.shared_bytes);
    std::vector<std::thread> warps;
    for (int rank = 0; rank < args.ranks; ++rank) {
      for (int index = 0; index < gatedconv::kResidentWarps; ++index) {
        warps.emplace_back([&cluster, &args, rank, index, image] {
          ResidentWarp warp(cluster, rank, index, image);
          gatedconv::run_resident<Math>(warp, args);
        });
      }
    }
    for (std::thread& warp : warps) warp.join();
  }
}

}  // namespace host
