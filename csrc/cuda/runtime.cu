// What the host asks of the CUDA runtime.
#include "launch.h"
#ifdef __CUDACC__
#include <cuda_runtime.h>
#endif

namespace mnv2_fused::cuda {

#ifdef __CUDACC__

int limits_of(int device, Limits* limits) {
  const auto error = cudaDeviceGetAttribute(&limits->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return int(error);
  return int(cudaDeviceGetAttribute(&limits->processors, cudaDevAttrMultiProcessorCount, device));
}
const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

#else

int limits_of(int, Limits* limits) {
  *limits = {4, kSharedBytes};
  return 0;
}
const char* error_text(int) { return "the emulation failed"; }

#endif

}  // namespace mnv2_fused::cuda
