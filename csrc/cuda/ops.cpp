// The ops on CUDA tensors: checks, allocation, the current stream. Where the kernels are compiled for the host
// (MNV2_EMULATED) these are ops of a library of their own, on CPU tensors, for the tests.
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>

#include <algorithm>

#include "../tensors.h"
#include "launch.h"

namespace mnv2_fused {
namespace {

using cuda::Type;

#ifdef MNV2_EMULATED

struct Device {
  explicit Device(const Tensor&) {}
  void* stream() const { return nullptr; }
  int index() const { return 0; }
};

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

#endif

void check(int error) { STD_TORCH_CHECK(error == 0, "CUDA: ", cuda::error_text(error)); }

Type type_of(const Tensor& x, bool tf32) {
  switch (x.scalar_type()) {
    case ScalarType::Half:
      return Type::kHalf;
    case ScalarType::BFloat16:
      return Type::kBfloat16;
    case ScalarType::Float:
      return tf32 ? Type::kTf32 : Type::kFloat;
    default:
      STD_TORCH_CHECK(false, "x must be float16, bfloat16 or float32, which there are CUDA kernels for");
  }
}

Tensor bytes(int64_t count, const Tensor& like) {
  return torch::stable::empty({count}, ScalarType::Byte, std::nullopt, like.device(), std::nullopt, std::nullopt);
}

Tensor inverted_residual(const Tensor& input, const std::optional<Tensor>& expand_weight,
                         const std::optional<Tensor>& expand_bias, const Tensor& depthwise_weight,
                         const Tensor& depthwise_bias, const Tensor& project_weight, const Tensor& project_bias,
                         int64_t stride, int64_t dilation, std::vector<int64_t> padding, bool residual,
                         bool project_relu6, bool tf32) {
  const Type type = type_of(input, tf32);
  const BlockWeights w(input, expand_weight, expand_bias, depthwise_weight, depthwise_bias, project_weight,
                       project_bias, padding);
  check_options(w.in, w.hidden, w.out, stride, dilation, padding);
  STD_TORCH_CHECK(w.expand || w.hidden == w.in, "without an expansion there are as many hidden channels as x has");
  const Tensor x = torch::stable::contiguous(input, MemoryFormat::ChannelsLast);
  const int64_t batch = x.size(0), height = x.size(2), width = x.size(3);
  const int64_t out_height = out_extent(height, padding[2] + padding[3], stride, dilation);
  const int64_t out_width = out_extent(width, padding[0] + padding[1], stride, dilation);
  STD_TORCH_CHECK(height > 0 && width > 0 && out_height > 0 && out_width > 0, "x of shape ", shape_of(x),
                  " is smaller than the dilated 3x3 kernel with this padding: the output would be empty");
  STD_TORCH_CHECK(batch * std::max(height * width, out_height * out_width) <= INT32_MAX,
                  "x must have less than 2^31 pixels, got ", shape_of(x));
  STD_TORCH_CHECK(!residual || (w.in == w.out && out_height == height && out_width == width),
                  "a residual needs an output of the shape of x, ", shape_of(x));
  const Tensor y = new_tensor({batch, w.out, out_height, out_width}, x, MemoryFormat::ChannelsLast);
  if (batch == 0) return y;

  const Device device(x);
  const cuda::Block block{type,          int(batch),      int(height),     int(width),     int(w.in),
                          int(w.hidden), int(w.out),      int(out_height), int(out_width), int(stride),
                          int(dilation), int(padding[0]), int(padding[2]), w.expand,       residual,
                          project_relu6};
  cuda::Limits limits{};
  check(cuda::limits_of(device.index(), &limits));
  limits.shared_bytes = std::min(limits.shared_bytes, cuda::kSharedBytes);
  const cuda::Tile tile = cuda::choose_tile(block, limits);
  STD_TORCH_CHECK(tile.tiles, "no tile of a block with ", w.in, ", ", w.hidden, " and ", w.out, " channels, dilation ",
                  dilation, ", fits in ", limits.shared_bytes, " bytes of shared memory");
  void* const stream = device.stream();
  const Tensor packed =
      bytes(cuda::packing(type, w.expand, block.in_channels, block.hidden_channels, block.out_channels).bytes, x);
  const Tensor workspace = bytes(cuda::round_up(tile.tiles * 4, 128) + tile.partial_bytes, x);
  if (tile.splits > 1) {
    Tensor counters = workspace;
    counters = torch::stable::narrow(counters, 0, 0, int64_t(tile.tiles) * 4);
    torch::stable::zero_(counters);
  }
  const std::vector<const void*> p = w.pointers();
  const void* const* rest = p.data() + 2 * w.expand;
  const cuda::Weights weights{w.expand ? p[0] : nullptr, w.expand ? p[1] : nullptr, rest[0], rest[1], rest[2], rest[3]};
  check(cuda::pack(block, weights, x.scalar_type() == ScalarType::Float, packed.data_ptr(), stream));
  check(cuda::block(block, tile, x.data_ptr(), packed.data_ptr(), y.data_ptr(), workspace.data_ptr(), stream));
  return y;
}

}  // namespace
}  // namespace mnv2_fused

#ifdef MNV2_EMULATED
STABLE_TORCH_LIBRARY(mnv2_emulated, m) { m.def(MNV2_INVERTED_RESIDUAL); }
STABLE_TORCH_LIBRARY_IMPL(mnv2_emulated, CPU, m) {
#else
STABLE_TORCH_LIBRARY_IMPL(mnv2_fused, CUDA, m) {
#endif
  m.impl("inverted_residual", TORCH_BOX(&mnv2_fused::inverted_residual));
}
