// The kernels and their launch for one number format.
#pragma once

#include "cuda/experimental/resident_device.cuh"
#include "cuda/experimental/resident_launch.h"

namespace gatedconv {

// Two blocks a multiprocessor: a 16 x 8 sum is 4 registers of a lane, of which a warp holds at most 16.
template <class Math, bool Cluster>
__global__ void __launch_bounds__(kResidentThreads, 2)
    resident_kernel(const __grid_constant__ ResidentArgs args) {
#if defined(__CUDA_ARCH__)
  if constexpr (__CUDA_ARCH__ >= kOldest<Math> && (!Cluster || __CUDA_ARCH__ >= 900)) {
    extern __shared__ __align__(16) uint8_t shared[];
    DeviceResident<Cluster> warp(shared, args.ranks);
    run_resident<Math>(warp, args);
  } else {
    __trap();  // an empty kernel would leave its output as it was, without an error
  }
#endif
}

template <class Math>
cudaError_t launch_resident(const ResidentArgs& args, int64_t images, cudaStream_t stream) {
  if (images == 0) return cudaSuccess;  // an empty grid is an error
  const auto kernel = args.ranks > 1 ? resident_kernel<Math, true> : resident_kernel<Math, false>;
  // Always the device's most: the limit is the process's, and another thread may be about to launch with
  // more.
  int device = 0, most = 0;
  cudaError_t allowed = cudaGetDevice(&device);
  if (allowed == cudaSuccess) {
    allowed = cudaDeviceGetAttribute(&most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  }
  if (allowed == cudaSuccess) {
    allowed = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, most);
  }
  if (allowed != cudaSuccess) return allowed;
  cudaLaunchAttribute cluster{};
  cluster.id = cudaLaunchAttributeClusterDimension;
  cluster.val.clusterDim.x = static_cast<unsigned>(args.ranks);
  cluster.val.clusterDim.y = cluster.val.clusterDim.z = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(images * args.ranks));
  config.blockDim = dim3(kResidentThreads);
  config.dynamicSmemBytes = static_cast<size_t>(args.shared_bytes);
  config.stream = stream;
  config.attrs = &cluster;
  config.numAttrs = args.ranks > 1 ? 1 : 0;
  return cudaLaunchKernelEx(&config, kernel, args);
}

}  // namespace gatedconv
