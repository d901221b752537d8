// How a GPU runs the body of the convolution (shared/conv_body.h): the one place with instructions of its
// own.
#pragma once

#include <cuda_runtime.h>

#include "shared/conv_body.h"

namespace gatedconv {

__device__ inline uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ inline void load_matrices(uint32_t (&to)[4], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(to[0]), "=r"(to[1]), "=r"(to[2]), "=r"(to[3])
               : "r"(row));
}

__device__ inline void load_matrices(uint32_t (&to)[2], uint32_t row) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x2.shared.b16 {%0, %1}, [%2];"
               : "=r"(to[0]), "=r"(to[1])
               : "r"(row));
}

// The oldest architecture that has the format's instructions.
template <class Math>
constexpr int kOldest = 750;
template <>
constexpr int kOldest<BFloat16> = 800;
template <>
constexpr int kOldest<TensorFloat32> = 800;

// sum (16 x 8) += a (16 x 32 bytes) * b (32 bytes x 8).
template <class Math>
struct Multiply;

template <>
struct Multiply<Half> {
  __device__ static void step(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#else  // the two halves of the step one after the other
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(b0));
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[2]), "r"(a[3]), "r"(b1));
#endif
  }
  __device__ static uint32_t rounded(uint32_t bits) { return bits; }
};

template <>
struct Multiply<BFloat16> {
  __device__ static void step(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
  }
  __device__ static uint32_t rounded(uint32_t bits) { return bits; }
};

template <>
struct Multiply<TensorFloat32> {
  __device__ static void step(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
#if __CUDA_ARCH__ >= 800
    asm volatile(
        "mma.sync.aligned.m16n8k8.row.col.f32.tf32.tf32.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
#endif
  }
  // Without it the unit would cut the mantissa off, which doubles the error and biases it.
  __device__ static uint32_t rounded(uint32_t bits) {
#if __CUDA_ARCH__ >= 800
    asm("cvt.rna.tf32.f32 %0, %1;" : "=r"(bits) : "f"(__uint_as_float(bits)));
#endif
    return bits;
  }
};

template <class Math, int MT, int NT>
class DeviceWarp {
 public:
  __device__ explicit DeviceWarp(uint8_t* shared) : shared_(shared) {}
  __device__ int index() const { return threadIdx.x / 32; }
  __device__ static int lane() { return threadIdx.x % 32; }

  template <class F>
  __device__ void each_lane(F f) {
    f(lane(), state_);
  }

  __device__ void step(int32_t a, int32_t b, int32_t pitch, int32_t blocks) {
    if constexpr (Math::kTensorCores) {
      matrix_step(a, b, pitch, blocks);
    } else {
      plain_step(a, b, pitch, blocks);
    }
  }

 private:
  __device__ void matrix_step(int32_t a, int32_t b, int32_t pitch, int32_t blocks) {
    const uint32_t base = shared_address(shared_);
    uint32_t left[MT][4];
#pragma unroll
    for (int i = 0; i < MT; ++i) {
      load_matrices(left[i], base + state_.row[i][0] + a);
#pragma unroll
      for (int r = 0; r < 4; ++r) left[i][r] = Multiply<Math>::rounded(left[i][r]);
    }
    constexpr int kBlocks = NT == 1 ? 1 : 2;  // of eight columns that one ldmatrix brings
    const uint32_t column = base + b + fragment_column(lane()) * pitch + fragment_column_byte(lane());
#pragma unroll
    for (int j = 0; j < NT; j += kBlocks) {
      if (j >= blocks) break;
      uint32_t right[2 * kBlocks];
      // With one block the lanes from 16 on address rows that are not read.
      load_matrices(right, NT == 1 ? column - (lane() >> 4) * 8 * pitch : column + j * 8 * pitch);
#pragma unroll
      for (int i = 0; i < MT; ++i) {
#pragma unroll
        for (int k = 0; k < kBlocks; ++k) {
          Multiply<Math>::step(state_.sum[i][j + k], left[i], right[2 * k], right[2 * k + 1]);
        }
      }
    }
  }

  __device__ void plain_step(int32_t a, int32_t b, int32_t pitch, int32_t blocks) {
    constexpr int kRows = LaneState<Math, MT, NT>::kRows;
#pragma unroll
    for (int half = 0; half < kStepBytes; half += 16) {
      float4 left[MT][kRows];
#pragma unroll
      for (int i = 0; i < MT; ++i) {
#pragma unroll
        for (int which = 0; which < kRows; ++which) {
          left[i][which] = *reinterpret_cast<const float4*>(shared_ + state_.row[i][which] + a + half);
        }
      }
#pragma unroll
      for (int j = 0; j < NT; ++j) {
        if (j >= blocks) break;
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          const uint8_t* column = shared_ + b + (j * 8 + accumulator_column(lane(), c)) * pitch + half;
          const float4 right = *reinterpret_cast<const float4*>(column);
#pragma unroll
          for (int i = 0; i < MT; ++i) {
#pragma unroll
            for (int which = 0; which < kRows; ++which) {
              const float4 x = left[i][which];
              float& sum = state_.sum[i][j][2 * which + c];
              sum = fmaf(x.x, right.x, fmaf(x.y, right.y, fmaf(x.z, right.z, fmaf(x.w, right.w, sum))));
            }
          }
        }
      }
    }
  }

  uint8_t* shared_;
  LaneState<Math, MT, NT> state_;
};

template <class Math, int MT, int NT>
class DeviceCta {
 public:
  __device__ explicit DeviceCta(uint8_t* shared) : shared_(shared), warp_(shared) {}
  __device__ uint8_t* shared() { return shared_; }
  template <class F>
  __device__ void each_thread(F f) {
    f(static_cast<int>(threadIdx.x));
  }
  template <class F>
  __device__ void each_warp(F f) {
    f(warp_);
  }
  __device__ void sync() { __syncthreads(); }

  __device__ void copy16(uint8_t* to, const void* from, bool valid) {
#if __CUDA_ARCH__ >= 800
    const int bytes = valid ? 16 : 0;  // what is not copied becomes zero
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16, %2;" ::"r"(shared_address(to)), "l"(from),
                 "r"(bytes)
                 : "memory");
#else
    *reinterpret_cast<uint4*>(to) = valid ? *static_cast<const uint4*>(from) : uint4{0, 0, 0, 0};
#endif
  }
  __device__ void commit() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.commit_group;" ::: "memory");
#endif
  }
  __device__ void wait() {
#if __CUDA_ARCH__ >= 800
    asm volatile("cp.async.wait_group 1;" ::: "memory");
#endif
  }

 private:
  uint8_t* shared_;
  DeviceWarp<Math, MT, NT> warp_;
};

// 32 lanes that vote.
struct DeviceLanes {
  template <class F>
  __device__ uint32_t ballot(F f) {
    return __ballot_sync(0xffffffffu, f(static_cast<int>(threadIdx.x % 32)));
  }
  template <class F>
  __device__ void each(F f) {
    f(static_cast<int>(threadIdx.x % 32));
  }
  GATEDCONV_HOST_DEVICE static int ones(uint32_t bits) {
#if defined(__CUDA_ARCH__)
    return __popc(bits);
#else
    return __builtin_popcount(bits);
#endif
  }
};

}  // namespace gatedconv
