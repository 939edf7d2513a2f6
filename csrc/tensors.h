// What the torch-facing files share: checks, allocation, torch's threads.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/Exception.h>

#include <optional>
#include <sstream>
#include <string>
#include <vector>

#include "cpu/network.h"
#include "cpu/workspace.h"

#ifdef MNV2_FUSED_WITH_CUDA
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

// The library of our ops. That of the emulated device is another one, whose tensors are on the CPU.
#ifdef MNV2_EMULATED
#define MNV2_LIBRARY mnv2_emulated
#define MNV2_OPS "mnv2_emulated::"
#else
#define MNV2_LIBRARY mnv2_fused
#define MNV2_OPS "mnv2_fused::"
#endif

namespace mnv2_fused {

using torch::headeronly::MemoryFormat;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

#ifdef MNV2_EMULATED
constexpr bool kEmulated = true;
#else
constexpr bool kEmulated = false;
#endif

// Whether the kernels of csrc/cpu/ compute with it, and not those of a device.
inline bool on_cpu(const Tensor& t) { return !kEmulated && t.is_cpu(); }

inline std::string shape_of(const Tensor& t) {
  std::ostringstream out;
  out << "[";
  for (int64_t i = 0; i < t.dim(); ++i) out << (i ? ", " : "") << t.size(i);
  out << "]";
  return out.str();
}

inline Dtype dtype_of(const Tensor& t, const char* name) {
  const ScalarType type = t.scalar_type();
  STD_TORCH_CHECK(type == ScalarType::Float || type == ScalarType::Double || type == ScalarType::BFloat16, name,
                  " must be float32, float64 or bfloat16; these kernels compute in no other dtype");
  return type == ScalarType::BFloat16 ? Dtype::kBFloat16
         : type == ScalarType::Float  ? Dtype::kFloat32
                                      : Dtype::kFloat64;
}

inline void check_size(const Tensor& t, const char* name, const std::vector<int64_t>& expected) {
  bool fits = t.dim() == int64_t(expected.size());
  for (size_t i = 0; fits && i < expected.size(); ++i) fits = t.size(i) == expected[i];
  if (!fits) {
    std::ostringstream shape;
    for (size_t i = 0; i < expected.size(); ++i) shape << (i ? ", " : "") << expected[i];
    STD_TORCH_CHECK(false, name, " must have shape [", shape.str(), "], got ", shape_of(t));
  }
}

inline void check_shape(const Tensor& t, const char* name, const Tensor& x, const std::vector<int64_t>& expected) {
  check_size(t, name, expected);
  STD_TORCH_CHECK(t.scalar_type() == x.scalar_type(), name, " must have the dtype of x");
  STD_TORCH_CHECK(t.device() == x.device(), name, " must be on the device of x");
}

// A dense copy where the tensor is not dense, in the order in which its weights are packed. Beside an x of 16-bit
// numbers it may be float32.
inline Tensor weight_of(const Tensor& t, const char* name, const Tensor& x, const std::vector<int64_t>& expected) {
  if (x.element_size() == 2 && t.scalar_type() == ScalarType::Float) {
    check_size(t, name, expected);
    STD_TORCH_CHECK(t.device() == x.device(), name, " must be on the device of x");
  } else {
    check_shape(t, name, x, expected);
  }
  return torch::stable::contiguous(t);
}

// float32, float64 or bfloat16; large ones of kept memory (pool.cpp).
Tensor new_cpu_tensor(const std::vector<int64_t>& shape, ScalarType dtype, MemoryFormat format);

inline Tensor new_tensor(const std::vector<int64_t>& shape, const Tensor& like, MemoryFormat format,
                         std::optional<ScalarType> type = std::nullopt) {
  const ScalarType dtype = type.value_or(like.scalar_type());
  if constexpr (!kEmulated) {
    if (like.is_cpu()) return new_cpu_tensor(shape, dtype, format);
  }
  return torch::stable::empty(shape, dtype, std::nullopt, like.device(), std::nullopt, format);
}

inline Tensor doubles(const std::vector<int64_t>& shape, const Tensor& like) {
  return new_tensor(shape, like, MemoryFormat::Contiguous, ScalarType::Double);
}

// The type of what is beside activations of x's: as wide as it at least, and as float32.
inline ScalarType sum_type(const Tensor& x) { return x.element_size() == 8 ? ScalarType::Double : ScalarType::Float; }

inline double* data_of(const Tensor& t) { return static_cast<double*>(t.data_ptr()); }

inline void on_torch_threads(int64_t n, void (*body)(int64_t, int64_t, void*), void* context) {
  torch::stable::parallel_for(0, n, 1, [&](int64_t begin, int64_t end) { body(begin, end, context); });
}

inline int thread_count() { return int(torch::stable::get_num_threads()); }

inline void check_options(int64_t in, int64_t hidden, int64_t out, int64_t stride, int64_t dilation,
                          const std::vector<int64_t>& padding) {
  const auto check = [](const char* name, int64_t n, int64_t low, int64_t high) {
    STD_TORCH_CHECK(n >= low && n <= high, name, " must be ", low, " to ", high, ", got ", n);
  };
  constexpr int64_t kMost = 1 << 20;
  STD_TORCH_CHECK(padding.size() == 4, "padding must be (left, right, top, bottom), got ", padding.size(), " integers");
  for (const int64_t n : {in, hidden, out}) check("channels", n, 1, kMost);
  check("stride", stride, 1, 2);
  check("dilation", dilation, 1, kMost);
  for (const int64_t side : padding) check("padding", side, 0, kMost);
}

// The weights of an inverted residual in the order in which they are packed, dense, the first two only where there is
// an expansion; checked, as the options are.
struct BlockWeights {
  int64_t in, hidden, out;
  bool expand;
  std::vector<Tensor> tensors;

  BlockWeights(const Tensor& x, const std::optional<Tensor>& expand_weight, const std::optional<Tensor>& expand_bias,
               const Tensor& depthwise_weight, const Tensor& depthwise_bias, const Tensor& project_weight,
               const Tensor& project_bias, const std::vector<int64_t>& padding)
      : in(0), hidden(0), out(0), expand(expand_weight.has_value()) {
    STD_TORCH_CHECK(x.dim() == 4, "x must be [N, C, H, W], got ", shape_of(x));
    STD_TORCH_CHECK(padding.size() == 4, "padding must be (left, right, top, bottom), got ", padding.size(),
                    " integers");
    STD_TORCH_CHECK(expand == expand_bias.has_value(),
                    "expand_weight and expand_bias go together: give both or neither");
    STD_TORCH_CHECK(depthwise_weight.dim() == 4 && project_weight.dim() == 4,
                    "depthwise_weight and project_weight must have 4 dimensions");
    in = x.size(1);
    hidden = depthwise_weight.size(0);
    out = project_weight.size(0);
    if (expand) {
      tensors.push_back(weight_of(*expand_weight, "expand_weight", x, {hidden, in, 1, 1}));
      tensors.push_back(weight_of(*expand_bias, "expand_bias", x, {hidden}));
    }
    tensors.push_back(weight_of(depthwise_weight, "depthwise_weight", x, {hidden, 1, 3, 3}));
    tensors.push_back(weight_of(depthwise_bias, "depthwise_bias", x, {hidden}));
    tensors.push_back(weight_of(project_weight, "project_weight", x, {out, hidden, 1, 1}));
    tensors.push_back(weight_of(project_bias, "project_bias", x, {out}));
  }
  std::vector<const void*> pointers() const {
    std::vector<const void*> found;
    for (const Tensor& t : tensors) found.push_back(t.data_ptr());
    return found;
  }
};

// `tf32`: on CUDA, float32 products may be rounded to 19 bits.
#define MNV2_INVERTED_RESIDUAL                                                                                 \
  "inverted_residual(Tensor x, Tensor? expand_weight, Tensor? expand_bias, Tensor depthwise_weight, Tensor "   \
  "depthwise_bias, Tensor project_weight, Tensor project_bias, int stride, int dilation, int[] padding, bool " \
  "residual, bool project_relu6, bool tf32=False) -> Tensor"

// The passes of training over pixels. Activations are dense in channels_last where no copy is wanted. Coefficients,
// centers, gates, biases and weights are float32, whatever those are; float64 beside float64. (Weights that come in 16
// bits are widened.)
#define MNV2_MOMENTS "moments(Tensor x, bool tf32=False) -> (Tensor, Tensor)"
#define MNV2_CHANNEL_MOMENTS "channel_moments(Tensor x) -> (Tensor, Tensor)"
#define MNV2_CHANNEL_PRODUCTS "channel_products(Tensor a, Tensor b, Tensor center, Tensor? gate) -> Tensor"
#define MNV2_AFFINE "affine(Tensor a, Tensor? b, Tensor coefficients, Tensor? gate, bool relu6) -> Tensor"
#define MNV2_MATRIX_ADD \
  "matrix_add_(Tensor(a!) y, Tensor x, Tensor matrix, Tensor bias, Tensor? residual, bool tf32=False) -> ()"
#define MNV2_FILTER_MOMENTS                                                                                        \
  "filter_moments(Tensor x, Tensor? expand_weight, Tensor? expand_bias, Tensor depthwise_weight, int stride, int " \
  "dilation, int[] padding, bool tf32=False) -> (Tensor, Tensor)"
#define MNV2_BLOCK_GRADIENTS                                                                                          \
  "block_gradients(Tensor dz, Tensor x, Tensor? expand_weight, Tensor? expand_bias, Tensor depthwise_weight, Tensor " \
  "project_weight, Tensor coefficients, int stride, int dilation, int[] padding, int wanted, bool tf32=False) -> "    \
  "(Tensor, Tensor, Tensor, Tensor, Tensor)"

#define MNV2_DEFINE_PASSES(m)   \
  m.def(MNV2_MOMENTS);          \
  m.def(MNV2_CHANNEL_MOMENTS);  \
  m.def(MNV2_CHANNEL_PRODUCTS); \
  m.def(MNV2_AFFINE);           \
  m.def(MNV2_MATRIX_ADD);       \
  m.def(MNV2_FILTER_MOMENTS);   \
  m.def(MNV2_BLOCK_GRADIENTS)

// The layer of one block for this input, checked as every plan is (ops.cpp).
Layer block_layer(const Kernel& kernel, const Tensor& x, bool expand, int64_t hidden, int64_t out, int64_t stride,
                  int64_t dilation, const std::vector<int64_t>& padding);

// What of the results of block_gradients is wanted: bits, in their order. The sums of ge come with the gradients of
// expansion and filter; those of g with the projection's, or when they are asked for.
enum Wanted : int64_t { kDx = 1, kExpandGradient = 2, kDepthwiseGradient = 4, kProjectGradient = 8, kSums = 16 };

#ifdef MNV2_FUSED_WITH_CUDA

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

#else

struct Device {
  explicit Device(const Tensor&) {}
  int index() const { return 0; }
  void* stream() const { return nullptr; }
};

#endif

}  // namespace mnv2_fused
