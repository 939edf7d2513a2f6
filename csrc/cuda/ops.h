// What the torch-facing files of the CUDA side share: the current stream, checks, memory. Where the kernels are
// compiled for the host (MNV2_EMULATED) the tensors are on the CPU.
#pragma once

#include <algorithm>

#include "../tensors.h"
#include "launch.h"

namespace mnv2_fused {

inline bool on_device(const Tensor& t) { return kEmulated ? t.is_cpu() : t.is_cuda(); }

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
