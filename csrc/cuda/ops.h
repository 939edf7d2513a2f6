// What the torch-facing files of the CUDA side share: the current stream, checks, memory. Where the kernels are
// compiled for the host (MNV2_EMULATED) the tensors are on the CPU.
#pragma once

#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "../tensors.h"
#include "launch.h"

namespace mnv2_fused {

#ifdef MNV2_EMULATED

struct Device {
  explicit Device(const Tensor&) {}
  void* stream() const { return nullptr; }
  int index() const { return 0; }
};

inline bool on_device(const Tensor& t) { return t.is_cpu(); }

#else

// The tensor's device made the current one, and its current stream.
class Device {
 public:
  explicit Device(const Tensor& x) : index_(x.get_device()), guard_(index_) {}
  int index() const { return index_; }
  void* stream() const {
    // Only a torch with CUDA has it, in a library that a torch without does not have: found when it is needed.
    using Function = int32_t (*)(int32_t, void**);
    static const Function current = [] {
      void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
      return library ? reinterpret_cast<Function>(dlsym(library, "aoti_torch_get_current_cuda_stream")) : nullptr;
    }();
    void* stream = nullptr;
    STD_TORCH_CHECK(current && current(index_, &stream) == 0, "this torch does not tell its current CUDA stream");
    return stream;
  }

 private:
  int index_;
  torch::stable::accelerator::DeviceGuard guard_;
};

inline bool on_device(const Tensor& t) { return t.is_cuda(); }

#endif

inline void check(int error) { STD_TORCH_CHECK(error == 0, "CUDA: ", cuda::error_text(error)); }

inline cuda::Type type_of(const Tensor& x, bool tf32) {
  switch (x.scalar_type()) {
    case ScalarType::Half:
      return cuda::Type::kHalf;
    case ScalarType::BFloat16:
      return cuda::Type::kBfloat16;
    case ScalarType::Float:
      return tf32 ? cuda::Type::kTf32 : cuda::Type::kFloat;
    default:
      STD_TORCH_CHECK(false, "x must be float16, bfloat16 or float32, which there are CUDA kernels for");
  }
}

inline cuda::Numbers numbers_of(const Tensor& t) { return {t.data_ptr(), t.scalar_type() == ScalarType::Float}; }

inline Tensor bytes(int64_t count, const Tensor& like) {
  return torch::stable::empty({count}, ScalarType::Byte, std::nullopt, like.device(), std::nullopt, std::nullopt);
}

inline cuda::Limits limits_of(const Device& device) {
  cuda::Limits limits{};
  check(cuda::limits_of(device.index(), &limits));
  limits.shared_bytes = std::min(limits.shared_bytes, cuda::kSharedBytes);
  return limits;
}

}  // namespace mnv2_fused
