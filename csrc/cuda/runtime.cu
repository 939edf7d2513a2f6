// What the host asks of the CUDA runtime.
#include "launch.h"
#ifdef __CUDACC__
#include <cuda_runtime.h>
#else
#include <cstdlib>
#include <cstring>
#endif

namespace mnv2_fused::cuda {

#ifdef __CUDACC__

int limits_of(int device, Limits* limits) {
  const auto error = cudaDeviceGetAttribute(&limits->shared_bytes, cudaDevAttrMaxSharedMemoryPerBlockOptin, device);
  if (error != cudaSuccess) return int(error);
  return int(cudaDeviceGetAttribute(&limits->processors, cudaDevAttrMultiProcessorCount, device));
}
static __global__ void probe() {}
int try_device(int device) {
  int before = 0;
  cudaFuncAttributes attributes;
  auto error = cudaGetDevice(&before);
  if (error == cudaSuccess) error = cudaSetDevice(device);
  if (error == cudaSuccess) error = cudaFuncGetAttributes(&attributes, probe);
  cudaSetDevice(before);
  return int(error);
}
int clear(void* memory, int64_t bytes, void* stream) {
  return int(cudaMemsetAsync(memory, 0, size_t(bytes), static_cast<cudaStream_t>(stream)));
}
const char* error_text(int error) { return cudaGetErrorString(cudaError_t(error)); }

#else

int limits_of(int, Limits* limits) {
  const char* const processors = std::getenv("MNV2_EMULATION_PROCESSORS");
  *limits = {processors ? std::atoi(processors) : 4, kSharedBytes};
  return 0;
}
int try_device(int) { return 0; }
int clear(void* memory, int64_t bytes, void*) {
  std::memset(memory, 0, size_t(bytes));
  return 0;
}
const char* error_text(int) { return "the emulation failed"; }

#endif

}  // namespace mnv2_fused::cuda
