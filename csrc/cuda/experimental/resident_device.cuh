// How a GPU runs the body of the resident driver (cuda/experimental/resident_body.h).
#pragma once

#include "cuda/device_cta.cuh"
#include "cuda/experimental/resident_body.h"

namespace gatedconv {

template <bool Cluster>
class DeviceResident {
 public:
  static constexpr bool kCluster = Cluster;

  __device__ DeviceResident(uint8_t* shared, int32_t ranks) : shared_(shared), ranks_(ranks) {}
  __device__ uint8_t* shared() const { return shared_; }
  __device__ int index() const { return threadIdx.x / 32; }
  // A cluster is `ranks` neighboring blocks.
  __device__ int ranks() const { return Cluster ? ranks_ : 1; }
  __device__ int rank() const { return Cluster ? static_cast<int>(blockIdx.x) % ranks_ : 0; }
  __device__ int64_t image() const { return Cluster ? static_cast<int>(blockIdx.x) / ranks_ : blockIdx.x; }
  __device__ static int lane() { return threadIdx.x % 32; }

  template <class F>
  __device__ void each_lane(F f) {
    f(lane());
  }
  template <class State>
  struct Lanes {
    State state;
    template <class F>
    __device__ void each(F f) {
      f(lane(), state);
    }
  };

  __device__ void sync() { __syncthreads(); }
  __device__ void barrier() {
#if __CUDA_ARCH__ >= 900
    if constexpr (Cluster) {
      asm volatile("barrier.cluster.arrive.release;\n\tbarrier.cluster.wait.acquire;" ::: "memory");
      return;
    }
#endif
    __syncthreads();
  }

  __device__ void copy16(uint8_t* to, const void* from) {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(shared_address(to)), "l"(from) : "memory");
#else
    *reinterpret_cast<uint4*>(to) = *static_cast<const uint4*>(from);
#endif
  }
  __device__ void commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }
  __device__ void wait([[maybe_unused]] int32_t groups) {
#if __CUDA_ARCH__ >= 800
    if (groups >= 6) {
      asm volatile("cp.async.wait_group 6;" ::: "memory");
    } else if (groups >= 2) {
      asm volatile("cp.async.wait_group 2;" ::: "memory");
    } else {
      asm volatile("cp.async.wait_group 0;" ::: "memory");
    }
#endif
  }

  template <class Math>
  __device__ void store_there([[maybe_unused]] int rank, [[maybe_unused]] int32_t to,
                              [[maybe_unused]] const Vector16<Math>& unit) {
#if __CUDA_ARCH__ >= 900
    const uint4 v = *reinterpret_cast<const uint4*>(&unit);
    asm volatile(
        "{\n\t.reg .u32 there;\n\tmapa.shared::cluster.u32 there, %0, %1;\n\t"
        "st.shared::cluster.v4.u32 [there], {%2, %3, %4, %5};\n\t}" ::"r"(shared_address(shared_) + to),
        "r"(rank), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
        : "memory");
#endif
  }

  template <class Math, int MT, int NT>
  __device__ void multiply(Lanes<ResidentLane<MT, NT>>& lanes, int32_t table, int32_t weights) {
    ResidentLane<MT, NT>& state = lanes.state;
    const int32_t offset = *reinterpret_cast<const int32_t*>(shared_ + table + (lane() >> 4) * 4);
    uint2 right[NT];
#pragma unroll
    for (int j = 0; j < NT; ++j) {
      right[j] = *reinterpret_cast<const uint2*>(shared_ + weights + j * kItemBytes + lane() * 8);
    }
    const uint32_t base = shared_address(shared_);
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      uint32_t left[4];
      load_matrices(left, base + (offset < 0 ? 0 : state.row[i] + offset));  // the first 16 bytes are zeros
#pragma unroll
      for (int r = 0; r < 4; ++r) left[r] = Multiply<Math>::rounded(left[r]);
#pragma unroll
      for (int j = 0; j < NT; ++j) Multiply<Math>::step(state.sum[i][j], left, right[j].x, right[j].y);
    }
  }

 private:
  uint8_t* shared_;
  int32_t ranks_;
};

}  // namespace gatedconv
