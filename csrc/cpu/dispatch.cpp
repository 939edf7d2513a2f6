// The kernel table, what it needs of the CPU, and the override MNV2_FUSED_KERNEL.
#include <cstdlib>
#include <stdexcept>

#include "network.h"

namespace mnv2_fused {

namespace avx512 {
extern const Kernel kernel_f32;
}
namespace avx512_bf16 {
extern const Kernel kernel_bf16;
}
namespace avx512_vnni {
extern const Kernel kernel_s8;
}
namespace avx2 {
extern const Kernel kernel_f32, kernel_bf16, kernel_s8;
}
namespace scalar {
extern const Kernel kernel_f32, kernel_f64, kernel_bf16, kernel_s8;
}

const std::vector<const Kernel*>& kernels() {
  static const std::vector<const Kernel*> table = {
      &avx512::kernel_f32,       &avx2::kernel_f32,  &scalar::kernel_f32,  &scalar::kernel_f64,
      &avx512_bf16::kernel_bf16, &avx2::kernel_bf16, &scalar::kernel_bf16, &avx512_vnni::kernel_s8,
      &avx2::kernel_s8,          &scalar::kernel_s8,
  };
  return table;
}

std::vector<std::pair<std::string, bool>> cpu_features() {
  __builtin_cpu_init();  // these builtins also ask whether the system saves the registers
  return {
      {"avx2", __builtin_cpu_supports("avx2")},
      {"fma", __builtin_cpu_supports("fma")},
      {"avx512f", __builtin_cpu_supports("avx512f")},
      {"avx512bw", __builtin_cpu_supports("avx512bw")},
      {"avx512dq", __builtin_cpu_supports("avx512dq")},
      {"avx512vl", __builtin_cpu_supports("avx512vl")},
      {"avx512_bf16", __builtin_cpu_supports("avx512bf16")},
      {"avx512_vnni", __builtin_cpu_supports("avx512vnni")},
  };
}

const char* dtype_name(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return "float32";
    case Dtype::kFloat64:
      return "float64";
    case Dtype::kBFloat16:
      return "bfloat16";
    case Dtype::kInt8:
      return "int8";
  }
  return "";
}

int64_t element_size(Dtype dtype) {
  switch (dtype) {
    case Dtype::kFloat32:
      return 4;
    case Dtype::kFloat64:
      return 8;
    case Dtype::kBFloat16:
      return 2;
    case Dtype::kInt8:
      return 1;
  }
  return 0;
}

int64_t sum_size(Dtype dtype) { return dtype == Dtype::kFloat64 ? 8 : 4; }

std::string why_unsupported(const Kernel& kernel) {
  static const auto features = cpu_features();
  for (const char* const* name = kernel.requires_features; *name; ++name) {
    for (const auto& [feature, present] : features) {
      if (feature == *name && !present) return "this CPU has no " + feature;
    }
  }
  return "";
}

const Kernel& select_kernel(Dtype dtype) {
  const char* forced = std::getenv("MNV2_FUSED_KERNEL");
  std::string names;
  for (const Kernel* kernel : kernels()) {
    names += names.empty() ? kernel->name : std::string(", ") + kernel->name;
    if (forced && *forced) {
      if (std::string(forced) != kernel->name) continue;
      const std::string reason = why_unsupported(*kernel);
      if (!reason.empty()) {
        throw std::invalid_argument("MNV2_FUSED_KERNEL=" + std::string(forced) + " cannot run: " + reason);
      }
      if (kernel->dtype != dtype) {
        throw std::invalid_argument("MNV2_FUSED_KERNEL=" + std::string(forced) + " computes in " +
                                    dtype_name(kernel->dtype) + ", but the tensors are " + dtype_name(dtype));
      }
      return *kernel;
    }
    if (kernel->dtype == dtype && why_unsupported(*kernel).empty()) return *kernel;
  }
  throw std::invalid_argument("MNV2_FUSED_KERNEL=" + std::string(forced) + " is no kernel; there are " + names);
}

}  // namespace mnv2_fused
