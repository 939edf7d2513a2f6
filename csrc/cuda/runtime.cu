// What the host asks of the CUDA runtime.
#include "launch.h"
#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include <cstring>
#endif

namespace mnv2_fused::cuda {

#ifdef __CUDACC__

int limits_of(int device, Limits* limits) {
  const auto error = cudaDeviceGetAttribute(&limits->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return int(error);
  return int(cudaDeviceGetAttribute(&limits->processors, cudaDevAttrMultiProcessorCount, device));
}
int clear(void* memory, int64_t bytes, void* stream) {
  return int(cudaMemsetAsync(memory, 0, size_t(bytes), static_cast<cudaStream_t>(stream)));
}
const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

#else

int limits_of(int, Limits* limits) {
  *limits = {4, kSharedBytes};
  return 0;
}
int clear(void* memory, int64_t bytes, void*) {
  std::memset(memory, 0, size_t(bytes));
  return 0;
}
const char* error_text(int) { return "the emulation failed"; }

#endif

}  // namespace mnv2_fused::cuda
